"""Both batch scripts under a real Slurm, through whatever ends a job: nothing is lost.

After each, the ledger (which samples, which loss, which gradient norm, step by step) is that of a run that
nothing interrupted, to the bit. After a signal no step is done twice; after a crash at most those since the
last checkpoint, of which there is one every 10 steps.
"""

import os
import signal

import pytest

from slurm.testing import GRACE

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

HELD = "14:2,0:0"
"""At the first start steps are slow when 14 are done, so that it is met before its end; then none is."""


def is_clean(output: str) -> bool:
    """Whether no rank says anything of a crash. Slurm itself calls everything an error."""
    ours = [line for line in output.splitlines() if not line.startswith(("srun:", "slurmstepd-"))]
    return not any(word in line for line in ours for word in ("Traceback", "Error", "error:", "Segmentation"))


def test_stage_two_follows_stage_one_through_the_signal_of_its_time_limit(training):
    """Submitted together; one is requeued, which keeps the other waiting; then that one is terminated."""
    one = training.submit("stage1", pace=HELD)
    two = training.submit("stage2", pace="4:2,0:0", options=(f"--dependency=afterok:{one.id}",))
    training.wait_for_step(12)
    one.signal("USR2")
    training.finish(one)
    assert one.restarts == 1
    training.wait_for_step(46)
    two.signal("TERM")
    training.finish(two, steps=60)
    assert two.restarts == 1
    assert training.lost == [0, 0, 0, 0]
    assert is_clean(one.output), one.output
    assert is_clean(two.output), two.output


def test_its_time_limit_comes(training):
    """Two minutes, of whose end Slurm warns 45 seconds before or earlier. Nobody hastens what follows."""
    job = training.submit("stage1", pace="0:4,0:0", options=("--time=2", "--signal=USR2@45"))
    training.finish(job, hasten=False)
    assert 1 <= job.restarts <= 3  # where two cores have other things to do, a minute is soon over
    assert sum(training.lost) == 0
    assert is_clean(job.output), job.output


def test_a_signal_reaches_one_rank_only_and_slurm_does_not_answer_at_first(training, tmp_path):
    """`scontrol requeue` fails twice, as it does while a controller restarts."""
    shim = tmp_path / "bin" / "scontrol"
    shim.parent.mkdir()
    shim.write_text(
        f'#!/bin/sh\nif [ "$1" = requeue ] && [ ! -e {tmp_path}/twice ]; then\n'
        f"  [ -e {tmp_path}/once ] && : > {tmp_path}/twice\n  : > {tmp_path}/once\n"
        '  echo "Unable to contact slurm controller" >&2; exit 1\nfi\nexec /usr/bin/scontrol "$@"\n'
    )
    shim.chmod(0o755)
    job = training.submit("stage1", pace=HELD, path=str(shim.parent))
    training.wait_for_step(15)
    os.kill(job.tasks()[1].id, signal.SIGTERM)
    training.finish(job)
    assert (tmp_path / "twice").exists()
    assert job.restarts == 1
    assert training.lost == [0, 0]
    assert is_clean(job.output), job.output


def test_a_signal_comes_before_anything_is_trained(training):
    job = training.submit("stage1", pace="0:0")
    training.cluster.wait_for(lambda: job.tasks(), "the ranks")
    job.signal("TERM")
    training.finish(job)
    assert job.restarts == 1
    assert sum(training.lost) == 0
    assert is_clean(job.output), job.output


class Urgent:
    """A job that takes the nodes of the other one, until it is told to end."""

    def __init__(self, training):
        script, self._over = (training.out.parent / name for name in ("urgent.sh", "over"))
        script.write_text(f"#!/bin/sh\nuntil [ -e {self._over} ]; do sleep 0.2; done\n")
        options = ("--partition=high", "--nodes=2", f"--output={script.with_suffix('.out')}")
        self.job = training.cluster.submit(script, options=options)
        self.job.wait("RUNNING")

    def end(self):
        self._over.touch()


def test_a_job_of_a_higher_partition_takes_its_nodes(training):
    job = training.submit("stage1", pace=HELD)
    training.wait_for_step(15)
    above = Urgent(training)
    assert job.state == "PENDING"
    above.end()
    training.finish(job)
    assert above.job.state == "COMPLETED"
    assert job.restarts == 1
    assert training.lost == [0, 0]
    assert is_clean(job.output), job.output


@pytest.fixture
def no_grace(training):
    """Who has to make room has a second, and then the ten in which Slurm waits for what it ends."""
    training.cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=1")
    yield
    training.cluster.run("scontrol", "update", "PartitionName=low", f"GraceTime={GRACE}")


@pytest.mark.usefixtures("no_grace")
def test_it_is_killed_in_its_last_save(training):
    """Which is lost, with the steps since the checkpoint before it."""
    job = training.submit("stage1", pace=HELD)
    training.wait_for_step(15)
    training.wait_for_checkpoint(10)
    training.stalls.touch()
    above = Urgent(training)
    assert list(training.out.glob("checkpoints/*.tmp-*")) != []
    done = len(training.ledger)
    training.stalls.unlink()
    above.end()
    training.finish(job)
    assert job.restarts == 1
    assert training.lost == [0, done - 10]


def test_a_rank_is_killed(training):
    """The job stays, and so do its nodes."""
    job = training.submit("stage1", pace=HELD)
    training.wait_for_step(15)
    training.wait_for_checkpoint(10)
    os.kill(job.tasks()[1].id, signal.SIGKILL)
    training.finish(job)
    assert job.restarts == 0
    assert len(training.lost) == 2
    assert 0 < sum(training.lost) <= 10


def test_a_rank_stops_and_stays(training):
    """The watchdog writes down where each rank stands, and ends them."""
    job = training.submit("stage1", "--watchdog.least", "30", pace="14:1")
    training.wait_for_step(15)
    training.wait_for_checkpoint(10)
    os.kill(job.tasks()[1].id, signal.SIGSTOP)
    training.finish(job)
    assert job.restarts == 0
    assert len(training.lost) == 2
    assert sum(training.lost) <= 10
    stacks = (training.out / "stacks" / "rank-0.txt").read_text()
    assert "pretrain/loop.py" in stacks
    assert "rank 1" in job.output


def test_a_node_is_lost(training):
    job = training.submit("stage1", pace=HELD)
    training.wait_for_step(15)
    training.wait_for_checkpoint(10)
    training.cluster.kill_node("m2", jobs=True)
    training.cluster.wait_for(lambda: job.restarts == 1, "the job to be requeued")
    training.cluster.return_node("m2")
    training.finish(job)
    assert job.restarts == 1
    assert len(training.lost) >= 2
    assert sum(training.lost) <= 10 * len(training.lost)


def test_a_node_is_lost_and_what_ran_on_it_goes_on(training):
    """All ranks with it. The job is started on the other node; the old ranks write no more, and leave."""
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = training.submit("stage1", pace="2:6,0:0", options=options)
    training.wait_for_step(2)
    zombies = [job.tasks()[0], job.tasks()[1]]
    node = zombies[0].variables["SLURMD_NODENAME"]
    training.cluster.kill_node(node, jobs=False)
    training.cluster.wait_for(lambda: job.restarts == 1, "the job to be requeued")
    assert all(zombie.alive for zombie in zombies)
    training.finish(job)
    training.cluster.wait_for(lambda: not any(zombie.alive for zombie in zombies), "the old ranks to leave")
    assert job.restarts == 1
    assert job.show()["NodeList"] != node
    assert sum(training.lost) <= 30  # what the old ranks had done since the last checkpoint before they left


def test_six_short_segments(training):
    job = training.submit("stage1", pace="5:4,5:4,5:4,5:4,5:4,0:0")
    for segment in range(5):
        training.wait_for_step(6 * (segment + 1), starts=segment + 1)
        job.signal("USR2")
        training.cluster.wait_for(lambda done=segment + 1: job.restarts == done, "the next segment")
        job.hasten()
    training.finish(job)
    assert job.restarts == 5
    assert training.lost == [0] * 6
    assert is_clean(job.output), job.output


def test_its_user_wants_it_no_more(training):
    """What was done is saved, it is not started again, and the same command goes on."""
    job = training.submit("stage1", pace=HELD)
    training.wait_for_step(15)
    job.cancel()
    job.wait("CANCELLED")
    done = len(training.ledger)
    assert job.restarts == 0
    assert done < 40
    again = training.submit("stage1", pace="0:0")
    training.finish(again)
    assert training.lost == [0, 0]
    assert job.state == "CANCELLED"
    assert is_clean(again.output), again.output


def test_a_mistake_is_not_tried_again(training):
    job = training.submit("stage2", pace="0:0")
    job.wait("FAILED")
    assert job.show()["ExitCode"] == "2:0"
    assert job.restarts == 0
    assert [line for line in job.output.splitlines() if "error: " in line] != []
    assert "Traceback" not in job.output
