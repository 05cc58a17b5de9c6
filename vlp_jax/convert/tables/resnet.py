# SPDX-License-Identifier: Apache-2.0
"""A ResNet of bottleneck blocks with frozen norms, by the names of torchvision (and timm) and of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlp_jax.convert.ops import KERNEL, Shape
from vlp_jax.convert.tables import Row, Size, Table

OURS = "grid_embed/resnet"
STAGES = (1, 2, 3, 4)
EXPANSION = 4  # width of a block over that of its 3x3 convolution
# A norm's vectors: name in PyTorch -> ours.
VECTORS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
COUNTS = {r".*\.num_batches_tracked": "the norms are frozen: nothing is counted"}
DEPTHS, WIDTHS, STEM = (f"model.grid_embed.{name}" for name in ("depths", "widths", "stem_width"))


def _normed(convolution: str, norm: str, target: str, first: int = 0) -> tuple[Row, ...]:
    """A convolution without bias and the norm behind it."""
    vectors = (
        Row(f"{norm}.{theirs}", f"{target}/frozen/{ours}", first=first) for theirs, ours in VECTORS.items()
    )
    return Row(f"{convolution}.weight", f"{target}/kernel", KERNEL, first), *vectors


def torchvision_rows(prefix: str = "") -> tuple[Row, ...]:
    """The rows in the names of torchvision and timm, behind `prefix` (DETR: "backbone.0.body.")."""
    rows = _normed(f"{prefix}conv1", f"{prefix}bn1", f"{OURS}/stem")
    for stage in STAGES:
        theirs, ours = f"{prefix}layer{stage}", f"{OURS}/stage{stage}"
        rows += _normed(f"{theirs}.0.downsample.0", f"{theirs}.0.downsample.1", f"{ours}/first/shortcut")
        for number in (1, 2, 3):
            for block, place, first in ((f"{theirs}.0", "first", 0), (f"{theirs}.{{layer}}", "rest", 1)):
                names = f"{block}.conv{number}", f"{block}.bn{number}"
                rows += _normed(*names, f"{ours}/{place}/conv{number}", first)
    return rows


def huggingface_rows(prefix: str = "") -> tuple[Row, ...]:
    """The rows in the names of transformers, behind `prefix` ("resnet.")."""

    def pair(stem: str) -> tuple[str, str]:
        return f"{stem}.convolution", f"{stem}.normalization"

    rows = _normed(*pair(f"{prefix}embedder.embedder"), f"{OURS}/stem")
    for stage in STAGES:
        theirs, ours = f"{prefix}encoder.stages.{stage - 1}.layers", f"{OURS}/stage{stage}"
        rows += _normed(*pair(f"{theirs}.0.shortcut"), f"{ours}/first/shortcut")
        for number in (1, 2, 3):
            for block, place, first in ((f"{theirs}.0", "first", 0), (f"{theirs}.{{layer}}", "rest", 1)):
                rows += _normed(*pair(f"{block}.layer.{number - 1}"), f"{ours}/{place}/conv{number}", first)
    return rows


def _stages(shapes: Mapping[str, Shape]) -> int:
    """How many stages there are, whole or not."""
    return max(
        (stage for stage in STAGES if any(path.startswith(_stage(stage)) for path in shapes)), default=0
    )


def _stage(stage: int) -> str:
    return f"{OURS}/stage{stage}/"


def depths(shapes: Mapping[str, Shape]) -> tuple[int, ...] | None:
    """Blocks of each stage; a stack that lacks a tensor is as deep as its deepest one."""

    def depth(stage: int) -> int:
        rest = [shape[0] for path, shape in shapes.items() if path.startswith(f"{_stage(stage)}rest/")]
        return 1 + max(rest, default=0)

    return tuple(map(depth, range(1, _stages(shapes) + 1))) or None


def widths(shapes: Mapping[str, Shape]) -> tuple[int, ...] | None:
    """Features that each stage gives, by whatever there is of it; what is not known counts as the least."""

    def width(stage: int) -> int:
        for part in ("first/conv3", "first/shortcut", "rest/conv3"):
            if found := shapes.get(f"{_stage(stage)}{part}/kernel"):
                return found[-1]
        return EXPANSION

    return tuple(map(width, range(1, _stages(shapes) + 1))) or None


def _stem(shapes: Mapping[str, Shape]) -> int | None:
    found = shapes.get(f"{OURS}/stem/kernel")
    return found[-1] if found else None


SIZES: dict[str, Size] = {DEPTHS: depths, WIDTHS: widths, STEM: _stem}


def unfit(second: str, third: str) -> Callable[[Mapping[str, Shape]], str]:
    """Why a network is no ResNet of plain bottlenecks, by the names of the first block's 2nd and 3rd convolution."""

    def why(shapes: Mapping[str, Shape]) -> str:
        end = third.rsplit(".0.", 1)[-1]
        if second in shapes and not any(name.endswith(f".{end}") for name in shapes):
            return "its blocks have two convolutions (a ResNet-18 or 34), ours have three. Give a ResNet-50, 101 or 152."
        if second in shapes and shapes[second][0] != shapes[second][1]:
            return (
                f"{second} sees {shapes[second][1]} of {shapes[second][0]} features: its convolutions are grouped (a "
                "ResNeXt), ours are not. Give a ResNet-50, 101 or 152."
            )
        return ""

    return why


NO_CLASSES = "its classifier of pictures has no place here"
FRESH = {r"(?!grid_embed/resnet/).*": "a ResNet has nothing of it"}
# What transformers can say of a ResNet -> what ours is.
FIXED = {
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
TABLES = (
    Table(
        "ResNet of torchvision or timm",
        torchvision_rows(),
        marks=("conv1.weight", "layer1.{layer}.conv2.weight"),
        drop={r"fc\.(?:weight|bias)": NO_CLASSES, **COUNTS},
        fresh=FRESH,
        unfit=unfit("layer1.0.conv2.weight", "layer1.0.conv3.weight"),
    ),
    Table(
        "ResNet of transformers",
        huggingface_rows("resnet."),
        marks=(
            "resnet.embedder.embedder.convolution.weight",
            "resnet.encoder.stages.0.layers.{layer}.layer.1.convolution.weight",
        ),
        drop={r"classifier\.1\.(?:weight|bias)": NO_CLASSES, **COUNTS},
        fresh=FRESH,
        prefix="resnet.",
        fixed=FIXED,
        model_types=("resnet",),
        unfit=unfit(
            "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight",
            "resnet.encoder.stages.0.layers.0.layer.2.convolution.weight",
        ),
    ),
)
