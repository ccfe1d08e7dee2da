import numpy as np
import pytest

from pretrain.report.collect import collect
from pretrain.report.curves import panels, thin, title
from pretrain.sinks.plots import smooth


def by_name(runs):
    return {panel["name"]: panel for section in panels(runs).values() for panel in section}


def test_thinning_keeps_every_peak():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[4321, 77_777]] = 50, -50
    kept = thin(values)
    assert len(kept) <= 1000
    assert (np.diff(kept) > 0).all()
    assert {0, 4321, 77_777, 99_999} <= set(kept.tolist())
    # Whatever is looked at closely has the height that it had.
    for first in range(0, 100_000, 1000):
        near = kept[(kept >= first) & (kept < first + 1000)]
        assert values[near].max() >= np.sort(values[first : first + 1000])[-4]
    assert thin(np.arange(300.0)).tolist() == list(range(300))


def test_sections_hold_what_belongs_there(make_run):
    found = {
        title: [panel["name"] for panel in each] for title, each in panels([collect(make_run())]).items()
    }
    assert found == {
        "Loss": ["train/loss", "train/loss/itc", "train/loss/lm", "train/itc/accuracy"],
        "Evaluation": ["eval/zero_shot_top1", "eval/image_to_text_recall@1", "eval/perplexity"],
        "Model": ["train/lr", "model/gradient_norm", "model/gradient_norm/image", "model/logit_scale"],
        # Memory, step time and bad samples never change here: a table says what they are.
        "Throughput": ["perf/samples_per_second"],
        "Data": ["perf/data_wait"],
    }


def test_noise_is_drawn_faint_under_its_mean_and_all_else_as_it_is(make_run):
    run = collect(make_run())
    drawn = by_name([run])
    (loss,) = drawn["train/loss/lm"]["runs"]
    np.testing.assert_allclose(loss["raw"][1], run.series["train/loss/lm"].values, rtol=1e-4)
    np.testing.assert_allclose(loss["line"][1], smooth(run.series["train/loss/lm"].values), rtol=1e-4)
    for name in ("train/lr", "eval/perplexity", "model/logit_scale"):
        assert "raw" not in drawn[name]["runs"][0]
    few = collect(make_run("few", every=100))
    assert "raw" not in by_name([few])["train/loss/lm"]["runs"][0]


def test_a_run_without_a_metric_leaves_its_place_empty(make_run):
    runs = [collect(make_run("a")), collect(make_run("b"))]
    del runs[0].series["train/itc/accuracy"]
    first, second = by_name(runs)["train/itc/accuracy"]["runs"]
    assert first is None
    assert second["line"][0][-1] == 64_000


def test_the_sum_of_one_loss_is_not_drawn_beside_it(make_run):
    run = collect(make_run())
    del run.series["train/loss/lm"]
    assert "train/loss" not in by_name([run])


def test_a_long_run_is_drawn_with_few_points(make_run):
    run = collect(make_run(every=1, steps=5000))
    (loss,) = by_name([run])["train/loss"]["runs"]
    assert len(loss["raw"][0]) <= 1000
    assert len(loss["line"][0]) <= 1000
    values = run.series["train/loss"].values
    assert max(loss["raw"][1]) == pytest.approx(values.max(), rel=1e-4)
    assert min(loss["raw"][1]) == pytest.approx(values.min(), rel=1e-4)


def test_metrics_in_words():
    assert title("train/loss/lm") == "lm loss"
    assert title("train/itc/accuracy") == "itc accuracy"
    assert title("model/gradient_norm/image") == "gradient norm image"
    assert title("eval/image_to_text_recall@1") == "image to text recall@1"
    assert title("words") == "words"
    assert title("data/masked/no_caption") == "samples that could not be read, no caption"
    assert title("data/queue") == "steps that lay ready"
