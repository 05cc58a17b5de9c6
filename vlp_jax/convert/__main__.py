# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.convert --system=vilt --source=FILE [--source=FILE ...] --target=DIR
python -m vlp_jax.convert --system=vilt --source=CKPT --target=DIR --format=hf|original

Weights from elsewhere to a checkpoint of ours, and back, with proof. vlp_jax/convert/README.md: which file for what.
"""

from __future__ import annotations

import sys

from absl import flags as absl_flags

from vlp_jax import cli

TEXTS = {
    "system": "vilt, detr",
    "target": "folder to make",
    "format": "export: hf (a folder for transformers) or original (the authors' names); empty: import",
    "as": "export to hf: the class, e.g. ViltForMaskedLM; empty: by the heads that are there",
    "report": "FILE.html or FILE.json that keeps plan and proof",
    "vocab": "vocabulary of the weights (vocab.txt or a SentencePiece .model), kept in the checkpoint",
    "labels": "names of the classes: .json list or {number: name}, or a line each; kept in the checkpoint",
    "position_resize": "bilinear, aligned or bicubic: how a position grid takes another size",
}
SWITCHES = {
    "dry-run": (False, "print the plan and end"),
    "overwrite": (False, "replace a target that a conversion has made"),
    "proof": (True, "run the file in PyTorch, where it is installed, and compare"),
}


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this main."""
    cli.define_config(flags)
    absl_flags.DEFINE_multi_string(
        "source", [], "file or folder to read; several parts: several times", flag_values=flags
    )
    absl_flags.DEFINE_list("drop", [], "export: heads that are left away, e.g. itm", flag_values=flags)
    for name, text in TEXTS.items():
        default = "bilinear" if name == "position_resize" else ""
        absl_flags.DEFINE_string(name, default, text, flag_values=flags)
    for name, (default, text) in SWITCHES.items():
        absl_flags.DEFINE_bool(name, default, text, flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Import, or with --format export."""
    cli.require(flags, "system")
    from vlp_jax.convert import command, tables

    known, config, given = tables.get(flags.system), flags.config, bool(flags.config)
    values = {name: flags[name].value for name in flags}
    command.run(values, config if given else cli.load_config(known.CONFIG), given)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
