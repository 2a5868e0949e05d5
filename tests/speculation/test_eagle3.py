"""The EAGLE-3 head: what it drafts is what the paper's head would, at any place; what is no head is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from protos.engine_wire import Submit
from protos.wire import Sampling, Setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import EPOCH
from tests.speculation.eagle3_head import Head, random_head, taps
from tests.speculation.house import House
from worker_svc import backends
from worker_svc.backends.base import BackendError, DeviceBackend, Options
from worker_svc.backends.cpu import CpuBackend

LAYERS = 6
CONFIG: dict[str, Any] = {**SMALL, "num_hidden_layers": LAYERS, "head_dim": 16}
DRAFTS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Head]:
    path = tmp_path_factory.mktemp("models")
    target = checkpoints.save(path / "target", LlamaConfig(**CONFIG))
    head = random_head(target.config, LAYERS)
    head.save(path / "head")
    head.save(path / "own", **{"embed_tokens.weight": target.model.embed_tokens.weight.detach().flip(0).contiguous()})
    return path, target, head


def setup(path: Path, head: str, **fields: Any) -> Setup:
    return Setup(
        EPOCH, str(path / "target"), block_size=32, max_slots=12, threads=2, max_model_len=256, dtype="bfloat16",
        speculation="eagle3", num_drafts=DRAFTS, draft_model=str(path / head), **fields,
    )  # fmt: skip


def create(message: Setup) -> DeviceBackend:
    return backends.create("auto", message, Options(Path(message.model).parent / "home", "cpu"))


class Watch:
    """Notes what is drafted behind which tokens."""

    def __init__(self, backend: CpuBackend) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []
        proposer: Any = backend._proposer
        propose = proposer.propose

        def watched(inputs: Any, slots: Any, most: Any) -> None:
            propose(inputs, slots, most)
            for slot, wanted in zip(inputs.slots.tolist(), most.tolist(), strict=True):
                if wanted:
                    length, count = int(slots.lengths[slot]), int(slots.drafts[slot])
                    tokens = slots.token_ids[slot].tolist()
                    self.seen.append((tokens[:length], tokens[length : length + count]))

        proposer.propose = watched


@pytest.mark.parametrize("form", ["head", "own"])
def test_drafts_are_those_of_the_papers_head(models: tuple[Path, Any, Head], form: str) -> None:
    """Of most: its products are rounded to int8, and the model's states to bfloat16."""
    path, target, head = models
    watches: list[Watch] = []

    def watched(message: Setup) -> DeviceBackend:
        backend = create(message)
        load = backend.load

        def then(*arguments: Any) -> Any:
            capacity = load(*arguments)
            assert isinstance(backend, CpuBackend)
            watches.append(Watch(backend))
            return capacity

        backend.load = then  # type: ignore[method-assign,assignment]
        return backend

    house = House(setup(path, form), watched, depth=2)
    house.ready()
    made = [
        Submit(f"r{i}", [7 + i, *range(3, 60 + 11 * i)], 58 + 11 * i, Sampling(max_tokens=24, seed=i, temperature=0.9))
        for i in range(4)
    ]
    house.run(made, crashes=(9,))
    embed = target.model.embed_tokens.weight.detach()
    embed = embed.flip(0) if form == "own" else embed
    same = total = 0
    for watch in watches:
        for tokens, drafts in watch.seen:
            inputs = taps(target, torch.tensor([tokens[:-1]]), head.layers)[0]
            wanted = head.draft(inputs, embed, tokens, len(drafts))
            same += sum(a == b for a, b in zip(wanted, drafts, strict=True))
            total += len(drafts)
    assert total > 150
    assert same > 0.75 * total, (same, total)


Tensors = dict[str, Any]
REFUSED: list[tuple[str, Any, str]] = [
    ("missing", lambda t, c: t.pop("fc.weight"), r"fc\.weight"),
    ("shape", lambda t, c: t.update({"midlayer.self_attn.k_proj.weight": np.zeros((32, 64), np.float32)}),
     r"midlayer\.self_attn\.k_proj\.weight is \[32, 64\], and must be \[32, 128\]"),
    ("nan", lambda t, c: t["norm.weight"].fill(np.nan), r"norm\.weight"),
    ("d2t", lambda t, c: t["d2t"].fill(90), "d2t leads out of the model's vocabulary of 151"),
    ("d2t type", lambda t, c: t.update(d2t=t["d2t"].astype(np.float32)), "d2t is F32, and must be I64 or I32"),
    ("hidden", lambda t, c: c.update(hidden_size=80), r"num_hidden_layers, hidden_size are \(1, 80\)"),
    ("architecture", lambda t, c: c.update(architectures=["LlamaForCausalLM"]), "an EAGLE-3 head's is"),
    ("taps", lambda t, c: c.update(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}), "at most 5"),
    ("no json", None, "no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [pytest.param(c, w, id=name) for name, c, w in REFUSED])
def test_what_is_no_head_is_refused(models: tuple[Path, Any, Head], change: Any, words: str, tmp_path: Path) -> None:
    path, _, _ = models
    tensors, config = load_file(path / "head" / "model.safetensors"), (path / "head" / "config.json").read_text()
    fields = json.loads(config)
    if change:
        change(tensors, fields)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields) if change else config[:40])
    message = msgspec.structs.replace(setup(path, "head"), draft_model=str(tmp_path))
    with pytest.raises(BackendError, match=words):
        create(message)
