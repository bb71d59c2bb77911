"""Many runs, one table: what compare.ipynb shows. Any run whose metrics.json names a `method` takes part."""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib import evaluate
from lib import params as parameters
from lib.runs import NOT_IDENTITY, portable, resolve, root

# Runs that differ in the seed alone are repetitions of one arm. A path says nothing of what lies there: the runs that a
# run started from are compared by how they were made.
NOT_MAKING = ("seed", "ckpt", "stage1_checkpoint_path", *NOT_IDENTITY)
# What evaluate.classification says of predictions, besides the accuracy of each class.
SCORES = (
    *("top1", "top5", "precision_macro", "recall_macro", "f1_macro"),
    *("confidence", "confidence_correct", "confidence_incorrect", "confidence_gap"),
    *("entropy_nats", "nll_nats", "brier", "ece"),
)
NEEDED = ("dataset", "n", "macs_g", "params_m")  # what metrics.json must say besides `method` and the metric
GIVEN = "given"  # the method of models that were given by path: what made them is not known
COSTS = {"latency": "latency_ms", "macs": "macs_g", "params": "params_m"}


class CompareError(ValueError):
    """Nothing to compare, or what cannot be: one line saying what was found and what was expected."""


class NoRuns(CompareError):
    """No finished run where one was looked for."""


def collect(pattern: Path, dataset: str = "", metric: str = "top1") -> tuple[pd.DataFrame, dict[str, str]]:
    """Finished runs whose folders match a glob, one row each, and why the others were left out, by run.

    Columns: run (folder), arm, method, keep_ratio, seed, and every single number of metrics.json. An arm is one method
    made in one way, with one row per seed, its own or that of what it started from. It is named by method and
    keep_ratio, or `setting` for methods without a ratio; where those are made in several ways, by the folder too.
    dataset (a name, or a path that ends in it) "" is the most frequent one; runs on other images under its name are
    left out, and those that do not say what is NEEDED or have no `metric`. NoRuns where none is left.
    """
    rows, left_out, known = [], {}, {}
    base, relative = Path(pattern.anchor), str(pattern.relative_to(pattern.anchor))
    for params_file in sorted(base.glob(f"{relative}/params.json")):
        run = params_file.parent
        if not (run / "DONE").exists():
            left_out[name_of(run)] = "not finished (no DONE)"
            continue
        metrics, params, facts = (read(run, name) for name in ("metrics", "params", "provenance"))
        if "method" not in metrics:
            continue  # a comparison, or a step on the way to a method
        said = metrics | {"dataset_digest (provenance.json)": facts.get("dataset_digest")}
        if lacking := [name for name in (*NEEDED, "dataset_digest (provenance.json)") if said.get(name) is None]:
            left_out[name_of(run)] = f"says nothing of {', '.join(lacking)}"
            continue
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
        made, seeds = _making(run, params, facts, known)
        about = {"run": str(run), "made": made, "seeds": seeds, "digest": facts["dataset_digest"]}
        rows.append({**about, "seed": params.get("seed", 0), "keep_ratio": np.nan, "setting": None, **numbers})
    if not rows:
        raise NoRuns(f"no finished run in {pattern} ({len(left_out)} unfinished): run a method's notebook first")
    table = pd.DataFrame(rows)
    chosen = Path(dataset).name or table.dataset.mode()[0]
    if chosen not in {*table.dataset}:
        names = ", ".join(sorted({*table.dataset}))
        raise NoRuns(f"no finished run in {pattern} is on dataset {chosen!r}: found {names}")
    digest = table.digest[table.dataset == chosen].mode()[0]
    twin = ["method", "keep_ratio", "made", "seeds"]
    for reason, rejected in (
        (f"on dataset other than {chosen}", lambda rows: rows.dataset != chosen),
        (f"on other images than most runs on {chosen}", lambda rows: rows.digest != digest),
        (f"says nothing of {metric}", lambda rows: rows.get(metric, rows.dataset).isna()),
        ("made like another run, with the same seeds", lambda rows: rows.duplicated(twin)),
    ):
        out = rejected(table)
        left_out |= {name_of(Path(run)): reason for run in table.run[out]}
        table = table[~out]
    table = table.sort_values(["method", "keep_ratio", "seed"], ignore_index=True)
    cost = table.setting.map(str, na_action="ignore").fillna(table.keep_ratio.map("{:g}".format))
    table.insert(1, "arm", table.method + " " + cost)
    # where one method and ratio was made in several ways, each way is named after its first run, or all its seeds
    first = table.groupby(["arm", "made"]).run.transform("first").map(lambda run: Path(run).name)
    for tell_apart in (first.str.replace(r"-seed\d+$", "", regex=True), first):
        several = table.groupby("arm").made.transform("nunique") > 1
        table["arm"] = table.arm.where(~several, table.arm + " (" + tell_apart + ")")
    for name in table:  # one run's number, another's text: as text, or no file can hold them
        if table[name].dropna().map(lambda value: isinstance(value, str)).nunique() > 1:
            table[name] = table[name].map(str, na_action="ignore")
    return table.drop(columns=["made", "seeds", "digest", "setting"]), left_out


def read(run: str | Path, name: str) -> dict[str, Any]:
    """<name>.json of a run's folder."""
    file = Path(run) / f"{name}.json"
    if not file.is_file():
        raise CompareError(f"{run} is not the folder of a finished run: expected {name}.json in it")
    return json.loads(file.read_text())


def side_by_side(folders: Sequence[str | Path], digest: str) -> pd.DataFrame:
    """The scores of runs on the images of this digest, one row each; what is left out is printed with the reason."""
    rows = []
    for folder in folders:
        try:
            facts, metrics = read(folder, "provenance"), read(folder, "metrics")
        except CompareError as error:
            print(f"left out: {error}")
            continue
        if facts.get("dataset_digest") != digest:
            print(f"left out: {folder} is on other images")
            continue
        rows.append({"run": str(folder), **metrics})
    names = ["run", "method", "setting", "top1", "f1_macro", "macs_g", "mean_depth"]
    return pd.DataFrame(rows).reindex(columns=names)


def name_of(run: Path) -> str:
    """A run's name in texts: notebook/run."""
    return f"{run.parent.name}/{run.name}"


def _making(run: Path, params: dict, facts: dict, known: dict[Path, tuple[str, tuple]]) -> tuple[str, tuple]:
    """How a run was made, seeds and places aside, and with which seeds: its own, then those of what it started from.

    Made: its parameters, with those that lead to a run as how that was made. Those at their defaults are left out: a
    run from before a notebook had a parameter was made as one with its default. params, facts: params.json and
    provenance.json; known: of the runs that others started from, filled here.
    """
    start = facts.get("start") or ""
    usual = _defaults(root() / "notebooks" / f"{run.parent.name}.ipynb")
    made, seeds, above = {}, [params.get("seed", 0)], _leads(start)
    for name, value in [*params.items(), ("", start)]:
        if name in NOT_MAKING or (name in usual and usual[name] == value):
            continue
        place = _leads(value)
        if name and place and place == above:
            continue
        near = (place, place.parent) if place else ()
        folder = next((each for each in near if (each / "params.json").is_file()), None)
        if folder in (None, run):
            made[name] = value
        else:
            if folder not in known:
                found = read(folder, "provenance") if (folder / "provenance.json").is_file() else {}
                known[folder] = _making(folder, read(folder, "params"), found, known)
            way, others = known[folder]
            made[name] = [way, str(place.relative_to(folder))]
            seeds += others
    return json.dumps([run.parent.name, made], sort_keys=True), tuple(seeds)


def _leads(value: Any) -> Path | None:
    """The file or folder that a parameter leads to, if any."""
    found = resolve(value) if isinstance(value, str) else ""
    return Path(found) if os.path.isabs(found) else None


@cache
def _defaults(notebook: Path) -> dict[str, Any]:
    found = parameters.declared_in(notebook) if notebook.is_file() else {}
    return {name: portable(each.default) for name, each in found.items()}


def with_speed(table: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """The table with each arm's time and speedup as evaluate.latency measured them (its `model` is the arm), and
    of_ceiling, the share it reaches of the speed of `ceiling of <arm>`, where that was timed too."""
    columns = ["latency_ms", "latency_iqr_ms", "throughput_ips", "batch_size", "speedup", "speedup_iqr", "of_ceiling"]
    limits = speed.set_index("model").speedup.rename(lambda name: name.removeprefix("ceiling of "))
    limits = limits[speed.model.str.startswith("ceiling of ").to_numpy()]
    measured = speed.assign(of_ceiling=speed.speedup / speed.model.map(limits)).rename(columns={"model": "arm"})
    return table.drop(columns=columns, errors="ignore").merge(measured[["arm", *columns]], on="arm", how="left")


def summary(table: pd.DataFrame, metric: str, baseline: str) -> pd.DataFrame:
    """One row per arm: mean of the metric over seeds with its 95 % half interval, costs, and a paired test.

    difference: to the baseline arm's mean. p: McNemar's test that the first seed's answers are right as often as the
    baseline's first seed's, on the same test images. pareto: on the front of MACs and the mean metric.
    """
    if metric not in table:
        raise CompareError(f"metric {metric!r} is not among the runs' numbers")
    against = baseline_arm(table, baseline)
    reference = _correct(table.run[table.arm == against].iloc[0])
    rows = []
    for arm, runs in table.groupby("arm", sort=False):
        first = runs.iloc[0]
        mean, half = evaluate.mean_ci(runs[metric])
        row = {"arm": arm, "method": first.method, "keep_ratio": first.keep_ratio, "seeds": len(runs), metric: mean}
        row |= {"±": half, "difference": mean - table[metric][table.arm == against].mean()}
        row |= {"p": evaluate.mcnemar(_correct(first.run), reference)["p_value"], "macs_g": first.macs_g}
        shown = ("f1_macro", "params_m", "latency_ms", "speedup", "of_ceiling", "mean_depth", "foreground_recall")
        row |= {name: float(runs[name].mean()) for name in shown if name in table}
        rows.append({**row, "n_test": int(first.n)})
    found = pd.DataFrame(rows)
    found["pareto"] = evaluate.pareto(found, "macs_g", metric)
    return found.sort_values(["macs_g", metric], ascending=False, ignore_index=True)


def evaluation(table: pd.DataFrame, metric: str, classes: Sequence[str]) -> pd.DataFrame:
    """Everything measured, one row per arm: SCORES, per_class_accuracy (a dict) and costs, as means over seeds.

    accuracy_per_ms, and whether an arm is Pareto-optimal against each of COSTS (pareto_latency, …), go by the metric.
    Scores that a run's metrics.json does not hold are computed from its predictions.
    """
    rows = []
    costs = (*COSTS.values(), "throughput_ips", "batch_size", "speedup")
    for arm, runs in table.groupby("arm", sort=False):
        found = pd.DataFrame([_scores(run, classes) for run in runs.run])
        means = found[[name for name in SCORES if name in found]].astype(float).mean()
        each = pd.DataFrame([*found.per_class_accuracy]).astype(float).mean()
        about = {"arm": arm, "method": runs.method.iloc[0], "keep_ratio": runs.keep_ratio.iloc[0], "seeds": len(runs)}
        rows.append({**about, **means, **runs[[*costs]].mean(), "per_class_accuracy": each.to_dict()})
    measured = pd.DataFrame(rows).astype({"batch_size": int})
    measured["accuracy_per_ms"] = measured[metric] / measured.latency_ms
    for name, cost in COSTS.items():
        measured[f"pareto_{name}"] = evaluate.pareto(measured, cost, metric)
    return measured


def _scores(run: str, classes: Sequence[str]) -> dict[str, Any]:
    found = read(run, "metrics")
    wanted = {*SCORES, "per_class_accuracy"} - ({"top5"} if len(classes) < 5 else set())
    if wanted <= found.keys():
        return found
    logits, labels = (torch.from_numpy(array) for array in predictions(run))
    return evaluate.classification(logits, labels, classes=classes) | found


def baseline_arm(table: pd.DataFrame, baseline: str) -> str:
    """The arm that the others are compared with: the first of this name or method; without runs, the first model."""
    runs = table[(table.arm == baseline) | (table.method == baseline)]
    if runs.empty and (table.method == GIVEN).all():
        runs = table
    if runs.empty:
        raise CompareError(f"no run of baseline {baseline!r} here: expected one of {', '.join(table.method.unique())}")
    return str(runs.arm.iloc[0])


def predictions(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,) of the test images."""
    with np.load(Path(run) / "test.npz") as arrays:
        return arrays["logits"], arrays["labels"]


def _correct(run: str) -> np.ndarray:
    logits, labels = predictions(run)
    return logits.argmax(axis=1) == labels


def recommend(summary: pd.DataFrame, metric: str, budget_ms: float, baseline: str) -> pd.DataFrame:
    """Which arm to use, for five wishes, with the reason; `baseline` is an arm, and counts as a choice."""
    base = summary[summary.arm == baseline].iloc[0]
    rates = summary.assign(rate=summary[metric] * summary.speedup)  # speed within rounds: steadier than times
    # a point is 0.01; the epsilon keeps what is exactly one point worse
    point, five = (summary[summary[metric] >= base[metric] - loss - 1e-9] for loss in (0.01, 0.05))
    wishes = {
        "fastest within one point of the baseline": (point, "speedup", False),
        f"most accurate under {budget_ms:.1f} ms per batch": (summary[summary.latency_ms <= budget_ms], metric, False),
        "most accuracy per ms": (rates, "rate", False),
        "fewest multiply-adds within five points": (five, "macs_g", True),
        "fewest parameters within five points": (five, "params_m", True),
    }
    rows = []
    for wish, (choices, by, rising) in wishes.items():
        if choices.empty:
            fastest = f"the fastest takes {summary.latency_ms.min():.1f} ms"
            rows.append({"wish": wish, "use": "none", "because": fastest})
            continue
        # token methods share their parameters: among equals the more accurate, then the faster
        best = choices.sort_values([by, metric, "speedup"], ascending=[rising, False, False]).iloc[0]
        change = f"{metric} {best[metric]:.3f} ({100 * (best[metric] - base[metric]):+.1f} points)"
        costs = f"{best.speedup:.2f}× the baseline's speed ({best.latency_ms:.1f} ms), {best.macs_g:.3f} GMACs, "
        costs += f"{best.params_m:.2f} M parameters"
        rows.append({"wish": wish, "use": best.arm, "because": f"{change} at {costs}"})
    return pd.DataFrame(rows)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain JSON values, None where there is no number."""
    return json.loads(table.to_json(orient="records"))
