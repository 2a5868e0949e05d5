from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.formats import builders as b
from worker_svc.models.checkpoint import CheckpointError, open_checkpoint
from worker_svc.models.gguf import GGUFCheckpoint
from worker_svc.models.safetensors_reader import INDEX_NAME, SafetensorsCheckpoint

TENSORS = [("a", "F32", (2, 3), bytes(range(24))), ("b", "BF16", (4,), bytes(range(8))), ("c", "I64", (), bytes(8))]
SOUND = b.safetensors(TENSORS, {"format": "pt"})


def opened(path: Path, data: bytes) -> GGUFCheckpoint | SafetensorsCheckpoint:
    file = path / "model.safetensors"
    file.write_bytes(data)
    return open_checkpoint(file)


def test_views_of_a_file(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, SOUND)
    assert checkpoint.names() == ["a", "b", "c"]
    assert "a" in checkpoint
    assert "z" not in checkpoint
    assert checkpoint.metadata == {"format": "pt"}
    a, bits, scalar = (checkpoint.tensor(name) for name in "abc")
    assert a.data.tobytes() == TENSORS[0][3]
    assert (a.dtype, a.shape, a.data.dtype) == ("F32", (2, 3), np.dtype(np.float32))
    assert not a.data.flags.owndata
    assert (bits.dtype, bits.data.dtype) == ("BF16", np.dtype(np.uint16))
    assert bits.float32().tobytes() == b"".join(b"\0\0" + TENSORS[1][3][i : i + 2] for i in range(0, 8, 2))
    assert scalar.shape == ()


@given(
    arrays=st.dictionaries(
        st.text("abc.", min_size=1),
        st.tuples(st.sampled_from(["f2", "f4", "f8", "i4", "u1"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_what_the_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, tuple[str, list[int]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    written = {name: rng.integers(0, 99, shape).astype(dtype) for name, (dtype, shape) in arrays.items()}
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file(written, path)
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.names()) == sorted(written)
    for name, array in written.items():
        got = checkpoint.tensor(name).data
        assert got.shape == array.shape
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def one(data: bytes = bytes(8), **fields: object) -> bytes:
    return b.with_header({"t": ENTRY | fields}, data)


CORRUPTIONS = {
    "empty": (b"", "too few"),
    "length cut": (SOUND[:7], "too few"),
    "header cut": (SOUND[:30], "cut short"),
    "data cut": (SOUND[:-1], "'c'.*cut short"),
    "bytes left over": (SOUND + b"x", "left over"),
    "a huge header": (struct.pack("<Q", 1 << 63) + SOUND[8:], "claims a header"),
    "not JSON": (b.with_header(b"{nope", b""), "not JSON"),
    "not UTF-8": (b.with_header(b'{"\xff": 1}', b""), "not JSON"),
    "nested without end": (b.with_header(b"[" * 100_000, b""), "not JSON"),
    "a number of 5000 digits": (b.with_header(b'{"t": ' + b"9" * 5000 + b"}", b""), "not JSON"),
    "a list": (b.with_header([], b""), "list, not an object"),
    "an entry that is none": (b.with_header({"t": 3}, b""), "'t'.*not an object"),
    "a name twice": (b.with_header(b'{"t": {}, "t": {}}', b""), "'t' twice"),
    "no type": (one(dtype=None), "'t'.*unknown type None"),
    "unknown type": (one(dtype="F7"), "'t'.*unknown type 'F7'"),
    "a negative dimension": (one(shape=[-2]), "'t'.*shape"),
    "a fractional dimension": (one(shape=[2.0]), "'t'.*shape"),
    "no shape": (one(shape=None), "'t'.*shape"),
    "a huge shape": (one(shape=[1 << 62, 1 << 62]), "'t'.*span 8"),
    "a wrong size": (one(shape=[3]), "'t'.*12 bytes.*span 8"),
    "one offset": (one(data_offsets=[0]), "'t'.*begin and an end"),
    "offsets backwards": (one(data_offsets=[8, 0]), "'t'.*span -8"),
    "a hole": (one(data=bytes(12), data_offsets=[4, 12]), "'t'.*gap"),
    "an overlap": (b.with_header({"t": ENTRY, "u": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "'u'.*overlaps"),
    "metadata a list": (b.with_header({"__metadata__": []}, b""), "__metadata__"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_file_says_what_and_where(tmp_path: Path, name: str) -> None:
    data, message = CORRUPTIONS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, data)
    assert "model.safetensors" in str(caught.value)


@given(at=st.integers(0, len(SOUND) - 1), to=st.binary(min_size=1, max_size=12))
def test_whatever_the_bytes_say_the_reader_answers(
    tmp_path_factory: pytest.TempPathFactory, at: int, to: bytes
) -> None:
    try:
        checkpoint = opened(tmp_path_factory.getbasetemp(), SOUND[:at] + to + SOUND[at + len(to) :])
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except CheckpointError:
        pass


def test_a_type_of_no_use_here_is_refused_when_it_is_read(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, b.safetensors([("v", "F8_E5M2", (3,), bytes(3)), ("w", "F8_E4M3", (3,), bytes(3))]))
    with pytest.raises(CheckpointError, match="'v' has type F8_E5M2"):
        checkpoint.tensor("v")
    with pytest.raises(CheckpointError, match="'w' has type F8_E4M3, which cannot be read as weights"):
        checkpoint.tensor("w").float32()


def shard(folder: Path, files: dict[str, dict[str, float]], weight_map: object = None) -> Path:
    for name, tensors in files.items():
        data = [(key, "F32", (1,), struct.pack("<f", value)) for key, value in tensors.items()]
        (folder / name).write_bytes(b.safetensors(data))
    index = {key: name for name, tensors in files.items() for key in tensors} if weight_map is None else weight_map
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shard(tmp_path, {"1.safetensors": {"a": 1, "c": 3}, "2.safetensors": {"b": 2}}))
    assert {name: float(checkpoint.tensor(name).data[0]) for name in checkpoint.names()} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("files", "weight_map", "message"),
    [
        ({"1.st": {"a": 1}}, {"a": "1.st", "b": "2.st"}, "shard 2.st is missing"),
        ({"1.st": {"a": 1}}, {"a": "1.st", "b": "1.st"}, "'b' is not in 1.st"),
        ({"1.st": {"a": 1, "b": 2}}, {"a": "1.st"}, "'b' of 1.st is not in the index"),
        ({"1.st": {"a": 1}, "2.st": {"a": 1, "b": 2}}, {"a": "1.st", "b": "2.st"}, "'a' is also in"),
        ({"1.st": {"a": 1}, "2.st": {"b": 2}}, {"a": "2.st", "b": "1.st"}, "'a' is not in 2.st"),
        ({"1.st": {"a": 1}}, {"a": "../1.st"}, "not a file name"),
        ({"1.st": {"a": 1}}, {"a": 7}, "not a file name"),
        ({"1.st": {"a": 1}}, [], "weight_map is list"),
    ],
)
def test_shards_that_contradict_their_index(
    tmp_path: Path, files: dict[str, dict[str, float]], weight_map: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(shard(tmp_path, files, weight_map))


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path / "model.bin")
