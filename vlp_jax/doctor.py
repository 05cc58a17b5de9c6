# SPDX-License-Identifier: Apache-2.0
"""Says what is wrong with prepared data before a run finds out: `python -m vlp_jax.doctor data DATA_DIR`."""

from __future__ import annotations

import sys

from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.types import UserError, closest

USAGE = """python -m vlp_jax.doctor data DATA_DIR [--deep] [--text_length=40]

Reports counts, text lengths and picture sizes of a prepared directory. Ends with 2 when a run would suffer,
after a line for each problem, by file and record."""
KINDS = ("data",)


def define(flags: absl_flags.FlagValues) -> None:
    """Adds the flags."""
    absl_flags.DEFINE_bool("deep", False, "look at every byte and decode every picture", flag_values=flags)
    absl_flags.DEFINE_integer("text_length", 40, "data.text_length of the run to come", flag_values=flags)


def main(flags: absl_flags.FlagValues, kind: str, directory: str) -> None:
    """Prints the report; problems are the message that ends it."""
    if kind not in KINDS:
        raise UserError(
            f"doctor cannot look at '{kind}'.{closest(kind, KINDS)} Possible: data. Give data DATA_DIR."
        )
    from vlp_jax.data import doctor

    problems = doctor.examine(directory, deep=flags.deep, length=flags.text_length)
    if problems:
        raise UserError("\n".join([f"A run would suffer; problems found: {len(problems)}.", *problems]))
    print("No problem found." if flags.deep else "No problem found; --deep looks at every byte.")


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=USAGE, arguments=("KIND", "DATA_DIR")))
