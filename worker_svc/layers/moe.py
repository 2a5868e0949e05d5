"""Experts: of many MLPs, each token takes the few that a router chooses for it (Shazeer et al., 1701.06538).

    pairs (token, choice), sorted by expert   | expert 0 …  | expert 2 … | expert 5 …     a product each, in row tiles
    back in the tokens' order                 | choice 0 | choice 1 | …                   added by weight, in order

Which tokens share an expert's product is the batch's doing, and must not show (R2): its rows are in tiles of the sizes
for which `Linear` has shown that it does not, and each token adds up its own choices, in their own order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker_svc.layers.linear import Linear, padded_rows
from worker_svc.layers.mlp import GatedMLP


class MoE:
    def __init__(self, router: Linear, experts: list[GatedMLP], top_k: int, normalized: bool) -> None:
        """`router`: float32, a row an expert. `normalized`: the weights of a token's choices add up to 1."""
        self._router, self._experts, self._top_k, self._normalized = router, experts, top_k, normalized

    def __call__(self, x: Tensor, num_tokens: int) -> Tensor:
        """x [T, hidden] of the experts' dtype, T = padded_rows(num_tokens) → [T, hidden] float32, zeros from
        num_tokens on.
        """
        chosen, weights = self.route(x)
        each = self._each(x, chosen[:num_tokens].flatten()).view(num_tokens, self._top_k, -1)
        out = torch.zeros(x.shape)
        for j in range(self._top_k):
            out[:num_tokens] += each[:, j] * weights[:num_tokens, j, None]
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] → the experts of each token [T, top_k], likeliest first, and their weights [T, top_k] float32."""
        logits = self._router(x.float())
        chosen = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self._top_k]
        likelihoods = (logits - logits.amax(-1, keepdim=True)).exp_()
        weights = likelihoods.gather(1, chosen)
        return chosen, weights / (weights if self._normalized else likelihoods).sum(-1, keepdim=True)

    def _each(self, x: Tensor, experts: Tensor) -> Tensor:
        """What pair i, of token i // top_k with expert experts[i], comes to: [pairs, hidden] float32."""
        order = experts.argsort(stable=True)
        out = torch.empty(len(experts), x.shape[1])
        start = 0
        for expert, count in enumerate(experts.bincount(minlength=len(self._experts)).tolist()):
            if count:
                pairs = order[start : start + count]
                rows = pairs.new_zeros(padded_rows(count))
                rows[:count] = pairs // self._top_k
                out[pairs] = self._experts[expert](x[rows])[:count].float()
            start += count
        return out

    def linears(self) -> list[Linear]:
        return [self._router, *(linear for expert in self._experts for linear in expert.linears())]
