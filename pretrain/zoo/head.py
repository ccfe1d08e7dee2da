"""The vocabulary head: states to logits, and their cross-entropy without the logits of a whole batch.

M states, Dt their width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

_ROWS = 256
"""States at a time, at least. With fewer, the matrix is read too often for what is computed with it."""
_LOGITS = 1 << 22
"""Logits at a time, where these are more states than that: 16 MiB of float32."""
_COLUMNS = 4096
"""Words in a product on a CPU: what it reads and adds to stays in the cache."""


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

    def forward(
        self, states: Tensor, targets: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, label-smoothed as `torch.nn.functional.cross_entropy` defines it.

        The gradients are computed beside the loss, chunk by chunk, so the logits are never all there
        (Cut Cross-Entropy, arXiv 2411.09009, has the same aim), and they are given away in backward, which
        therefore can be run once. Under autocast the products run in its type; the softmax is float32 in
        any case.

        Args:
            states: (M, Dt).
            targets: (M,) int64 in 0..V-1.
            smoothing: share of the target spread evenly over the vocabulary, in 0..1.
            z_loss: factor of the squared logarithm of the softmax's denominator, which is added to each
                loss and keeps logits from drifting (PaLM, arXiv 2204.02311, 5; Chameleon, arXiv 2405.09818).

        Returns:
            () sum of the losses, and () count of states whose arg-max is the target (detached).
        """
        kind = states.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        train = torch.is_grad_enabled()
        with torch.autocast(kind, enabled=False):
            return _ChunkedLoss.apply(states, self.matrix, targets, smoothing, z_loss, low, train)  # pyright: ignore[reportReturnType]


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
        ctx: FunctionCtx,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        z_loss: float,
        low: torch.dtype,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(low, torch.float32)
        M, V = len(states), len(weight)
        rows = min(M, max(_ROWS, _LOGITS // V))
        words = _split(V, _COLUMNS if states.device.type == "cpu" else V)
        matrix = weight.to(low)
        loss = torch.zeros((), dtype=exact, device=states.device)
        hits = torch.zeros((), dtype=torch.int64, device=states.device)
        needed = [train and need for need in ctx.needs_input_grad[:2]]  # pyright: ignore[reportAttributeAccessIssue]
        d_states = torch.zeros_like(states, dtype=exact) if needed[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        room = torch.empty(rows, V, dtype=exact, device=states.device)
        for part in _split(M, rows):
            block, target = states[part].to(low), targets[part, None]
            logits = room[: len(block)]
            for some in words:
                _multiply(block, matrix[some].T, out=logits[:, some])
            losses, top = _to_slope(logits, target, smoothing=smoothing, z_loss=z_loss)
            loss += losses
            hits += (top == target).sum()
            for some in words if any(needed) else ():
                slope = logits[:, some].to(low)
                if d_states is not None:
                    _add_product(slope, matrix[some], to=d_states[part])
                if d_weight is not None:
                    _add_product(slope.T, block, to=d_weight[some])
        ctx.ready = [  # pyright: ignore[reportAttributeAccessIssue]
            None if d is None else d.to(like.dtype) for d, like in ((d_states, states), (d_weight, weight))
        ]
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, scale: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Taken out of the context: autograd makes a gradient that nobody else holds its own, without a copy.
        ready, ctx.ready = ctx.ready, None  # pyright: ignore[reportAttributeAccessIssue]
        if ready is None:
            raise RuntimeError("the gradients of a vocabulary loss were given away by its first backward")
        for d in ready:
            if d is not None:
                d.mul_(scale)
        return *ready, None, None, None, None, None


def _split(total: int, size: int) -> list[slice]:
    """0..total in parts of at most `size`."""
    return [slice(first, min(first + size, total)) for first in range(0, total, max(size, 1))]


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """The product, in the type of the factors, written to `out`."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(left: Tensor, right: Tensor, *, to: Tensor) -> None:
    """The product, in the type of the factors, added to `to`."""
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to.add_(left @ right)


def _to_slope(logits: Tensor, target: Tensor, *, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """The () loss of (m, V) logits, in whose place its gradient is left, and their (m, 1) arg-max."""
    V = logits.shape[1]
    top = logits.argmax(dim=1, keepdim=True)
    highest, right = logits.gather(1, top), logits.gather(1, target)
    total = logits.sum() if smoothing else 0.0
    torch.softmax(logits, dim=1, out=logits)
    # The probability of the highest is at least 1 / V, so its logarithm is exact where others underflow.
    log_sum = highest - logits.gather(1, top).log()
    loss = (log_sum - (1 - smoothing) * right).sum() - smoothing / V * total
    if z_loss:
        loss += z_loss * log_sum.square().sum()
        logits.mul_(1 + 2 * z_loss * log_sum)
    if smoothing:
        logits.sub_(smoothing / V)
    logits.scatter_add_(1, target, torch.full_like(right, smoothing - 1))
    return loss, top
