# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights of an exported DETR: what transformers must know of model and pictures.

Written for transformers 5.23, from the facts in its `models/detr` and `models/resnet`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.convert.hub import Folder
from vlp_jax.types import UserError, closest

CLASS = "DetrForObjectDetection"
HEADS = ()  # that may be left away
EPS = 1e-5  # of its norms; no key of its config says it
UNUSED = "N/A"  # what the files on the hub call a number without meaning
LONGEST = 1333 / 800  # longest side over the shorter one
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def choose(heads: Mapping[str, Any], wanted: str, dropped: Sequence[str]) -> str:
    """Returns the one class of transformers that holds a DETR of ours.

    Raises:
        UserError: another class, or a head to leave away.
    """
    if wanted not in ("", CLASS):
        raise UserError(
            f"transformers has no other place for our DETR than {CLASS}; --as={wanted} is given.{closest(wanted, [CLASS])}"
            f" Give --as={CLASS}, or leave it out."
        )
    if dropped:
        raise UserError(f"--drop={','.join(dropped)}: {CLASS} needs both heads of a DETR. Leave --drop away.")
    return CLASS


def needed(class_name: str) -> tuple[str, ...]:
    """The heads that may be left away and that this class has: none may."""
    return ()


def config_json(config: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """Returns `config.json` of a DetrConfig with a backbone of transformers.

    Raises:
        UserError: sizes that transformers' network cannot have, or labels of another number.
    """
    model, grid = config.model, config.model.grid_embed
    if int(grid.stem_width) == int(grid.widths[0]):
        raise UserError(
            f"config.model.grid_embed.stem_width and the first of widths are both {grid.stem_width}: transformers has no "
            "convolution in the first shortcut then. Export with --format=original."
        )
    if any(model[part].eps != EPS for part in ("encoder", "decoder")):
        raise UserError(
            f"config.model.encoder.eps is {model.encoder.eps:g}, decoder.eps {model.decoder.eps:g}: transformers has "
            f"{EPS:g} in every norm of a DETR. Export with --format=original."
        )
    names = [name or UNUSED for name in labels or map("LABEL_{}".format, range(model.heads.classes))]
    if len(names) != model.heads.classes:
        raise UserError(
            f"{CLASS} has {model.heads.classes} classes, but there are {len(names)} labels. Needed is one a class, in "
            "the order of the head's outputs. Give another file to --labels."
        )
    stages = [f"stage{number}" for number in range(1, len(grid.depths) + 1)]
    backbone = {
        "model_type": "resnet",
        "depths": [int(depth) for depth in grid.depths],
        "hidden_sizes": [int(width) for width in grid.widths],
        "embedding_size": int(grid.stem_width),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride lies in the 3x3 convolution
        "num_channels": 3,
        "out_features": stages[-1:],
        "stage_names": ["stem", *stages],
    }
    content = {
        "architectures": [CLASS],
        "model_type": "detr",
        "dtype": "float32",
        "use_timm_backbone": False,
        "backbone_config": backbone,
        "dilation": False,
        "position_embedding_type": "sine",
        "activation_function": "relu",
        "d_model": int(model.width),
        "num_queries": int(model.object_queries.queries),
        "auxiliary_loss": False,  # transformers 5.23 computes another network with it
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), float(model.dropout)),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    for part in ("encoder", "decoder"):
        content |= {
            f"{part}_layers": int(model[part].depth),
            f"{part}_attention_heads": int(model[part].num_heads),
            f"{part}_ffn_dim": int(model[part].mlp_width),
        }
    return content


def files(config: Any, class_name: str, labels: Sequence[str] | None, vocabulary: Path | None) -> Folder:
    """Returns the files beside `model.safetensors`: config.json and preprocessor_config.json.

    Args:
        config: of the checkpoint, resolved.
        class_name: CLASS.
        labels: names of the classes without no-object, "" = a number without meaning; None = LABEL_0 ...
        vocabulary: None; a DETR reads no text.

    Raises:
        UserError: see `config_json`.
    """
    content = {
        "config.json": config_json(config, labels),
        "preprocessor_config.json": _preprocessor(config.data),
    }
    notes = [
        "transformers 5.23 freezes all of this backbone, and computes another network with auxiliary_loss=True: mind "
        "both before you fine-tune there."
    ]
    if not labels:
        notes.append("No labels are known: classes are called LABEL_0 ...; --labels gives them names.")
    return Folder(
        {name: (json.dumps(part, indent=2) + "\n").encode() for name, part in content.items()}, notes
    )


def _preprocessor(data: Any) -> dict[str, Any]:
    """DetrImageProcessor; its longer side may differ from DETR's by a pixel or two, for it rounds otherwise."""
    side = int(data.image_size)
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": side, "longest_edge": int(data.image_limit) or int(LONGEST * side)},
        "resample": 2,  # PIL's number for bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": DEVIATION,
        "do_convert_annotations": True,
        "do_pad": True,
    }
