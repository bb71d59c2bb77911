"""Which runs are one arm, which are left out, and what the table says of them: on run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import compare


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
    assert left_out == {"stage2/twin": "made like another run, with the same seed"}


def test_methods_without_a_ratio_are_named_by_their_setting(tmp_path):
    for weight in (0.01, 0.1):
        for seed in (0, 1):
            values = {"method": "avit", "setting": f"ponder {weight:g}", "params": {"ponder_weight": weight}}
            run(tmp_path, f"avit/{weight}{seed}", seed=seed, **values)
    run(tmp_path, "dense/one", method="dense", ratio=1.0)
    found, left_out = arms(tmp_path)
    assert found == {"avit ponder 0.01": [0, 1], "avit ponder 0.1": [0, 1], "dense 1": [0]} and not left_out


def test_a_parameter_that_names_the_start_says_nothing_of_how_a_run_was_made(tmp_path):
    for seed in (0, 1):
        start = run(tmp_path, f"dense/s{seed}", method="dense", seed=seed, ratio=1.0)
        values = {"method": "dense-tuned", "params": {"weights": str(start)}, "start": start}
        run(tmp_path, f"dense/tuned{seed}", seed=seed, ratio=1.0, **values)
    assert arms(tmp_path)[0] == {"dense 1": [0, 1], "dense-tuned 1": [0, 1]}


def test_runs_from_differently_made_starts_are_different_arms(tmp_path):
    for beta in (0, 1):
        start = run(tmp_path, f"stage1/b{beta}", method=None, params={"beta": beta})
        for seed in (0, 1):
            run(tmp_path, f"stage2/b{beta}s{seed}", seed=seed, start=start)
    found, _ = arms(tmp_path)
    assert found == {"ucb 0.5 (b0s0)": [0, 1], "ucb 0.5 (b1s0)": [0, 1]}


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
    with pytest.raises(compare.CompareError, match=r"is on dataset 'c': found b, toy"):
        arms(tmp_path, "c")


def test_nothing_finished(tmp_path):
    run(tmp_path, "a/half", done=False)
    with pytest.raises(compare.CompareError, match=r"no finished run in .* \(1 unfinished\)"):
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
                          "latency_iqr_ms": 1.0, "speedup": [1.0, 2.0, 2.0], "speedup_iqr": 0.1})  # fmt: skip
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


def test_recommend(table):
    summary = compare.summary(table, "top1", "dense")
    advice = compare.recommend(summary, "top1", 60.0, "dense 1").set_index("wish").use.to_dict()
    assert advice == {
        "fastest within one point of the baseline": "dense 1",
        "most accurate under 60.0 ms per batch": "ucb 0.5",
        "most accuracy per ms": "ucb 0.5",
        "fewest multiply-adds within five points": "dense 1",
    }
    assert compare.recommend(summary, "top1", 10.0, "dense 1").use[1] == "none"
