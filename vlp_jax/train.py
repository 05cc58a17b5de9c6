# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.train --config=configs/vilt.py:variant=b32 --config.data.dir=DATA --workdir=RUN

The same command again resumes. Several hosts: once each, --config.parallel.{coordinator=HOST:PORT,processes=N,process=I}
"""

from __future__ import annotations

import functools
import logging
import sys

from absl import flags as absl_flags

from vlp_jax import cli


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this main."""
    cli.define_config(flags)
    absl_flags.DEFINE_string("workdir", "", "folder of the run; made if it is not there", flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Puts data, system, mesh and loop together."""
    cli.require(flags, "config", "workdir")
    from vlp_jax import systems
    from vlp_jax.convert import start
    from vlp_jax.data import facts as data_facts
    from vlp_jax.data import pipeline, source, spec
    from vlp_jax.evaluation import quick
    from vlp_jax.parallel import mesh as meshes
    from vlp_jax.parallel import processes
    from vlp_jax.training import limits, loop, workdir

    config = flags.config
    limits.check(config)
    with processes.joined(config.parallel, config.compilation_cache) as host:
        facts = data_facts.collect(config)
        logging.getLogger("vlp_jax").info(data_facts.line(facts, config.data.split))
        config.data.sources, module = tuple(facts["sources"]), systems.get(config.system)
        config = module.resolve(config, facts)
        mesh = meshes.make_mesh(config.parallel)
        opened = functools.partial(source.open_sources, config.data.dir)
        examples = functools.partial(pipeline.evaluation_batches, config, **host)
        with workdir.open_workdir(flags.workdir, config, facts["manifest_sha256"]) as folder:
            system = module.build(config)
            inputs = loop.Inputs(
                batches=lambda start: pipeline.batches(config, split=config.data.split, start=start, **host),
                spec=spec.spec(config, config.train.batch_size),
                evaluate=quick.evaluator(config, system, facts, mesh, examples, opened),
                assets=data_facts.assets(facts),
                initial=start.starter(config, facts["vocabulary_sha256"]),
                meta={"config": config.to_dict(), "facts": facts},
            )
            loop.run(config, system, inputs, folder, mesh)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
