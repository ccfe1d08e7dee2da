"""open_clip's text blocks, made to look at an image between self-attention and MLP."""

from __future__ import annotations

from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

from pretrain.zoo.text import Glance


class GroundedBlock(ResidualAttentionBlock):
    """open_clip's own block, which without a glance does what it always did."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        glance: Glance | None = None,
    ) -> Tensor:
        """(N, S, W) states after this block, of (N, S, W)."""
        if glance is None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        x = q_x + self.ls_1(self.attention(q_x=self.ln_1(q_x), attn_mask=attn_mask))
        x = x + glance.look(x, glance.seen, glance.image)
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class GroundedCustomBlock(CustomResidualAttentionBlock):
    """The same of open_clip's block with more norms and scales."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, glance: Glance | None = None) -> Tensor:
        """(N, S, W) states after this block, of (N, S, W)."""
        if glance is None:
            return super().forward(x, attn_mask)
        x = x + self.ls_1(self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask)))
        x = x + glance.look(x, glance.seen, glance.image)
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def ground(block: nn.Module) -> None:
    """Make a block of open_clip's take a glance.

    It stays the same object with the same parameters under the same names, and changes its class: what is
    inserted has to run inside its `forward`, or sharding would not see that its parameters are used.
    """
    kinds = {ResidualAttentionBlock: GroundedBlock, CustomResidualAttentionBlock: GroundedCustomBlock}
    block.__class__ = kinds.get(type(block), type(block))
    assert isinstance(block, GroundedBlock | GroundedCustomBlock), type(block)
