# SPDX-License-Identifier: Apache-2.0
"""A whole epoch has one hash: on any number of hosts, after a restart at any step, with any number of threads."""

import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest

from configs import vilt
from tests.data import prepared
from vlp_jax.data import pipeline, spec
from vlp_jax.types import UserError

SIZES = ((64, 64), (64, 112), (90, 64))  # 16, 28 and 20 patches
MODES = {
    "plain": {},
    "buckets": {"buckets": (16, 20, 28)},
    "as ViLT": {"buckets": (16, 28), "randaugment": (2, 9), "flip": 0.5},
    "as ALBEF": {"crop": (0.2, 1.0), "randaugment": (2, 9), "flip": 0.5},
}
STEPS = 12  # of 16 rows: the 60 and 18 pairs of the sources more than twice, whatever their shares


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    one = prepared.write(folder / "one", splits={"train": 30, "test": 8}, sizes=SIZES)
    given = {"vocabulary": one / "vocabulary.model", "sizes": SIZES[::-1]}
    return one, prepared.write(folder / "two", splits={"train": 9, "test": 4}, name="other", **given)


# Each stream with RandAugment traces its fourteen operations anew, which takes seconds.
LANES = {"as ALBEF": [pytest.mark.learn], "as ViLT": [pytest.mark.slow], "buckets": [pytest.mark.slow]}
SLOW = [pytest.param(mode, marks=LANES.get(mode, [])) for mode in MODES]


@pytest.fixture(params=SLOW)
def config(request, directories):
    config = vilt.get_config("variant=tiny")
    one, two = directories
    config.data.update(
        dir=f"one={one},two={two}",
        text_length=32,
        image_size=64,
        image_limit=112,
        patch_size=16,
        max_patches=0,
    )
    config.data.update(MODES[request.param])
    config.train.batch_size = 16
    return config


def take(config, count, **options):
    return list(itertools.islice(pipeline.batches(config, **options), count))


def digest(batches):
    made = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            made.update(f"{key} {batch[key].shape} {batch[key].dtype}".encode() + batch[key].tobytes())
    return made.hexdigest()


def test_an_epoch_has_one_hash(config):
    whole = take(config, STEPS)
    for hosts in (2, 4):
        parts = [take(config, STEPS, host=host, hosts=hosts) for host in range(hosts)]
        joined = [
            {key: np.concatenate([part[key] for part in step]) for key in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert digest(joined) == digest(whole), hosts
    for start in (1, 5, 11):
        assert digest(take(config, STEPS - start, start=start)) == digest(whole[start:]), start
    for threads, prefetch in ((1, 1), (4, 3)):
        config.data.threads, config.data.prefetch = threads, prefetch
        assert digest(take(config, STEPS)) == digest(whole), threads
    config.seed = 1
    assert digest(take(config, STEPS)) != digest(whole)


def test_shapes_fit_the_pictures(config):
    batches = take(config, STEPS)
    buckets = tuple(config.data.buckets)
    for batch in batches:
        slots = batch["patches"].shape[1]
        spec.check(batch, spec.spec(config, 16, slots))
        counts = batch["patch_mask"].sum(1)
        if config.data.crop:
            assert slots == 16 and (counts == 16).all()
        elif buckets:
            np.testing.assert_array_equal(counts, batch["grid_size"].prod(1))  # no patch is left out
            assert slots in buckets
    if buckets:
        assert len({batch["patches"].shape[1] for batch in batches}) > 1
        empty = 1 - np.mean(np.concatenate([batch["patch_mask"].mean(1) for batch in batches]))
        config.data.buckets = ()
        alone = 1 - np.mean([batch["patch_mask"].mean() for batch in take(config, STEPS)])
        assert empty < 0.6 * alone


def test_an_evaluation_leaves_pictures_as_they_are(config):
    made = list(pipeline.evaluation_batches(config, split="test", batch_size=8))
    config.data.update(buckets=(), randaugment=(), crop=(), flip=0.0)
    assert digest(made) == digest(pipeline.evaluation_batches(config, split="test", batch_size=8))


def test_buckets_and_crops_exclude_each_other(directories):
    config = vilt.get_config("variant=tiny")
    config.data.update(dir=str(directories[0]), buckets=(16,), crop=(0.5, 1.0))
    with pytest.raises(
        UserError, match=r"data.buckets=\(16,\) and data.crop=\(0.5, 1.0\) exclude each other"
    ):
        next(pipeline.batches(config))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("randaugment", (1000, 9), "number of operations .1 to 14."),
        ("randaugment", ("a", "b"), "are not numbers"),
        ("randaugment", (2, float("nan")), "randaugment"),
        ("crop", ("x", 1.0), "are not numbers"),
        ("crop", (0.9, 0.5), "two rising numbers"),
        ("flip", 1.5, "is not a probability"),
    ],
)
def test_impossible_changes_are_refused(directories, key, value, words):
    config = vilt.get_config("variant=tiny")
    config.data.update({"dir": str(directories[0]), key: value})
    with pytest.raises(UserError, match=words):
        next(pipeline.batches(config))


def test_pairs_of_pictures_are_refused(directories, tmp_path):
    folder = shutil.copytree(directories[0], tmp_path / "pairs")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fields": ["captions", "image_1"]}))
    config = vilt.get_config("variant=tiny")
    config.data.dir = str(folder)
    with pytest.raises(UserError, match="holds pairs of pictures; a run reads one picture"):
        next(pipeline.batches(config))
