"""Which modules a checkpoint's config means: names, and patterns that anybody may have written."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Final

import regex

from worker_svc.models.spec import SpecError

PATIENCE = 0.2  # seconds for one name: an honest pattern takes microseconds
LONGEST = 1000  # characters
# What compiling takes grows with these, and it has no time limit: (depth of groups, counted repeats, their product).
MOST_DEPTH, MOST_REPEATS, MOST_PRODUCT = 20, 4, 10_000


def keys(text: str) -> frozenset[str]:
    """Words."""
    return frozenset(text.split())


# How a file was made, which whoever made it writes beside what it is.
MADE_BY: Final = keys(
    "autoround_version provider iters lr minmax_lr nsamples seqlen batch_size low_gpu_mem_usage enable_quanted_input "
    "enable_minmax_tuning enable_norm_bias_tuning gradient_accumulate_steps to_quant_block_names static_kv_dtype "
    "block_name_to_quantize static_kv_granularity static_attention_dtype static_attention_granularity scale_dtype "
    "quant_method model_name_or_path meta backend pack_dtype data_type tokenizer dataset"
)


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a name begins with what a pattern describes, or has it anywhere.

    Raises SpecError for what is no pattern, and for one that takes too long: a config may come from anybody.
    """
    if len(pattern) > LONGEST:
        raise SpecError(f"quantization_config: a pattern of {len(pattern)} characters is over the {LONGEST} allowed")
    counts = [int(count) for count in regex.findall(r"\{[\d, ]*?(\d{1,9})\}", pattern)]
    depths = accumulate((character == "(") - (character == ")") for character in pattern)
    repeats = pattern.count("{"), math.prod(counts)
    if max(depths, default=0) > MOST_DEPTH or repeats[0] > MOST_REPEATS or repeats[1] > MOST_PRODUCT:
        raise SpecError(
            f"quantization_config: the pattern {pattern[:60]!r} is deeper, or repeats more, than is allowed"
        )
    try:
        find = regex.search if anywhere else regex.match
        return find(pattern, name, timeout=PATIENCE) is not None
    except TimeoutError:
        raise SpecError(f"quantization_config: the pattern {pattern!r} takes too long on {name!r}") from None
    except (regex.error, RecursionError) as error:
        raise SpecError(f"quantization_config: {pattern!r} is no regular expression: {error}") from None
