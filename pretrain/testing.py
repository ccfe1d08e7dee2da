"""What tests of several ranks share: processes, started once or forked, and a tiny model.

Importing torch in four processes takes longer than most tests, so one pool of four lives as long as the
test session and lends groups of 2 or all 4 of its ranks to functions of test files.

B images, N texts, T tokens, P image tokens, W token width, D embedding width.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datasets.batch import Batch, sample_id
from datasets.order import share
from datasets.scenes import Scenes
from datasets.tokens import TrainedBPE
from objectives import objective_class
from objectives.base import Widths
from pretrain.distributed import Ranks
from pretrain.evaluate.judge import Judge
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.zoo.attention import attend
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.dual import Dual
from pretrain.zoo.models import DualConfig, SmallText, build_model
from pretrain.zoo.towers import Encoded, FusionTower, ImageTower, TextTower

LARGEST = 4


class RankPool:
    """Four processes joined by gloo."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "pool")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with Listener(address, "AF_UNIX") as listener:
            self._processes = [
                subprocess.Popen([sys.executable, "-m", "pretrain.testing", address, str(r)], env=environment)
                for r in range(LARGEST)
            ]
            accepted = [listener.accept() for _ in range(LARGEST)]
        self._connections: dict[int, Connection] = {each.recv(): each for each in accepted}

    def run(self, function: Callable[..., Any], world: int, **arguments: Any) -> list[Any]:
        """Call `function(ranks, **arguments)` on that many ranks at once; one result per rank.

        The function is found again by file and name, so it must stand at the top of its file.
        """
        connections = [self._connections[rank] for rank in range(world)]
        for connection in connections:
            connection.send((function.__code__.co_filename, function.__name__, world, arguments))
        answers = [connection.recv() for connection in connections]
        for rank, (failure, _) in enumerate(answers):
            if failure is not None:
                raise AssertionError(f"rank {rank} of {world}:\n{failure}")
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections.values():
            connection.close()
        for process in self._processes:
            process.wait(timeout=300)
        self._folder.cleanup()


def _serve(address: str, rank: int) -> None:
    """Answer calls until the pool hangs up."""
    torch.set_num_threads(1)
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    at_start = matmul.fp32_precision
    with Client(address, "AF_UNIX") as connection:
        store = dist.FileStore(f"{address}.store", LARGEST)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=LARGEST)
        pair = dist.new_group([0, 1])
        groups = {1: None, 2: pair, LARGEST: dist.group.WORLD}
        modules: dict[str, Any] = {}
        connection.send(rank)
        while True:
            try:
                path, name, world, arguments = connection.recv()
            except EOFError:
                break
            matmul.fp32_precision = at_start  # a launch chooses the CPU's fast float32 path for its process
            try:
                if path not in modules:
                    modules[path] = _load(path)
                ranks = Ranks(rank=rank, world=world, device=torch.device("cpu"), group=groups[world])
                connection.send((None, getattr(modules[path], name)(ranks, **arguments)))
            except Exception:
                connection.send((traceback.format_exc(), None))


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"_on_ranks_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forked_ranks(program: Callable[[], int], world: int, said: int) -> int:
    """Run a program on forks of this process, which find what torchrun would tell them.

    Args:
        program: called in each of them; gives its exit code.
        world: how many ranks.
        said: file descriptor of what they print.

    Returns:
        The process of rank zero, the parent of the others, which ends with the largest of their exit codes.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Rank zero listens there, and as long as the ranks live nobody else is given that port.
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]
    if leader := os.fork():
        reserved.close()
        return leader
    code = 1
    try:
        others = {}
        for rank in range(1, world):
            if (child := os.fork()) == 0:
                others, mine = {}, rank
                break
            others[child] = rank
        else:
            mine = 0
        os.environ.update(RANK=str(mine), LOCAL_RANK=str(mine), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        torch.set_num_threads(1)
        code = program()
        code = max([code, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others)])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class TinyImage(ImageTower):
    """Patches of 4 pixels through one non-linear layer, of which a share is dropped."""

    def __init__(self, *, width: int = 8, embed: int = 6, dropout: float = 0.0) -> None:
        from open_clip.transformer import PatchDropout

        super().__init__()
        self.width, self.embed = width, embed
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.dropout = PatchDropout(dropout, exclude_first_token=False)
        self.project = nn.Linear(width, embed)

    def forward(self, images: Tensor) -> Encoded:
        """(B, 3, H, W) -> (B, D), (B, P, W)."""
        tokens = self.patches(images.to(self.patches.weight.dtype) / 255).flatten(2).mT.tanh()
        tokens = self.dropout(tokens)
        return Encoded(self.project(tokens.mean(1)), tokens)


class TinyText(TextTower):
    """Embeddings, averaged over the words of each text, with dropout."""

    def __init__(self, *, vocabulary: int = 20, width: int = 8, embed: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.embed, self.context_length = width, embed, 16
        self.words = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width, embed)

    def forward(self, tokens: Tensor, length: Tensor) -> Encoded:
        """(N, T), (N,) -> (N, D), (N, T, W)."""
        states = self.dropout(self.words(tokens).tanh())
        real = torch.arange(tokens.shape[1]) < length[:, None]
        pooled = (states * real[..., None]).sum(1) / length[:, None].clamp(min=1)
        return Encoded(self.project(pooled), states)


class TinyFusion(FusionTower):
    """The text's states, with the dropout of their tower, look at the image; averaged over the words."""

    def __init__(self, text: TinyText, *, image_width: int = 8) -> None:
        super().__init__()
        self.read = nn.Linear(image_width, 2 * text.width)
        self.out = nn.Linear(text.width, text.width)
        self._text = (text,)

    def forward(self, image_tokens: Tensor, image: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
        """(B, P, Dv), (M,), (M, T), (M,) -> (M, W)."""
        states = self._text[0](tokens, length).tokens
        key, value = self.read(image_tokens)[image].chunk(2, -1)
        states = (states + self.out(attend(states, key, value, causal=False))).tanh()
        real = torch.arange(tokens.shape[1]) < length[:, None]
        return (states * real[..., None]).sum(1) / length[:, None].clamp(min=1)


def tiny_pretrainer(
    kinds: Sequence[str],
    group: dist.ProcessGroup | None = None,
    *,
    dropout: float = 0.0,
    feeds: Mapping[str, Sequence[str]] | None = None,
) -> Pretrainer:
    """Tiny towers, decoder and fusion tower with these objectives, in float64; the same in every process.

    Dropout is that of words and of patches.
    """
    torch.manual_seed(0)
    image, text = TinyImage(dropout=dropout), TinyText(dropout=dropout)
    model = Dual(
        image=image,
        text=text,
        captioner=Captioner(
            Captioner.Config(width=8, layers=1, heads=2), image_width=8, vocabulary=20, context_length=16
        ),
        fusion=TinyFusion(text),
        logit_scale=torch.tensor(1.5),
        logit_bias=torch.tensor(-2.0) if "itc" not in kinds else None,
    )
    contrastive = {kind for kind in kinds if objective_class(kind).temperature}
    borrower = next((kind for kind in kinds if kind in contrastive), None)
    objectives = {
        kind: objective_class(kind)(
            objective_class(kind).Config(),
            Widths(
                embed=6,
                image_tokens=8,
                text_tokens=8,
                vocabulary=20,
                temperature=kind == borrower,
                contrast=bool(contrastive - {kind}),
            ),
        )
        for kind in kinds
    }
    return Pretrainer(model, objectives, group, feeds=feeds).double()


def make_samples(count: int, *, seed: int = 0, vocabulary: int = 20) -> list[Batch]:
    """Single-sample batches of every awkward kind: several captions, none, a masked slot, equal captions."""
    random = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    samples: list[Batch] = []
    for place in range(count):
        texts = {3: 2, 5: 0}.get(place % 7, 1)
        lengths = [number(3, 9) for _ in range(texts)]
        tokens = torch.zeros(texts, max(lengths, default=0), dtype=torch.int64)
        for row, length in enumerate(lengths):
            tokens[row, :length] = torch.randint(3, vocabulary, (length,), generator=random)
        masked = place % 7 == 4
        samples.append(
            Batch(
                images=torch.randint(0, 256, (1, 3, 8, 8), generator=random, dtype=torch.uint8),
                image_valid=torch.tensor([not masked]),
                tokens=tokens,
                text_length=torch.tensor(lengths, dtype=torch.int64),
                image_index=torch.zeros(texts, dtype=torch.int64),
                text_valid=torch.full((texts,), not masked),
                # Samples 1 and 8 say the same.
                text_id=torch.tensor(
                    [1 if place % 7 == 1 else 100 * place + t for t in range(texts)], dtype=torch.int64
                ),
                boxes=torch.zeros(texts, 4),
                box_valid=torch.zeros(texts, dtype=torch.bool),
                keys=(f"sample/{place}",),
                sample_id=torch.tensor([sample_id(f"seed {seed}", f"sample/{place}")]),
            )
        )
    return samples


def merge(samples: Sequence[Batch]) -> Batch:
    """One ragged batch of several, tokens padded to the longest."""
    longest = max(sample.tokens.shape[1] for sample in samples)
    shift, index, tokens = 0, [], []
    for sample in samples:
        index.append(sample.image_index + shift)
        tokens.append(nn.functional.pad(sample.tokens, (0, longest - sample.tokens.shape[1])))
        shift += len(sample.images)
    return Batch(
        images=torch.cat([s.images for s in samples]),
        image_valid=torch.cat([s.image_valid for s in samples]),
        tokens=torch.cat(tokens),
        text_length=torch.cat([s.text_length for s in samples]),
        image_index=torch.cat(index),
        text_valid=torch.cat([s.text_valid for s in samples]),
        text_id=torch.cat([s.text_id for s in samples]),
        boxes=torch.cat([s.boxes for s in samples]),
        box_valid=torch.cat([s.box_valid for s in samples]),
        keys=tuple(key for s in samples for key in s.keys),
        sample_id=torch.cat([s.sample_id for s in samples]),
    )


def split(samples: Sequence[Batch], ranks: Ranks, micro_batches: int) -> list[Batch]:
    """This rank's micro-batches of a global batch."""
    mine = share(len(samples), ranks.rank, ranks.world)
    pieces = [share(len(mine), place, micro_batches) for place in range(micro_batches)]
    return [merge([samples[mine[at]] for at in piece]) for piece in pieces]


def untrained_judge(*, text: bool = True, captioner: bool = True) -> Judge:
    """A small real model with random weights, with or without its parts; the same in every process."""
    scenes = Scenes()
    captions = (scenes.captions(index)[0] for index in range(300))
    tokenizer = TrainedBPE.train(captions, vocabulary=400, context_length=32)
    torch.manual_seed(0)
    model = build_model(
        DualConfig(embed=16, text=SmallText(width=16, layers=1, context_length=32)),
        tokenizer=tokenizer,
        resolution=32,
        temperature=(10.0, None),
    )
    model.text = model.text if text else None
    model.captioner = model.captioner if captioner else None
    return Judge(model=model, tokenizer=tokenizer, compute=Compute(device=torch.device("cpu"), bf16=False))


def hold_steps(first: int, held: Callable[[], bool]) -> None:
    """From now on this process waits before each step, from this one on, as long as it is held.

    Args:
        first: number of the step; that of the first of all is 0.
        held: whether it is, asked again and again.
    """
    from pretrain import loop

    real = loop.train_step

    def train_step(*arguments: Any, **named: Any) -> Any:
        while named["key"][1] >= first and held():
            time.sleep(0.01)
        return real(*arguments, **named)

    loop.train_step = train_step


def stall_checkpoints(while_there: Path) -> None:
    """From now on every checkpoint of this process waits for its disk as long as a file exists."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        written = Path(f"/proc/self/fd/{descriptor}").readlink()
        while "checkpoints" in written.parts and while_there.exists():
            time.sleep(0.05)
        real(descriptor)

    os.fsync = fsync


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
