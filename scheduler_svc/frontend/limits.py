"""What a request's fields may hold; `protos/pagewire/v1/inference.proto` says the same to clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_ID_BYTES: Final = 256
MAX_TENANT_BYTES: Final = 64
MAX_SALT_BYTES: Final = 256
MAX_STOPS: Final = 16
MAX_STOP_IDS: Final = 64
MAX_BAD_WORDS: Final = 64
MAX_STRING: Final = 1024
MAX_BIASES: Final = 1024
MAX_BIAS: Final = 100.0
MAX_N: Final = 64
MAX_LOGPROBS: Final = 20
MAX_PRIORITY: Final = 100
MAX_UINT32: Final = 2**32 - 1
MAX_MESSAGES: Final = 4096
MAX_CHARACTERS: Final = 2**20  # to Tokenize; to Generate it is the context that bounds a prompt
MAX_DETOKENIZE: Final = 2**20
MAX_GRAMMAR_BYTES: Final = 256 << 10
MAX_TOOLS: Final = 128
MAX_CHOICES: Final = 4096
MAX_HELD: Final = 1024  # calls to be resumed that wait for the first worker
MAX_ABORTS: Final = 1024  # ids in one Abort
MAX_INPUTS: Final = 256  # to Embed, and candidates to Score
MAX_SCORED: Final = 2**18  # tokens of a Score's candidates together: what its answer holds a number for

# Of a connection.
MAX_METADATA_BYTES: Final = 16 << 10
MAX_CONNECTION_STREAMS: Final = 20_000
HANDSHAKE_SECONDS: Final = 20
IDLE_SECONDS: Final = 1800  # without a call


@dataclass(frozen=True)
class Range:
    """`value in range`: false for NaN, too, and for what is no number, as JSON may hold."""

    low: float
    high: float
    open_low: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low < value <= self.high if self.open_low else self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:.7g}, {self.high:.10g}]{', whole' if self.whole else ''}"


# Of SamplingParams.
RANGES: Final = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, open_low=True),
    "min_p": Range(0, 1),
    # Logits are divided by it: next to 0 they would leave float32. 0.01 as float32, which is what a client sends.
    "repetition_penalty": Range(0.009999999776482582, 100),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "n": Range(1, MAX_N),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}
# Of generation_config.json. A top_k of −1 is off there, as 0 is.
DEFAULT_RANGES: Final = {
    **{name: RANGES[name] for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
    "top_k": Range(-1, MAX_UINT32, whole=True),
    "max_new_tokens": Range(1, MAX_UINT32, whole=True),
}
