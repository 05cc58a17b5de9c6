# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save`, read without torch: the zip of PyTorch 1.6 and later, and the stream of pickles before it.

Formats: `_save` and `_legacy_save` in `torch/serialization.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from vlp_jax.convert.sources import Tensor, archive, disk
from vlp_jax.convert.sources.disk import DTYPES, short
from vlp_jax.convert.sources.pickles import Damaged, Placeholder, Storage, View, Window, count, load
from vlp_jax.types import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PICKLE_LIMIT = 1 << 28  # bytes; a state dict of 1,000 tensors takes 100,000
EXPANDED_LIMIT = 1 << 24  # bytes that a tensor may take beyond those of the file, by strides of zero
ENTRY_LIMIT = 200_000  # of the dictionaries that hold the weights

# The storage classes of torch and, for types that numpy has not, the size of an element.
STORAGES = {
    **{f"{name}Storage": DTYPES[dtype] for name, dtype in (
        ("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16"),
        ("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8"),
        ("Bool", "bool"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128"),
        ("Untyped", "uint8"), ("_Untyped", "uint8"),
    )},
    **{f"{name}Storage": np.dtype(f"V{size}") for name, size in (
        ("QInt8", 1), ("QUInt8", 1), ("QInt32", 4), ("QUInt4x2", 1), ("QUInt2x4", 1), ("ComplexHalf", 4),
    )},
}  # fmt: skip

# Where the weights lie in a checkpoint that holds more, the first that is there: Lightning, then training scripts
# (DeiT, ALBEF: "model"), last averages of the weights, which are read where there is nothing else.
WEIGHTS = tuple(
    "state_dict model_state_dict model_state model module net network weights params "
    "model_ema state_dict_ema params_ema ema_state_dict ema".split()
)
# What is known not to be weights though there may be tensors in it.
OTHERS = tuple("optim sched lr_sched scaler callbacks loops hyper_parameters hparams args rng".split())
SAVE = "In PyTorch: torch.save(model.state_dict(), 'weights.pt')."


class TorchFile:
    """A reader of one `.pt`, `.pth`, `.bin` or `.ckpt` file; see `Source`.

    `tensors` has the entries of the first dictionary of `WEIGHTS` that holds tensors, else those of the file's own;
    nested names are joined by ".". Everything else, also entries that are no plain tensor, is in `skipped`.

    Raises:
        UserError: the file is damaged, hostile, of another kind (TorchScript, a tar of PyTorch 0.1, a plain pickle), or
            holds no dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self._places: dict[str, tuple[int, int]] = {}  # storage -> where its bytes begin, and how many
        self._swapped = False  # whether the numbers are big-endian
        self._file = disk.open_regular(path)
        try:
            self.container, value = self._unpickled()
            self._views, self.skipped = _weights(path, value)
            self.tensors = self._described()
        except Damaged as error:
            self.close()
            raise disk.damaged(path, str(error)) from error
        except BaseException:
            self.close()
            raise

    def _unpickled(self) -> tuple[str, Any]:
        """The container's name and the object that was saved, as `load` rebuilds it."""
        size = disk.size_of(self._file)
        head = disk.piece(self.path, self._file, 0, min(size, 512))
        if head.startswith(b"PK"):
            return "torch zip", self._zip()
        if head[257:262] == b"ustar":
            raise UserError(
                f"{self.path} is a tar archive, as PyTorch 0.1 wrote it. A torch zip or a file of pickles (0.2 to 1.5) "
                f"is read. Load it with an old PyTorch and save it again. {SAVE}"
            )
        try:
            first, position = self._pickle(0, size, _no_storage)
        except Damaged:
            first, position = None, 0
        if type(first) is not int or first != MAGIC:
            raise UserError(
                f"{self.path} was not made by torch.save: it begins with {short(head[:16])}. A zip (PK...) or pickles "
                "that begin with torch's magic number are read, a plain pickle is not. "
                "Check what was downloaded, or load it in Python and save its tensors as .safetensors."
            )
        return "torch legacy", self._legacy(position, size)

    def _pickle(self, begin: int, end: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
        window = Window(self._file, begin, min(end, begin + PICKLE_LIMIT))
        try:
            return load(window, persistent), window.position
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}. Check the disk.") from error

    def _zip(self) -> Any:
        """One pickle (`data.pkl`), one entry a storage (`data/KEY`), and a note of the byte order."""
        entries = archive.read_entries(self.path, self._file)
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if any(name.partition("/")[2] == "constants.pkl" or "/code/" in name for name in entries):
            raise UserError(
                f"{self.path} is a TorchScript archive: it holds a program beside the weights. "
                f"Files of torch.save(state_dict) are read. {SAVE}"
            )
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise UserError(
                f"{self.path} is a zip, but not by torch.save: of its {len(entries)} entries {len(roots)} are called "
                "data.pkl in a folder, and one is expected. If it was packed once more, unpack it first."
            )
        for entry in entries.values():
            if entry.method != archive.STORED:
                raise Damaged(f"its entry {short(entry.name)} is compressed, which torch.save never does")
        root, start = roots[0], len(roots[0]) + len("data/")
        self._places = {
            name[start:]: (entry.offset, entry.size)
            for name, entry in entries.items()
            if name.startswith(f"{root}data/")
        }
        order, pickled = entries.get(f"{root}byteorder"), entries[f"{root}data.pkl"]
        if order is not None:
            name = disk.piece(self.path, self._file, order.offset, min(order.size, 8))
            if name not in (b"little", b"big"):
                raise Damaged(f"its byte order is {short(name)}")
            self._swapped = name == b"big"
        if pickled.size > PICKLE_LIMIT:
            raise Damaged(f"its data.pkl has {pickled.size} bytes, more than {PICKLE_LIMIT} are never needed")
        return self._pickle(pickled.offset, pickled.offset + pickled.size, self._zip_storage)[0]

    def _zip_storage(self, identity: Any) -> Storage | Placeholder:
        """What `("storage", class, key, device, count)` of a zip refers to."""
        dtype, key, number = _storage_identity(identity, 5)
        if key not in self._places:
            raise Damaged(f"it lacks the storage {short(key)}")
        nbytes = number * dtype.itemsize
        if self._places[key][1] != nbytes:
            raise Damaged(f"its storage {short(key)} has {self._places[key][1]} bytes instead of {nbytes}")
        return Storage(key, dtype, 0, nbytes)

    def _legacy(self, position: int, size: int) -> Any:
        """Pickles of version, machine, object and storage names; then each storage after its number of elements."""
        version, position = self._pickle(position, size, _no_storage)
        if type(version) is not int or version != PROTOCOL:
            raise Damaged(f"it is of another version of torch's format than {PROTOCOL}")
        machine, position = self._pickle(position, size, _no_storage)
        if not isinstance(machine, dict):
            raise Damaged("it does not describe the machine that wrote it")
        declared: dict[str, tuple[int, int]] = {}  # storage -> elements, bytes of each
        value, position = self._pickle(position, size, functools.partial(_legacy_storage, declared))
        keys, position = self._pickle(position, size, _no_storage)
        known = isinstance(keys, list) and all(isinstance(key, str) and key in declared for key in keys)
        if not known or len(keys) != len(declared) or len(set(keys)) != len(keys):
            raise Damaged("the list of its storages is not that of its tensors")
        for key in keys:
            number, item = declared[key]
            # Written by every machine in little-endian order.
            written = int.from_bytes(disk.piece(self.path, self._file, position, 8), "little")
            if written != number:
                raise Damaged(f"its storage {short(key)} has {written} elements instead of {number}")
            self._places[key] = (position + 8, number * item)
            position += 8 + number * item
        if position > size:
            raise Damaged(f"it has {size} bytes instead of {position}")
        return value

    def _described(self) -> dict[str, Tensor]:
        """The tensors by name; those that strides of zero blow up beyond the file are moved to `skipped`."""
        limit = disk.size_of(self._file) + EXPANDED_LIMIT
        tensors = {}
        for name in sorted(self._views):
            view = self._views[name]
            tensor = disk.checked_shape(self.path, name, view.shape, view.dtype)
            if tensor.nbytes > limit:
                self.skipped[name] = f"{tensor.nbytes} bytes of repeated values, more than the file has"
            else:
                tensors[name] = tensor
        return tensors

    def read(self, name: str) -> np.ndarray:
        """One tensor, in this machine's byte order; only its own bytes are read where they lie together."""
        if name not in self.tensors and name in self.skipped:
            raise UserError(f"{self.path}: {short(name)} is not read: {self.skipped[name]}. {SAVE}")
        tensor, view = self.tensors[name], self._views[name]
        if not view.span:
            return disk.empty(self.path, name, tensor)
        begin = self._places[view.storage.key][0] + view.storage.begin + view.offset * view.dtype.itemsize
        if view.contiguous:
            array = disk.read_array(self.path, self._file, begin, name, tensor)
        else:
            flat = disk.read_array(self.path, self._file, begin, name, Tensor((view.span,), view.dtype))
            strides = [stride * view.dtype.itemsize for stride in view.strides]
            array = disk.empty(self.path, name, tensor)
            array[...] = np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
        return array.byteswap(inplace=True) if self._swapped else array

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _no_storage(identity: Any) -> Storage:
    raise Damaged("it refers to a storage outside its weights")


def _is_text(value: Any, text: str) -> bool:
    # Other objects of the file may raise when they are compared.
    return isinstance(value, str) and value == text


def _storage_identity(identity: Any, length: int) -> tuple[np.dtype, str, int]:
    """Element type, key and number of elements of a storage's persistent id."""
    if not isinstance(identity, tuple) or len(identity) != length or not _is_text(identity[0], "storage"):
        raise Damaged("it refers to something other than a storage")
    _, kind, key, _, number, *_ = identity
    if not isinstance(kind, Placeholder) or not isinstance(key, str):
        raise Damaged("it has a storage without class or key")
    dtype = STORAGES.get(kind.name) if kind.module in ("torch", "torch.storage", "torch.cuda") else None
    if dtype is None:
        raise Damaged(f"it has a storage of the unknown class {kind}")
    count(number, "storage")
    return dtype, key, number


def _legacy_storage(declared: dict[str, tuple[int, int]], identity: Any) -> Storage | Placeholder:
    """What `("storage", class, key, device, count, view)` refers to; `view` is None or `(key, offset, count)`."""
    if isinstance(identity, tuple) and len(identity) == 4 and _is_text(identity[0], "module"):
        return identity[1] if isinstance(identity[1], Placeholder) else Placeholder("torch", "module")
    dtype, key, number = _storage_identity(identity, 6)
    if declared.setdefault(key, (number, dtype.itemsize)) != (number, dtype.itemsize):
        raise Damaged(f"its storage {short(key)} has two sizes")
    begin, end, view = 0, number, identity[5]
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3:
            raise Damaged("it has a view of a storage without offset and size")
        begin = count(view[1], "offset")
        end = begin + count(view[2], "storage")
        if end > number:
            raise Damaged(f"a view leaves its storage {short(key)}")
    return Storage(key, dtype, begin * dtype.itemsize, (end - begin) * dtype.itemsize)


def _weights(path: Path, value: Any) -> tuple[dict[str, View], dict[str, str]]:
    """The tensors in what was saved, and what else was in it with the reason why it is not read.

    Raises:
        UserError: there is no dictionary of tensors in it.
    """
    if not isinstance(value, dict):
        what = f"a {type(value).__name__}"  # its text may be endless
        if isinstance(value, View):
            what = "a single tensor without a name"
        elif isinstance(value, Placeholder):
            what = f"an object of the class {value}, a whole model perhaps"
        raise UserError(
            f"{path} holds {what}. A dictionary of tensors by name is read; objects are not built, because that runs "
            f"code from the file. {SAVE}"
        )
    views: dict[str, View] = {}
    skipped: dict[str, str] = {}
    chosen = next(
        (key for key in WEIGHTS if isinstance(value.get(key), dict) and _holds_tensor(value[key])), None
    )
    weights, beside = {}, value
    if chosen is None:
        beside = {key: value[key] for key in value if _is_other(key, value[key])}
        weights = {key: value[key] for key in value if key not in beside}
    _collect(path, weights if chosen is None else value[chosen], views, skipped)
    for key in beside:
        if not _is_text(key, chosen or ""):
            name = _shown(key)
            skipped[f"{name} (beside)" if name in views else name] = _beside(key, beside[key], chosen)
    if not views:
        listed = ", ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:10]) or "nothing"
        raise UserError(
            f"{path} holds no tensors. It has {listed}{', ...' if len(skipped) > 10 else ''}. A dictionary of tensors "
            f"by name is read, also under {', '.join(WEIGHTS)}. {SAVE}"
        )
    return views, skipped


def _collect(path: Path, items: dict[Any, Any], views: dict[str, View], skipped: dict[str, str]) -> None:
    """Sorts the entries of a dictionary, and of those in it, into tensors and the rest; names are joined by "."."""
    waiting, visited = [("", items)], 0
    while waiting:
        prefix, current = waiting.pop()
        for key, item in current.items():
            name = disk.checked_name(path, f"{prefix}{key if isinstance(key, str) else _shown(key)}")
            visited += 1
            # A dictionary may lie in itself, where the length of names ends the walk, or twice in each of a chain.
            if visited > ENTRY_LIMIT:
                raise Damaged(f"its dictionaries have more than {ENTRY_LIMIT} entries")
            if name in views or (isinstance(item, View) and name in skipped):
                raise Damaged(f"it has {short(name)} twice")
            if isinstance(item, View):
                views[name] = item
            elif isinstance(item, dict) and item:
                waiting.append((f"{name}.", item))
            else:
                skipped[name] = _reason(item)


def _holds_tensor(items: dict[Any, Any]) -> bool:
    """Whether there is a tensor in a dictionary or in those in it; each is visited once, however often it is there."""
    seen, waiting = {id(items)}, [items]
    while waiting:
        for item in waiting.pop().values():
            if isinstance(item, View):
                return True
            if isinstance(item, dict) and id(item) not in seen:
                seen.add(id(item))
                waiting.append(item)
    return False


def _reason(item: Any) -> str:
    """Why an entry is no tensor."""
    if isinstance(item, Placeholder):
        return f"an object of {item}, which is no plain tensor"
    kinds = {type(None): "empty", dict: "an empty dictionary", str: "text", bytes: "bytes"}
    numbers = dict.fromkeys((bool, int, float, complex), "a number, no tensor")
    return (kinds | numbers).get(type(item), f"a {type(item).__name__}, no tensor")


def _is_other(key: Any, item: Any) -> bool:
    return isinstance(key, str) and key.lower().startswith(OTHERS) and not isinstance(item, View)


def _beside(key: Any, item: Any, chosen: str | None) -> str:
    """Why an entry beside the weights is not read."""
    if isinstance(item, Placeholder):
        return f"an object of {item}, which is not built"
    if isinstance(item, View) or (isinstance(item, dict) and key in WEIGHTS and _holds_tensor(item)):
        return f"beside the weights in {chosen!r}, which come first"
    return "no weights"


def _shown(key: Any) -> str:
    """A key of a dictionary of the file as printable text of bounded length."""
    return short(key).strip("'") if isinstance(key, str | bytes) else short(str(key)).strip("'")
