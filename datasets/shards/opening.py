"""From names to the shards of a manifest: what has no valid sidecar is indexed on first use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

from datasets.errors import UserError
from datasets.remote.fetch import is_remote
from datasets.shards.grouping import printable
from datasets.shards.indexing import Job, Outcome, cores, index_one, promised, shown_url, standing
from datasets.shards.manifest import Manifest, Shard
from datasets.shards.scan import scan
from datasets.shards.sidecar import Head
from datasets.shards.spread import spread

_THREADS = 8  # more share one interpreter to no gain
_FEW = 3  # damaged shards that are named


def shards(names: list[str], say: Callable[[str], None] | None) -> Iterator[Shard]:
    """The shards that manifests and tar files hold, in order.

    Raises:
        UserError: a shard is damaged, cannot be read or indexed, or is remote and not in a manifest.
    """
    remote = [name for name in names if is_remote(name) and not is_manifest(name)]
    if remote:
        raise UserError(
            f"{shown_url(remote[0])} is remote and has no manifest: write one with "
            f"`python -m datasets.index '{shown_url(remote[0])}' --out DIR` and name DIR/manifest.json"
        )
    local = [name for name in names if not is_manifest(name)]
    found = {name: standing(name) for name in local}
    jobs = [Job(name, sidecar) for name, (sidecar, head) in found.items() if head is None]
    heads = {name: head for name, (_, head) in found.items() if head is not None}
    if jobs:
        heads |= _indexed(jobs, say)
    for name in local:
        told = promised(name)
        if told is not None and told.digest != heads[name].digest:
            raise UserError(
                f"{name} has other content than when it was indexed: put back what it was, or index it again "
                "with `python -m datasets.index`"
            )
    for name in names:
        if is_manifest(name):
            yield from Manifest.load(name)
        else:
            yield entry(Job(name, found[name][0]), heads[name])


def entry(job: Job, head: Head) -> Shard:
    """What a manifest is made of, for an indexed shard."""
    return Shard(job.url, "", head.bytes, head.samples, head.digest, job.sidecar)


def is_manifest(name: str) -> bool:
    """Whether a name is that of a manifest."""
    return name.partition("?")[0].endswith(".json")


def counted(number: int, what: str) -> str:
    """A number of things, in words: 1 shard, 2 shards."""
    return f"{number} {what}{'s' * (number != 1)}"


def damaged(outcomes: list[Outcome]) -> str:
    """In one sentence, which shards are damaged, where and how; nothing if none is."""
    found = [
        f"{shown_url(job.url)} at byte {problem.offset} ({problem.kind}: {problem.reason})"
        for job, _, problem, *_ in outcomes
        if problem is not None
    ]
    if not found:
        return ""
    more = f" and {len(found) - _FEW} more" if len(found) > _FEW else ""
    which = "a shard is" if len(found) == 1 else f"{len(found)} shards are"
    return (
        f"{which} damaged: {', '.join(found[:_FEW])}{more}; fetch or pack again, or leave out with "
        "`python -m datasets.index ... --without-damaged` and name the manifest.json that it writes"
    )


def held(manifest: Manifest) -> str:
    """What the first shard holds, if it is a local one."""
    if manifest.remote or not len(manifest):
        return ""
    first = manifest[0].url
    suffixes = Counter(Path(name).suffix or "suffixless" for name in scan(Path(first)).members.names)
    holds = ", ".join(f"{count} {printable(suffix)}" for suffix, count in suffixes.most_common(5))
    return f"; {first} holds {f'{holds} members' if holds else 'nothing'}"


def _indexed(jobs: list[Job], say: Callable[[str], None] | None) -> dict[str, Head]:
    """Index what is local, with threads: this may be any program."""
    began = monotonic()
    if say is not None:
        say(f"indexing {counted(len(jobs), 'shard')} of {jobs[0].url.rpartition('/')[0]} on first use")
    outcomes = spread(
        index_one, jobs, verb="indexed", workers=min(cores(), _THREADS), processes=False, say=say
    )
    if broken := damaged(outcomes):
        raise UserError(broken)
    heads = {outcome.job.url: outcome.head for outcome in outcomes if outcome.head is not None}
    if say is not None:
        total = sum(head.bytes for head in heads.values())
        say(f"indexed {total / 1e9:.2f} GB in {monotonic() - began:.1f} s")
    return heads
