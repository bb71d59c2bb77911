"""What table and figure say of arms: on run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_finished import run
from torch import nn

from lib import compare, evaluate, finished, plots_evaluation


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    """dense: 9 of 10, 100 ms; ucb at 0.5: 9 and 7 of 10, 50 ms; random at 0.5: 3 of 10, 50 ms."""
    run(tmp_path, "a/dense", "dense", right=9, ratio=1.0)
    run(tmp_path, "a/ucb0", right=9)
    run(tmp_path, "a/ucb1", right=7, seed=1)
    run(tmp_path, "a/random", "random", right=3)
    table, _ = finished.runs(tmp_path / "*/*")
    speed = pd.DataFrame({"model": ["dense 1", "ucb 0.5", "random 0.5"], "latency_ms": [100.0, 50.0, 50.0],
                          "latency_iqr_ms": 1.0, "throughput_ips": [320.0, 640.0, 640.0], "batch_size": 32,
                          "speedup": [1.0, 2.0, 2.0], "speedup_iqr": 0.1})  # fmt: skip
    return compare.with_speed(table, speed)


def test_costs_of_an_arm_are_means_over_its_seeds(table):
    """A-ViT and ACDC cost another number of multiply-adds with each seed."""
    table.loc[table.run.str.endswith("ucb1"), "macs_g"] = 0.9
    found = compare.summary(table, "top1", "dense").set_index("arm").macs_g
    assert found["ucb 0.5"] == pytest.approx(0.7) and found["random 0.5"] == 0.5


def test_summary(table):
    found = compare.summary(table, "top1", "dense").set_index("arm")
    assert found.loc["ucb 0.5", ["seeds", "top1", "speedup"]].tolist() == [2, pytest.approx(0.8), 2.0]
    assert found.loc["ucb 0.5", "±"] == pytest.approx(0.1 * 12.706, rel=1e-3)  # t with one degree of freedom
    assert found.loc["ucb 0.5", "difference"] == pytest.approx(-0.1)
    assert found.loc["ucb 0.5", "p"] == 1.0, "the first seed answers exactly like the baseline"
    assert found.loc["random 0.5", "p"] == pytest.approx(2 * 0.5**6)  # six answers lost, none won
    assert found.pareto.to_dict() == {"dense 1": True, "ucb 0.5": True, "random 0.5": False}
    with pytest.raises(finished.CompareError, match="metric 'top5' is not among"):
        compare.summary(table, "top5", "dense")
    with pytest.raises(finished.CompareError, match="no run of baseline 'tome' here: expected one of dense"):
        compare.summary(table, "top1", "tome")


def test_speed_is_a_share_of_the_ceilings_where_that_was_timed(table):
    assert table.of_ceiling.isna().all(), "no ceiling was timed"
    speeds = {"dense 1": 1.0, "ucb 0.5": 1.5, "random 0.5": 2.0}
    speeds |= {"ceiling of ucb 0.5": 2.5, "ceiling of random 0.5": 1.6}
    names = ["latency_ms", "latency_iqr_ms", "throughput_ips", "batch_size", "speedup_iqr"]
    speed = pd.DataFrame({"model": [*speeds], "speedup": [*speeds.values()]}).assign(**dict.fromkeys(names, 7.0))
    again = compare.with_speed(table, speed)
    assert again.arm.tolist() == table.arm.tolist(), "a ceiling is no arm"
    assert [*again.columns] == [*table.columns], "no column is there twice"
    assert (again.latency_ms == 7).all() and again.speedup.tolist() == again.arm.map(speeds).tolist()
    shares = {"dense 1": np.nan, "ucb 0.5": 1.5 / 2.5, "random 0.5": 2.0 / 1.6}
    found = compare.summary(again, "top1", "dense").set_index("arm").of_ceiling
    assert found.to_dict() == pytest.approx(shares, nan_ok=True)
    assert again.of_ceiling.tolist() == pytest.approx([shares[arm] for arm in again.arm], nan_ok=True)


def test_speed_in_further_settings_is_of_as_many_images_as_it_says(tiny, monkeypatch):
    seen, models = [], {"dense 1": nn.Identity(), "mine 0.5": nn.Identity()}

    def latency(models, batch, *, precision, repeats, **_):
        seen.append((len(batch), precision, repeats))
        ms = [6.0, len(seen) if precision == "fp32" else 4.0]  # of every batch another time
        return pd.DataFrame({"model": [*models], "latency_ms": ms})

    monkeypatch.setattr(compare.evaluate, "latency", latency)
    settings, most = [(1, "fp32"), (10**6, "fp32"), (5, "bf16")], len(tiny.test)
    found = compare.elsewhere(models, tiny, settings, "dense 1", repeats=10).set_index("arm")
    ones = min(16, most)
    assert seen == [(1, "fp32", 3)] * ones + [(most, "fp32", 10)] + [(5, "bf16", 10)]
    expected = {"batch 1, fp32": 6 * ones / sum(range(1, ones + 1)), f"batch {most}, fp32": 6 / (ones + 1)}
    assert found.loc["mine 0.5"].to_dict() == pytest.approx(expected | {"batch 5, bf16": 1.5})
    assert {*found.loc["dense 1"]} == {1} and [*compare.elsewhere(models, tiny, [], "dense 1", 3).columns] == ["arm"]


def test_baseline_is_a_method_or_an_arm_and_without_runs_the_first_model(table):
    assert compare.baseline_arm(table, "random") == compare.baseline_arm(table, "random 0.5") == "random 0.5"
    given = pd.DataFrame({"arm": ["b", "a"], "method": "given"})
    assert compare.baseline_arm(given, "dense") == "b"
    with pytest.raises(finished.CompareError, match="no run of baseline 'tome'"):
        compare.baseline_arm(pd.concat([table, given]), "tome")


def test_recommend(table):
    summary = compare.summary(table, "top1", "dense")
    advice = compare.recommend(summary, "top1", 60.0, "dense 1").set_index("wish")
    assert advice.use.to_dict() == {
        "fastest within one point of the baseline": "dense 1",
        "most accurate under 60.0 ms per batch": "ucb 0.5",
        "most accuracy per ms": "ucb 0.5",
        "fewest multiply-adds within five points": "dense 1",
        "fewest parameters within five points": "dense 1",
    }
    because = "top1 0.800 (-10.0 points) at 2.00× the baseline's speed (50.0 ms), 0.500 GMACs, 1.00 M parameters"
    assert advice.because["most accuracy per ms"] == because
    none = compare.recommend(summary, "top1", 10.0, "dense 1").iloc[1]
    assert none.use == "none" and none.because == "the fastest takes 50.0 ms"


def test_recommend_goes_by_the_cost_and_among_equals_by_accuracy():
    arms = [("dense 1", 0.52, 100, 1.0, 5.0), ("acdc", 0.47, 90, 0.4, 2.0), ("eap", 0.48, 80, 0.8, 2.0),
            ("ucb", 0.51, 50, 0.5, 5.0), ("tome", 0.46, 40, 0.1, 1.0)]  # fmt: skip
    summary = pd.DataFrame(arms, columns=["arm", "top1", "latency_ms", "macs_g", "params_m"])
    summary["speedup"] = 100 / summary.latency_ms
    fastest, accurate, rate, macs, params = compare.recommend(summary, "top1", 85.0, "dense 1").use
    assert (fastest, accurate, rate) == ("ucb", "ucb", "tome")
    assert macs == "acdc", "exactly five points worse, though 0.47 < 0.52 - 0.05 in floats"
    assert params == "eap", "as small as acdc, and more accurate"
    disturbed = summary.assign(
        latency_ms=[100, 90, 80, 150, 40]
    )  # something else ran while ucb was timed, and its round
    fastest, _, rate, *_ = compare.recommend(disturbed, "top1", 85.0, "dense 1").use
    assert (fastest, rate) == ("ucb", "tome"), "speed is a ratio within rounds, not a time"


def test_evaluation_is_the_mean_over_seeds_with_costs_and_fronts(table):
    found = compare.evaluation(table, "top1", ["yes", "no"]).set_index("arm")
    ucb, names = found.loc["ucb 0.5"], {"precision_macro", "confidence_gap", "entropy_nats", "nll_nats", "brier", "ece"}
    assert ucb.seeds == 2 and ucb.top1 == pytest.approx(0.8)
    assert ucb.per_class_accuracy["yes"] == pytest.approx(0.8) and np.isnan(ucb.per_class_accuracy["no"])
    each = []
    for right in (9, 7):  # the predictions that `run` writes
        logits = torch.zeros(10, 2).double()
        logits[right:, 1] = 1.0
        each.append(evaluate.classification(logits, torch.zeros(10, dtype=torch.long)))
    assert names <= {*found}
    for name in {*compare.SCORES} & {*found}:
        assert ucb[name] == pytest.approx(np.mean([scores[name] for scores in each])), name
    assert ucb[["latency_ms", "macs_g", "params_m", "throughput_ips", "batch_size"]].tolist() == [50, 0.5, 1, 640, 32]
    assert type(compare.records(found)[0]["batch_size"]) is int
    assert ucb.accuracy_per_ms == pytest.approx(0.8 / 50)
    fronts = found[["pareto_latency", "pareto_macs", "pareto_params"]].T.to_dict("list")
    assert fronts == {"dense 1": [True] * 3, "ucb 0.5": [True, True, False], "random 0.5": [False] * 3}


def test_evaluation_computes_only_what_a_run_does_not_say(tmp_path, table):
    said = dict.fromkeys(compare.SCORES, 0.25) | {"per_class_accuracy": {"yes": 0.5, "no": None}}
    random = Path(table.run[table.arm == "random 0.5"].iloc[0])
    predictions = (random / "test.npz").rename(tmp_path / "test.npz")
    (random / "metrics.json").write_text(json.dumps(said))
    found = compare.evaluation(table, "top1", ["yes", "no"])
    row = compare.records(found[found.arm == "random 0.5"])[0]
    assert {row[name] for name in compare.SCORES} == {0.25}
    assert row["per_class_accuracy"] == {"yes": 0.5, "no": None}
    del said["ece"]
    (random / "metrics.json").write_text(json.dumps(said))
    with pytest.raises(FileNotFoundError, match="test.npz"):
        compare.evaluation(table, "top1", ["yes", "no"])
    predictions.rename(random / "test.npz")
    found = compare.evaluation(table, "top1", ["yes", "no"]).set_index("arm").loc["random 0.5"]
    assert found.top1 == 0.25 and found.ece not in (0.25, None), "only what is missing is new"


def test_top5_is_missing_only_where_there_are_five_classes(tmp_path):
    said = dict.fromkeys(compare.SCORES[:1] + compare.SCORES[2:], 0.25) | {"per_class_accuracy": {"a": 0.5}}
    made = run(tmp_path, "a/one")
    (made / "metrics.json").write_text(json.dumps(said))
    (made / "test.npz").unlink()
    costs = dict.fromkeys(("latency_ms", "macs_g", "params_m", "throughput_ips", "batch_size", "speedup"), 1.0)
    table = pd.DataFrame([{"run": str(made), "arm": "a", "method": "a", "keep_ratio": 1.0, **costs}])
    assert "top5" not in compare.evaluation(table, "brier", "abcd")
    with pytest.raises(FileNotFoundError, match="test.npz"):
        compare.evaluation(table, "brier", "abcde")


def many(count: int, classes: int = 4) -> pd.DataFrame:
    """What compare.evaluation returns, for arms that spread over costs, of which some are close together."""
    rng = np.random.default_rng(0)
    methods = [f"method{i % 13}" for i in range(count)]
    arms = [f"{method} with a name too long to show, {i}" for i, method in enumerate(methods)]
    table = pd.DataFrame({"arm": arms, "method": methods, "keep_ratio": np.nan, "batch_size": 32})
    for name in (*compare.SCORES, *compare.COSTS.values(), "throughput_ips", "speedup"):
        table[name] = rng.uniform(0.1, 1, count)
    table["per_class_accuracy"] = [{f"c{c}": rng.uniform() for c in range(classes)} for _ in range(count)]
    for name, cost in compare.COSTS.items():
        table[f"pareto_{name}"] = evaluate.pareto(table, cost, "top1")
    return table


@pytest.mark.parametrize("count", [1, 2, 25])
def test_figure_of_any_number_of_arms(count):
    table = many(count)
    figure = plots_evaluation.results(table, "top1")
    figure.canvas.draw()
    panels = figure.axes[:6]
    assert [axis.get_title(loc="left") for axis in panels] == [
        *("Accuracy against time", "Accuracy against multiply-adds", "Accuracy against size"),
        *("Confidence and calibration", "Accuracy per class", "Speed"),
    ]
    for axis, (name, cost) in zip(panels, compare.COSTS.items(), strict=False):
        front = table[table[f"pareto_{name}"]].sort_values(cost)
        assert np.array_equal(axis.lines[0].get_xydata(), front[[cost, "top1"]])
        points = np.concatenate([dots.get_offsets() for dots in axis.collections])
        assert sorted(map(tuple, points)) == sorted(map(tuple, table[[cost, "top1"]].to_numpy()))
        boxes = [text.get_window_extent() for text in axis.texts]
        assert 1 <= len(boxes) <= len(front)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "names run into each other"
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    rows = [label.get_text() for label in panels[3].get_yticklabels()]
    assert len({*rows}) == count and all(len(row) <= 31 for row in rows)
    bars = [bar.get_width() for bar in panels[5].patches]
    order = table.sort_values(["method", "macs_g"], ascending=[True, False])
    assert bars == order.throughput_ips.tolist()
    heights = [label.get_window_extent() for label in panels[3].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(heights, heights[1:], strict=False)), "rows run into each other"


def test_figure_of_many_classes_shows_quantiles_and_of_no_errors_no_confidence():
    table = many(3, classes=200)
    table.loc[0, "confidence_incorrect"] = np.nan
    figure = plots_evaluation.results(table, "top1")
    figure.canvas.draw()
    shown = figure.axes[4].images[0].get_array()
    lowest = {min(classes.values()) for classes in table.per_class_accuracy}
    assert shown.shape == (3, 10) and {*shown[:, 0].tolist()} == lowest
    assert [label.get_text() for label in figure.axes[4].get_xticklabels()][:2] == ["worst", "5 %"]
