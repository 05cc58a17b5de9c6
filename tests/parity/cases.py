# SPDX-License-Identifier: Apache-2.0
"""The table of parity: what is compared with what, at which sizes, and what must not pass unseen.

A new system adds rows here, our side in `<system>.py` and a builder for each network that it is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tests.parity.harness import Ours


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; `system` and `oracle` are names of modules in tests/parity."""

    name: str
    system: str
    oracle: str
    sizes: Mapping[str, Any]  # changes of the config, __ for the dot
    kinds: tuple[str, ...]  # of batches, see `Ours`; the first one serves for gradients and layers
    quiet: bool  # small inputs of all norms, which show their epsilon
    checks: tuple[str, ...] = ("outputs", "layers", "gradients")  # or "training": the first 50 losses
    compares: str = "outputs"  # on both sides; or "terms": of the loss, on prepared batches
    slow: bool = False

    def ours(self) -> Ours:
        """Our side, made anew."""
        return importlib.import_module(f"tests.parity.{self.system}").build(self.sizes)

    def oracle_module(self) -> ModuleType:
        """Where the oracle's builder and its faults are; imports torch."""
        return importlib.import_module(f"tests.parity.{self.oracle}")


SQUARE = dict(data__patch_size=16, data__image_size=64)  # learned grid 4 x 4
SMALL = dict(
    model__width=48, model__fusion__num_heads=3, model__fusion__mlp_width=80, model__fusion__depth=3,
    model__unroll=3, data__patch_size=8, data__image_size=24,
)  # fmt: skip
# Adam with a large epsilon and decay shows where the one is added and what the other spares.
VISIBLE = dict(optimizer__eps=1e-3, optimizer__weight_decay=1.0, model__unroll=1)
STEPS = dict(train__steps=60, optimizer__warmup=0.1, optimizer__lr=1e-3)
PICTURES, PAIRS = ("padded", "unpadded"), ("pretraining",)
# Four stages of a ResNet, with and without repeated blocks, and nothing of a size that another part has.
FOUR_STAGES = dict(
    model__width=48, model__encoder__num_heads=3, model__decoder__num_heads=4, model__encoder__depth=3,
    model__encoder__mlp_width=80, model__decoder__mlp_width=56, model__object_queries__queries=11,
    model__grid_embed__depths=(1, 2, 1, 3), model__grid_embed__widths=(16, 32, 64, 128), model__unroll=3,
)  # fmt: skip
CANVASES = ("padded", "tall")

CASES = (
    Case("vilt-transformers", "vilt", "vilt_transformers", SQUARE, PICTURES, quiet=True),
    Case("vilt-transformers-deep", "vilt", "vilt_transformers", SMALL, PICTURES, quiet=False, slow=True),
    Case(
        "vilt-pretraining", "vilt", "vilt_reference", SQUARE | STEPS, PAIRS, quiet=False,
        checks=("gradients", "training"), compares="terms", slow=True,
    ),
    Case(
        "vilt-pretraining-visible", "vilt", "vilt_reference", SMALL | STEPS | VISIBLE, PAIRS, quiet=True,
        checks=("training",), compares="terms", slow=True,
    ),
    Case(
        "detr-transformers", "detr", "detr_transformers", {}, CANVASES, quiet=True, checks=("outputs", "gradients")
    ),
    Case("detr-transformers-deep", "detr", "detr_transformers", FOUR_STAGES, CANVASES, quiet=False, slow=True),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong constant on the other side, and the comparison that must see it."""

    case: str
    check: str  # "outputs", "layers", "gradients", "training" or, quicker, "first steps"
    alter: str  # a function of the oracle's module, applied to the oracle; "" = none
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of `Recipe`
    first: str = ""  # what the message must name before all else


PORT, DEEP, TRAINED = "vilt-transformers", "vilt-transformers-deep", "vilt-pretraining-visible"
DETECTOR = "detr-transformers"
FAULTS = (
    *(
        Fault(PORT, "outputs", name)
        for name in ("port_epsilon", "final_epsilon", "text_epsilon", "head_epsilon")
    ),
    Fault(DEEP, "outputs", "tanh_gelu"),
    Fault(DEEP, "outputs", "head_tanh_gelu"),
    Fault(PORT, "layers", "second_layer_epsilon", first="vilt.encoder.layer.1"),
    Fault(PORT, "gradients", "port_epsilon"),
    Fault(DEEP, "gradients", "tanh_gelu"),
    Fault(
        PORT, "gradients", "padding_learns", first="vilt.embeddings.text_embeddings.word_embeddings.weight"
    ),
    *(Fault(TRAINED, "first steps", name) for name in ("padding_learns", "other_beta", "torch_epsilon")),
    Fault(TRAINED, "first steps", "", dict(eps_before_correction=False)),
    Fault(TRAINED, "first steps", "", dict(no_decay=())),
    Fault(TRAINED, "first steps", "", dict(warmup=5)),
    Fault(TRAINED, "first steps", "", dict(betas=(0.9, 0.999))),
    Fault(TRAINED, "training", "", dict(decay_last=False)),
    *(
        Fault(DETECTOR, "outputs", name)
        for name in (
            "norm_epsilon",
            "statistics_epsilon",
            "normalised_layers",
            "early_stride",
            "central_mask",
        )
    ),
    Fault(DETECTOR, "layers", "unmasked_positions", first="model.encoder.layers.0"),
    Fault(DETECTOR, "layers", "early_stride", first="model.backbone.model.encoder.stages.1"),
)


@functools.cache
def made(name: str) -> Ours:
    """Our side of a case, made once."""
    return BY_NAME[name].ours()
