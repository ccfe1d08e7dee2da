"""Whole runs: of every optimizer, killed and gone on with; what is judged and exported is the average."""

import json

import pytest
import torch

from pretrain import checkpoint, launch, loop
from pretrain.evaluate import __main__ as evaluation
from pretrain.evaluate.subject import load_subject
from pretrain.export import __main__ as exporting
from pretrain.ledger import Ledger

STEPS = 4
FLAGS = (
    f"--objectives itc,lm --stages.one.steps {STEPS} --stages.one.batch 8 --stages.one.resolution 32 "
    "--vocabulary 300 --model.embed 16 --model.text.width 16 "
    "--model.text.layers 2 --model.captioner.width 32 --model.captioner.layers 1 --cadence.checkpoint 2 "
    "--loader-threads 1 --precision.threads 1 --wandb.mode disabled --stages.one.optim.warmup 2 "
    "--stages.one.ema 0.5 --stages.one.optim.text-layer-decay 0.7 --stages.one.optim.lr 0.01 "
    "--stages.one.trainable image.* 0 captioner.* 0.5"
)
KINDS = {
    "adamw": "--model.image open_clip:ViT-S-32-alt --eval.limit 8 --stages.one.optim.schedule linear "
    "--stages.one.optim.update-clip 1",
    "lamb": "--stages.one.optim.schedule step --stages.one.optim.milestones 2 3",
    "lion": "--stages.one.optim.schedule rsqrt --stages.one.optim.cooldown 2",
    "adafactor": "--stages.one.optim.schedule wsd --stages.one.optim.cooldown 2",
    "muon": "--stages.one.optim.schedule constant",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_shard):
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", "captions")


def launched(out, shard, kind: str) -> int:
    flags = f"{FLAGS} {KINDS[kind]} --stages.one.optim.kind {kind} --data {shard} --out {out}"
    return launch.main([*flags.split(), *(["--val", str(shard)] if kind == "adamw" else [])])


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, shard):
    """A run, and one that died a step after a checkpoint."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    assert launched(folder / "straight", shard, kind) == launch.DONE
    take = loop.train_step

    def dies(*arguments, **named):
        if named["key"][1] == 3:
            raise KeyboardInterrupt
        return take(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            launched(folder / "killed", shard, kind)
    assert launched(folder / "killed", shard, kind) == launch.DONE
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("runs", KINDS, indirect=True)
def test_a_run_that_was_killed_has_the_bits_of_one_that_was_not(runs):
    found = {}
    for name in ("straight", "killed"):
        found[name] = checkpoint.chosen(runs / name / "checkpoints", STEPS).load().tensors
        assert len(Ledger(runs / name / "ledger").final()) == STEPS
    assert Ledger(runs / "straight" / "ledger").final() == Ledger(runs / "killed" / "ledger").final()
    straight, killed = found["straight"], found["killed"]
    assert straight.keys() == killed.keys() == {"model", "optimizer", "ema"}
    for group, tensors in straight.items():
        assert tensors.keys() == killed[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, killed[group][name]), (group, name)
    assert any(name.startswith("model.text.") for name in straight["ema"])
    assert not any(
        name.startswith("model.image.") for group in ("ema", "optimizer") for name in straight[group]
    )


@pytest.mark.parametrize("runs", ["adamw"], indirect=True)
def test_what_is_judged_and_exported_is_the_average(runs, shard, tmp_path, capsys):
    """And it is said; the weights that were trained can be had too."""
    run = runs / "straight"
    averaged, raw = load_subject(run), load_subject(run, weights="raw")
    saved = checkpoint.chosen(run / "checkpoints", STEPS).load().tensors
    at = "text.tower.token_embedding.weight"
    assert torch.equal(averaged.model.get_parameter(at), saved["ema"][f"model.{at}"])
    assert torch.equal(raw.model.get_parameter(at), saved["model"][f"model.{at}"])
    assert not torch.equal(averaged.model.get_parameter(at), raw.model.get_parameter(at))
    assert (averaged.averaged, raw.averaged) == (True, False)

    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    for weights in ("ema", "raw"):
        out = tmp_path / f"{weights}.json"
        assert evaluation.main([str(run), "--weights", weights, "--json", str(out)]) == 0
        assert ("the weights are the moving average" in capsys.readouterr().out) == (weights == "ema")
        found = json.loads(out.read_text())
        assert found["averaged"] == (weights == "ema")
        if weights == "ema":  # as in training
            assert {n: each["value"] for n, each in found["values"].items()} == pytest.approx(
                {name: last[f"eval/{name}"] for name in found["values"]}
            )

    out = tmp_path / "out"
    command = [str(run), str(out), "--to", "open_clip", "--without", "captioner"]
    assert exporting.main(command) == 0
    assert "The weights are the moving average of those that were trained." in (out / "README.md").read_text()
    assert torch.equal(load_subject(out).model.get_parameter(at), averaged.model.get_parameter(at))
