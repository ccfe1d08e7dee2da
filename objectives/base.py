"""What an objective is: the passes it reads, the units it counts, and the sum it returns.

B images, N texts, T tokens, M pairs of an image and a text, P image tokens, D embedding width,
Dv Dt token widths, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor, nn

from datasets.batch import Batch
from datasets.errors import UserError
from datasets.source import Field
from datasets.weights import Weight, check_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

View = Literal["clean", "masked", "dropped", "weak", "strong", "momentum", "teacher", "none"]
What = Literal["image", "image_tokens", "text", "text_tokens", "decoded", "fused"]
Tower = Literal["image", "text", "captioner", "fusion"]

VOCABULARY: dict[What, tuple[Tower, str]] = {
    "image": ("image", "(B, D) unit norm: one embedding of each image"),
    "image_tokens": ("image", "(B, P, Dv): the image tower's patch states"),
    "text": ("text", "(N, D) unit norm: one embedding of each text"),
    "text_tokens": ("text", "(N, T, Dt): the text tower's token states"),
    "decoded": (
        "captioner",
        "(N, T-1, Dt): states that predict tokens 1..T-1 from earlier ones and the image",
    ),
    "fused": ("fusion", "(M, Dt): of each pair that is asked for, the state that has read text and image"),
}
"""Everything the encoders can say: the tower that says it, and its shape."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of an encoder over one view of an input: data, hashable, declared before any work."""

    what: What
    image: View = "clean"
    text: View = "clean"

    @property
    def run(self) -> tuple[Tower, View, View]:
        """The tower and views that are run; `image` and `image_tokens` of one view share one run."""
        return VOCABULARY[self.what][0], self.image, self.text


IMAGE = Pass("image", text="none")
IMAGE_TOKENS = Pass("image_tokens", text="none")
TEXT = Pass("text", image="none")
TEXT_TOKENS = Pass("text_tokens", image="none")
DECODED = Pass("decoded")
FUSED = Pass("fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images and texts to be read together. The images are of this micro-batch, the texts of any rank's.

    A text travels to the image that it is read with, not the image to the text: its ids are some hundred
    bytes, the tokens of an image some hundred thousand, and ids have no gradient to send back.
    """

    image: Tensor
    """(M,) int64: places of the images among this micro-batch's."""
    tokens: Tensor
    """(M, T) int64: the ids of the text beside each; T is that of the longest."""
    text_length: Tensor
    """(M,) int64"""
    matched: Tensor
    """(M,) bool: whether the two belong together."""

    def of_images(self, first: int, last: int) -> Pairs:
        """Those whose image has a place in first..last-1, counted from there, as long as their longest."""
        here = (self.image >= first) & (self.image < last)
        length = self.text_length[here]
        return Pairs(
            image=self.image[here] - first,
            tokens=self.tokens[here, : int(length.max()) if len(length) else 2],
            text_length=length,
            matched=self.matched[here],
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """What is minimised, and what is watched beside it."""

    total: Tensor
    """() sum over this micro-batch's units; the step divides by the global count of units."""
    metrics: dict[str, Tensor]
    """Detached () sums over the same units; reported divided by the same count."""

    def detached(self) -> Terms:
        """The same without a graph."""
        return Terms(self.total.detach(), self.metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What an objective's heads need to know about the encoders."""

    embed: int
    """D"""
    image_tokens: int
    """Dv"""
    text_tokens: int
    """Dt"""
    vocabulary: int
    """V"""
    temperature: bool
    """Whether the model lends this objective its own logit scale and bias; at most one gets them."""
    contrast: bool
    """Whether another objective trains the embeddings of images and texts, so that they can be compared."""


class Encodings(Protocol):
    """What the encoders say about one micro-batch; each run happens on first use and is kept."""

    group: ProcessGroup | None
    """The ranks that share the global batch; None for one process."""
    key: tuple[int, ...]
    """Of this step, the same on every rank: what an objective draws at random is drawn by it."""

    @property
    def logit_scale(self) -> Tensor:
        """(1,) the model's own log temperature."""
        ...

    @property
    def logit_bias(self) -> Tensor | None:
        """(1,) the model's own bias."""
        ...

    def __getitem__(self, wanted: Pass) -> Tensor:
        """The tensor of a pass, with the shape that VOCABULARY gives."""
        ...

    def fused(self, pairs: Pairs) -> Tensor:
        """(M, Dt) the states of FUSED, of the pairs that are asked for; a run of its own at each call."""
        ...

    def vocabulary_loss(
        self, states: Tensor, targets: Tensor, *, smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the vocabulary head, without logits of the whole batch.

        Args:
            states: (M, Dt) decoder states.
            targets: (M,) token ids.
            smoothing: label smoothing in 0..1.
            z_loss: factor of the squared log-denominator of the softmax.

        Returns:
            () sum of the losses and () count of arg-max hits (detached).
        """
        ...


class Objective(nn.Module, ABC):
    """One thing to minimise. Heads live here; towers do not.

    `forward` returns sums, never means: a mean over a micro-batch is not the mean over the global batch
    when tokens, masks or bad slots differ between ranks. The step adds `denominator` over all
    micro-batches and ranks before the first backward and divides by that.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings every objective has."""

        weight: Weight = 1.0
        """Factor of this objective in the sum: a number, or STEP VALUE points with lines between."""

        def check(self, flag: str) -> None:
            """Refuse settings that mean nothing.

            Args:
                flag: how these settings begin on the command line.

            Raises:
                UserError: names the flag.
            """
            check_weight(self.weight, f"{flag}.weight")
            smoothing = getattr(self, "smoothing", 0.0)
            if not 0 <= smoothing < 1:
                raise UserError(f"{flag}.smoothing is {smoothing}; it lies in 0..1, below 1")

    needs: ClassVar[frozenset[Field]]
    """What a source must hold to feed this objective."""
    temperature: ClassVar[tuple[float, float | None] | None] = None
    """Initial scale and bias of a contrastive objective; the model lends its own pair to the first one."""
    passes: tuple[Pass, ...]
    """What it reads; checked against the model before any work."""
    coupled: tuple[Pass, ...] = ()
    """The passes through which the samples of a batch see each other."""
    draws: ClassVar[bool] = False
    """Whether it reads pairs that it draws out of the whole global batch (`draw`)."""
    remark: str = ""
    """What a user should know of it in this run, without its name and without a stop; said at the start."""

    @property
    def couples(self) -> bool:
        """Whether the samples of a batch see each other."""
        return self.draws or bool(self.coupled)

    @abstractmethod
    def denominator(self, batch: Batch) -> Tensor:
        """() int64: units of this micro-batch (pairs, tokens, masked patches), from the Batch alone."""

    @abstractmethod
    def forward(self, encodings: Encodings, batch: Batch) -> Terms:
        """The sum of this objective over this micro-batch's units.

        One that draws takes `pairs` as a third argument: those that are read with this micro-batch's images.
        """

    def draw(self, encodings: Encodings, batch: Batch) -> Pairs:
        """The pairs to be read with this batch's images; the same whatever the ranks and micro-batches.

        Called once a step and circle, without gradient, with all of this rank's micro-batches as one.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no pairs")

    def clamp(self) -> None:
        """Bring parameters back into their range after an optimizer step, outside the graph."""

    def before(self, step: int) -> None:
        """Called once at the start of a step, also of one that will be skipped.

        What `forward` kept for a `commit` that never came is dropped here. What a checkpoint holds must not
        change: it would have changed for a skipped step.
        """

    def commit(self) -> None:
        """Called once after a step was taken: momentum encoders move towards the new weights, queues advance.

        They do so here and nowhere else, so that a step that is skipped leaves them as they were. The next
        step finds them where moving at its start would have brought them.
        """
