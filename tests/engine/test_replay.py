"""A recorded log gives the same plan bytes in another process, under another PYTHONHASHSEED (invariant 10)."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from protos.engine_wire import FinishReason
from protos.wire import StepPlan
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import Event, Instruction
from scheduler_svc.engine.scheduler import Scheduler
from tests.engine.world import World, request

CONFIG = EngineConfig(block_size=4, max_num_seqs=6, max_step_tokens=40, depth=2, num_drafts=2, max_waiting=60)
ROOT = Path(__file__).parents[2]


def record(seed: int, groups: int) -> World:
    """A busy run: shared prefixes, salts, priorities, aborts, crashes, a pool that is too small."""
    choose = random.Random(seed)
    w = World(CONFIG, num_blocks=24, align=4, groups=groups, max_model_len=60)
    w.ready_all()
    for i in range(150):
        prompt = [choose.randrange(2)] * choose.randrange(1, 20) + [choose.randrange(30) for _ in range(5)]
        fields = {"priority": choose.randrange(2), "cache_salt": choose.choice(["", "salt"]), "eos_token_ids": (2,)}
        w.submit(request(f"request-{i}", prompt, choose.randrange(1, 15), seed=i, **fields))
        w.land(choose.randrange(4), group=choose.randrange(groups) if groups > 1 else 0)
        if choose.random() < 0.1:
            w.abort(f"request-{choose.randrange(i + 1)}", FinishReason.ABORTED)
        if choose.random() < 0.05:
            group = choose.randrange(groups) if groups > 1 else 0
            w.crash(group=group)
            w.ready(group)
        w.tick(0.05)
    w.run()
    w.check_ends()
    return w


def replay(events: list[Event]) -> list[list[Instruction]]:
    scheduler = Scheduler(CONFIG)
    return [scheduler.handle(event) for event in events]


def digest(answers: list[list[Instruction]]) -> str:
    hasher = hashlib.sha256()
    for answer in answers:
        hasher.update(msgspec.msgpack.encode(answer))
    return hasher.hexdigest()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_same_bytes_under_another_hash_seed(groups: int, tmp_path: Path) -> None:
    w = record(seed=4, groups=groups)
    assert w.scheduler.stats().preemptions > 0
    assert w.scheduler.stats().cached_tokens > 0
    assert w.scheduler.stats().recoveries > 0
    log = tmp_path / "log.msgpack"
    log.write_bytes(msgspec.msgpack.encode(w.log))
    digests = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.engine.test_replay", str(log)]
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
        digests.append(ran.stdout.split())
    plans = sum(isinstance(i, StepPlan) for answer in w.answers for i in answer)
    assert digests == [[digest(w.answers), str(plans)]] * 2


def main() -> None:
    """python -m tests.engine.test_replay LOG: the digest of all instructions, and how many were plans."""
    events = msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=list[Event])
    answers = replay(events)
    print(digest(answers), sum(isinstance(i, StepPlan) for answer in answers for i in answer))


if __name__ == "__main__":
    main()
