# SPDX-License-Identifier: Apache-2.0
"""The bucket plan loses no example, is the same from any step, host and thread, and leaves few slots empty."""

import csv
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from configs import detr
from vlp_jax.data import buckets, detection, grid, image, order
from vlp_jax.types import UserError

SIZES = (192, 216, 228)
RULE = image.Layout(384, 639, 32, 228)
# A made-up set: most pictures 4:3 or 3:2, a few of every number of patches.
COUNTS = np.repeat([76, 144, 192, 204, 216, 228], [1, 1, 8, 2, 6, 2])[
    order.mix(np.arange(100_003)) % np.uint64(20)
]


def make(batch_size, counts=COUNTS, sizes=SIZES, seed=3):
    """A plan over one source in which picture `row` has counts[row] patches."""

    def count(positions):
        _, _, row, _ = order.order(seed, positions, [len(counts)], [1.0])
        return counts[row]

    return buckets.Buckets(sizes, batch_size, len(counts), seed, count), count


@pytest.fixture(scope="module")
def coco(realdata):
    """Height and width of the 5,000 pictures of COCO val2017."""
    with (realdata / "coco" / "coco_val2017_sizes.csv").open(newline="") as file:
        return np.array([(int(row["height"]), int(row["width"])) for row in csv.DictReader(file)]).T


@pytest.mark.parametrize(
    ("batch_size", "examples"), [(256, 100_003), (4096, 100_003), (8, 20), (64, 5), (1, 1), (1, 3), (7, 700)]
)
def test_a_window_holds_its_positions_once_in_the_smallest_buckets(batch_size, examples):
    plan, count = make(batch_size, COUNTS[:examples])
    for number in (0, 1, 7, 10**7):
        steps = number * plan.batches + np.arange(plan.batches)
        slots, positions = zip(*(plan.batch(step) for step in steps), strict=True)
        slots, positions = np.array(slots), np.stack(positions)
        assert positions.shape == (plan.batches, batch_size) and positions.dtype == np.int64
        first = number * plan.batches * batch_size
        np.testing.assert_array_equal(np.sort(positions, axis=None), first + np.arange(positions.size))
        kept = count(positions.ravel()).reshape(positions.shape)
        assert (kept <= slots[:, None]).all()
        for size in SIZES:  # nothing is promoted but what fills no batch
            assert (slots <= size).sum() == (kept <= size).sum() // batch_size
        np.testing.assert_allclose(
            [plan.padding(step) for step in steps],
            [1 - k.sum() / (s * batch_size) for k, s in zip(kept, slots, strict=True)],
        )


def test_the_set_of_examples_of_a_window_is_that_of_the_plan_without_buckets():
    sizes, weights, counts = [900, 50, 3000], [5, 1, 2.5], (192, 228, 200)

    def rows(positions):
        source, epoch, row, _ = order.order(1, positions, sizes, weights)
        return np.stack([source, epoch, row])

    def count(positions):
        return np.array(counts)[rows(positions)[0]]

    plan = buckets.Buckets(SIZES, 32, sum(sizes), 1, count)
    for number in (0, 5):
        window = plan.window(number)
        length = plan.batches * 32
        plain = rows(number * length + np.arange(length))
        ours = rows(window.positions.ravel())
        assert sorted(map(tuple, ours.T.tolist())) == sorted(map(tuple, plain.T.tolist()))
        assert set(window.slots.tolist()) == set(SIZES)


def test_same_plan_from_any_step_in_any_instance():
    plan, _ = make(16, COUNTS[:3000])
    whole = [plan.batch(step) for step in range(3 * plan.batches + 5)]
    for start in (0, 1, plan.batches - 1, plan.batches, 2 * plan.batches + 3):
        other, _ = make(16, COUNTS[:3000])
        for step in [*range(start, len(whole)), *range(start)]:
            slots, positions = other.batch(step)
            assert slots == whole[step][0]
            np.testing.assert_array_equal(positions, whole[step][1])
    other, _ = make(16, COUNTS[:3000], seed=4)
    assert any((other.batch(step)[1] != whole[step][1]).any() for step in range(5))


def test_threads_share_a_window_that_is_made_once():
    made, inside = [], threading.Lock()
    _, count = make(16, COUNTS[:5000])

    def slow(positions):
        assert inside.acquire(blocking=False), "two threads make windows at once"
        made.append(int(positions[0]))
        time.sleep(0.01)
        inside.release()
        return count(positions)

    plan = buckets.Buckets(SIZES, 16, 5000, 3, slow)
    steps = list(range(plan.batches - 40, plan.batches + 40)) * 2
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(plan.batch, steps))
    assert sorted(made) == [0, plan.batches * 16]
    alone, _ = make(16, COUNTS[:5000])
    for step, (slots, positions) in zip(steps, found, strict=True):
        assert slots == alone.batch(step)[0]
        np.testing.assert_array_equal(positions, alone.batch(step)[1])


def test_batches_of_a_window_are_shuffled():
    window = make(256)[0].window(0)
    share = (window.slots == 216).mean()
    parts = np.array_split(window.slots == 216, 8)
    assert all(abs(part.mean() - share) < 0.3 for part in parts)
    assert (make(256)[0].window(1).slots != window.slots).any()
    middles = window.positions.mean(1)
    assert abs(np.corrcoef(middles, np.arange(len(middles)))[0, 1]) < 0.25


def test_plan_is_stable():
    """Pinned: another plan would change every run that is resumed."""
    window = make(64)[0].window(2)
    content = window.slots.astype("<i8").tobytes() + window.positions.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "025ab5ae93cdb63e"


@pytest.mark.parametrize("examples", [5_000, 10_000_000])
@pytest.mark.parametrize("batch_size", [256, 4096])
def test_few_slots_are_empty_on_coco(coco, batch_size, examples):
    counts = buckets.tokens(*coco, RULE)
    assert len(counts) == 5000 and counts.max() <= 228
    assert buckets.empty(counts, 228) <= 0.14

    def count(positions):
        return counts[order.order(0, positions, [examples], [1.0])[2] % 5000]

    plan = buckets.Buckets(SIZES, batch_size, examples, 0, count)
    used = slots = 0
    for number in range(2):
        window = plan.window(number)
        used, slots = used + window.tokens.sum(), slots + window.slots.sum() * batch_size
    assert 0.02 < 1 - used / slots <= 0.03


def test_counts_and_slots_are_those_of_the_patch_plan(coco):
    for rule in (RULE, image.Layout(384, 639, 32, 200), image.Layout(64, 106, 16, 24)):
        height, width = coco[:, :500]
        counts = buckets.tokens(height, width, rule)
        draw = np.arange(500, dtype=np.uint32)
        np.testing.assert_array_equal(image.plan(height, width, draw, rule)["patch_mask"].sum(1), counts)


def test_a_batch_is_planned_alike_in_any_bucket(coco):
    """No patch of a picture is lost in its bucket, and those that are drawn do not depend on the bucket."""
    height, width = coco[:, :300]
    counts, draw = buckets.tokens(height, width, RULE), np.arange(300, dtype=np.uint32)
    small = counts <= 192
    one = image.plan(height[small], width[small], draw[small], image.Layout(384, 639, 32, 192))
    all_ = image.plan(height[small], width[small], draw[small], RULE)
    for key in ("patch_positions", "patch_mask"):
        np.testing.assert_array_equal(one[key], all_[key][:, :192])
    assert not all_["patch_mask"][:, 192:].any()


def test_first_batch_far_into_ten_million_pairs_is_quick():
    ends = np.cumsum(np.full(2_000_000, 5))
    counts = COUNTS[np.arange(2_000_000) % len(COUNTS)]

    def count(positions):
        _, _, pair, _ = order.order(0, positions, [10_000_000], [1.0])
        return counts[np.searchsorted(ends, pair, side="right")]

    for batch_size in (256, 4096):
        begun = time.process_time()
        slots, positions = buckets.Buckets(SIZES, batch_size, 10_000_000, 0, count).batch(
            10_000_000 // batch_size
        )
        assert time.process_time() - begun < 2.5
        assert slots in SIZES and abs(positions - 10_000_000).max() <= 2 * buckets.WINDOW


def test_a_short_run_over_few_pictures_sees_all_alike():
    plan, _ = make(8, COUNTS[:200])
    steps = 4 * plan.batches
    positions = np.concatenate([plan.batch(step)[1] for step in range(steps)])
    _, _, row, _ = order.order(3, positions, [200], [1.0])
    shown = np.bincount(row, minlength=200)
    assert shown.max() - shown.min() <= 1


def test_one_bucket_is_the_plan_of_one_shape():
    plan, _ = make(16, COUNTS[:1000], sizes=(228,))
    window = plan.window(0)
    assert set(window.slots.tolist()) == {228}
    assert 1 - window.tokens.sum() / window.slots.sum() / 16 == pytest.approx(
        buckets.empty(COUNTS[:1000], 228), abs=0.01
    )


def test_a_count_above_the_largest_bucket_is_our_error():
    with pytest.raises(ValueError, match="228 in buckets of"):
        make(4, COUNTS[:100], sizes=(192, 216))[0].batch(0)


CANVASES = ((800, 1088), (1088, 800), (800, 1344), (1344, 800), (1344, 1344))


def naive_fill(extent, sizes, batch_size):
    """Picture by picture: a queue for each bucket."""
    queues, batches = [[] for _ in sizes], []

    def next_holding(picture, start):
        return next(
            i
            for i in range(start, len(sizes))
            if all(np.atleast_1d(extent[picture]) <= np.atleast_1d(sizes[i]))
        )

    promoted = [[] for _ in sizes]
    for picture in range(len(extent)):
        queues[next_holding(picture, 0)].append(picture)
    for bucket in range(len(sizes)):
        queue = promoted[bucket] + queues[bucket]
        while len(queue) >= batch_size or (queue and bucket == len(sizes) - 1):
            batches.append((bucket, queue[:batch_size]))
            queue = queue[batch_size:]
        for picture in queue:
            promoted[next_holding(picture, bucket + 1)].append(picture)
    return batches


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64, 5000])
def test_filling_is_that_of_queues(coco, batch_size):
    shapes = np.stack(detection.resized_size(*coco, 800, 1333), -1)[:700]
    for extent, sizes in ((shapes, CANVASES), (shapes, ((1344, 1344),)), (COUNTS[:700], SIZES)):
        which, rows = buckets.fill(extent, sizes, batch_size)
        expected = naive_fill(extent, sizes, batch_size)
        assert which.tolist() == [bucket for bucket, _ in expected]
        assert [[row for row in batch if row < 700] for batch in rows.tolist()] == [b for _, b in expected]
        assert sorted(row for row in rows.ravel().tolist() if row < 700) == list(range(700))
        assert (rows[:-1] < 700).all()  # only the last batch has empty rows
        assert len(rows) == -(-700 // batch_size)


def test_filling_nothing_and_what_does_not_fit():
    which, rows = buckets.fill(np.zeros((0, 2), np.int64), CANVASES, 4)
    assert which.shape == (0,) and rows.shape == (0, 4)
    with pytest.raises(ValueError, match="1345"):
        buckets.fill(np.array([[10, 10], [10, 1345]]), CANVASES, 4)


def test_windows_of_canvases(coco):
    rule, seed, batch_size = grid.rule(detr.get_config("variant=r50").data), 5, 16

    def extents(positions):
        _, _, row, draw = order.order(seed, positions, [5000], [1.0])
        return detection.plan(rule, draw, *coco[:, row]).size

    plan = buckets.Buckets(CANVASES, batch_size, 5000, seed, extents)
    again = buckets.Buckets(CANVASES, batch_size, 5000, seed, extents)
    seen, used, room = [], 0, 0
    for step in range(plan.batches):
        canvas, positions = plan.batch(step)
        assert canvas in CANVASES and len(positions) == batch_size
        sizes = extents(positions)
        assert (sizes <= canvas).all()
        seen.append(positions)
        used, room = used + sizes.prod(1).sum(), room + batch_size * canvas[0] * canvas[1]
        assert plan.padding(step) == pytest.approx(1 - sizes.prod(1).sum() / (batch_size * np.prod(canvas)))
    np.testing.assert_array_equal(np.sort(seen, axis=None), np.arange(plan.batches * batch_size))
    assert len({plan.batch(step)[0] for step in range(plan.batches)}) >= 4
    for step in (plan.batches - 1, 3):
        assert again.batch(step)[0] == plan.batch(step)[0]
        np.testing.assert_array_equal(again.batch(step)[1], plan.batch(step)[1])
    square = 1 - used / (plan.batches * batch_size * 1344**2)
    assert 1 - used / room < 0.4 and square > 0.69  # measured: 0.387 and 0.698


def test_sizes_are_checked():
    assert buckets.check((), RULE) == () and buckets.check([192, 228], RULE) == (192, 228)
    assert buckets.check((np.int64(228),), RULE) == (228,)
    cut = image.Layout(384, 639, 32, 200)
    assert buckets.check((144, 200), cut) == (144, 200)
    for wrong in (
        (216, 192, 228),
        (192, 192, 228),
        (0, 228),
        (-1, 228),
        (192.5, 228),
        ("192", 228),
        (True, 228),
        "228",
    ):
        with pytest.raises(
            UserError, match=r"Possible are .* ascend, the last 228, for example \(192, 228\)"
        ):
            buckets.check(wrong, RULE)
    for wrong, rule in (((192, 216), RULE), ((192, 240), RULE), ((192, 216, 228), cut)):
        with pytest.raises(
            UserError, match=f"may keep {rule.slots} .* end with {rule.slots}, or .*={wrong[-1]}"
        ):
            buckets.check(wrong, rule)
