"""How far a model's next-token distribution is from a reference's: arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Marks:
    """Of each position [n], in nats."""

    kl: Tensor  # KL(reference ‖ other)
    rise: Tensor  # of −log p of the token that follows, over the reference's
    same: Tensor  # whether both find the same token likeliest, as 0 or 1

    @classmethod
    def join(cls, parts: list[Marks]) -> Marks:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "rise", "same")))


class Reference:
    """What others are compared with: its logits [n, vocab] float32, and the tokens [n] that follow."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        logprobs = torch.log_softmax(logits, -1)
        self.surprise = -logprobs.gather(1, targets[:, None])[:, 0].double()  # [n] −log p of the token that follows
        self._logits, self._targets, self._best = logits, targets, logits.argmax(-1)
        self._probs = logprobs.exp_()
        self._mass = self._probs.sum(-1, keepdim=True, dtype=torch.float64)  # 1, but for float32's rounding

    def marks(self, logits: Tensor) -> Marks:
        """`logits` [n, vocab] float32 of the other model.

        With d the other's logits less the reference's, and their mean under the reference taken off, the divergence is
        log Σ p e^d = log1p(Σ p (e^d − 1)): exact where the two are close, where a difference of two logarithms is not.
        """
        d = logits - self._logits
        d -= ((self._probs * d).sum(-1, keepdim=True, dtype=torch.float64) / self._mass).float()
        at_target = d.gather(1, self._targets[:, None])[:, 0].double()
        kl = d.expm1_().mul_(self._probs).sum(-1, dtype=torch.float64).log1p_()
        return Marks(kl, kl - at_target, (logits.argmax(-1) == self._best).double())


@dataclass(frozen=True)
class Estimate:
    mean: float
    error: float  # standard error of the mean, as if positions were independent

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))

    def as_growth(self) -> Estimate:
        """Of a mean difference of log perplexity: by which share perplexity grows."""
        grown = math.exp(self.mean)
        return Estimate(grown - 1, grown * self.error)
