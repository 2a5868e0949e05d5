"""The model's vocabulary as llguidance wants it: bytes of every token, which of them are special, which end a text."""

from __future__ import annotations

import os
from typing import Final

from llguidance import LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from scheduler_svc.frontend.model import load_model

# Fuel and items are counted, not timed: a stream that is too much to follow is so on every machine, at the same token.
LIMITS: Final = LLParserLimits(
    step_lexer_fuel=100_000,  # of one mask, and of one token
    step_max_items=10_000,
    max_items_in_row=1_000,
    max_lexer_states=25_000,  # 1 to 2 kB each
    verbose_errors=False,
)


def load(model: str) -> LLTokenizer:
    """From the model's path, or `fake:…`. Raises ModelError.

    Ids beyond the tokenizer's are never allowed. A model without end tokens gets one behind all that it has: a grammar
    must have one.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the checker forks
    served = load_model(model)
    source, ends = served.tokenizer.files["tokenizer.json"].decode(), list(served.card.eos_token_ids)
    size = max(served.tokenizer.size, served.card.vocab_size)
    if not ends:
        backend = Tokenizer.from_str(source)
        backend.add_special_tokens([AddedToken("<|no end|>", special=True)])
        source, ends = backend.to_str(), [backend.get_vocab()["<|no end|>"]]
    return LLTokenizer(source, n_vocab=max(size, ends[-1] + 1), eos_token=ends)
