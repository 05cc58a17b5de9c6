# SPDX-License-Identifier: Apache-2.0
"""ViT's layouts with the names that transformers really gives, and one ViT told in all of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.convert.tables import matcher
from tests.convert.tables.matcher import DEPTH, GRID, HEADS, HIDDEN, PATCH, WIDTH
from vlp_jax.convert.tables import bert, vit

TABLES = {table.name: table for table in vit.TABLES}
HEAD = WIDTH // HEADS
STACK = "fusion/stack/layers"
SIZES = dict(
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=HIDDEN,
    image_size=GRID * PATCH,
    patch_size=PATCH,
    num_labels=7,
)


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def body(special: int = 1) -> dict[str, np.ndarray]:
    """A ViT in the words of its paper: kernels [in, out], heads apart, patches [row, column, color]."""
    shapes = {
        "class": (WIDTH,),
        "distillation": (WIDTH,),
        "positions": (special + GRID**2, WIDTH),
        "patch": (PATCH, PATCH, 3, WIDTH),
        "patch_bias": (WIDTH,),
        "norm_scale": (WIDTH,),
        "norm_bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name in "qkv":
            shapes |= {f"{i}.{name}": (WIDTH, HEADS, HEAD), f"{i}.{name}_bias": (HEADS, HEAD)}
        shapes |= {f"{i}.out": (HEADS, HEAD, WIDTH), f"{i}.out_bias": (WIDTH,)}
        shapes |= {f"{i}.up": (WIDTH, HIDDEN), f"{i}.up_bias": (HIDDEN,)}
        shapes |= {f"{i}.down": (HIDDEN, WIDTH), f"{i}.down_bias": (WIDTH,)}
        shapes |= {f"{i}.{part}": (WIDTH,) for part in ("scale1", "bias1", "scale2", "bias2")}
    return {name: draw(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def wanted(v: dict[str, np.ndarray], special: int = 1) -> dict[str, np.ndarray]:
    """The same in our paths."""

    def layers(name: str, *shape: int) -> np.ndarray:
        return np.stack([v[f"{i}.{name}"].reshape(shape) for i in range(DEPTH)])

    result = {
        "patch_embed/class_token": v["class"],
        "patch_embed/class_position": v["positions"][0],
        "patch_embed/position": v["positions"][special:].reshape(GRID, GRID, WIDTH),
        "patch_embed/projection/kernel": v["patch"].reshape(-1, WIDTH),
        "patch_embed/projection/bias": v["patch_bias"],
        "fusion/norm/scale": v["norm_scale"],
        "fusion/norm/bias": v["norm_bias"],
        f"{STACK}/attention/out/kernel": layers("out", WIDTH, WIDTH),
        f"{STACK}/attention/out/bias": layers("out_bias", WIDTH),
        f"{STACK}/mlp/hidden/kernel": layers("up", WIDTH, HIDDEN),
        f"{STACK}/mlp/hidden/bias": layers("up_bias", HIDDEN),
        f"{STACK}/mlp/out/kernel": layers("down", HIDDEN, WIDTH),
        f"{STACK}/mlp/out/bias": layers("down_bias", WIDTH),
    }
    for short, name in zip("qkv", ("query", "key", "value"), strict=True):
        result[f"{STACK}/attention/{name}/kernel"] = layers(short, WIDTH, WIDTH)
        result[f"{STACK}/attention/{name}/bias"] = layers(f"{short}_bias", WIDTH)
    for number in "12":
        result[f"{STACK}/norm{number}/scale"] = layers(f"scale{number}", WIDTH)
        result[f"{STACK}/norm{number}/bias"] = layers(f"bias{number}", WIDTH)
    return result


def timm(v: dict[str, np.ndarray], distilled: bool = False) -> dict[str, np.ndarray]:
    file = {
        "cls_token": v["class"][None, None],
        "pos_embed": v["positions"][None],
        "patch_embed.proj.weight": np.einsum("hwco->ochw", v["patch"]),
        "patch_embed.proj.bias": v["patch_bias"],
        "norm.weight": v["norm_scale"],
        "norm.bias": v["norm_bias"],
        "head.weight": draw((7, WIDTH), 1),
        "head.bias": draw((7,), 2),
    }
    for i in range(DEPTH):
        b = f"blocks.{i}"
        file |= {
            f"{b}.norm1.weight": v[f"{i}.scale1"],
            f"{b}.norm1.bias": v[f"{i}.bias1"],
            f"{b}.attn.qkv.weight": np.concatenate(
                [np.einsum("dhk->hkd", v[f"{i}.{n}"]).reshape(-1, WIDTH) for n in "qkv"]
            ),
            f"{b}.attn.qkv.bias": np.concatenate([v[f"{i}.{n}_bias"].reshape(-1) for n in "qkv"]),
            f"{b}.attn.proj.weight": np.einsum("hkd->dhk", v[f"{i}.out"]).reshape(WIDTH, -1),
            f"{b}.attn.proj.bias": v[f"{i}.out_bias"],
            f"{b}.norm2.weight": v[f"{i}.scale2"],
            f"{b}.norm2.bias": v[f"{i}.bias2"],
            f"{b}.mlp.fc1.weight": v[f"{i}.up"].T,
            f"{b}.mlp.fc1.bias": v[f"{i}.up_bias"],
            f"{b}.mlp.fc2.weight": v[f"{i}.down"].T,
            f"{b}.mlp.fc2.bias": v[f"{i}.down_bias"],
        }
    if distilled:
        file |= {"dist_token": v["distillation"][None, None], "head_dist.weight": draw((7, WIDTH), 3)}
        file |= {"head_dist.bias": draw((7,), 4)}
    return file


def google(v: dict[str, np.ndarray], numbers: tuple[int, int, int] = (1, 2, 3)) -> dict[str, np.ndarray]:
    """vision_transformer; `numbers` of the attention, the second norm and the MLP within a block."""
    attention, norm2, mlp = numbers
    file = {
        "cls": v["class"][None, None],
        "Transformer/posembed_input/pos_embedding": v["positions"][None],
        "embedding/kernel": v["patch"],
        "embedding/bias": v["patch_bias"],
        "Transformer/encoder_norm/scale": v["norm_scale"],
        "Transformer/encoder_norm/bias": v["norm_bias"],
        "head/kernel": draw((WIDTH, 7), 1),
        "head/bias": draw((7,), 2),
    }
    for i in range(DEPTH):
        b = f"Transformer/encoderblock_{i}"
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            file[f"{b}/MultiHeadDotProductAttention_{attention}/{name}/kernel"] = v[f"{i}.{short}"]
            file[f"{b}/MultiHeadDotProductAttention_{attention}/{name}/bias"] = v[f"{i}.{short}_bias"]
        for number, part in (("1", 0), ("2", norm2)):
            file[f"{b}/LayerNorm_{part}/scale"] = v[f"{i}.scale{number}"]
            file[f"{b}/LayerNorm_{part}/bias"] = v[f"{i}.bias{number}"]
        for number, name in enumerate(("up", "down")):
            file[f"{b}/MlpBlock_{mlp}/Dense_{number}/kernel"] = v[f"{i}.{name}"]
            file[f"{b}/MlpBlock_{mlp}/Dense_{number}/bias"] = v[f"{i}.{name}_bias"]
    return file


GOOGLE = "ViT of Google's vision_transformer"


def google_files() -> dict[str, dict[str, np.ndarray]]:
    v = body()
    plain, one = google(v), np.zeros(1, np.float32)
    optimizer = {"state/step": one, "state/param_states/cls/momentum": one}
    trained = {
        f"opt/{name}": x for name, x in ({f"target/{n}": x for n, x in plain.items()} | optimizer).items()
    }
    linen = {f"0/{name}": x for name, x in google(v, (0, 1, 0)).items()}
    return {
        "vision_transformer": plain | {"pre_logits/kernel": one, "pre_logits/bias": one},
        "AugReg": plain,
        "flax.optim": trained,
        "flax.optim without its state": {f"target/{n}": x for n, x in plain.items()},
        "fine-tuned": linen | {"1/0/trace/cls": one, "2": one},
        "Linen's numbers": google(v, (0, 1, 0)),
    }


@pytest.mark.parametrize("name", google_files())
def test_google_files_give_our_arrays(name):
    file = google_files()[name]
    assert matcher.recognised([*vit.TABLES, *bert.TABLES], file) == [GOOGLE]
    arrays = matcher.checked(TABLES[GOOGLE], file)
    for path, x in wanted(body()).items():
        np.testing.assert_array_equal(arrays.pop(path), x, err_msg=path)
    assert arrays == {}


@pytest.mark.parametrize("distilled", [False, True])
def test_timm_files_give_our_arrays(distilled):
    special = 1 + distilled
    v = body(special)
    name = "distilled DeiT of timm" if distilled else "ViT or DeiT of timm"
    assert matcher.recognised([*vit.TABLES, *bert.TABLES], timm(v, distilled)) == [name]
    arrays = matcher.checked(TABLES[name], timm(v, distilled))
    for path, x in wanted(v, special).items():
        np.testing.assert_array_equal(arrays.pop(path), x, err_msg=path)
    assert arrays == {}


def in_transformers(name: str, **options: object):
    """A model of transformers with drawn parameters, and the ViT that it is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, "DeiTConfig" if name.startswith("DeiT") else "ViTConfig")(**SIZES)
    model = getattr(transformers, name)(config, **options).eval()
    special = 1 + name.startswith("DeiT")
    v = body(special)
    file = timm(v)
    stem = getattr(model, model.base_model_prefix, model)
    layer = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}

    def put(parameter, x: np.ndarray) -> None:
        parameter.data = torch.from_numpy(np.ascontiguousarray(x)).reshape(parameter.shape)

    put(stem.embeddings.cls_token, v["class"])
    put(stem.embeddings.position_embeddings, v["positions"])
    put(stem.embeddings.patch_embeddings.projection.weight, file["patch_embed.proj.weight"])
    put(stem.embeddings.patch_embeddings.projection.bias, v["patch_bias"])
    put(stem.layernorm.weight, v["norm_scale"])
    put(stem.layernorm.bias, v["norm_bias"])
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            thirds = np.split(file[f"blocks.{i}.attn.qkv.{kind}"], 3)
            for short, x in zip("qkv", thirds, strict=True):
                put(getattr(stem.layers[i].get_submodule(f"attention.{short}_proj"), kind), x)
            for theirs in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"):
                module = stem.layers[i].get_submodule(layer.get(theirs, theirs))
                put(getattr(module, kind), file[f"blocks.{i}.{theirs}.{kind}"])
    return model, wanted(v, special)


MODELS = {
    "ViTModel": {},
    "ViTForImageClassification": {},
    "ViTModel, no pooler": {"add_pooling_layer": False},
    "ViTModel, masked": {"use_mask_token": True},
    "DeiTModel": {},
    "DeiTForImageClassification": {},
    "DeiTForImageClassificationWithTeacher": {},
}


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_files_give_our_arrays(name, where, tmp_path):
    model, expected = in_transformers(name.split(",")[0], **MODELS[name])
    if where == "disk":
        model.save_pretrained(tmp_path)
        safetensors = pytest.importorskip("safetensors.numpy")
        file = safetensors.load_file(tmp_path / "model.safetensors")
    else:
        file = {key: x.numpy() for key, x in model.state_dict().items()}
    table = "distilled DeiT of transformers" if name.startswith("DeiT") else "ViT of transformers"
    table += " 5 in memory" if where == "memory" else ""
    assert matcher.recognised([*vit.TABLES, *bert.TABLES], file) == [table]
    arrays = matcher.checked(TABLES[table], file)
    for path, x in expected.items():
        np.testing.assert_array_equal(arrays.pop(path), x, err_msg=path)
    assert arrays == {}


@pytest.mark.parametrize("prefix", ["", "deit."])
def test_the_second_token_is_left_away_with_its_position(prefix):
    model, _ = in_transformers("DeiTModel")
    file = {prefix + key: x.numpy() for key, x in model.state_dict().items()}
    dropped = matcher.read(TABLES["distilled DeiT of transformers 5 in memory"], file).dropped
    assert "position" in dropped["deit.embeddings.distillation_token"]


# Parts that timm's later ViTs have and ours has not.
STRANGE = {
    "layer scale": "blocks.0.ls1.gamma",
    "norm of queries": "blocks.0.attn.q_norm.weight",
    "norm of the pooled": "fc_norm.weight",
    "norm before the blocks": "norm_pre.weight",
    "register tokens": "reg_token",
    "attention pooling": "attn_pool.q.weight",
    "a hybrid's convolutions": "patch_embed.backbone.stem.conv.weight",
    "a gated MLP": "blocks.0.mlp.fc1_g.weight",
    "relative positions": "blocks.1.attn.relative_position_bias_table",
}


@pytest.mark.parametrize("part", STRANGE)
def test_a_part_that_we_have_not_is_noticed(part):
    file = timm(body()) | {STRANGE[part]: np.zeros((1, 4, WIDTH), np.float32)}
    assert matcher.read(TABLES["ViT or DeiT of timm"], file).unexpected == [STRANGE[part]]


@pytest.mark.parametrize("rows", [GRID**2, 4 + GRID**2, 5 + GRID**2])
def test_positions_for_other_tokens_are_noticed(rows):
    file = timm(body()) | {"pos_embed": np.zeros((1, rows, WIDTH), np.float32)}
    with pytest.raises(ValueError, match="rows"):
        matcher.read(TABLES["ViT or DeiT of timm"], file)


def test_a_distilled_file_is_not_read_as_a_plain_one():
    v = body(2)
    with pytest.raises(ValueError, match="rows"):
        matcher.read(TABLES["ViT or DeiT of timm"], timm(v, True))
    file = {name: x for name, x in timm(v, True).items() if name != "pos_embed"}
    assert "dist_token" in matcher.read(TABLES["ViT or DeiT of timm"], file).unexpected


@pytest.mark.parametrize("name", ["ViltModel", "ViltForMaskedLM"])
def test_a_vilt_is_no_vit(name):
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    model = getattr(transformers, name)(transformers.ViltConfig(vocab_size=30, **sizes))
    file = {key: x.numpy() for key, x in model.state_dict().items()}
    # A bare ViltModel holds all names of a bare ViT; that it holds more tells it.
    for table in matcher.recognised([*vit.TABLES, *bert.TABLES], file):
        left = matcher.read(TABLES[table], file).unexpected
        assert len([key for key in left if key.startswith("embeddings.text_embeddings.")]) == 5


def test_a_released_vilt_is_no_vit():
    released = {f"transformer.{key}": x for key, x in timm(body()).items()}
    released["text_embeddings.word_embeddings.weight"] = draw((5, WIDTH), 0)
    assert matcher.recognised([*vit.TABLES, *bert.TABLES], released) == []


def test_rows_serve_vilt_too():
    for rows in (vit.timm_rows("transformer."), vit.huggingface_rows("vilt.")):
        assert all(row.sources[0].startswith(("transformer.", "vilt.")) for row in rows)
        assert {path for row in rows for path in row.targets} == wanted(body()).keys()


@pytest.mark.parametrize("text", bert.TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("image", vit.TABLES, ids=lambda table: table.name)
def test_with_a_text_model_what_neither_gives_is_fresh_in_both(image, text):
    given = {path for table in (image, text) for row in table.rows for path in row.targets}
    given |= {copy.row.target for copy in text.copies}
    assert not {path for row in image.rows for path in row.targets} & {
        p for r in text.rows for p in r.targets
    }
    for path in matcher.ours().keys() - given:
        assert all(any(re.fullmatch(pattern, path) for pattern in table.fresh) for table in (image, text)), (
            path
        )
