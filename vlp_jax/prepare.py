# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.prepare DATASET [--source=RAW_DIR] --target=DATA_DIR [flags]: from raw files to records.

Writes ArrayRecord shards, TFDS metadata, an index, the vocabulary and, last, manifest.json. Started again it goes on
where it was stopped, or says that all is there. Data sets, and what to download:
"""

from __future__ import annotations

import functools
import sys

from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.data import datasets
from vlp_jax.data.preparation import writer
from vlp_jax.types import UserError

FLAGS = {  # name -> default and meaning; besides these each data set has options
    "source": ("", "folder of the raw files as published"),
    "target": ("", "the data directory to write"),
    "vocab": ("", "vocab.txt or *.model to use; empty = train one"),
    "vocab_size": (writer.VOCAB_SIZE, "pieces of a trained one, at most"),
    "workers": (0, "processes; 0 = one a core"),
    "max_bad": (0.01, "largest share of pictures that may be unusable, 0 to 1"),
    "on_bad": ("skip", "skip leaves out what cannot be used and lists it; error ends at the first"),
    "overwrite": (False, "replace a data set that was prepared otherwise"),
}


def define(flags: absl_flags.FlagValues) -> None:
    """Adds the flags: those of every data set, and the options of each."""
    own = {name: [default, meaning] for name, (default, meaning) in FLAGS.items()}
    for module in map(datasets.get, datasets.names()):
        for option, default in module.OPTIONS.items():
            own.setdefault(option, [default]).append(f"{module.NAME}: {module.HELP[option]}")
    kinds = {bool: absl_flags.DEFINE_boolean, list: absl_flags.DEFINE_list, str: absl_flags.DEFINE_string}
    kinds[int] = functools.partial(absl_flags.DEFINE_integer, lower_bound=0)
    kinds[float] = functools.partial(absl_flags.DEFINE_float, lower_bound=0, upper_bound=1)
    for option, (default, *meanings) in own.items():
        kinds[type(default)](option, default, "; ".join(meanings), flag_values=flags)


def main(flags: absl_flags.FlagValues, dataset: str) -> None:
    """Prepares a data set and prints what is there."""
    module = datasets.get(dataset)
    possible = [*FLAGS, *module.OPTIONS][hasattr(module, "draw") :]  # a drawn set has no --source
    cli.require(flags, *(name for name in ("target", "source") if name in possible))
    if wrong := [name for name in flags if flags[name].present and name not in possible]:
        listed = ", --".join(possible)
        raise UserError(f"--{wrong[0]} is no flag of {dataset}. Possible: --{listed}. Leave it out.")
    options = {name: flags[name].value for name in module.OPTIONS if flags[name].present}
    manifest, fresh = writer.write(module, **{name: flags[name].value for name in FLAGS}, options=options)
    print(f"{dataset}: {'done' if fresh else 'already there'}, {flags.target}\n{writer.summary(manifest)}")


if __name__ == "__main__":
    listed = "\n".join(f"  {name}  {datasets.get(name).SOURCE}" for name in datasets.names())
    sys.exit(cli.run(main, define, usage=__doc__ + listed, arguments=("DATASET",)))
