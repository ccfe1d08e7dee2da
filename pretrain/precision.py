"""Which arithmetic a forward runs in, chosen by what the hardware has."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Arithmetic of the forward and backward; parameters and optimizer stay float32."""

    autocast: Literal["auto", "bf16", "off"] = "auto"
    """bf16 autocast: auto takes it where the hardware multiplies bfloat16 natively."""
    threads: int = 0
    """Intra-op CPU threads of this process; 0 takes what is faster for this model and batch."""


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
            if self.device.type == "cpu":
                # The CPU kernel of scaled_dot_product_attention has a very slow bfloat16 backward.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def choose_attention(module: nn.Module, device: torch.device) -> None:
    """Let timm's attention spell out its products on a CPU.

    There, the fused kernel's bfloat16 backward is several times slower than two matmuls and a softmax; what
    goes through torch's own function is caught by `Compute.forward`.
    """
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", device.type != "cpu")  # noqa: B010  (timm declares it per class)


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
    wanted = precision.autocast == "bf16" or (precision.autocast == "auto" and native)
    return Compute(device=device, bf16=wanted)
