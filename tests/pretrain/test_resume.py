"""Killed with `kill -9` wherever it is and resumed on other ranks and threads, a run reads the same.

The oracle is the ledger of a run on one process that nothing interrupted. Ranks are forks of this process,
which has imported everything already; the slow test starts real ones with torchrun.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401 (what a run imports late, so that no fork has to)
import pytest
import timm  # noqa: F401

from datasets.mixture import Account, allot
from datasets.order import Order
from datasets.shards.manifest import open_manifest
from datasets.shards.sidecar import Table
from datasets.weights import weight_at
from pretrain import launch
from pretrain.cli import parse
from pretrain.evaluate import during
from pretrain.sinks.jsonl import read
from pretrain.starts import read_starts
from pretrain.testing import forked_ranks, hold_steps

HELD_UP = Path(__file__).with_name("held.py")
STEPS = 24
FLAGS = (
    f"--objectives itc,lm --stages.one.steps {STEPS} --stages.one.batch 32 --stages.one.resolution 16 "
    "--stages.one.optim.kind adamw --stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 "
    "--model.text.width 16 --model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 "
    "--cadence.report 3 --cadence.checkpoint 5 --precision.threads 1 --wandb.mode disabled"
)


class Program:
    """A start of a run, which can be killed as a machine dies: all its processes at once."""

    def __init__(
        self, out: Path, flags: str, *, ranks: int, dies_before: int | None = None, torchrun: bool = False
    ) -> None:
        """Start it. Before the step that it is to be killed before, it waits for that."""
        self.out = out
        arguments = f"{FLAGS} {flags} --out {out}".split()

        def program() -> int:
            if dies_before is not None:
                hold_steps(dies_before, lambda: True)
            return launch.main(arguments)

        with out.with_suffix(".said").open("wb") as said:
            if torchrun:
                held = out.parent / "held"
                self._pid = _torchrun(arguments, ranks, said.fileno(), held=held, at=dies_before)
            else:
                self._pid = forked_ranks(program, ranks, said.fileno())
        self.code: int | None = None

    @property
    def said(self) -> str:
        return self.out.with_suffix(".said").read_text()

    def kill_at(self, step: int, delay: float = 0.0) -> bool:
        """Kill it some seconds after it has begun and the ledger has a step; whether it still ran."""
        starts = len(list(read_starts(self.out / "starts.jsonl")))
        end = time.monotonic() + 900
        while not self.ended():
            assert time.monotonic() < end, self.said
            begun = len(list(read_starts(self.out / "starts.jsonl"))) > starts
            if begun and step <= max(steps_of(self.out), default=0):
                break
            time.sleep(0.005)
        time.sleep(delay)
        self.kill()
        return self.code == -signal.SIGKILL

    def kill(self) -> None:
        for process in [self._pid, *_descendants(self._pid)] if self.code is None else []:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.wait()

    def ended(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self._pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code is not None

    def wait(self) -> int | None:
        while not self.ended():
            time.sleep(0.01)
        return self.code


def _torchrun(arguments: list[str], ranks: int, said: int, *, held: Path, at: int | None) -> int:
    several = f"torch.distributed.run --standalone --nproc-per-node {ranks} -m".split() if ranks > 1 else []
    program = [sys.executable, "-m", *several, "pretrain.launch", "--recipe", str(HELD_UP), *arguments]
    held.mkdir(exist_ok=True)
    if at is None:
        (held / "steps").unlink(missing_ok=True)
    else:
        (held / "steps").touch()
    environment = {**os.environ, "HELD": str(held), "HELD_AT": str(at or 0)}
    return subprocess.Popen(program, env=environment, stdout=said, stderr=said).pid


def _descendants(process: int) -> list[int]:
    """torchrun gives each rank a session of its own, so a process group is not all of it."""
    found = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def steps_of(out: Path) -> list[int]:
    """The steps in the ledger as they stand there."""
    ledger = out / "ledger"
    return [int(line.split()[0]) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def samples_of(out: Path) -> list[str]:
    """Of each line of the ledger, step and hash of the samples."""
    lines = (line.split() for line in (out / "ledger").read_text().splitlines())
    return [f"{step} {samples}" for step, _, samples, _, _ in lines]


def losses_of(out: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read(out / "metrics.jsonl") if "train/loss" in r}


def state_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())


def killed_and_resumed(out: Path, flags: str, ranks: list[int]) -> None:
    """Start it on each of these numbers of ranks; kill all but the last, at random steps."""
    drawn, stretch = random.Random(str(ranks)), STEPS // len(ranks)
    for place, world in enumerate(ranks):
        more = f"{flags} --loader-threads {drawn.choice([1, 2, 3])}"
        if place < len(ranks) - 1:
            step = place * stretch + drawn.randrange(stretch - 2)
            step += step % 5 == 0  # of which nothing would be lost
            written = -(-step // 3) * 3  # when the ledger has it
            program = Program(out, more, ranks=world, dies_before=written + 1)
            assert program.kill_at(step, drawn.uniform(0, 0.05)), f"not killed: {program.said}"
        else:
            program = Program(out, more, ranks=world)
            assert program.wait() == launch.DONE, program.said
        assert "was run again and differs" not in program.said
    starts = list(read_starts(out / "starts.jsonl"))
    assert [start.ranks for start in starts] == ranks
    assert sum(start.lost for start in starts) > 0, "no step was run again"


@pytest.fixture(autouse=True, scope="module")
def _no_pages():
    """Curves and reports are judged elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "show", lambda training: None)
        patch.setattr(during, "_show", lambda *_: None)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def flags(write_corpus, tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("resume") / "corpus")


@pytest.fixture(scope="module")
def oracle(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("oracle") / "run"
    program = Program(out, flags, ranks=1)
    assert program.wait() == launch.DONE, program.said
    return out


def test_on_one_rank_the_ledger_and_the_weights_are_those_of_the_oracle_to_the_bit(oracle, flags, tmp_path):
    out = tmp_path / "run"
    killed_and_resumed(out, flags, [1, 1, 1, 1])
    assert (out / "ledger").read_bytes() == (oracle / "ledger").read_bytes()
    final = Path("checkpoints", f"step-{STEPS:08d}", "model.safetensors")
    assert (out / final).read_bytes() == (oracle / final).read_bytes()
    assert state_of(out)["accounts"] == state_of(oracle)["accounts"]


def test_the_ledger_follows_from_seed_manifest_and_weights_alone(oracle, flags):
    """Without a model, an image or a caption: which sample of which source stands where."""
    run = parse(f"{FLAGS} {flags}".split()).run
    manifests = {name: open_manifest(source.data) for name, source in run.sources.items()}
    standing, ledger = {name: Account() for name in manifests}, []
    for step in range(STEPS):
        weights = {name: weight_at(source.weight, step) for name, source in run.sources.items()}
        before, standing = standing, allot(standing, weights, batch=32, quantum=8)
        names = []
        for name, manifest in manifests.items():
            order = Order(0, manifest.size, name)
            for position in order.batch(before[name].position, standing[name].position):
                number, row = manifest.locate(order[position].index)
                shard = manifest[number]
                key = Table.open(Path(shard.sidecar))[row].key
                names.append(f"{name}\0{shard.label}/{key}".encode())
        hashes = [int.from_bytes(blake2b(name, digest_size=8).digest(), "little") >> 1 for name in names]
        text = "\0".join(f"{each:x}" for each in hashes)
        ledger.append(f"{step + 1} {blake2b(text.encode(), digest_size=8).hexdigest()}")
    assert samples_of(oracle) == ledger


@pytest.mark.slow
def test_on_other_ranks_and_threads_every_step_has_the_samples_of_the_oracle(oracle, flags, tmp_path):
    """Three ranks do not divide the eight lanes, which changes nothing."""
    out = tmp_path / "run"
    killed_and_resumed(out, flags, [1, 4, 2, 3])
    assert samples_of(out) == samples_of(oracle)
    assert state_of(out)["accounts"] == state_of(oracle)["accounts"]
    assert losses_of(out) == pytest.approx(losses_of(oracle), rel=1e-2)


@pytest.mark.slow
def test_sharded_it_goes_on_with_the_shards_of_other_ranks(oracle, flags, tmp_path):
    """FSDP2 on four ranks, two, one that holds everything, and four again, killed in between."""
    out = tmp_path / "run"
    killed_and_resumed(out, f"{flags} --parallel fsdp", [4, 2, 1, 4])
    assert samples_of(out) == samples_of(oracle)
    assert state_of(out)["accounts"] == state_of(oracle)["accounts"]
    assert losses_of(out) == pytest.approx(losses_of(oracle), rel=1e-2)
    final = out / "checkpoints" / f"step-{STEPS:08d}"
    assert len(list(final.glob("model-*.safetensors"))) == 4


@pytest.mark.slow
def test_on_two_ranks_all_along_the_ledger_is_that_of_two_ranks_to_the_bit(oracle, flags, tmp_path):
    straight = Program(tmp_path / "straight", flags, ranks=2)
    assert straight.wait() == launch.DONE, straight.said
    out = tmp_path / "run"
    killed_and_resumed(out, flags, [2, 2])
    assert (out / "ledger").read_bytes() == (straight.out / "ledger").read_bytes()
    assert samples_of(out) == samples_of(oracle)


@pytest.mark.slow
def test_elastic_on_other_ranks_every_step_has_the_bits_of_the_oracle(flags, tmp_path):
    """Three sources, killed on one rank, resumed on four and then on two."""
    flags = f"{flags} --deterministic elastic"
    straight = Program(tmp_path / "straight", flags, ranks=1)
    assert straight.wait() == launch.DONE, straight.said
    out = tmp_path / "run"
    killed_and_resumed(out, flags, [1, 4, 2])
    assert bits_of(out) == bits_of(straight.out)
    assert len(bits_of(out)) == STEPS


def bits_of(out: Path) -> list[list[str]]:
    """Of each line of the ledger, all but the number of ranks."""
    lines = (line.split() for line in (out / "ledger").read_text().splitlines())
    return [[step, *bits] for step, _, *bits in lines]


@pytest.mark.slow
def test_damaged_samples_are_masked_where_they_stand_whatever_is_killed(oracle, flags, members, tmp_path):
    """Bad before they were indexed or after: no other slot changes, and each is listed once."""
    folder = shutil.copytree(corpus_of(flags), tmp_path / "corpus")
    flags = flags.replace(str(corpus_of(flags)), str(folder)) + " --bad.overall 1 --bad.shard 1"
    bad = {f"captions/{shard:05d}.tar": f"{shard + 3:05d}.jpg" for shard in range(3)}
    bad |= {"phrases/00001.tar": "00017.json", "classes/00002.tar": "00000.jpg"}
    for shard, name in bad.items():
        spoil(folder / shard, *members(folder / shard)[name])
    for kind in ("captions", "phrases", "classes"):
        open_manifest(f"{folder}/{kind}/*.tar")
    # Now they are indexed: what is damaged later contradicts a checksum.
    later = {
        "captions/00003.tar": "00001.jpg",
        "captions/00005.tar": "00039.txt",
        "phrases/00000.tar": "00020.jpg",
    }
    for shard, name in later.items():
        spoil(folder / shard, *members(folder / shard)[name])

    straight = Program(tmp_path / "straight", flags, ranks=1)
    assert straight.wait() == launch.DONE, straight.said
    out = tmp_path / "run"
    killed_and_resumed(out, flags, [2, 1])
    assert samples_of(out) == samples_of(straight.out) == samples_of(oracle)
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(f"{each['source']}/{each['key']}" for each in listed) == sorted(
        f"{shard}/{name.partition('.')[0]}" for shard, name in {**bad, **later}.items()
    )
    kinds = {each["source"] + "/" + each["key"]: each["kind"] for each in listed}
    assert {kind for key, kind in kinds.items() if key.rpartition("/")[0] in later} == {"checksum"}
    assert state_of(out)["masked"] == state_of(straight.out)["masked"]
    assert sum(state_of(out)["masked"].values()) > len(listed), "no epoch was ended"


def corpus_of(flags: str) -> Path:
    return Path(flags.split()[1].partition("=")[2]).parent.parent


def spoil(path: Path, offset: int, size: int) -> None:
    """Overwrite the middle of a member, as a disk does: size and time of the shard stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset + size // 3)
        file.write(b"\xff" * (size // 3))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_killed_twenty_times_at_random_under_torchrun_the_samples_are_those_of_the_oracle(flags, tmp_path):
    """On 1, 2 or 4 ranks with 1 to 4 threads, at a random step or in a random moment of starting."""
    drawn, flags = random.Random(20), f"{flags} --stages.one.steps 120"
    straight = Program(tmp_path / "straight", flags, ranks=1, torchrun=True)
    assert straight.wait() == launch.DONE, straight.said
    steps = sorted(drawn.sample(range(1, 110), 14))
    moments = sorted([*steps, *(drawn.randrange(1, 110) for _ in range(6))])
    out = tmp_path / "run"
    for place, moment in enumerate([*moments, 0]):
        ranks, threads = drawn.choice([1, 2, 4]), drawn.randrange(1, 5)
        more, dies_before = f"{flags} --loader-threads {threads}", 115 if place < len(moments) else None
        program = Program(out, more, ranks=ranks, dies_before=dies_before, torchrun=True)
        if place == len(moments):
            assert program.wait() == launch.DONE, program.said
        elif moment in steps:
            assert program.kill_at(moment, drawn.uniform(0, 0.3)), program.said
            steps.remove(moment)
        else:
            time.sleep(drawn.uniform(0, 12))
            program.kill()
        assert "was run again and differs" not in program.said, program.said
    assert samples_of(out) == samples_of(straight.out)
    assert [int(line.split()[0]) for line in samples_of(out)] == list(range(1, 121))
