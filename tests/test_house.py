"""Rules that no single room can keep: who imports whom when it runs, what is generated, what is locked."""

from __future__ import annotations

import ast
import filecmp
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.models import checkpoints

ROOT = Path(__file__).parent.parent

# Prints every top-level package that importing the given modules brings in; a trailing `.*` means all below it as well.
LOADED = """
import importlib, pkgutil, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    module = importlib.import_module(name.removesuffix(".*"))
    if name.endswith(".*"):
        for found in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
            importlib.import_module(found.name)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""

SEAM = [
    *("worker_svc.__main__", "worker_svc.config", "worker_svc.worker", "worker_svc.link", "worker_svc.slots"),
    *("worker_svc.inputs", "worker_svc.results", "worker_svc.backends", "worker_svc.backends.base"),
    *("worker_svc.models.checkpoint", "worker_svc.models.gguf", "worker_svc.models.safetensors_reader"),
]
IO = {"grpc", "zmq", "torch", "numpy", "asyncio", "socket"}
OUR = {"protos", "pagewire", "kernels", "scheduler_svc", "worker_svc", "client", "tests", "benchmarks"}


def loaded(*modules: str) -> set[str]:
    command = [sys.executable, "-c", LOADED, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "ours", "never"),
    [
        (["protos.wire", "protos.engine_wire", "protos.codec"], {"protos"}, IO),
        (
            ["scheduler_svc.engine.*"],
            {"protos", "scheduler_svc"},
            IO,
        ),
        (["scheduler_svc.*"], {"protos", "pagewire", "scheduler_svc"}, {"torch", "transformers"}),
        (SEAM, {"protos", "worker_svc"}, {"torch", "grpc", "google", "transformers"}),
        (["worker_svc.*"], {"protos", "worker_svc", "kernels"}, {"grpc", "google"}),
        (["client.*"], {"pagewire", "client"}, {"torch", "transformers", "zmq", "msgspec"}),
        (["kernels.*"], {"kernels"}, {"grpc", "zmq", "transformers"}),
        (["kernels.cpu.*"], {"kernels"}, {"grpc", "zmq", "transformers", "torch", "triton", "msgspec"}),
    ],
    ids=["wire", "engine", "scheduler", "worker-above-the-seam", "worker", "client", "kernels", "kernels-cpu"],
)
def test_a_process_loads_what_its_package_may_know(modules: list[str], ours: set[str], never: set[str]) -> None:
    found = loaded(*modules)
    assert found & OUR <= ours
    assert not found & never


def test_the_cpu_backend_serves_without_torch(tmp_path: Path) -> None:
    """From a checkpoint, packing it, to a sampled token; and again from what was packed."""
    checkpoints.save(tmp_path, LlamaConfig(**checkpoints.SMALL))
    script = """
import sys
from pathlib import Path
import worker_svc.__main__
from protos.wire import Admit, Epoch, Row, Sampling, Setup, StepPlan
from worker_svc import backends
from worker_svc.backends.base import Options
epoch = Epoch(1, 1)
setup = Setup(epoch, sys.argv[1], quantization="int8", kv_bytes=1 << 20, max_slots=4, threads=1)
backend = backends.create("auto", setup, Options(Path(sys.argv[1])))
assert backend.load(setup, lambda phase, share: None).backend == "cpu"
sampling = Sampling(max_tokens=1, logprobs=1, prompt_logprobs=0)
backend.forward(StepPlan(epoch, 1, [], [Admit(1, [3, 4, 5], 3, [[1]], sampling)], [], [Row(1, 0, 3, sample=True)]))
assert len(backend.sample(None)[0].token_ids) == 1
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    for _ in range(2):
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout.split()) & {"torch", "triton", "transformers", "safetensors", "gguf", "grpc"}


def test_wire_and_engine_need_nothing_but_msgspec() -> None:
    """typing_extensions comes with msgspec."""
    found = loaded("protos.wire", "protos.engine_wire", "protos.codec", "scheduler_svc.engine.*")
    assert found - sys.stdlib_module_names == {"msgspec", "protos", "scheduler_svc", "typing_extensions"}


def test_the_command_line_starts_without_grpc() -> None:
    assert not loaded("client.cli", "client.commands.serve", "client.commands.model") & {"grpc", "rich", "google"}


def test_transformers_still_works_beside_our_kernels(tmp_path: Path) -> None:
    """It probes for a package `kernels` of the index, and must not take ours for it."""
    script = """
import sys, kernels, torch, transformers
assert kernels.__file__ == sys.argv[1], kernels.__file__
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
made = transformers.LlamaForCausalLM(config)
made.save_pretrained(sys.argv[2])
loaded = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = torch.tensor([[1, 2, 3]])
assert torch.equal(made(ids).logits, loaded(ids).logits)
assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
"""
    command = [sys.executable, "-c", script, str(ROOT / "kernels/__init__.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "kernels/__init__.py").read_text() == "", "it is imported by whoever probes for `kernels`"


def test_the_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    make = ["make", "--silent", "--old-file=.venv/dev", "stubs", f"BIN={tools}", f"OUT={tmp_path}"]
    subprocess.run(make, cwd=ROOT, timeout=100, check=True)
    committed = ROOT / "protos/pagewire/v1"
    names = {path.name for path in committed.iterdir() if "_pb2" in path.name}
    assert names == {path.name for path in (tmp_path / "pagewire/v1").iterdir()}
    _, different, missing = filecmp.cmpfiles(committed, tmp_path / "pagewire/v1", sorted(names), shallow=False)
    assert not different + missing, "run make stubs"


@pytest.mark.parametrize("lock", sorted(ROOT.glob("*.lock")), ids=lambda path: path.name)
def test_a_lock_pins_hashes_and_names_no_host(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.lstrip().startswith("#")]
    pins = [line for line in lines if not line.startswith(" ")]
    assert pins
    assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==[^ ]+( ; .+)? \\", pin) for pin in pins), pins
    hashes = [line for line in lines if line.startswith(" ")]
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)
    assert "://" not in lock.read_text()


def test_the_locks_hold_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, asked in (
        ("requirements.lock", project["dependencies"] + extras["build"]),
        ("requirements-dev.lock", project["dependencies"] + [one for extra in extras.values() for one in extra]),
    ):
        pinned = dict(re.findall(r"^([a-z0-9._-]+)==([^ ]+)", (ROOT / lock).read_text(), re.MULTILINE))
        names = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in asked}
        assert not names - {"pagewire"} - set(pinned), f"run make lock: {lock} lacks them"
        heavy = {"torch", "triton", "transformers", "safetensors"}
        assert heavy & set(pinned) == (heavy if lock == "requirements-dev.lock" else set())
    assert pinned["torch"].startswith(("2.11.", "2.12.", "2.13."))


def test_nothing_in_the_engine_depends_on_the_hash_seed() -> None:
    """Its plans are replayed under other seeds; `hash()` of a str or bytes differs between processes."""
    for file in (ROOT / "scheduler_svc/engine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            assert called not in {"hash", "id"}, f"{file.name}:{node.lineno}" if isinstance(node, ast.Call) else ""


def test_make_help_lists_what_there_is() -> None:
    """And nothing that is not: every target of the list is a rule."""
    done = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "serve", "test", "test-full", "nightly", "bench", "help"} <= set(listed) <= rules
