# SPDX-License-Identifier: Apache-2.0
"""What a path is: every container under any name, and a clear word for everything else; nothing hangs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from flax import serialization

from tests.convert.sources import hostile_files as hostile
from vlp_jax.convert.sources import open_source, safetensors_file
from vlp_jax.types import UserError

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int64)}


def make(container: str, path) -> None:
    """Writes ARRAYS as one container, whatever the path's suffix."""
    if container == "safetensors":
        safetensors_file.write(path, ARRAYS)
    elif container == "msgpack":
        path.write_bytes(serialization.to_bytes(ARRAYS))
    elif container == "npz":
        with path.open("wb") as file:
            np.savez(file, **ARRAYS)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "torch zip")


@pytest.mark.parametrize("container", ["safetensors", "msgpack", "npz", "torch zip", "torch legacy"])
@pytest.mark.parametrize("name", ["weights", "weights.ckpt", "weights.html", "weights.meta"])
def test_the_content_decides(tmp_path, container, name):
    make(container, tmp_path / name)
    with open_source(tmp_path / name) as source:
        assert (source.container, source.path, source.files) == (
            container,
            tmp_path / name,
            (tmp_path / name,),
        )
    hostile.assert_equal(tmp_path / name, ARRAYS)


def test_a_link_is_followed(tmp_path):
    make("npz", tmp_path / "blob")
    (tmp_path / "weights").symlink_to("blob")
    hostile.assert_equal(tmp_path / "weights", ARRAYS)


def test_the_best_of_a_folder(tmp_path):
    """Each better name wins over the ones before it; other weights beside them do not matter."""
    make("npz", tmp_path / "other.npz")
    made = [
        ("flax_model.msgpack", "msgpack"),
        ("pytorch_model.bin", "torch zip"),
        ("model.safetensors", "safetensors"),
    ]
    for name, container in made:
        make(container, tmp_path / name)
        with open_source(tmp_path) as source:
            assert (source.container, source.path) == (container, tmp_path / name)


def test_shards_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: torch.from_numpy(ARRAYS[name])}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    hostile.assert_equal(tmp_path, ARRAYS)
    with open_source(tmp_path) as source:
        assert source.container == "torch zip" and len(source.files) == 2


def tar(names: list[str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name))
    return content.getvalue()


STRANGERS = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "web page": (
        b"\n<!DOCTYPE html><html><body>Sign in</body>",
        "is a web page, not weights: download it again",
    ),
    "web page with a mark": ("\ufeff<HTML>quota ä".encode(), "is a web page, not weights: download it again"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pointer of git-lfs.*git lfs pull",
    ),
    "JSON": (b'{"architectures": ["ViltModel"]}', "is JSON text .a config or a tokenizer"),
    "JSON like a header": (b'{"abcd":{"dtype": "F32"}}', "is JSON text"),
    "JSON list": (b' ["a"]', "is JSON text"),
    "tar": (tar(["sys_info", "pickle", "storages", "tensors"]), "tar"),
    "gzip": (gzip.compress(b"x" * 100), "packed by gzip.*gunzip"),
    "bzip2": (b"BZh91AY", "packed by bzip2"),
    "xz": (b"\xfd7zXZ\0abc", "packed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfdabc", "packed by zstd"),
    "hdf5": (
        b"\x89HDF\r\n\x1a\n" + bytes(50),
        "HDF5.*tf_model.h5.*Take model.safetensors or pytorch_model.bin",
    ),
    "gguf": (b"GGUF\3\0\0\0" + bytes(50), "GGUF"),
    "npy": (hostile.npy(), "one .npy array without a name"),
    "text": (b"hello there\n", "some text"),
    "picture": (b"\xff\xd8\xff\xe0\0\x10JFIF", "first bytes are ff d8 ff e0 00 10 4a 46"),
    "zeros": (bytes(1000), "first bytes are 00 00"),
    "one byte": (b"\0", "first bytes are 00"),
    "torn zip": (b"PK\3\4" + bytes(100), "no end of one; the download may have stopped early"),
    "zip of a checkpoint": (
        hostile.zipped({"name": "bert/bert_model.ckpt.index", "content": b"x"}),
        "neither PyTorch .data.pkl. nor numpy .*holds: 'bert/bert_model.ckpt.index'.*unpack it first",
    ),
    "pickle": (b"\x80\4\x95\0\0", "torch"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_what_is_no_weight_file(tmp_path, case):
    content, pattern = STRANGERS[case]
    hostile.refused_content(tmp_path / "weights.ckpt", content, pattern)


def test_an_onnx_file(tmp_path):
    hostile.refused_content(
        tmp_path / "vilt.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX file, which is not read"
    )


def test_paths_that_are_no_files(tmp_path):
    """A pipe that nobody writes to, a socket, devices: refused at once."""
    os.mkfifo(tmp_path / "pipe")
    hostile.refused(tmp_path / "pipe", "is a pipe. Weights are read from regular files")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))  # a socket's path may have 107 bytes
        hostile.refused(tmp_path / "socket", "is a socket")
    for device in ("zero", "null", "random"):
        (tmp_path / device).symlink_to(f"/dev/{device}")
        hostile.refused(tmp_path / device, "is a device")


def test_paths_that_lead_nowhere(tmp_path):
    make("npz", tmp_path / "weights.npz")
    hostile.refused(tmp_path / "wieghts.npz", r"holds: weights.npz. Did you mean 'weights.npz'\?")
    hostile.refused(tmp_path / "nowhere" / "a.npz", "its folder .*nowhere does not exist")
    (tmp_path / "link").symlink_to("gone")
    hostile.refused(tmp_path / "link", "is a link to gone, which does not exist")
    (tmp_path / "loop").symlink_to("loop")
    hostile.refused(tmp_path / "loop", "cannot be opened: Too many levels")
    hostile.refused(tmp_path / "weights.npz" / "a", "Not a directory|does not exist")
    hostile.refused(tmp_path / ("x" * 300), "File name too long")
    with pytest.raises(UserError, match="cannot be opened"):
        open_source(tmp_path / "a\0b")


def test_folders_without_weights(tmp_path):
    (tmp_path / "inner").mkdir()
    hostile.refused(tmp_path / "inner", "holds none of model.safetensors.index.json, .*It holds: nothing")
    (tmp_path / "inner" / "tf_model.h5").touch()
    (tmp_path / "inner" / "config.json").touch()
    hostile.refused(tmp_path / "inner", "It holds: config.json, tf_model.h5. Name the weight file itself")
    (tmp_path / "inner" / "model.safetensors").mkdir()
    hostile.refused(tmp_path / "inner", "model.safetensors is a folder")


def test_without_permission(tmp_path, monkeypatch):
    """Simulated, because the superuser may read everything."""
    make("npz", tmp_path / "weights.npz")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="weights.npz cannot be opened: Permission denied"):
        open_source(tmp_path / "weights.npz")
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        open_source(tmp_path)


def test_no_reader_needs_tensorflow_or_torch(tmp_path):
    """All containers are read in a process without either."""
    make("safetensors", tmp_path / "a")
    make("npz", tmp_path / "b")
    make("msgpack", tmp_path / "c")
    (tmp_path / "d.data-00000-of-00001").write_bytes(bytes(8))
    total = hostile.checksum.masked(hostile.checksum.crc32c(bytes(8)))
    entry = hostile.message({1: 1, 2: hostile.shape_message(2), 5: 8, 6: total})
    (tmp_path / "d.index").write_bytes(hostile.table({b"": hostile.message({1: 1}), b"a": entry}))
    program = (
        "import sys, pathlib\n"
        "from vlp_jax.convert.sources import open_source\n"
        "for name in 'abcd':\n"
        "    with open_source(pathlib.Path(sys.argv[1]) / name) as source:\n"
        "        source.read('a')\n"
        "print({'torch', 'tensorflow', 'safetensors', 'pickle'} & sys.modules.keys())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "torch" not in run.stdout and "tensorflow" not in run.stdout and "safetensors" not in run.stdout
