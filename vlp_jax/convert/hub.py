# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights of an exported folder: what transformers must know of model, text and pictures.

Written for transformers 5.23, from the facts in its `models/vilt`. Where it cannot say what our model is, a note tells.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.convert import tokenizer
from vlp_jax.types import UserError, closest

# transformers class -> the heads of ours that it holds. All but the last hold the pooler too.
CLASSES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "ViltModel": (),
        "ViltForMaskedLM": ("mlm",),
        "ViltForQuestionAnswering": ("answer",),
        "ViltForImagesAndTextClassification": ("pair",),
        "ViltForImageAndTextRetrieval": ("rank",),
        "ViltForTokenClassification": ("tag",),
    }
)
WITHOUT_POOLER = "ViltForTokenClassification"
HEADS = ("pooler", "mlm", "itm", "mpp", "rank", "answer", "pair", "tag")
LABELLED = ("answer", "pair", "tag")  # heads whose outputs have names
GELUS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}  # ours -> transformers'
PICTURES_OF_A_PAIR = 2
# transformers 5.23, width 768, 12 layers, 40 words and 12 x 18 patches, all matrices and tables normal.
MEASURED = (
    "With 1e-12 for 1e-06 in the blocks of a ViLT-B/32 the logits of words differ by 5e-6 where weights are as at the "
    "start (normal, 0.02), by 3e-5 at 0.04 and by 1e-3 at 0.1; 1e-06 throughout would give 8e-4, 3e-4 and 5e-4."
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """What to write beside the weights.

    Attributes:
        files: file name -> content.
        notes: sentences for the user: what these files cannot say, or what is missing.
    """

    files: dict[str, bytes]
    notes: list[str]


def choose(heads: Mapping[str, Any], wanted: str, dropped: Sequence[str]) -> str:
    """Returns the transformers class for the heads of a checkpoint.

    Args:
        heads: `config.model.heads`; a head is there if its value is true or a number above 0.
        wanted: the class; "" = by the heads that are there and not dropped.
        dropped: heads to leave out, as "itm" or "itm_head".

    Raises:
        UserError: an unknown class or head, a class whose head or pooler is not there, heads without a place.
    """
    if wanted and wanted not in CLASSES:
        raise UserError(
            f"transformers has no ViLT class {wanted!r}.{closest(wanted, CLASSES)} Possible: {', '.join(CLASSES)}. "
            "Give one of them to --as, or leave it out."
        )
    left_out = {_head(name) for name in dropped}
    kept = [name for name in HEADS if heads[name] and name not in left_out]
    chosen = wanted or next(
        (name for name, its in CLASSES.items() if its and set(its) <= set(kept)), "ViltModel"
    )
    missing = [name for name in needed(chosen) if name not in kept]
    if missing:
        possible = [name for name in CLASSES if set(needed(name)) <= set(kept)]
        raise UserError(
            f"{chosen} needs {_and(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"{'dropped' if set(missing) <= left_out else 'not in this checkpoint'}. Kept are: "
            f"{_and(kept) or 'no heads'}. Possible: {', '.join(possible) or 'no class'}. Change --as or --drop."
        )
    homeless = [name for name in kept if name not in needed(chosen)]
    if homeless:
        homes = (f"{name}: {_home(name)}" for name in homeless)
        flag = ",".join(name for name in HEADS if name in homeless or name in left_out)
        raise UserError(
            f"{chosen} has no place for {_and(homeless)}. Where they would be kept: {'; '.join(homes)}. "
            f"To export without them: --as={chosen} --drop={flag}"
        )
    return chosen


def needed(class_name: str) -> tuple[str, ...]:
    """The heads of ours without which this class would start with fresh parameters."""
    return CLASSES[class_name] if class_name == WITHOUT_POOLER else ("pooler", *CLASSES[class_name])


def _head(name: str) -> str:
    short = name.removesuffix("_head")
    if short not in HEADS:
        raise UserError(
            f"There is no head {name!r} to drop.{closest(short, HEADS)} Possible: {', '.join(HEADS)}. Correct --drop."
        )
    return short


def _home(head: str) -> str:
    if head == "pooler":
        return f"every class but {WITHOUT_POOLER}"
    return next((name for name, heads in CLASSES.items() if head in heads), "no class of transformers")


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def config_json(config: Any, class_name: str, labels: Sequence[str] | None) -> dict[str, Any]:
    """Returns `config.json` of a transformers ViltConfig.

    The one epsilon that it has room for is that of the text embedding: its input is the smallest that any norm
    sees, so it matters there most (see `epsilon_note`).

    Raises:
        UserError: a GELU without a name there, labels that do not fit, two pictures but two modalities.
    """
    model, heads = config.model, CLASSES[class_name]
    if model.gelu not in GELUS:
        raise UserError(
            f"transformers has no name for config.model.gelu={model.gelu}. Possible: {', '.join(GELUS)}. "
            "Export with --format=original, or fine-tune with config.model.gelu=exact, which differs by 2.9e-5."
        )
    if "pair" in heads and model.modalities <= PICTURES_OF_A_PAIR:
        raise UserError(
            f"{class_name} marks its two pictures by rows 1 and 2 of the modality table, but this model has "
            f"{model.modalities} rows. Possible: {PICTURES_OF_A_PAIR + 1} or more. Fine-tune with config.model.modalities=3."
        )
    text, patch = model.text_embed, model.patch_embed
    content = {
        "architectures": [class_name],
        "model_type": "vilt",
        "dtype": "float32",
        "vocab_size": int(text.vocab_size),
        "max_position_embeddings": int(text.length),
        "type_vocab_size": int(text.segments),
        "modality_type_vocab_size": int(model.modalities),
        "pad_token_id": int(text.pad_id),
        "hidden_size": int(model.width),
        "num_hidden_layers": int(model.fusion.depth),
        "num_attention_heads": int(model.fusion.num_heads),
        "intermediate_size": int(model.fusion.mlp_width),
        "hidden_act": GELUS[model.gelu],
        "hidden_dropout_prob": float(model.dropout),
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": float(text.eps),
        "initializer_range": 0.02,
        "image_size": int(patch.grid * patch.patch_size),  # of the learned positions
        "patch_size": int(patch.patch_size),
        "num_channels": 3,
        "qkv_bias": True,
        "max_image_length": -1,  # no patch is left out
        "num_images": PICTURES_OF_A_PAIR if "pair" in heads else -1,
        # transformers 5 overrules this, 4 does not; see `files`.
        "tie_word_embeddings": False,
    }
    for head in heads:
        if head in LABELLED:
            names = _names(int(model.heads[head]), labels, class_name)
            content |= {
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
            }
    return content


def _names(count: int, labels: Sequence[str] | None, class_name: str) -> list[str]:
    names = [f"LABEL_{i}" for i in range(count)] if labels is None else list(labels)
    if len(names) != count:
        raise UserError(
            f"{class_name} has {count} classes, but there are {len(names)} labels. Needed is one a class, in the "
            "order of the head's rows. Give another file to --labels."
        )
    return names


def epsilon_note(config: Any) -> str:
    """Says what becomes of epsilons that differ; "" where one is right for all norms."""
    model = config.model
    places = {"text embedding": model.text_embed.eps, "blocks": model.fusion.eps}
    if model.heads.mlm:
        places["prediction head"] = model.heads.eps
    if len(set(places.values())) == 1:
        return ""
    others = [f"{name} {eps:g}" for name, eps in places.items() if eps != model.text_embed.eps]
    # In transformers the norms of the blocks and the last one are called layernorm..., the others LayerNorm.
    cure = {
        "blocks": "[setattr(part, 'eps', {eps}) for name, part in model.named_modules() if 'layernorm' in name]",
        "prediction head": "model.mlm_score.transform.LayerNorm.eps = {eps}",
    }
    cures = [cure[name].format(eps=eps) for name, eps in places.items() if eps != model.text_embed.eps]
    return (
        f"transformers has one epsilon for all norms: config.json says {model.text_embed.eps:g}, that of the text "
        f"embedding; this model has {', '.join(others)}. {MEASURED} For equal logits set it after loading: "
        f"`{'; '.join(cures)}`."
    )


def files(config: Any, class_name: str, labels: Sequence[str] | None, vocabulary: Path | None) -> Folder:
    """Returns the files beside `model.safetensors`: config.json, preprocessor_config.json and the tokenizer.

    With preprocessor_config.json and tokenizer_config.json `ViltProcessor` and the Auto classes find their parts.

    Args:
        config: of the checkpoint, resolved.
        class_name: one of CLASSES.
        labels: names of the classes of its head, in order; None = LABEL_0 ...
        vocabulary: vocab.txt (WordPiece) or .model (SentencePiece); None = no tokenizer.

    Raises:
        UserError: see `config_json`; a vocabulary that cannot be read or has more pieces than the word table rows.
    """
    model, heads = config.model, CLASSES[class_name]
    content = {
        "config.json": config_json(config, class_name, labels),
        "preprocessor_config.json": _preprocessor(config.data),
    }
    notes = [epsilon_note(config)]
    if "mlm" in heads:
        notes.append(
            "transformers 5 ties the decoder to the word table by default, whatever config.json says. It loads this "
            "folder untied all the same, because the file holds both, and warns ('will NOT tie them'). "
            f"{class_name}.from_pretrained(folder, tie_word_embeddings=False) is silent and stays untied after "
            "tie_weights() or resize_token_embeddings()."
        )
    if model.gelu != "exact" and set(heads) & {"answer", "pair"}:
        notes.append(f"The GELU in the classifier of {class_name} is exact always, not {model.gelu}.")
    if labels is not None and not set(heads) & set(LABELLED):
        notes.append(f"{class_name} has no place for the {len(labels)} labels; they are left out.")
    if labels is None and set(heads) & set(LABELLED):
        notes.append("No labels are known: classes are called LABEL_0 ...; --labels gives them names.")
    notes.append(_limit_note(config.data))
    if vocabulary is None:
        notes.append("No vocabulary is known: the folder has no tokenizer; --vocab gives it one.")
    else:
        made, note = tokenizer.files(
            vocabulary, int(config.data.text_length), int(model.text_embed.vocab_size)
        )
        content |= made
        notes.append(note)
    return Folder(
        {name: part if isinstance(part, bytes) else _json(part) for name, part in content.items()},
        [note for note in notes if note],
    )


def _json(content: Mapping) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _preprocessor(data: Any) -> dict[str, Any]:
    """ViltImageProcessor; without torchvision transformers 5 takes its PIL twin for the same file."""
    return {
        "image_processor_type": "ViltImageProcessor",
        "processor_class": "ViltProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(data.image_size)},
        "size_divisor": int(data.patch_size),
        "resample": 3,  # PIL's number for bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }


def _limit_note(data: Any) -> str:
    """transformers' long side is fixed by the short one, by the rule that our limit 0 stands for."""
    theirs = int(1333 / 800 * data.image_size)
    if int(data.image_limit) in (0, theirs):
        return ""
    return (
        f"transformers lets the longer side of a picture have {theirs} pixels, this model {data.image_limit}: long "
        "pictures get another size there. Resize them before, or score with this package."
    )
