# SPDX-License-Identifier: Apache-2.0
"""What turns features into logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from vlp_jax.layers.activation import gelu
from vlp_jax.layers.linear import Linear
from vlp_jax.layers.norm import LayerNorm
from vlp_jax.types import Array


class Pooler(nn.Module):
    """`tanh(linear(x))` of the first token (BERT)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch token width"]) -> Float[Array, "batch width"]:
        """Maps a sequence to one vector; tanh in float32."""
        y = Linear(x.shape[-1], ("embed", None), self.dtype, name="dense")(x[:, 0])
        return jnp.tanh(y.astype(jnp.float32)).astype(self.dtype)


class TokenPredictor(nn.Module):
    """BERT's prediction head: linear, GELU, LayerNorm (1e-12), then an untied decoder with bias.

    Masked language modelling decodes into the vocabulary, masked patch prediction into 3 x 256 bins.
    """

    outputs: int
    eps: float = 1e-12
    gelu: str = "exact"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch slot width"]) -> Float[Array, "batch slot output"]:
        """Maps features to float32 logits."""
        # The transform keeps its output whole: the norm that follows needs every unit of it.
        y = gelu(Linear(x.shape[-1], ("embed", None), self.dtype, name="dense")(x), self.gelu)
        y = LayerNorm(self.eps, self.dtype, name="norm")(y)
        logits = Linear(self.outputs, ("embed", "vocab"), self.dtype, name="decoder")(y)
        return nn.with_logical_constraint(logits, ("batch", "token", "act_vocab")).astype(jnp.float32)


class Classifier(nn.Module):
    """One linear map to float32 logits, of one vector or of each token."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *token width"]) -> Float[Array, "batch *token class"]:
        """Maps features to logits."""
        return Linear(self.classes, ("embed", None), self.dtype, name="dense")(x).astype(jnp.float32)


class HiddenClassifier(nn.Module):
    """Linear, LayerNorm (1e-5), exact GELU, linear, to float32 logits: ViLT's heads for answers and for pairs."""

    classes: int
    hidden_width: int
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch class"]:
        """Maps a pooled vector to logits."""
        y = Linear(self.hidden_width, ("embed", None), self.dtype, name="hidden")(x)
        y = gelu(LayerNorm(self.eps, self.dtype, name="norm")(y))
        return Linear(self.classes, ("embed", None), self.dtype, name="out")(y).astype(jnp.float32)


class Heads(nn.Module):
    """The heads of a model that fuses text and picture, as far as `config.model.heads` asks for them.

    `pooler` and `mlm`, `itm`, `mpp`, `rank` are there or not, `answer`, `pair` and `tag` have a number of classes, 0
    where there is none; `eps` is of the LayerNorm of `mlm` and `mpp`.
    """

    wanted: Any
    width: int
    vocab_size: int
    gelu: str = "exact"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        wanted, dtype = self.wanted, self.dtype
        if wanted.pooler:
            self.pooler = Pooler(dtype)
        if wanted.mlm:
            self.mlm = TokenPredictor(self.vocab_size, wanted.eps, self.gelu, dtype)
        if wanted.itm:
            self.itm = Classifier(2, dtype)
        if wanted.rank:
            self.rank = Classifier(1, dtype)
        if wanted.answer:
            self.answer = HiddenClassifier(wanted.answer, 2 * self.width, dtype=dtype)
        if wanted.pair:
            self.pair = HiddenClassifier(wanted.pair, 2 * self.width, dtype=dtype)
        if wanted.tag:
            self.tag = Classifier(wanted.tag, dtype)
        if wanted.mpp:
            self.mpp = TokenPredictor(3 * 256, wanted.eps, self.gelu, dtype)

    def pooled(self, text: Float[Array, "batch text width"]) -> Float[Array, "batch width"]:
        """The pooled text [CLS]."""
        return self.pooler(text)

    def word_logits(self, text: Float[Array, "batch slot width"]) -> Float[Array, "batch slot vocab"]:
        """Vocabulary logits."""
        return self.mlm(text)

    def match_logits(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch 2"]:
        """Logits [not matched, matched]; where fine-tuning for retrieval has left one score, the other is 0."""
        if not self.wanted.rank:
            return self.itm(pooled)
        score = self.rank(pooled)
        return jnp.concatenate([jnp.zeros_like(score), score], axis=-1)

    def answer_logits(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch answer"]:
        """Logits of the answers of a closed list."""
        return self.answer(pooled)

    def pair_logits(
        self, first: Float[Array, "batch width"], second: Float[Array, "batch width"]
    ) -> Float[Array, "batch class"]:
        """Logits of a statement about two pictures, from the text [CLS] pooled with each (NLVR2)."""
        return self.pair(jnp.concatenate([first, second], axis=-1))

    def tag_logits(self, text: Float[Array, "batch text width"]) -> Float[Array, "batch text class"]:
        """Logits of each word piece."""
        return self.tag(text)

    def patch_logits(self, image: Float[Array, "batch patch width"]) -> Float[Array, "batch patch 768"]:
        """Logits of the mean color of each patch, three times 256 bins."""
        return self.mpp(image)

    def everything(self, text: Array, image: Array, pooled: Array | None = None) -> list[Array]:
        """Runs every head that there is, so that `init` makes all parameters."""
        runs = {
            "itm": lambda: self.itm(pooled),
            "rank": lambda: self.rank(pooled),
            "answer": lambda: self.answer_logits(pooled),
            "pair": lambda: self.pair_logits(pooled, pooled),
            "mlm": lambda: self.word_logits(text),
            "tag": lambda: self.tag_logits(text),
            "mpp": lambda: self.patch_logits(image),
        }
        return [run() for name, run in runs.items() if self.wanted[name]]
