"""compose.yaml for real: built, brought up, asked from outside, its worker killed under a stream, and taken down.

    python -m tests.e2e.compose

Needs an engine (`docker compose`, or podman with `podman-compose`) and the model in the store. Says what it does, and
exits with 1 at the first thing that is not as it should be. BASE is the image to build from, BUILD_FLAGS are more flags
of the build, for hosts where it needs them.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client import store
from client.api import GenerateDelta, SamplingParams
from client.client import Client
from client.errors import ServiceError
from tests.e2e.service import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for what must come
PROJECT = f"pagewire-e2e-{os.getpid()}"
PARAMS = SamplingParams(max_tokens=200, temperature=0.9, seed=7, ignore_eos=True)
PROMPT = "Once upon a time there was a lighthouse"


class ComposeError(Exception):
    """Something that is not as it should be."""


def engine() -> tuple[str, list[str]] | None:
    """The engine, and its compose command; None where there is none."""
    if shutil.which("podman") and shutil.which("podman-compose"):
        return "podman", ["podman-compose", "--no-ansi"]
    if shutil.which("docker"):
        probe = subprocess.run(["docker", "compose", "ls"], capture_output=True, check=False, timeout=60)
        if probe.returncode == 0:
            return "docker", ["docker", "compose"]
    return None


class Stack:
    """The services of compose.yaml, under a name of their own."""

    def __init__(self, engine: str, command: list[str], model: Path) -> None:
        self.engine, self.port, self.openai_port = engine, free_port(), free_port()
        self._command = [*command, "-p", PROJECT]
        self.model = model
        ports = {"PORT": str(self.port), "OPENAI_PORT": str(self.openai_port)}
        self._env = {**os.environ, **ports, "MODEL": f"/models/{model.name}"}

    def set(self, **settings: str) -> None:
        """What compose.yaml asks its environment for, from the next command on."""
        self._env |= settings

    def compose(self, *arguments: str) -> str:
        return self._run(*self._command, *arguments)

    def call(self, *arguments: str) -> str:
        return self._run(self.engine, *arguments)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self._env, capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            raise ComposeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def build(self, name: str = "pagewire", *arguments: str) -> None:
        base = ["--build-arg", f"BASE={os.environ['BASE']}"] if "BASE" in os.environ else []
        flags = [*shlex.split(os.environ.get("BUILD_FLAGS", "")), *base, *arguments]
        self.call("build", *flags, "-f", "deploy/Dockerfile", "-t", f"localhost/{name}", ".")

    def bring_model(self) -> None:
        """Into the volume that is there by now, so that no first start has to pull it."""
        mounts = ["-v", f"{PROJECT}_models:/models", "-v", f"{self.model.parent}:/in:ro"]
        copy = ["--entrypoint", "cp", "localhost/pagewire", f"/in/{self.model.name}", "/models/"]
        self.call("run", "--rm", "--network", "none", *mounts, *copy)

    def containers(self, service: str = "") -> list[str]:
        filters = [f"label=com.docker.compose.project={PROJECT}"]
        filters += [f"label=com.docker.compose.service={service}"] if service else []
        return self.call("ps", "--all", "--quiet", *(word for f in filters for word in ("--filter", f))).split()

    def one(self, service: str) -> str:
        (found,) = self.containers(service)
        return found

    def pid(self, service: str) -> int:
        """Of its first process, on this host; 0 while it has none."""
        return int(json.loads(self.call("inspect", self.one(service)))[0]["State"]["Pid"])

    def inside(self, service: str, script: str) -> str:
        return self.call("exec", self.one(service), "sh", "-c", script)

    def leftovers(self) -> list[str]:
        listed = [self.call(kind, "ls", "--format", "{{.Name}}").split() for kind in ("volume", "network")]
        return self.containers() + [name for names in listed for name in names if name.startswith(PROJECT)]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise ComposeError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.2)  # each look is a process


def serving(client: Client) -> bool:
    try:
        return client.serving(timeout=5)
    except ServiceError:
        return False


def stream(client: Client, on_token: Callable[[int], None] = lambda count: None) -> list[int]:
    tokens: list[int] = []
    for chunk in client.generate(PROMPT, PARAMS):
        if isinstance(chunk, GenerateDelta):
            tokens += chunk.token_ids
            on_token(len(tokens))
    return tokens


def story(stack: Stack, say: Callable[[str], None]) -> None:
    stack.compose("up", "-d", "worker")
    say("the worker is up, alone")
    stack.bring_model()
    stack.compose("up", "-d")
    with Client(f"127.0.0.1:{stack.port}") as client:
        until(lambda: serving(client), "SERVING")
        say("SERVING, asked from outside: the order in which they came does not matter")
        locked_in(stack)
        say("user 10001, read-only, and the worker without a network")
        whole = stream(client)
        say(f"a stream of {len(whole)} tokens from outside")
        killed: list[int] = []

        def kill(count: int) -> None:
            if count >= 50 and not killed:
                killed.append(stack.pid("worker"))
                os.kill(killed[0], signal.SIGKILL)
                say(f"the worker's container is killed after {count} tokens")
                until(lambda: stack.pid("worker") not in (0, killed[0]), "the container's restart")

        if stream(client, kill) != whole:
            raise ComposeError("the stream over the killed worker is another one")
        say("the stream went on: the same tokens, to its end")
        stack.call("exec", stack.one("scheduler"), "sh", "-c", "ls /state/crashes/*.log")
        say("the scheduler has kept the seconds before it")
        stack.call("restart", stack.one("scheduler"))
        until(lambda: serving(client), "SERVING again, after the scheduler's restart")
        if stream(client) != whole:
            raise ComposeError("the stream after the scheduler's restart is another one")
        say("the scheduler's container is restarted: the worker finds it, the same tokens")


def over_tcp(stack: Stack, say: Callable[[str], None]) -> None:
    """Its worker as one on another host: the keys are made by the scheduler's first start."""
    stack.set(LISTEN="tcp://0.0.0.0:5555", CPU_WORKERS="0")
    stack.compose("--profile", "tcp", "up", "-d", "worker-tcp")  # alone, so that no first start pulls the model
    stack.bring_model()
    stack.compose("--profile", "tcp", "up", "-d")
    with Client(f"127.0.0.1:{stack.port}") as client:
        until(lambda: serving(client), "SERVING, over tcp")
        say(f"a stream of {len(stream(client))} tokens over tcp, with CURVE")


def behind_smg(stack: Stack, say: Callable[[str], None]) -> None:
    stack.set(LISTEN="ipc:///run/pagewire/workers", CPU_WORKERS="1")
    stack.build("pagewire-smg", "--build-arg", "EXTRA=openai")
    say("the gateway's image is built")
    stack.compose("up", "-d", "worker")
    stack.bring_model()
    stack.compose("--profile", "smg", "up", "-d")
    with Client(f"127.0.0.1:{stack.port}") as client:
        until(lambda: serving(client), "SERVING, beside the gateway")
    until(lambda: ask(stack.openai_port, "/v1/models"), "the gateway answers")
    chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 9}
    chat["model"] = ask(stack.openai_port, "/v1/models")["data"][0]["id"]
    until(lambda: ask(stack.openai_port, "/v1/chat/completions", chat), "a chat by OpenAI's API")
    answer = ask(stack.openai_port, "/v1/chat/completions", chat)
    say(f"OpenAI's API says {answer['choices'][0]['message']['content']!r}")


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of the gateway; nothing while it knows no worker, or is not there yet."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            found: dict[str, Any] = json.load(response)
    except (urllib.error.URLError, ConnectionError):
        return {}
    return found if found.get("data", True) else {}


def locked_in(stack: Stack) -> None:
    for service in ("scheduler", "worker"):
        if (user := stack.inside(service, "id -u")) != "10001":
            raise ComposeError(f"{service} runs as user {user}")
        if stack.inside(service, "touch /written 2>/dev/null && echo yes || echo no") != "no":
            raise ComposeError(f"{service} can write to its root")
    if (interfaces := stack.inside("worker", "ls /sys/class/net").split()) != ["lo"]:
        raise ComposeError(f"the worker has interfaces {interfaces}")


def main() -> int:
    found = engine()
    if found is None:
        print("no container engine here: neither podman with podman-compose, nor docker compose", file=sys.stderr)
        return 1
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    stack = Stack(*found, store.pull(store.DEFAULT))
    try:
        stack.compose("--profile", "*", "config")
        say("every profile of compose.yaml is understood")
        stack.build()
        say("the image is built")
        for part in (story, over_tcp, behind_smg):
            try:
                part(stack, say)
            finally:
                stack.compose("--profile", "tcp", "--profile", "smg", "down", "--volumes")
            if left := stack.leftovers():
                raise ComposeError(f"left behind: {left}")
            say("down, and nothing is left")
    except ComposeError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
