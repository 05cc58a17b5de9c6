# SPDX-License-Identifier: Apache-2.0
"""What a reference must be told: the shapes and names of a file do not say it."""

from __future__ import annotations

import dataclasses

GELUS = {"exact": "none", "tanh": "tanh"}  # our word -> PyTorch's `approximate`


@dataclasses.dataclass(frozen=True)
class Settings:
    """Heads, activation, and the epsilon of each kind of norm; the defaults are those of ViLT's code.

    `eps` is that of the blocks and of the norm behind them, `text_eps` that of the text embedding, `head_eps` that
    of the vocabulary head's transform. The ports of transformers take 1e-12 everywhere; Google's ViT has the tanh GELU.

    Raises:
        ValueError: an unknown GELU, or no head.
    """

    num_heads: int
    eps: float = 1e-6
    text_eps: float = 1e-12
    head_eps: float = 1e-12
    gelu: str = "exact"

    def __post_init__(self) -> None:
        if self.gelu not in GELUS or self.num_heads < 1:
            raise ValueError(
                f"gelu={self.gelu!r} and num_heads={self.num_heads}: possible are {', '.join(GELUS)} and 1 or more"
            )
