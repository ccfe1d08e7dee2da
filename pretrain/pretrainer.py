"""Encoders and objectives as one module: the thing that is wrapped, in every phase of a step.

Losses live inside the wrapper, because heads and temperatures are trained, synchronised and saved like any
other parameter, and because a wrapper only sees what passes through `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from datasets.batch import Batch
from objectives.base import Objective, Pairs, Pass, Terms
from pretrain.apart import alone, finite_by_sample
from pretrain.encodings import ModelEncodings
from pretrain.zoo.dual import Dual, check_served

Phase = Literal["encode", "couple", "push", "inspect"]
"""encode: only the passes of coupled objectives, no gradient.
couple: coupled objectives on the encodings of several micro-batches together.
push: objectives to which this micro-batch alone is the truth, and the gradients that `couple` gave.
inspect: which samples have encodings and losses, of their own, that are not finite; no gradient."""


class Outcome(NamedTuple):
    """What `push` says. A tuple, because wrappers look for tensors in tuples."""

    total: Tensor
    """() to call backward on: already weighted, already divided by the global counts."""
    terms: dict[str, Terms]
    """Each objective's raw sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """What `couple` says. Nothing of it has a graph."""

    terms: dict[str, Terms]
    """The raw sums of each objective that has said everything."""
    gradients: dict[Pass, Tensor]
    """At the encodings."""
    pull: dict[str, Tensor]
    """At parameters of coupled objectives' own, by name."""
    pairs: dict[str, Pairs]
    """What each objective that draws has drawn."""


class Pretrainer(nn.Module):
    """The joint forward of all objectives over one shared set of encoders."""

    def __init__(
        self,
        model: Dual,
        objectives: Mapping[str, Objective],
        group: ProcessGroup | None = None,
        *,
        feeds: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Join them.

        Args:
            model: the encoders.
            objectives: by name.
            group: the ranks that share the global batch.
            feeds: of each source, the objectives that see its batches; by default every one sees all.
        """
        super().__init__()
        self._feeds = feeds
        for name, objective in objectives.items():
            check_served(model.gives(), name, objective.passes)
        self.model = model
        self.objectives: Mapping[str, Objective] = nn.ModuleDict(objectives)  # type: ignore[assignment]
        self.group = group

    def fed_by(self, source: str) -> list[str]:
        """The objectives that see the batches of a source."""
        return [name for name in self.objectives if self._feeds is None or name in self._feeds[source]]

    def fed(self) -> list[str]:
        """The objectives that see the batches of any source."""
        feeds = self._feeds
        return [
            name for name in self.objectives if feeds is None or any(name in fed for fed in feeds.values())
        ]

    def coupled(self, names: Sequence[str]) -> tuple[Pass, ...]:
        """The passes through which samples of a batch see each other, of these objectives, each once."""
        return tuple(dict.fromkeys(wanted for name in names for wanted in self.objectives[name].coupled))

    def coupled_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that coupled objectives read beside the encodings: temperatures and heads."""
        named = [("model.logit_scale", self.model.logit_scale)]
        if self.model.logit_bias is not None:
            named.append(("model.logit_bias", self.model.logit_bias))
        for name, objective in self.objectives.items():
            if objective.coupled:
                named += [(f"{name}.{key}", value) for key, value in objective.named_parameters()]
        return named

    def forward(
        self,
        batch: Batch,
        *,
        phase: Phase,
        names: Sequence[str],
        factors: Mapping[str, Tensor],
        key: tuple[int, ...],
        piece: tuple[int, ...] = (),
        given: Mapping[Pass, Tensor] | None = None,
        pairs: Mapping[str, Pairs] | None = None,
        pull: Mapping[str, Tensor] | None = None,
        rounds: int = 0,
    ) -> Outcome | Coupling | dict[Pass, Tensor] | dict[str, Tensor]:
        """One phase over one micro-batch.

        Args:
            batch: the micro-batch; of `couple`, several joined (see `join`).
            phase: see Phase.
            names: the objectives it is about.
            factors: () weight / global count of each objective.
            key: of this step, the same on every rank.
            piece: which micro-batch of the step it is; with the key, that of its dropout and its like.
            given: of `couple`, the encodings of the joined batches; of `push`, their gradients for this
                micro-batch.
            pairs: of `push`, what objectives that draw have drawn for this micro-batch; what is not there
                is drawn from this micro-batch alone.
            pull: of `push`, once a step: the gradients that `couple` gave to parameters of its own, by name.
            rounds: of `inspect`, the samples of the largest micro-batch of any rank.

        Returns:
            Of `encode`, the coupled passes; of `couple`, a Coupling; of `push`, an Outcome; of `inspect`,
            (S,) bool by what was looked at: whether that of each sample is finite.
        """
        encodings = ModelEncodings(
            self.model,
            batch,
            group=self.group,
            key=key,
            piece=piece,
            given=given if phase == "couple" else None,
        )
        if phase == "encode":
            return {wanted: encodings[wanted] for wanted in self.coupled(names)}
        if phase == "couple":
            return self._couple(encodings, batch, names, factors)
        if phase == "inspect":
            return self._inspect(encodings, batch, names, rounds)
        terms = {name: self._say(name, encodings, batch, (pairs or {}).get(name)) for name in names}
        total = self._weighted(terms, factors)
        # A term whose gradient is the known one: the wrapper sees every parameter inside its forward.
        for wanted, gradient in (given or {}).items():
            total = total + (encodings[wanted] * gradient).sum()
        parameters = dict(self.coupled_parameters())
        for name, gradient in (pull or {}).items():
            total = total + (parameters[name] * gradient).sum()
        return Outcome(total, terms)

    def _couple(
        self,
        encodings: ModelEncodings,
        batch: Batch,
        names: Sequence[str],
        factors: Mapping[str, Tensor],
    ) -> Coupling:
        # The gradients are taken here, because a wrapper may lend whole parameters only inside forward.
        pairs = {name: self.objectives[name].draw(encodings, batch) for name in names if self._draws(name)}
        leaves = {wanted: encodings[wanted].requires_grad_() for wanted in self.coupled(names)}
        own = {name: value for name, value in self.coupled_parameters() if value.requires_grad}
        with torch.enable_grad():
            terms = {name: self._say(name, encodings, batch, None) for name in names if not self._draws(name)}
            total = self._weighted(terms, factors)
        found: Sequence[Tensor | None] = [None] * (len(leaves) + len(own))
        if terms:
            found = torch.autograd.grad(total, [*leaves.values(), *own.values()], allow_unused=True)
        return Coupling(
            terms=terms,
            gradients={at: value for at, value in zip(leaves, found, strict=False) if value is not None},
            pull={at: v for at, v in zip(own, found[len(leaves) :], strict=True) if v is not None},
            pairs=pairs,
        )

    def _inspect(
        self, encodings: ModelEncodings, batch: Batch, names: Sequence[str], rounds: int
    ) -> dict[str, Tensor]:
        passes = dict.fromkeys(wanted for name in names for wanted in self.objectives[name].passes)
        given = {wanted: encodings[wanted] for wanted in passes if wanted.what != "fused"}
        found: dict[str, Tensor] = {}
        for wanted, rows in given.items():
            found[f"{wanted.what} encoding"] = finite_by_sample(
                rows, batch, of="image" if wanted.run[0] == "image" else "text"
            )
        for name in names:
            if batch.keys and not self._draws(name):  # a sample alone has no others to draw from
                # As often as on the other ranks: a wrapper may lend a head's parameters at each call.
                places = [min(place, len(batch.keys) - 1) for place in range(rounds)]
                losses = [self._loss_alone(name, encodings.key, batch, place, given) for place in places]
                found[f"loss of {name}"] = torch.stack(losses[: len(batch.keys)]).isfinite()
        return found

    def _loss_alone(
        self, name: str, key: tuple[int, ...], batch: Batch, place: int, given: Mapping[Pass, Tensor]
    ) -> Tensor:
        """() the loss of one sample as if there were no other."""
        one, rows = alone(batch, place)
        its = {at: value[rows["image" if at.run[0] == "image" else "text"]] for at, value in given.items()}
        encodings = ModelEncodings(self.model, one, group=None, key=key, given=its)
        return self.objectives[name](encodings, one).total

    def _draws(self, name: str) -> bool:
        return self.objectives[name].draws

    def _say(self, name: str, encodings: ModelEncodings, batch: Batch, pairs: Pairs | None) -> Terms:
        objective = self.objectives[name]
        if not objective.draws:
            return objective(encodings, batch)
        if pairs is None:
            for wanted in objective.coupled:  # kept as others read it too, with its graph
                _ = encodings[wanted]
            with torch.no_grad():
                pairs = objective.draw(encodings, batch)
        return objective(encodings, batch, pairs)

    def _weighted(self, terms: Mapping[str, Terms], factors: Mapping[str, Tensor]) -> Tensor:
        total = self.model.logit_scale.new_zeros(())
        for name, said in terms.items():
            total = total + factors[name] * said.total
        return total

    def clamp(self) -> None:
        """Bring bounded parameters back into their range, after the optimizer step."""
        self.model.clamp()
        for objective in self.objectives.values():
            objective.clamp()


def join(batches: Sequence[Batch]) -> Batch:
    """Several micro-batches of a step as one batch, for what couples them. Pixels stay behind.

    A coupled objective reads encodings, words and identities; carrying the images along would double
    the memory that micro-batches were chosen to save.
    """
    shift, shifted = 0, []
    longest = max(batch.tokens.shape[1] for batch in batches)
    for batch in batches:
        index = batch.image_index
        shifted.append(torch.where(index >= 0, index + shift, index))
        shift += len(batch.images)

    def together(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return replace(
        batches[0],
        images=torch.cat([batch.images[:, :, :0, :0] for batch in batches]),
        image_valid=together("image_valid"),
        tokens=torch.cat([F.pad(batch.tokens, (0, longest - batch.tokens.shape[1])) for batch in batches]),
        text_length=together("text_length"),
        image_index=torch.cat(shifted),
        text_valid=together("text_valid"),
        text_id=together("text_id"),
        boxes=together("boxes"),
        box_valid=together("box_valid"),
        keys=tuple(key for batch in batches for key in batch.keys),
        sample_id=together("sample_id"),
    )
