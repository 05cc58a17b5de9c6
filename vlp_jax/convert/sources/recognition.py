# SPDX-License-Identifier: Apache-2.0
"""What a path is, by its content: which reader opens it, or what it is instead and what to take."""

from __future__ import annotations

import os
import string
from pathlib import Path

from vlp_jax.convert.sources import Source, archive, disk
from vlp_jax.types import UserError

HEAD = 512  # bytes looked at
# What transformers and flax call the weights in a folder, the best first.
FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "flax_model.msgpack",
)
READ = "safetensors, PyTorch's zip and legacy files, .npz, flax msgpack and TensorFlow checkpoints"
# First bytes -> what it is, what to do.
STRANGERS = (
    (b"\x1f\x8b", "is packed by gzip", "Unpack it first: gunzip"),
    (b"BZh", "is packed by bzip2", "Unpack it first: bunzip2"),
    (b"\xfd7zXZ\0", "is packed by xz", "Unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd", "Unpack it first: unzstd"),
    (b"Rar!", "is a RAR archive", "Unpack it first"),
    (b"7z\xbc\xaf", "is a 7-Zip archive", "Unpack it first"),
    (
        b"\x89HDF\r\n\x1a\n",
        "is an HDF5 file (Keras, tf_model.h5), which is not read",
        "Take model.safetensors or pytorch_model.bin of the same model",
    ),
    (b"GGUF", "is a GGUF file, whose weights are rounded", "Take the safetensors of the same model"),
    (b"\x93NUMPY", "is one .npy array without a name", "Save it by name: numpy.savez"),
    (
        b"version https://git-lfs",
        "is a pointer of git-lfs, not the weights it points to",
        "Fetch them: git lfs pull, or download the file itself",
    ),
)


def open_by_content(path: Path) -> Source:
    """Does what `vlp_jax.convert.sources.open_source` promises."""
    if os.path.isdir(path):  # pathlib's raises where a folder may not be entered or a name is too long
        source = _open_folder(path)
    elif not os.path.exists(path) and os.path.exists(f"{path}.index"):
        source = _open_tensorflow(path)
    else:
        source = _open_file(path)
    if source.tensors:
        return source
    source.close()
    others = ", ".join(f"{disk.short(name)} ({reason})" for name, reason in list(source.skipped.items())[:5])
    raise UserError(
        f"{path} ({source.container}) holds no tensors. It holds: {others or 'nothing'}. Check the file."
    )


def _open_folder(folder: Path) -> Source:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from error
    for name in FOLDER:
        if name in names:
            return _open_file(folder / name)
    indices = [name for name in names if name.endswith(".index")]
    if len(indices) == 1:
        return _open_tensorflow(folder / indices[0])
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise UserError(
        f"{folder} holds none of {', '.join(FOLDER)}. It holds: {listed or 'nothing'}. Name the weight file itself."
    )


def _open_tensorflow(path: Path) -> Source:
    from vlp_jax.convert.sources.tensorflow_file import TensorflowFile

    return TensorflowFile(path)


def _open_safetensors(path: Path) -> Source:
    from vlp_jax.convert.sources.safetensors_file import SafetensorsFile

    return SafetensorsFile(path)


def _open_torch(path: Path) -> Source:
    from vlp_jax.convert.sources.torch_file import TorchFile

    return TorchFile(path)


def _open_zip(path: Path) -> Source:
    """Numpy's and PyTorch's zip files differ in the entries they have."""
    with disk.open_regular(path) as file:
        names = archive.read_entries(path, file)
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return _open_torch(path)
    if any(name.endswith(".npy") for name in names):
        from vlp_jax.convert.sources.numpy_file import NumpyFile

        return NumpyFile(path)
    listed = ", ".join(disk.short(name) for name in sorted(names)[:8]) or "nothing"
    raise UserError(
        f"{path} is a zip file of neither PyTorch (data.pkl) nor numpy (*.npy). It holds: {listed}. If weights are "
        "among them, unpack it first and name them."
    )


def _open_file(path: Path) -> Source:
    """Opens a file by its first bytes."""
    with disk.open_regular(path) as file:
        size = disk.size_of(file)
        head = disk.piece(path, file, 0, min(size, HEAD))
        tail = disk.piece(path, file, max(0, size - 8), min(size, 8))
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return _open_zip(path)
    # A pickle of protocol 2 or above, which is how a legacy file begins; or a tar with PyTorch's older form.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") or head[257:262] == b"ustar":
        return _open_torch(path)
    text = _is_text(head)
    if head[8:9] == b"{" and not text:
        return _open_safetensors(path)
    if _is_tensorflow(path, tail):
        return _open_tensorflow(path)
    if text and head.lstrip()[:1] in (b"{", b"["):
        return _open_json(path)
    for start, kind, action in STRANGERS:
        if head.startswith(start):
            raise UserError(f"{path} {kind}. Read are {READ}. {action}.")
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text and lowered.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise UserError(
            f"{path} is a web page, not weights: download it again. The page may say why (a login, a quota, a moved "
            "file): open it in a browser."
        )
    if 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        from vlp_jax.convert.sources.msgpack_file import MsgpackFile

        return MsgpackFile(path)
    raise _unknown(path, head, size, text)


def _is_text(head: bytes) -> bool:
    printable = set(string.printable.encode())
    return (
        all(byte in printable or byte >= 0x80 for byte in head[:64])
        and head[0] < 0x80
        or head[:3] == b"\xef\xbb\xbf"
    )


def _is_tensorflow(path: Path, tail: bytes) -> bool:
    """An index by its last bytes; the other files have no mark and go by their names."""
    from vlp_jax.convert.sources import tensorflow_file

    if int.from_bytes(tail, "little") == tensorflow_file.MAGIC or tensorflow_file.DATA.search(path.name):
        return True
    return path.suffix == ".meta" and os.path.exists(path.with_suffix(".index"))


def _open_json(path: Path) -> Source:
    """An index of shards is opened, other JSON is not weights."""
    if not path.name.endswith(".index.json"):
        raise UserError(
            f"{path} is JSON text (a config or a tokenizer?), not weights. Read are {READ}; an index of shards is called "
            "*.index.json. Name the weight file beside it."
        )
    from vlp_jax.convert.sources.sharded import ShardedFiles

    return ShardedFiles(path, _open_shard)


def _open_shard(path: Path) -> Source:
    """A shard is a safetensors file or one of PyTorch's, never another index."""
    with disk.open_regular(path) as file:
        head = disk.piece(path, file, 0, min(disk.size_of(file), HEAD))
    return _open_safetensors(path) if head[8:9] == b"{" and not _is_text(head) else _open_torch(path)


def _unknown(path: Path, head: bytes, size: int, text: bool) -> UserError:
    kind = "some text" if text else f"of a kind that is not read; its first bytes are {head[:8].hex(' ')}"
    if head[:1] == b"\x08" and path.suffix == ".onnx":
        kind = "an ONNX file, which is not read"
    action = "Take the model's safetensors or PyTorch file, or download it again if it should be one"
    return UserError(f"{path} ({size} bytes) is {kind}. Read are {READ}. {action}.")
