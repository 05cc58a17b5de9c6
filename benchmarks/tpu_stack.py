# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.tpu_stack [--depth=4] [--unroll=4] [--dropout=0.1] [--gelu=exact] [--record]

ViLT-B/32's transformer layers, forward and all gradients, compiled for one described TPU chip: what a lever is worth
by the compiler's own estimate. Nothing runs on a TPU; needs libtpu (pip install -r requirements-tpu.txt).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it would look for a TPU and take it

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags as absl_flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from benchmarks import results
from vlp_jax import cli
from vlp_jax.layers.activation import GELUS
from vlp_jax.layers.stack import Stack
from vlp_jax.parallel import mesh as meshes
from vlp_jax.planning import chips, compilation, program, work

WIDTH, HEADS, MLP_WIDTH = 768, 12, 3072


def define(flags: absl_flags.FlagValues) -> None:
    """The flags of this benchmark."""
    common = {"flag_values": flags}
    absl_flags.DEFINE_string("topology", "v5e:1x1", "one chip of this generation", **common)
    absl_flags.DEFINE_integer("batch", 32, "rows on the chip", 1, **common)
    absl_flags.DEFINE_integer("tokens", 241, "real tokens of a row", 1, **common)
    absl_flags.DEFINE_integer("token_multiple", 16, "tokens are padded to a multiple of this", 1, **common)
    absl_flags.DEFINE_integer("depth", 4, "layers", 1, **common)
    absl_flags.DEFINE_integer("unroll", 4, "layers that the loop's body holds; depth = no loop", 1, **common)
    absl_flags.DEFINE_float("dropout", 0.1, "rate; 0 = off", 0.0, 0.99, **common)
    absl_flags.DEFINE_enum("gelu", "exact", GELUS, "form of the GELU", **common)
    absl_flags.DEFINE_bool("remat", False, "keep only the layers' inputs", **common)
    absl_flags.DEFINE_bool("record", False, "append the row to benchmarks/RESULTS.md", **common)


def main(flags: absl_flags.FlagValues) -> None:
    """Compiles the layers, walks the program and prints one row."""
    if flags.record:
        results.check_there()
    where = chips.find(flags.topology)
    names = ("batch", "tokens", "token_multiple", "depth", "unroll", "dropout", "gelu", "remat")
    options = {name: getattr(flags, name) for name in names}
    built, flops = compilation.call(where, compile_layers, where, options)
    found = program.read(built.text)
    seconds = found.cycles / where.generation.clock
    computed = -(-flags.tokens // flags.token_multiple) * flags.token_multiple
    head = ["ms a layer", "MFU computed", "MFU useful", "temporaries MiB", "compiled in s"]
    mfu = [part / seconds / where.generation.peak for part in flops]
    if max(mfu) > 1:
        raise AssertionError(f"MFU {max(mfu):.3f} is above 1: the walk over the program has lost something")
    row = [f"{seconds / flags.depth * 1e3:.3f}", *(f"{part:.3f}" for part in mfu)]
    row += [f"{built.memory['temporaries'] / 2**20:.0f}", f"{built.seconds:.0f}"]
    what = ", ".join(f"{name} {value}" for name, value in options.items())
    what += (
        f" ({computed} tokens computed), {where.name}, libtpu {compilation.version()}, estimated, run on none"
    )
    section = results.section(
        "TPU: four layers, estimated", what, "compiled only", ("jax", "flax"), [head, row]
    )
    if flags.record:
        results.append([section])


def compile_layers(where: chips.Slice, options: dict) -> tuple[compilation.Compiled, tuple[int, int]]:
    """Compiles the layers on one chip; returns the program and its FLOPs, over computed and over real tokens."""
    mesh = meshes.make_mesh(ConfigDict({"rules": "dp", "mesh": (1, 1, 1)}), compilation.devices(where)[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    stack = _stack(options, options["token_multiple"])
    shape = (options["batch"], options["tokens"], WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)
    mask = jax.ShapeDtypeStruct(shape[:2], jnp.bool_, sharding=whole)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    params = jax.eval_shape(lambda: nn.unbox(stack.init(jax.random.key(0), _zeros(x), _zeros(mask), False)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), params)

    def gradients(params, x, cotangent, mask, seed):
        y, pull = jax.vjp(lambda params, x: _run(stack, params, x, mask, seed), params, x)
        return y, pull(cotangent)

    built = compilation.compiled(jax.jit(gradients).lower(params, x, x, mask, seed))
    counted = []
    for multiple in (options["token_multiple"], 1):
        plain = _stack(options, multiple)
        counted.append(3 * work.flops(lambda *a, s=plain: _run(s, *a), params, x, mask, seed))
    return built, tuple(counted)


def _stack(options: dict, multiple: int) -> Stack:
    return Stack(
        options["depth"], HEADS, MLP_WIDTH, 1e-6, options["dropout"], jnp.bfloat16, options["unroll"],
        options["remat"], options["gelu"], multiple,
    )  # fmt: skip


def _run(stack: Stack, params, x, mask, seed):
    return stack.apply(params, x, mask, True, rngs={"dropout": jax.random.key(seed)})


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


if __name__ == "__main__":
    sys.exit(cli.run(main, define, usage=__doc__))
