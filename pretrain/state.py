"""What a run must remember between two starts: weights, moments, and where it stands.

Orders, views, dropout and learning rates are functions of the step, so there is nothing else to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from datasets.errors import UserError
from datasets.mixture import Account
from datasets.order import VERSION
from pretrain.curriculum import Curriculum
from pretrain.ema import Ema
from pretrain.pieces import Saved
from pretrain.rundir import RunDir

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What tells a source from another."""

    fingerprint: str
    size: int | None
    """Samples in an epoch; None for a source without end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands, beside its tensors."""

    data: Mapping[str, Known]
    """What each source is."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    optimizer: str = ""
    """The kind whose moments stand beside the weights."""
    order: int = VERSION
    """Of the function that says which sample stands where."""
    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples used, of all sources together."""
    behind: Mapping[str, int] = field(default_factory=dict)
    """The stages before that of the latest step, in order, and the steps that each had."""
    shift: int = 0
    """What `samples` is beyond the steps of these stages, after a change that was allowed."""
    accounts: Mapping[str, Account] = field(default_factory=dict)
    """Where each source stands."""
    masked: Mapping[str, int] = field(default_factory=dict)
    """Samples that could not be read so far, counted each time, by kind."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Steps so far that were skipped because something of them was not finite, by kind."""
    streak: int = 0
    """How many of these are the latest steps, one after the other."""
    samples_before: int = 0
    """Samples used before the present list of unusable ones began: budgets count from there."""
    masked_before: int = 0
    """How many of those could not be read."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def listing_anew(self) -> Standing:
        """The same, where the list of unusable samples begins."""
        return replace(self, samples_before=self.samples, masked_before=sum(self.masked.values()))

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Standing:
        """What `plain` wrote.

        Raises:
            UserError: it was written by a release that remembered other things.
        """
        try:
            return cls(
                **{
                    **saved,
                    "data": {name: Known(**known) for name, known in saved["data"].items()},
                    "accounts": {name: Account(**account) for name, account in saved["accounts"].items()},
                }
            )
        except (TypeError, AttributeError, KeyError) as error:
            raise UserError(
                "the checkpoint was written by another release, which remembered other things: go on with "
                "that release, or choose another --out"
            ) from error

    def resumed(self, before: Standing, curriculum: Curriculum, *, allowed: bool = False) -> Standing:
        """Where a checkpoint stands, with the data that are here now.

        Args:
            before: what the checkpoint says.
            curriculum: the stages to go on with.
            allowed: whether data and stages may differ from what was trained.

        Raises:
            UserError: it is of another tokenizer or, unless allowed, of another order, or at a place that
                these stages do not have.
        """
        if before.tokenizer != self.tokenizer:
            raise UserError(
                f"the tokenizer has changed since the checkpoint of step {before.step} "
                f"({before.tokenizer[:12]} then, {self.tokenizer[:12]} now): bring it back, or choose "
                "another --out"
            )
        if before.step > curriculum.steps:
            raise UserError(_ELSEWHERE.format(before.step, before.samples))
        behind = curriculum.finished_at(before.step - 1)
        if not allowed and list(before.behind.items()) != list(behind.items()):
            raise UserError(
                f"the checkpoint of step {before.step} was trained through {_stages(before.behind)}, and "
                f"these stages say {_stages(behind)}: give them their old names and --stages.NAME.steps, "
                "use another --out, or go on in spite of it with --allow-changed"
            )
        shift = before.samples - curriculum.samples_at(before.step)
        if shift != before.shift and not allowed:
            raise UserError(_ELSEWHERE.format(before.step, before.samples))
        accounts = {name: before.accounts.get(name, Account()) for name in self.data}
        if allowed:
            # What is owed adds up to nothing among the sources of then, in parts of the lanes of then.
            accounts = {name: Account(account.position) for name, account in accounts.items()}
        return replace(
            before,
            data=self.data,
            optimizer=self.optimizer,
            order=self.order,
            accounts=accounts,
            shift=shift,
            behind=behind,
        )


def goes_on(before: Standing, curriculum: Curriculum, stage: str) -> bool:
    """Whether a stage goes on with the moments of a checkpoint.

    Raises:
        UserError: it should, and they are of another kind of optimizer.
    """
    stretch = curriculum.of_stage(stage)[0]
    if before.step == stretch.begins and stretch.stage.moments == "fresh":
        return False
    kind = stretch.stage.optim.kind
    if before.step and before.optimizer != kind:
        raise UserError(
            f"the checkpoint of step {before.step} holds what {before.optimizer} kept, of which "
            f"--stages.{stage}.optim.kind {kind} makes nothing: take {before.optimizer}, or another --out"
        )
    return True


def check_begun(standing: Standing, curriculum: Curriculum, stage: str, rundir: RunDir) -> None:
    """Refuse to begin a stage without what the one before has trained.

    Raises:
        UserError: there is no checkpoint of its end.
    """
    begins = curriculum.of_stage(stage)[0].begins
    if standing.step < begins:
        raise UserError(
            f"stage {stage!r} begins at step {begins}, and {rundir.checkpoints} holds no checkpoint of it: "
            "bring it back, or choose another --out"
        )


def _stages(behind: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({steps} steps)" for name, steps in behind.items()) or "no stage to its end"


_ELSEWHERE = (
    "the checkpoint of step {} has used {} samples, which does not fit these stages: give the finished ones "
    "their old --stages.NAME.steps, use another --out, or go on in spite of it with --allow-changed"
)


def capture(pretrainer: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None) -> Tensors:
    """Weights, moments and averages by name, as this rank holds them: sharded ones as DTensors.

    A count of steps that an optimizer keeps for a whole group (LAMB) is that of each of its parameters:
    groups may be others in another stage.
    """
    model = pretrainer.state_dict()  # first: it makes FSDP2 shard what an evaluation left whole
    groups = _groups(optimizer)
    moments = {
        f"{name}.{key}": value
        for name, parameter in pretrainer.named_parameters()
        if (state := optimizer.state.get(parameter))
        for key, value in {**state, "step": groups[parameter].get("step", state.get("step"))}.items()
        if isinstance(value, Tensor)
    }
    averages = {} if ema is None else {"ema": ema.averages}
    return {"model": model, "optimizer": moments, **averages}


def restore(
    saved: Mapping[str, Saved],
    pretrainer: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    moments: bool = True,
    ema: Ema | None = None,
) -> None:
    """Put weights, moments and averages back where `capture` took them, however they are sharded now.

    Each rank reads only the parts that it holds. A moment of the shape of its parameter is sharded like that,
    one of another shape is whole on every rank. What does not train now gets no moments. Averages that were
    not saved begin with the weights that were.

    Args:
        saved: group to its tensors.
        pretrainer: wrapped already.
        optimizer: over its parameters.
        moments: False leaves the optimizer as it is.
        ema: the averages of its parameters, if there are any.
    """
    model = pretrainer.state_dict()
    pretrainer.load_state_dict({name: saved["model"].like(name, model.get(name)) for name in saved["model"]})
    if moments:
        _restore_moments(saved["optimizer"], pretrainer, optimizer)
    if ema is not None:
        ema.restore(saved.get("ema"))


def _restore_moments(saved: Saved, pretrainer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    keys: dict[str, list[str]] = {}
    for at in saved:
        name, _, key = at.rpartition(".")
        keys.setdefault(name, []).append(key)
    groups, fused = _groups(optimizer), bool(optimizer.defaults.get("fused"))
    for name, parameter in pretrainer.named_parameters():
        if parameter not in groups or name not in keys:
            continue
        group = groups[parameter]
        state = optimizer.state[parameter] = {
            key: _as_kept(key, saved.like(f"{name}.{key}", parameter), parameter, group, fused)
            for key in keys[name]
        }
        if "step" in group:
            group["step"].copy_(torch.maximum(group["step"], state.pop("step")))


def _groups(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The group of each parameter that trains."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _as_kept(key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any], fused: bool) -> Tensor:
    """A moment where the optimizer keeps it, in the type that it has there now."""
    if key == "step":
        # A fused optimizer counts its steps on the device, others in host memory.
        return value.to(parameter.device) if fused else value
    # Adafactor's momentum has a type of its own; all other moments have that of their parameter.
    kept_in = group.get("momentum_dtype", parameter.dtype) if key == "exp_avg" else parameter.dtype
    value = value.to(parameter.device, kept_in)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        mesh = parameter.device_mesh
        return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return value
