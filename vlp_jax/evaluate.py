# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.evaluate --workdir=RUN | --checkpoint=CKPT [--averages] [--data=DATA_DIR] [--target=DIR]

Scores a trained system on this machine's devices and writes evaluation.json and report.html.
"""

from __future__ import annotations

import sys

from absl import flags as absl_flags

from vlp_jax import cli

FLAGS = {
    "workdir": "folder of a run: its newest finite checkpoint is scored",
    "checkpoint": "one checkpoint instead, for example RUN/checkpoints/500",
    "data": "prepared data to score on; empty: those of the run",
    "target": "folder for the two files; empty: the workdir, or CKPT.evaluation beside the checkpoint",
}


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this main."""
    for name, text in FLAGS.items():
        absl_flags.DEFINE_string(name, "", text, flag_values=flags)
    absl_flags.DEFINE_bool("averages", False, "score the moving averages (config.ema)", flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Puts checkpoint, data, mesh and tasks together."""
    from vlp_jax.evaluation import full, oracle, report

    places = full.find(flags.workdir, flags.checkpoint, flags.target)
    from vlp_jax import systems
    from vlp_jax.data import datasets, pipeline, source, spec
    from vlp_jax.data import facts as data
    from vlp_jax.parallel import mesh, processes
    from vlp_jax.training import checkpoint

    params, meta, assets = checkpoint.open_for_inference(places.checkpoint, flags.averages)
    config = full.local_config(meta["config"], flags.data, cli.load_config("common"))
    processes.use_cache(config.compilation_cache)
    devices, wanted = mesh.make_mesh(config.parallel), config.evaluation
    facts = full.understood(config, meta, assets, data.collect(config))
    system = systems.build(config, facts)
    rows = spec.spec(pipeline.evaluation_config(config), wanted.batch_size)
    params = full.put(config, system, params, rows, devices)
    sources = [opened for _, opened, _ in source.open_sources(config.data.dir, wanted.split)]
    knowledge = oracle.Knowledge(sources, [datasets.get(opened.manifest["dataset"]) for opened in sources])
    chosen = {"split": wanted.split, "batch_size": wanted.batch_size, "examples": wanted.examples}
    batches = pipeline.evaluation_batches(config, **chosen)
    count = wanted.examples or pipeline.examples(config, wanted.split)
    found = full.score(config, system, params, batches, knowledge, facts, devices, count)
    report.write(places.target, places.run, config, meta, facts, found)
    print(f"{report.table(found.scores)}\nreport: {places.target / 'report.html'}")


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
