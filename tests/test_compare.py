"""Which runs are one arm, which are left out, and what table and figure say of them: on run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lib import compare, evaluate, plots_evaluation


def run(folder: Path, name: str, method: str | None = "ucb", right: int = 8, **more) -> Path:
    """A finished run: `right` of 10 test answers right; more: seed, ratio or setting, params, start, …"""
    made = folder / name
    made.mkdir(parents=True)
    params = {"seed": more.get("seed", 0), "output_dir": str(folder), **more.get("params", {})}
    metrics = {"dataset": more.get("dataset", "toy"), "keep_ratio": more.get("ratio", 0.5), "top1": right / 10}
    if "setting" in more:
        metrics["setting"] = more["setting"]
        del metrics["keep_ratio"]
    metrics |= {"macs_g": more.get("ratio", 0.5), "params_m": 1.0, "n": 10} | ({"method": method} if method else {})
    provenance = {"dataset_digest": more.get("digest", "d"), "start": str(more.get("start", ""))}
    for file, content in (("params", params), ("metrics", metrics), ("provenance", provenance)):
        (made / f"{file}.json").write_text(json.dumps(content))
    labels = np.zeros(10, dtype=int)
    logits = np.zeros((10, 2))
    logits[right:, 1] = 1.0
    np.savez(made / "test.npz", logits=logits, labels=labels)
    if more.get("done", True):
        (made / "DONE").touch()
    return made


def arms(folder: Path, dataset: str = "") -> tuple[dict[str, list[int]], dict[str, str]]:
    table, left_out = compare.collect(folder / "*/*", dataset)
    return {arm: rows.seed.tolist() for arm, rows in table.groupby("arm")}, left_out


def test_seeds_are_repetitions_and_twins_are_not(tmp_path):
    for seed in (0, 1, 2):
        run(tmp_path, f"stage2/s{seed}", seed=seed, params={"stage1_checkpoint_path": f"place{seed}"})
    run(tmp_path, "stage2/twin", seed=1, params={"stage1_checkpoint_path": "elsewhere"})
    found, left_out = arms(tmp_path)
    assert found == {"ucb 0.5": [0, 1, 2]}
    assert left_out == {"stage2/twin": "made like another run, with the same seeds"}


def test_methods_without_a_ratio_are_named_by_their_setting(tmp_path):
    for weight in (0.01, 0.1):
        for seed in (0, 1):
            values = {"method": "avit", "setting": f"ponder {weight:g}", "params": {"ponder_weight": weight}}
            run(tmp_path, f"avit/{weight}{seed}", seed=seed, **values)
    run(tmp_path, "dense/one", method="dense", ratio=1.0)
    found, left_out = arms(tmp_path)
    assert found == {"avit ponder 0.01": [0, 1], "avit ponder 0.1": [0, 1], "dense 1": [0]} and not left_out


def test_a_parameter_at_its_default_says_nothing_of_how_a_run_was_made(tmp_path, monkeypatch):
    """A run may be older than the parameter."""
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "gamma: float = 0.5  # how much"}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "stage2.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr(compare, "root", lambda: tmp_path)
    run(tmp_path, "stage2/old", seed=0)
    run(tmp_path, "stage2/new", seed=1, params={"gamma": 0.5})
    run(tmp_path, "stage2/other", seed=2, params={"gamma": 1.0})
    assert arms(tmp_path)[0] == {"ucb 0.5 (old)": [0, 1], "ucb 0.5 (other)": [2]}


def test_a_parameter_that_names_the_start_says_nothing_of_how_a_run_was_made(tmp_path):
    for seed in (0, 1):
        start = run(tmp_path, f"dense/s{seed}", method="dense", seed=seed, ratio=1.0)
        values = {"method": "dense-tuned", "params": {"weights": str(start)}, "start": start}
        run(tmp_path, f"dense/tuned{seed}", seed=seed, ratio=1.0, **values)
    assert arms(tmp_path)[0] == {"dense 1": [0, 1], "dense-tuned 1": [0, 1]}


@pytest.mark.parametrize("given", ["absolute", "relative", "with a slash", "by a link"])
def test_a_start_is_known_however_its_path_is_given(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        start = run(tmp_path, f"dense/s{seed}", method=None, seed=seed)
        (tmp_path / f"link{seed}").symlink_to(start)
        weights = {"absolute": str(start), "relative": f"dense/s{seed}", "with a slash": f"dense/s{seed}/",
                   "by a link": f"link{seed}"}[given]  # fmt: skip
        run(tmp_path, f"eap/r{seed}", method="eap", seed=seed, params={"model_path": weights}, start=start)
    assert arms(tmp_path)[0] == {"eap 0.5": [0, 1]}


def test_runs_without_a_seed_are_repetitions_by_the_seeds_of_what_they_start_from(tmp_path):
    for seed in (0, 1, 2):
        start = run(tmp_path, f"dense/s{seed}", method="dense", seed=seed, ratio=1.0)
        run(tmp_path, f"merging/r{seed}", method="ward", setting="1 GMACs", start=start)
    run(tmp_path, "merging/twin", method="ward", setting="1 GMACs", start=start)
    found, left_out = arms(tmp_path)
    assert found == {"dense 1": [0, 1, 2], "ward 1 GMACs": [0, 0, 0]}
    assert left_out == {"merging/twin": "made like another run, with the same seeds"}


def test_a_run_or_a_file_in_it_given_as_a_parameter_counts_by_how_it_was_made(tmp_path):
    for seed in (0, 1):
        start = run(tmp_path, f"dense/s{seed}", method=None, seed=seed)
        for way in ("a", "b"):
            other = run(tmp_path, f"acdc/{way}{seed}", method=None, seed=seed, params={"rule": way}, start=start)
            (other / "schedule.json").touch()
            values = {"params": {"like": str(other), "path": str(other / "schedule.json")}, "start": start}
            run(tmp_path, f"eap/{way}{seed}", method="eap", seed=seed, **values)
    assert arms(tmp_path)[0] == {"eap 0.5 (a0)": [0, 1], "eap 0.5 (b0)": [0, 1]}


def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path):
    run(tmp_path, "a/whole")
    edited = {
        "costless": ("metrics", "macs_g", "says nothing of macs_g"),
        "scoreless": ("metrics", "top1", "says nothing of top1"),
        "foreign": ("provenance", "dataset_digest", "says nothing of dataset_digest (provenance.json)"),
    }
    for name, (file, key, _) in edited.items():
        path = run(tmp_path, f"a/{name}", params={"name": name}) / f"{file}.json"
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))
    found, left_out = arms(tmp_path)
    assert found == {"ucb 0.5": [0]} and left_out == {f"a/{name}": why for name, (*_, why) in edited.items()}


def test_numbers_and_texts_of_one_name_are_written_as_text(tmp_path):
    for name, value in (("one", 3), ("two", "three")):
        path = run(tmp_path, f"a/{name}", name, setting=value) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": value}))
    table, _ = compare.collect(tmp_path / "*/*")
    table.to_parquet(tmp_path / "runs.parquet")
    assert table.arm.tolist() == ["one 3", "two three"] and table.note.tolist() == ["3", "three"]


def test_another_path_of_the_same_name_is_part_of_how_a_run_was_made(tmp_path):
    start = run(tmp_path, "dense/one", method=None)
    for name in ("a", "b"):
        (tmp_path / name / "one").mkdir(parents=True)
        params = {"model_path": str(start), "teacher": str(tmp_path / name / "one"), "like": "one"}
        run(tmp_path, f"eap/by_{name}", method="eap", params=params, start=start)
    assert arms(tmp_path)[0] == {"eap 0.5 (by_a)": [0], "eap 0.5 (by_b)": [0]}


def test_arms_of_hundreds_of_runs(tmp_path, monkeypatch):
    """50 ratios in two ways with three seeds each, on starts of their own seed, named by any path."""
    monkeypatch.chdir(tmp_path)
    starts = [run(tmp_path, f"dense/s{seed}", method="dense", ratio=1.0, seed=seed) for seed in range(3)]
    for place in range(300):
        ratio, way, seed = 1 + place // 6, place // 3 % 2, place % 3
        weights = str(starts[seed]) if ratio % 2 else f"dense/s{seed}"
        params = {"model_path": weights, "beta": way, "parts": ["head", "neuron"]}
        run(tmp_path, f"ucb/r{place}", ratio=ratio / 100, seed=seed, params=params, start=starts[seed])
    found, left_out = arms(tmp_path)
    named = {f"ucb {(1 + place // 6) / 100:g} (r{place})": [0, 1, 2] for place in range(0, 300, 3)}
    assert found == named | {"dense 1": [0, 1, 2]} and not left_out


def test_runs_from_differently_made_starts_are_different_arms(tmp_path):
    for beta in (0, 1):
        start = run(tmp_path, f"stage1/b{beta}", method=None, params={"beta": beta})
        for seed in (0, 1):
            run(tmp_path, f"stage2/b{beta}s{seed}", seed=seed, start=start)
    found, _ = arms(tmp_path)
    assert found == {"ucb 0.5 (b0s0)": [0, 1], "ucb 0.5 (b1s0)": [0, 1]}


def test_seeds_are_left_out_of_the_names_of_arms_unless_they_alone_tell_them_apart(tmp_path):
    for way in (0, 1):
        for seed in (0, 1):
            run(tmp_path, f"ucb/way{way}-seed{seed}", seed=seed, params={"beta": way})
            run(tmp_path, f"eap/mixed-seed{2 * way + seed}", method="eap", seed=seed, params={"beta": way})
    assert arms(tmp_path)[0] == {
        "ucb 0.5 (way0)": [0, 1],
        "ucb 0.5 (way1)": [0, 1],
        "eap 0.5 (mixed) (mixed-seed0)": [0, 1],
        "eap 0.5 (mixed) (mixed-seed2)": [0, 1],
    }


def test_starts_that_differ_in_seed_alone_are_one_arm(tmp_path):
    for seed in (0, 1):
        start = run(tmp_path, f"stage1/s{seed}", method=None, seed=seed)
        run(tmp_path, f"stage2/s{seed}", seed=seed, start=start)
    assert arms(tmp_path)[0] == {"ucb 0.5": [0, 1]}


def test_what_is_left_out_says_why(tmp_path):
    run(tmp_path, "a/one")
    run(tmp_path, "a/two", seed=1)
    run(tmp_path, "a/half", done=False)
    run(tmp_path, "a/other", dataset="b")
    run(tmp_path, "a/pixels", seed=2, digest="e")
    run(tmp_path, "a/step", method=None)
    found, left_out = arms(tmp_path)
    assert found == {"ucb 0.5": [0, 1]}
    assert left_out == {
        "a/half": "not finished (no DONE)",
        "a/other": "on dataset other than toy",
        "a/pixels": "on other images than most runs on toy",
    }
    assert arms(tmp_path, "b")[0] == {"ucb 0.5": [0]}
    assert arms(tmp_path, "/a/path/to/b")[0] == {"ucb 0.5": [0]}
    with pytest.raises(compare.NoRuns, match=r"is on dataset 'c': found b, toy"):
        arms(tmp_path, "c")


def test_nothing_finished(tmp_path):
    run(tmp_path, "a/half", done=False)
    with pytest.raises(compare.NoRuns, match=r"no finished run in .* \(1 unfinished\)"):
        arms(tmp_path)


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    """dense: 9 of 10, 100 ms; ucb at 0.5: 9 and 7 of 10, 50 ms; random at 0.5: 3 of 10, 50 ms."""
    run(tmp_path, "a/dense", "dense", right=9, ratio=1.0)
    run(tmp_path, "a/ucb0", right=9)
    run(tmp_path, "a/ucb1", right=7, seed=1)
    run(tmp_path, "a/random", "random", right=3)
    table, _ = compare.collect(tmp_path / "*/*")
    speed = pd.DataFrame({"model": ["dense 1", "ucb 0.5", "random 0.5"], "latency_ms": [100.0, 50.0, 50.0],
                          "latency_iqr_ms": 1.0, "throughput_ips": [320.0, 640.0, 640.0], "batch_size": 32,
                          "speedup": [1.0, 2.0, 2.0], "speedup_iqr": 0.1})  # fmt: skip
    return compare.with_speed(table, speed)


def test_summary(table):
    found = compare.summary(table, "top1", "dense").set_index("arm")
    assert found.loc["ucb 0.5", ["seeds", "top1", "speedup"]].tolist() == [2, pytest.approx(0.8), 2.0]
    assert found.loc["ucb 0.5", "±"] == pytest.approx(0.1 * 12.706, rel=1e-3)  # t with one degree of freedom
    assert found.loc["ucb 0.5", "difference"] == pytest.approx(-0.1)
    assert found.loc["ucb 0.5", "p"] == 1.0, "the first seed answers exactly like the baseline"
    assert found.loc["random 0.5", "p"] == pytest.approx(2 * 0.5**6)  # six answers lost, none won
    assert found.pareto.to_dict() == {"dense 1": True, "ucb 0.5": True, "random 0.5": False}
    with pytest.raises(compare.CompareError, match="metric 'top5' is not among"):
        compare.summary(table, "top5", "dense")
    with pytest.raises(compare.CompareError, match="no run of baseline 'tome' here: expected one of dense"):
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


def test_baseline_is_a_method_or_an_arm_and_without_runs_the_first_model(table):
    assert compare.baseline_arm(table, "random") == compare.baseline_arm(table, "random 0.5") == "random 0.5"
    given = pd.DataFrame({"arm": ["b", "a"], "method": "given"})
    assert compare.baseline_arm(given, "dense") == "b"
    with pytest.raises(compare.CompareError, match="no run of baseline 'tome'"):
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
