"""The command line as a process: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.commands.serve import SWITCHES, _find_model
from tests.client.scripted import PATIENCE, ScriptedServer

CLI = [sys.executable, "-m", "client.cli"]


def pagewire(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_generate_streams_text(server: ScriptedServer) -> None:
    done = pagewire(
        "generate", "one two", "--address", server.address, "--temperature", "0", "--stop", "x", "--ignore-eos"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one two \n", "")
    sampling = server.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, list(sampling.stop), sampling.ignore_eos) == (
        0,
        256,
        ["x"],
        True,
    )
    assert not sampling.HasField("top_p")


def test_generate_reads_a_prompt_from_standard_input(server: ScriptedServer) -> None:
    done = pagewire("generate", "-", "--address", server.address, stdin="from a pipe")
    assert done.stdout == "from a pipe \n"


def test_generate_json_is_one_object(server: ScriptedServer) -> None:
    done = pagewire("generate", "one two one", "--json", "--seed", "18446744073709551615", "--address", server.address)
    assert json.loads(done.stdout) == {
        "request_id": "r1",
        "seed": 18446744073709551615,
        "text": "one two one ",
        "token_ids": [0, 1, 0],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 3},
        "seconds": {"first_token": 0.0, "total": 1.0},
    }


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("bad", "sampling.temperature: -1 is below 0"),
        ("overloaded", "the queue is full (RESOURCE_EXHAUSTED); try again in 2 s"),
        ("lost", "the worker is gone (INTERNAL)"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(server: ScriptedServer, prompt: str, complaint: str) -> None:
    done = pagewire("generate", prompt, "--address", server.address)
    assert (done.returncode, done.stderr) == (1, f"pagewire: {complaint}\n")


def test_no_server_is_one_line(server: ScriptedServer) -> None:
    server.close()
    for command in (["generate", "x"], ["bench"]):
        done = pagewire(*command, "--address", server.address)
        assert (done.returncode, done.stderr) == (1, f"pagewire: no server answers at {server.address} (UNAVAILABLE)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--max-tokens", "-1"],
        ["generate", "x", "--seed", "18446744073709551616"],
        ["bench", "--workload", "z"],
        ["model"],
        ["model", "pull", "nonesuch"],
        ["serve", "nonesuch"],
        ["replay"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = pagewire(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr


@contextmanager
def running(*arguments: str, **pipes: int) -> Iterator[subprocess.Popen[str]]:
    """The command, which does not outlive a test that fails."""
    with subprocess.Popen([*CLI, *arguments], text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_cancels_on_the_server(server: ScriptedServer) -> None:
    command = ["generate", "forever", "--address", server.address]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(len("forever ")) == "forever "
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "pagewire: interrupted\n"
        assert process.wait(PATIENCE) == 1
    assert server.cancelled.wait(PATIENCE)


def test_a_reader_that_leaves_ends_it_quietly(server: ScriptedServer) -> None:
    prompt = " ".join(["word"] * 2000)
    command = ["generate", prompt, "--address", server.address]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 1


def test_chat_keeps_the_conversation(server: ScriptedServer) -> None:
    lines = "hello you\n\nand now\n/reset\nagain\n/quit\nnever said\n"
    done = pagewire("chat", "--system", "Be kind.", "--address", server.address, stdin=lines)
    assert (done.returncode, done.stdout) == (0, "hello you \nand now \nagain \n")
    said = [[(m.role, m.content) for m in request.chat.messages] for request in server.requests]
    assert said == [
        [("system", "Be kind."), ("user", "hello you")],
        [("system", "Be kind."), ("user", "hello you"), ("assistant", "hello you "), ("user", "and now")],
        [("system", "Be kind."), ("user", "again")],
    ]


def test_chat_goes_on_after_a_refused_message(server: ScriptedServer) -> None:
    done = pagewire("chat", "--address", server.address, stdin="hello\nbad\nagain\n")
    assert (done.returncode, done.stdout) == (0, "hello \nagain \n")
    assert done.stderr.startswith("pagewire: sampling.")
    assert [m.content for m in server.requests[-1].chat.messages] == ["hello", "hello ", "again"]


def test_bytes_that_are_no_text_are_wrong_usage(server: ScriptedServer) -> None:
    command = [*map(os.fsencode, CLI), b"generate", b"\xff", b"--address", server.address.encode()]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"pagewire: the input is not UTF-8")
    assert done.stderr.count(b"\n") == 1


def test_chat_in_a_terminal_survives_ctrl_c(server: ScriptedServer) -> None:
    """Ctrl-C stops the answer, not the conversation."""
    ours, theirs = pty.openpty()
    with running("chat", "--address", server.address, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        terminal = Terminal(ours)
        terminal.expect("> ")
        terminal.type("forever\n")
        terminal.expect("forever ")  # with its space it is the answer, not the echo of the keys
        process.send_signal(signal.SIGINT)
        terminal.expect("(stopped)")
        assert server.cancelled.wait(PATIENCE)
        terminal.expect("> ")
        terminal.type("on we go\n")
        terminal.expect("on we go ")
        terminal.expect("> ")
        terminal.type("\x04")
        assert process.wait(PATIENCE) == 0
    os.close(ours)


class Terminal:
    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.seen = descriptor, ""

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def expect(self, text: str) -> None:
        """Reads until `text` has come since the last match; the test's timeout is the limit."""
        while text not in self.seen:
            self.seen += os.read(self.descriptor, 1024).decode().replace("\r", "")
        self.seen = self.seen.partition(text)[2]


def test_model_list_says_what_is_here(tmp_path: Path) -> None:
    listing = [*CLI, "model", "list"]
    done = subprocess.run(
        listing,
        env=os.environ | {"PAGEWIRE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.fullmatch(r"smollm2-135m\t.*\t98 MB\t\(not pulled\)\n", done.stdout)


def test_model_inspect_is_the_workers(tmp_path: Path) -> None:
    """Its report and its exit code."""
    fixture = Path(__file__).parents[1] / "quantized" / "checkpoints" / "auto_round_awq_w4_g32"
    shown = pagewire("model", "inspect", str(fixture))
    assert shown.returncode == 0
    assert "quantized by   awq" in shown.stdout
    refused = pagewire("model", "inspect", str(tmp_path))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"pagewire model inspect: {tmp_path} has no config.json")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ([], None),
        (["m"], 0),
        (["--port", "1"], None),
        (["--port", "1", "m"], 2),
        (["--port=1", "m"], 1),
        (["m", "--port", "1"], 0),
        (["--no-enable-prefix-caching", "m", "--port", "1"], 1),
    ],
)
def test_serve_finds_the_model_among_flags(arguments: list[str], place: int | None) -> None:
    assert _find_model(arguments) == place


def test_serve_shows_the_schedulers_flags_and_knows_its_switches() -> None:
    done = pagewire("serve", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("pagewire serve: MODEL may also be a name: smollm2-135m")
    described = re.findall(r"^  (--.+?)(?:  |$)", done.stdout, re.MULTILINE)
    switches = {flag for line in described if " " not in line.replace(", ", ",") for flag in line.split(", ")}
    assert switches == SWITCHES
    assert {"--port", "--dtype", "--max-num-seqs", "--record"} <= {line.split()[0] for line in described}
