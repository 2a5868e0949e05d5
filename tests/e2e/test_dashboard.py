"""The Grafana board: each query is of a metric that there is, and returns data from a live Prometheus."""

from __future__ import annotations

import json
import re

import pytest

from protos.engine_wire import EngineStats, ServiceStatus
from scheduler_svc.metrics_page import Page
from tests.e2e.dashboard import BOARD, check, prometheus_path, queries

METRIC = re.compile(r"(?:vllm:|pagewire_|grpc_server_|process_)[a-z0-9_]+")


def test_every_query_names_a_metric_of_the_page() -> None:
    page = Page(lambda: ServiceStatus(True, "", None, [], EngineStats()), "m", {})
    known = {"process_cpu_seconds_total", "process_resident_memory_bytes"}  # of the client library itself
    for family in page.collect():
        match family.type:
            case "histogram":
                known |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case "counter":
                known.add(f"{family.name}_total")
            case _:
                known.add(family.name)
    asked = {name for query in queries() for name in METRIC.findall(query.expression)}
    assert asked
    assert not asked - known


def test_the_board_is_one_that_grafana_takes() -> None:
    board = json.loads(BOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in board["panels"])
    sources = {t["datasource"]["uid"] for p in board["panels"] for t in p.get("targets", [])}
    assert sources == {"prometheus"}, "the one that is provisioned"


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_every_query_of_the_board_returns_data() -> None:
    if not prometheus_path():
        pytest.skip("no `prometheus`: Debian's package has it, or PAGEWIRE_PROMETHEUS names one")
    answers = await check()
    assert answers
    assert not [f"{a.query.panel}: {a.values} for {a.query.expression}" for a in answers if not a.is_whole]
