# SPDX-License-Identifier: Apache-2.0
"""Every kind of file, converted, computes what transformers' own modules compute from it; and the proof sees what does not."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import shutil
import types
from unittest import mock

import numpy as np
import pytest

from vlp_jax import cli
from vlp_jax.convert import importing
from vlp_jax.convert.proof import comparison, lines

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
models = importlib.import_module("tests.convert.models")
kinds = importlib.import_module("tests.convert.kinds")
port = importlib.import_module("tests.parity.vilt_transformers")
ODD, OTHER, BOUND = models.ODD, models.OTHER, lines.BOUND
STACK = "fusion/stack/layers"
# One of each family of names; the others, which differ in container, heads or age, take minutes.
QUICK = (
    "ViT, Google npz",
    "distilled DeiT, timm",
    "BertForPreTraining, gamma and beta",
    "ViLT as released, NLVR2",
    "ViltForMaskedLM, tied",
)


@contextlib.contextmanager
def watched():
    """Yields a list that gets (batch, parts) of each run of our model."""
    seen, run = [], comparison.run_ours

    def keep(config, params, batch, alone):
        seen.append((dict(batch), run(config, params, batch, alone)))
        return seen[-1][1]

    with mock.patch.object(comparison, "run_ours", keep):
        yield seen


@contextlib.contextmanager
def converted(*paths, config=None, **more):
    """(conversion, parameters), as the command makes them."""
    wishes = importing.Wishes(
        "vilt", config or cli.load_config("vilt:variant=b32"), config is not None, **more
    )
    with contextlib.ExitStack() as stack:
        conversion = importing.plan(importing.open_all(stack, list(map(str, paths))), wishes)
        yield conversion, importing.fill(conversion)


def theirs(name, net, batch, ours, file) -> dict:
    """What the network of a kind computes; a head that transformers lacks is one product of matrices more."""
    if name in kinds.VIT:
        return models.of_vit(net, batch)
    if name in kinds.BERT:
        return models.of_bert(net, batch, ours["norm"][:, : batch["text_ids"].shape[1]])
    parts = models.of_vilt(net, batch)
    if "itm" in ours:
        parts["itm"] = parts["pooled"] @ file.read("itm_score.fc.weight").T + file.read("itm_score.fc.bias")
    return parts


def compare(name, size, folder, batch=None):
    """(ratios by part, proof, container) of a kind of file; `batch` in place of the one of the proof."""
    net, path = kinds.KINDS[name].write(size, folder)
    config = models.config_of(size) if name in kinds.BERT else None
    given = mock.patch.object(comparison, "random_batch", lambda *_: dict(batch))
    with (
        given if batch else contextlib.nullcontext(),
        converted(path, config=config) as (conversion, params),
        watched() as seen,
    ):
        proof = comparison.prove(conversion, params)
        file = conversion.plan.readings[0].source
        ((batch, ours),) = seen
        found = models.ratios(ours, theirs(name, net, batch, ours, file), batch)
    return found, proof, file.container


def check(name, size, folder, batch=None):
    found, proof, container = compare(name, size, folder, batch)
    print(f"| {name} | {container} | {', '.join(found)} | {max(found.values()):.1e} |")
    assert max(found.values()) <= BOUND, found
    assert proof.good and not proof.left_out, proof
    assert {line.part for line in proof.lines} >= found.keys()


@pytest.mark.parametrize("name", QUICK)
def test_ours_is_what_transformers_computes(name, tmp_path):
    check(name, ODD, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in kinds.KINDS if name not in QUICK])
def test_ours_is_what_transformers_computes_in_every_container(name, tmp_path):
    check(name, ODD, tmp_path)


@pytest.mark.learn
@pytest.mark.parametrize("name", kinds.KINDS)
def test_at_another_size_with_patches_in_any_order(name, tmp_path):
    check(name, OTHER, tmp_path, models.batch_of(OTHER))


CONTAINERS = ("safetensors", "npz", "msgpack", "torch zip", "torch legacy", "bin", "torch zip:lightning")


def test_every_container_gives_the_same_bits(tmp_path):
    net = models.network("ViltForQuestionAnswering", ODD)
    found = {}
    for container in CONTAINERS:
        path = kinds.save(container, kinds.memory(net), tmp_path / container.replace(" ", "_"))
        kinds.config_beside(net, path, whole=True)
        with converted(path) as (_, params):
            found[container] = params
    net.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    with converted(tmp_path / "shards") as (conversion, wanted):
        assert len(conversion.plan.readings[0].source.files) > 5
    for container, params in found.items():
        assert params.keys() == wanted.keys()
        assert all(np.array_equal(params[path], wanted[path]) for path in wanted), container


def test_heads_that_no_output_shows_are_taken_over(tmp_path):
    _, path = kinds.KINDS["ViLT as released, pretraining with masked patches"].write(ODD, tmp_path)
    with converted(path) as (conversion, params):
        read = conversion.plan.readings[0].source.read
        pairs = {
            "heads/mpp/dense/kernel": read("mpp_score.transform.dense.weight").T,
            "heads/mpp/norm/scale": read("mpp_score.transform.LayerNorm.weight"),
            "heads/mpp/decoder/kernel": read("mpp_score.decoder.weight").T,
            "heads/mpp/decoder/bias": read("mpp_score.decoder.bias"),
            "patch_embed/mask_vector": read("transformer.mask_token")[0, 0],
        }
    for name, wanted in pairs.items():
        assert np.array_equal(params[name], wanted), name


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("container", ["torch zip", "safetensors"])
def test_half_precision_becomes_the_rounded_values(kind, container, tmp_path):
    from safetensors.torch import save_file

    net = models.network("ViltForQuestionAnswering", ODD).to(kind)
    path, wanted = tmp_path / "half.file", tmp_path / "whole"
    torch.save(net.state_dict(), path) if container == "torch zip" else save_file(net.state_dict(), path)
    kinds.config_beside(net, path, whole=True)
    net.to(torch.float32).save_pretrained(wanted)
    with converted(path) as (_, found), converted(wanted) as (_, rounded):
        for name, array in found.items():
            assert array.dtype == np.float32 and np.array_equal(array, rounded[name]), name


# What the proof sees, and what only config.json says


RELEASED = "ViLT as released, pretraining"


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """A released file with its conversion, parameters, and what they compute on the batch of the proof."""
    net, path = kinds.KINDS[RELEASED].write(ODD, tmp_path_factory.mktemp("released"))
    with converted(path) as (conversion, params), watched() as seen:
        assert comparison.prove(conversion, params).good
        ((batch, ours),) = seen
        wanted = theirs(RELEASED, net, batch, ours, conversion.plan.readings[0].source)
        assert max(models.ratios(ours, wanted, batch).values()) <= BOUND
        assert {"mlm", "itm", "pooled"} <= wanted.keys()
        yield conversion, params, ours, (net, batch)


def test_one_percent_of_any_tensor_is_seen(pretraining):
    conversion, params, ours, _ = pretraining
    source = conversion.plan.readings[0].source
    read, unseen = source.read, []
    for changed in source.tensors:
        with (
            mock.patch.object(
                source, "read", lambda name, c=changed: read(name) * (1.01 if name == c else 1)
            ),
            mock.patch.object(comparison, "run_ours", lambda *_: dict(ours)),
        ):
            unseen += [changed] if comparison.prove(conversion, params).good else []
    assert unseen == ["text_embeddings.position_ids"]  # no weight


@pytest.mark.parametrize(
    "mistake",
    [
        port.port_epsilon,
        port.second_layer_epsilon,
        port.final_epsilon,
        port.text_epsilon,
        port.head_epsilon,
        port.tanh_gelu,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_what_shapes_do_not_fix_shows(pretraining, mistake):
    """A file as released says nothing of epsilons and activation: another value in one place would be seen."""
    _, _, ours, (net, batch) = pretraining
    net = copy.deepcopy(net)
    mistake(types.SimpleNamespace(net=net))
    assert max(models.ratios(ours, models.of_vilt(net, batch), batch).values()) > 2 * BOUND


@pytest.mark.parametrize(
    "part", ["query", *(pytest.param(part, marks=pytest.mark.slow) for part in ("key", "value"))]
)
def test_parts_in_each_other_s_place_are_seen(pretraining, part):
    conversion, params, *_ = pretraining
    other = {"query": "key", "key": "value", "value": "out"}[part]
    one, two = (f"{STACK}/attention/{name}/kernel" for name in (part, other))
    proof = comparison.prove(conversion, {**params, one: params[two], two: params[one]})
    assert [line.part for line in proof.lines if not line.good][0] == "layer 0"
    assert all(line.good for line in proof.lines if line.part in ("text_embed", "patch_embed"))


def test_what_is_no_number_is_seen(pretraining):
    conversion, params, ours, _ = pretraining
    for value in (np.nan, np.inf):
        broken = ours["itm"].copy()
        broken[0, 0] = value
        with mock.patch.object(comparison, "run_ours", lambda *_, b=broken: {**ours, "itm": b}):
            lines = comparison.prove(conversion, params).lines
        assert [line.part for line in lines if not line.good] == ["itm"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 4},
        pytest.param({"layer_norm_eps": kinds.EPS + 1e-2}, marks=pytest.mark.slow),
        pytest.param({"layer_norm_eps": 1e-12}, marks=pytest.mark.slow),
        pytest.param({"hidden_act": "gelu_new"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_config_json_that_lies_makes_another_model(change, tmp_path):
    """What config.json says is what runs, on both sides of the proof: only the true network tells."""
    net, path = kinds.KINDS["ViTModel"].write(ODD, tmp_path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with converted(path) as (conversion, params), watched() as seen:
        comparison.prove(conversion, params)
    ((batch, ours),) = seen
    assert max(models.ratios(ours, models.of_vit(net, batch), batch).values()) > 2 * BOUND


# Several sources, other sizes


@pytest.mark.parametrize(
    "image, length",
    [("ViTModel", 7), pytest.param("distilled DeiT, timm", 64, marks=pytest.mark.slow)],
)
def test_a_picture_from_one_file_and_words_from_another(image, length, tmp_path):
    vit, body = kinds.KINDS[image].write(ODD, tmp_path / "vit")
    bert = models.tied(models.network("BertForMaskedLM", ODD, max_position_embeddings=length))
    bert.save_pretrained(tmp_path / "bert")
    words = bert.get_input_embeddings().weight.detach().numpy()
    with converted(body, tmp_path / "bert") as (conversion, params), watched() as seen:
        proof = comparison.prove(conversion, params)
    assert proof.good, proof
    config, (alone, both) = conversion.config, seen
    assert config.model.text_embed.length == 40 and config.model.text_embed.vocab_size == ODD.words
    assert np.array_equal(params["heads/mlm/decoder/kernel"], words.T)
    assert np.array_equal(params["text_embed/word"], words)
    assert {path.split("/")[0] for path in conversion.plan.fresh} == {"fusion", "heads"}
    ratios = models.ratios(alone[1], models.of_vit(vit, alone[0]), alone[0])
    assert max(ratios.values()) <= BOUND
    known = {**both[0], "text_ids": both[0]["text_ids"][:, :length]}
    text = models.of_bert(bert, known, both[1]["norm"][:, :length])["text_embed"]
    assert np.abs(both[1]["text_embed"][:, :length] - text).max() <= BOUND * max(1, np.abs(text).max())


@pytest.mark.parametrize(
    "method", ["bicubic", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bilinear", "aligned"))]
)
def test_another_grid_and_another_length(method, tmp_path):
    _, path = kinds.KINDS[RELEASED].write(ODD, tmp_path)
    config = models.config_of(ODD, data__image_size=5 * ODD.patch, data__text_length=ODD.length + 4)
    with converted(path, config=config, position_resize=method) as (conversion, params):
        proof = comparison.prove(conversion, params)
        positions = torch.tensor(conversion.plan.readings[0].source.read("transformer.pos_embed"))
        text = conversion.plan.readings[0].source.read("text_embeddings.position_embeddings.weight")
    grid = positions[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    theirs = {"aligned": ("bilinear", True)}.get(method, (method, False))
    wanted = torch.nn.functional.interpolate(grid, (5, 5), mode=theirs[0], align_corners=theirs[1])
    np.testing.assert_allclose(
        params["patch_embed/position"], wanted[0].permute(1, 2, 0).numpy(), rtol=0, atol=1e-6
    )
    assert np.array_equal(params["text_embed/position"][: len(text)], text)
    assert params["text_embed/position"][len(text) :].any()
    assert set(conversion.plan.resized) == {"patch_embed/position", "text_embed/position"}
    assert proof.good, proof


@pytest.mark.slow
def test_a_shorter_text_takes_the_first_positions(tmp_path):
    _, path = kinds.KINDS["BertForMaskedLM, tied"].write(ODD, tmp_path)
    with converted(path, config=models.config_of(ODD, data__text_length=8)) as (conversion, params):
        table = conversion.plan.readings[0].source.read("bert.embeddings.position_embeddings.weight")
        assert comparison.prove(conversion, params).good
    assert np.array_equal(params["text_embed/position"], table[:8])


@pytest.mark.slow
def test_a_second_picture_starts_as_the_first(tmp_path):
    _, path = kinds.KINDS[RELEASED].write(ODD, tmp_path)
    changes = dict(model__modalities=3, model__heads__pair=2, objectives__mlm=0.0, objectives__itm=0.0)
    config = models.config_of(ODD, objectives__wpa=0.0, **changes)
    with converted(path, config=config) as (conversion, params):
        rows = conversion.plan.readings[0].source.read("token_type_embeddings.weight")
        assert comparison.prove(conversion, params).good
    assert np.array_equal(params["fusion/modality"], rows[[0, 1, 1]])
    assert {path.split("/")[1] for path in conversion.plan.fresh} == {"pair"}
    assert {path.split("/")[1] for path in conversion.plan.unused} == {"mlm", "itm"}


def test_answers_are_taken_over_by_their_label(tmp_path):
    old, new = [f"answer {i}" for i in range(ODD.classes)], ["answer 5", "another", "answer 0"]
    net = models.network("ViltForQuestionAnswering", ODD, id2label=dict(enumerate(old)))
    net.save_pretrained(tmp_path / "vqa")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(new))
    weight, bias = net.classifier[3].weight.detach().numpy(), net.classifier[3].bias.detach().numpy()
    with converted(tmp_path / "vqa", labels=str(labels)) as (conversion, params):
        proof = comparison.prove(conversion, params)
    assert conversion.labels == new and conversion.config.model.heads.answer == 3
    kernel = params["heads/answer/out/kernel"]
    assert np.array_equal(kernel[:, [0, 2]], weight[[5, 0]].T)
    assert np.array_equal(params["heads/answer/out/bias"][[0, 2]], bias[[5, 0]])
    assert not any(np.array_equal(kernel[:, 1], row) for row in weight)
    assert proof.good and "pooled" in {line.part for line in proof.lines}
    assert any("answer" in part for part in proof.left_out)


@pytest.mark.parametrize("count", [ODD.classes, 3])
def test_labels_for_a_head_whose_classes_have_no_names(count, tmp_path):
    """As many as there are classes name them; of another number, none can be taken over."""
    net = models.network("ViltForQuestionAnswering", ODD)  # LABEL_0, LABEL_1, ...
    net.save_pretrained(tmp_path / "vqa")
    labels, names = tmp_path / "labels.txt", [f"answer {i}" for i in range(count)]
    labels.write_text("\n".join(names))
    with converted(tmp_path / "vqa", labels=str(labels)) as (conversion, params):
        found, weight = params["heads/answer/out/kernel"], net.classifier[3].weight.detach().numpy().T
    assert conversion.labels == names and found.shape == (2 * ODD.width, count)
    assert np.array_equal(found, weight) == (count == ODD.classes)
    assert any("does not name" in note for note in conversion.notes) == (count != ODD.classes)


def test_without_config_json_an_odd_width_names_the_way_out(tmp_path):
    _, path = kinds.KINDS["ViLT as released, VQA"].write(ODD, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    with pytest.raises(importing.UserError, match="num_attention_heads"), converted(alone / path.name):
        pass
