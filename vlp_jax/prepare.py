# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.prepare DATASET --source=RAW_DIR --target=DATA_DIR: from public raw files to records."""

from __future__ import annotations

import functools
import sys

from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.data import datasets, writer
from vlp_jax.types import UserError

USAGE = """python -m vlp_jax.prepare DATASET [--source=RAW_DIR] --target=DATA_DIR [flags]

Writes ArrayRecord shards, TFDS metadata, an index, the vocabulary and, last, manifest.json. Started again it goes on
where it was stopped, or says that all is there. Data sets, their own flags, and what to download:
"""


def define(flags: absl_flags.FlagValues) -> None:
    """Adds the flags: those of every data set, and the options of each."""
    common, own = {"flag_values": flags}, {}
    absl_flags.DEFINE_string("source", "", "folder of the raw files as published", **common)
    absl_flags.DEFINE_string("target", "", "the data directory to write", **common)
    absl_flags.DEFINE_string("vocabulary", "", "vocab.txt or *.model to use; empty = train one", **common)
    absl_flags.DEFINE_integer(
        "vocabulary_size", writer.VOCABULARY_SIZE, "of a trained one, at most", **common
    )
    absl_flags.DEFINE_integer("workers", 0, "processes; 0 = one a core", lower_bound=0, **common)
    absl_flags.DEFINE_float("max_bad", 0.01, "largest share of pictures that may be unusable", 0, 1, **common)
    absl_flags.DEFINE_boolean("overwrite", False, "replace a data set that was prepared otherwise", **common)
    for name in datasets.names():
        own |= {option: (default, name) for option, default in datasets.get(name).OPTIONS.items()}
    count = functools.partial(absl_flags.DEFINE_integer, lower_bound=0)
    kinds = {bool: absl_flags.DEFINE_boolean, int: count, list: absl_flags.DEFINE_list}
    for option, (default, name) in own.items():
        kinds[type(default)](option, default, f"{name}: {datasets.get(name).HELP[option]}", **common)


def main(flags: absl_flags.FlagValues, dataset: str) -> None:
    """Prepares a data set and prints what is there."""
    module = datasets.get(dataset)
    source = () if hasattr(module, "draw") else ("source",)
    cli.require(flags, "target", *source)
    shared = ("vocabulary", "vocabulary_size", "workers", "max_bad", "overwrite")
    possible = [*source, "target", *shared, *module.OPTIONS]
    for name in flags:
        if flags[name].present and name not in possible:
            listed = ", ".join(f"--{one}" for one in possible)
            raise UserError(f"--{name} is no flag of {dataset}. Possible: {listed}. Leave it out.")
    options, chosen = ({name: flags[name].value for name in names} for names in (module.OPTIONS, shared))
    manifest, fresh = writer.write(module, flags.source, flags.target, options=options, **chosen)
    print(f"{dataset}: {'done' if fresh else 'already there'}, {flags.target}\n{writer.summary(manifest)}")


if __name__ == "__main__":
    listed = "\n".join(f"  {name}  {datasets.get(name).SOURCE}" for name in datasets.names())
    sys.exit(cli.run(main, define, usage=USAGE + listed, arguments=("DATASET",)))
