"""Many runs, one table: what compare.ipynb shows. Any run whose metrics.json names a `method` takes part."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib import evaluate
from lib.augment import normalise
from lib.pruners.tokens import TokenPruner

# Runs that differ in nothing else are repetitions of one arm: its mean and interval are over them.
REPETITION = ("seed", "ckpt", "stage1_checkpoint_path", "output_dir", "run_name", "resume")


class CompareError(ValueError):
    """Nothing to compare: one line saying what was looked for."""


def collect(pattern: Path, dataset: str = "") -> tuple[pd.DataFrame, dict[str, str]]:
    """Finished runs whose folders match a glob, one row each, and why the others were left out, by run.

    Columns: run (folder), arm, method, keep_ratio, seed, and every single number of metrics.json. Arms are named by
    method and ratio; where those hold differently made runs, by the folder too. dataset "" is the most frequent one.
    """
    rows, left_out = [], {}
    base, relative = Path(pattern.anchor), str(pattern.relative_to(pattern.anchor))
    for params_file in sorted(base.glob(f"{relative}/params.json")):
        run = params_file.parent
        name = f"{run.parent.name}/{run.name}"
        if not (run / "DONE").exists():
            left_out[name] = "not finished (no DONE)"
            continue
        metrics, params = (json.loads((run / f"{file}.json").read_text()) for file in ("metrics", "params"))
        if "method" not in metrics:
            continue  # a comparison, not a run of a method
        made = json.dumps({k: v for k, v in params.items() if k not in REPETITION}, sort_keys=True)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float | str)}
        rows.append({"run": str(run), "made": made, "seed": params.get("seed", 0), **numbers})
    if not rows:
        raise CompareError(f"no finished run in {pattern} ({len(left_out)} unfinished): run a method's notebook first")
    table = pd.DataFrame(rows)
    chosen = dataset or table.dataset.mode()[0]
    for row in table[table.dataset != chosen].itertuples():
        left_out[f"{Path(row.run).parent.name}/{Path(row.run).name}"] = f"dataset {row.dataset}, not {chosen}"
    table = table[table.dataset == chosen].sort_values(["method", "keep_ratio", "seed"], ignore_index=True)
    if table.empty:
        raise CompareError(f"no finished run in {pattern} is on dataset {chosen!r}")
    arms = table.method + " " + table.keep_ratio.map("{:g}".format)
    several = table.assign(arm=arms).groupby("arm").made.transform("nunique") > 1
    table.insert(1, "arm", arms.where(~several, arms + " (" + table.run.map(lambda run: Path(run).name) + ")"))
    return table.drop(columns="made"), left_out


def with_speed(table: pd.DataFrame, speed: pd.DataFrame) -> pd.DataFrame:
    """The table with each arm's latency_ms and speedup as evaluate.latency measured them (its `model` is the arm)."""
    columns = ["latency_ms", "latency_iqr_ms", "speedup", "speedup_iqr"]
    measured = speed.rename(columns={"model": "arm"})[["arm", *columns]]
    return table.drop(columns=columns, errors="ignore").merge(measured, on="arm", how="left")


def summary(table: pd.DataFrame, metric: str, baseline: str) -> pd.DataFrame:
    """One row per arm: mean of the metric over seeds with its 95 % half interval, costs, and a paired test.

    difference and p_value compare the first seed's answers with the baseline's on the same test images (McNemar).
    """
    reference = _correct(_first(table, baseline).run)
    rows = []
    for arm, runs in table.groupby("arm", sort=False):
        first = runs.iloc[0]
        mean, half = evaluate.mean_ci(runs[metric])
        test = evaluate.mcnemar(_correct(first.run), reference)
        shown = {"arm": arm, "seeds": len(runs), metric: mean, "±": half, "difference": test["difference"]}
        shown |= {"p": test["p_value"], "macs_g": first.macs_g, "params_m": first.params_m}
        shown |= {name: first[name] for name in ("latency_ms", "speedup", "foreground_recall") if name in table}
        rows.append({**shown, "n_test": int(first.n)})
    found = pd.DataFrame(rows)
    return found.assign(pareto=evaluate.pareto(found, "macs_g", metric)).sort_values("macs_g", ascending=False)


def _first(table: pd.DataFrame, baseline: str) -> pd.Series:
    runs = table[table.method == baseline]
    if runs.empty:
        raise CompareError(f"no run of baseline {baseline!r} here: expected one of {', '.join(table.method.unique())}")
    return runs.iloc[0]


def _correct(run: str) -> np.ndarray:
    with np.load(Path(run) / "test.npz") as arrays:
        return arrays["logits"].argmax(axis=1) == arrays["labels"]


def baseline_arm(table: pd.DataFrame, baseline: str) -> str:
    """The arm that stands for the baseline method."""
    return str(_first(table, baseline).arm)


def recommend(summary: pd.DataFrame, metric: str, budget_ms: float, baseline: str) -> pd.DataFrame:
    """Which arm to use, for four wishes, with the reason; the baseline itself counts as a choice."""
    base = summary[summary.arm.str.split().str[0] == baseline].iloc[0]
    near = summary[summary[metric] >= base[metric] - 0.01]
    acceptable = summary[summary[metric] >= base[metric] - 0.05]
    within = summary[summary.latency_ms <= budget_ms]
    wishes = {
        "fastest within one point of the baseline": near.nsmallest(1, "latency_ms"),
        f"most accurate under {budget_ms:.1f} ms per batch": within.nlargest(1, metric),
        "most accuracy per ms": summary.assign(rate=summary[metric] / summary.latency_ms).nlargest(1, "rate"),
        "fewest multiply-adds within five points": acceptable.nsmallest(1, "macs_g"),
    }
    rows = []
    for wish, choice in wishes.items():
        if choice.empty:
            fastest = f"the fastest takes {summary.latency_ms.min():.1f} ms"
            rows.append({"wish": wish, "use": "none", "because": fastest})
            continue
        best = choice.iloc[0]
        change = 100 * (best[metric] - base[metric])
        because = f"{metric} {best[metric]:.3f} ({change:+.1f} points) at {best.speedup:.2f}× the baseline's speed"
        rows.append({"wish": wish, "use": best.arm, "because": because})
    return pd.DataFrame(rows)


def patch_grid(models: Mapping[str, nn.Module]) -> tuple[int, int]:
    """The (rows, columns) of patches that the models share."""
    grids = {(getattr(model, "vit", model)).patch_embed.grid_size for model in models.values()}
    if len(grids) != 1:
        raise CompareError(f"models cut images into different grids {sorted(grids)}: compare those of one grid")
    return grids.pop()


def kept(models: Mapping[str, nn.Module], images: np.ndarray, data: Any) -> dict[str, list[torch.Tensor]]:
    """Per token pruner that drops anything, the patches each image (n, H, W, 3) is left with after the last block."""
    x = normalise(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 255, data.mean, data.std)
    pruners = {name: model for name, model in models.items() if isinstance(model, TokenPruner)}
    last = {name: list(model.trace(x).kept[-1]) for name, model in pruners.items()}
    patches = np.prod(patch_grid(models))
    return {name: sets for name, sets in last.items() if any(len(ids) < patches for ids in sets)}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain JSON values, None where there is no number."""
    return json.loads(table.to_json(orient="records"))
