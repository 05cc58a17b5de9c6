# SPDX-License-Identifier: Apache-2.0
"""The doctor counts right, finds what is damaged and names it, and ends with the right code."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.data import prepared
from vlp_jax import cli
from vlp_jax import doctor as command
from vlp_jax.data import doctor
from vlp_jax.data.text import Vocabulary


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return prepared.write(folder, splits={"train": 30, "test": 4, "none": 0}, sizes=((64, 64), (48, 80)))


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def run(*argv):
    return cli.run(
        command.main, command.define, usage=command.USAGE, arguments=("KIND", "DATA_DIR"), argv=argv
    )


@pytest.mark.parametrize("deep", [False, True])
def test_a_healthy_directory(original, deep):
    lines = []
    assert doctor.examine(original, deep=deep, length=12, say=lines.append) == []
    report = "\n".join(lines)
    assert "train: 30 pictures, 60 pairs, 1 to 3 captions a picture" in report
    assert "none: empty" in report
    assert (
        "48 to 64 pixels high, 64 to 80 wide; height x width most often 64 x 64 (50%), 48 x 80 (50%)"
        in report
    )
    vocabulary = Vocabulary.load(original / "vocabulary.model")
    lengths = [len(ids) + 2 for row in range(30) for ids in vocabulary.tokenize(prepared.captions(row))]
    expected = f"{min(lengths)} to {max(lengths)} pieces, mean {np.mean(lengths):.1f}; "
    assert f"{expected}{np.mean([n > 12 for n in lengths]):.2%} are cut at 12" in report
    assert "looked at 30 of 30 records: no problems" in report


def test_command(original, tmp_path, capsys):
    assert run("data", str(original), "--deep") == 0
    assert capsys.readouterr().out.endswith("No problem found.\n")
    assert run("data", str(tmp_path / "nowhere")) == 2
    shown = capsys.readouterr()
    assert "does not exist" in shown.err and "vlp_jax.prepare" in shown.err and not shown.out
    assert run("date", str(original)) == 2
    assert "Did you mean 'data'?" in capsys.readouterr().err
    assert run("data") == 2
    assert "KIND DATA_DIR" in capsys.readouterr().err
    assert run("--help") == 0


def test_a_flipped_byte_in_a_record(directory, capsys):
    shard = sorted(directory.glob("*train*record*"))[1]
    content = bytearray(shard.read_bytes())
    content[9000] ^= 1
    shard.write_bytes(content)
    assert run("data", str(directory), "--deep") == 2
    message = capsys.readouterr().err
    assert f"{shard} is not what was written" in message
    assert re.search(rf"record \d+ of {shard} is damaged: .*chunk at \d+", message)


def test_a_flipped_byte_that_no_record_shows(directory):
    """In the padding of a shard: reading goes well, only the digest knows."""
    shard = sorted(directory.glob("*train*record*"))[0]
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    problems = doctor.examine(directory, deep=True, say=str)
    assert len(problems) == 1 and str(shard) in problems[0] and "sha256" in problems[0]
    assert doctor.examine(directory, say=str) == []


def test_wrong_pictures_are_counted_by_record(tmp_path):
    def pictures(row, height, width):
        if row % 2:
            return prepared.picture(row, height, width)[:200]
        return prepared.picture(row, height + 8 * (row == 4), width)

    broken = prepared.write(tmp_path / "broken", splits={"train": 30}, pictures=pictures)
    problems = doctor.examine(broken, deep=True, say=str)
    assert len(problems) == doctor.SHOWN + 1 and problems[-1] == "... and 6 more in split train."
    assert "picture in record 1 of " in problems[0] and "cannot be decoded" in problems[0]
    assert any("picture in record 4 of" in p and "72 x 64 pixels, stated are 64 x 64" in p for p in problems)
    assert doctor.examine(broken, say=str)  # a few pictures are looked at in any case


def test_a_vocabulary_that_does_not_fit(tmp_path, directory):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "zebra"]))
    odd = prepared.write(tmp_path / "odd", splits={"train": 5}, vocabulary=vocabulary)
    problems = doctor.examine(odd, say=str)
    assert len(problems) == 1 and "vocab.txt: the vocabulary does not fit" in problems[0]
    (directory / "vocabulary.model").unlink()
    assert "vocabulary.model cannot be read" in doctor.examine(directory, say=str)[0]


def test_every_split_is_looked_at(directory):
    for shard in directory.glob("*record-00000*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    problems = doctor.examine(directory, say=str)
    assert [split for problem in problems for split in ("train", "test") if f"tiny-{split}." in problem] == [
        "train", "test",
    ]  # fmt: skip


def test_empty_captions(tmp_path):
    empty = prepared.write(
        tmp_path / "empty", splits={"train": 3}, texts=lambda row: ["a red square", " "][: 1 + row % 2]
    )
    problems = doctor.examine(empty, say=str)
    assert len(problems) == 1 and "record 0 of" in problems[0] and "without text" in problems[0]
    assert json.loads((empty / "manifest.json").read_text())["splits"]["train"]["pairs"] == 4
