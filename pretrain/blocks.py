"""The blocks that towers are stacked of, and what can be done to each: computed twice, or compiled.

Both replace a block's `forward` and nothing else, so no parameter changes its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.precision import attention_kernels
from pretrain.zoo.dual import Dual


def blocks_of(model: Dual) -> list[nn.Module]:
    """The blocks of every tower, in the order in which they stand there; each is called by its `forward`.

    A block is a member of a list of modules of one kind which have parts themselves; of lists inside lists
    (the stages of a hierarchical tower) the inner ones count. Fusion runs inside the blocks of the text
    tower, and what it puts there is no block of its own.
    """
    towers = (model.image, model.text, model.captioner)
    found = [block for tower in towers if tower is not None for block in _stacked(tower)]
    return [block for block in found if next(_stacked(block), None) is None]


def glances_of(model: Dual) -> list[nn.Module]:
    """What fusion puts inside blocks of the text tower."""
    return [] if model.fusion is None else list(_stacked(model.fusion))


def _stacked(module: nn.Module) -> Iterator[nn.Module]:
    for each in module.modules():
        if isinstance(each, nn.ModuleList | nn.Sequential) and len({type(member) for member in each}) == 1:
            yield from (member for member in each if next(member.children(), None) is not None)


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Keep of each block its input only, and compute it again in the backward (arXiv 1604.06174)."""
    for block in blocks:
        block.forward = _twice(block.forward, kind=next(block.parameters()).device.type)


def _twice(forward: Callable[..., Any], *, kind: str) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        # torch repeats autocast and random numbers of the first time, but not the choice of kernels.
        return nullcontext(), attention_kernels(kind)

    @functools.wraps(forward)
    def computed_twice(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        if torch.compiler.is_compiling():  # the choice is made once, while it compiles
            return checkpoint(forward, *arguments, use_reentrant=False, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **options)

    return computed_twice


def compile_each(blocks: Sequence[nn.Module]) -> None:
    """Compile each block for itself: blocks of one kind share their code, and hooks stay outside."""
    for block in blocks:
        block.forward = torch.compile(block.forward)
