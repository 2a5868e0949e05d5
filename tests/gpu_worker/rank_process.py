"""One rank of a group on the device of the tests:

    python -m tests.gpu_worker.rank_process RANK SIZE MEETING PATH [ADAPTER]

Prints the tokens and log probabilities of a checkpoint's streams as JSON, half of them with the adapter.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from msgspec.structs import replace

from protos.wire import LoadAdapter
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import EPOCH, Plans
from tests.gpu_worker.test_backend import setup
from worker_svc.gpu.backend import GpuBackend

Rows = list[tuple[list[int], float]]  # tokens of a row, and the first's log probability


def computed(path: Path, rank: int = 0, size: int = 1, meeting: str = "", adapter: str = "") -> list[Rows]:
    """Of each step: two in flight, steps of one token a row replayed, half of the streams drawn."""
    place = FakePlace(random.Random(rank))
    backend = GpuBackend(place, lambda: None, 0.5, (1, 2), "torch", patience=60.0)
    asked = setup(
        path, max_slots=2, tp_rank=rank, tp_size=size, tp_address=meeting,
        max_adapters=bool(adapter), max_adapter_rank=16 * bool(adapter),
    )  # fmt: skip
    backend.load(asked, lambda phase, share: None)
    if adapter:
        backend.load_adapter(LoadAdapter(EPOCH, 0, "one", "", adapter))
    wishes = [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 20}]
    plans = Plans(random.Random(5), vocab=151, slots=2, chunk=25, outputs=(3, 4))
    flights = []
    for plan in plans.take(6, streams=2, wishes=wishes, logprobs=1):
        admits = [replace(each, adapter="one" if adapter and each.slot == 1 else "") for each in plan.admit]
        backend.forward(replace(plan, admit=admits))
        flights.append(backend.sample(None))
    answers = [
        [(row.token_ids, row.logprobs[0].logprob) for row in flight.rows() if row.logprobs] for flight in flights
    ]
    backend.close()
    return answers


def main() -> None:
    rank, size, meeting, path, *adapter = sys.argv[1:]
    print(json.dumps(computed(Path(path), int(rank), int(size), meeting, *adapter)))


if __name__ == "__main__":
    main()
