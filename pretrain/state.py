"""What a run must remember between two starts: weights, moments, and where it stands.

Orders, views, dropout and learning rates are functions of the step, so there is nothing else to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from datasets.errors import UserError
from pretrain.curriculum import Curriculum
from pretrain.pretrainer import Pretrainer

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands, beside its tensors."""

    data: str
    """Fingerprint of the data."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Samples of the data used."""
    masked: int = 0
    """Samples that could not be read so far, counted each time."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def resumed(self, saved: Mapping[str, Any], curriculum: Curriculum) -> Standing:
        """Where a checkpoint stands.

        Raises:
            UserError: it is of other data, of another tokenizer, or at a place that these stages do not
                have; names what changed.
        """
        before = Standing(**saved)
        if before.step > curriculum.steps or curriculum.samples_at(before.step) != before.position:
            raise UserError(
                f"the checkpoint of step {before.step} has used {before.position} samples, which does not "
                "fit these stages: give the finished ones their old --stages.NAME.steps, or use another --out"
            )
        for key in ("data", "tokenizer"):
            then, now = getattr(before, key), getattr(self, key)
            if then != now:
                raise UserError(
                    f"the {key} has changed since the checkpoint of step {before.step} "
                    f"({then[:12]} then, {now[:12]} now): bring it back, or choose another --out"
                )
        return before


def capture(pretrainer: Pretrainer, optimizer: torch.optim.Optimizer) -> Tensors:
    """Weights and moments by name."""
    moments = {
        f"{name}.{key}": value
        for name, parameter in pretrainer.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return {"model": pretrainer.state_dict(), "optimizer": moments}


def restore(tensors: Tensors, pretrainer: Pretrainer, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back where `capture` took them."""
    pretrainer.load_state_dict(dict(tensors["model"]))
    moments: dict[str, dict[str, Tensor]] = {}
    for at, value in tensors["optimizer"].items():
        name, _, key = at.rpartition(".")
        moments.setdefault(name, {})[key] = value
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in pretrainer.named_parameters():
        # A fused optimizer counts its steps on the device, others in host memory.
        optimizer.state[parameter] = {
            key: value if key == "step" and not fused else value.to(parameter.device)
            for key, value in moments.get(name, {}).items()
        }
