"""Adapters on the device of the tests: a step of several is what each model merged by hand computes, replayed or not,
and one that comes or goes is nothing to steps in flight.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from protos.wire import Admit, LoadAdapter, Row, RowResult, Sampling, StepPlan
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import EPOCH
from tests.gpu_worker.runner import WHERE, GpuRunner
from tests.gpu_worker.test_backend import setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.lora import ALL, ATTENTION, adapted, merge, save_adapter
from tests.models.stepping import tokens
from tests.models.test_families import CONFIGS
from tests.models.test_lora import SIZE, Made, rows_of
from worker_svc.adapters.peft import PRODUCTS, read_adapter
from worker_svc.adapters.places import AdapterError
from worker_svc.backends.base import BackendError, Landing
from worker_svc.gpu.backend import GpuBackend
from worker_svc.gpu.lora import Adapters
from worker_svc.gpu.memory import DeviceMemory
from worker_svc.gpu.stepping import Flight
from worker_svc.kv_cache import KVCache
from worker_svc.models.loader import open_model
from worker_svc.parallel.shard import Shard
from worker_svc.slots import SlotError
from worker_svc.trial_step import TrialRow, trial_step

TOP = 5


def make(path: Path, config: Any, names: tuple[str, ...] = ALL) -> Made:
    """Three adapters: of attention alone, of everything, and of everything and the kernels' whole rank."""
    base = checkpoints.save(path / "base", config)
    adapters = [path / f"adapter-{i}" for i in (1, 2, 3)]
    for i, (adapter, rank) in enumerate(zip(adapters, (3, 8, 16), strict=True)):
        chosen = names if i else tuple(name for name in names if name in (*ATTENTION, "qkv_proj"))
        save_adapter(adapter, base, rank=rank, alpha=2.0 * rank, names=chosen, seed=i, size=0.3, use_rslora=i == 2)
    return Made(path / "base", base, adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, attention_bias=True)
    return make(tmp_path_factory.mktemp("lora"), config)


def merged(made: Made, index: int) -> Any:
    model = copy.deepcopy(made.base)
    if index:
        merge(model, made.adapters[index - 1])
    return model


def opened(made: Made, captured: tuple[int, ...] = (), place: FakePlace | None = None, **fields: Any) -> GpuBackend:
    backend = GpuBackend(place or FakePlace(random.Random(1)), lambda: None, 0.5, captured, "torch")
    given = {"max_adapters": 3, "max_adapter_rank": 11, "max_step_tokens": 16, **fields}
    backend.load(setup(made.model, **given), lambda phase, share: None)
    return backend


def load(backend: GpuBackend, made: Made, index: int) -> int:
    return backend.load_adapter(LoadAdapter(EPOCH, 0, str(index), "", str(made.adapters[index - 1])))


def admit(slot: int, prompt: list[int], adapter: int) -> Admit:
    blocks = list(range(1 + (slot - 1) * 4, 1 + slot * 4))
    sampling = Sampling(max_tokens=9, temperature=0.0, logprobs=TOP)
    return Admit(slot, prompt, len(prompt), [blocks], sampling, str(adapter) if adapter else "")


class Flown:
    """Steps of rows that all sample, none of which has landed."""

    def __init__(self, backend: GpuBackend) -> None:
        self.backend, self.count = backend, 0

    def step(self, rows: list[Row], admits: Sequence[Admit] = (), release: Sequence[int] = ()) -> Landing:
        self.count += 1
        self.backend.forward(StepPlan(EPOCH, self.count, list(release), list(admits), [], rows))
        answer = self.backend.sample(None)
        assert not isinstance(answer, list)
        return answer


def check(model: Any, prompt: list[int], rows: Sequence[RowResult]) -> None:
    """The stream of `rows` is the model's greedy one, and its log probabilities are near."""
    known = list(prompt)
    for row in rows:
        scores = checkpoints.logits(model, known)[-1].log_softmax(-1)
        (entry,) = row.logprobs
        assert row.token_ids == [int(scores.argmax())]
        ours = torch.tensor([entry.logprob, *entry.top_logprobs])
        theirs = scores[[entry.token_id, *entry.top_ids]]
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
        known += row.token_ids


def check_mixed(backend: GpuBackend, made: Made, captured: int) -> None:
    """Prompts run eagerly, the steps behind them as a graph of `captured` rows."""
    order = [3, 0, 1, 2]
    assert [load(backend, made, index) for index in (1, 2, 3)] == [3, 8, 16]
    prompts = [tokens(2 + i, 151, seed=i) for i in range(len(order))]
    flown, slots = Flown(backend), range(1, len(order) + 1)
    admits = [admit(slot, prompt, index) for slot, prompt, index in zip(slots, prompts, order, strict=True)]
    rows = [Row(slot, 0, len(prompt), sample=True) for slot, prompt in zip(slots, prompts, strict=True)]
    landings = [flown.step(rows, admits)]
    landings += [flown.step([Row(slot, -1, 1, sample=True) for slot in slots]) for _ in range(2)]
    assert [each.packed.shape.captured for each in landings if isinstance(each, Flight)] == [0, captured, captured]
    steps = [landing.rows() for landing in landings]
    for i, index in enumerate(order):
        check(merged(made, index), prompts[i], [step[i] for step in steps])


@pytest.mark.parametrize("captured", [pytest.param((), marks=pytest.mark.full), (5,)])
def test_three_and_none_in_one_step_are_the_merged_models(captured: tuple[int, ...], llama: Made) -> None:
    backend = opened(llama, captured, max_slots=5, max_adapter_rank=16)
    check_mixed(backend, llama, sum(captured))
    backend.close()


@pytest.mark.parametrize("family", ["gemma2", pytest.param("phi3", marks=pytest.mark.full)])
def test_fused_products_norms_behind_products_and_any_company(family: str, tmp_path: Path) -> None:
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if family == "phi3" else ALL
    config = Phi3Config(**SMALL, pad_token_id=0) if family == "phi3" else CONFIGS["gemma2-capped-biases"]
    made, order = make(tmp_path, config, names), [2, 0, 3, 1]
    runner = GpuRunner(made.model, block_size=SIZE, max_adapters=3, batch_invariant=True)
    for index, path in enumerate(made.adapters, 1):
        adapters = runner.model.adapters
        adapters.put(index, adapters.stage(read_adapter(path, runner.model.whole, 16)))
    rows = rows_of(len(order), 3)

    def logits_of(rows: list[TrialRow], order: list[int]) -> torch.Tensor:
        outputs = runner.step(adapted(trial_step(rows, SIZE), order), KVCache(runner.kv_shape, 16, SIZE))
        return outputs(np.arange(3 * len(rows))).view(len(rows), 3, -1)

    logits = logits_of(rows, order)
    assert torch.equal(logits_of(rows[2:3], order[2:3])[0], logits[2]), "alone a row has other bits"
    for row, index, ours in zip(rows, order, logits, strict=True):
        theirs = checkpoints.logits(merged(made, index), row.tokens.tolist())
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_they_come_and_go_while_steps_fly(llama: Made) -> None:
    """The device does nothing before it must; one place serves the second adapter, and then the first."""
    backend = opened(llama, (1,), FakePlace(random.Random(0), eager=0.0), max_adapters=1)
    flown, prompts = Flown(backend), [tokens(3, 151, seed=i) for i in range(3)]
    plain = flown.step([Row(1, 0, 3, sample=True)], [admit(1, prompts[0], 0)])
    load(backend, llama, 2)
    second = [flown.step([Row(2, 0, 3, sample=True)], [admit(2, prompts[1], 2)])]
    second.append(flown.step([Row(2, -1, 1, sample=True)]))
    backend.unload_adapter("2")
    load(backend, llama, 1)
    first = flown.step([Row(3, 0, 3, sample=True)], [admit(3, prompts[2], 1)], release=[2])
    check(merged(llama, 2), prompts[1], [landing.rows()[0] for landing in second])
    check(merged(llama, 0), prompts[0], plain.rows())
    check(merged(llama, 1), prompts[2], first.rows())
    backend.close()


def test_what_it_refuses(llama: Made) -> None:
    with pytest.raises(BackendError, match="max_adapter_rank 129 is over 128, the most of the cuda backend"):
        opened(llama, max_adapter_rank=129)
    backend = opened(llama)
    with pytest.raises(AdapterError, match="is of rank 16, over max_adapter_rank 11"):
        load(backend, llama, 3)
    load(backend, llama, 1)
    with pytest.raises(AdapterError, match="adapter '1' is loaded already"):
        load(backend, llama, 1)
    with pytest.raises(AdapterError, match="adapter '3' is not loaded"):
        backend.unload_adapter("3")
    backend.reset(setup(llama.model, max_adapters=3, max_adapter_rank=11))
    with pytest.raises(SlotError, match="slot 1 wants adapter '1', which is not loaded"):
        Flown(backend).step([Row(1, 0, 3, sample=True)], [admit(1, [5, 6, 7], 1)])
    backend.close()


class Scales(FakePlace):
    """Its memory is that of the process's tensors."""

    def memory(self) -> DeviceMemory:
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout is torch.strided]
        stores = [each.untyped_storage() for each in tensors]
        self.peak = sum({store.data_ptr(): store.nbytes() for store in stores}.values())
        return DeviceMemory(1 << 27, self.peak, 0)


def test_their_memory_is_not_given_to_kv(llama: Made) -> None:
    """Rank 17 has the room of 32; there is one place more than adapters."""
    place = Scales(random.Random(0))
    opened(llama, (), place, max_adapters=99, max_adapter_rank=17).close()
    sizes = {"q": 64 + 64, "k": 64 + 32, "v": 64 + 32, "o": 64 + 64, "gate": 64 + 112, "up": 64 + 112, "down": 112 + 64}
    assert place.peak > 2 * 100 * 32 * sum(sizes.values()) * 4


def test_ranks_add_up_to_the_whole(llama: Made) -> None:
    model = open_model(llama.model)
    assert model is not None
    adapter = read_adapter(llama.adapters[1], model.spec, 16)
    index = torch.tensor([0, 1, 1], dtype=torch.int32, device=WHERE)

    def added(rank: int, size: int, product: str, x: torch.Tensor) -> torch.Tensor:
        shard = Shard(model.spec, rank, size)
        adapters = Adapters(shard, 1, 16, torch.float32, WHERE)
        adapters.put(1, adapters.stage(adapter))
        pieces = shard.pieces(product)
        y = torch.zeros(3, sum(piece.cut.bottom - piece.cut.top for piece in pieces), device=WHERE)
        return adapters.of(index)(1)(product, x[:, pieces[0].cut.left : pieces[0].cut.right], y)

    for product in PRODUCTS:
        x = torch.randn(3, 112 if product == "down" else 64, generator=torch.Generator().manual_seed(1)).to(WHERE)
        whole, parts = added(0, 1, product, x), [added(rank, 2, product, x) for rank in range(2)]
        if product in ("o", "down"):
            together = parts[0] + parts[1]
        else:
            sizes = [section.rows // 2 for section in model.spec.sections(product)]
            by_section = zip(*(y.split(sizes, 1) for y in parts), strict=True)
            together = torch.cat([torch.cat(pair, 1) for pair in by_section], 1)
        assert (whole[0] == 0).all()
        assert float(whole[1:].abs().max()) > 0.1
        torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-5)
