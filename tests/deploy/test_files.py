"""What is in deploy/ and compose.yaml says what our own command lines, and the tools that read it, understand."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from scheduler_svc import config as scheduler_config
from worker_svc import config as worker_config

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
KUBERNETES = "1.31"


def objects(kind: str = "") -> list[dict[str, Any]]:
    found = [item for path in MANIFESTS for item in yaml.safe_load_all(path.read_text())]
    return [item for item in found if not kind or item["kind"] == kind]


def compose() -> dict[str, Any]:
    """With every variable at its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def pod() -> dict[str, Any]:
    (workload,) = objects("StatefulSet")
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


# ---------------------------------------------------------------- kubernetes


def test_every_manifest_is_valid() -> None:
    for item in objects():
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    kinds = {item["kind"] for item in objects()}
    assert kinds == {
        *("ServiceAccount", "Service", "StatefulSet", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy")
    }


def test_a_misspelt_field_would_be_found() -> None:
    (workload,) = objects("StatefulSet")
    spoiled = deepcopy(workload)
    spoiled["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoiled, KUBERNETES, strict=True)


def test_whatever_selects_pods_selects_ours() -> None:
    (workload,) = objects("StatefulSet")
    labels = workload["spec"]["template"]["metadata"]["labels"].items()
    selectors = [item["spec"]["selector"] for item in objects("Service")]
    selectors += [item["spec"]["selector"]["matchLabels"] for item in (workload, *objects("PodDisruptionBudget"))]
    selectors += [item["spec"]["podSelector"]["matchLabels"] for item in objects("NetworkPolicy")]
    assert len(selectors) == 4
    assert all(selector.items() <= labels for selector in selectors)
    target = objects("HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"])


def test_every_container_is_locked_in() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    for container in pod()["initContainers"] + pod()["containers"]:
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] is True
        assert locked["allowPrivilegeEscalation"] is False
        assert locked["capabilities"] == {"drop": ["ALL"]}
    assert pod()["automountServiceAccountToken"] is False


def test_every_volume_that_is_mounted_is_there() -> None:
    (workload,) = objects("StatefulSet")
    claims = [claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]]
    there = {volume["name"] for volume in pod()["volumes"]} | set(claims)
    mounted = {mount["name"] for container in pod()["containers"] for mount in container["volumeMounts"]}
    assert mounted == there


def test_both_ends_of_the_pod_meet_and_drain_in_time() -> None:
    scheduler, worker = pod()["containers"]
    parsed = serve(scheduler["args"])
    assert worker["command"] == ["python", "-m", "worker_svc"]
    assert worker_config.parse(worker["args"]).connect == parsed.loop.listen
    assert parsed.drain_timeout < pod()["terminationGracePeriodSeconds"]
    directory = pod()["initContainers"][0]["command"][-1]
    assert parsed.loop.listen == f"ipc://{directory}/workers"


def serve(arguments: list[str]) -> scheduler_config.ServiceConfig:
    """As the scheduler reads it; exits where it refuses. MODEL is the store's, so it stays out."""
    assert arguments[:2] == ["serve", "smollm2-135m"]
    return scheduler_config.parse(["fake:", *arguments[2:]])


# ---------------------------------------------------------------- compose


def ours() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, service in compose()["services"].items():
        if service["image"].startswith("localhost/pagewire"):
            yield name, service


def test_scheduler_and_workers_of_compose_meet() -> None:
    services = compose()["services"]
    parsed = serve(services["scheduler"]["command"])
    assert parsed.drain_timeout < 120, "stop_grace_period is 2m"
    workers = [name for name in services if name.startswith("worker")]
    assert workers == ["worker", "worker-tcp", "worker-nvidia", "worker-amd"]
    for name in set(workers) - {"worker-tcp"}:
        service = services[name]
        assert service["entrypoint"][:3] == ["python", "-m", "worker_svc"]
        assert worker_config.parse([*service["entrypoint"][3:], *service["command"]]).connect == parsed.loop.listen
        assert service["network_mode"] == "none"


def test_what_runs_by_default_needs_nothing_special() -> None:
    assert [name for name, service in compose()["services"].items() if "profiles" not in service] == [
        "scheduler",
        "worker",
    ]


def test_every_service_is_locked_in_and_waits_for_nobody() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "user", "depends_on"} & service.keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for name, _ in ours():
        assert name, "there is one"
    assert "\nUSER 10001:10001\n" in (ROOT / "deploy/Dockerfile").read_text()


def test_every_volume_of_compose_is_there() -> None:
    read = compose()
    mounted = {volume.split(":")[0] for service in read["services"].values() for volume in service.get("volumes", [])}
    named = {volume for volume in mounted if not volume.startswith(".")}
    assert named == set(read["volumes"])


# ---------------------------------------------------------------- systemd

UNIT = ROOT / "deploy/systemd/pagewire.service"
ANALYZE = shutil.which("systemd-analyze")


def test_the_unit_serves_with_flags_that_there_are() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/pagewire/bin/pagewire serve (.*) \$PAGEWIRE_FLAGS$", UNIT.read_text(), re.M)
    parsed = scheduler_config.parse(["fake:", *line.replace("%S", "/var/lib").split()])
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert parsed.drain_timeout < int(patience)
    assert str(parsed.loop.record.crash_dir) == "/var/lib/pagewire/crashes"


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here: the unit is not verified")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With a program that is there: it looks for it."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/pagewire/bin/pagewire", shutil.which("true") or "")
    unit.write_text(text.replace("Documentation=file:/opt/pagewire/README.md\n", ""))
    done = analyze("verify", "--man=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(text.replace("ProtectSystem=strict", "ProtectSistem=strict"))
    assert "ProtectSistem" in analyze("verify", "--man=no", str(unit)).stderr, "or it finds nothing at all"


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here: the unit's exposure is not rated")
def test_systemd_finds_the_unit_little_exposed() -> None:
    """Of 100: an empty unit is rated 96."""
    done = analyze("security", "--offline=yes", "--threshold=25", str(UNIT))
    assert done.returncode == 0, done.stdout[-500:]


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, check=False, timeout=60)
