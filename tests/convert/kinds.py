# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that is read, made of a network of transformers: its names, its container, what stands beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from tests.convert.models import CLASSES, HEADS, Size, Tensors, as_released, network, tied

# Names


def memory(net: torch.nn.Module) -> Tensors:
    """All tensors by the names in memory."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def disk(net: torch.nn.Module, folder: Path) -> Tensors:
    """All tensors by the names that transformers writes."""
    net.save_pretrained(folder / "saved")
    return safetensors.numpy.load_file(folder / "saved" / "model.safetensors")


def renamed(tensors: Mapping[str, np.ndarray], *pairs: tuple[str, str]) -> Tensors:
    """Replaces parts of names, in order."""
    result = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = value
    return result


def timm(tensors: Mapping[str, np.ndarray], old: str = "", new: str = "") -> Tensors:
    """The names that transformers writes behind `old`, as timm's behind `new`; those of the text stay."""
    tensors, layer = dict(tensors), 0
    while (stem := f"{old}encoder.layer.{layer}.attention.attention") + ".query.weight" in tensors:
        for end in ("weight", "bias"):
            parts = [tensors.pop(f"{stem}.{name}.{end}") for name in ("query", "key", "value")]
            tensors[f"{new}blocks.{layer}.attn.qkv.{end}"] = np.concatenate(parts)
        layer += 1
    return renamed(
        tensors,
        (f"{old}encoder.layer.", f"{new}blocks."),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        (f"{old}layernorm", f"{new}norm"),
        (f"{old}embeddings.patch_embeddings.projection", f"{new}patch_embed.proj"),
        (f"{old}embeddings.position_embeddings", f"{new}pos_embed"),
        (f"{old}embeddings.cls_token", f"{new}cls_token"),
    )


def timm_vit(net: torch.nn.Module, size: Size, folder: Path, tokens: str = "") -> Tensors:
    """A ViTModel in timm's names with a classifier; `tokens="dist"`: and DeiT's second token."""
    draw = np.random.default_rng(4)
    tensors = timm({name: x for name, x in disk(net, folder).items() if "pooler" not in name})
    heads = ("head", "head_dist") if tokens else ("head",)
    for head in heads:
        tensors[f"{head}.weight"] = draw.normal(size=(size.classes, size.width)).astype(np.float32)
        tensors[f"{head}.bias"] = draw.normal(size=size.classes).astype(np.float32)
    if tokens:
        tensors["dist_token"], row = draw.normal(size=(2, 1, 1, size.width)).astype(np.float32)
        places = tensors["pos_embed"]
        tensors["pos_embed"] = np.concatenate([places[:, :1], row, places[:, 1:]], 1)
    return tensors


def google_vit(net: torch.nn.Module, size: Size, folder: Path, numbers: tuple[int, int, int]) -> Tensors:
    """A ViTModel in Google's names; `numbers` of the attention, the second norm and the MLP within a block."""
    attention, norm2, mlp = numbers
    theirs = disk(net, folder)
    result = {
        "cls": theirs["embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": theirs["embeddings.position_embeddings"],
        "embedding/kernel": theirs["embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "head/kernel": np.ones((size.width, size.classes), np.float32),
        "head/bias": np.ones(size.classes, np.float32),
    }
    split = (size.heads, size.width // size.heads)

    def norm(source: str, target: str) -> None:
        result[f"{target}/scale"], result[f"{target}/bias"] = (
            theirs[f"{source}.weight"],
            theirs[f"{source}.bias"],
        )

    def dense(source: str, target: str, *kernel: int, bias: tuple[int, ...] = (-1,)) -> None:
        weight = theirs[f"{source}.weight"].T
        result[f"{target}/kernel"] = weight.reshape(kernel) if kernel else weight
        result[f"{target}/bias"] = theirs[f"{source}.bias"].reshape(bias)

    for i in range(size.layers):
        old, new = f"encoder.layer.{i}", f"Transformer/encoderblock_{i}"
        heads = f"{new}/MultiHeadDotProductAttention_{attention}"
        norm(f"{old}.layernorm_before", f"{new}/LayerNorm_0")
        norm(f"{old}.layernorm_after", f"{new}/LayerNorm_{norm2}")
        for name in ("query", "key", "value"):
            dense(f"{old}.attention.attention.{name}", f"{heads}/{name}", size.width, *split, bias=split)
        dense(f"{old}.attention.output.dense", f"{heads}/out", *split, size.width)
        dense(f"{old}.intermediate.dense", f"{new}/MlpBlock_{mlp}/Dense_0")
        dense(f"{old}.output.dense", f"{new}/MlpBlock_{mlp}/Dense_1")
    norm("layernorm", "Transformer/encoder_norm")
    return result


def google_bert(net: torch.nn.Module) -> Tensors:
    """A BertForPreTraining in the names of Google's TensorFlow checkpoint, with a step and a moment of its optimizer."""
    result = {"global_step": np.array(5), "bert/embeddings/LayerNorm/gamma/adam_m": np.ones(3, np.float32)}
    for name, value in memory(net).items():
        pairs = (
            (".", "/"),
            ("LayerNorm/weight", "LayerNorm/gamma"),
            ("LayerNorm/bias", "LayerNorm/beta"),
            ("_embeddings/weight", "_embeddings"),
            ("predictions/bias", "predictions/output_bias"),
            ("relationship/", "relationship/output_"),
            ("output_weight", "output_weights"),
            ("layer/", "layer_"),
        )
        ((name, value),) = renamed({name: value}, *pairs).items()
        if name.endswith("/weight"):
            name, value = name.replace("/weight", "/kernel"), value.T
        if "decoder" not in name:
            result[name] = value
    return result


def released(net: torch.nn.Module, size: Size, *more: str) -> Tensors:
    """A ViLT in its authors' names; `more`: "itm", "mpp", heads that transformers lacks."""
    tensors = timm(memory(net), "vilt.", "transformer.")
    tensors = renamed(
        tensors, ("vilt.embeddings.", ""), ("vilt.", ""), ("mlm_score.decoder.bias", "mlm_score.bias")
    )
    head = {"answer": "vqa_classifier", "pair": "nlvr2_classifier"}.get(HEADS[type(net).__name__], "")
    tensors = {
        head + name.removeprefix("classifier") if name.startswith("classifier") else name: value
        for name, value in tensors.items()
    }
    width, shapes = size.width, {}
    if "itm" in more:
        shapes = {"itm_score.fc.weight": (2, width), "itm_score.fc.bias": (2,)}
    if "mpp" in more:
        stem = "mpp_score.transform"
        shapes |= {f"{stem}.dense.weight": (width, width), f"{stem}.dense.bias": (width,)}
        shapes |= {f"{stem}.LayerNorm.weight": (width,), f"{stem}.LayerNorm.bias": (width,)}
        shapes |= {"mpp_score.decoder.weight": (768, width), "mpp_score.decoder.bias": (768,)}
        shapes |= {"transformer.mask_token": (1, 1, width)}
    draw = np.random.default_rng(3)
    tensors |= {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {"text_embeddings.position_ids": np.arange(size.length)[None]}


# Containers


def save(container: str, tensors: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Writes tensors by the library that owns the container; returns what to give as --source."""
    folder.mkdir(exist_ok=True)
    if container == "safetensors":
        path = folder / "weights.safetensors"
        safetensors.numpy.save_file(dict(tensors), path)
    elif container == "npz":
        path = folder / "weights.npz"
        np.savez(path, **tensors)
    elif container == "msgpack":
        from flax import serialization

        path = folder / "flax_model.msgpack"
        path.write_bytes(serialization.msgpack_serialize(nested(tensors)))
    elif container == "TensorFlow":
        import tensorflow as tf

        path, values = folder / "bert_model.ckpt", list(map(tf.constant, tensors.values()))
        tf.raw_ops.SaveV2(
            prefix=str(path),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(values),
            tensors=values,
        )
    else:
        kind, _, wrapper = container.partition(":")
        content = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}
        lightning = {"epoch": 3, "hyper_parameters": {"lr": 1e-4}, "callbacks": {}, "state_dict": content}
        content = {"": content, "model": {"model": content}, "lightning": lightning}[wrapper]
        bare = folder / "pytorch_model.bin"
        torch.save(content, bare, _use_new_zipfile_serialization=kind != "torch legacy")
        path = folder if kind == "bin" else bare.rename(folder / "weights.pth")
    return path


def nested(tensors: Mapping[str, np.ndarray]) -> dict:
    """Names with slashes as a tree."""
    tree: dict = {}
    for name, value in tensors.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def config_beside(net: torch.nn.Module, path: Path, whole: bool) -> None:
    """The config.json of transformers, or only what a released file's names do not say: the number of heads."""
    folder = path if path.is_dir() else path.parent
    if whole:
        net.config.save_pretrained(folder)
    else:
        heads = net.config.num_attention_heads
        (folder / "config.json").write_text(f'{{"num_attention_heads": {heads}, "hidden_act": "gelu"}}')


# Every kind of file


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of file: the network that it holds, in which container and under which names."""

    net: Callable[[Size], torch.nn.Module]
    container: str  # "transformers" and "transformers sharded" are its own save_pretrained
    tensors: Callable[[torch.nn.Module, Size, Path], Tensors] | None = None
    whole: bool = False  # with the config.json of transformers

    def write(self, size: Size, folder: Path) -> tuple[torch.nn.Module, Path]:
        """Makes the network and its file; returns the network and what to give as --source."""
        net, target = self.net(size), folder / "source"
        if self.container.startswith("transformers"):
            net.save_pretrained(target, max_shard_size="30KB" if "sharded" in self.container else "1GB")
            return net, target
        path = save(self.container, self.tensors(net, size, folder), target)
        config_beside(net, path, self.whole)
        return net, path


EPS = 2e-3  # of config.json: no default


def made(name: str, quiet: bool = False, **changes: object) -> Callable[[Size], torch.nn.Module]:
    """Makes a network of this class at any size."""
    return lambda size: network(name, size, quiet, **{"layer_norm_eps": EPS} | changes)


def bert_tensors(net: torch.nn.Module, prefix: str = "", age: str = "new") -> Tensors:
    """BERT by its names in memory; "old": gamma, beta, and the decoder as one tensor less."""
    tensors = {prefix + name: value for name, value in memory(net).items()}
    if age == "old":
        tensors = renamed(
            tensors, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
        )
        tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")
    return tensors


def old_vilt(net: torch.nn.Module, size: Size) -> Tensors:
    """ViltForMaskedLM as transformers 4 wrote it."""
    tensors = memory(net)
    tensors["mlm_score.bias"] = tensors["mlm_score.decoder.bias"]
    return tensors | {"vilt.embeddings.text_embeddings.position_ids": np.arange(size.length)[None]}


timm_net = made("ViTModel", True, layer_norm_eps=1e-6)
VIT = {
    "ViT, Google npz": Kind(timm_net, "npz", lambda *a: google_vit(*a, (1, 2, 3))),
    "ViT, Google npz, numbers of Linen": Kind(timm_net, "npz", lambda *a: google_vit(*a, (0, 1, 0))),
    "ViT, Google, flax": Kind(timm_net, "msgpack", lambda *a: google_vit(*a, (0, 1, 0))),
    "ViT, timm": Kind(timm_net, "safetensors", timm_vit),
    "DeiT, timm": Kind(timm_net, "torch zip:model", timm_vit),
    "distilled DeiT, timm": Kind(timm_net, "torch legacy:model", lambda *a: timm_vit(*a, "dist")),
    "ViTModel": Kind(made("ViTModel"), "transformers"),
    "ViTForImageClassification": Kind(made("ViTForImageClassification"), "transformers sharded"),
    "ViTModel in memory": Kind(made("ViTModel"), "torch zip", lambda net, *_: memory(net), True),
    "ViTForImageClassification in memory": Kind(
        made("ViTForImageClassification", hidden_act="gelu_new"),
        "torch legacy",
        lambda net, *_: memory(net),
        True,
    ),
    "DeiTModel": Kind(made("DeiTModel"), "transformers"),
    "DeiTForImageClassificationWithTeacher": Kind(
        made("DeiTForImageClassificationWithTeacher"), "transformers"
    ),
    "DeiTForImageClassification in memory": Kind(
        made("DeiTForImageClassification"), "bin", lambda net, *_: memory(net), True
    ),
}
BERT = {
    "BertModel": Kind(made("BertModel"), "transformers"),
    "BertModel behind bert.": Kind(
        made("BertModel"), "torch zip", lambda net, *_: bert_tensors(net, "bert."), True
    ),
    "BertForMaskedLM, tied": Kind(lambda size: tied(made("BertForMaskedLM")(size)), "transformers"),
    "BertForMaskedLM, untied": Kind(
        made("BertForMaskedLM"), "bin", lambda net, *_: bert_tensors(net), whole=True
    ),
    "BertForPreTraining, gamma and beta": Kind(
        made("BertForPreTraining"), "torch legacy", lambda net, *_: bert_tensors(net, age="old"), True
    ),
    "BERT, Google": Kind(
        lambda size: tied(made("BertForPreTraining", layer_norm_eps=1e-12)(size)),
        "TensorFlow",
        lambda net, *_: google_bert(net),
    ),
}
LIGHTNING = {
    "pretraining": ("ViltForMaskedLM", ("itm",)),
    "pretraining with masked patches": ("ViltForMaskedLM", ("itm", "mpp")),
    "VQA": ("ViltForQuestionAnswering", ()),
    "NLVR2": ("ViltForImagesAndTextClassification", ()),
    "retrieval": ("ViltForImageAndTextRetrieval", ("itm",)),
}
RELEASED = {
    f"ViLT as released, {task}": Kind(
        lambda size, name=name: as_released(name, size),
        "torch legacy:lightning" if task == "NLVR2" else "torch zip:lightning",
        lambda net, size, _, more=more: released(net, size, *more),
    )
    for task, (name, more) in LIGHTNING.items()
}
TRANSFORMERS = {name: Kind(made(name), "transformers") for name in CLASSES} | {
    "ViltForMaskedLM, tied": Kind(lambda size: tied(made("ViltForMaskedLM")(size)), "transformers sharded"),
    "ViltForMaskedLM of 4.x": Kind(
        made("ViltForMaskedLM"), "bin", lambda net, size, _: old_vilt(net, size), True
    ),
}
KINDS = VIT | BERT | RELEASED | TRANSFORMERS
