# SPDX-License-Identifier: Apache-2.0
"""Every data set as a TFDS builder, for those who live in TFDS: one process, TFDS's own writer, the same records.

`prepare` writes directories that TFDS reads, too, and adds what a run needs: index, vocabulary, digests, resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vlp_jax.data import record
from vlp_jax.data.datasets import Dropped
from vlp_jax.data.preparation import completion


def builder(module: ModuleType, source: str | Path, data_dir: str | Path, **options: Any):
    """Returns a `tfds.core.GeneratorBasedBuilder`; `download_and_prepare()` writes ArrayRecord shards.

    What cannot be used is left out without a word: use `prepare` where that matters.

    Args:
        module: a data set that reads files, see `datasets.get`.
        source: folder of its raw files.
        data_dir: where TFDS keeps its data; it makes NAME/VERSION below it.
        options: of the data set (its OPTIONS hold the defaults).

    Raises:
        UserError: the source cannot be used.
    """
    import tensorflow_datasets as tfds

    source, options = Path(source), {**module.OPTIONS, **options}
    module.check(source, **options)
    entries: dict[str, list[dict]] = {}
    for split, entry in module.listing(source, map, **options):
        if not isinstance(entry, Dropped):
            entries.setdefault(split, []).append(entry)
    seen = {key for members in entries.values() for entry in members for key in entry}
    fields = record.stored_fields(seen & {*module.FIELDS})

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = module.NAME
        VERSION = tfds.core.Version(f"{module.VERSION}.0.0")
        url_infos = {}  # nothing is downloaded; looking for checksums would need one more package

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=record.features(fields), license=module.LICENCE
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(members) for split, members in entries.items()}

        def _generate_examples(self, members: list[dict]) -> Iterator[tuple[int, dict]]:
            for number, entry in enumerate(members):
                example = completion.complete(entry, source, fields, upright=module.UPRIGHT).example
                if not isinstance(example, Dropped):
                    yield number, example

    return Builder(data_dir=str(data_dir), file_format="array_record")
