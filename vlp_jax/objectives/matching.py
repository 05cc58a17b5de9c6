# SPDX-License-Identifier: Apache-2.0
"""Set prediction's matching: the cheapest one-to-one assignment of queries to targets, exact, on the accelerator.

Shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987; Crouse, IEEE TAES 52, 2016, which scipy follows),
all rows of the batch in one loop of small steps. DETR section 3.1 defines what is matched.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vlp_jax.types import Array

LARGEST = 1e30  # costs beyond this count as this, so that sums over a path stay finite in float32
NONE = -1


class Search(NamedTuple):
    """What the loop carries for each row of the batch. Slots are the queries, then `_slots`' places to be left out."""

    slot_of: Int[Array, "batch target"]  # the matching so far, NONE where there is none
    target_of: Int[Array, "batch slot"]  # its inverse
    price: Float[
        Array, "batch slot"
    ]  # dual variable; the targets' follow from it, so that they gather no rounding
    distance: Float[Array, "batch slot"]  # shortest path known, from the target that searches
    before: Int[Array, "batch slot"]  # the target in front of the slot on that path
    settled: Bool[Array, "batch slot"]
    target: Int[Array, "batch"]  # whose edges the next step follows; NONE where nothing is searched
    through: Int[Array, "batch"]  # its slot
    length: Float[Array, "batch"]  # of the path to it
    turn: Int[Array, "batch"]  # slot of a path found that changes hands next; NONE where there is none


def match(cost: Float[Array, "batch query target"], valid: Int[Array, "batch"]) -> Int[Array, "batch target"]:
    """The query of each target in the assignment of least total cost; int32, no gradient.

    The first `valid[b]` targets of a row are real (fewer than 0 count as 0, more than there are as all). The others
    get -1. Where the real targets outnumber the queries, the optimum uses every query, and the targets it leaves out
    get -1, too. Among assignments of equal cost any one may come.

    Every input gives an answer: NaN and +inf mark pairs to avoid, -inf pairs to take. They are replaced by plus and
    minus `2 * targets * max|finite cost|` of the row, so that as few are avoided or as many taken as possible, and the
    rest is still the optimum. Costs are clipped to +-1e30. A caller that must know of such costs counts them.

    All is float32, but sums over paths hold differences of costs only: the total is scipy's within 1e-5 of the sum
    of the |costs| taken, and exact where differences of costs are (integers, multiples of one ulp).

    A step reads one line of costs for each row of the batch. The number of steps depends on real targets only, at most
    `valid^2` for a row and a few where targets prefer different queries; rows that are done wait for the slowest.
    Rows are independent: a sharded batch exchanges nothing but whether all are done, once a step. Who flattens layers
    into a sharded batch makes the batch the outer axis (`[batch, layer]`): the other order gathers all costs.
    """
    batch, queries, targets = cost.shape
    if batch * queries * targets == 0:
        return jnp.full((batch, targets), NONE, jnp.int32)
    cost = jnp.swapaxes(jax.lax.stop_gradient(cost).astype(jnp.float32), 1, 2)
    valid = valid.astype(jnp.int32)
    real = jnp.arange(targets)[None] < valid[:, None]
    cost = _slots(_finite(cost, real), real, valid)
    lowest = jnp.min(cost, -1)

    def goes_on(carry: tuple[Search, Array]) -> Array:
        search, steps = carry
        return jnp.any(real & (search.slot_of == NONE)) & (steps < limit)

    def step(carry: tuple[Search, Array]) -> tuple[Search, Array]:
        search, steps = carry
        return _turn(_settle(_begin(search, real), cost, lowest)), steps + 1

    # With k targets matched, a search settles k + 1 slots at most, and k more change hands after it: targets^2 in all.
    # It never ends by the limit while sums are finite; a pod must not hang where they are not (1e30, 10,000 targets).
    limit = min(targets**2, 2**31 - 1)
    (slot_of, *_), _ = jax.lax.while_loop(goes_on, step, (_greedy(cost, lowest, real), jnp.int32(0)))
    return jnp.where(real & (slot_of < queries), slot_of, NONE)


def _finite(
    cost: Float[Array, "batch target query"], real: Bool[Array, "batch target"]
) -> Float[Array, "batch target query"]:
    finite = jnp.isfinite(cost)
    cost = jnp.clip(cost, -LARGEST, LARGEST)
    top = jnp.max(jnp.where(finite & real[:, :, None], jnp.abs(cost), 0.0), (1, 2))
    # More than what all other pairs together can win back; no larger, because float32 adds it to the others.
    large = (2 * cost.shape[1] * jnp.where(top > 0, top, 1.0))[:, None, None]
    return jnp.where(finite, cost, jnp.where(cost < 0, -large, large))


def _slots(
    cost: Float[Array, "batch target query"], real: Bool[Array, "batch target"], valid: Int[Array, "batch"]
) -> Float[Array, "batch target slot"]:
    """Adds places to be left out, as many as a row has too many targets, of one cost for all: any gives one optimum."""
    targets, queries = cost.shape[1:]
    if targets <= queries:
        return cost
    # The optimum holds a cost as large as this or larger. A larger one would drown its differences in rounding, a
    # smaller one would make every target prefer to be left out, and search long.
    leave = jnp.sort(jnp.where(real, jnp.min(cost, -1), jnp.inf), -1)[:, queries - 1]
    there = jnp.arange(targets - queries)[None] < valid[:, None] - queries
    places = jnp.where(there, leave[:, None], jnp.inf)[:, None]
    return jnp.concatenate([cost, jnp.broadcast_to(places, (*cost.shape[:2], targets - queries))], -1)


def _greedy(
    cost: Float[Array, "batch target slot"],
    lowest: Float[Array, "batch target"],
    real: Bool[Array, "batch target"],
) -> Search:
    """The start: a slot that is the cheapest of several targets goes to the first of them. It saves most searches."""
    batch, targets, slots = cost.shape
    cheapest = _first(cost <= lowest[:, :, None])
    wish = jnp.where(real, cheapest, NONE)
    target_of = _first(wish[:, None] == jnp.arange(slots)[None, :, None])
    target_of = jnp.where(target_of < targets, target_of, NONE)
    granted = real & (jnp.take_along_axis(target_of, cheapest, 1) == jnp.arange(targets)[None])
    none = jnp.full(batch, NONE, jnp.int32)
    zero = jnp.zeros((batch, slots), jnp.float32)
    return Search(
        slot_of=jnp.where(granted, cheapest, NONE), target_of=target_of, price=zero, distance=zero,
        before=jnp.zeros((batch, slots), jnp.int32), settled=jnp.zeros((batch, slots), bool),
        target=none, through=none, length=zero[:, 0], turn=none,
    )  # fmt: skip


def _begin(search: Search, real: Bool[Array, "batch target"]) -> Search:
    """Rows that neither search nor take turns begin to search from their next target, if they have one."""
    new = (search.target == NONE) & (search.turn == NONE)
    following = _first(real & (search.slot_of == NONE))
    some = new & (following < real.shape[1])
    return search._replace(
        target=jnp.where(some, following, search.target),
        through=jnp.where(new, NONE, search.through),
        length=jnp.where(new, 0.0, search.length),
        distance=jnp.where(new[:, None], jnp.inf, search.distance),
        settled=search.settled & ~new[:, None],
    )


def _settle(
    search: Search, cost: Float[Array, "batch target slot"], lowest: Float[Array, "batch target"]
) -> Search:
    """One step of Dijkstra's search: follows the edges of `target`, settles the nearest slot, goes on to its target."""
    slots = cost.shape[-1]
    places = jnp.arange(slots, dtype=jnp.int32)[None]
    searches = search.target != NONE
    target = jnp.maximum(search.target, 0)  # any, where none searches
    through = jnp.maximum(search.through, 0)
    line = jnp.take_along_axis(cost, target[:, None, None], 1)[:, 0]
    begins = search.through == NONE
    # A searching target's own dual variable moves all distances alike; its lowest cost keeps them small.
    own = jnp.where(begins, _at(lowest, target), _at(line, through))
    paid = jnp.where(begins, 0.0, _at(search.price, through))
    # In this order differences of like costs are exact; cost + length - (dual variable) would round to ulps of the cost.
    way = search.length[:, None] + ((line - own[:, None]) + (paid[:, None] - search.price))
    better = (way < search.distance) & ~search.settled & searches[:, None]
    distance = jnp.where(better, way, search.distance)
    before = jnp.where(better, target[:, None], search.before)

    open_distance = jnp.where(search.settled, jnp.inf, distance)
    length = jnp.min(open_distance, -1)
    # Of equally near slots one without target: the search ends there.
    rank = jnp.where(search.target_of == NONE, places, places + slots)
    nearest = jnp.min(jnp.where(open_distance <= length[:, None], rank, 2 * slots - 1), -1) % slots
    onward = _at(search.target_of, nearest)
    found = searches & (onward == NONE)
    # The slot found would change by 0: it need not be settled for this.
    paying = search.settled & found[:, None]
    return search._replace(
        price=jnp.where(paying, search.price + (distance - length[:, None]), search.price),
        distance=distance,
        before=before,
        settled=search.settled | (places == nearest[:, None]),
        target=jnp.where(searches & ~found, onward, NONE),
        through=nearest,
        length=length,
        turn=jnp.where(found, nearest, search.turn),
    )


def _turn(search: Search) -> Search:
    """One slot of a path found changes hands; the slot that its new target held is next."""
    slot = search.turn[:, None]
    taker = _at(search.before, jnp.maximum(search.turn, 0))
    left = _at(search.slot_of, taker)
    taken = jnp.arange(search.target_of.shape[1])[None] == slot
    moves = (jnp.arange(search.slot_of.shape[1])[None] == taker[:, None]) & (slot != NONE)
    return search._replace(
        target_of=jnp.where(taken, taker[:, None], search.target_of),
        slot_of=jnp.where(moves, slot, search.slot_of),
        turn=jnp.where(search.turn == NONE, NONE, left),
    )


def _first(true: Bool[Array, "*axes size"]) -> Int[Array, "*axes"]:
    """Place of the first True on the last axis, its size where there is none; several times as fast as argmax on a CPU."""
    size = true.shape[-1]
    places = jax.lax.broadcasted_iota(jnp.int32, true.shape, true.ndim - 1)
    return jnp.min(jnp.where(true, places, size), -1)


def _at(values: Array, index: Int[Array, "batch"]) -> Array:
    """`values[b, index[b]]`, so that a sharded batch is not gathered."""
    return jnp.take_along_axis(values, index[:, None], 1)[:, 0]
