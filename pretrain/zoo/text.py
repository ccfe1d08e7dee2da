"""Text towers around open_clip's: no padding is computed where padding cannot be seen.

N texts, T tokens of the batch's longest text, S columns that are run, D embedding width, W token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.errors import UserError
from datasets.tokens import Tokenizer
from pretrain.zoo.towers import Encoded, TextTower

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.transformer import TextTransformer


def _columns(tokens: Tensor, length: Tensor, *, columns: int, pad_id: int) -> Tensor:
    """(N, S) the texts, continued to `columns`, with `pad_id` behind each one's `length`."""
    assert tokens.shape[1] <= columns, "a text is longer than the context: its end would be lost"
    tokens = F.pad(tokens, (0, columns - tokens.shape[1]))
    places = torch.arange(columns, device=tokens.device)
    return tokens.masked_fill(places >= length[:, None], pad_id)


def _padding_is_unseen(tower: TextTransformer) -> bool:
    """Whether a text gives the same embedding however much padding stands behind it.

    A class token masks the padding, and is what is pooled. Otherwise no token before the end may see one
    behind it (a causal mask, or a mask of the padding), nor may padding itself be pooled.
    """
    if tower.cls_emb is not None:
        return True
    masked = tower.attn_mask is not None or tower.use_pad_mask
    return masked and tower.pool_type in ("argmax", "eos", "first")


class Glance(NamedTuple):
    """What one block of a text tower sees of images, between its self-attention and its MLP."""

    look: nn.Module
    """(N, S, W) states, and what is below, to (N, S, W) that is added to the states."""
    seen: Tensor
    """(B, P, 2W) keys and values of the images."""
    image: Tensor
    """(N,) int64, the image of each text."""


class OpenClipText(TextTower):
    """open_clip's TextTransformer, as long as the batch's longest text where that changes nothing.

    Its parts are run as `TextTransformer.forward` runs them (open_clip, src/open_clip/transformer.py).
    Where open_clip pools by `argmax`, it takes the largest id of a text for its end: no word may come
    behind the end token in the vocabulary.

    Attributes:
        tower: open_clip's module; its parameters are this tower's.
        trims: whether texts are run only as long as the longest one; else at the context length.
        pad_id: what stands behind a text. It matters only where `trims` is False: then it has to be
            what the model was trained with, which its tokenizer knows.
    """

    def __init__(self, tower: TextTransformer, *, pad_id: int | None = None) -> None:
        from open_clip.transformer import text_global_pool

        super().__init__()
        self.tower = tower
        self.pad_id = tower.pad_id if pad_id is None else pad_id
        self.width = tower.width
        self.embed = tower.width if tower.text_projection is None else cast(int, tower.output_dim)
        self.heads = tower.heads
        self.context_length = tower.context_length
        self.trims = _padding_is_unseen(tower)
        self._pool = text_global_pool

    def forward(
        self, tokens: Tensor, length: Tensor, *, glances: Sequence[Glance | None] | None = None
    ) -> Encoded:
        """Encode texts.

        Args:
            tokens: (N, T) int64 ids.
            length: (N,) how many of each row are text.
            glances: of each block, what it sees of images, if anything. The blocks that do must have been
                made to (`pretrain.zoo.grounded`). What is pooled is then not projected: (N, W).
        """
        tower = self.tower
        T = tokens.shape[1]
        text = _columns(tokens, length, columns=self._longest(T), pad_id=self.pad_id)
        S = text.shape[1]
        hidden = tower.token_embedding(text) + tower.positional_embedding[:S]
        if tower.cls_emb is not None:
            # Appended behind everything, it has the last position however short the texts are.
            token = (tower.cls_emb + tower.positional_embedding[-1]).expand(len(text), 1, -1)
            hidden = torch.cat([hidden, token], 1)
        mask = self._mask(text, hidden)
        if glances is None:
            hidden = tower.transformer(hidden, attn_mask=mask)
        else:
            for block, glance in zip(tower.transformer.resblocks, glances, strict=True):
                hidden = block(hidden, attn_mask=mask, **({} if glance is None else {"glance": glance}))
        if tower.cls_emb is not None:
            pooled = tower.ln_final(hidden[:, -1])
        else:
            hidden = tower.ln_final(hidden)
            pooled = self._pool(hidden, text, pool_type=tower.pool_type, eos_token_id=tower.eos_id)
        return Encoded(self._project(pooled) if glances is None else pooled, hidden[:, :T])

    def _longest(self, T: int) -> int:
        """S for a batch of T tokens."""
        if not self.trims:
            return self.context_length
        # The mask of CoCa's weights is shifted by one (open_clip: "incorrect legacy mode"), so its class
        # token sees the first token of padding: one column more, and the result is the padded one.
        shifted = self.tower.cls_emb is not None and not self.tower.correct_cls_mask
        return min(max(T, 1) + shifted, self.context_length)

    def _mask(self, text: Tensor, hidden: Tensor) -> Tensor | None:
        """What may not be attended to: the future, padding, or nothing."""
        tower, columns = self.tower, hidden.shape[1]
        causal = None if tower.attn_mask is None else tower.attn_mask[:columns, :columns]
        # Without texts a mask of their padding would have no shape.
        if (tower.cls_emb is None and not tower.use_pad_mask) or not len(text):
            return causal
        padding = tower._build_additive_mask(text, columns, hidden.dtype)
        return padding if causal is None else causal + padding

    def _project(self, pooled: Tensor) -> Tensor:
        """(N, D) of (N, W); the projection is a matrix, a layer with bias, or none."""
        projection = self.tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


class HubText(TextTower):
    """open_clip's HFTextEncoder, a text model of transformers. It masks padding, so it always trims.

    A text has at least one token: the mean over none is not a number.

    Attributes:
        encoder: open_clip's module; its parameters are this tower's.
        pad_id: the model's own padding, by which it masks.
    """

    def __init__(self, encoder: HFTextEncoder, *, context_length: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.trims = True
        config = cast(Any, encoder.config)
        self.pad_id: int = config.pad_token_id
        self.width: int = config.hidden_size
        self.embed: int = encoder.output_dim
        self.context_length = context_length

    def forward(self, tokens: Tensor, length: Tensor) -> Encoded:
        """Encode (N, T) token ids, of which the first `length` (N,) of each row are text."""
        encoder = self.encoder
        text = _columns(tokens, length, columns=max(tokens.shape[1], 1), pad_id=self.pad_id)
        mask = (text != self.pad_id).long()
        states = encoder.transformer(input_ids=text, attention_mask=mask)
        pooled = encoder.proj(encoder.pooler(states, mask))
        return Encoded(pooled, states.last_hidden_state[:, : tokens.shape[1]])


def check_tokenizer(tower: OpenClipText | HubText, tokenizer: Tokenizer, *, name: str) -> None:
    """Refuse ids that the tower of a model does not know, and texts whose end it would look for in vain.

    Raises:
        UserError: names the model, and what its tokenizer has to be like.
    """
    inner: Any = tower.tower if isinstance(tower, OpenClipText) else tower.encoder
    if tokenizer.vocabulary > inner.vocab_size:
        raise UserError(
            f"{name} knows {inner.vocab_size} token ids and its tokenizer makes {tokenizer.vocabulary}: name "
            "the one that it was made for: --model.tokenizer DIR_OR_HUB"
        )
    if isinstance(tower, HubText) or inner.cls_emb is not None:
        return
    ends = {"argmax": tokenizer.vocabulary - 1, "eos": inner.eos_id}
    if tokenizer.end != ends.get(inner.pool_type, tokenizer.end):
        raise UserError(
            f"{name} knows the end of a text by the id {ends[inner.pool_type]} and its tokenizer ends texts "
            f"with {tokenizer.end}: name the one that it was made for: --model.tokenizer DIR_OR_HUB"
        )


def build_small_text(
    *, vocabulary: int, width: int, layers: int, heads: int, context_length: int, embed: int, end_id: int
) -> OpenClipText:
    """A small causal text tower, pooled at the end token wherever that stands in the vocabulary."""
    from open_clip.transformer import TextTransformer

    tower = TextTransformer(
        context_length=context_length,
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        layers=layers,
        output_dim=embed,
        pool_type="eos",
        eos_id=end_id,
    )
    return OpenClipText(tower)
