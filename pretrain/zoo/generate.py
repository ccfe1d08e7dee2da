"""Captions from a captioner, token by token: greedy, or sampled from the top of the distribution.

N images, P image tokens, Dv their width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.zoo.towers import TextDecoder


def greedy(
    captioner: TextDecoder, image_tokens: Tensor, *, start: int | None, end: int, longest: int | None = None
) -> list[list[int]]:
    """The likeliest token each time.

    Args:
        captioner: the decoder.
        image_tokens: (N, P, Dv).
        start: the token that opens a text; a tokenizer without one is refused where a model is to write.
        end: the token that closes one.
        longest: tokens to generate at most; by default what the captioner can read.

    Returns:
        Of each image, the tokens between start and end, neither of them included.
    """
    return _generate(
        captioner, image_tokens, start=start, end=end, longest=longest, pick=lambda logits: logits.argmax(-1)
    )


def top_p(
    captioner: TextDecoder,
    image_tokens: Tensor,
    *,
    start: int | None,
    end: int,
    p: float,
    generator: torch.Generator,
    longest: int | None = None,
) -> list[list[int]]:
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751); arguments as `greedy`.

    `p` is the probability the candidates must reach together, `generator` the source of chance: the
    same seed gives the same captions.
    """
    return _generate(
        captioner,
        image_tokens,
        start=start,
        end=end,
        longest=longest,
        pick=lambda logits: sample_top_p(logits, p=p, generator=generator),
    )


def sample_top_p(logits: Tensor, *, p: float, generator: torch.Generator) -> Tensor:
    """(N,) tokens drawn from the fewest likeliest of (N, V) logits that together reach probability p."""
    probability, token = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    kept = probability.masked_fill(before >= p, 0.0)
    kept[:, 0] = probability[:, 0]  # the likeliest stays, however small p is
    return token.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def _generate(
    captioner: TextDecoder,
    image_tokens: Tensor,
    *,
    start: int | None,
    end: int,
    longest: int | None,
    pick: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """Extend every text by one picked token at a time until each has met its end."""
    assert start is not None
    cache = captioner.start(image_tokens)
    token = torch.full((len(image_tokens),), start, device=image_tokens.device)
    open_ = torch.ones_like(token, dtype=torch.bool)
    texts: list[Tensor] = []
    for _ in range(min(longest or captioner.context_length, captioner.context_length)):
        state = captioner.extend(token[:, None], cache=cache)[:, -1]
        token = pick(captioner.head.logits(state))
        open_ = open_ & (token != end)
        if not open_.any():
            break
        texts.append(torch.where(open_, token, end))
    rows = torch.stack(texts, dim=1).tolist() if texts else [[] for _ in range(len(image_tokens))]
    return [row[: row.index(end)] if end in row else row for row in rows]
