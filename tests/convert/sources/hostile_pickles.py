# SPDX-License-Identifier: Apache-2.0
"""Makers of torch files that attack their reader: pickles that would run a program, and files that lie about sizes.

`payloads` are pickles that leave a mark (a file) when anything in them is called; `programs` are lies and endless walks.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
FLOATS = b"".join(struct.pack("<f", number) for number in range(6))
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


class Call:
    """Pickles as a call of a function, which a real unpickler makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def text(string: str) -> bytes:
    """An opcode that pushes text."""
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def number(value: int) -> bytes:
    """An opcode that pushes a whole number of any size."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(content)) + content


def numbers(values: tuple[int, ...]) -> bytes:
    """Opcodes that push a tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(
    key: bytes = text("0"), count: bytes = number(6), kind: bytes = b"ctorch\nFloatStorage\n"
) -> bytes:
    """Opcodes that push a storage of a torch zip."""
    return b"(" + text("storage") + kind + key + text("cpu") + count + b"tQ"


def tensor(
    offset: bytes = number(0),
    size: bytes = numbers((2, 3)),
    stride: bytes = numbers((3, 1)),
    store: bytes = storage(),  # noqa: B008
) -> bytes:
    """Opcodes that push a tensor."""
    return TENSOR + b"(" + store + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(**entries: bytes) -> bytes:
    """A pickle of a dictionary whose values are given as opcodes."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


GOOD = state_dict(weight=tensor())


def payloads(mark: Path) -> dict[str, bytes]:
    """Pickles of which a real unpickler would make the file `mark` (most of them) or call what it should not."""
    run = f"touch {mark}"
    system, quoted = b"cposix\nsystem\n", text(run)
    write = text(f"open({str(mark)!r}, 'w').close()")
    attribute = b"cbuiltins\ngetattr\n"
    imported = b"cbuiltins\n__import__\n(" + text("os") + b"tR"
    frame = b"\x80\x04\x95" + struct.pack("<Q", len(quoted) + 24)
    return {
        "os.system": pickle.dumps(Call(os.system, run), 2),
        "os.system in a state dict": pickle.dumps({"state_dict": {"weight": Call(os.system, run)}}, 2),
        "os.system, protocol 0": pickle.dumps(Call(os.system, run), 0),
        "os.system, protocol 5": pickle.dumps(Call(os.system, run), 5),
        "os.system by name on the stack": frame
        + text("posix")
        + text("system")
        + b"\x93"
        + quoted
        + b"\x85R.",
        "eval": pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')"), 2),
        "exec": b"cbuiltins\nexec\n(" + write + b"tR.",
        "a chain of getattr": attribute + b"(" + imported + text("system") + b"tR(" + quoted + b"tR.",
        "nested calls": attribute
        + b"("
        + pickle.dumps(Call(os.system, run), 2)[2:-1]
        + text("real")
        + b"tR.",
        "a torch file in a torch file": b"ctorch.storage\n_load_from_bytes\n(" + quoted + b"tR.",
        "torch.load": b"ctorch\nload\n(" + text(str(mark)) + b"tR.",
        "INST": b"(" + quoted + b"iposix\nsystem\n.",
        "OBJ": b"(" + system + quoted + b"o.",
        "NEWOBJ": system + b"(" + quoted + b"t\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + b"(" + quoted + b"t}\x92.",
        "EXT1": b"\x82\x01(" + quoted + b"tR.",
        "EXT4": b"\x84\x01\x00\x00\x00)R.",
        "BUILD with a state": b"cbuiltins\nlist\n)R}"
        + text("__setstate__")
        + system
        + b"s"
        + b"b"
        + quoted
        + b"b.",
        "BUILD of a class": b"ctests\nAnything\n)\x81}" + text("__class__") + system + b"sb.",
        "a rebuild that is not torch's": TENSOR + b"(" + system + quoted + number(0) + numbers(()) + b"tR.",
        "a subclass of a tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n("
        + system
        + system
        + b"("
        + quoted
        + b"t}tR.",
        "a persistent id that is a call": system + b"(" + quoted + b"tRQ.",
        "a key that is a call": b"}" + system + b"(" + quoted + b"tRK\x01s.",
        "a default factory": b"ccollections\ndefaultdict\n(" + system + b"tR" + quoted + b"K\x01s.",
        "map of os.system": b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + system + b"(" + quoted + b"ttRtR.",
    }


# A tuple that holds a tuple twice, which holds a tuple twice, ...: 2**60 leaves, which hash() and repr() would visit.
DOUBLED = b")q\x01" + b"0h\x01h\x01\x86q\x01" * 60


def copies(times: int) -> bytes:
    """Opcodes that ask for sets of 10,000 items each from one list."""
    return b"](" + b"N" * 10_000 + b"eq\x010" + b"cbuiltins\nset\nh\x01\x85R0" * times + b"N"


def programs() -> dict[str, bytes]:
    """Pickles that lie about sizes, name the wrong things, or make a walk over them endless."""
    huge = 1 << 62
    wrong = {
        "a huge size": tensor(size=numbers((huge, huge)), stride=numbers((0, 0))),
        "a size beyond 64 bits": tensor(size=numbers((1 << 80000, 3))),
        "a size that leaves the storage": tensor(size=numbers((3, 3))),
        "a stride that leaves the storage": tensor(stride=numbers((4, 1))),
        "an offset that leaves the storage": tensor(offset=number(1)),
        "a huge offset": tensor(offset=number(huge)),
        "a negative size": tensor(size=numbers((-2, -3))),
        "a negative stride": tensor(offset=number(5), stride=numbers((-3, -1))),
        "a negative offset": tensor(offset=number(-1)),
        "a size of floats": tensor(size=b"(G" + struct.pack(">d", 2.0) + number(3) + b"t"),
        "a size of bools": tensor(size=b"(\x88" + number(3) + b"t"),
        "a size that is text": tensor(size=text("ab")),
        "a size of tensors": tensor(size=b"(" + tensor() + b"t"),
        "a hundred sizes": tensor(size=numbers((1,) * 100), stride=numbers((1,) * 100)),
        "more sizes than strides": tensor(stride=numbers((3,))),
        "no storage": tensor(store=number(3)),
        "too few arguments": TENSOR + b"(" + storage() + b"tR",
        "a storage that is not there": tensor(store=storage(key=text("1"))),
        "a storage on another path": tensor(store=storage(key=text("../data.pkl"))),
        "a storage key that is no text": tensor(store=storage(key=number(0))),
        "a storage that claims more": tensor(store=storage(count=number(1 << 40))),
        "a storage that claims less": tensor(store=storage(count=number(5))),
        "a storage of negative size": tensor(store=storage(count=number(-6))),
        "a storage of a float's size": tensor(store=storage(count=b"G" + struct.pack(">d", 6.0))),
        "a storage of another module": tensor(store=storage(kind=b"cevil\nFloatStorage\n")),
        "a storage of an unknown class": tensor(store=storage(kind=b"ctorch\nEvilStorage\n")),
        "a storage whose class is text": tensor(store=storage(kind=text("FloatStorage"))),
        "a persistent id of another kind": tensor(store=b"(" + text("file") + text("/etc/passwd") + b"tQ"),
        "a persistent id that is text": tensor(store=text("0") + b"Q"),
        "a persistent id of protocol 0": tensor(store=b"P0\n"),
        "an empty persistent id": tensor(store=b")Q"),
        "a persistent id of types": tensor(store=b"(" + b"ctorch\nfloat32\n" * 5 + b"tQ"),
        "a state for a tensor": tensor() + b"}b",
        "a call of a tensor": tensor() + b")R",
        "a call of a type": b"ctorch\nfloat32\n)R",
        "a key that cannot be one": b"}]K\x01s",
        "items of a list": b"]K\x01K\x02s",
        "an odd number of items": b"}(K\x01u",
        "appended to text": text("a") + b"K\x01a",
        "nothing on the stack": b"0" * 20,
        "no mark": b"1",
        "no such memo": b"h\x07",
        "nothing to memorise": b"(q\x01",
        "a class by numbers": b"K\x01K\x02\x93",
        "buffers outside": b"\x97",
        "protocol 99": b"\x80\x63",
        "an unknown operation": b"\xff",
        "a frame beyond the file": b"\x95" + b"\xff" * 7 + b"\x7f",
        "text beyond the file": b"\x8d" + b"\xff" * 7 + b"\x7f",
        "bytes beyond the file": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "a byte array beyond the file": b"\x96" + b"\xff" * 7 + b"\x7f",
        "a number beyond the file": b"\x8b\xff\xff\xff\x7f",
        "a number of negative length": b"\x8b\xff\xff\xff\xff",
        "a number of 5,000 digits": b"I" + b"9" * 5000 + b"\n",
        "text that is not UTF-8": b"X\x02\x00\x00\x00\xff\xff",
        "a name of half a surrogate": b"}X\x03\x00\x00\x00\xed\xa0\x80Ns",
        "text without quotes": b"Sabc\n",
        "a strange escape": b"S'\\d\\x4'\n",
        "a memo of a huge index": b"Np99999999999999999999999\n0",
        "bytes beyond Latin-1": b"c_codecs\nencode\n(" + text("\u4e00") + text("latin1") + b"tR",
    }
    found = {name: state_dict(weight=tensor(), other=opcodes) for name, opcodes in wrong.items()}
    twice = b"0}(" + text("a") + b"h\x01" + text("b") + b"h\x01uq\x01"
    return found | {
        "endless copies": state_dict(weight=tensor(), other=copies(1000)),
        "dictionaries of twice the same": b"\x80\x02}q\x01" + twice * 30 + b".",
        "dictionaries too deep": b"\x80\x02}q\x01" + twice * 60 + b".",
        "a dictionary in itself": b"\x80\x02}q\x01(" + text("a") + b"h\x01" + text("b") + b"h\x01u.",
        "weights in themselves": b"\x80\x02}q\x01(" + text("a") + b"h\x01" + text("w") + tensor() + b"u.",
        "a model of twice the same": state_dict(model=b"}q\x01" + twice * 40, weight=tensor()),
        "tuples alone": b"\x80\x02" + DOUBLED + b".",
        "lists alone": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a name of a tensor and of nothing": state_dict(
            **{"a.b": b"N", "a": b"}(" + text("b") + tensor() + b"u", "w": tensor()}
        ),
        "a name twice": state_dict(**{"a.b": tensor(), "a": b"}(" + text("b") + tensor() + b"u"}),
        "a name that cannot be printed": state_dict(**{"a\x1b[2J": tensor()}),
        "an endless name": state_dict(**{"a" * 10_000: tensor()}),
        "no tensors": state_dict(a=b"N", b=number(7)),
        "a tensor alone": b"\x80\x02" + tensor() + b".",
        "a list": b"\x80\x02]" + tensor() + b"a.",
        "a whole model": b"\x80\x02cmy.models\nViLT\n)\x81}" + text("training") + b"\x88sb.",
        "nothing": b"",
        "an end alone": b".",
    }


def harmless() -> dict[str, bytes]:
    """State dicts with a right "weight" and beside it what is endless only for a careless reader."""
    entries = {
        "tuples of twice the same": DOUBLED,
        "a tuple for a key": b"}" + DOUBLED + b"K\x01s",
        "a set of tuples": b"\x8f(" + DOUBLED + b"\x90",
        "a call with tuples": b"ccollections\nOrderedDict\n](" + DOUBLED + b"h\x01\x86e\x85R",
        "lists in lists": b"]" * 100_000 + b"a" * 99_999,
        "tuples in tuples": b")" + b"\x85" * 100_000,
        "a list in itself": b"]q\x01h\x01a",
        "keys of one hash": b"}("
        + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 60_000))
        + b"u",
        "copies of copies": copies(100),
        "a huge number": number(1 << 800_000),
        "a strange escape": b"S'\\d\\x41'\n",
    }
    return {name: state_dict(other=opcodes, weight=tensor()) for name, opcodes in entries.items()}


def torch_zip(
    path: Path,
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    records: dict[str, bytes] | None = None,
) -> Path:
    """Writes a torch zip around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in ({"0": FLOATS} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in ({"version": b"3\n"} | (records or {})).items():
            archive.writestr(f"archive/{name}", content)
    return path


def legacy_tensor(
    key: str = "7",
    count: int = 6,
    view: bytes = b"N",
    kind: bytes = b"ctorch\nFloatStorage\n",
    **fields: bytes,
) -> bytes:
    """Opcodes that push a tensor of a legacy file."""
    identity = b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + view + b"tQ"
    return tensor(store=identity, **fields)


def torch_legacy(
    path: Path,
    pickled: bytes,
    keys: Any = ("7",),
    data: bytes = struct.pack("<q", 6) + FLOATS,
    head: tuple[Any, ...] = (MAGIC, 1001, {"little_endian": True}),
) -> Path:
    """Writes a legacy torch file around a pickle."""
    parts = [pickle.dumps(value, 2) for value in head]
    path.write_bytes(
        b"".join(parts) + pickled + pickle.dumps(keys if isinstance(keys, str) else list(keys), 2) + data
    )
    return path


def torch_tar(path: Path, mark: Path) -> Path:
    """Writes a tar as PyTorch 0.1 did, whose pickle and names are hostile."""
    with tarfile.open(path, "w") as archive:
        contents = {
            "storages": payloads(mark)["os.system"],
            "pickle": payloads(mark)["eval"],
            "../tensors": b"\x80\x02K\0.",
        }
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def legacy_lies() -> dict[str, tuple[bytes, Any, bytes]]:
    """Pickle, storage names and data of legacy files that contradict themselves; the first is right."""
    count = struct.pack("<q", 6)
    two = state_dict(weight=legacy_tensor(), other=legacy_tensor(key="8"))
    both, good = 2 * (count + FLOATS), state_dict(weight=legacy_tensor())

    def view(first: int, length: int, **fields: bytes) -> bytes:
        opcodes = b"(" + text("v") + number(first) + number(length) + b"t"
        return state_dict(weight=legacy_tensor(view=opcodes, **fields))

    one = {"size": numbers((1,)), "stride": numbers((1,))}

    return {
        "right": (two, ("7", "8"), both),
        "a storage missing": (two, ("7",), both),
        "a storage twice": (two, ("7", "7"), both),
        "a storage unknown": (good, ("7", "9"), both),
        "no list": (good, "7", both),
        "keys of numbers": (good, (7,), both),
        "another number of elements": (good, ("7",), struct.pack("<q", 5) + FLOATS),
        "a negative number": (good, ("7",), struct.pack("<q", -6) + FLOATS),
        "data missing": (good, ("7",), count + FLOATS[:-1]),
        "two sizes": (state_dict(a=legacy_tensor(), b=legacy_tensor(count=5)), ("7",), count + FLOATS),
        "two types": (
            state_dict(a=legacy_tensor(), b=legacy_tensor(kind=b"ctorch\nDoubleStorage\n")),
            ("7",),
            count + FLOATS * 2,
        ),
        "a huge storage": (
            state_dict(a=legacy_tensor(count=1 << 50)),
            ("7",),
            struct.pack("<q", 1 << 50) + FLOATS,
        ),
        "a view that leaves": (view(2, 5, **one), ("7",), count + FLOATS),
        "a tensor that leaves its view": (view(1, 5), ("7",), count + FLOATS),
        "a negative view": (view(-1, 6), ("7",), count + FLOATS),
        "a view that is none": (state_dict(a=legacy_tensor(view=number(1))), ("7",), count + FLOATS),
    }


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    """Changes bytes of a file."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def hostile_zips(folder: Path) -> list[Path]:
    """Writes zips that no torch.save makes."""

    def written(name: str, entries, compression=zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return folder / name

    good = [("archive/data.pkl", GOOD), ("archive/data/0", FLOATS)]
    overlap = torch_zip(folder / "overlap", GOOD, {"0": FLOATS, "1": FLOATS})
    content = bytearray(overlap.read_bytes())
    at = content.rindex(b"archive/data/1") - 4  # the offset of its header, in the directory
    content[at : at + 4] = struct.pack("<L", content.index(b"archive/data/0") - 30)
    overlap.write_bytes(content)
    packed = torch_zip(folder / "packed", GOOD, {})
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("archive/data/0", FLOATS, zipfile.ZIP_DEFLATED)
    return [
        overlap,
        packed,
        written("bomb", [*good, ("archive/data/1", bytes(10_000_000))], zipfile.ZIP_DEFLATED),
        written("bzip2", good, zipfile.ZIP_BZIP2),
        written("parent", [*good, ("archive/../../evil", b"x")]),
        written("absolute", [*good, ("/etc/evil", b"x")]),
        written("backslash", [*good, ("archive\\..\\evil", b"x")]),
        written("roots", [*good, ("other/data.pkl", GOOD)]),
        written("deep", [("a/b/data.pkl", GOOD), ("a/b/data/0", FLOATS)]),
        written("rootless", [("data.pkl", GOOD), ("data/0", FLOATS)]),
        written("other", [("a.txt", b"x")]),
        written("none", []),
        replaced(written("twice", [*good, ("archive/data/1", FLOATS)]), b"archive/data/1", b"archive/data/0"),
        replaced(written("encrypted", good), b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"),
    ]


class Hook:
    """A class of the checkpoint that must not be looked up."""

    def __setstate__(self, state):
        raise AssertionError("built")


def lightning(torch, weights):
    """A checkpoint as Lightning writes it, with objects of classes."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    hook = Hook()
    hook.note = "x"
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.3.2",
        "state_dict": weights,
        "callbacks": {Hook: {"best": torch.ones(1)}, "hook": hook},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1]}],
        "hyper_parameters": argparse.Namespace(lr=1e-4, path=Path("x")),
    }
