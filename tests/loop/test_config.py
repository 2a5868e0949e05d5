"""The command line: what is set, and what is refused with one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scheduler_svc import config
from scheduler_svc.engine.config import Tenant

ROOT = Path(__file__).parents[2]


def test_every_flag_reaches_its_place(tmp_path: Path) -> None:
    flags = (
        "--host 127.0.0.2 --port 1234 --served-model-name m --device cpu --backend torch --dtype float32 "
        "--gpu-memory-utilization 0.8 --attention-backend triton --enforce-eager --batch-invariant --activations int8 "
        "--max-model-len 100 --max-num-seqs 5 --max-step-tokens 50 --max-waiting 7 --max-waiting-tokens 700 "
        "--kv-cache-gib 0.5 --block-size 16 --depth 2 --no-enable-prefix-caching --listen tcp://127.0.0.1:5555 "
        "--threads 3 --step-deadline 4 --load-deadline 5 --drain-timeout 6 --stream-interval 7.5 --record log "
        "--record-mib 8 --record-private --crash-dir crashes --crash-mib 2 --frontends 3 --workers 2 "
        "--quantization int4 --kv-cache-dtype int8 --cpu-isa avx2 --slow-reader-timeout 8 "
        "--metrics-port 9090 --log-format json --log-level warning --otlp-endpoint http://localhost:4317"
    )
    (tmp_path / "model.gguf").touch()
    parsed = config.parse([str(tmp_path / "model.gguf"), *flags.split()])
    assert (parsed.host, parsed.port, parsed.served_name, parsed.drain_timeout) == ("127.0.0.2", 1234, "m", 6)
    assert (parsed.stream_interval, parsed.slow_reader_timeout, parsed.frontends) == (0.0075, 8, 3)
    loop, engine, setup = parsed.loop, parsed.loop.engine, parsed.loop.setup
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_step_tokens, engine.max_waiting) == (100, 5, 50, 7)
    assert engine.max_waiting_tokens == 700
    assert (engine.block_size, engine.depth, engine.prefix_caching) == (16, 2, False)
    assert engine.long_step == 5, "all decode at once in a step that is not long"
    assert (engine.short_step, engine.short_depth) == (config.SHORT_STEP, 4)
    assert (setup.model, setup.dtype, setup.kv_bytes) == (str(tmp_path / "model.gguf"), "float32", 1 << 29)
    assert (setup.block_size, setup.max_slots, setup.max_model_len) == (16, engine.max_slots, 100)
    assert (setup.max_step_tokens, setup.threads, setup.sharing) == (50, 3, 2)
    assert (setup.quantization, setup.kv_dtype, setup.batch_invariant) == ("int4", "int8", True)
    assert setup.activations == "int8"
    expected = (
        "--backend torch --device cpu --cpu-isa avx2 --gpu-memory-utilization 0.8 --attention-backend triton "
        "--enforce-eager"
    )
    assert loop.worker_arguments == tuple(expected.split())
    assert (loop.listen, loop.workers, loop.step_deadline, loop.load_deadline) == ("tcp://127.0.0.1:5555", 2, 4, 5)
    record = loop.record
    assert (record.file, record.mib, record.crash_dir, record.crash_mib) == (Path("log"), 8, Path("crashes"), 2)
    assert len(record.key) == 32
    assert not config.parse([str(tmp_path / "model.gguf")]).loop.record.key
    assert loop.relay_workers
    assert (parsed.metrics_port, parsed.otlp_endpoint) == (9090, "http://localhost:4317")
    assert (parsed.log_format, parsed.log_level) == ("json", "warning")


def test_memory_of_the_host_reaches_the_worker() -> None:
    assert config.parse(["fake:", "--kv-host-gib", "1.5"]).loop.setup.kv_host_bytes == 3 << 29
    assert config.parse(["fake:"]).loop.setup.kv_host_bytes == 0


@pytest.mark.parametrize(
    ("path", "name"), [("Qwen2.5-0.5B-Instruct/", "Qwen2.5-0.5B-Instruct"), ("SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1")]
)
def test_a_model_is_served_by_its_name(path: str, name: str, tmp_path: Path) -> None:
    if path.endswith("/"):
        (tmp_path / path).mkdir()
    else:
        (tmp_path / path).touch()
    assert config.parse([f"{tmp_path}/{path}"]).served_name == name


def test_tenants_come_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    text = "output_cost = 3\n[default]\nweight = 0.5\n[tenant.'a b']\n"
    file.write_text(text + "[tenant.search]\nweight = 3\ntokens_per_second = 5\nburst = 9\nbest_priority = 0\n")
    engine = config.parse(["fake:", "--tenants", str(file)]).loop.engine
    assert engine.tenants == (Tenant("a b", 1.0), Tenant("search", 3.0, 5.0, 9.0, 0.0))
    assert engine.default_tenant == Tenant("", 0.5)
    assert (engine.prompt_cost, engine.output_cost) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tenant.a]\nweight = 0", "weight of tenant 'a' is 0: must be in 0.001..1000"),
        (
            "[tenant.a]\nwieght = 1",
            "[tenant.a] has 'wieght': known are weight, tokens_per_second, burst, best_priority",
        ),
        ("[tenant.a]\nburst = 1", "tenant 'a' has tokens_per_second 0 and burst 1: a quota is both"),
        ("[default]\ntokens_per_second = 1", "tenant '' has tokens_per_second 1 and burst 0: a quota is both"),
        ("[tenant.a]\nburst = -1", "burst of tenant 'a' is -1: must be in 0..1e12"),
        ("[tenants.a]\nweight = 1", "the file has 'tenants': known are prompt_cost, output_cost, default, tenant"),
        ("[default]\nweight = '1'", "default.weight is '1': must be a number"),
        ("[default]\nweight = true", "default.weight is True: must be a number"),
        ("tenant = 3", "tenant is 3: must be a table"),
        ("prompt_cost = 0", "prompt_cost is 0: must be over 0 and at most 1000"),
        ("weight", "Expected '=' after a key"),
    ],
)
def test_a_tenants_file_that_says_nonsense_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        config.parse(["fake:", "--tenants", str(file)])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_tenants_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(["fake:", "--tenants", str(tmp_path / "none.toml")])
    assert "none.toml" in capsys.readouterr().err


def test_access_flags_reach_their_place(tmp_path: Path) -> None:
    flags = "--tls-cert c --tls-key k --tls-client-ca a --tokens t --vllm-listen 127.0.0.1:7 --max-connection-age 60"
    access = config.parse(["fake:", *flags.split()]).access
    assert access == config.Access(Path("c"), Path("k"), Path("a"), Path("t"), "127.0.0.1:7", 60.0)
    assert config.parse(["fake:"]).access == config.Access()


@pytest.mark.parametrize(
    ("flags", "directory"),
    [
        ("", None),
        ("--listen tcp://127.0.0.1:5", None),
        ("--listen tcp://[::1]:5", None),
        ("--listen tcp://localhost:*", None),
        ("--listen ipc:///here", None),
        ("--listen tcp://0.0.0.0:5", "home/curve"),
        ("--listen tcp://[::]:5", "home/curve"),
        ("--listen tcp://*:5", "home/curve"),
        ("--listen tcp://example.org:5", "home/curve"),
        ("--listen tcp://0.0.0.0:5 --curve-keys HERE/keys", "keys"),
        ("--listen tcp://127.0.0.1:5 --curve-keys HERE/keys", "keys"),
    ],
)
def test_links_that_others_can_reach_have_keys(
    flags: str, directory: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    parsed = config.parse(["fake:", *flags.replace("HERE", str(tmp_path)).split()])
    assert parsed.loop.curve_keys == (tmp_path / directory if directory else None)


@pytest.mark.parametrize("flags", ["--tokens t", "--tls-cert c --tls-key k"])
def test_a_gateway_that_asks_nobody_stays_on_this_host(flags: str) -> None:
    plain = config.parse(["fake:", *["--host", "0.0.0.0", "--openai-port", "8000"]])
    assert (plain.gateway and plain.gateway.host, plain.access.router_listen) == ("0.0.0.0", "")
    guarded = config.parse(["fake:", *f"--host 0.0.0.0 --openai-port 8000 {flags}".split()])
    assert (guarded.gateway and guarded.gateway.host, guarded.access.router_listen) == ("127.0.0.1", "127.0.0.1:0")


def test_ranks_share_the_host_and_wait_longer_than_any_deadline() -> None:
    flags = "--tensor-parallel-size 2 --workers 3 --step-deadline 7 --load-deadline 40"
    loop = config.parse(["fake:", *flags.split()]).loop
    assert (loop.setup.tp_size, loop.setup.sharing) == (2, 6)
    assert loop.worker_arguments[-2:] == ("--rank-deadline", "80")


def test_boot_ids_differ() -> None:
    assert config.parse(["fake:"]).loop.setup.epoch != config.parse(["fake:"]).loop.setup.epoch


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--quantization int5", "--quantization: invalid choice: 'int5'"),
        ("--kv-cache-dtype int3", "--kv-cache-dtype: invalid choice: 'int3'"),
        ("--tensor-parallel-size 0", "0 is not in 1..64"),
        ("--tensor-parallel-size 2 --workers 0 --listen ipc:///here", "--tensor-parallel-size 2 goes with --workers 1"),
        ("--frontends 0", "0 is not in 1..64"),
        ("--frontends 65", "65 is not in 1..64"),
        ("--frontends 2 --openai-port 8000", "--openai-port 8000 goes with --frontends 1"),
        ("--workers 65", "65 is not in 0..64"),
        ("--speculation magic", "--speculation"),
        ("--speculation draft", "--speculation draft needs --draft-model"),
        ("--speculation eagle3 --draft-model no-such", "--draft-model 'no-such': no such file"),
        ("--draft-model x", "--draft-model x goes with --speculation draft or eagle3"),
        ("--speculation ngram --num-drafts 64", "64 is not in 1..63"),
        ("--adapter a", "--adapter 'a' is not NAME=PATH: there is no PATH"),
        ("--adapter =/x", "is not NAME=PATH: is empty"),
        ("--max-adapters 1 --adapter a=/nowhere", "/nowhere/adapter_config.json: No such file"),
        ("--max-adapter-rank 8", "--max-adapter-rank 8 goes with --max-adapters"),
        ("--dtype float16", "float16"),
        ("--port 65536", "65536 is not in 0..65535"),
        ("--max-num-seqs 0", "0 is not in 1.."),
        ("--max-num-seqs many", "many"),
        ("--max-num-seqs 600 --max-step-tokens 512", "max_step_tokens is 512: must be at least"),
        ("--kv-cache-gib -1", "-1 is not in"),
        ("--kv-cache-gib nan", "nan is not in"),
        ("--kv-host-gib -1", "-1 is not in"),
        ("--kv-host-gib 2 --no-enable-prefix-caching", "--kv-host-gib 2 holds what prefixes are found in"),
        ("--stream-interval -1", "-1 is not in"),
        ("--step-deadline 0", "0 is not over 0"),
        ("--step-deadline -1", "-1 is not over 0"),
        ("--load-deadline 0", "0 is not over 0"),
        ("--load-deadline nan", "nan is not over 0"),
        ("--max-waiting-tokens 0", "0 is not in 1.."),
        ("--listen http://localhost:5", "neither ipc"),
        ("--listen ipc://here", "neither ipc"),
        ("--listen ipc://@here", "neither ipc"),
        ("--listen tcp://127.0.0.1:65536", "neither ipc"),
        ("--curve-keys keys", "--curve-keys goes with --listen tcp"),
        ("--curve-keys keys --listen ipc:///here", "not with ipc:///here"),
        ("--tls-cert a.pem", "--tls-cert and --tls-key go together"),
        ("--tls-key a.pem", "--tls-cert and --tls-key go together"),
        ("--tls-client-ca a.pem", "--tls-client-ca needs --tls-cert"),
        ("--vllm-listen 5000", "'5000' is not HOST:PORT"),
        ("--vllm-listen localhost:x", "is not HOST:PORT"),
        ("--max-connection-age -1", "-1 is not in"),
        ("--workers 0", "--listen"),
        ("--metrics-port 65536", "65536 is not in 0..65535"),
        ("--log-level loud", "--log-level: invalid choice: 'loud'"),
        ("--log-format xml", "--log-format: invalid choice: 'xml'"),
        ("--otlp-endpoint localhost:4317", "'localhost:4317' is not http://HOST:PORT"),
        ("--otlp-endpoint http://localhost", "'http://localhost' is not http://HOST:PORT"),
        ("--otlp-endpoint http://localhost:port", "'http://localhost:port' is not http://HOST:PORT"),
        ("--otlp-endpoint http://me:secret@localhost:4317", "is not http://HOST:PORT"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_refusals_are_one_line(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        config.parse(["fake:", *flags.split()])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_missing_model_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        config.parse(["/no/such/model.gguf"])
    assert exit_.value.code == 2
    assert "/no/such/model.gguf" in capsys.readouterr().err


def test_the_scheduler_imports_no_torch() -> None:
    script = (
        "import sys, scheduler_svc.__main__, scheduler_svc.frontend.server\n"
        "print(*({'torch', 'worker_svc', 'client'} & {m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""
