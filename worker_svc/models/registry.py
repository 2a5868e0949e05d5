"""Architecture name → how its config becomes a ModelSpec."""

from __future__ import annotations

from collections.abc import Callable

from worker_svc.models import gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from worker_svc.models.decoder import FILE, Config
from worker_svc.models.fields import Fields
from worker_svc.models.spec import ModelSpec

FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "Gemma2ForCausalLM": gemma2.spec,
    "Gemma3ForCausalLM": gemma3.spec,
    "Gemma3ForConditionalGeneration": gemma3.vision_spec,
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "Phi3ForCausalLM": phi3.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
}


def architecture(config: Config) -> str:
    """The first name in `architectures`, or "" where the config has none."""
    return (Fields(FILE, config).texts("architectures") or [""])[0]


def spec_of(config: Config) -> ModelSpec | None:
    """None where the architecture is no family of ours. Raises SpecError for a config that its family cannot follow."""
    family = FAMILIES.get(architecture(config))
    return family(config) if family else None
