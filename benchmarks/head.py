"""The vocabulary head beside others: loss and gradients of a batch of tokens.

    python -m benchmarks.head [--vocabulary 131072] [--rounds 3] [--bf16] [--smoothing 0.1 --z-loss 1e-5]

All get the same states, matrix and targets, and the same kernels for float32 products, those that a run of
Medley chooses. Peak memory is over the inputs and their `.grad`, which exists before, as it does when several
objectives share a matrix. The error of the gradients is against float64, on a sixteenth of the states.
`open_clip` is the head of its development version, which is in no release: chunks of 512 states, each
checkpointed. `torch chunked` is `torch.nn.functional.linear_cross_entropy`, where torch has it; it knows
neither smoothing nor the z-loss.
Exit code 1 where the bars against open_clip are missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.beside import growth, in_own_process, in_turns, ratio
from pretrain.precision import Precision, compute_for
from pretrain.zoo.head import VocabularyHead

WIDTH, TOKENS, CHUNK = 768, 2048, 512
TIME, MEMORY = 0.65, 0.80
"""Bars, as shares of what open_clip needs."""
Loss = Callable[[Tensor, nn.Parameter, Tensor], Tensor]
"""() sum of the losses of (M, Dt) states, (V, Dt) matrix, (M,) targets."""


def implementations(*, smoothing: float, z_loss: float) -> dict[str, Loss]:
    """What is compared, by name, Medley first."""

    def medley(states: Tensor, matrix: nn.Parameter, targets: Tensor) -> Tensor:
        return VocabularyHead(matrix)(states, targets, smoothing=smoothing, z_loss=z_loss)[0]

    def whole(states: Tensor, matrix: nn.Parameter, targets: Tensor) -> Tensor:
        logits = F.linear(states, matrix).to(torch.promote_types(states.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
        return loss + z_loss * logits.logsumexp(dim=1).square().sum() if z_loss else loss

    def open_clip(states: Tensor, matrix: nn.Parameter, targets: Tensor) -> Tensor:
        total = states.new_zeros(())
        for some, their in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            total = total + checkpoint(whole, some, matrix, their, use_reentrant=False)
        return total

    found: dict[str, Loss] = {"medley": medley, "open_clip": open_clip, "torch": whole}
    if smoothing or z_loss or not hasattr(F, "linear_cross_entropy"):
        return found
    options = nn.LinearCrossEntropyOptions()

    def chunked(states: Tensor, matrix: nn.Parameter, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(states, matrix, targets, reduction="sum", options=options)

    return {**found, "torch chunked": chunked}


class Trial:
    """Inputs, and one call over them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        torch.set_num_threads(1)
        compute_for(Precision(autocast="off"), self.device)
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(options.vocabulary, WIDTH, generator=generator).mul_(0.02)
        self.matrix = nn.Parameter(matrix.to(self.device))
        self.states = torch.randn(TOKENS, WIDTH, generator=generator).to(self.device).requires_grad_()
        self.targets = torch.randint(options.vocabulary, (TOKENS,), generator=generator).to(self.device)
        self.bf16: bool = options.bf16
        for leaf in (self.matrix, self.states):
            leaf.grad = torch.zeros_like(leaf)

    def run(self, loss: Loss) -> float:
        """Mean loss; its gradients are added to those that are there."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            total = loss(self.states, self.matrix, self.targets) / TOKENS
        total.backward()
        return total.item()

    def error(self, loss: Loss, reference: Loss) -> float:
        """The larger relative error of the two gradients."""
        few = self.targets[: TOKENS // 16]
        states = self.states.detach()[: len(few)].requires_grad_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            total = loss(states, self.matrix, few)
        found = torch.autograd.grad(total, (states, self.matrix))
        exact = states.detach().double().requires_grad_(), nn.Parameter(self.matrix.detach().double())
        wanted = torch.autograd.grad(reference(*exact, few), exact)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def main(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="products under autocast")
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--z-loss", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="these implementations, with commas between")
    parser.add_argument("--memory", default="", help="print only the peak memory of this one")
    options = parser.parse_args(arguments)
    losses = implementations(smoothing=options.smoothing, z_loss=options.z_loss)
    trial = Trial(options)
    if options.memory:
        print(growth(lambda: trial.run(losses[options.memory]), trial.device))
        return 0
    chosen = options.only.split(",") if options.only else list(losses)
    calls = {name: lambda loss=losses[name]: trial.run(loss) for name in chosen}
    times = in_turns(calls, rounds=options.rounds, device=trial.device)
    errors = {name: trial.error(losses[name], losses["torch"]) for name in chosen}
    memory = {name: in_own_process("benchmarks.head", [*arguments, "--memory", name]) for name in chosen}
    print(f"{TOKENS} tokens of {WIDTH}, {options.vocabulary} words, {'bf16' if trial.bf16 else 'float32'}")
    for name in chosen:
        print(
            f"{name:14} {statistics.median(times[name]):7.2f} s ({ratio(times['medley'], times[name]):.2f})  "
            f"{memory[name]:6.0f} MB ({memory['medley'] / memory[name]:.2f})  error {errors[name]:.1e}"
        )
    met = (
        ratio(times["medley"], times["open_clip"]) <= TIME
        and memory["medley"] <= MEMORY * memory["open_clip"]
    )
    print(f"bars of time {TIME} and memory {MEMORY} beside open_clip: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
