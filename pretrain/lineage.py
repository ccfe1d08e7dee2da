"""What a run was trained on, and in which words it differs from what is here now."""

from __future__ import annotations

from collections.abc import Sequence

from datasets.errors import UserError
from datasets.loader import Feed
from datasets.shards.manifest import Manifest
from datasets.shards.tars import Tars
from pretrain.distributed import Ranks
from pretrain.rundir import RunDir
from pretrain.state import Known, Standing


def known(feeds: Sequence[Feed]) -> dict[str, Known]:
    """What each source is, to be remembered."""
    return {feed.name: Known(fingerprint=feed.source.fingerprint, size=feed.source.size) for feed in feeds}


def changes(
    feeds: Sequence[Feed], before: Standing, now: Standing, rundir: RunDir, *, allowed: bool
) -> list[str]:
    """In words, how order and data differ from what a checkpoint was trained on.

    Raises:
        UserError: they differ and may not.
    """
    named: list[str] = []
    if before.order != now.order:
        named.append(f"the version of the order ({before.order} then, {now.order} now)")
    named += [f"the source {name}, which is gone" for name in before.data if name not in now.data]
    named += [f"the source {name}, which is new" for name in now.data if name not in before.data]
    for feed in feeds:
        then, here = before.data.get(feed.name), now.data[feed.name]
        if then is not None and then.fingerprint != here.fingerprint:
            named.append(f"the data of source {feed.name}: {_difference(feed, then, here, rundir)}")
    if named and not allowed:
        raise UserError(
            f"since the checkpoint of step {before.step} has changed {'; '.join(named)}: bring it back, "
            "choose another --out, or go on in spite of it with --allow-changed"
        )
    return named


def unlike_kept(feeds: Sequence[Feed], rundir: RunDir) -> list[str]:
    """In words, how the data differ from those of the last start, where it left no checkpoint to hold to."""
    named: list[str] = []
    for feed in feeds:
        kept = _kept(feed, rundir)
        if kept is None or not isinstance(feed.source, Tars) or kept.fingerprint == feed.source.fingerprint:
            continue
        named.append(f"the data of source {feed.name}: {kept.difference(feed.source.manifest)}")
    return named


def check_ranks(feeds: Sequence[Feed], ranks: Ranks) -> None:
    """Refuse ranks that opened different data: each node looks at its own disk.

    Raises:
        UserError: names the source and the ranks.
    """
    mine = [(feed.name, feed.source.fingerprint, feed.source.size) for feed in feeds]
    everyone = ranks.gather_objects(mine)

    def compare() -> None:
        for rank, theirs in enumerate(everyone):
            for (name, fingerprint, size), (_, other, many) in zip(everyone[0], theirs, strict=True):
                if fingerprint != other:
                    raise UserError(
                        f"rank {rank} reads other data as source {name!r} than rank 0 ({many} samples there, "
                        f"{size} here): give every node the same shards, by their manifest"
                    )

    ranks.on_zero(compare)


def keep(feeds: Sequence[Feed], rundir: RunDir) -> None:
    """Copy the manifests into the run directory, so that a later change can be named."""
    for feed in feeds:
        if isinstance(feed.source, Tars):
            rundir.manifests.mkdir(exist_ok=True)
            feed.source.manifest.save(rundir.manifests / f"{feed.name}.json")


def _kept(feed: Feed, rundir: RunDir) -> Manifest | None:
    """The manifest of the last start; None where there is none that can be read: it only tells more."""
    path = rundir.manifests / f"{feed.name}.json"
    if not isinstance(feed.source, Tars) or not path.exists():
        return None
    try:
        return Manifest.load(str(path))
    except UserError:
        return None


def _difference(feed: Feed, then: Known, here: Known, rundir: RunDir) -> str:
    kept = _kept(feed, rundir)
    if kept is not None and isinstance(feed.source, Tars):
        found = kept.difference(feed.source.manifest)
        if found:
            return found
    return (
        f"{then.size or 'endless'} samples then, {here.size or 'endless'} now, "
        f"fingerprint {then.fingerprint[:12]} then, {here.fingerprint[:12]} now"
    )
