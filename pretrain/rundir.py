"""One directory per run: who may write in it, which run it belongs to, and where things lie in it.

RUN_DIR/
    run.yaml        the resolved run; its first line is a comment with the identity
    lock            held, with the process's id inside, while it trains
    metrics.jsonl   ledger   starts.jsonl   tokenizer.json   threads
    quarantine.jsonl   quarantine.txt   quarantine.N.jsonl   manifests/   faults.jsonl
    checkpoints/   plots/   samples/   evaluations/   wandb/   report.html
    attempts.jsonl   heartbeats/   stacks/   rendezvous/        of supervise, the watchdog and srun
    code/   slurm/   jobs.jsonl                                 of slurm.submit
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import yaml

from datasets.errors import UserError
from pretrain import fencing
from pretrain.starts import read_starts

_IDENTITY = re.compile(r"# identity: (\S+)")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of a run. `open_run` gives one that holds the lock; a bare one only names the paths."""

    root: Path
    lock: TextIO | None = None
    token: str = ""
    """Of the start that holds the lock."""
    changed: tuple[str, ...] = ()
    """In which settings it was another run's, where that was allowed."""

    @property
    def checkpoints(self) -> Path:
        """Directory of step-NNNNNNNN directories."""
        return self.root / "checkpoints"

    @property
    def manifests(self) -> Path:
        """Directory of the manifests that the run was last started with."""
        return self.root / "manifests"

    @property
    def quarantine(self) -> Path:
        """One JSON object per sample that could not be read."""
        return self.root / "quarantine.jsonl"

    @property
    def faults(self) -> Path:
        """One JSON object per step that was skipped."""
        return self.root / "faults.jsonl"

    @property
    def plots(self) -> Path:
        """Directory of images."""
        return self.root / "plots"

    @property
    def samples(self) -> Path:
        """Directory of sample sheets and what they show."""
        return self.root / "samples"

    @property
    def evaluations(self) -> Path:
        """Directory of what `pretrain.evaluate` found on other data."""
        return self.root / "evaluations"

    @property
    def wandb(self) -> Path:
        """Directory of the mirror that W&B reads."""
        return self.root / "wandb"

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.root / "report.html"

    @property
    def starts(self) -> Path:
        """One JSON object per start."""
        return self.root / "starts.jsonl"

    @property
    def run_yaml(self) -> Path:
        """The resolved run."""
        return self.root / "run.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per report."""
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One line per step."""
        return self.root / "ledger"

    @property
    def threads(self) -> Path:
        """The number of CPU threads that this run was found to be fastest with."""
        return self.root / "threads"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that this run trained, if it did."""
        return self.root / "tokenizer.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            fencing.leave(self.root, self.token)
            self.lock.close()


def open_run(
    out: Path,
    run_yaml: str,
    *,
    identity: str,
    budgets: Collection[str] = (),
    changeable: Collection[str] = (),
    allow_changed: bool = False,
) -> RunDir:
    """Create or reopen the directory of a run and hold its lock until the result is left or the process dies.

    `run.yaml` is written on first use; what other budgets mean is for the caller to accept (`record`).

    Args:
        out: the directory.
        run_yaml: the resolved run, as YAML.
        identity: hash of the resolved run without its budgets, one word.
        budgets: top-level keys of `run_yaml` that the identity leaves out.
        changeable: top-level keys that weights and moments do not hang on.
        allow_changed: whether these may differ from what the directory belongs to.

    Raises:
        UserError: it cannot be written, another process trains in it, or it belongs to another run.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        run = RunDir(out, *fencing.take(out))
        try:
            before, changed = _belongs(run, run_yaml, identity, budgets, changeable, allow_changed)
            if before is None:
                record(run, run_yaml, identity=identity)
        except BaseException:
            run.close()
            raise
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise UserError(
            f"the run directory {out} cannot be written ({reason}): choose another --out"
        ) from error
    return dataclasses.replace(run, changed=tuple(changed))


def record(run: RunDir, run_yaml: str, *, identity: str) -> None:
    """Write run.yaml: on first use, and again when new budgets have been accepted."""
    fencing.replace(run.run_yaml, f"# identity: {identity}\n{run_yaml}".encode())


def _belongs(
    run: RunDir,
    run_yaml: str,
    identity: str,
    budgets: Collection[str],
    changeable: Collection[str],
    allow_changed: bool,
) -> tuple[str | None, list[str]]:
    """Refuse the directory of another run; its run.yaml, or None on first use, and how it differs."""
    if not run.run_yaml.exists():
        if run.checkpoints.exists():
            raise UserError(
                f"{run.root} holds checkpoints but no run.yaml that says of which run: choose another --out"
            )
        return None, []
    before = run.run_yaml.read_text()
    match = _IDENTITY.match(before)
    if match is None:
        raise UserError(
            f"{run.run_yaml} was not written by a run (no identity in its first line): choose another --out"
        )
    if match[1] != identity and not run.checkpoints.exists() and not _has_content(run.ledger):
        # Nothing was trained: a mistake was being mended, and what it left is no one's.
        for leftover in (run.tokenizer, run.threads, run.metrics, run.starts, run.quarantine):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(run.manifests, ignore_errors=True)
        return None, []
    if match[1] == identity:
        return before, []
    differences = _differences(yaml.safe_load(before), yaml.safe_load(run_yaml), budgets)
    fixed = [words for key, words in differences if key.split(".")[0] not in changeable]
    named = [words for _, words in differences]
    begun = {start.stage for start in read_starts(run.starts)}
    ahead = [words for key, words in differences if _is_of_a_stage_ahead(key, begun)]
    if named and (ahead == named or (allow_changed and not fixed)):
        return before, named
    which = f"differs in {'; '.join(_few(fixed or named))}" if named else "names its parts in another order"
    way = ", or go on in spite of it with --allow-changed" if named and not fixed else ""
    raise UserError(f"{run.root} belongs to another run, which {which}: choose another --out{way}")


def _is_of_a_stage_ahead(key: str, begun: Collection[str]) -> bool:
    """Whether a setting is one of a stage that has not begun: nothing was trained with it."""
    top, name, *_ = [*key.split("."), ""]
    return top == "stages" and name not in begun


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _differences(there: Any, here: Any, budgets: Collection[str]) -> list[tuple[str, str]]:
    """Keys, and in words what they hold there and here."""
    old, new = dict(leaves(there)), dict(leaves(here))
    sources = [list(each.get("sources", {})) for each in (there, here)]
    both = [name for name in sources[0] if name in sources[1]]
    found: list[tuple[str, str]] = []
    if both != [name for name in sources[1] if name in both]:
        found.append(("sources", f"the order of its sources ({', '.join(sources[0])} there)"))
    for key in {**old, **new}:
        top, _, rest = key.partition(".")
        alone = top == "sources" and rest.split(".")[0] not in both  # it is named as a whole, by the data
        if alone or top in budgets or key.endswith(".steps") or old.get(key) == new.get(key):
            continue
        found.append((key, f"{key} ({_shown(old, key)} there, {_shown(new, key)} here)"))
    names = dict.fromkeys([*sources[0], *sources[1]])
    found += [
        (f"sources.{name}", f"the source {name}, which is {'new' if name in sources[1] else 'gone'}")
        for name in names
        if name not in both
    ]
    return found


def _shown(values: dict[str, Any], key: str) -> str:
    return ascii(values[key]) if values.get(key) == "" else str(values.get(key, "nothing"))


def _few(named: list[str], *, limit: int = 3) -> list[str]:
    return [*named[:limit], f"and {len(named) - limit} more"] if len(named) > limit else named


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a configuration and what they hold."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
