"""Files that others pickled are read and never run: attacks do nothing, damage is told, plain data is kept."""

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import tiktoken
import torch

from nanochat.ancestor import read_model, read_tokenizer
from nanochat.common import UserError
from nanochat.pickles import Call, read_pickle, read_tensors
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN


class Attack:
    """Pickled, this is an order to run a shell command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_does_nothing(protocol: int, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    attack = pickle.dumps(Attack(witness), protocol)
    (tmp_path / "tokenizer.pkl").write_bytes(attack)
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system.*nothing in it was run"):
        read_tokenizer(tmp_path)
    assert not witness.exists()
    pickle.loads(attack)
    assert witness.exists()  # it is one


def test_a_malicious_model_does_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"transformer.wte.weight": torch.zeros(2), "x": Attack(witness)}, tmp_path / "model_000650.pt")
    (tmp_path / "meta_000650.json").write_text('{"model_config": {}}')
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system"):
        read_model(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", r"asks for builtins\.eval"),
        (b"\x80\x04)\x85)\x85\x93.", "no name"),
        (b"cos\nsystem\n.", r"asks for os\.system"),
        (b"(S'x'\nios\nsystem\n.", "instruction STRING"),
        (b"(cos\nsystem\n.", r"asks for os\.system"),
        (b"(I1\nios\nsystem\n.", "instruction INST"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"}).", "one value"),
        (b"(.", "one value"),
        (b"0.", "damaged"),
        (b"]R.", "damaged"),
        (b"}))s.", "keys"),
        (b"}I1\nI2\ns.", "keys"),
        (b"I1\nI2\nI3\ns.", "takes none"),
        (b"I1\nI2\na.", "no list"),
        (b"h\x05.", "damaged"),
        (b"", "damaged"),
        (b"hello", "damaged"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
        (b"(" * 20_000 + b".", "deeper"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_the_reason(program: bytes, told: str) -> None:
    with pytest.raises(UserError, match=f"{told}.*nothing in it was run"):
        read_pickle(program, "file", {"collections.OrderedDict"})


def test_very_deep_data_is_put_away_again() -> None:
    nested = read_pickle(b")" + b"\x85" * 200_000 + b".", "file", set())
    assert isinstance(nested, tuple)


def test_plain_data_is_read_as_it_was_written() -> None:
    again = [1, 2]
    data = {
        "a": [1, -5, 2**70, 1.5, None, True],
        "b": (b"x", "ü" * 300, {}),
        "c": ("a", "b", "c", "d"),
        "again": [again] * 2,
    }
    for protocol in (2, 3, 4, 5):
        protocol_data = data if protocol > 2 else {**data, "b": ()}
        assert read_pickle(pickle.dumps(protocol_data, protocol), "file", set()) == protocol_data
    call = read_pickle(pickle.dumps(OrderedDict(a=1)), "file", {"collections.OrderedDict"})
    assert isinstance(call, Call) and call.entries == {"a": 1}


def test_random_damage_is_never_worse_than_an_error_that_says_so(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    specials = {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("x", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    read_tokenizer(tmp_path)
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, tmp_path / "model.pt")
    rng, refused = random.Random(0), 0
    for name, read in (("tokenizer.pkl", lambda: read_tokenizer(tmp_path)), ("model.pt", lambda: load_all(tmp_path))):
        original = (tmp_path / name).read_bytes()
        for _ in range(300):
            content = bytearray(original[: rng.choice([len(original), rng.randrange(len(original))])])
            for _ in range(rng.randrange(4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            (tmp_path / name).write_bytes(content)
            try:
                read()
            except UserError:
                refused += 1
        (tmp_path / name).write_bytes(original)
    assert refused > 300


def load_all(folder: Path) -> None:
    for tensor in read_tensors(folder / "model.pt").values():
        tensor.load()


def test_tensors_of_all_kinds_are_read_as_torch_wrote_them(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    saved = OrderedDict(
        whole=base,
        part=base[1:3],
        turned=base.T,
        stepped=base[::2, 1::3],
        bf16=base.bfloat16(),
        half=base.half(),
        double=base.double(),
        int32=torch.arange(5, dtype=torch.int32),
        int64=torch.arange(5),
        single=torch.tensor(3.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Linear(2, 2).state_dict()["weight"],
    )
    saved._metadata = {"": {"version": 1}}  # as a module's state_dict has it
    torch.save(saved, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        loaded = found[name].load()
        assert loaded.dtype == tensor.dtype and loaded.is_contiguous() and torch.equal(loaded, tensor), name
        assert found[name].shape == tuple(tensor.shape)


def tampered(path: Path, change: object) -> None:
    """Write the zip again with its index changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_a_tensor_cannot_reach_beyond_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for shape, stride, offset in (
        ((4, 4), (4, 1), 1),
        ((5, 4), (4, 1), 0),
        ((17,), (0,), 0),
        ((4,), (5, 1), 0),
        ((1,) * 65, (1,) * 65, 0),
    ):
        torch.save(torch.zeros(16), path)
        buffer = io.BytesIO()
        forged_pickle(buffer, shape, stride, offset)
        tampered(path, lambda _, forged=buffer: forged.getvalue())
        with pytest.raises(UserError, match=r"not all in the file|not known"):
            read_tensors(path)


def forged_pickle(buffer: io.BytesIO, shape: tuple, stride: tuple, offset: int) -> None:
    class Storage:
        pass

    class Forger(pickle._Pickler):  # the one in Python, whose persistent_id may be given
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    Forger(buffer, 2).dump(Tensor())


def test_torchs_format_of_before_2020_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="format of before 2020"):
        read_tensors(tmp_path / "x.pt")


def test_a_forged_tensor_that_fits_is_read(tmp_path: Path) -> None:
    """The test of the test above."""
    torch.save(torch.arange(16.0), tmp_path / "x.pt")
    buffer = io.BytesIO()
    forged_pickle(buffer, (3, 4), (4, 1), 4)
    tampered(tmp_path / "x.pt", lambda _: buffer.getvalue())
    assert torch.equal(read_tensors(tmp_path / "x.pt").load(), torch.arange(4.0, 16.0).view(3, 4))
