"""The configuration as an operator is told it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from protos import adapter_files
from scheduler_svc import config
from scheduler_svc.flags import build_parser
from scheduler_svc.settings import HIDDEN, SECRET, effective


def test_every_setting_is_told_as_it_came_to_be(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenant.a]\nweight = 2\n")
    told = dict(effective(config.parse(["fake:", "--max-num-seqs", "5", "--tenants", str(tenants)])))
    assert told["port"] == "50051"
    assert told["loop.engine.max_num_seqs"] == "5"
    assert told["loop.engine.max_step_tokens"] == "256", "what 0 came to"
    assert (told["loop.engine.tenants[0].name"], told["loop.engine.tenants[0].weight"]) == ("a", "2")
    assert told["loop.setup.model"] == "fake:"
    gpu = "--gpu-memory-utilization 0.9 --attention-backend auto"
    assert told["loop.worker_arguments"] == f"--backend auto --device auto --cpu-isa auto {gpu}"
    assert (told["loop.record.file"], told["loop.workers"], told["stream_interval"]) == ("", "1", "0.025")


def test_every_flag_can_be_seen_in_it(tmp_path: Path) -> None:
    """A flag that changes nothing here changes nothing anywhere, or the dump is not whole."""
    values = {"--record": "log", "--listen": "tcp://127.0.0.1:5", "--otlp-endpoint": "http://h:1"}
    values |= {"--depth": "3", "--max-step-tokens": "512", "--frontends": "2", "--workers": "2"}
    values |= {"--tensor-parallel-size": "2", "--device": "cuda:1", "--gpu-memory-utilization": "0.5"}
    values |= {"--vllm-listen": "127.0.0.1:7", "--num-drafts": "3", "--draft-model": "fake:", "--speculation": "ngram"}
    for name in (adapter_files.CONFIG, adapter_files.WEIGHTS):
        (tmp_path / name).write_text("{}")
    values |= {"--adapter": f"one={tmp_path}"}
    needs = {
        "--adapter": ["--max-adapters", "1"],
        "--max-adapter-rank": ["--max-adapters", "1"],
        "--num-drafts": ["--speculation", "ngram"],
        "--draft-model": ["--speculation", "draft"],
        "--tls-cert": ["--tls-key", "k"],
        "--tls-key": ["--tls-cert", "c"],
        "--tls-client-ca": ["--tls-cert", "c", "--tls-key", "k"],
        "--curve-keys": ["--listen", "tcp://127.0.0.1:5"],
    }
    # What these need does something by itself.
    partial = {"--tls-client-ca", "--curve-keys", "--num-drafts", "--adapter", "--max-adapter-rank"}
    plain = _chosen(["fake:"])
    for action in build_parser()._actions:
        flag = next((option for option in action.option_strings if option.startswith("--")), "")
        if not flag or flag in {"--help", "--tenants", "--enable-prefix-caching"}:
            continue
        value = values.get(flag) or (str(list(action.choices)[-1]) if action.choices else "300")
        arguments = [flag] if action.nargs == 0 else [flag, value]
        without = _chosen(["fake:", *needs[flag]]) if flag in partial else plain
        assert _chosen(["fake:", *arguments, *needs.get(flag, [])]) != without, arguments


def _chosen(arguments: list[str]) -> dict[str, str]:
    told = dict(effective(config.parse(arguments)))
    return {name: value for name, value in told.items() if name not in ("loop.setup.epoch", "loop.record.clock")}


def test_secrets_are_named_and_not_told() -> None:
    @dataclass(frozen=True)
    class Inner:
        key: bytes = b"raw"
        token: str = field(default="t0ken", metadata=SECRET)
        parts: tuple[bytes, ...] = (b"raw", b"")

    @dataclass(frozen=True)
    class Outer:
        name: str = "n"
        inner: Inner = field(default_factory=Inner)

    told = dict(effective(cast(Any, Outer())))
    hidden = {"inner.key": HIDDEN, "inner.token": HIDDEN, "inner.parts[0]": HIDDEN, "inner.parts[1]": ""}
    assert told == {"name": "n", **hidden}
