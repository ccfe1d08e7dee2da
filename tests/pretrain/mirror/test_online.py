"""With the real client, against a server on the loopback that keeps what it is sent."""

import time

import pytest

from pretrain.sinks import mirrored
from pretrain.sinks.mirrored import Mirrored


def steps(server):
    """(W&B's step, the run's) of each row."""
    return [(row["_step"], row["step"]) for row in server.history]


def plain(row):
    ours = {name: value for name, value in row.items() if not name.startswith(("_", "eval/s"))}
    return {**ours, "time": row["_timestamp"]}


def assert_each_step_once(server, truth):
    assert steps(server) == [(step, step) for step in sorted(truth)]
    for row in server.history:
        assert plain(row) == pytest.approx(truth[row["step"]])


def test_a_run_is_sent_once_whole(run, mirror, server):
    run.report(2, 4)
    run.evaluation(4)
    run.report(6)
    run.evaluation(6, finished=1.0)
    assert mirror() == f"W&B: {server.url}/me/medley/runs/{(run.rundir.wandb / 'id').read_text()}\n"
    assert_each_step_once(server, run.truth)
    assert server.run == (run.rundir.wandb / "id").read_text()
    assert server.config["objectives"]["value"] == {"itc": {"kind": "itc", "weight": 1}}
    assert server.history[1]["eval/sheet"]["_type"] == "image-file"
    assert server.history[1]["eval/samples"]["nrows"] == 2
    assert [step for _, step in server.tables] == [4, 6]
    assert all(name.startswith(f"run-{server.run}-evalsamples") for name, _ in server.tables)
    assert {row["eval/sheet"]["path"] for row in server.history if "eval/sheet" in row} <= server.uploaded
    assert server.exit_codes == [0]
    mirror()
    assert_each_step_once(server, run.truth)


def test_a_later_start_sends_what_is_new(run, mirror, server):
    run.report(2, 4)
    run.evaluation(4)
    mirror()
    assert server.exit_codes == [1], "not finished"
    run.resume(4)
    run.report(6, 8)
    run.evaluation(8)
    mirror()
    assert_each_step_once(server, run.truth)
    assert server.summary["eval/zero_shot_top1"] == {"max": 0.25, "last": 0.125}, "the best of all starts"


def test_an_evaluation_that_came_after_its_report_was_sent_arrives(run, mirror, server):
    run.report(2, 4)
    mirror()
    run.evaluation(4)
    mirror()
    run.report(5, 6)  # 5 is the place that the evaluation has taken
    mirror()
    mirror()
    assert steps(server) == [(2, 2), (4, 4), (5, 4), (6, 5), (7, 6)]
    late = server.history[2]
    assert late["samples"] == 32
    assert late["eval/perplexity"] == 4
    assert late["eval/samples"]["nrows"] == 2
    assert "train/loss" not in late


def test_steps_that_training_abandoned_are_rewound(run, mirror, server):
    run.report(2, 4)
    run.evaluation(4)
    run.report(6, 8)
    mirror()
    run.resume(4)
    run.report(6)
    assert run.truth[6]["time"] != server.history[2]["_timestamp"], "it was done again"
    mirror()
    assert_each_step_once(server, run.truth)


def test_an_evaluation_that_a_rewind_leaves_out_arrives(run, mirror, server):
    run.report(2, 4)
    mirror()
    run.report(6)
    mirror()
    run.resume(4)  # killed in the evaluation of 4, and again after 6, which is void
    run.evaluation(4)
    mirror()
    assert steps(server) == [(2, 2), (4, 4), (5, 4)]


def test_where_the_server_does_not_rewind_its_steps_stay_and_training_goes_on(run, mirror, server):
    run.report(2, 4, 6)
    mirror()
    server.rewinds = False
    run.resume(4)
    run.report(6)
    first = dict(server.history[2])
    run.resume(2)
    run.report(4)
    said = mirror()
    assert "does not take back the steps after 4 (failed to rewind run" in said
    assert f"{server.url}/me/medley/runs/" in said
    run.report(6, 8)
    mirror()
    assert steps(server) == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert server.history[2] == first


def test_without_a_server_it_is_offline_and_the_next_start_sends_everything(
    run, mirror, offline, server, monkeypatch
):
    run.report(2, 4)
    mirror()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run.report(6, 8)
    said = mirror()
    assert "W&B: offline (http://127.0.0.1:9 does not answer): " in said
    assert [record["step"]["num"] for record in offline()["history"]] == [2, 4, 6, 8]
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    run.report(10)
    mirror()
    assert_each_step_once(server, run.truth)
    assert list(run.rundir.wandb.glob("offline-run-*")) == [], "or it could be sent a second time"


def test_a_refused_key_is_a_reason_to_be_offline(run, mirror, server, monkeypatch):
    run.report(2)
    monkeypatch.setattr(server, "graphql", lambda operation, given: None)
    said = mirror()
    assert said.startswith("W&B: offline (")
    assert "is not for you" in said
    assert said.count("\n") == 1
    monkeypatch.undo()


def test_a_netrc_is_a_key_and_the_mode_can_be_chosen_for_once(run, mirror, server, monkeypatch):
    run.report(2)
    monkeypatch.delenv("WANDB_API_KEY")
    with run.rundir.run_yaml.open("a") as file:
        file.write("wandb: {mode: offline}\n")
    assert "offline (as asked)" in mirror()
    assert "cannot be online (no API key): `wandb login` first" in mirror("--mode", "online", code=2)
    netrc = run.rundir.root.parent / "home" / "netrc"
    netrc.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {'b' * 40}\n")
    netrc.chmod(0o600)
    mirror("--mode", "online")
    assert_each_step_once(server, run.truth)


def test_a_server_that_goes_away_is_not_waited_for_and_lacks_nothing_later(run, mirror, server, monkeypatch):
    monkeypatch.setattr(mirrored, "PATIENCE", 300.0)  # of which the mirror needs little
    said = []
    run.report(2, 4)
    following = Mirrored(run.rundir, say=said.append)
    assert following._process is not None
    end = time.monotonic() + 300
    while not said:
        following.step(4, {})
        assert time.monotonic() < end
        time.sleep(0.02)
    server.down = True
    run.report(6)
    following.close()
    assert said[0] == f"W&B: {server.url}/me/medley/runs/{server.run}"
    assert f"W&B: {server.url} does not answer any more" in said[1]
    assert len(said) == 2, "not that it waited in vain"
    assert following._process.poll() is None, "it goes on trying"
    following._process.kill()
    following._process.wait()
    server.down = False
    run.report(8)
    mirror()
    assert_each_step_once(server, run.truth)
