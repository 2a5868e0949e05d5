"""Packed weights on the disk: found again, replaced when they are stale or damaged, and done without."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from kernels.cpu import library
from protos import model_cache
from tests.models import checkpoints
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import open_model
from worker_svc.quant import on_load
from worker_svc.quant.packed import PackedModel, PackedStore


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "model", LlamaConfig(**checkpoints.SMALL, tie_word_embeddings=True))
    return tmp_path / "model"


def store(model: Path, mode: str = "int4") -> PackedStore:
    return PackedStore(model, mode, model.parent / "home", library.load())


def pack(model: Path, mode: str = "int4") -> PackedModel:
    source = open_model(model)
    assert source is not None
    return store(model, mode).pack(source, 2, lambda share: None)


def same(a: PackedModel | None, b: PackedModel) -> bool:
    assert a is not None
    assert (a.spec, a.weights, a.layout) == (b.spec, b.weights, b.layout)
    return all(np.array_equal(a.arrays[name], b.arrays[name]) for name in b.arrays)


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
def test_what_was_packed_is_read_again(model: Path, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert store(model, mode).read() is None
    made = pack(model, mode)
    file = model / f".pagewire/weights-{mode or 'bf16'}"
    assert str(file) in capfd.readouterr().err
    assert list(file.parent.iterdir()) == [file]
    assert same(store(model, mode).read(), made)
    assert not capfd.readouterr().err
    assert all(array.ctypes.data % 64 == 0 for array in made.arrays.values())
    assert ("embed" in made.arrays) == (mode != ""), "a bfloat16 head has the rows of a tied embedding"


def test_modes_lie_side_by_side(model: Path) -> None:
    made = {mode: pack(model, mode) for mode in ("", "int8", "int4")}
    assert all(same(store(model, mode).read(), packed) for mode, packed in made.items())


def test_other_weights_are_packed_again(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = pack(model)
    checkpoints.save(model, LlamaConfig(**checkpoints.SMALL, tie_word_embeddings=True), seed=1)
    assert store(model).read() is None
    after = pack(model)
    assert before.weights != after.weights
    assert same(store(model).read(), after)


def copy_in_place(file: Path) -> None:
    """Of the same time, and of another inode or ctime: as an image's layer or `rsync -t` brings it."""
    at, content = file.stat(), file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))


def test_a_copy_of_the_same_model_is_not_packed_again(model: Path) -> None:
    made = pack(model)
    for name in ("model.safetensors", "config.json"):
        before = (model / name).stat()
        copy_in_place(model / name)
        after = (model / name).stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert after.st_ctime_ns != before.st_ctime_ns
    assert same(store(model).read(), made)


@pytest.mark.parametrize("how", ["another file", "the same file"])
def test_other_weights_of_the_same_size_and_time_are_packed_again(model: Path, how: str) -> None:
    before, file = pack(model), model / "model.safetensors"
    other = model.parent / "other"
    checkpoints.save(other, LlamaConfig(**checkpoints.SMALL, tie_word_embeddings=True), seed=1)
    at, written = file.stat(), (other / file.name).read_bytes()
    assert len(written) == at.st_size
    if how == "another file":
        file.unlink()
    file.write_bytes(written)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert store(model).read() is None
    after = pack(model)
    assert before.weights != after.weights
    assert same(store(model).read(), after)


def test_where_the_times_are_others_too_the_digest_is_not_asked(model: Path) -> None:
    """It is of samples: an edit that falls between them has another time."""
    pack(model)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert store(model).read() is None


def test_what_other_kernels_or_another_layout_packed_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(model)
    with monkeypatch.context() as patch:
        patch.setattr("worker_svc.quant.packed.FORMAT", -1)
        assert store(model).read() is None
    with monkeypatch.context() as patch:
        patch.setattr("worker_svc.quant.packed.source_digest", lambda: "other")
        assert store(model).read() is None
    assert store(model).read() is not None


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    match how:
        case "a bit of a weight":
            data[1000] ^= 4
        case "a bit of the header":
            data[-60] ^= 4
        case "the length of the header":
            data[-24:-16] = (1 << 40).to_bytes(8, "little")
        case "cut short":
            del data[-100:]
        case "cut in front":
            del data[:64]
        case "empty":
            data.clear()
        case "something else":
            data[:] = b"hello"
    file.unlink()  # somebody has it mapped
    file.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        *("a bit of a weight", "a bit of the header", "the length of the header", "cut short"),
        *("cut in front", "empty", "something else"),
    ],
)
def test_a_damaged_file_is_said_and_replaced(model: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    made = pack(model)
    file = model / ".pagewire/weights-int4"
    damage(file, how)
    capfd.readouterr()
    assert store(model).read() is None
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert str(file) in said
    assert "packed again" in said
    pack(model)
    assert same(store(model).read(), made)


def test_where_the_model_lies_nobody_may_write(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = model_cache.directories(model, model.parent / "home")
    beside.write_text("no directory")
    made = pack(model)
    assert (elsewhere / "weights-int4").exists()
    assert same(store(model).read(), made)


@pytest.mark.parametrize("full", [False, True])
def test_a_directory_in_its_place_is_passed_over(model: Path, full: bool) -> None:
    (model / ".pagewire/weights-int4").mkdir(parents=True)
    if full:
        (model / ".pagewire/weights-int4/file").touch()
    made = pack(model)
    assert list((model.parent / "home/derived").rglob("weights-int4"))
    assert same(store(model).read(), made)


def test_what_cannot_take_its_place_in_the_end_is_served_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        made = pack(model)
    assert "not kept" in capfd.readouterr().err
    assert not list((model / ".pagewire").iterdir())
    assert same(pack(model), made)


def test_without_any_place_it_is_served_from_memory(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (model.parent / "home").write_text("no directory")
    (model / ".pagewire").write_text("no directory")
    made = pack(model)
    said = capfd.readouterr().err
    assert "every start packs them" in said
    assert "into memory" in said
    (model / ".pagewire").unlink()
    assert same(pack(model), made)


def test_a_full_disk_is_no_signal(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    pack(model)
    assert "No space left on device" in capfd.readouterr().err
    assert not list((model / ".pagewire").iterdir()), "nothing half written is left"


def test_what_a_killed_packer_left_goes(model: Path) -> None:
    (model / ".pagewire").mkdir()
    left = model / ".pagewire/.weights-int4.1"
    left.touch()
    pack(model)
    assert not left.exists()


def test_a_file_that_is_taken_for_a_left_one_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another starter sweeps between this one's open and its lock."""
    flock, swept = fcntl.flock, list[Path]()

    def lock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and len(swept) < 3:
            (left,) = tmp_path.glob(".file.*")
            swept.append(left)
            left.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with model_cache.replacing(tmp_path / "file") as descriptor:
        os.write(descriptor, b"whole")
    assert len(swept) == 3
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def _replace_often(path: Path, count: int) -> None:
    for _ in range(count):
        with model_cache.replacing(path) as descriptor:
            os.write(descriptor, b"whole")


def test_many_replace_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_replace_often, args=(tmp_path / "file", 300)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def _pack_and_read(model: Path, results: multiprocessing.Queue[int]) -> None:
    made = pack(model)
    results.put(library.load().checksum(made.arrays["0.qkv"]))


def test_two_processes_pack_at_once(model: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    packers = [context.Process(target=_pack_and_read, args=(model, results)) for _ in range(2)]
    for packer in packers:
        packer.start()
    sums = [results.get(timeout=100) for _ in packers]
    for packer in packers:
        packer.join()
    found = store(model).read()
    assert found is not None
    assert {library.load().checksum(found.arrays["0.qkv"]), *sums} == {sums[0]}
    assert [path.name for path in (model / ".pagewire").iterdir()] == ["weights-int4"]


@pytest.mark.parametrize("mode", ["", *on_load.MODES], ids=lambda mode: mode or "bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.layers.1.mlp.up_proj.weight", "nan"),
        ("model.layers.2.self_attn.q_proj.weight", "inf"),
        ("model.layers.0.self_attn.k_proj.bias", "nan"),
        ("model.layers.0.input_layernorm.weight", "-inf"),
        ("model.embed_tokens.weight", "-inf"),
        ("lm_head.weight", "nan"),
    ],
)
def test_a_weight_that_is_no_number_is_named(model: Path, name: str, bad: str, dtype: torch.dtype, mode: str) -> None:
    source = checkpoints.save(model, Qwen2Config(**checkpoints.SMALL, tie_word_embeddings=False)).to(dtype)
    source.get_parameter(name).data.view(-1)[7] = float(bad)
    source.save_pretrained(model)
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' has weights that are not finite"):
        pack(model, mode)
    assert store(model, mode).read() is None
