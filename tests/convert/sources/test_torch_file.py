# SPDX-License-Identifier: Apache-2.0
"""Torch files without torch: what torch saved comes back bit for bit; what is hostile or damaged is a `UserError`."""

from __future__ import annotations

import builtins
import os
import pickle
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.convert.sources import hostile_pickles
from tests.convert.sources.hostile_pickles import (
    FLOATS,
    GOOD,
    legacy_tensor,
    state_dict,
    torch_legacy,
    torch_zip,
)
from vlp_jax.convert.sources import disk, open_source, torch_file
from vlp_jax.convert.sources.torch_file import TorchFile
from vlp_jax.types import UserError

EXPECTED = np.arange(6, dtype=np.float32).reshape(2, 3)
LEGACY_GOOD = state_dict(weight=legacy_tensor())
FORMS = pytest.mark.parametrize("form", ["zip", "legacy"])


@pytest.fixture(scope="module")
def torch():
    """The oracle."""
    return pytest.importorskip("torch")


@pytest.fixture
def save(torch, tmp_path):
    """A function that saves with torch in either form and returns the path."""

    def saved(value, form: str = "zip", name: str = "weights.pt") -> Path:
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
        return tmp_path / name

    return saved


def octets(torch, tensor) -> bytes:
    """The bytes of a tensor in C order, by torch."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(torch, path: Path, expected: dict) -> dict[str, str]:
    """All tensors agree with torch's in name, type, shape and bits; returns what was skipped."""
    with TorchFile(path) as source:
        assert list(source.tensors) == sorted(expected)
        for name, tensor in expected.items():
            found, told = source.read(name), source.tensors[name]
            assert (
                (told.shape, told.dtype) == (found.shape, found.dtype) == (tuple(tensor.shape), found.dtype)
            ), name
            assert str(tensor.dtype) == f"torch.{found.dtype.name}", name
            assert found.tobytes() == octets(torch, tensor), name
            assert found.flags.c_contiguous and found.flags.writeable and found.dtype.isnative
        assert source.files == (path,) and source.path == path
        return dict(source.skipped)


TYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128"
SMALL = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"


@FORMS
def test_every_type(torch, save, form):
    generator, expected = torch.Generator().manual_seed(3), {}
    for name in f"{TYPES} {SMALL}".split():
        dtype = getattr(torch, name)
        high = 2 if name == "bool" else 256
        raw = torch.randint(0, high, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        expected[name] = raw.view(dtype)
    assert check(torch, save(expected, form), expected) == {}


@FORMS
def test_every_layout(torch, save, form):
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    attributed, parameter = torch.ones(3), torch.nn.Parameter(torch.randn(2, 2))
    attributed.note, parameter.note = "x", "y"
    expected = {
        "base": base,
        "transposed": base.T,
        "window": base[3:10, 4:20:3],
        "row": base[7],
        "column": base[:, 5],
        "last": base[-1, -1],
        "reshaped": base.view(2, 10, 30).permute(2, 0, 1),
        "one of one": base[4:5, :1],
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "nothing of a storage": base[20:],
        "expanded": torch.ones(1).expand(4, 5),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base),
        "with a state": parameter,
        "with an attribute": attributed,
    }
    assert check(torch, save(expected, form), expected) == {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMS
def test_every_protocol(torch, tmp_path, form, protocol):
    expected = {"a": torch.randn(3), "b.c": torch.nn.Parameter(torch.randn(2))}
    path = tmp_path / "weights"
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    check(torch, path, expected)


@FORMS
def test_a_module_with_tied_weights_and_buffers(torch, save, form):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    check(torch, save(module.state_dict(), form), module.state_dict())
    with open_source(save(module.state_dict(), form)) as source:
        assert source.container == f"torch {form}"
        assert np.array_equal(source.read("0.weight"), source.read("2.weight"))
        assert source.read("0.weight") is not source.read("0.weight")


def test_the_root_is_the_files_name(torch, save):
    for name in ("größe.pt", "epoch=3,loss:1.5.ckpt", "a b.bin"):
        check(torch, save({"a": torch.ones(2)}, name=name), {"a": torch.ones(2)})


@FORMS
def test_lightning_checkpoint(torch, save, form, monkeypatch):
    weights = {"transformer.blocks.0.norm1.weight": torch.randn(4), "pooler.bias": torch.randn(2)}
    path = save(hostile_pickles.lightning(torch, weights), form)
    monkeypatch.delitem(sys.modules, hostile_pickles.__name__)
    imported, original = [], builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest, **more: (imported.append(name), original(name, *rest, **more))[1],
    )
    with TorchFile(path) as source:
        found = {name: source.read(name) for name in source.tensors}
        skipped = dict(source.skipped)
    assert hostile_pickles.__name__ not in sys.modules and not {
        hostile_pickles.__name__,
        "argparse",
        "pathlib",
    } & set(imported)
    monkeypatch.undo()
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: octets(torch, tensor) for name, tensor in weights.items()
    }
    assert set(skipped) == set(hostile_pickles.lightning(torch, weights)) - {"state_dict"}
    assert "argparse.Namespace" in skipped["hyper_parameters"] and skipped["optimizer_states"] == "no weights"


def test_where_the_weights_are(torch, save):
    """The first of the stated order; other weights are named."""
    one, two = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    skipped = check(
        torch, save({"model_ema": two, "model": one, "optimizer": {"x": two["w"]}, "scale": one["w"]}), one
    )
    assert skipped["optimizer"] == "no weights"
    assert all("'model'" in skipped[name] for name in ("model_ema", "scale"))
    check(torch, save({"model": {}, "model_ema": two}), two)
    check(torch, save({"epoch": 1, "module": two}), two)
    nested = {"encoder": {"a": one, "b": two["w"]}, "optimizer": one, "epoch": 3}
    named = {"epoch": torch.ones(1), "w": torch.ones(2)}
    assert list(check(torch, save({"state_dict": named, "epoch": 3}), named)) == ["epoch (beside)"]
    skipped = check(torch, save(nested), {"encoder.a.w": one["w"], "encoder.b": two["w"]})
    assert skipped == {"optimizer": "no weights", "epoch": "a number, no tensor"}


@pytest.mark.filterwarnings("ignore")
@FORMS
def test_what_is_no_plain_tensor_is_named_with_its_reason(torch, save, form):
    class Marked(torch.Tensor):
        pass

    Marked.__qualname__, globals()["Marked"] = "Marked", Marked
    weights = {
        "weight": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "half complex": torch.zeros(2, dtype=torch.complex32),
        "subclass": torch.ones(2).as_subclass(Marked),
        "steps": 3,
        "empty": None,
        "extra": {},
        "array": np.ones(3),
    }
    path = save({"state_dict": weights}, form)
    del globals()["Marked"]
    skipped = check(torch, path, {"weight": weights["weight"]})
    assert set(skipped) == set(weights) - {"weight"}
    assert "Marked" in skipped["subclass"] and "sparse" in skipped["sparse"] and "numpy" in skipped["array"]
    with TorchFile(path) as source:
        for name in ("sparse", "subclass", "conjugated"):
            with pytest.raises(UserError, match="no plain tensor"):
                source.read(name)
        with pytest.raises(KeyError):
            source.read("unknown")


def test_repeated_values_beyond_the_file_are_not_made(torch, save):
    weights = {"weight": torch.ones(2), "huge": torch.ones(1).expand(1 << 20, 1 << 20)}
    skipped = check(torch, save(weights), {"weight": weights["weight"]})
    assert "repeated" in skipped["huge"]


@FORMS
def test_what_is_no_state_dict_says_what_to_do(torch, save, form):
    for value, what in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear.*whole model"),
        (torch.ones(3), "single tensor"),
        ([torch.ones(3)], "a list"),
        ({"model": torch.nn.Linear(2, 2), "epoch": 1}, "torch.nn.modules.linear.Linear"),
        ({"epoch": 1}, "holds no tensors"),
    ):
        with pytest.raises(UserError, match=f"{what}(.|\n)*state_dict"):
            TorchFile(save(value, form))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(torch, tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with pytest.raises(UserError, match="TorchScript"):
        TorchFile(tmp_path / "script.pt")


def test_big_endian_zip(tmp_path):
    for kind, dtype in (("Float", ">f4"), ("Long", ">i8"), ("ComplexFloat", ">c8"), ("BFloat16", ">u2")):
        numbers = np.arange(6).astype(dtype)
        store = hostile_pickles.storage(kind=f"ctorch\n{kind}Storage\n".encode())
        transposed = hostile_pickles.tensor(
            size=hostile_pickles.numbers((3, 2)), stride=hostile_pickles.numbers((1, 3)), store=store
        )
        pickled = state_dict(weight=hostile_pickles.tensor(store=store), transposed=transposed)
        path = torch_zip(tmp_path / kind, pickled, {"0": numbers.tobytes()}, {"byteorder": b"big"})
        with TorchFile(path) as source:
            found = source.read("weight")
            native = found.view(np.uint16) if kind == "BFloat16" else found
            assert np.array_equal(native, numbers.reshape(2, 3)) and found.dtype.isnative
            assert source.read("transposed").tobytes() == np.ascontiguousarray(found.T).tobytes()
    for order in (b"middle", b"", b"little-endian"):
        with pytest.raises(UserError, match="byte order"):
            TorchFile(torch_zip(tmp_path / "order", GOOD, records={"byteorder": order}))


def opened(path: Path) -> np.ndarray:
    """The one tensor of the hand-made files."""
    with TorchFile(path) as source:
        assert list(source.tensors) == ["weight"]
        return source.read("weight")


def test_handmade_files_are_right(tmp_path):
    """So that those below are refused for what is wrong in them."""
    assert np.array_equal(opened(torch_zip(tmp_path / "zip", GOOD)), EXPECTED)
    assert np.array_equal(opened(torch_legacy(tmp_path / "legacy", LEGACY_GOOD)), EXPECTED)
    view = b"(" + hostile_pickles.text("view") + hostile_pickles.number(2) + hostile_pickles.number(4) + b"t"
    two = hostile_pickles.numbers((2, 2)), hostile_pickles.numbers((2, 1))
    viewed = state_dict(weight=legacy_tensor(view=view, size=two[0], stride=two[1]))
    assert np.array_equal(
        opened(torch_legacy(tmp_path / "view", viewed)), EXPECTED.reshape(-1)[2:].reshape(2, 2)
    )


@pytest.mark.parametrize("name", hostile_pickles.payloads(Path("mark")))
def test_nothing_is_executed(name, tmp_path):
    mark = tmp_path / "mark"
    payload = hostile_pickles.payloads(mark)[name]
    head = (hostile_pickles.MAGIC, 1001, hostile_pickles.Call(os.system, f"touch {mark}"))
    torch_zip(tmp_path / "zip", payload)
    torch_legacy(tmp_path / "legacy", payload, keys=())
    torch_legacy(tmp_path / "machine", LEGACY_GOOD, head=head)
    (tmp_path / "plain").write_bytes(payload)
    for kind in ("zip", "legacy", "machine", "plain"):
        with pytest.raises(UserError, match=kind):
            TorchFile(tmp_path / kind)
    if payload[:2] not in (b"\x80\x04", b"\x80\x05") and b"Q" not in payload:
        opcodes = payload.removeprefix(b"\x80\x02").removesuffix(b".")
        beside = state_dict(other=opcodes, weight=hostile_pickles.tensor())
        assert np.array_equal(opened(torch_zip(tmp_path / "beside", beside)), EXPECTED)
    assert not mark.exists()


@pytest.mark.parametrize("name", hostile_pickles.programs())
def test_lies_are_refused(name, tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="zip"):
            TorchFile(torch_zip(tmp_path / "zip", hostile_pickles.programs()[name]))
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", hostile_pickles.harmless())
def test_endless_for_a_careless_reader(name, tmp_path):
    assert np.array_equal(opened(torch_zip(tmp_path / "zip", hostile_pickles.harmless()[name])), EXPECTED)


def test_legacy_lies_are_refused(tmp_path):
    tracemalloc.start()
    for name, (pickled, keys, data) in hostile_pickles.legacy_lies().items():
        path = torch_legacy(tmp_path / "legacy", pickled, keys, data)
        if name == "right":
            TorchFile(path).close()
            continue
        with pytest.raises(UserError, match="legacy"):
            TorchFile(path)
            pytest.fail(name)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    magic = hostile_pickles.MAGIC
    for head in ((magic, 1002, {}), (magic, 1001, []), (1, 1001, {}), ("a", 1001, {})):
        with pytest.raises(UserError):
            TorchFile(torch_legacy(tmp_path / "legacy", LEGACY_GOOD, head=head))


def test_old_tar_is_refused(tmp_path):
    mark = tmp_path / "mark"
    path = hostile_pickles.torch_tar(tmp_path / "old.pth", mark)
    for opener in (TorchFile, open_source):
        with pytest.raises(UserError, match=r"old\.pth is a tar.*state_dict"):
            opener(path)
    assert not mark.exists() and sorted(entry.name for entry in tmp_path.iterdir()) == ["old.pth"]


def test_hostile_zips_are_refused(tmp_path):
    for path in hostile_pickles.hostile_zips(tmp_path):
        tracemalloc.start()
        with pytest.raises(UserError, match=path.name):
            TorchFile(path)
            pytest.fail(path.name)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


def test_long_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "PICKLE_LIMIT", len(GOOD) - 1)
    for path in (torch_zip(tmp_path / "zip", GOOD), torch_legacy(tmp_path / "legacy", LEGACY_GOOD)):
        with pytest.raises(UserError, match="pickle|data.pkl"):
            TorchFile(path)


def test_zip_of_more_than_32_bits_of_header(tmp_path):
    """ZIP64 fields, as torch writes them for files beyond 4 GB."""
    path = tmp_path / "wide"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("archive/data.pkl", GOOD), ("archive/data/0", FLOATS)):
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
    assert np.array_equal(opened(path), EXPECTED)


@FORMS
def test_every_prefix_is_refused(form, tmp_path):
    whole = (torch_zip if form == "zip" else torch_legacy)(
        tmp_path / form, GOOD if form == "zip" else LEGACY_GOOD
    )
    content = whole.read_bytes()
    for end in range(len(content)):
        whole.write_bytes(content[:end])
        with pytest.raises(UserError, match=form):
            TorchFile(whole)


@FORMS
def test_random_damage(form, tmp_path):
    """Some hundred damaged files: a `UserError`, or arrays of a bounded size."""
    path, draw = tmp_path / form, random.Random(11)
    whole = torch_zip(path, GOOD) if form == "zip" else torch_legacy(path, LEGACY_GOOD)
    content, refused = whole.read_bytes(), 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        path.write_bytes(damaged)
        try:
            with TorchFile(path) as source:
                for name, tensor in source.tensors.items():
                    assert tensor.nbytes <= len(content) + torch_file.EXPANDED_LIMIT
                    assert source.read(name).nbytes == tensor.nbytes
        except UserError:
            refused += 1
    assert 100 < refused


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = torch_legacy(tmp_path / "legacy", LEGACY_GOOD)
    with TorchFile(path) as source:
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(UserError, match="legacy"):
            source.read("weight")


def test_only_the_bytes_of_a_tensor_are_read(tmp_path, monkeypatch):
    pieces = []
    path = torch_zip(tmp_path / "zip", GOOD)
    monkeypatch.setattr(
        disk,
        "fill",
        lambda path, file, view, fill=disk.fill: (pieces.append(len(view)), fill(path, file, view)),
    )
    with TorchFile(path) as source:
        pieces.clear()
        source.read("weight")
    assert pieces == [len(FLOATS)]


def test_other_files_are_refused(tmp_path):
    for name, content in {
        "page": b"<!DOCTYPE html><html>404</html>",
        "empty": b"",
        "short": b"P",
        "array": b"\x93NUMPY\x01\x00",
        "plain": pickle.dumps({"weight": EXPECTED}, 2),
        "noise": bytes(range(256)) * 4,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            TorchFile(tmp_path / name)
    with pytest.raises(UserError, match="folder"):
        TorchFile(tmp_path)
    with pytest.raises(UserError, match="no"):
        TorchFile(tmp_path / "absent")
