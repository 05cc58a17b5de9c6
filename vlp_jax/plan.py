# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.plan --config=configs/vilt.py:variant=b32 --topology=v5e:16x16 --pairs_per_chip=16

Compiles the real train step for TPUs that are not there and says what it will need: memory, time, collectives.
Needs Linux, pip install -r requirements-tpu.txt, no data and no TPU; --compile=false needs neither Linux nor libtpu.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it would look for a TPU and take it

from absl import flags as absl_flags

from vlp_jax import cli
from vlp_jax.types import UserError


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this main."""
    cli.define_config(flags)
    absl_flags.DEFINE_string("topology", "", "a slice of TPUs: v5e:16x16, v5p:8x8x8, ...", flag_values=flags)
    text = "sets config.train.batch_size to this times the chips; 0 = as it is"
    absl_flags.DEFINE_integer("pairs_per_chip", 0, text, lower_bound=0, flag_values=flags)
    absl_flags.DEFINE_bool("compile", True, "false: only what follows from the config", flag_values=flags)
    absl_flags.DEFINE_string("json", "", "write all figures to this file too", flag_values=flags)
    absl_flags.DEFINE_string("hlo", "", "write the compiled program's text to this file", flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Puts config, system and slice together and prints the report, also of a step that does not fit."""
    from vlp_jax import systems
    from vlp_jax.data import spec
    from vlp_jax.planning import chips, estimate, report
    from vlp_jax.training import limits

    cli.require(flags, "config", "topology")
    report.check_folders(flags.json, flags.hlo)
    where, config = chips.find(flags.topology), flags.config
    limits.check(config)
    config.train.batch_size = flags.pairs_per_chip * where.chips or config.train.batch_size
    module = systems.get(config.system)
    config = module.resolve(config, estimate.facts(config))
    shapes = spec.spec(config, config.train.batch_size)
    figures = estimate.analytic(config, module, shapes, where)
    text = estimate.add_compiled(figures, config, module, shapes, where) if flags.compile else ""
    print(report.table(figures))
    report.save(figures, flags.json, text, flags.hlo)
    if not figures.get("fits", True):
        raise UserError(report.advice(figures))


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
