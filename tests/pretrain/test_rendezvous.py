"""Processes as srun starts them find each other through the run directory, and say who did not come."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from datasets.errors import UserError
from pretrain import launch, verdict
from pretrain.rendezvous import RendezvousError, Wait

ROOT = Path(__file__).resolve().parents[2]
TASK = """
import os
import sys
from pathlib import Path
import torch
from datasets.errors import UserError
from pretrain.distributed import join_ranks
from pretrain.preempt import Preemption
from pretrain.rendezvous import LeftError
torch.set_num_threads(1)
try:
    with Preemption() as preemption:
        print("ready", flush=True)
        with join_ranks(Path(sys.argv[1]), asked=preemption.asked) as ranks:
            total = ranks.sum(torch.tensor([ranks.rank + 1.0]))
            print(ranks.rank, ranks.world, ranks.local, int(total), flush=True)
            print(os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
except LeftError:
    sys.exit(75)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start(
    out: Path, rank: int, nodes: list[int], *, within: tuple[str, ...] = (), **more: str
) -> subprocess.Popen[str]:
    """A task of srun: its node by its rank."""
    node = next(n for n in range(len(nodes)) if rank < sum(nodes[: n + 1]))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {
        **clean,
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(sum(nodes)),
        "SLURM_LOCALID": str(rank - sum(nodes[:node])), "SLURM_NODEID": str(node),
        "SLURM_TASKS_PER_NODE": ",".join(map(str, nodes)), "SLURMD_NODENAME": f"no-such-node-{node}",
        **more,
    }  # fmt: skip
    return subprocess.Popen(
        [*within, sys.executable, "-c", TASK, str(out)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ends(tasks: list[subprocess.Popen[str]]) -> list[tuple[str, str, int]]:
    return [(*task.communicate(timeout=300), task.returncode) for task in tasks]


def test_tasks_on_nodes_whose_names_nobody_knows_find_each_other(tmp_path):
    """A file of an earlier start, on a port where nobody listens any more, does not mislead them."""
    file = tmp_path / "rendezvous" / "7.0.3.json"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    before = {"node": "no-such-node", "addresses": ["127.0.0.1"], "port": port, "token": "old"}
    file.write_text(json.dumps(before))
    others = [start(tmp_path, rank, [2, 1]) for rank in (1, 2)]
    for task in others:
        assert task.stdout is not None
        assert task.stdout.readline() == "ready\n"
    tasks = [start(tmp_path, 0, [2, 1]), *others]
    said = [(*out.splitlines()[-2:], code) for out, error, code in ends(tasks)]
    listen = said[0][1]  # None where this machine's name is as good
    assert said == [("0 3 2 6", listen, 0), ("1 3 2 6", listen, 0), ("2 3 1 6", listen, 0)]
    assert not file.parent.exists(), "what is of no use any more"


@pytest.fixture
def wires():
    """Two network namespaces with a wire between them, whose machines are named localhost.

    The command to enter each, and its end of the wire.
    """
    names = [f"w{os.getpid()}{side}" for side in "ab"]

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"-n {names[0]} link add {names[0]} type veth peer name {names[1]} netns {names[1]}")
        for number, name in enumerate(names, start=1):
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev {name}")
            ip(f"-n {name} link set {name} up")
            ip(f"-n {name} link set lo up")
        named = ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh"]
        yield [(("ip", "netns", "exec", name, *named), name) for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root and network namespaces: {error}")
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_nodes_that_know_themselves_as_the_loopback_listen_where_they_have_met(tmp_path, wires):
    tasks = [start(tmp_path, rank, [1, 1], within=within) for rank, (within, _) in enumerate(wires)]
    said = [(*out.splitlines()[-2:], code) for out, _, code in ends(tasks)]
    assert said == [("0 2 1 3", wires[0][1], 0), ("1 2 1 3", wires[1][1], 0)]


def test_who_did_not_come_is_named_with_host_and_port(tmp_path):
    """Rank 2 is ready before, and does come within these seconds."""
    last = start(tmp_path, 2, [3])
    assert last.stdout is not None
    assert last.stdout.readline() == "ready\n"
    first = start(tmp_path, 0, [3], MEDLEY_RENDEZVOUS_SECONDS="12")
    (_, zero, code), (_, two, other) = ends([first, last])
    assert (code, other) == (1, 1)
    assert "rank 0 waited 12 s at no-such-node-0:" in zero
    assert "and rank 1 of 3 did not come" in zero
    assert zero.count("\n") == 1
    assert "rank 2" in two
    assert "no-such-node-0:" in two


def test_ranks_that_do_not_come_are_a_sentence_and_worth_another_start(tmp_path, capsys, monkeypatch):
    def join(out, *, asked):
        raise RendezvousError("rank 0 waited 300 s")

    monkeypatch.setattr(launch, "join_ranks", join)
    monkeypatch.setenv(verdict.VARIABLE, str(tmp_path / "verdict.json"))
    assert launch.main(["--out", str(tmp_path / "run")]) == launch.CRASH
    assert capsys.readouterr().err == "error: rank 0 waited 300 s\n"
    found = verdict.read(tmp_path / "verdict.json")
    assert found == verdict.Verdict(code=launch.CRASH, reason="rank 0 waited 300 s")


def test_a_rank_zero_that_never_spoke_is_said_with_the_file(tmp_path):
    ((_, said, code),) = ends([start(tmp_path, 1, [2], MEDLEY_RENDEZVOUS_SECONDS="1")])
    assert code == 1
    assert "rank 1 of 2 waited 1 s, and rank 0 never said in" in said
    assert str(tmp_path / "rendezvous" / "7.0.3.json") in said


def test_a_rank_zero_that_cannot_be_reached_is_said_with_host_and_port(tmp_path):
    (tmp_path / "rendezvous").mkdir()
    door = {"node": "no-such-node-0", "addresses": ["127.0.0.1"], "port": 9, "token": "any"}
    (tmp_path / "rendezvous" / "7.0.3.json").write_text(json.dumps(door))
    ((_, said, code),) = ends([start(tmp_path, 1, [1, 1], MEDLEY_RENDEZVOUS_SECONDS="1")])
    assert code == 1
    assert "found no way to rank 0 at no-such-node-0:9 (127.0.0.1) within 1 s" in said


def test_a_signal_ends_the_waiting_with_nothing_lost(tmp_path):
    task = start(tmp_path, 1, [2])
    assert task.stdout is not None
    assert task.stdout.readline() == "ready\n"
    time.sleep(0.3)
    task.terminate()
    assert ends([task])[0][2] == 75


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    ((_, said, _),) = ends([start(tmp_path / "file", 0, [2], MEDLEY_RENDEZVOUS_SECONDS="1")])
    assert "cannot be written" in said
    assert "choose another --out" in said


@pytest.mark.parametrize("said", ["soon", "0", "-1", "inf"])
def test_a_patience_that_is_no_number_is_a_sentence(monkeypatch, said):
    monkeypatch.setenv("MEDLEY_RENDEZVOUS_SECONDS", said)
    with pytest.raises(UserError, match="MEDLEY_RENDEZVOUS_SECONDS is"):
        Wait.of_environment(lambda: False)
