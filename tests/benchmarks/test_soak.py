"""What half an hour has found is written down, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.soak import Day, Moment, draw, record_of


def test_a_day_is_kept(tmp_path: Path) -> None:
    day = Day(kills=[60.0], seen={3: [1, 2]})
    day.counts["greedy"].update(["OK", "OK", "UNKNOWN"])
    day.moments += [Moment(2.0 * i, 80.0 + i, 500.0, 100 * i, 0) for i in range(20)]
    kept = json.loads(json.dumps(record_of(day)))
    assert kept["counts"]["greedy"] == {"OK": 2, "UNKNOWN": 1}
    assert kept["moments"][-1]["scheduler_mib"] == 99.0
    assert kept["kills"] == [60.0]
    assert kept["slope_mib_an_hour"] > 0
    assert "seen" not in kept
    draw(tmp_path / "day.png", day)
    assert (tmp_path / "day.png").stat().st_size > 10_000
