"""Reading files that others pickled, without ever unpickling: the program inside is read, not run.

A pickle is a program for a small stack machine, and two of its instructions import and call whatever the file names;
so loading one from a stranger hands him the machine. Here the standard library's disassembler lists the instructions,
and `read_pickle` follows those that build data. A call becomes an inert `Call` with the name and the arguments of what
would have been called; names that the reader of the file does not expect end the reading with an error. What the few
expected calls mean is then decided by whoever knows the format: `read_tensors` for the `.pt` files of torch (a zip of
one pickle and the raw numbers of every storage), `nanochat.ancestor` for a pickled tokenizer.
"""

import io
import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError, printable, reading

MAX_PICKLE_BYTES = 64 << 20  # a tokenizer of 65,536 tokens has 1 MB, the index of a model's tensors less
MAX_INSTRUCTIONS = 5_000_000
MAX_DIMS = 64  # of a tensor; torch has no more
MAX_OPEN = 10_000  # values not yet put into a list or dictionary: entries come in lots of 1,000


@dataclass(frozen=True)
class Name:
    """Something that the pickle would import: `module.name`."""

    text: str


@dataclass(eq=False)
class Call:
    """A call that was never made. entries: put into the result by key, or one after the other; state: set on it."""

    name: str
    args: tuple[Any, ...]
    entries: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(frozen=True)
class StorageId:
    """What the pickle says of something kept outside of it."""

    parts: Any


class BadPickle(ValueError):
    """The reason why a pickle is not read."""


def read_pickle(content: bytes, where: str, allowed: Collection[str]) -> Any:
    """The data of a pickle: plain values, `Name`, `Call` and `StorageId`. Nothing is imported or called.

    allowed: names that may occur. Raises UserError for every other name, and for what is no such pickle.
    """
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise BadPickle(f"{len(content):,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the disassembler has views on odd escape sequences
            return _Machine(allowed).run(content)
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        reason = printable(str(error))[:300] or type(error).__name__
        kind = "" if isinstance(error, BadPickle) else "damaged, or no pickle: "
        raise UserError(f"{where}: not read ({kind}{reason}); nothing in it was run") from error


_MARK = object()


class _Machine:
    """The stack machine, for the instructions that build data."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            if opcode.name == "STOP":
                break
            if count >= MAX_INSTRUCTIONS or len(self.stack) > MAX_OPEN:
                raise BadPickle("more instructions, or deeper nesting, than any model has")
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise BadPickle(f"uses the instruction {opcode.name}, which plain data does not need")
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise BadPickle("it does not end with one value")
        return self.stack[0]

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise BadPickle("a value is missing")
        return value

    def since_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def name(self, text: str) -> None:
        if text not in self.allowed:
            raise BadPickle(f"asks for {text}, which no checkpoint or tokenizer needs")
        self.stack.append(Name(text))

    def stack_name(self, _: Any) -> None:
        attribute, module = self.pop(), self.pop()
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise BadPickle("asks for something that has no name")
        self.name(f"{module}.{attribute}")

    def call(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise BadPickle("calls something that has no name")
        self.stack.append(Call(function.text, args))

    def set_state(self, _: Any) -> None:
        state, target = self.pop(), self.stack[-1]
        if not isinstance(target, Call):
            raise BadPickle("sets the state of plain data")
        target.state = state

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Call) else target
        if not isinstance(entries, dict) or len(values) % 2:
            raise BadPickle("puts entries into something that takes none")
        for key, value in zip(values[::2], values[1::2]):
            # Others' hashes can be forged to collide; that of a deep tuple would overflow the C stack.
            if not isinstance(key, (str, bytes)):
                raise BadPickle("has keys that are neither text nor bytes")
            entries[key] = value

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise BadPickle("appends to something that is no list")
        self.stack[-1].extend(values)

    def remember(self, key: int | None) -> None:
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def make_dict(self, _: Any) -> None:
        values = self.since_mark()
        self.stack.append({})
        self.set_items(values)


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": _Machine.make_dict,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.take(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "LONG_BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "GLOBAL": lambda machine, text: machine.name(text.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": lambda machine, _: machine.stack.append(StorageId(machine.pop())),
}


# Files of torch --------------------------------------------------------------------------------------------------

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}
REBUILD = "torch._utils._rebuild_tensor_v2"
ORDERED_DICT = "collections.OrderedDict"
OLD_FORMAT = b"\x80\x02\x8a\x0a"  # such a file is several pickles, the first of them a large number
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error)  # of a damaged zip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file: `load` reads its numbers."""

    file: Path
    entry: str  # of the zip
    dtype: torch.dtype
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """A contiguous tensor with memory of its own. UserError where the file is damaged."""
        with reading(self.file, f", {self.entry}", *ZIP_ERRORS), zipfile.ZipFile(self.file) as archive:
            content = bytearray(archive.read(self.entry))  # compares the checksum too
            if len(content) != self.storage_size * self.dtype.itemsize:
                raise EOFError(f"{len(content):,} bytes instead of {self.storage_size * self.dtype.itemsize:,}")
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        numbers = torch.frombuffer(content, dtype=self.dtype)
        tensor = numbers.as_strided(self.shape, self.stride, self.offset)
        return tensor if tensor.is_contiguous() and tensor.numel() == numbers.numel() else tensor.clone().contiguous()


def read_tensors(file: Path) -> Any:
    """What `torch.save` wrote, with a `StoredTensor` for every tensor: one of them, or a dictionary of them by name.

    Raises UserError for a file that holds anything else, is damaged, or is in torch's format of before 2020.
    """
    with reading(file), file.open("rb") as opened:
        is_old = opened.read(len(OLD_FORMAT)) == OLD_FORMAT
    if is_old:
        raise UserError(f"{file}: in torch's format of before 2020, which is not read; save it again with torch")
    with reading(file, "", *ZIP_ERRORS), zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        total = file.stat().st_size
        index = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(index) != 1 or not all(_is_plain(entry, total) for entry in entries.values()):
            raise zipfile.BadZipFile("not as torch.save writes it")
        folder = index[0].removesuffix("data.pkl")
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
        if entries[index[0]].file_size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile("an index larger than any model's")
        content = archive.read(index[0])
    if order != b"little":
        raise UserError(f"{file}: its numbers are big-endian; save it again on a common machine")
    saved = read_pickle(content, str(file), {REBUILD, ORDERED_DICT, *STORAGES})
    sizes = {name: entry.file_size for name, entry in entries.items()}
    if isinstance(saved, Call) and saved.name == REBUILD:
        return _stored_tensor(saved, file, folder, sizes)
    tensors = saved.entries if isinstance(saved, Call) and saved.name == ORDERED_DICT and not saved.args else saved
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{file}: holds neither a tensor nor tensors by name")
    return {name: _stored_tensor(value, file, folder, sizes, name) for name, value in tensors.items()}


def _is_plain(entry: zipfile.ZipInfo, total_bytes: int) -> bool:
    """Whether an entry of a zip is stored as it is, and not larger than the whole."""
    is_stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1  # 1: encrypted
    return is_stored and entry.compress_size == entry.file_size <= total_bytes


def _stored_tensor(value: Any, file: Path, folder: str, sizes: dict[str, int], name: str = "") -> StoredTensor:
    """The tensor that a call would have rebuilt, once all its numbers are known to be in the file."""
    where = f"{file}{f', {printable(name)[:100]}' if name else ''}"
    if not isinstance(value, Call) or value.name != REBUILD:
        raise UserError(f"{where}: is no tensor")
    match value.args:
        case (StorageId(("storage", Name(kind), str(key), str(), size)), offset, tuple(shape), tuple(stride), *_) if (
            kind in STORAGES
        ):
            pass
        case _:
            raise UserError(f"{where}: a tensor in a form that is not known")
    numbers = [size, offset, *shape, *stride]
    if not len(shape) == len(stride) <= MAX_DIMS or not all(
        isinstance(number, int) and 0 <= number < 2**48 for number in numbers
    ):
        raise UserError(f"{where}: a tensor in a form that is not known")
    tensor = StoredTensor(file, f"{folder}data/{key}", STORAGES[kind], size, offset, shape, stride)
    count = math.prod(shape)
    end = 1 + offset + sum((length - 1) * step for length, step in zip(shape, stride)) if count else 0
    if sizes.get(tensor.entry) != size * tensor.dtype.itemsize or max(end, count) > size:
        raise UserError(f"{where}: a tensor whose numbers are not all in the file; fetch it again")
    return tensor
