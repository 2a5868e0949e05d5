"""Which modules a checkpoint's config means: names, and patterns that anybody may have written."""

from __future__ import annotations

import regex

from worker_svc.models.spec import SpecError

PATIENCE = 0.2  # seconds for one name: an honest pattern takes microseconds
LONGEST = 1000  # characters


def keys(text: str) -> frozenset[str]:
    """Words."""
    return frozenset(text.split())


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a name begins with what a pattern describes, or has it anywhere.

    Raises SpecError for what is no pattern, and for one that takes too long: a config may come from anybody.
    """
    if len(pattern) > LONGEST:
        raise SpecError(f"quantization_config: a pattern of {len(pattern)} characters is over the {LONGEST} allowed")
    try:
        find = regex.search if anywhere else regex.match
        return find(pattern, name, timeout=PATIENCE) is not None
    except TimeoutError:
        raise SpecError(f"quantization_config: the pattern {pattern!r} takes too long on {name!r}") from None
    except regex.error as error:
        raise SpecError(f"quantization_config: {pattern!r} is no regular expression: {error}") from None
