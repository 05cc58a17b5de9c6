# SPDX-License-Identifier: Apache-2.0
"""The command from files to a checkpoint and back: what it prints, keeps, refuses, and leaves behind when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.convert.files import PIECES, config_of, original, parameters, tensors, vocabulary
from vlp_jax import cli
from vlp_jax.convert import __main__ as convert
from vlp_jax.convert import importing
from vlp_jax.convert.proof import comparison
from vlp_jax.convert.sources import open_source
from vlp_jax.training import checkpoint
from vlp_jax.training.paths import flatten


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(file in the original's names, the parameters in it)."""
    path = tmp_path_factory.mktemp("files") / "vilt.safetensors"
    return path, original(path, config_of())


@pytest.fixture
def run(capfd):
    """Runs the command in this process: exit code, standard output, standard error."""

    def run(*words: object, system: str = "vilt") -> tuple[int, str, str]:
        argv = [f"--system={system}", *map(str, words)]
        code = cli.run(convert.main, convert.define, usage=convert.__doc__, argv=argv)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def unproved(monkeypatch):
    """As if PyTorch were not installed: quicker, where the proof is not the point."""
    monkeypatch.setattr(comparison, "hindrance", lambda: "PyTorch is not installed")


def refused(run, *words: object) -> str:
    """The one message of a command that ends with 2."""
    code, _, err = run(*words)
    assert code == 2 and "Traceback" not in err, err
    return err


def test_a_file_becomes_a_checkpoint(run, unproved, file, tmp_path):
    source, params = file
    words = vocabulary(tmp_path / "vocab.txt")
    code, out, err = run(f"--source={source}", f"--target={tmp_path / 'made'}", f"--vocab={words}")
    assert code == 0, err
    assert "read as: ViLT as released" in out and "proof was not run: PyTorch is not installed" in out
    assert "model.fusion.num_heads" in out and "num_attention_heads in config.json" in out
    assert out.splitlines()[-1] == f"checkpoint: {tmp_path / 'made'}"
    found, meta, assets = checkpoint.open_for_inference(tmp_path / "made")
    leaves = dict(flatten(found))
    assert leaves.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(leaves[path], array, err_msg=path)
    assert assets["vocab.txt"].read_text().split() == list(PIECES)
    assert meta["config"]["model"]["text_embed"]["vocab_size"] == 40 == meta["facts"]["vocab_size"]
    (entry,) = meta["imported"]["sources"]
    assert entry["file"] == source.name and len(entry["sha256"]) == 64
    assert entry["layout"] == "ViLT as released"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "vocab.txt"]


def test_a_dry_run_reads_and_writes_nothing(run, file, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "fill", None)
    report = tmp_path / "plan.json"
    code, out, _ = run(f"--source={file[0]}", "--dry-run", f"--report={report}")
    assert code == 0 and "parameters" in out and [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads(report.read_text())["proof"] is None


def test_the_proof_is_printed_and_kept(run, file, tmp_path):
    pytest.importorskip("torch")
    for suffix in ("json", "html"):
        words = [
            f"--source={file[0]}",
            f"--target={tmp_path / suffix}",
            f"--report={tmp_path / 'report'}.{suffix}",
        ]
        code, out, err = run(*words)
        assert code == 0, err
    for part in ("text_embed", "patch_embed", "layer 0", "layer 2", "norm", "pooled", "mlm", "itm"):
        assert any(
            line.split()[:-3] == part.split() and line.endswith("equal") for line in out.splitlines()
        ), part
    proof = json.loads((tmp_path / "report.json").read_text())["proof"]
    assert proof["equal"] and len(proof["parts"]) == 9 and proof["bound"] == 1e-5
    assert "within 1e-05 of it" in (tmp_path / "report.html").read_text()


def test_what_does_not_agree_ends_with_1_and_leaves_nothing(run, file, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    whole = importing.fill

    def damaged(conversion):
        params = whole(conversion)
        params["fusion/stack/layers/mlp/out/kernel"][1] *= 1.001
        return params

    monkeypatch.setattr(importing, "fill", damaged)
    code, out, err = run(f"--source={file[0]}", f"--target={tmp_path / 'made'}")
    assert code == 1 and "do not compute what the source computes: from layer 1 of" in err
    assert "DIFFERENT" in out and not list(tmp_path.iterdir())


def test_an_existing_target_stays(run, unproved, file, tmp_path):
    target = tmp_path / "made"
    words = (f"--source={file[0]}", f"--target={target}")
    assert run(*words)[0] == 0
    (target / "assets" / "mine").write_text("kept until replaced")
    assert "exists and is left as it is" in refused(run, *words)
    assert (target / "assets" / "mine").exists()
    assert run(*words, "--overwrite")[0] == 0 and not (target / "assets" / "mine").exists()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("words")
    words = (f"--source={file[0]}", f"--target={foreign}", "--overwrite")
    assert "chapter.txt" in refused(run, *words) and (foreign / "chapter.txt").exists()


def test_an_interruption_leaves_nothing(run, file, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_digests", interrupted)
    assert run(f"--source={file[0]}", f"--target={tmp_path / 'made'}")[0] == 130
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(run, unproved, file, tmp_path):
    target = tmp_path / "made"
    command = [
        sys.executable,
        "-m",
        "vlp_jax.convert",
        "--system=vilt",
        f"--source={file[0]}",
        f"--target={target}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [*command, "--proof=false"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list(tmp_path.glob(".made.*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert run(f"--source={file[0]}", f"--target={target}")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_labels_are_kept_and_choose_the_answers(run, unproved, tmp_path):
    config = config_of(objectives__mlm=0.0, objectives__itm=0.0, model__heads__answer=4)
    params = original(tmp_path / "vqa.safetensors", config)
    old, new = ["cat", "dog", "two", "yes"], ["yes", "no", "cat"]
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"id2label": dict(enumerate(old))}))
    words = (f"--source={tmp_path / 'vqa.safetensors'}", f"--target={tmp_path / 'made'}")
    assert run(*words)[0] == 0
    assert json.loads(checkpoint.open_for_inference(tmp_path / "made")[2]["labels.json"].read_text()) == old
    (tmp_path / "new.txt").write_text("\n".join(new))
    code, out, _ = run(*words, "--overwrite", f"--labels={tmp_path / 'new.txt'}")
    assert code == 0 and "answers: 2 of 3 are taken over by their label" in out
    found, meta, assets = checkpoint.open_for_inference(tmp_path / "made")
    assert (
        json.loads(assets["labels.json"].read_text()) == new
        and meta["config"]["model"]["heads"]["answer"] == 3
    )
    kernel, before = found["heads"]["answer"]["out"]["kernel"], params["heads/answer/out/kernel"]
    np.testing.assert_array_equal(kernel[:, [0, 2]], before[:, [3, 0]])
    assert np.abs(kernel[:, 1]).max() < 0.2  # drawn anew, with deviation 0.02


def test_a_config_of_other_sizes_resizes(run, file, tmp_path):
    pytest.importorskip("torch")
    sizes = {
        "data.image_size": 32, "data.patch_size": 8, "data.text_length": 20, "model.width": 48, "model.modalities": 3,
        "model.fusion.depth": 3, "model.fusion.mlp_width": 52, "model.unroll": 3,
    }  # fmt: skip
    config = ["--config=vilt", *(f"--config.{key}={value}" for key, value in sizes.items())]
    words = (f"--source={file[0]}", f"--target={tmp_path / 'made'}", "--position_resize=bicubic", *config)
    code, out, err = run(*words)
    assert code == 0, err
    for path, way in (("patch_embed/position", "bicubic interpolation"), ("text_embed/position", "rows")):
        assert any(path in line and line.endswith(way) for line in out.splitlines()), out
    params = checkpoint.open_for_inference(tmp_path / "made")[0]
    before = file[1]
    np.testing.assert_array_equal(params["text_embed"]["position"][:16], before["text_embed/position"])
    modality = params["fusion"]["modality"]
    np.testing.assert_array_equal(modality, before["fusion/modality"][[0, 1, 1]])
    assert params["patch_embed"]["position"].shape == (4, 4, 48)


def test_the_original_s_names_come_back_bit_for_bit(run, unproved, file, tmp_path):
    assert run(f"--source={file[0]}", f"--target={tmp_path / 'made'}")[0] == 0
    code, out, err = run(
        f"--source={tmp_path / 'made'}", f"--target={tmp_path / 'back'}", "--format=original"
    )
    assert code == 0, err
    assert "bit for bit the same" in out
    with open_source(file[0]) as before, open_source(tmp_path / "back") as after:
        assert before.tensors == after.tensors
        for name in before.tensors:
            np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)


def test_heads_without_a_place_are_named_with_the_way_out(run, unproved, file, tmp_path):
    assert run(f"--source={file[0]}", f"--target={tmp_path / 'made'}")[0] == 0
    words = (f"--source={tmp_path / 'made'}", f"--target={tmp_path / 'back'}", "--format=hf")
    assert "--as=ViltForMaskedLM --drop=itm" in refused(run, *words)
    assert not (tmp_path / "back").exists()
    code, out, err = run(*words, "--as=ViltForMaskedLM", "--drop=itm")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "back").iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target=OUT",), "--source is missing"),
        (("--source=SOURCE",), "--target is missing"),
        (("--source=SOURCE", "--source=SOURCE", "--dry-run"), "is given 2 times"),
        (("--source=SOURCE", "--target=OUT", "--position_resize=cubic"), "Did you mean 'bicubic'?"),
        (("--source=SOURCE", "--target=OUT", "--report=r.pdf"), "FILE.html or FILE.json"),
        (("--source=SOURCE", "--target=OUT", "--format=hfs"), "Did you mean 'hf'?"),
        (("--source=SOURCE", "--target=OUT", "--format=hf"), "is no folder. Possible: a workdir"),
        (("--source=SOURCE", "--target=SOURCE"), "is no folder"),
        (("--source=nowhere.ckpt", "--target=OUT"), "nowhere.ckpt"),
        (("--source=SOURCE", "--target=OUT", "--labels=SOURCE"), "cannot be used"),
        (("--source=SOURCE", "--target=OUT", "--vocab=SOURCE"), "unknown suffix"),
    ],
)
def test_misuse_is_one_message(run, unproved, file, tmp_path, words, message):
    words = [word.replace("SOURCE", str(file[0])).replace("OUT", str(tmp_path / "out")) for word in words]
    assert message in refused(run, *words)
    assert not list(tmp_path.iterdir())


def test_an_unknown_system_names_the_closest(run):
    code, _, err = run("--source=a", system="vlit")
    assert code == 2 and "Did you mean 'vilt'?" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_attention_heads": 5}, "not divisible"),
        ({"num_attention_heads": "3"}, "num_attention_heads is '3'"),
        ({"num_attention_heads": 3, "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ([3], "holds no object"),
    ],
)
def test_a_config_json_that_does_not_fit_is_named(run, file, tmp_path, content, message):
    path = tmp_path / "vilt.safetensors"
    path.write_bytes(file[0].read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert message in refused(run, f"--source={path}", f"--target={tmp_path / 'made'}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "head",
    ["answer", *(pytest.param(head, marks=pytest.mark.slow) for head in ("mlm", "itm", "rank", "pair"))],
)
def test_a_head_that_lacks_a_tensor_is_not_left_away(run, unproved, tmp_path, head):
    off = dict(objectives__mlm=0.0, objectives__itm=0.0, objectives__wpa=0.0, model__modalities=3)
    config = config_of(**{**off, f"model__heads__{head}": True if head in ("mlm", "itm", "rank") else 3})
    names = [
        name
        for name in tensors(parameters(config))
        if name.startswith(("mlm_s", "itm", "rank", "vqa", "nlvr"))
    ]
    for number, name in enumerate(sorted(names)):
        path = tmp_path / f"{number}.safetensors"
        original(path, config, **{name: None})
        err = refused(run, f"--source={path}", f"--target={tmp_path / 'made'}")
        assert "missing" in err and f"no {name}" in err
    assert names and not (tmp_path / "made").exists()


@pytest.mark.parametrize("words", [("--as=ViltModel",), ("--drop=itm",)])
def test_flags_of_the_way_back_are_not_ignored(run, file, tmp_path, words):
    assert "Give --format=" in refused(run, f"--source={file[0]}", f"--target={tmp_path / 'made'}", *words)


def test_a_report_replaces_nothing(run, unproved, file, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    words = (f"--source={file[0]}", f"--target={tmp_path / 'made'}", f"--report={mine}")
    assert "exists and is left as it is" in refused(run, *words) and mine.read_text() == "{}"
    assert "exists" in refused(run, *words[:2], f"--report={file[0].parent / 'config.json'}", "--overwrite")


def test_the_report_of_an_export_tells_what_the_command_told(run, unproved, file, tmp_path):
    assert run(f"--source={file[0]}", f"--target={tmp_path / 'made'}")[0] == 0
    words = [f"--source={tmp_path / 'made'}", "--format=original", f"--report={tmp_path / 'r.json'}"]
    code, out, err = run(*words, f"--target={tmp_path / 'back'}")
    assert code == 0, err
    told = json.loads((tmp_path / "r.json").read_text())
    assert (
        told["source"] == [[str(tmp_path / "made"), "vilt"]]
        and told["written as"][0][0] == "ViLT as released"
    )
