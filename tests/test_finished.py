"""Which runs are one arm, and which are left out and why: on run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from lib import finished


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
    table, left_out = finished.runs(folder / "*/*", dataset)
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
    monkeypatch.setattr(finished, "root", lambda: tmp_path)
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


def test_weights_that_no_run_made_are_told_apart_by_their_name(tmp_path):
    for ckpt in ("scratch", "pretrained"):
        stage1 = run(tmp_path, f"ucb_stage1/{ckpt}", method=None, params={"ckpt": ckpt})
        more = {"params": {"stage1_checkpoint_path": str(stage1)}, "start": stage1}
        run(tmp_path, f"ucb_stage2/{ckpt}", **more)
    found, left_out = arms(tmp_path)
    assert found == {"ucb 0.5 (pretrained)": [0], "ucb 0.5 (scratch)": [0]} and not left_out


def test_what_a_run_started_from_and_made_itself_says_nothing_of_how_it_was_made(tmp_path):
    """A CLIP that clip_zeroshot.ipynb trains lies in its own folder."""
    for seed in (0, 1):
        folder = tmp_path / f"clip_zeroshot/s{seed}"
        run(tmp_path, f"clip_zeroshot/s{seed}", "anchors", seed=seed, start=folder / "clip", ratio=0.5)
    assert arms(tmp_path)[0] == {"anchors 0.5": [0, 1]}


def test_looking_at_less_makes_no_other_arm(tmp_path):
    run(tmp_path, "acdc/one", "acdc", seed=0)
    run(tmp_path, "acdc/two", "acdc", seed=1, params={"effect_images": 0, "thresholds": []})
    assert arms(tmp_path)[0] == {"acdc 0.5": [0, 1]}


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
    table, _ = finished.runs(tmp_path / "*/*")
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
        "eap 0.5 (mixed-seed0)": [0, 1],
        "eap 0.5 (mixed-seed2)": [0, 1],
    }


def test_runs_of_one_name_in_two_places_are_two_arms(tmp_path):
    for tree, epochs in (("short", 1), ("long", 4)):
        for seed in (0, 1):
            values = {"method": "dense-tuned", "seed": seed, "params": {"epochs": epochs}}
            run(tmp_path / tree, f"dense/digits-tuned-seed{seed}", **values)
    named = {f"dense-tuned 0.5 ({tmp_path}/{tree}/dense/digits-tuned-seed0)": [0, 1] for tree in ("short", "long")}
    assert {arm: rows.seed.tolist() for arm, rows in finished.runs(tmp_path / "*/*/*")[0].groupby("arm")} == named


def test_places_count_from_the_project_of_the_run(tmp_path, monkeypatch):
    """A run says what it started from as it reads in its own project, which may be another clone."""
    for clone, epochs in (("here", 1), ("there", 4)):
        (tmp_path / clone / "lib").mkdir(parents=True)
        (tmp_path / clone / "lib" / "runs.py").touch()
        run(tmp_path / clone / "outputs", "dense/one", method="dense", params={"epochs": epochs})
        run(tmp_path / clone / "outputs", "eap/one", method="eap", start="outputs/dense/one")
    monkeypatch.setattr(finished, "root", lambda: tmp_path / "here")
    monkeypatch.setattr("lib.runs.root", lambda: tmp_path / "here")
    (tmp_path / "here" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "notebooks")
    named = ["eap 0.5 (outputs/eap/one)", f"eap 0.5 ({tmp_path}/there/outputs/eap/one)"]
    assert sorted(arm for arm in finished.runs(tmp_path / "*/outputs/eap/*")[0].arm) == sorted(named)
    table = finished.side_by_side(["outputs/dense/one", tmp_path / "here" / "outputs" / "eap" / "one"], "d")
    assert table.method.tolist() == ["dense", "eap"] and all(Path(folder).is_dir() for folder in table.run)


def test_where_no_run_is_left_each_has_its_reason(tmp_path):
    for name, dataset in (("dense/a", "toy"), ("dense/b", "toy"), ("dense/c", "other")):
        made = run(tmp_path, name, dataset=dataset)
    metrics = json.loads((made / "metrics.json").read_text())
    (made / "metrics.json").write_text(json.dumps(metrics | {"top5": 1.0}))
    reasons = "dense/c: on dataset other than toy; dense/a: says nothing of top5"
    with pytest.raises(finished.NoRuns, match=rf"no run in .* is left to compare \({reasons}"):
        finished.runs(tmp_path / "*/*", metric="top5")


def test_starts_that_differ_in_seed_alone_are_one_arm(tmp_path):
    for seed in (0, 1):
        start = run(tmp_path, f"stage1/s{seed}", method=None, seed=seed)
        run(tmp_path, f"stage2/s{seed}", seed=seed, start=start)
    assert arms(tmp_path)[0] == {"ucb 0.5": [0, 1]}


def test_a_run_that_is_named_twice_stands_there_once(tmp_path, monkeypatch):
    one, other = run(tmp_path, "avit/one"), run(tmp_path, "avit/other")
    monkeypatch.chdir(tmp_path)
    found = finished.side_by_side([one, "avit/one", other, one], "d")
    assert found.run.tolist() == [str(one), str(other)]


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
    with pytest.raises(finished.NoRuns, match=r"is on dataset 'c': found b, toy"):
        arms(tmp_path, "c")


def test_nothing_finished(tmp_path):
    run(tmp_path, "a/half", done=False)
    with pytest.raises(finished.NoRuns, match=r"no finished run in .* \(1 unfinished\)"):
        arms(tmp_path)
