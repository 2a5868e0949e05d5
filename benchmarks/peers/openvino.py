"""OpenVINO GenAI's continuous batching pipeline behind the thinnest server: `inside/openvino_server.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.engine import Peer, Steps, home

GENAI = "openvino-genai==2026.4.1.0"
PACKAGES = (GENAI, "openvino-tokenizers==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "accelerate", "gguf")
FORMATS = ("fp16", "int8")
INSIDE = Path(__file__).parent / "inside"


class OpenVINO:
    name = "openvino"
    version = GENAI

    def __init__(self) -> None:
        self.home = home(self.name)

    def install(self, model: Path) -> None:
        steps = Steps(self.name)
        python = steps.environment(*PACKAGES)
        checkpoint = steps.fresh("checkpoint")
        steps.run("model as a transformers checkpoint", python, INSIDE / "checkpoint.py", model, checkpoint, "float32")
        export = (python.parent / "optimum-cli", "export", "openvino", "--task", "text-generation-with-past")
        for kind in FORMATS:
            out = steps.fresh(kind)
            steps.run(f"model as {kind}", *export, "--model", checkpoint, "--weight-format", kind, out)

    def installed(self) -> bool:
        return all((self.home / kind / "openvino_model.bin").exists() for kind in FORMATS)

    def peers(self) -> Sequence[Peer]:
        return [
            self._peer("fp16", "weights fp16, arithmetic bf16"),
            self._peer("int8", "weights int8 per channel"),
        ]

    def logits(self, threads: int) -> dict[str, list[str]]:
        """Peers that can be asked for logits, and the commands that answer: see inside/openvino_logits.py."""
        program = f"{self.home}/venv/bin/python", f"{INSIDE}/openvino_logits.py"
        kinds = FORMATS if self.installed() else ()
        return {f"openvino-{kind}": [*program, f"{self.home}/{kind}", str(threads)] for kind in kinds}

    def _peer(self, kind: str, about: str) -> Peer:
        template = (f"{self.home}/venv/bin/python", f"{INSIDE}/openvino_server.py", f"{self.home}/{kind}", "{port}")
        return Peer(f"openvino-{kind}", self.name, f"OpenVINO GenAI, continuous batching, {about}", template, "lines")
