# SPDX-License-Identifier: Apache-2.0
"""The tasks on a world of coloured shapes and a system that sees it, so that every score is known beforehand."""

from __future__ import annotations

import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import examples
from vlp_jax import systems
from vlp_jax.data.text import Vocabulary
from vlp_jax.evaluation import retrieval
from vlp_jax.evaluation.masked_language import MaskedLanguage
from vlp_jax.evaluation.matching import Matching
from vlp_jax.evaluation.oracle import Knowledge
from vlp_jax.evaluation.retrieval import Gallery, Retrieval
from vlp_jax.evaluation.runner import evaluate, fetch, withhold
from vlp_jax.objectives.pairing import exchange
from vlp_jax.parallel import mesh as meshes
from vlp_jax.types import UserError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "cube", "ball", "cone"]
COLORS, SHAPES = PIECES[6:9], PIECES[9:12]
LENGTH, MATCH, BLIND_GUESS = 6, 3.0, PIECES.index("red")
WORLD = [dict(color=color, shape=shape) for color, shape in itertools.product(COLORS, SHAPES)]


class Records:
    """Pictures in memory: captions "a COLOR SHAPE" and then "a SHAPE", which is true of several."""

    def __init__(self, scenes: list[dict], with_scenes: bool = True):
        self.scenes, self.with_scenes = scenes, with_scenes
        self.reads = 0

    def locate(self, pairs):
        return pairs // 2, pairs % 2

    def read(self, rows):
        self.reads += 1
        for scene in (self.scenes[row] for row in rows):
            captions = [f"a {scene['color']} {scene['shape']}", f"a {scene['shape']}"]
            extra = {"scene": json.dumps(scene)} if self.with_scenes else {}
            yield {"captions": captions, "image": b"", **extra}


def truth(caption: str, scene: dict) -> bool:
    return all(word in ("a", *scene.values()) for word in caption.split())


def fill(words: list[str], index: int, scene: dict) -> list[str]:
    """A generous world: beside the true colour it lets "green" pass for shapes that are cubes."""
    kinds = [kind for kind in (COLORS, SHAPES) if words[index] in kind]
    true = [word for kind in kinds for word in kind if word in scene.values()]
    return true + (
        ["green"] if kinds == [COLORS] and scene["shape"] == "cube" and "green" not in true else []
    )


WORLDS = types.SimpleNamespace(truth=truth, fill=fill)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(PIECES))
    return Vocabulary.load(path)


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(ConfigDict({"rules": "dp", "mesh": ()}))


def batches(vocabulary, scenes, size=16, caption=0, padded=True):
    """One pass over one caption of each picture; colour (or shape) is masked; garbage on padding rows."""
    for start in range(0, len(scenes), size):
        rows = [min(start + i, len(scenes) - 1) for i in range(size)]
        real = np.arange(start, start + size) < len(scenes)
        texts = [next(iter(Records(scenes).read([row])))["captions"][caption] for row in rows]
        batch = vocabulary.encode(texts, LENGTH)
        place = 2
        patches = np.zeros((size, 2, 12), np.uint8)
        for i, row in enumerate(rows):
            patches[i, :, 0] = PIECES.index(scenes[row]["color"])
            patches[i, :, 1] = PIECES.index(scenes[row]["shape"])
        labels = np.where(np.arange(2) == 0, batch["text_ids"][:, [place]], -1)
        ids = np.where(real, rows, -1).astype(np.int32)
        yield batch | {
            "patches": patches,
            "patch_mask": np.ones((size, 2), bool),
            "patch_positions": np.tile(np.array([[0, 0], [0, 1]], np.int32), (size, 1, 1)),
            "grid_size": np.tile(np.array([1, 2], np.int32), (size, 1)),
            "mlm_positions": np.tile(np.array([place, 0], np.int32), (size, 1)),
            "mlm_inputs": np.full((size, 2), 4, np.int32),
            # Labels on padding rows are left in: the task itself must not count them.
            "mlm_labels": labels.astype(np.int32),
            "example_id": np.where(real, 2 * ids + caption, -1).astype(np.int32),
            "image_id": ids,
            "source_id": np.where(real, 0, -1).astype(np.int32),
        }


class Seer:
    """Reads colour and shape off the first patch; blind it says "red" and "no match"."""

    def __init__(self, constant: bool = False):
        def encode_text(params, batch, rng=None):
            return {"text": batch["text_ids"], "text_mask": batch["text_mask"]}

        def encode_image(params, batch, rng=None):
            return {"image": batch["patches"][:, 0, :2], "image_mask": batch["patch_mask"]}

        def fuse(params, features, rng=None):
            named = features["text"][:, :, None] == features["image"][:, None, :].astype(jnp.int32)
            wanted = jnp.any(named, axis=1)
            matched = jnp.all(wanted, axis=-1) & jnp.any(features["image_mask"], axis=-1)
            matched = jnp.zeros_like(matched) if constant else matched
            return {
                "match_logits": jnp.stack([jnp.zeros(matched.shape), jnp.where(matched, MATCH, -MATCH)], -1)
            }

        def match(params, batch, rng=None, plan=False):
            features = {**encode_text(params, batch), **encode_image(params, batch)}
            plans = {"plan": jnp.ones((*batch["text_ids"].shape, batch["patches"].shape[1]))} if plan else {}
            return fuse(params, features) | plans

        def fill_in(params, batch, rng=None):
            seen = jnp.where(jnp.any(batch["patch_mask"], -1), batch["patches"][:, 0, 0], BLIND_GUESS)
            return {"logits": 5.0 * jax.nn.one_hot(seen, len(PIECES))[:, None].repeat(2, 1)}

        functions = (encode_text, encode_image, fuse)
        self.predict = {f.__name__: jax.jit(f) for f in functions}
        self.predict |= {"match": jax.jit(match, static_argnames="plan"), "fill": jax.jit(fill_in)}

    @staticmethod
    def prepare(batch, rng):
        partner, matched = exchange(rng, batch["image_id"], batch["source_id"], batch["example_id"] >= 0)
        names = ("text_ids", "text_mask", "example_id")
        return {**batch, **{f"pair_{name}": batch[name][partner] for name in names}, "matched": matched}


def visual_ids():
    return [PIECES.index(word) for word in COLORS + SHAPES]


def test_masked_language_counts_real_rows_only(vocabulary, mesh):
    scenes = WORLD + WORLD[:2]  # 11 pictures: 5 red ones; 5 rows of the batch of 16 are padding
    knowledge = Knowledge([Records(scenes)], [WORLDS])
    task = MaskedLanguage(Seer(), visual_ids(), vocabulary=vocabulary, knowledge=knowledge, pictures=4)
    scores = evaluate(Seer(), {}, batches(vocabulary, scenes), [task], mesh)
    assert scores["mlm/accuracy"] == scores["mlm/accuracy_visual"] == 1.0
    assert scores["mlm/accuracy_blind"] == scores["mlm/accuracy_visual_blind"] == pytest.approx(5 / 11)
    # Cubes that are not green have two possible colours: three of the eleven.
    assert scores["mlm/accuracy_visual_oracle"] == pytest.approx((3 * 0.5 + 8) / 11)
    assert [guess.answer for guess in task.examples] == ["red", "red", "red", "blue"]
    first = task.examples[0]
    assert (
        first.words == ["a", "red", "cube"] and first.position == 1 and first.masked == [False, True, False]
    )
    assert first.guesses[0][0] == "red" and first.guesses[0][1] > 0.9 and first.blind[0][0] == "red"


def test_masked_language_without_visual_words_or_scenes(vocabulary, mesh):
    task = MaskedLanguage(Seer(), blind=False)
    scores = evaluate(Seer(), {}, batches(vocabulary, WORLD), [task], mesh)
    assert scores == {"mlm/accuracy": 1.0}


def test_a_second_pass_forgets_the_first(vocabulary, mesh):
    task = MaskedLanguage(Seer(), visual_ids())
    first = evaluate(Seer(), {}, batches(vocabulary, WORLD), [task], mesh)
    second = evaluate(Seer(), {}, batches(vocabulary, WORLD[:3]), [task], mesh)
    assert first["mlm/accuracy_blind"] == pytest.approx(3 / 9) and second["mlm/accuracy_blind"] == 1.0


def test_matching_scores_blind_and_oracle(vocabulary, mesh):
    # Seven pictures, two of them alike: a text exchanged between those is true all the same.
    scenes = WORLD[:5] + WORLD[7:8] + WORLD[:1]
    knowledge = Knowledge([Records(scenes)], [WORLDS])
    system = Seer()
    task = Matching(system, vocabulary=vocabulary, knowledge=knowledge, visual_ids=visual_ids(), pictures=3)
    scores = evaluate(system, {}, batches(vocabulary, scenes), [task], mesh)
    judged = [decision.matched for decision in task.right + task.wrong]
    batch = meshes.placer(mesh)(next(batches(vocabulary, scenes)))
    drawn = fetch(system.prepare(batch, jax.random.fold_in(jax.random.key(0), 0)))
    alike = drawn["pair_example_id"] // 2 % 6 == drawn["image_id"] % 6
    lucky = np.sum(alike & (drawn["matched"] == 0))
    # The seer and the oracle err on the same pairs, those that are true by chance; blind all say "no match".
    assert scores["itm/accuracy"] == scores["itm/accuracy_oracle"] == pytest.approx((7 - lucky) / 7)
    assert scores["itm/accuracy_blind"] == pytest.approx(4 / 7)
    assert set(judged) == {True, False} and len(task.right) == 3 and len(task.wrong) == min(lucky, 3)
    assert all(decision.right for decision in task.right) and not any(d.right for d in task.wrong)
    assert len(task.alignments) == 3 and task.alignments[0].words == ["a", "red", "cube"]
    assert task.alignments[0].visual == [False, True, True] and task.alignments[0].plan.shape == (3, 2)


@pytest.mark.slow
def test_matching_of_a_real_system_ignores_padding(mesh):
    config = examples.vilt_config()
    system = systems.get("vilt").build(config)
    batch = examples.random_batch(config, 16)
    params, _ = jax.jit(system.init)(jax.random.key(0), batch)
    padding = np.arange(16) >= 10
    for name in ("example_id", "image_id", "source_id"):
        batch[name] = np.where(padding, -1, batch[name]).astype(np.int32)
    tasks = [Matching(system), MaskedLanguage(system, range(5, 20))]
    scores = evaluate(system, params, [batch], tasks, mesh)
    for name, value in batch.items():
        if name not in ("example_id", "image_id", "source_id"):
            batch[name] = np.where(padding.reshape(-1, *[1] * (value.ndim - 1)), value[:1], value)
    assert evaluate(system, params, [batch], tasks, mesh) == scores
    assert set(scores) == {"itm/accuracy", "itm/accuracy_blind"} | {
        f"mlm/accuracy{name}" for name in ("", "_visual", "_blind", "_visual_blind")
    }


def test_withhold_leaves_no_picture_and_the_same_sharding(vocabulary, mesh):
    batch = meshes.placer(mesh)(next(batches(vocabulary, WORLD)))
    blind = withhold(batch)
    assert not blind["patches"].any() and not blind["patch_mask"].any()
    assert all(blind[name].sharding == batch[name].sharding for name in batch)
    assert blind["text_ids"] is batch["text_ids"]


def test_no_examples_is_the_users_error(mesh):
    with pytest.raises(UserError, match="0 examples"):
        evaluate(Seer(), {}, [], [], mesh)


def test_gallery_holds_no_two_pictures_that_share_a_true_text():
    scenes = WORLD * 3
    knowledge = Knowledge([Records(scenes)], [WORLDS])
    gallery = Gallery(0, knowledge, captions=0)
    for row in np.random.default_rng(0).permutation(2 * len(scenes)):
        gallery.admit(0, int(row // 2), int(row))
    pictures = list(gallery.pictures)
    assert len(pictures) >= 3
    for text, column in zip(gallery.texts, gallery.picture_of, strict=True):
        true = [truth(text, scenes[image]) for _, image in pictures]
        assert true == [other == column for other in range(len(pictures))]
    assert not gallery.full and gallery.gold().sum() == len(gallery.texts)


def test_gallery_of_photographs_compares_captions_without_case_and_punctuation():
    class Photographs(Records):
        def read(self, rows):
            texts = [["A dog.", "Two!"], ["a  dog", "three"], ["A cat", "two"]]
            return [{"captions": texts[row], "image": b""} for row in rows]

    knowledge = Knowledge([Photographs([], False)], [types.SimpleNamespace()])
    gallery = Gallery(5, knowledge)
    # 0 comes with "A dog."; 1 has that caption, too; 2 has none of them. Later pairs bring no second text.
    assert [gallery.admit(0, image, 2 * image) for image in (0, 1, 2)] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    assert gallery.admit(0, 0, 1) == (False, False)
    assert not knowledge.knows_scenes(0, 0)
    # With "three" for a text 1 still has a caption that is 0's text.
    assert gallery.admit(0, 1, 3) == (False, False)


@pytest.mark.parametrize("feature_bytes", [1 << 30, 30])
def test_retrieval_scores_all_pairs(vocabulary, mesh, monkeypatch, feature_bytes):
    monkeypatch.setattr(retrieval, "FEATURE_BYTES", feature_bytes)
    scenes = WORLD + WORLD
    knowledge = Knowledge([Records(scenes)], [WORLDS])
    task = Retrieval(Seer(), mesh, knowledge, gallery=7, batch_size=16)
    scores = evaluate(Seer(), {}, batches(vocabulary, scenes), [task], mesh)
    assert len(task.gallery.pictures) == 7 and task.gallery.full
    for name in ("image_retrieval", "text_retrieval"):
        assert scores[f"{name}/r1"] == scores[f"{name}/r1_oracle"] == 1.0
        assert [scores[f"{name}/r{cut}_blind"] for cut in (1, 5, 10)] == pytest.approx([1 / 7, 5 / 7, 1.0])


def test_retrieval_matrix_is_that_of_single_pairs(mesh, monkeypatch):
    monkeypatch.setattr(retrieval, "FEATURE_BYTES", 5000)
    config = examples.vilt_config()
    system = systems.get("vilt").build(config)
    batch = examples.random_batch(config, 8)
    batch["image_id"] = np.arange(8, dtype=np.int32)
    params, _ = jax.jit(system.init)(jax.random.key(1), batch)
    scenes = [dict(color=str(i), shape="") for i in range(8)]
    knowledge = Knowledge([Records(scenes, False)], [None])
    task = Retrieval(system, mesh, knowledge, gallery=6, batch_size=16, blind=False)
    batch["example_id"] = 2 * batch["image_id"]
    evaluate(system, params, [batch], [task], mesh)
    matrix = task._matrix(params, retrieval._join(task._texts), retrieval._join(task._images))
    assert matrix.shape == (6, 6)
    for text, image in itertools.product(range(6), range(6)):
        pair = {k: v[[text if k.startswith("text") else image]] for k, v in batch.items()}
        logits = np.asarray(system.predict["match"](params, pair)["match_logits"])[0]
        np.testing.assert_allclose(matrix[text, image], logits[1] - logits[0], atol=2e-5)


def test_a_constant_model_retrieves_by_chance(vocabulary, mesh):
    knowledge = Knowledge([Records(WORLD)], [WORLDS])
    task = Retrieval(Seer(constant=True), mesh, knowledge, gallery=0, batch_size=8)
    scores = evaluate(Seer(), {}, batches(vocabulary, WORLD), [task], mesh)
    assert scores["image_retrieval/r1"] == pytest.approx(1 / 9)
    assert scores["text_retrieval/r5"] == pytest.approx(5 / 9)


def test_words_join_pieces(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES[:6] + ["cub", "##es", ","]))
    vocabulary = Vocabulary.load(path)
    encoded = vocabulary.encode(["a cubes, a"], 8)
    words, word_of = vocabulary.words(encoded["text_ids"][0])
    assert words == ["a", "cubes", ",", "a"]
    assert word_of.tolist() == [-1, 0, 1, 1, 2, 3, -1, -1]
