# SPDX-License-Identifier: Apache-2.0
"""python -m vlp_jax.predict --checkpoint=CKPT --task=boxes --image=a.jpg [--image=b.jpg ...] [--picture=out.png]

What a trained model says of pictures: a line of JSON for each on standard output, boxes as x, y, width, height in
pixels, surest first. An orientation in a file's EXIF is ignored, as in training.
"""

from __future__ import annotations

import json
import sys

from absl import flags as absl_flags

from vlp_jax import cli

FLAGS = {
    "checkpoint": "one checkpoint, of train or convert, for example RUN/checkpoints/500",
    "workdir": "folder of a run instead: its newest finite checkpoint",
    "task": "what to say of a picture: boxes",
    "picture": "draw the result: a file.png, .jpg or .webp; of several pictures a folder, which gets NAME.png for each",
}
SWITCHES = {
    "averages": "take the moving averages (config.ema)",
    "overwrite": "replace files of --picture that exist; never a file of --image",
}


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this main."""
    for name, text in FLAGS.items():
        absl_flags.DEFINE_string(name, "", text, flag_values=flags)
    absl_flags.DEFINE_multi_string("image", [], "a picture; several: several times", flag_values=flags)
    text = "boxes: the least score; 0 gives all that the model has"
    absl_flags.DEFINE_float("threshold", 0.7, text, flag_values=flags)
    for name, text in SWITCHES.items():
        absl_flags.DEFINE_bool(name, False, text, flag_values=flags)


def main(flags: absl_flags.FlagValues) -> None:
    """Puts checkpoint, system and task together."""
    cli.require(flags, "task")
    from vlp_jax import prediction, systems
    from vlp_jax.evaluation import full
    from vlp_jax.parallel import processes
    from vlp_jax.training import checkpoint

    task, path = prediction.get(flags.task), full.chosen(flags.workdir, flags.checkpoint)
    wanted = task.check(flags.image, flags.threshold, flags.picture, flags.overwrite)
    params, meta, assets = checkpoint.open_for_inference(path, flags.averages)
    config = full.local_config(meta["config"], "", cli.load_config("common"))
    processes.use_cache(config.compilation_cache)
    system = systems.build(config, {})
    prediction.require(flags.task, system, config.system)
    for found in task.run(config, system, params, assets, wanted):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
