"""Compiles every registered Triton kernel ahead of time, for GPUs that this machine need not have.

    python -m kernels.ahead                        every kernel for sm_80, sm_90 and gfx942
    python -m kernels.ahead --target sm_90         for one of them (may be repeated)
    python -m kernels.ahead --json FILE            what was found, as data

A kernel module registers by having a function `ahead()` that yields the compilations to make; modules are found by
looking through this package. Of each compilation it tells registers a thread, spilled registers and shared memory a
block, and fails where the compiler does or where the target has not so much shared memory: a launch would. Results
are kept in Triton's own cache and nowhere else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import kernels

PROCESSES: Final = 2  # ptxas and LLVM run beside each other; more would only crowd a small machine


@dataclass(frozen=True)
class Ahead:
    """One compilation to make: a kernel at one shape of one model."""

    kernel: JITFunction
    name: str  # "llama-3-8b bf16": the shape, for people
    signature: Mapping[str, str]  # argument → "*bf16", "i32", "fp32" …; all that are not in `constants`
    constants: Mapping[str, object]  # constexpr arguments, and tensors that are None
    num_warps: int = 4
    num_stages: int = 2
    multiples_of_16: tuple[str, ...] = ()  # integers that are, with this model: Triton asks that of each at a launch
    targets: tuple[str, ...] = ()  # whose tile sizes these are; none: the same for all
    fp_fusion: bool = True  # whether the compiler may fuse products and sums as it likes


@dataclass(frozen=True)
class Target:
    name: str
    gpu: GPUTarget
    shared_limit: int  # bytes a block


@dataclass(frozen=True)
class Usage:
    """What one compilation takes."""

    kernel: str
    name: str
    target: str
    registers: int  # a thread; vector registers on AMD
    scalar_registers: int  # a wave, AMD only
    spills: int  # bytes a thread in local memory: NVIDIA's stack frame, AMD's scratch
    shared: int  # bytes a block
    num_warps: int


@dataclass(frozen=True)
class Failure:
    kernel: str
    name: str
    target: str
    error: str


TARGETS: Final = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10),
)


@dataclass(frozen=True)
class Model:
    """The shapes of a model that kernels are compiled for."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False


MODELS: Final = (
    Model("llama-3-8b", 4096, 14336, 32, 8, 128, 128256),
    Model("qwen3-8b", 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
    Model("smollm2-135m", 576, 1536, 9, 3, 64, 49152),
)


def registered() -> Iterator[Ahead]:
    """Every compilation that the modules of this package ask for, in the order of their names."""
    for found in pkgutil.walk_packages(kernels.__path__, "kernels."):
        if found.name in (__name__, "kernels.ahead") or found.name.split(".")[1] == "cpu":
            continue
        module = importlib.import_module(found.name)
        if hasattr(module, "ahead"):
            yield from module.ahead()


def source_of(ahead: Ahead) -> ASTSource:
    """As a launch would make it. Raises ValueError where signature and constants are not the kernel's arguments."""
    names = ahead.kernel.arg_names
    given = {**dict.fromkeys(ahead.constants, "constexpr"), **ahead.signature}
    if set(given) != set(names):
        wrong = ", ".join(sorted(set(given) ^ set(names)))
        raise ValueError(f"these arguments are missing or not the kernel's: {wrong}")
    if double := sorted(set(ahead.signature) & set(ahead.constants)):
        raise ValueError(f"these arguments are in signature and constants: {', '.join(double)}")
    aligned = [name for name, kind in ahead.signature.items() if kind.startswith("*")]  # torch's allocations are
    divisible = {names.index(name): [["tt.divisibility", 16]] for name in (*aligned, *ahead.multiples_of_16)}
    return ASTSource(
        fn=ahead.kernel,
        signature={name: given[name] for name in names},
        constexprs=dict(ahead.constants),
        attrs={(index,): attribute for index, attribute in divisible.items()},
    )


def compiled(ahead: Ahead, target: Target) -> Usage | Failure:
    kernel = ahead.kernel.__name__
    try:
        options = {
            "num_warps": ahead.num_warps,
            "num_stages": ahead.num_stages,
            "enable_fp_fusion": ahead.fp_fusion,
        }
        made = triton.compile(source_of(ahead), target=target.gpu, options=options)
        usage = _amd if target.gpu.backend == "hip" else _nvidia
        registers, scalars, spills = usage(made.asm)
    except Exception as error:  # whatever a compiler raises is one line of the report, and the others go on
        return Failure(kernel, ahead.name, target.name, f"{type(error).__name__}: {error}")
    shared = made.metadata.shared
    if shared > target.shared_limit:
        return Failure(kernel, ahead.name, target.name, f"{shared} bytes of shared memory, {target.shared_limit} exist")
    return Usage(kernel, ahead.name, target.name, registers, scalars, spills, shared, ahead.num_warps)


def _nvidia(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Registers, 0, and bytes of stack: our kernels have no arrays of their own, so what is there was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    registers, stack = (re.search(rf"\b{field}:(\d+)", said) for field in ("REG", "STACK"))
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump tells no resource usage: {said.strip()!r}")
    return int(registers[1]), 0, int(stack[1])


def _amd(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """From the metadata at the end of the assembler's text."""
    fields = ("vgpr_count", "sgpr_count", "private_segment_fixed_size")
    found = [re.search(rf"^\s*\.{field}:\s*(\d+)", asm["amdgcn"], re.MULTILINE) for field in fields]
    values = [int(match[1]) for match in found if match]
    if len(values) != len(fields):
        raise ValueError("the assembler's text has no resource usage")
    return values[0], values[1], values[2]


def compile_all(targets: tuple[Target, ...]) -> list[Usage | Failure]:
    work = [
        (ahead, target) for ahead in registered() for target in targets if target.name in (ahead.targets or target.name)
    ]
    with ThreadPoolExecutor(PROCESSES) as pool:  # the compilers leave Python's lock alone
        return list(pool.map(lambda one: compiled(*one), work))


def _print(results: list[Usage | Failure]) -> None:
    width = max((len(one.kernel) + len(one.name) for one in results), default=0) + 2
    print(f"{'kernel':{width}}  target  warps  registers  scalar  spilled  shared")
    for one in results:
        title = f"{one.kernel}: {one.name}"
        if isinstance(one, Failure):
            print(f"{title:{width}}  {one.target:6}  FAILED {one.error}")
        else:
            numbers = f"{one.num_warps:5}  {one.registers:9}  {one.scalar_registers:6}  {one.spills:7}  {one.shared:6}"
            print(f"{title:{width}}  {one.target:6}  {numbers}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.ahead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    targets = tuple(target for target in TARGETS if not arguments.target or target.name in arguments.target)
    results = compile_all(targets)
    _print(results)
    used = [one for one in results if isinstance(one, Usage)]
    failed = [one for one in results if isinstance(one, Failure)]
    if arguments.json:
        found = {"triton": triton.__version__, "usages": [*map(asdict, used)], "failures": [*map(asdict, failed)]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    kinds = len({one.kernel for one in results})
    spilling = sum(one.spills > 0 for one in used)
    print(
        f"{kinds} kernels, {len(used)} compilations for {', '.join(target.name for target in targets)}: "
        f"{len(failed)} failed, {spilling} spill"
    )
    return 1 if failed or not used else 0


if __name__ == "__main__":
    sys.exit(main())
