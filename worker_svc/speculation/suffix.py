"""Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): what most often followed the same words before, here or in
earlier outputs of the same domain.

A domain's outputs are nobody else's to learn from, not even by how fast a stream is: they are looked up under the
digest that the Admit brings, and in no other way.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Final

from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable

LEAST, MOST = 2, 16  # tokens of a match: what the index finds, and how far back it is looked at
MATCHES: Final = 32  # that are looked at: the latest
FACTOR: Final = 2  # drafts for each token of the match (the paper's α)
LEAST_LIKELY: Final = 0.1  # of a draft, among the matches
OWN_TOKENS: Final = 4096  # of a slot, when it is first seen: what came before is not looked at
DOMAIN_TOKENS: Final = 1 << 16
ALL_TOKENS: Final = 1 << 20
GAP: Final = -1  # between two outputs


class Corpus:
    """Tokens, and where each pair of them is followed by another."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, int], list[int]] = {}

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens, after, begin = self.tokens, self._after, len(self.tokens)
        tokens.extend(token_ids)
        for i in range(max(begin, LEAST), len(tokens)):
            after.setdefault((tokens[i - 2], tokens[i - 1]), []).append(i)

    def matches(self, tail: list[int]) -> tuple[list[int], int]:
        """Where the longest match of the last tokens of `tail` goes on, the latest first, and its length."""
        if len(tail) < LEAST:
            return [], 0
        tokens, longest = self.tokens, LEAST
        found = self._after.get((tail[-2], tail[-1]), [])[: -MATCHES - 1 : -1]
        if whole := [at for at in found if tokens[at - MOST : at] == tail]:
            return whole, MOST
        while found and longest < min(MOST, len(tail)):
            longer = [at for at in found if at > longest and tokens[at - longest - 1] == tail[-longest - 1]]
            if not longer:
                break
            found, longest = longer, longest + 1
        return found, longest

    def drafts(self, tail: list[int], most: int) -> tuple[list[int], float]:
        """What most often follows, and how many of them are likely to be right."""
        found, longest = self.matches(tail)
        if not found:
            return [], 0.0
        tokens, most = self.tokens, min(most, FACTOR * longest)
        ways = [tokens[at : at + most] for at in found]
        if ways.count(ways[0]) == len(ways) and GAP not in ways[0]:  # the usual case, quickly
            return ways[0], float(len(ways[0]))
        drafts, likely, score = list[int](), 1.0, 0.0
        for step in range(most):
            nexts = Counter(tokens[at + step] for at in found if at + step < len(tokens))
            if not nexts:
                break
            token, count = nexts.most_common(1)[0]
            likely *= count / len(found)
            if token == GAP or likely < LEAST_LIKELY:
                break
            drafts.append(token)
            score += likely
            if count < len(found):
                found = [at for at in found if at + step < len(tokens) and tokens[at + step] == token]
        return drafts, score


class Domain:
    """Earlier outputs, in two halves: the older one is forgotten when the newer one is full."""

    def __init__(self) -> None:
        self.older, self.newer = Corpus(), Corpus()

    def __len__(self) -> int:
        return len(self.older.tokens) + len(self.newer.tokens)

    def add(self, token_ids: Sequence[int]) -> None:
        if self.newer.tokens and len(self.newer.tokens) + len(token_ids) >= DOMAIN_TOKENS // 2:
            self.older, self.newer = self.newer, Corpus()
        self.newer.extend([*token_ids[-DOMAIN_TOKENS // 2 + 1 :], GAP])


class SuffixProposer:
    def __init__(self) -> None:
        self._domains: OrderedDict[bytes, Domain] = OrderedDict()  # the one used last is last
        self._size = 0  # tokens of all of them
        self.reset()

    def reset(self) -> None:
        self._own: dict[int, tuple[int, int, Corpus]] = {}  # by slot: whose admission, tokens seen, and what they are

    def close(self) -> None:
        pass

    def propose(self, inputs: StepInputs, slots: SlotTable, most: Ints) -> None:
        for slot, count in zip(inputs.slots.tolist(), most.tolist(), strict=True):
            if count:
                slots.propose(slot, self._drafts(slots, slot, count))

    def release(self, slots: SlotTable, slot: int) -> None:
        """What it wrote is the domain's from here on."""
        self._own.pop(slot, None)
        output = slots.output_ids(slot).tolist()
        name = slots.domains[slot]
        domain = self._domains.setdefault(name, Domain())
        self._domains.move_to_end(name)
        self._size -= len(domain)
        domain.add(output)
        self._size += len(domain)
        while self._size > ALL_TOKENS:
            self._size -= len(self._domains.popitem(last=False)[1])

    def _drafts(self, slots: SlotTable, slot: int, most: int) -> list[int]:
        own = self._corpus(slots, slot)
        tail = own.tokens[-MOST:]
        corpora = [own]
        if domain := self._domains.get(slots.domains[slot]):
            corpora += [corpus for corpus in (domain.newer, domain.older) if corpus.tokens]
        return max((corpus.drafts(tail, most) for corpus in corpora), key=lambda made: made[1])[0]

    def _corpus(self, slots: SlotTable, slot: int) -> Corpus:
        """The slot's own tokens, all that are known."""
        length, admission = int(slots.lengths[slot]), int(slots.admissions[slot])
        holder, seen, corpus = self._own.get(slot, (-1, 0, Corpus()))
        if holder != admission:
            seen, corpus = max(0, length - OWN_TOKENS), Corpus()
        corpus.extend(slots.token_ids[slot, seen:length].tolist())
        self._own[slot] = admission, length, corpus
        return corpus
