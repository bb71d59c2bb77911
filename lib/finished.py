"""Finished runs, read into one table. Any run whose metrics.json names a `method` takes part."""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import params as parameters
from lib.runs import NOT_IDENTITY, portable, resolve, root, without_seed

# Runs that differ in the seed alone are repetitions of one arm. A path says nothing of what lies there: the runs that a
# run started from are compared by how they were made.
LOOKS = (  # at other things beside the model, which is the same without
    *("effect_images", "thresholds", "ratios", "ceilings", "shares", "cache_mb"),
    *("extract_attention", "attention_output", "img_idxs"),
)
NOT_MAKING = ("seed", "ckpt", "stage1_checkpoint_path", *LOOKS, *NOT_IDENTITY)
EPOCHS = ("epochs", "num_train_epochs", "finetune_epochs")
NEEDED = ("dataset", "n", "macs_g", "params_m")  # what metrics.json must say besides `method` and the metric
GIVEN = "given"  # the method of models that were given by path: what made them is not known


class CompareError(ValueError):
    """Nothing to compare, or what cannot be: one line saying what was found and what was expected."""


class NoRuns(CompareError):
    """No finished run where one was looked for."""


def runs(pattern: Path, dataset: str = "", metric: str = "top1") -> tuple[pd.DataFrame, dict[str, str]]:
    """Finished runs whose folders match a glob, one row each, and why the others were left out, by run.

    Columns: run (folder), arm, method, keep_ratio, seed, trained (with the method or after it), and every single number
    of metrics.json. An arm is one method made in one way, with one row per seed, its own or that of what it started
    from. It is named by method and keep_ratio, or `setting` for methods without a ratio; where those are made in
    several ways, by the run too. dataset (a name, or a path that ends in it) "" is the most frequent one; runs on other
    images under its name are left out, and those that do not say what is NEEDED or have no `metric`. NoRuns where none
    is left.
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
        about |= {"seed": params.get("seed", 0), "trained": _trained(run, params, metrics["method"])}
        rows.append({**about, "keep_ratio": np.nan, "setting": None, **numbers})
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
        if table.empty:
            names = "; ".join(f"{run}: {why}" for run, why in left_out.items())
            raise NoRuns(f"no run in {pattern} is left to compare ({names})")
    table = table.sort_values(["method", "keep_ratio", "seed"], ignore_index=True)
    cost = table.setting.map(str, na_action="ignore").fillna(table.keep_ratio.map("{:g}".format))
    table.insert(1, "arm", table.method + " " + cost)
    # where one method and ratio was made in several ways, each way is named after its first run, as shortly as may be
    plain, first = table.arm, table.groupby(["arm", "made"]).run.transform("first")
    for name in (without_seed, lambda run: Path(run).name, portable):
        several = table.groupby("arm").made.transform("nunique") > 1
        table["arm"] = table.arm.where(~several, plain + " (" + first.map(name) + ")")
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
    """The scores of runs on the images of this digest, one row each, whatever names it twice; what is left out is
    printed with the reason."""
    rows = []
    for folder in dict.fromkeys(Path(resolve(str(folder))).resolve() for folder in folders):
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


def predictions(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,) of the test images."""
    with np.load(Path(run) / "test.npz") as arrays:
        return arrays["logits"], arrays["labels"]


def _making(run: Path, params: dict, facts: dict, known: dict[Path, tuple[str, tuple]]) -> tuple[str, tuple]:
    """How a run was made, seeds and places aside, and with which seeds: its own, then those of what it started from.

    Made: its parameters, with those that lead to a run as how that was made. Those at their defaults are left out: a
    run from before a notebook had a parameter was made as one with its default. params, facts: params.json and
    provenance.json; known: of the runs that others started from, filled here.
    """
    start = _began(run, facts.get("start") or "")
    usual = _defaults(root() / "notebooks" / f"{run.parent.name}.ipynb")
    made, seeds, above = {}, [params.get("seed", 0)], _leads(start)
    for name, value in [*params.items(), ("", start)]:
        bare = name == "ckpt" and not start  # weights that no run made are known by this alone
        if (name in NOT_MAKING and not bare) or (name in usual and usual[name] == value):
            continue
        place = _leads(value)
        if name and place and place == above:
            continue
        near = (place, place.parent) if place else ()
        folder = next((each for each in near if (each / "params.json").is_file()), None)
        if folder and not name and folder.resolve() == run.resolve():
            continue  # it started from what it made itself
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


def _trained(run: Path, params: dict, method: str) -> bool:
    """Whether a run trained what it measured. A CLIP is trained before anchors leave anything out."""
    settings = _defaults(root() / "notebooks" / f"{run.parent.name}.ipynb") | params
    epochs = any(isinstance(settings.get(name), int | float) and settings[name] > 0 for name in EPOCHS)
    return method.endswith("-tuned") or (epochs and run.parent.name != "clip_zeroshot")


def _began(run: Path, start: str) -> str:
    """What a run started from, by its path as it reads from here: its own project may be another clone."""
    own = next((folder for folder in run.parents if (folder / "lib" / "runs.py").is_file()), root())
    return portable(str(own / start)) if start and (own / start).exists() else portable(start)


def _leads(value: Any) -> Path | None:
    """The file or folder that a parameter leads to, if any."""
    found = resolve(value) if isinstance(value, str) else ""
    return Path(found) if os.path.isabs(found) else None


@cache
def _defaults(notebook: Path) -> dict[str, Any]:
    found = parameters.declared_in(notebook) if notebook.is_file() else {}
    return {name: portable(each.default) for name, each in found.items()}
