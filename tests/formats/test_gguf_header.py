from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.gguf_header import GGUFError, TensorInfo, read
from tests.formats import builders as b

PAIRS = [
    b.pair("general.architecture", b.STRING, "llama"),
    b.pair("u8", b.U8, 255),
    b.pair("i64", b.I64, -(1 << 63)),
    b.pair("f32", b.F32, 0.5),
    b.pair("yes", b.BOOL, True),
    b.pair("tokens", (b.ARRAY, b.STRING), ["a", "Ġb", ""]),
    b.pair("types", (b.ARRAY, b.I32), [3, -1]),
    b.pair("flags", (b.ARRAY, b.BOOL), [True, False]),
    b.pair("nested", (b.ARRAY, b.ARRAY, b.U16), [[1, 2], [], [65535]]),
]
TENSORS = [("x", (2, 3), 0, bytes(range(24))), ("y", (32,), 2, bytes(18)), ("scalar", (), 0, bytes(4))]
SOUND = b.gguf(PAIRS, TENSORS)


def write(path: Path, data: bytes) -> Path:
    file = path / "model.gguf"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value_and_the_tensor_table(tmp_path: Path, version: int) -> None:
    file = read(write(tmp_path, b.gguf(PAIRS, TENSORS, version=version)))
    assert file.version == version
    assert file.metadata == {
        "general.architecture": "llama",
        "u8": 255,
        "i64": -(1 << 63),
        "f32": 0.5,
        "yes": True,
        "tokens": ["a", "Ġb", ""],
        "types": [3, -1],
        "flags": [True, False],
        "nested": [[1, 2], [], [65535]],
    }
    base = len(SOUND) - 68  # 24 bytes, padding to 32, 18, padding to 64, 4
    assert file.tensors == {
        "x": TensorInfo("x", (2, 3), 0, base, 24),
        "y": TensorInfo("y", (32,), 2, base + 32, 18),
        "scalar": TensorInfo("scalar", (), 0, base + 64, 4),
    }
    assert base % 32 == 0


def test_another_alignment(tmp_path: Path) -> None:
    pairs = [b.pair("general.alignment", b.U32, 256)]
    file = read(write(tmp_path, b.gguf(pairs, TENSORS, alignment=256)))
    assert [info.offset % 256 for info in file.tensors.values()] == [0, 0, 0]


def test_the_real_file(model_path: Path) -> None:
    file = read(model_path)
    assert file.metadata["llama.context_length"] == 8192
    assert len(file.metadata["tokenizer.ggml.tokens"]) == file.metadata["llama.vocab_size"] == 49152
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    last = max(file.tensors.values(), key=lambda info: info.offset)
    assert last.offset + last.nbytes == model_path.stat().st_size


def header(num_tensors: int, num_pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + rest


def info(shape: tuple[int, ...] = (1,), ggml_type: int = 0, offset: int = 0) -> bytes:
    """A file of one tensor `t`, with 64 bytes after the header."""
    return header(1, 0, b.tensor_info("t", shape, ggml_type, offset)) + bytes(96)


def array(code: int, count: int, rest: bytes = b"") -> bytes:
    """A file of one pair `k`, an array."""
    return header(0, 1, b.string("k") + struct.pack("<IIQ", b.ARRAY, code, count) + rest + bytes(64))


CORRUPTIONS = {
    "empty": (b"", "too few"),
    "header cut": (SOUND[:20], "too few"),
    "not GGUF": (b"GGML" + SOUND[4:], "magic"),
    "version 1": (SOUND[:4] + struct.pack("<I", 1) + SOUND[8:], "version 1"),
    "big-endian": (SOUND[:4] + struct.pack(">I", 3) + SOUND[8:], "big-endian"),
    "huge tensor count": (header(1 << 63, 0), "tensors"),
    "huge pair count": (header(0, 1 << 63), "metadata pairs"),
    "cut in a key": (SOUND[: SOUND.index(b"nested") + 2], "metadata pair 8.*cut short"),
    "cut in the tensor table": (SOUND[: SOUND.index(b"scalar")], "name of tensor 2"),
    "cut in the data": (SOUND[:-1], "'scalar'.*cut short"),
    "huge key": (header(0, 1, struct.pack("<Q", (1 << 64) - 1) + bytes(64)), "claims a text"),
    "key not UTF-8": (header(0, 1, b.string(b"\xff\xfe") + bytes(64)), "UTF-8"),
    "unknown value type": (header(0, 1, b.string("k") + struct.pack("<I", 99) + bytes(64)), "'k'.*value type 99"),
    "unknown element type": (array(13, 1), "'k'.*value type 13"),
    "huge number array": (array(b.U64, 1 << 61), "'k'.*cannot fit"),
    "huge string array": (array(b.STRING, 1 << 40), "'k'.*cannot fit"),
    "long string in array": (array(b.STRING, 2, struct.pack("<Q", 1 << 62)), "'k'.*element 0"),
    "endless nesting": (array(b.ARRAY, 1, struct.pack("<IQ", b.ARRAY, 1) * 9), "'k'.*deeper"),
    "a boolean of 2": (array(b.BOOL, 1, b"\2"), "'k'.*boolean"),
    "a pair twice": (b.gguf([PAIRS[1]] * 2, []) + bytes(64), "'u8'.*twice"),
    "a tensor twice": (b.gguf([], [TENSORS[0]] * 2), "'x'.*twice"),
    "alignment 24": (b.gguf([b.pair("general.alignment", b.U32, 24)], TENSORS), "alignment"),
    "alignment a string": (b.gguf([b.pair("general.alignment", b.STRING, "32")], TENSORS), "alignment"),
    "five dimensions": (info((1,) * 5), "'t'.*5 dimensions"),
    "a dimension of 0": (info((0, 4)), "'t'.*shape"),
    "huge dimensions": (info((1 << 63, 1 << 63)), "'t'.*cut short"),
    "unknown tensor type": (info(ggml_type=77), "'t'.*type 77"),
    "rows not whole blocks": (info((4, 33), ggml_type=2), "'t'.*multiples of 32"),
    "an offset out of line": (info(offset=8), "'t'.*alignment"),
    "an offset past the end": (info(offset=1 << 40), "'t'.*cut short"),
    "tensors that overlap": (
        header(2, 0, b.tensor_info("t", (16,), 0, 0) + b.tensor_info("u", (16,), 0, 32)) + bytes(256),
        "'u'.*inside tensor 't'",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_file_says_what_and_where(tmp_path: Path, name: str) -> None:
    data, message = CORRUPTIONS[name]
    path = write(tmp_path, data)
    with pytest.raises(GGUFError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@given(cut=st.integers(0, len(SOUND) - 1))
def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.raises(GGUFError):
        read(write(tmp_path_factory.getbasetemp(), SOUND[:cut]))


@given(at=st.integers(0, len(SOUND) - 1), to=st.binary(min_size=1, max_size=12))
def test_whatever_the_bytes_say_the_reader_answers(
    tmp_path_factory: pytest.TempPathFactory, at: int, to: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), (SOUND[:at] + to + SOUND[at + len(to) :])[: len(SOUND)])
    try:
        file = read(path)
    except GGUFError:
        return
    assert all(info.offset + info.nbytes <= path.stat().st_size for info in file.tensors.values())


def test_the_gguf_package_stays_visible() -> None:
    """`protos/` is on the path for the generated stubs: a module there may not hide another package."""
    spec = importlib.util.find_spec("gguf")
    assert spec is None or "protos" not in Path(str(spec.origin)).parts
