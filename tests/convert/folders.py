# SPDX-License-Identifier: Apache-2.0
"""Exported folders for tests: a small odd model, and the files beside its weights."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from vlp_jax.convert import hub

ABSENT = dict(pooler=True, mlm=False, itm=False, mpp=False, rank=False, answer=0, pair=0, tag=0, eps=1e-12)


def config_of(**heads) -> ConfigDict:
    """A model of sizes that no released one has; data of another picture size than its positions."""
    model = dict(
        width=30,
        fusion=dict(depth=3, num_heads=5, mlp_width=44, eps=1e-6),
        text_embed=dict(vocab_size=61, length=11, pad_id=2, eps=1e-12, segments=3),
        patch_embed=dict(patch_size=8, grid=5),
        modalities=3,
        gelu="exact",
        dropout=0.1,
        heads=ABSENT | heads,
    )
    data = dict(text_length=9, image_size=48, image_limit=0, patch_size=8, max_patches=0, crop=())
    return ConfigDict(dict(model=model, data=data))


def written(folder: Path, config: ConfigDict, name: str, labels=None, vocabulary=None) -> hub.Folder:
    """Makes the folder and writes into it what `hub.files` gives."""
    result = hub.files(config, name, labels, vocabulary)
    folder.mkdir(exist_ok=True)
    for file, content in result.files.items():
        (folder / file).write_bytes(content)
    return result
