"""AutoRound's own config over the packings of others: GPTQ v1, GPTQ v2 or AWQ, with bits of their own for some modules.

Asymmetric models default to AWQ's packing and symmetric ones to GPTQ's, so `packing_format` decides, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from worker_svc.models.fields import Fields
from worker_svc.models.spec import SpecError
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.formats import awq, gptq
from worker_svc.quant.formats.gptq import Rule, read_rule
from worker_svc.quant.formats.module import Module
from worker_svc.quant.formats.names import keys, matches

# What a packing format is called: whether its zero points are as they are (None: AWQ's packing).
PACKINGS: Final = {
    "auto_round:auto_gptq": False,
    "auto_round:gptqmodel": True,
    "auto_round": True,
    "auto_round:auto_awq": None,
}
RULE_KEYS: Final = keys("bits group_size sym data_type desc_act")
# Activations are float unless these say otherwise, which is looked at.
ACTIVATION_KEYS: Final = keys("act_bits act_data_type act_group_size act_sym act_dynamic")
KNOWN: Final = (
    gptq.HARMLESS | gptq.OFF | RULE_KEYS | ACTIVATION_KEYS | {"packing_format", "extra_config", "desc_act", "amp"}
)


class AutoRound:
    name = "auto-round"
    markers, suffixes = gptq.MARKERS, gptq.SUFFIXES

    def __init__(self, config: Mapping[str, Any]) -> None:
        source = "quantization_config"
        fields = Fields(source, config)
        if unknown := sorted(config.keys() - KNOWN):
            raise SpecError(f"{source}: {unknown[0]!r} is not known of auto-round: it may change what the weights mean")
        gptq.refuse_on(fields, gptq.OFF)
        packing = fields.text("packing_format", "auto_round")
        if packing not in PACKINGS:
            raise fields.trouble("packing_format", f"one of {', '.join(PACKINGS)}", packing)
        self._v2, self._packing = PACKINGS[packing], packing
        self._rule = self._checked(source, config, None)
        self._extra = {
            name: self._rule_of(f"{source}: extra_config {name!r}", values)
            for name, values in fields.group("extra_config").items()
        }

    def read(self, module: Module) -> QuantizedTensor:
        rule = self._rule_for(module.name)
        if rule is None:
            raise module.trouble("qweight", "is there, though extra_config says that the module has 16 bits")
        if self._v2 is None:
            return awq.symmetric_if(bool(rule.symmetric), module, awq.read_gemm(module, rule.group_size))
        return gptq.read(module, rule, v2=self._v2)

    def _rule_for(self, name: str) -> Rule | None:
        if name in self._extra:
            return self._extra[name]
        for pattern, rule in self._extra.items():
            if matches(pattern, name, anywhere=True):
                return rule
        return self._rule

    def _rule_of(self, source: str, values: Any) -> Rule | None:
        if not isinstance(values, dict):
            raise SpecError(f"{source} must be an object, not {type(values).__name__}")
        if unknown := sorted(values.keys() - gptq.HARMLESS - RULE_KEYS - ACTIVATION_KEYS):
            raise SpecError(f"{source}: {unknown[0]!r} is not known: it may change what the weights mean")
        if Fields(source, values).whole("bits", self._rule.bits) >= 16:
            return None
        return self._checked(source, values, self._rule)

    def _checked(self, source: str, values: Mapping[str, Any], base: Rule | None) -> Rule:
        fields = Fields(source, values)
        rule = read_rule(source, values, base)
        if fields.text("data_type", "int") not in ("int", "int_sym", "int_asym", "int_asym_dq", "int_sym_dq"):
            raise fields.trouble("data_type", "int", values["data_type"])
        if fields.whole("act_bits", 16) < 16:
            raise fields.trouble(
                "act_bits", "16: with auto-round's own packings activations are float", values["act_bits"]
            )
        if self._v2 is None and rule.bits != awq.BITS:
            raise fields.trouble("bits", f"4: {self._packing} has no other", rule.bits)
        return rule
