# SPDX-License-Identifier: Apache-2.0
"""DETRs and ResNets of every kind of file: one tree of parameters, which computes what transformers and torch do."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402

from tests.convert import detectors  # noqa: E402
from tests.convert.detectors import ODD, SIZES  # noqa: E402
from vlp_jax import cli  # noqa: E402
from vlp_jax.convert import importing, writing  # noqa: E402
from vlp_jax.convert.proof import comparison, detection  # noqa: E402
from vlp_jax.convert.tables import detr, resnet  # noqa: E402
from vlp_jax.data import categories  # noqa: E402

BOUNDS = {"logits": 1e-4, "boxes": 1e-5, "resnet": 1e-5}  # of max(1, the largest value)
BACKBONE = "model.backbone.conv_encoder.model."
HEADS = {"encoder_attention_heads": ODD.heads[0], "decoder_attention_heads": ODD.heads[1]}


def saved(folder, tensors, wrap=lambda state: state, legacy=False, beside=HEADS):
    """A file of torch.save with the numbers of heads beside it."""
    folder.mkdir()
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    torch.save(wrap(state), folder / "detr.pth", _use_new_zipfile_serialization=not legacy)
    (folder / "config.json").write_text(json.dumps(beside))
    return folder / "detr.pth"


def trained(state):
    """What the authors' main.py saves."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    args = argparse.Namespace(lr=1e-4, backbone="resnet50")
    return {"model": state, "optimizer": optimizer, "lr_scheduler": {}, "epoch": 3, "args": args}


def panoptic(tensors):
    """The same below the model for masks."""
    masks = {"mask_head.lay1.weight": np.ones((4, 4, 3, 3)), "bbox_attention.q_linear.bias": np.ones(4)}
    return {f"detr.{name}": value for name, value in tensors.items()} | masks


def of_transformers(folder, tensors, net):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    net.config.save_pretrained(folder)
    return folder


def on_disk(net, folder):
    detectors.disk(net, folder)
    return folder


def in_memory(net, folder):
    folder.mkdir()
    return of_transformers(folder, detectors.memory(net), net)


def of_timm(net, folder):
    return of_transformers(
        folder, detectors.torchvision(detectors.disk(net, folder), BACKBONE, BACKBONE), net
    )


KINDS = {
    "as released": lambda net, folder: saved(folder, detectors.original(net), lambda state: {"model": state}),
    "as trained, torch legacy": lambda net, folder: saved(folder, detectors.original(net), trained, True),
    "panoptic, as released": lambda net, folder: saved(folder, panoptic(detectors.original(net))),
    "panoptic, transformers": lambda net, folder: saved(folder, panoptic(detectors.memory(net))),
    "transformers": on_disk,
    "transformers 5 in memory": in_memory,
    "transformers, backbone of timm": of_timm,
}


@contextlib.contextmanager
def planned(path, config=None, **more):
    wishes = importing.Wishes("detr", config or cli.load_config(detr.CONFIG), config is not None, **more)
    with contextlib.ExitStack() as stack:
        yield importing.plan(importing.open_all(stack, [str(path)]), wishes)


def converted(path, **more):
    """(conversion, parameters) of a file."""
    with planned(path, **more) as conversion:
        return conversion, importing.fill(conversion)


@contextlib.contextmanager
def watched():
    """Yields a list that gets the parts of each run of our model."""
    seen, run = [], detection.run_ours

    def keep(*given):
        seen.append(run(*given))
        return seen[-1]

    with mock.patch.object(detection, "run_ours", keep):
        yield seen


def with_resnet(parts):
    return parts | {"resnet": [part for name, part in parts.items() if name.startswith("stage")][-1]}


def ratio(one, other):
    return np.abs(one - other).max() / max(1, np.abs(other).max())


@pytest.fixture(scope="module")
def net():
    return detectors.network()


@pytest.fixture(scope="module")
def tree(net, tmp_path_factory):
    return converted(on_disk(net, tmp_path_factory.mktemp("detr") / "net"))


QUICK = ("as released", "panoptic, transformers", "transformers, backbone of timm")  # the others are slow


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_every_kind_gives_the_same_tree(kind, net, tree, tmp_path):
    conversion, params = converted(KINDS[kind](net, tmp_path / "net"))
    assert params.keys() == tree[1].keys() and not conversion.plan.fresh
    for path, array in tree[1].items():
        assert np.array_equal(params[path], array), path
    assert conversion.config.model == tree[0].config.model
    dropped = conversion.plan.readings[0].dropped
    assert len(dropped) == 2 * kind.startswith("panoptic") and set(dropped.values()) <= {detr.NO_MASKS}


@pytest.mark.parametrize(
    "size", [pytest.param(name, marks=[pytest.mark.slow] * (name != "odd")) for name in SIZES]
)
def test_ours_is_what_transformers_computes(size, tmp_path):
    net, batch = detectors.network(SIZES[size]), detection.random_batch()
    path = KINDS["transformers"](net, tmp_path / "net")
    with planned(path) as conversion, watched() as seen:
        proof = comparison.prove(conversion, importing.fill(conversion))
    found, wanted = with_resnet(*seen), detectors.outputs(net, batch)
    ratios = {part: ratio(found[part], wanted[part]) for part in wanted}
    print(f"| {size} | {' | '.join(f'{part} {value:.1e}' for part, value in ratios.items())} |")
    assert all(ratios[part] <= BOUNDS[part] for part in wanted), ratios
    assert proof.good and not proof.left_out
    blocks, layers = sum(SIZES[size].depths), sum(SIZES[size].layers)
    assert len(proof.lines) == len({one.part for one in proof.lines}) == 1 + blocks + 1 + layers + 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_proved_by_its_own_names(kind, net, tmp_path):
    with planned(KINDS[kind](net, tmp_path / "net")) as conversion:
        params = importing.fill(conversion)
        proof = comparison.prove(conversion, params)
        assert proof.good and {"stage 4 block 2", "encoder 1", "decoder 2", "boxes"} <= {
            one.part for one in proof.lines
        }
        moved = {**params, "encoder/layers/norm2/bias": params["encoder/layers/norm2/bias"] + 1e-3}
        wrong = [one.part for one in comparison.prove(conversion, moved).lines if not one.good]
    assert wrong[0] == "encoder 0" and "boxes" in wrong


def test_the_names_and_shapes_of_the_released_files(specs):
    config = cli.load_config(detr.CONFIG)
    config.model.heads.classes = detr.COCO
    shapes = importing.shapes(config)
    frozen = sum(math.prod(shape) for path, shape in shapes.items() if "/frozen/" in path)
    assert frozen == 106_240 and sum(map(math.prod, shapes.values())) - frozen == 41_524_768
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    for table, file in ((detr.ORIGINAL, "detr_resnet50"), (detr.HUGGINGFACE, "hf_detr_v5_resnetbackbone")):
        wanted = json.loads((specs / f"keys_{file}.json").read_text())
        names = {
            name: writing.written(row, layer, params).shape
            for name, row, layer in writing.written_names(table, shapes)
        }
        spelled = {engine_name(table, name): tuple(shape) for name, shape in wanted.items()}
        assert names == spelled
    assert len(wanted) == 530


def engine_name(table, name):
    """A name as the rows of a table have it."""
    for pattern, replacement in table.spellings:
        name = re.sub(pattern, replacement, name)
    return name


# The backbone alone


def torchvision_file(folder, size=ODD):
    net = detectors.randomise(detectors.ResNet(size.depths, size.widths, size.stem))
    torch.save(net.state_dict(), folder / "resnet.pth")
    return net, folder / "resnet.pth"


def transformers_file(name):
    def write(folder, size=ODD):
        sizes = dict(embedding_size=size.stem, hidden_sizes=list(size.widths), depths=list(size.depths))
        net = detectors.randomise(getattr(transformers, name)(transformers.ResNetConfig(**sizes)))
        net.save_pretrained(folder / "resnet")
        return getattr(net, "resnet", net), folder / "resnet"

    return write


RESNETS = {
    "torchvision": torchvision_file,
    "ResNetModel": transformers_file("ResNetModel"),
    "ResNetForImageClassification": transformers_file("ResNetForImageClassification"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESNETS)
def test_a_resnet_is_a_part(kind, tmp_path):
    net, path = RESNETS[kind](tmp_path)
    config = cli.load_config("detr:variant=tiny")
    config.model.heads.classes, config.model.grid_embed = (
        4,
        dict(depths=ODD.depths, widths=ODD.widths, stem_width=ODD.stem),
    )
    with planned(path, config=config) as conversion, watched() as seen:
        params = importing.fill(conversion)
        proof = comparison.prove(conversion, params)
    batch = detection.random_batch()
    with torch.no_grad():
        out = net(detectors.pixels(batch))
    wanted = getattr(out, "last_hidden_state", out).permute(0, 2, 3, 1).numpy()
    assert ratio(with_resnet(*seen)["resnet"], wanted) <= BOUNDS["resnet"]
    assert proof.good and len(proof.lines) == 1 + sum(ODD.depths)
    assert set(conversion.plan.fresh.values()) == {"a ResNet has nothing of it"}
    assert conversion.plan.fresh.keys() == {path for path in params if not path.startswith(resnet.OURS)}
    assert set(conversion.plan.readings[0].dropped.values()) <= {resnet.NO_CLASSES, *resnet.COUNTS.values()}
    assert any(name.endswith("num_batches_tracked") for name in conversion.plan.readings[0].dropped)


def test_a_resnet_gives_the_sizes_of_a_config_that_nobody_gave(tmp_path):
    _, path = torchvision_file(tmp_path)
    with planned(path) as conversion:
        grid = conversion.config.model.grid_embed
        assert (grid.depths, grid.widths, grid.stem_width) == (ODD.depths, ODD.widths, ODD.stem)
        assert conversion.config.model.heads.classes == 91 and len(conversion.labels) == 91


def test_our_resnet_in_torch_has_torchvision_s_names(specs):
    with torch.device("meta"):
        net = detectors.ResNet((3, 4, 6, 3), (256, 512, 1024, 2048), 64, 1000)
    wanted = json.loads((specs / "keys_torchvision_resnet50.json").read_text())
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == wanted


# What files do not say by their shapes


def test_without_a_config_the_original_s_heads_and_coco_s_names_hold(tmp_path):
    size = detectors.DEEP
    path = saved(tmp_path / "net", detectors.original(detectors.network(size)), beside={})
    conversion, _ = converted(path)
    model = conversion.config.model
    assert (model.encoder.num_heads, model.decoder.num_heads, model.encoder.eps) == (8, 8, 1e-5)
    assert (conversion.config.variant, conversion.config.data.categories, model.dtype) == (
        "r50",
        "coco91",
        "float32",
    )
    assert list(conversion.labels) == [categories.COCO.get(number, "") for number in range(91)]


def test_labels_of_the_hub_lose_their_placeholders(net, tmp_path):
    path = on_disk(net, tmp_path / "net")
    content = json.loads((path / "config.json").read_text())
    content["id2label"] = dict(enumerate(["N/A", "net", "boat", "N/A", "eel"]))
    (path / "config.json").write_text(json.dumps(content))
    conversion, params = converted(path)
    assert conversion.labels == ["", "net", "boat", "", "eel"] and conversion.config.data.categories == "data"
    (tmp_path / "new.json").write_text(json.dumps(["eel", "", "sail", "net"]))
    other, moved = converted(path, labels=str(tmp_path / "new.json"))
    assert other.config.model.heads.classes == 4 and any("2 of 4" in note for note in other.notes)
    for end in ("kernel", "bias"):
        old, new = (found[f"heads/class/dense/{end}"] for found in (params, moved))
        assert np.array_equal(new[..., [0, 3, 4]], old[..., [4, 1, 5]])  # no object is the last, as before
        assert not np.isin(new[..., [1, 2]], old).any()


@pytest.mark.slow
def test_the_sides_and_colors_of_pictures(net, tmp_path):
    path = on_disk(net, tmp_path / "net")
    beside = path / "preprocessor_config.json"
    colors = {"image_mean": list(detectors.MEAN), "image_std": list(detectors.DEVIATION)}
    for size, wanted in (
        ({"shortest_edge": 800, "longest_edge": 1333}, (800, 0, 11, 7)),
        ({"shortest_edge": 480, "longest_edge": 640}, (480, 640, 0, 0)),
    ):
        beside.write_text(json.dumps({"size": size, **colors}))
        with planned(path) as conversion:
            data = conversion.config.data
        assert (data.image_size, data.image_limit, len(data.image_sizes), len(data.canvases)) == wanted
    beside.write_text(json.dumps({"size": 800, "max_size": 1333} | colors | {"image_mean": [0.5] * 3}))
    with planned(path) as conversion:
        origins = {setting.key: setting.origin for setting in conversion.settings}
        assert conversion.config.data.image_size == 800
    assert "has mean [0.5, 0.5, 0.5]" in origins["image transform"]
