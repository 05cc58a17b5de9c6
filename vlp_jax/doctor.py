# SPDX-License-Identifier: Apache-2.0
"""Says what is wrong with prepared data before a run finds out: `python -m vlp_jax.doctor data DATA_DIR`."""

from __future__ import annotations

import json
import sys

from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.types import UserError, closest

USAGE = """python -m vlp_jax.doctor data DATA_DIR [--deep] [--json] [--against=DIR,DIR] [--browse=FILE.html]
One screen on a prepared directory. Ends with 2 when a run would suffer, after a line for each problem, by file and
record. --config says which run: its data.* keys give text length, picture and patch size."""


def define(flags: absl_flags.FlagValues) -> None:
    """Adds the flags."""
    cli.define_config(flags, default="vilt:variant=b32")
    common = {"flag_values": flags}
    absl_flags.DEFINE_bool("deep", False, "read every byte, decode every picture", **common)
    absl_flags.DEFINE_bool("json", False, "print one object, see inspection/examination.py", **common)
    absl_flags.DEFINE_list("against", [], "prepared directories to evaluate on", **common)
    absl_flags.DEFINE_float("max_overlap", 0.0, "of an evaluation split allowed in train", 0, 1, **common)
    absl_flags.DEFINE_string("browse", "", "contact sheet to write: examples as a run gets them", **common)
    absl_flags.DEFINE_string("browse_split", "train", "of the contact sheet", **common)
    absl_flags.DEFINE_integer("browse_records", 48, "pictures on it; 0 = all", 0, **common)
    for name in ("text_length", "image_size"):
        absl_flags.DEFINE_integer(name, 0, f"of the run; 0 = config.data.{name}", 0, **common)


def main(flags: absl_flags.FlagValues, kind: str, directory: str) -> None:
    """Prints the report; problems are the message that ends it."""
    if kind != "data":
        raise UserError(f"doctor knows no '{kind}'.{closest(kind, ['data'])} Possible: data. Give data DIR.")
    from vlp_jax.data import image
    from vlp_jax.data.inspection import browse, examination, screen

    data = flags.config.data
    data.update(dir=directory, **{k: flags[k].value for k in ("text_length", "image_size") if flags[k].value})
    options = {name: flags[name].value for name in ("deep", "against", "max_overlap")}
    report = examination.examine(directory, rule=image.layout(data), length=data.text_length, **options)
    sys.stdout.reconfigure(errors="replace")  # for terminals without blocks
    print(json.dumps(report) if flags.json else screen.render(report))
    found = [problem["message"] for problem in report["problems"]]
    problems = ["A run would suffer.", *found] if found else []
    if flags.browse and "splits" in report:
        try:
            shown = browse.write(flags.config, flags.browse, flags.browse_split, flags.browse_records)
            print(f"{shown} pictures in {flags.browse}", file=sys.stderr)
        except UserError as error:
            problems.append(f"No contact sheet: {error}")
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=USAGE, arguments=("KIND", "DATA_DIR")))
