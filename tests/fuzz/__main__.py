"""Throws mutated messages at every RPC and at the ZeroMQ sockets: `python -m tests.fuzz --count 50000`.

Half of them go to the RPCs, the rest to the scheduler's sockets for workers and for frontends (9 of 10), and to a
worker. What ends INTERNAL, UNKNOWN, UNAVAILABLE, or not at all, is kept in tests/fuzz/corpus and thrown again by the
tests.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import doors
from tests.fuzz.links import FAKE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = time.time_ns() % (1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    calls = arguments.count // 2
    frames = (arguments.count - calls) * 9 // 20  # at either socket
    told = asyncio.run(doors.throw_at_rpcs(calls, seed, lambda line: print(line, flush=True)))
    for path, counter in sorted(told.findings.counts.items()):
        print(f"{path:60} " + ", ".join(f"{status} {count}" for status, count in counter.most_common()))
    for shot, status in told.findings.bad[:20]:
        print(f"BAD {status}: {shot.path} {shot.data[:200].hex()} {shot.metadata}")
    doors.keep(told.findings.bad)
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(doors.throw_at_scheduler(frames, seed, Path(directory)))
    asyncio.run(doors.throw_at_engine(frames, seed))
    print(f"{frames} frames at each of the scheduler's sockets: nothing came of them")
    plans = arguments.count - calls - 2 * frames
    liar = doors.throw_at_worker(plans, seed, FAKE, "--backend", "fake")
    print(f"{plans} plans that lie: {liar.faults} faults, {liar.results} results, one worker all along")
    statuses = sum(told.findings.counts.values(), Counter[str]())
    print(f"{told.findings.total} calls: {dict(statuses)}; scheduler {told.early_mib:.0f} → {told.late_mib:.0f} MiB")
    return 1 if told.findings.bad else 0


if __name__ == "__main__":
    sys.exit(main())
