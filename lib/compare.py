"""Arms of one table, judged: what compare.ipynb shows. The runs come from lib/finished.py."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib import evaluate
from lib.finished import GIVEN, CompareError, predictions, read

# What evaluate.classification says of predictions, besides the accuracy of each class.
SCORES = (
    *("top1", "top5", "precision_macro", "recall_macro", "f1_macro"),
    *("confidence", "confidence_correct", "confidence_incorrect", "confidence_gap"),
    *("entropy_nats", "nll_nats", "brier", "ece"),
)
TIMED = 16  # images that smaller batches are made of
COSTS = {"latency": "latency_ms", "macs": "macs_g", "params": "params_m"}


def with_speed(table: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """The table with each arm's time and speedup as evaluate.latency measured them (its `model` is the arm), and
    of_ceiling, the share it reaches of the speed of `ceiling of <arm>`, where that was timed too."""
    columns = ["latency_ms", "latency_iqr_ms", "throughput_ips", "batch_size", "speedup", "speedup_iqr", "of_ceiling"]
    limits = speed.set_index("model").speedup.rename(lambda name: name.removeprefix("ceiling of "))
    limits = limits[speed.model.str.startswith("ceiling of ").to_numpy()]
    measured = speed.assign(of_ceiling=speed.speedup / speed.model.map(limits)).rename(columns={"model": "arm"})
    return table.drop(columns=columns, errors="ignore").merge(measured[["arm", *columns]], on="arm", how="left")


def elsewhere(
    models: dict[str, nn.Module], images: Any, settings: Sequence[tuple[int, str]], baseline: str, repeats: int
) -> pd.DataFrame:
    """One row per arm: its speed-up over the baseline arm in each of `settings`, (images per batch, precision), over
    batches of test images of what lib.data.load returns: TIMED in all, since the work may depend on the image."""
    found = {}
    for size, precision in settings:
        batches = evaluate.batch(images, size * max(1, TIMED // size)).split(size)
        batches = [batch for batch in batches if len(batch) == len(batches[0])]  # of few images the last may be less
        how = {"precision": precision, "repeats": max(3, repeats // len(batches)), "device": evaluate.device()}
        times = [evaluate.latency(models, batch, **how).set_index("model").latency_ms for batch in batches]
        found[f"batch {len(batches[0])}, {precision}"] = sum(times)[baseline] / sum(times)
    return pd.DataFrame(found, index=[*models]).rename_axis("arm").reset_index()


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
        row |= {"p": evaluate.mcnemar(_correct(first.run), reference)["p_value"]}
        shown = (
            "macs_g",
            "f1_macro",
            "params_m",
            "latency_ms",
            "speedup",
            "of_ceiling",
            "mean_depth",
            "foreground_recall",
        )
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
        known = ", ".join([*table.method.unique(), *table.arm.unique()])
        raise CompareError(f"no run of baseline {baseline!r} here: expected one of {known}")
    return str(runs.arm.iloc[0])


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
