# SPDX-License-Identifier: Apache-2.0
"""ViLT: word pieces and raw patches in one transformer (Kim et al., ICML 2021; released code, commit 762fd39)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from vlp_jax.layers.activation import GELUS
from vlp_jax.models.fusion import MergedAttention
from vlp_jax.models.heads import Heads
from vlp_jax.models.patch import PatchEmbedder
from vlp_jax.models.text import TextEmbedder
from vlp_jax.objectives import masking
from vlp_jax.objectives.classification import accuracy, by_source, cross_entropy
from vlp_jax.objectives.pairing import exchange
from vlp_jax.objectives.transport import alignable_text, cosine_cost, transport_plan, word_patch_alignment
from vlp_jax.systems import base
from vlp_jax.types import Array, Batch, Extra, Key, LossOut, Params, Term, UserError, closest

MASKED = ("text_ids", "mlm_positions", "mlm_inputs", "mlm_labels")
PICTURE = ("patches", "patch_positions", "patch_mask", "grid_size")
Features = Mapping[str, Array]  # "text", "text_mask", "image", "image_mask"


class Vilt(nn.Module):
    """The parts and how they are wired; each method is one entry for `apply`."""

    model: Any  # config.model, frozen

    def setup(self) -> None:
        m, dtype = self.model, jnp.dtype(self.model.dtype)
        self.text_embed = TextEmbedder(**m.text_embed, width=m.width, dtype=dtype)
        patch = m.patch_embed
        self.patch_embed = PatchEmbedder(patch.patch_size, patch.grid, m.width, m.heads.mpp, dtype)
        self.fusion = MergedAttention(
            **m.fusion,
            modalities=m.modalities,
            dropout=m.dropout,
            dtype=dtype,
            unroll=m.unroll,
            gelu=m.gelu,
            token_multiple=m.token_multiple,
        )
        self.heads = Heads(m.heads, m.width, m.text_embed.vocab_size, m.gelu, dtype)

    def encode_text(self, text_ids: Array, text_mask: Array) -> Features:
        """Embeds word pieces."""
        return {"text": self.text_embed(text_ids), "text_mask": text_mask}

    def encode_image(self, batch: Batch, hidden: Array | None = None) -> Features:
        """Embeds patches behind a class token; `hidden` patches become the mask vector."""
        projected, position = self.patch_embed(batch["patches"], batch["patch_positions"], batch["grid_size"])
        image = self.patch_embed.assemble(projected, position, hidden)
        return {
            "image": image,
            "image_mask": jnp.pad(batch["patch_mask"], ((0, 0), (1, 0)), constant_values=True),
        }

    def fuse(self, features: Features, train: bool = False, picture: int = 0) -> Features:
        """Returns text and image features, and the pooled text [CLS]; the image's class token feeds no head.

        `picture` is the number of the picture among several that go with a text.
        """
        inputs = (features[name] for name in ("text", "text_mask", "image", "image_mask"))
        text, image = self.fusion(*inputs, picture, train=train)
        pooled = {"pooled": self.heads.pooled(text)} if self.model.heads.pooler else {}
        return {"text": text, "image": image, **pooled}

    def words(self, text: Array, positions: Array) -> Array:
        """Vocabulary logits at the masked positions only."""
        return self.heads.word_logits(masking.at_positions(text, positions))

    def everything(self, batch: Batch) -> list[Array]:
        """Runs every part once, so that `init` makes every parameter."""
        features = self.encode_text(batch["text_ids"], batch["text_mask"]) | self.encode_image(batch)
        return self.heads.everything(**self.fuse(features))

    def pretrain(self, batch: Batch, key: Key, active: tuple[str, ...]) -> dict[str, tuple[Features, Batch]]:
        """One forward of all views of the batch, interleaved: name of the view -> what its objectives need."""
        plain = self.encode_image(batch)
        # Name -> ids, their mask, features of the picture. All texts are embedded at once: one gradient of the table.
        views: dict[str, tuple[Array, Array, Features]] = {}
        if "mlm" in active:
            corrupted = masking.corrupted_text(*(batch[name] for name in MASKED))
            views["masked"] = corrupted, batch["text_mask"], plain
        if "itm" in active or "wpa" in active:
            views["pairs"] = batch["pair_text_ids"], batch["pair_text_mask"], plain
        if "mpp" in active:
            chosen, hidden = masking.patch_mask(key, batch["patch_mask"])
            batch = {**batch, "mpp_labels": masking.patch_color_bins(batch["patches"], chosen)}
            views["patches"] = batch["text_ids"], batch["text_mask"], self.encode_image(batch, hidden)
        ids, masks, images = map(list, zip(*views.values(), strict=True))
        text = self.encode_text(base.interleave(ids), base.interleave(masks))
        fused = self.fuse(text | base.interleave_features(images), train=True)
        parts = enumerate(views)
        return {n: ({k: base.part(v, i, len(views)) for k, v in fused.items()}, batch) for i, n in parts}


def resolve(config: ConfigDict, facts: Mapping[str, Any]) -> ConfigDict:
    """Fills the sizes that follow from the data and checks that all sizes fit; pure."""
    data = config.data
    known = {**facts, "text_length": data.text_length, "patch_size": data.patch_size}
    wanted = {"text_embed.length": "text_length", "patch_embed.patch_size": "patch_size"}
    wanted |= {"text_embed.vocab_size": "vocab_size", "text_embed.pad_id": "pad_id"}
    config = base.fill_unknown(config, known, {f"model.{ours}": fact for ours, fact in wanted.items()})
    base.needs_inputs(config, "text", "patches")
    base.whole_patches(config)
    base.whole_heads(config, "fusion")
    base.switch_on_heads(config, pooled=("itm", "rank", "answer", "pair"))
    if config.model.heads.pair and config.model.modalities < 3:
        raise UserError("config.model.heads.pair reads two pictures: set config.model.modalities to 3.")
    if config.model.gelu not in GELUS:
        hint = closest(config.model.gelu, GELUS)
        raise UserError(
            f"unknown config.model.gelu {config.model.gelu!r}.{hint} Possible: {', '.join(GELUS)}."
        )
    if config.model.patch_embed.grid == -1:
        # A larger picture may be read with a smaller learned grid, so this one is filled but never compared.
        config.model.patch_embed.grid = data.image_size // data.patch_size
    return config


def build(config: ConfigDict) -> base.Functions:
    """Makes the system of a resolved config."""
    active = tuple(sorted(name for name, coefficient in config.objectives.items() if coefficient))
    sources = tuple(config.data.sources)
    # Linen hashes a module's fields: the config must not change under it.
    module = Vilt(FrozenConfigDict(config.model))

    def init(rng: Key, batch: Batch) -> tuple[Params, Extra]:
        return module.init(rng, batch, method=Vilt.everything)["params"], {}

    def prepare(batch: Batch, rng: Key) -> Batch:
        partner, matched = exchange(rng, batch["image_id"], batch["source_id"], batch["example_id"] >= 0)
        names = ("text_ids", "text_mask", "example_id")
        return {**batch, **{f"pair_{name}": batch[name][partner] for name in names}, "matched": matched}

    def loss(params: Params, extra: Extra, batch: Batch, rng: Key) -> LossOut:
        draw, noise = jax.random.split(rng)
        method = Vilt.pretrain
        views = module.apply({"params": params}, batch, draw, active, method=method, rngs={"dropout": noise})
        terms, metrics = _terms(module.bind({"params": params}), views, active, sources)
        return LossOut(terms, metrics, extra)

    return base.Functions(init, prepare, loss, _predict(module))


def _terms(
    model: Vilt, views: Mapping, active: tuple[str, ...], sources: tuple[str, ...]
) -> tuple[dict[str, Term], dict[str, Term]]:
    """The active terms, their accuracies, and of a mixture the terms of each source."""
    terms, metrics = {}, {}

    def classify(name: str, logits: Array, labels: Array, batch: Batch) -> None:
        terms[name], metrics[f"{name}_accuracy"] = cross_entropy(logits, labels), accuracy(logits, labels)
        for source, term in by_source(logits, labels, batch["source_id"], sources).items():
            metrics[f"{name}/{source}"] = term

    if "mlm" in active:
        out, batch = views["masked"]
        classify("mlm", model.words(out["text"], batch["mlm_positions"]), batch["mlm_labels"], batch)
    if "itm" in active:
        out, batch = views["pairs"]
        classify("itm", model.heads.match_logits(out["pooled"]), batch["matched"], batch)
    if "wpa" in active:
        out, batch = views["pairs"]
        text_mask = alignable_text(batch["pair_text_mask"])
        image = out["image"][:, 1:]
        terms["wpa"] = word_patch_alignment(
            out["text"], image, text_mask, batch["patch_mask"], batch["matched"]
        )
    if "mpp" in active:
        out, batch = views["patches"]
        logits = model.heads.patch_logits(out["image"][:, 1:])
        classify("mpp", logits.reshape(*logits.shape[:2], 3, 256), batch["mpp_labels"], batch)
    return terms, metrics


def _predict(module: Vilt) -> dict[str, base.Predict]:
    """The functions that evaluation and prediction call, as far as there are heads for them; none draws anything."""
    heads = module.model.heads

    def run(params: Params, method: Any, *args: Any) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def head(params: Params, name: str, *args: Any) -> Array:
        return run(params, lambda model: getattr(model.heads, name)(*args))

    def encode_text(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        return run(params, Vilt.encode_text, batch["text_ids"], batch["text_mask"])

    def encode_image(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        return run(params, Vilt.encode_image, batch)

    def fuse(params: Params, features: Features, rng: Key | None = None) -> Features:
        out = run(params, Vilt.fuse, features)
        if not (heads.itm or heads.rank):
            return out
        return {**out, "match_logits": head(params, "match_logits", out["pooled"])}

    def whole(params: Params, batch: Batch) -> Features:
        return fuse(params, {**encode_text(params, batch), **encode_image(params, batch)})

    def match(params: Params, batch: Batch, rng: Key | None = None, plan: bool = False) -> Features:
        out = whole(params, batch)
        result = {"match_logits": out["match_logits"]}
        if plan:
            # For pictures the demo of the original sharpens the plan: beta 0.1, 1000 iterations.
            masks = alignable_text(batch["text_mask"]), batch["patch_mask"]
            cost = cosine_cost(out["text"], out["image"][:, 1:], *masks)
            result["plan"] = transport_plan(cost, *masks, beta=0.1, iterations=1000)
        return result

    def fill(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        corrupted = {**batch, "text_ids": masking.corrupted_text(*(batch[name] for name in MASKED))}
        out = whole(params, corrupted)
        return {"logits": run(params, Vilt.words, out["text"], batch["mlm_positions"])}

    def embed(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        return {"pooled": whole(params, batch)["pooled"]}

    functions = {encode_text: True, encode_image: True, fuse: True, embed: heads.pooler, fill: heads.mlm}
    functions |= {match: heads.itm or heads.rank, **_answering(module, run, head, whole)}
    return base.jitted({f.__name__: f for f, there in functions.items() if there}, {"match": ("plan",)})


def _answering(module: Vilt, run: Callable, head: Callable, whole: Callable) -> dict[base.Predict, bool]:
    """The functions of heads that come with fine-tuned weights, and whether each is there."""
    heads = module.model.heads

    def answer(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        return {"logits": head(params, "answer_logits", whole(params, batch)["pooled"])}

    def classify(params: Params, batch: Batch, rng: Key | None = None) -> Features:
        if heads.tag:
            return {"token_logits": head(params, "tag_logits", whole(params, batch)["text"])}
        pooled, text = [], run(params, Vilt.encode_text, batch["text_ids"], batch["text_mask"])
        for picture in range(2):  # the second under the same keys with a suffix: patches_1, ...
            named = {name: batch[f"{name}_1" if picture else name] for name in PICTURE}
            features = {**text, **run(params, Vilt.encode_image, named)}
            pooled.append(run(params, Vilt.fuse, features, False, picture)["pooled"])
        return {"logits": head(params, "pair_logits", *pooled)}

    return {answer: bool(heads.answer), classify: bool(heads.pair or heads.tag)}
