"""The vocabulary head: states to logits, and their cross-entropy without the logits of a whole batch.

M states, Dt their width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK = 1 << 22
"""Logits that exist at a time: 16 MiB of float32."""


class VocabularyHead(nn.Module):
    """A linear map to the vocabulary around its (V, Dt) matrix, which may serve elsewhere as well."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    @property
    def matrix(self) -> Tensor:
        """(V, Dt)."""
        return self.weight

    def logits(self, states: Tensor) -> Tensor:
        """(..., V) logits of (..., Dt) states, for generation."""
        logits = F.linear(states, self.matrix)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, states: Tensor, targets: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy, label-smoothed as `torch.nn.functional.cross_entropy` defines it.

        The gradients are computed beside the loss, chunk by chunk, so the logits are never all there
        (Cut Cross-Entropy, arXiv 2411.09009, has the same aim). Under autocast the products run in its
        type; the softmax is float32 in any case.

        Args:
            states: (M, Dt).
            targets: (M,) int64 in 0..V-1.
            smoothing: share of the target spread evenly over the vocabulary, in 0..1.

        Returns:
            () sum of the losses, and () count of states whose arg-max is the target (detached).
        """
        kind = states.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        with torch.autocast(kind, enabled=False):
            return _ChunkedLoss.apply(states, self.matrix, targets, smoothing, low, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class ColumnHead(VocabularyHead):
    """The same around a (Dt, V) matrix, as open_clip's CoCa keeps it. Nothing is copied: this is a view."""

    @property
    def matrix(self) -> Tensor:
        """(V, Dt)."""
        return self.weight.T


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies; forward leaves the gradients ready, backward only scales them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        low: torch.dtype,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(low, torch.float32)
        matrix = weight.to(low)
        V = weight.shape[0]
        loss = torch.zeros((), dtype=exact, device=states.device)
        hits = torch.zeros((), dtype=torch.int64, device=states.device)
        d_states = torch.empty_like(states) if train else None
        d_weight = torch.zeros_like(weight, dtype=exact) if train else None
        step = max(1, _CHUNK // V)
        for first in range(0, len(states), step):
            part = slice(first, first + step)
            block, target = states[part].to(low), targets[part, None]
            logits = (block @ matrix.T).to(exact)
            hits += (logits.argmax(dim=1, keepdim=True) == target).sum()
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            right = logits.gather(1, target)
            loss += (log_sum - (1 - smoothing) * right).sum() - smoothing / V * logits.sum()
            if d_states is None or d_weight is None:
                continue
            # The gradient at the logits, softmax - smoothed target, takes their place.
            logits.sub_(log_sum).exp_().sub_(smoothing / V)
            logits.scatter_add_(1, target, torch.full_like(right, smoothing - 1))
            slope = logits.to(low)
            d_states[part] = slope @ matrix
            d_weight += slope.T @ block
        if d_states is not None and d_weight is not None:
            ctx.save_for_backward(d_states, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx, scale: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_states, d_weight = (d * scale.to(d.dtype) for d in ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue]
        return d_states, d_weight, None, None, None, None
