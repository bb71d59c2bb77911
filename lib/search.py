"""Searches: Optuna proposes parameters of a notebook, papermill runs it, a metric of the validation images decides.

    name: ucb                                # its trials are the runs outputs/<notebook>/ucb-trial000, …
    notebook: ucb_stage2
    metric: val_top1                         # or val_nll_nats, of the epoch whose weights stay
    direction: maximize
    trials: 10
    parameters: {num_train_epochs: 2}        # of every trial
    search:
      learning_rate: {low: 1e-5, high: 1e-3, log: true}
      frozen_keep_ratio: {low: 0.3, high: 1.0, step: 0.1}
      selection: [ucb, random]
    limit: {macs_g: 0.03}                    # the best trial may cost no more: macs_g, params_m

May also have `epoch: last`, for notebooks that keep their last epoch (ucb_stage1, avit) and not their best, and what
KEYS lists. Stopped at any moment, the same command goes on; outputs/search/<name>/ holds the study and its table.
"""

import argparse
import json
import math
import re
import sys
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from filelock import FileLock, Timeout
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib import gpus, params, runs, sweeps

try:
    import optuna
    from optuna import distributions
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    sys.exit("a search needs Optuna: pip install -e .[search]")

KEYS = params.declared("""
name: str = ""
notebook: str = ""
metric: str = ""
direction: str = ""  # one of maximize, minimize
trials: int = 0  # in [1, 1000000]
epoch: str = "best"  # whose weights the notebook keeps (ucb_stage1 and avit: the last), one of best, last
seed: int = 0  # of what is proposed, in [0, 1000000]
threads: int = 1  # of each trial, in [1, 1024]
gpus: int = 0  # of each trial, in [0, 1024]
""")
GROUPS = ("parameters", "search", "limit")
sns.set_theme(style="ticks", palette="colorblind")
COSTS = ("macs_g", "params_m")  # what else a metrics.json has was measured on test images, or is a time
STARTUP = 5  # trials at random, before what was found decides


class SearchError(ValueError):
    """A search that cannot go on as it is: one line saying where and why."""


class Search:
    """A search as its file says, checked: what `space` holds is proposed. SearchError before anything is written."""

    def __init__(self, config: dict[str, Any]):
        if unknown := [key for key in config if key not in (*KEYS, *GROUPS)]:
            raise SearchError(f"this search has {unknown[0]!r}: expected {', '.join([*KEYS, *GROUPS])}")
        groups = {group: config.get(group) or {} for group in GROUPS}
        if wrong := [group for group, value in groups.items() if not isinstance(value, dict)]:
            raise SearchError(f"{wrong[0]} is {groups[wrong[0]]!r}: expected names and their values")
        try:
            values = params.check(KEYS, {key: value for key, value in config.items() if key in KEYS})
        except params.ParameterError as error:
            raise SearchError("; ".join(str(error).splitlines())) from None
        self.settings = values | groups  # what the study's results depend on, and:
        self.trials, self.threads, self.gpus = (self.settings.pop(key) for key in ("trials", "threads", "gpus"))
        self.name, self.notebook, self.metric, self.fixed, self.limit = (
            self.settings[key] for key in ("name", "notebook", "metric", "parameters", "limit")
        )
        if not re.fullmatch(r"[\w=-][\w.=-]*", self.name):
            raise SearchError(f"name is {self.name!r}: expected letters, digits and . _ = - only")
        if not Path(f"notebooks/{self.notebook}.ipynb").is_file():
            known = ", ".join(sorted(each.stem for each in Path("notebooks").glob("*.ipynb")))
            raise SearchError(f"notebook is {self.notebook!r}: expected one of {known}")
        self._check_measures()
        self.space, self.folder = self._space(), Path("outputs/search") / self.name
        self.lock = FileLock(self.folder / "lock")

    def _check_measures(self) -> None:
        """Only the validation images may decide: the test images would no longer say how good the best is."""
        if not self.metric.startswith("val_"):
            raise SearchError(f"metric is {self.metric!r}: expected one on validation images: val_top1, val_nll_nats")
        code = "\n".join(Path(source).read_text() for source in sweeps.sources(self.notebook))
        if not re.search(rf"\b{re.escape(self.metric)}\b", code):
            raise SearchError(f"metric is {self.metric!r}: {self.notebook} has none of this name")
        notebook = Path(f"notebooks/{self.notebook}.ipynb").read_text()
        if 'keep=\\"last\\"' in notebook and self.settings["epoch"] == "best":
            raise SearchError(f"epoch is best: {self.notebook} ends with its last, expected epoch: last")
        for name, most in self.limit.items():
            if name not in COSTS or type(most) not in (int, float):
                raise SearchError(f"limit is {name}: {most!r}: expected a number for {' or '.join(COSTS)}")

    def _space(self) -> dict[str, distributions.BaseDistribution]:
        """What each parameter is drawn from. Both ends of a range, and every choice, must fit the notebook."""
        declared, found = params.declared_in(Path(f"notebooks/{self.notebook}.ipynb")), {}
        if own := {"run_name", "output_dir"} & {*self.fixed, *self.settings["search"]}:
            raise SearchError(f"{own.pop()} is set by the search: leave it out")
        if both := [name for name in self.settings["search"] if name in self.fixed]:
            raise SearchError(f"{both[0]} is in parameters and in search: expected it in one of them")
        if not self.settings["search"]:
            raise SearchError("search is empty: expected parameters, and what each is drawn from")
        try:
            params.check(declared, self.fixed)
        except params.ParameterError as error:
            raise SearchError(f"parameters: {'; '.join(str(error).splitlines())}") from None
        for name, given in self.settings["search"].items():
            if not (isinstance(given, list) and given or isinstance(given, dict) and {"low", "high"} <= {*given}):
                raise SearchError(f"search: {name} is {given!r}: expected low and high, or a list of values")
            try:
                for value in given if isinstance(given, list) else (given["low"], given["high"]):
                    params.check(declared, {**self.fixed, name: value})
                with warnings.catch_warnings(action="error"):  # a step that misses the upper end, a list as a choice
                    found[name] = _distribution(declared[name], given)
            except (ValueError, TypeError, UserWarning) as error:
                raise SearchError(f"search: {name}: {'; '.join(str(error).splitlines())}") from None
        return found

    def run_folder(self, number: int) -> Path:
        return Path("outputs") / self.notebook / f"{self.name}-trial{number:03d}"

    def study(self) -> optuna.Study:
        """This search's study, begun or gone on with. SQLite, since it stays whole whenever its process dies."""
        there = sorted(self.run_folder(0).parent.glob(f"{self.name}-trial*"))
        if there and not (self.folder / "study.db").exists():
            raise SearchError(f"{there[0]} is there without {self.folder}: remove it, or choose another name")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise SearchError(f"{self.folder} is written by another search: wait for it, or end it") from None
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder}/study.db",
            study_name=self.name,
            direction=self.settings["direction"],
            load_if_exists=True,
        )
        before = study.user_attrs.get("settings", self.settings)
        if other := [key for key, value in self.settings.items() if before.get(key) != value]:
            raise SearchError(f"{self.folder} has another {', '.join(other)}: choose another name")
        study.set_user_attr("settings", self.settings)
        return study

    def propose(self, study: optuna.Study, interrupted: FrozenTrial | None) -> Trial:
        """A new trial with its parameters, or an interrupted one with those that it had."""
        number = interrupted.number if interrupted else len(study.trials)
        # From (seed, number), and not from one stream: an interrupted search proposes what it would have proposed.
        drawn = np.random.SeedSequence([self.settings["seed"], number]).generate_state(1)
        study.sampler = optuna.samplers.TPESampler(seed=int(drawn[0]), n_startup_trials=STARTUP)
        trial = Trial(study, interrupted._trial_id) if interrupted else study.ask()
        for name, one in self.space.items():
            if isinstance(one, distributions.CategoricalDistribution):
                trial.suggest_categorical(name, one.choices)
            else:
                suggest = trial.suggest_int if isinstance(one, distributions.IntDistribution) else trial.suggest_float
                suggest(name, one.low, one.high, step=one.step, log=one.log)
        print(f"trial {number}: {_shown(trial.params)}", flush=True)
        return trial

    def run(self, number: int, proposed: dict[str, Any]) -> dict[str, float] | None:
        """The metric and the limited costs of a trial's run, which is made now unless it is there; None: it failed."""
        folder = self.run_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # a search that was killed leaves its runs alive: wait for their end
            done = (folder / "DONE").exists()
        values = {**self.fixed, **{name: _rounded(value) for name, value in proposed.items()}, "run_name": folder.name}
        if not done and sweeps.run(self.notebook, folder, values, self.threads, self.gpus):
            return None
        found = _measured(folder, self.settings["epoch"])
        if missing := [name for name in (self.metric, *self.limit) if name not in found]:
            raise SearchError(f"{folder} has no {missing[0]}: expected one of {', '.join(found) or 'val_…'}")
        return {name: found[name] for name in (self.metric, *self.limit)}

    def go(self, study: optuna.Study, trials: int, jobs: int) -> None:
        """Run trials, `jobs` at a time, until there are `trials` of them; those that were interrupted first."""
        left = [trial for trial in study.trials if not trial.state.is_finished()]
        running: dict[Future, Trial] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                # The first runs alone: what all of them start from, and do not find, it makes.
                together = jobs if any(trial.state.is_finished() for trial in study.trials) else 1
                while len(running) < together and (left or len(study.trials) < trials):
                    trial = self.propose(study, left.pop(0) if left else None)
                    running[pool.submit(self.run, trial.number, trial.params)] = trial
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._tell(study, running.pop(future), future.result())

    def _tell(self, study: optuna.Study, trial: Trial, found: dict[str, float] | None) -> None:
        if found is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        for name, most in self.limit.items():
            trial.set_constraint(name, found[name] - most)
        study.tell(trial, found[self.metric])
        print(f"trial {trial.number}: {_shown(found)}", flush=True)

    def report(self, study: optuna.Study) -> None:
        """Write trials.csv and history.png; print what failed, and the best trial with its command."""
        table = study.trials_dataframe(("number", "state", "value", "params"))
        table.columns = [self.metric if name == "value" else name.removeprefix("params_") for name in table]
        for name, most in self.limit.items():
            table[name] = [trial.constraints.get(name, math.nan) + most for trial in study.trials]
        table["run"] = [str(self.run_folder(number)) for number in table.number]
        runs.write(self.folder / "trials.csv", lambda file: table.to_csv(file, index=False, float_format="%.12g"))
        for number in table.number[table.state == "FAIL"]:
            print(f"failed: trial {number}, see {self.run_folder(number)}/log.txt")
        try:
            best = study.best_trial
        except ValueError:
            within = f" within {_shown(self.limit)}" if self.limit else ""
            raise SearchError(f"{self.name}: none of {len(table)} trials ended{within}, see {self.folder}") from None
        over = np.array([any(value > 0 for value in trial.constraints.values()) for trial in study.trials])
        figure = _history(table, self.metric, self.settings["direction"], over)
        runs.write(self.folder / "history.png", lambda file: figure.savefig(file, dpi=150))
        command = json.loads((self.run_folder(best.number) / "provenance.json").read_text())["command"]
        print(f"{self.name}: {len(table)} trials, see {self.folder}/trials.csv and history.png")
        print(f"best: trial {best.number}, {self.metric} {best.value:.4g} with {_shown(best.params)}\n  {command}")


def _distribution(parameter: params.Parameter, given: dict | list) -> distributions.BaseDistribution:
    if isinstance(given, list):
        return distributions.CategoricalDistribution([parameter.read(value) for value in given])
    kinds = {int: distributions.IntDistribution, float: distributions.FloatDistribution}
    if parameter.type not in kinds or params.CHOICES.search(parameter.help):
        raise ValueError("it has no range, expected a list of values")
    number = replace(parameter, help="")  # a step is not a value: it may lie outside the declared interval
    return kinds[parameter.type](**{key: end if key == "log" else number.read(end) for key, end in given.items()})


def _measured(folder: Path, epoch: str) -> dict[str, float]:
    """What may decide: the val_… of metrics.json, or of the epoch whose weights stayed (`epoch`, unless the run has a
    parameter `keep`); and its costs."""
    epoch = json.loads((folder / "params.json").read_text()).get("keep", epoch)
    found, log, metrics = {}, folder / "metrics.jsonl", json.loads((folder / "metrics.json").read_text())
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if rows and epoch == "best":  # as lib.train ranks them
        found = max(rows, key=lambda row: (row["val_top1"], -row["val_nll_nats"]))
    elif rows:
        found = rows[-1]
    found = found | metrics  # RSST and Refill say there what their cut model does, and log what the uncut one did
    return {name: value for name, value in found.items() if name.startswith("val_") or name in COSTS}


def _history(table: pd.DataFrame, metric: str, direction: str, over: np.ndarray) -> Figure:
    """Every trial's metric, those over the limit crossed, and the best so far."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    within = table[~over].dropna(subset=metric)
    axis.plot(within.number, within[metric], "o", color="C0", label="trial")
    if over.any():
        axis.plot(table.number[over], table[metric][over], "x", color="0.5", label="over the limit")
    best = within[metric].cummax() if direction == "maximize" else within[metric].cummin()
    axis.step(within.number, best, where="post", color="C1", label="best so far")
    axis.set(xlabel="trial", ylabel=f"{metric}, validation images")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    sns.despine(figure)
    return figure


def _rounded(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value  # Optuna's 0.1 + 2 * 0.1 is 0.3


def _shown(values: dict[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def read(file: Path) -> Search:
    """The search that a file describes."""
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SearchError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise SearchError(f"{file} is {config!r}: expected {', '.join([*KEYS, *GROUPS])}")
    return Search(config)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.search", description="Searches a notebook's parameters.")
    parser.add_argument("file", type=Path, help="what to search, such as searches/ucb_digits.yaml")
    parser.add_argument("--trials", type=int, help="as many in all, instead of what the file says")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    given = parser.parse_args()
    if min(given.jobs, 1 if given.trials is None else given.trials) < 1:
        parser.error("expected at least one trial, and at least one at a time")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        search = read(given.file)
        study = search.study()
        search.go(study, given.trials or search.trials, given.jobs)
        search.report(study)
    except (SearchError, sweeps.SweepError, gpus.TooFew) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")


if __name__ == "__main__":
    main()
