"""The house's order of sampling, one token of one row at a time: slow, and meant to be read beside architecture.md.

Rounds where the sampler rounds (float32 throughout), so that the two agree to the bit. Only logarithm and exponential
are torch's, since another library may round those differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from protos.wire import Sampling

F32 = np.float32
MASK32 = (1 << 32) - 1
LIMIT = F32(3e33)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Salmon et al. 2011, with their round function and constants, in Python's own integers."""
    c, k = counter, key
    for i in range(10):
        if i:
            k = ((k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32)
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((p1 >> 32) ^ c[1] ^ k[0], p1 & MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK32)
    return c


def log(x: np.float32) -> np.float32:
    return F32(torch.log(torch.tensor(float(x), dtype=torch.float32)).item())


def exp(x: np.float32) -> np.float32:
    return F32(torch.exp(torch.tensor(float(x), dtype=torch.float32)).item())


def gumbel(seed: int, position: int, token: int) -> np.float32:
    words = philox4x32((token // 4, position, 0, 0), (seed & MASK32, seed >> 32))
    uniform = F32((words[token % 4] >> 9) + 0.5) * F32(2.0**-23)
    return -log(-log(uniform))


@dataclass
class Context:
    """What sampling one token depends on."""

    logits: NDArray[np.float32]  # [V]
    sampling: Sampling
    prompt: list[int]
    output: list[int]
    allowed: NDArray[np.bool_] | None = None  # [V]

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


def bounded(x: np.float32) -> np.float32:
    """No edit takes a logit beyond what any temperature leaves finite; a ban stays one."""
    return x if x == -math.inf else min(max(x, -LIMIT), LIMIT)


@np.errstate(over="ignore")
def edited(at: Context) -> list[np.float32]:
    """Mask, bad words, logit_bias, min_tokens, penalties. Bans that leave nothing are as if nobody had asked."""
    s = at.sampling
    x = [F32(value) for value in at.logits]
    banned = F32(-math.inf)
    if at.allowed is not None:
        x = [value if ok else banned for value, ok in zip(x, at.allowed, strict=True)]
    unbanned = list(x)
    for word in s.bad_words:
        *prefix, last = word
        if at.output[len(at.output) - len(prefix) :] == prefix and len(at.output) >= len(prefix):
            x[last] = banned
    for token, bias in s.logit_bias:
        x[token] = bounded(x[token] + F32(bias))
    ends = set(s.eos_token_ids) | set(s.stop_token_ids)
    must_end = at.allowed is not None and {int(t) for t in np.flatnonzero(at.allowed)} <= ends
    if len(at.output) < s.min_tokens and not must_end:
        for token in ends:
            x[token] = banned
    for token in range(len(x)):
        if token in at.prompt or token in at.output:
            r = F32(s.repetition_penalty)
            x[token] = bounded(x[token] / r if x[token] > 0 else x[token] * r)
            x[token] = bounded(x[token] - bounded(F32(s.frequency_penalty) * F32(at.output.count(token))))
            x[token] = bounded(x[token] - F32(s.presence_penalty) * F32(token in at.output))
    return x if max(x) > banned else unbanned


def likelier_first(x: list[np.float32], tokens: list[int]) -> list[int]:
    return sorted(tokens, key=lambda token: (-x[token], token))


def survivors(at: Context) -> tuple[list[np.float32], list[int]]:
    """Logits over the temperature, and the tokens that may be sampled, likeliest first. Not for greedy rows."""
    s = at.sampling
    x = [value / F32(s.temperature) for value in edited(at)]
    top = max(x)
    tokens = [t for t in range(len(x)) if x[t] > -math.inf]
    if s.min_p > 0:
        tokens = [t for t in tokens if x[t] >= top + F32(np.log(F32(s.min_p)))]
    tokens = likelier_first(x, tokens)
    if s.top_k > 0:
        tokens = tokens[: s.top_k]
    if s.top_p < 1:
        weights = {t: int(exp(x[t] - top) * F32(2.0**40)) for t in tokens}
        target = max(1, math.ceil(s.top_p * sum(weights.values())))
        kept: list[int] = []
        while sum(weights[t] for t in kept) < target:
            kept.append(tokens[len(kept)])
        tokens = kept
    return x, tokens


def sample(at: Context) -> int:
    if at.sampling.temperature == 0:
        x = edited(at)
        return likelier_first(x, list(range(len(x))))[0]
    x, tokens = survivors(at)
    scores = {t: x[t] + gumbel(at.sampling.seed, at.position, t) for t in tokens}
    return min(tokens, key=lambda token: (-scores[token], token))


def distribution(at: Context) -> NDArray[np.float64]:
    """[V] the exact probability of each token."""
    x, tokens = survivors(at)
    weights = np.zeros(len(x))
    weights[tokens] = np.exp([float(x[t]) - float(max(x)) for t in tokens])
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
