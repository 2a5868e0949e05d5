"""What is wrong with a request is gathered, field by field, and said at once."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_svc.frontend.errors import Violation, invalid
from scheduler_svc.frontend.limits import MAX_ID_BYTES, MAX_STRING


class Violations(list[Violation]):
    def add(self, field: str, problem: str) -> None:
        self.append(Violation(field, problem))

    def check(self) -> None:
        """Raises ServiceError INVALID_ARGUMENT with all of them, where there is one."""
        if self:
            raise invalid(self)


def check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int, violations: Violations) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        i = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        violations.add(f"{field}[{i}]", f"is {token_ids[i]}; the vocabulary has {vocab_size} tokens, from 0")


def check_request_id(field: str, request_id: str, violations: Violations) -> None:
    """An id is echoed in metadata, which carries printable ASCII only."""
    if len(request_id) > MAX_ID_BYTES:
        violations.add(field, f"has {len(request_id)} characters; at most {MAX_ID_BYTES}")
    elif not (request_id.isascii() and request_id.isprintable()) or request_id != request_id.strip():
        violations.add(field, "must be printable ASCII without spaces at its ends")


def check_strings(field: str, strings: Sequence[str], most: int, violations: Violations) -> None:
    if len(strings) > most:
        violations.add(field, f"has {len(strings)} strings; at most {most}")
        return
    for i, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STRING:
            violations.add(f"{field}[{i}]", f"has {len(string)} characters; must have 1 to {MAX_STRING}")
