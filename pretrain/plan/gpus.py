"""GPUs that a run can be planned for."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from datasets.errors import UserError

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One of a node of eight, as its maker states it."""

    flops: float
    """Dense bf16 FLOP/s at the peak."""
    memory: float
    """Bytes."""
    node: float
    """Bytes/s that it sends to the others of its machine."""
    network: float
    """Bytes/s that it sends to other machines."""


GPUS = {
    # NVIDIA A100 datasheet: 312 TFLOP/s, NVLink 600 GB/s both ways; DGX A100: a 200 Gb/s card for each.
    "a100-40": Gpu(flops=312e12, memory=40 * GB, node=300 * GB, network=25 * GB),
    "a100-80": Gpu(flops=312e12, memory=80 * GB, node=300 * GB, network=25 * GB),
    # NVIDIA H100 SXM datasheet: 1,979 TFLOP/s with sparsity, half of it dense; NVLink 900 GB/s both ways;
    # DGX H100: a 400 Gb/s card for each.
    "h100": Gpu(flops=989e12, memory=80 * GB, node=450 * GB, network=50 * GB),
    # NVIDIA H200 SXM datasheet: an H100 with 141 GB.
    "h200": Gpu(flops=989e12, memory=141 * GB, node=450 * GB, network=50 * GB),
    # NVIDIA DGX B200 datasheet: 8 x 180 GB, 4,500 TFLOP/s with sparsity each, NVLink 1,800 GB/s both ways.
    "b200": Gpu(flops=2250e12, memory=180 * GB, node=900 * GB, network=50 * GB),
}

UTILISATION = 0.3
"""The share of the peak that the model's FLOPs reach, where --utilisation says nothing: between the 0.1 to
0.2 that open_clip's runs of LAION-400M reached on A100s (`python -m benchmarks.plan`) and the 0.33 to 0.39 of
torchtitan's language models on H100s (its benchmarks/llama3_h100_202412)."""
IMAGES_PER_CORE = 900
"""JPEGs of some 500 x 375 pixels that a core decodes and crops to 224 in a second, where --images-per-core
says nothing: torchvision's decoder and antialiased resize (918 on an AMD EPYC of 2025)."""
ROOM = 0.9
"""The share of a GPU's memory that tensors may take: the rest is CUDA's, NCCL's, kernels' and gaps."""
DISK = 2 * GB
"""Bytes/s at which a checkpoint is written, where --disk-speed says nothing."""


def gpu_called(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        UserError: it is not known; names the nearest one.
    """
    if name.lower() not in GPUS:
        near = get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--gpu {name} is not known; {hint}Known: {', '.join(GPUS)}")
    return GPUS[name.lower()]
