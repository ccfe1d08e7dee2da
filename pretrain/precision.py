"""Which arithmetic a forward runs in, chosen by what the hardware has."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datasets.errors import UserError
from pretrain.zoo.attention import spell_out, spells_out


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Arithmetic of the forward and backward, and of what is kept."""

    autocast: Literal["auto", "bf16", "off"] = "auto"
    """Mixed precision, products in bf16: auto takes it where the hardware multiplies bfloat16 natively."""
    parameters: Literal["float32", "bf16"] = "float32"
    """What parameters, gradients and moments are kept in; temperatures are float32 anyway. bf16 halves their
    memory, and loses updates smaller than 1/256 of a weight: choose it where float32 does not fit."""
    threads: int = 0
    """Intra-op CPU threads of this process; 0 takes what is faster for this model and batch."""

    def check(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            UserError: bf16 parameters without products in bf16.
        """
        if self.parameters == "bf16" and self.autocast == "off":
            raise UserError(
                "--precision.parameters bf16 needs products in bf16: leave --precision.autocast off out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Precision made concrete for a device."""

    device: torch.device
    bf16: bool

    @contextmanager
    def forward(self) -> Generator[None]:
        """The context every forward of a tower runs in, in training and evaluation."""
        with ExitStack() as stack:
            if self.bf16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            stack.enter_context(attention_kernels(self.device.type))
            yield


def attention_kernels(kind: str) -> AbstractContextManager[object]:
    """The kernels that torch's own attention chooses from on a kind of device."""
    # The CPU kernel of scaled_dot_product_attention has a very slow bfloat16 backward.
    return sdpa_kernel(SDPBackend.MATH) if spells_out(torch.device(kind)) else nullcontext()


def keep_in_bf16(module: nn.Module) -> None:
    """Round parameters to bf16; not those of one number: temperatures would move in steps of 3%."""
    for parameter in module.parameters():
        if parameter.numel() > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def choose_attention(module: nn.Module, device: torch.device) -> None:
    """Let the attention of timm, and torch's own module in open_clip's blocks, spell out products on a CPU.

    There, the fused kernel's bfloat16 backward is several times slower than two matmuls and a softmax; what
    goes through torch's own function is caught by `Compute.forward`, whose kernel is slower than these too.
    """
    spelled = spells_out(device)
    if spelled:
        spell_out(module)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", not spelled)  # noqa: B010  (timm declares it per class)


def compute_for(precision: Precision, device: torch.device) -> Compute:
    """Resolve `auto` for this machine, and choose the CPU's fast float32 path."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
            # Lets oneDNN take float32 matmuls, twice as fast as MKL on some CPUs and no less exact. Where
            # there is AMX the same switch would round to bfloat16.
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    asked = "bf16" in (precision.autocast, precision.parameters)
    wanted = asked or (precision.autocast == "auto" and native)
    return Compute(device=device, bf16=wanted)
