import pytest

from datasets.errors import UserError
from pretrain.place import alone_among, job_here, place_here, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURMD_NODENAME": "n4",
}  # fmt: skip


def test_a_task_of_srun_on_an_uneven_allocation():
    place = place_here(STEP)
    assert (place.by, place.rank, place.world, place.local, place.beside) == ("srun", 6, 7, 0, 1)
    assert place.node == "n4"
    second = place_here({**STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"})
    assert (second.rank, second.local, second.beside) == (3, 1, 2)


def test_the_step_counts_where_the_allocation_is_larger():
    """`srun -n 2` inside a job of eight tasks."""
    step = {
        **STEP, "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_NODEID": "1",
    }  # fmt: skip
    place = place_here(step)
    assert (place.rank, place.world, place.beside) == (1, 2, 1)


def test_torchrun_counts_before_slurm():
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place = place_here({**STEP, **given})
    assert (place.by, place.rank, place.world, place.local, place.beside) == ("torchrun", 5, 8, 1, 4)
    assert place_here({"RANK": "0", "WORLD_SIZE": "2"}).beside is None


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_or_an_interactive_shell_is_one_process_and_told_so(step):
    shell = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    shell |= {"SLURM_STEP_ID": step} if step else {}
    assert place_here(shell).world == 1
    sentence = alone_among(shell)
    assert sentence is not None
    assert "has 7 tasks" in sentence
    assert "srun" in sentence
    assert alone_among({**shell, "SLURM_NTASKS": "1"}) is None
    assert alone_among(STEP) is None
    assert alone_among({}) is None


def test_a_job_and_how_often_it_was_requeued():
    assert job_here({}) is None
    job = job_here({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert job is not None
    assert (job.id, job.restart, job.step, job.tasks) == ("7", 2, 0, 7)


def test_an_element_of_an_array_is_called_so():
    """The number of its last element is also that of the array: `scontrol requeue 7` would mean all of it."""
    job = job_here({**STEP, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert job is not None
    assert job.id == "7_3"


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("16") == [16]
    assert tasks_per_node("") == []
    with pytest.raises(UserError, match=r"2\(x3\),1"):
        tasks_per_node("two")


def test_variables_that_contradict_each_other_are_a_sentence():
    with pytest.raises(UserError, match=r"7 tasks and of 2\(x3\) on its nodes"):
        place_here({**STEP, "SLURM_TASKS_PER_NODE": "2(x3)"})
