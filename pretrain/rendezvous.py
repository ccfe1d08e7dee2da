"""How the tasks that srun started find each other: a store on rank zero, published in the run directory.

    RUN_DIR/rendezvous/JOB.RESTART.STEP.json    where rank zero of this start listens; gone when all have come

Rank zero listens on a port that the system finds free, so that none can be busy. Node names of a cluster need
not resolve, so that it publishes every address it has, and the others try them in turn. Where nodes have met,
they also listen for what follows. No wait is without end, and what did not come is named.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from datasets.atomic import replace
from datasets.errors import UserError
from pretrain.interfaces import interfaces, listen_at
from pretrain.place import Place

PATIENCE = "MEDLEY_RENDEZVOUS_SECONDS"
"""The environment variable that says how long ranks wait for each other."""
_PATIENCE = 300.0
_PAUSE = 0.1
_CONNECT = 3.0
"""Seconds after which an address that does not answer is left for the next one."""
_LOOPBACK = "127.0.0.1"


class RendezvousError(UserError):
    """The ranks did not find each other: a node came late, or there is something to mend. Worth a try."""


class LeftError(Exception):
    """It was asked to stop before all ranks had come."""


@dataclass(frozen=True, slots=True)
class _Door:
    """Where rank zero listens."""

    node: str
    addresses: list[str]
    port: int
    token: str
    """Only the store of this very start knows it: an address may lead to another machine."""

    def __str__(self) -> str:
        return f"{self.node}:{self.port} ({', '.join(self.addresses)})"


@dataclass(frozen=True, slots=True)
class _Way:
    """The connection of a rank on another node with rank zero."""

    here: str
    """Its address on this machine."""
    there: str
    """Rank zero's."""


@dataclass(frozen=True, slots=True)
class Wait:
    """How long is waited, and what ends it earlier."""

    seconds: float
    asked: Callable[[], bool]

    @classmethod
    def of_environment(cls, asked: Callable[[], bool]) -> Wait:
        """As long as MEDLEY_RENDEZVOUS_SECONDS says.

        Raises:
            UserError: it says no number.
        """
        said = os.environ.get(PATIENCE, "")
        try:
            seconds = float(said) if said else _PATIENCE
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UserError(f"{PATIENCE} is {said!r}: set it to seconds above 0, or unset it")
        return cls(seconds, asked)

    def until(self, done: Callable[[], bool]) -> bool:
        """Ask now and then, until it is done; False if it never was.

        Raises:
            LeftError: it was asked to stop.
        """
        end = time.monotonic() + self.seconds
        while not done():
            if self.asked():
                raise LeftError
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True


@contextmanager
def meet(place: Place, file: Path, wait: Wait) -> Generator[Store]:
    """The store of all ranks, once every one of them has come. The file is gone when the context is left.

    Args:
        place: this process.
        file: where rank zero publishes where it listens.
        wait: for how long.

    Raises:
        RendezvousError: somebody did not come.
        UserError: the file cannot be written.
        LeftError: it was asked to stop first.
    """
    way: _Way | None = None
    if place.rank:
        store, door, way = _enter(place, file, wait)
    else:
        store, door = _open(place, file, wait)
    try:
        if way is not None:
            store.set("way", way.there)
        store.set(f"here/{place.rank}", place.node)
        if place.rank == 0:
            missing = set(range(1, place.world))

            def all_here() -> bool:
                missing.difference_update([rank for rank in missing if store.check([f"here/{rank}"])])
                return not missing

            if not wait.until(all_here):
                raise RendezvousError(
                    f"rank 0 waited {wait.seconds:g} s at {door}, and {_few(missing)} of {place.world} did "
                    f"not come: look at their nodes, or set {PATIENCE} higher"
                )
            store.set("all", "here")
        elif not wait.until(lambda: store.check(["all"])):
            raise RendezvousError(
                f"rank {place.rank} waited {wait.seconds:g} s at {door}, and not all {place.world} ranks "
                f"came: rank 0 says which, or set {PATIENCE} higher"
            )
        _listen(store, way)
        yield store
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {place.rank} lost the rendezvous at {door}: {_first_line(error)}"
        ) from error
    finally:
        if place.rank == 0:
            with suppress(OSError):
                file.unlink()
                file.parent.rmdir()


def _open(place: Place, file: Path, wait: Wait) -> tuple[Store, _Door]:
    """Rank zero listens and says where."""
    token = secrets.token_hex(8)
    store = TCPStore(
        _LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=wait.seconds)
    )
    store.set("token", token)
    door = _Door(place.node, list(interfaces().values()), store.port, token)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {name: getattr(door, name) for name in ("node", "addresses", "port", "token")}
        replace(file, json.dumps(content).encode())
    except OSError as error:
        raise UserError(
            f"the run directory {file.parent.parent} cannot be written ({error.strerror}): "
            "choose another --out"
        ) from error
    return store, door


def _enter(place: Place, file: Path, wait: Wait) -> tuple[Store, _Door, _Way | None]:
    """The others read where, and try one address after the other."""
    found: list[tuple[Store, _Door, _Way | None]] = []
    doors: list[_Door] = []

    def entered() -> bool:
        door = _read(file)
        if door is not None:
            doors[:] = [door]
            if (connected := _connect(door, wait)) is not None:
                store, way = connected
                found[:] = [(store, door, way if place.node != door.node else None)]
        return bool(found)

    if wait.until(entered):
        return found[0]
    if not doors:
        raise RendezvousError(
            f"rank {place.rank} of {place.world} waited {wait.seconds:g} s, and rank 0 never said in {file} "
            "where it listens: see why it did not start, give all ranks the same --out, or set "
            f"{PATIENCE} higher"
        )
    raise RendezvousError(
        f"rank {place.rank} of {place.world} on {place.node} found no way to rank 0 at {doors[0]} within "
        f"{wait.seconds:g} s: open that way between the nodes, or set {PATIENCE} higher"
    )


def _read(file: Path) -> _Door | None:
    """What rank zero says, if it is to be seen yet."""
    try:
        list(file.parent.iterdir())  # a network file system looks again for what was not there
        return _Door(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _connect(door: _Door, wait: Wait) -> tuple[Store, _Way] | None:
    """The store behind one of the addresses, if one leads there."""
    names = [*door.addresses, door.node, _LOOPBACK]
    for address in dict.fromkeys(names):
        try:
            # Asked first, because a store that is not there is waited for until its time is over.
            with socket.create_connection((address, door.port), timeout=_CONNECT) as asked:
                way = _Way(asked.getsockname()[0], asked.getpeername()[0])
            store = TCPStore(
                address, door.port, is_master=False, timeout=timedelta(seconds=max(_CONNECT, 1.0))
            )
            if store.check(["token"]) and store.get("token").decode() == door.token:
                store.set_timeout(timedelta(seconds=wait.seconds))
                return store, way
        except (OSError, dist.DistError):
            continue
    return None


def _listen(store: Store, way: _Way | None) -> None:
    """Have gloo listen where the nodes have met, if there are several."""
    if way is not None:
        listen_at(way.here)
    elif store.check(["way"]):  # all have come, so that whoever has one has said so
        listen_at(store.get("way").decode())


def _few(ranks: set[int], *, limit: int = 8) -> str:
    named = ", ".join(map(str, sorted(ranks)[:limit]))
    more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
