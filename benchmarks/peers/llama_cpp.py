"""llama.cpp's own server, built for this machine from the sources inside llama-cpp-python's sdist."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.engine import THREADS, InstallError, Peer, Steps, home, uv

SDIST = "llama-cpp-python==0.3.36"
BUILD = ("cmake==4.4.4", "ninja==1.13.2", "pip")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
KINDS = {  # of model files, by what they are
    "bf16": "bf16",
    "q8_0": "8-bit weights and activations, groups of 32",
    "q4_0": "4-bit weights, quantized again from the file's",
    "q4_1": "the very file that we serve",
}


class LlamaCpp:
    name = "llama.cpp"
    version = SDIST

    def __init__(self) -> None:
        self.home = home(self.name)
        self.binaries = self.home / "build" / "bin"
        self.models = self.home / "models"
        self.reader = self.home / "llama_logits"

    def install(self, model: Path) -> None:
        steps = Steps(self.name)
        python = steps.environment(*BUILD)
        download = steps.fresh("sdist")
        pip = (python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
        # pip asks a source package for its metadata, and the package for the builder that answers
        steps.run("its builder", *uv("pip", "install", "--python", python, "scikit-build-core"))
        steps.run("sources", *pip, "--dest", download, SDIST)
        archives = list(download.glob("*.tar.gz"))
        if len(archives) != 1:
            raise InstallError(f"sources: {len(archives)} archives in {download}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(download, filter="data")
        sources = next(download.glob("*/vendor/llama.cpp"))
        tools = python.parent
        build = self.home / "build"
        make = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        steps.run("configuration", tools / "cmake", "-S", sources, "-B", build, "-G", "Ninja", make, *OPTIONS)
        targets = ("--target", "llama-server", "llama-quantize")
        steps.run("build (minutes)", tools / "cmake", "--build", build, *targets)
        self._build_reader(steps, sources)
        self.models.mkdir(exist_ok=True)
        quantize = self.binaries / "llama-quantize"
        for kind in ("BF16", "Q8_0", "Q4_0"):  # from the file's 4-bit weights: bf16 and q8_0 add next to no error
            out = self.models / f"{kind.lower()}.gguf"
            steps.run(f"model as {kind}", quantize, "--allow-requantize", model, out, kind, THREADS)
        (self.models / "q4_1.gguf").unlink(missing_ok=True)
        (self.models / "q4_1.gguf").symlink_to(model)

    def installed(self) -> bool:
        return (self.binaries / "llama-server").exists() and (self.models / "q4_1.gguf").exists()

    def peers(self) -> Sequence[Peer]:
        return [self._peer(kind, about) for kind, about in KINDS.items()]

    def logits(self, context: int, threads: int) -> dict[str, list[str]]:
        """Peers that can be asked for logits, and the commands that answer: see llama_logits.cpp."""
        files = {kind: self.models / f"{kind}.gguf" for kind in KINDS if self.reader.exists()}
        size = str(context), str(threads)
        return {f"llama-{kind}": [str(self.reader), str(file), *size] for kind, file in files.items() if file.exists()}

    def _peer(self, kind: str, about: str) -> Peer:
        template = (
            f"{self.binaries}/llama-server",
            *("--model", f"{self.models}/{kind}.gguf", "--host", "127.0.0.1", "--port", "{port}"),
            *("--threads", THREADS, "--parallel", "{slots}", "--ctx-size", "{context}"),
            *("--ubatch-size", "256", "--flash-attn", "on", "--no-webui", "--log-disable"),
        )
        return Peer(f"llama-{kind}", self.name, f"llama-server, {about}", template, "llama")

    def _build_reader(self, steps: Steps, sources: Path) -> None:
        source = Path(__file__).with_name("llama_logits.cpp")
        headers = (f"-I{sources}/include", f"-I{sources}/ggml/include")
        names = ("src/libllama", "ggml/src/libggml", "ggml/src/libggml-cpu", "ggml/src/libggml-base")
        archives = [self.home / "build" / f"{name}.a" for name in names]
        steps.run(
            "its logits", "c++", "-O2", "-fopenmp", *headers, source, "-o", self.reader, *archives, "-lpthread", "-ldl"
        )
