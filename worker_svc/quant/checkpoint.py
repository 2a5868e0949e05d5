"""A quantized checkpoint as any other: "x.weight" is there, whatever tensors it is stored in. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from worker_svc.models.fields import Fields
from worker_svc.models.raw_tensor import CheckpointError, RawTensor
from worker_svc.models.safetensors_reader import SafetensorsCheckpoint
from worker_svc.models.spec import SpecError
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.formats.auto_round import AutoRound
from worker_svc.quant.formats.awq import Awq
from worker_svc.quant.formats.compressed_tensors import CompressedTensors
from worker_svc.quant.formats.fp8 import Fp8
from worker_svc.quant.formats.gptq import Gptq
from worker_svc.quant.formats.module import Method, Module

METHODS: Final[dict[str, Callable[[Mapping[str, Any]], Method]]] = {
    "gptq": Gptq,
    "awq": Awq,
    "auto-round": AutoRound,
    "intel/auto-round": AutoRound,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
}
REFUSED: Final = {
    "bitsandbytes": "its codes look up a table, with scales that are codes themselves, and no kernel here takes that: "
    "save the model in bfloat16, or quantize it by gptq, awq, auto-round or llm-compressor",
}
# What a quantized module may have beside its method's own: its bias, and what attention says about a KV cache.
BESIDE: Final = frozenset({"bias", "k_scale", "v_scale", "q_scale"})


def method_of(config: Mapping[str, Any]) -> Method:
    """What a config.json's `quantization_config` says. Raises SpecError for a method or a field that is not known."""
    name = Fields("quantization_config", config).text("quant_method", "")
    if name in REFUSED:
        raise SpecError(f"quantization_config: quant_method {name!r} is not supported: {REFUSED[name]}")
    if name not in METHODS:
        raise SpecError(f"quantization_config: quant_method {name!r} is not supported, only {', '.join(METHODS)}")
    return METHODS[name](config)


class QuantizedCheckpoint:
    """Which modules are quantized their tensors tell, not the config: producers forget to list what they left alone."""

    def __init__(self, inner: SafetensorsCheckpoint, method: Method) -> None:
        """Raises CheckpointError where a module has some of a quantized weight's tensors and not others."""
        self._inner, self.method = inner, method
        self._modules: dict[str, set[str]] = {}
        for name in inner.names():
            module, _, suffix = name.rpartition(".")
            self._modules.setdefault(module, set()).add(suffix)
        for module, suffixes in self._modules.items():
            self._check(module, suffixes)
        self.quantized = [module for module, suffixes in self._modules.items() if suffixes & method.markers]
        if not self.quantized:
            raise CheckpointError(f"config.json says {method.name}, and no tensor is quantized so")

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._inner.metadata

    def names(self) -> list[str]:
        """One "weight" for each module that is quantized, in the place of what it is stored in."""
        made = {f"{module}.weight" for module in self.quantized}
        stored = {f"{module}.{suffix}" for module in self.quantized for suffix in self.method.suffixes}
        return [name for name in self._inner.names() if name not in stored] + sorted(made)

    def __contains__(self, name: object) -> bool:
        if name in self._inner:
            return True
        module, _, part = str(name).rpartition(".")
        return part == "weight" and bool(self._modules.get(module, set()) & self.method.markers)

    def tensor(self, name: str) -> RawTensor | QuantizedTensor:
        """Raises CheckpointError where there is none, or where it cannot be read."""
        module, _, part = name.rpartition(".")
        suffixes = self._modules.get(module, set())
        if part != "weight" or not suffixes & self.method.markers:
            return self._inner.tensor(name)
        own = self.method.suffixes & suffixes
        return self.method.read(Module(module, {suffix: self._inner.tensor(f"{module}.{suffix}") for suffix in own}))

    def _check(self, module: str, suffixes: set[str]) -> None:
        method, own = self.method, self.method.suffixes - {"weight"}
        if not suffixes & method.markers:
            if stray := sorted(suffixes & own):
                raise CheckpointError(
                    f"tensor '{module}.{stray[0]}' is there, and none of {', '.join(sorted(method.markers))} beside it"
                )
        elif strange := sorted(suffixes - method.suffixes - BESIDE):
            raise CheckpointError(
                f"tensor '{module}.{strange[0]}' is not known of {method.name}: it may change what the weights mean"
            )
