"""Searches, for real: Optuna proposes, papermill runs a tiny notebook, in a project folder of its own."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import write_notebook

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
from lib import params, search, sweeps  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DECLARED = """x: float = 0.0  # in [-10, 10]
rate: float = 0.1  # in (0, 10)
count: int = 1  # in [1, 64]
kind: str = "a"  # one of a, b, broken
level: int = 0  # one of 0, 2, 4
wait_for: str = ""
seed: int = 0
resume: bool = True
output_dir: str = "outputs"
run_name: str = ""
"""
# The best row is the first, and it is the first by accuracy though the second is likelier.
CODE = """import json, time
from pathlib import Path
from lib import runs
run = runs.start("tiny", globals())
with open(run.dir / "begun", "a") as file: file.write("x")
while wait_for and not Path(wait_for).exists(): time.sleep(0.05)
if kind == "broken": raise RuntimeError("kind is broken")
run.log([{"epoch": 1, "val_top1": 1 - (x - 3) ** 2 / 100, "val_nll_nats": 2.0},
         {"epoch": 2, "val_top1": -5.0, "val_nll_nats": 1.0}])
run.finish({"method": "tiny", "dataset": "none", "top1": 0.5, "macs_g": abs(x), "val_x": x})
"""
CONFIG = {"name": "s", "notebook": "tiny", "metric": "val_top1", "direction": "maximize", "trials": 4}
CONFIG |= {"search": {"x": {"low": -10, "high": 10}}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with one notebook, `tiny`."""
    (tmp_path / "lib").symlink_to(ROOT / "lib")
    write_notebook(tmp_path / "notebooks" / "tiny.ipynb", DECLARED, CODE)
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return tmp_path


@pytest.fixture
def at_once(monkeypatch):
    """Runs in this process and at once; papermill's own are tested below."""

    def run(notebook, folder, values, threads, gpus):
        read = params.check(params.declared_in(Path("notebooks/tiny.ipynb")), values)
        ran.append(values)
        if read["kind"] == "broken":
            return 1
        metrics = {"top1": 0.5, "macs_g": abs(read["x"]), "val_x": read["x"], "params_m": read["count"]}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "params.json").write_text(json.dumps(values))
        rows = [{"val_top1": 1 - (read["x"] - 3) ** 2 / 100, "val_nll_nats": 2.0}, {"val_top1": -5, "val_nll_nats": 1}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "provenance.json").write_text(json.dumps({"command": f"papermill {folder.name}"}))
        (folder / "DONE").touch()
        return 0

    ran = []
    monkeypatch.setattr(search.sweeps, "run", run)
    return ran


def go(trials=None, jobs=1, report=False, **config):
    """The study after a search of CONFIG with `config` on top."""
    one = search.Search({**CONFIG, **config})
    try:
        study = one.study()
        one.go(study, trials or one.trials, jobs)
        if report:
            one.report(study)
    finally:
        one.lock.release()
    return study


def command(*options, **config):
    Path("s.yaml").write_text(yaml.safe_dump({**CONFIG, **config}))
    return [sys.executable, "-m", "lib.search", "s.yaml", *options]


def call(*options, **config):
    return subprocess.run(command(*options, **config), capture_output=True, text=True)


@contextlib.contextmanager
def started(*options, **config):
    """A search that runs meanwhile, and at the end neither it nor what waits for the file `go`."""
    with subprocess.Popen(
        command(*options, **config), start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            Path("go").touch()


def begun(number: int) -> int:
    """How often the notebook of a trial has begun."""
    file = Path(f"outputs/tiny/s-trial{number:03d}/begun")
    return len(file.read_text()) if file.exists() else 0


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- what is proposed --------------------------------------------------------------------------------------------


def test_proposals_have_the_types_and_bounds_of_the_file(project, at_once):
    space = {
        "x": {"low": 0.1, "high": 0.9, "step": 0.1},
        "rate": {"low": "1e-5", "high": 1, "log": True},  # as YAML reads 1e-5
        "count": {"low": 2, "high": 32, "step": 10},
        "kind": ["a", "b"],
        "level": [0, 4],
    }
    go(trials=40, search=space, parameters={"seed": 7})
    assert len(at_once) == 40 and all(set(values) == {*space, "seed", "run_name"} for values in at_once)
    seen = {name: [values[name] for values in at_once] for name in space}
    tenths = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}  # and not 0.30000000000000004
    assert {*seen["x"]} <= tenths and len({*seen["x"]}) > 3
    assert all(isinstance(rate, float) and 1e-5 <= rate <= 1 for rate in seen["rate"])
    assert sum(rate < 3e-3 for rate in seen["rate"]) > 5  # a linear draw has 0.3 % there
    assert {*seen["count"]} <= {2, 12, 22, 32} and all(isinstance(count, int) for count in seen["count"])
    assert {*seen["kind"]} == {"a", "b"} and {*seen["level"]} == {0, 4}
    assert {values["seed"] for values in at_once} == {7}


def test_the_same_seed_proposes_the_same_and_another_does_not(project, at_once):
    for name, seed in {"first": 3, "again": 3, "other": 4}.items():
        go(trials=8, name=name, seed=seed)
    first, again, other = (
        [each["x"] for each in at_once if each["run_name"].startswith(name)] for name in ("first", "again", "other")
    )
    assert first == again and len({*first}) == 8
    assert not {*first} & {*other}


def test_a_search_in_two_calls_proposes_what_it_proposes_in_one(project, at_once):
    go(trials=9, name="whole")
    go(trials=3, name="parts")
    go(trials=9, name="parts")
    whole, parts = ([each["x"] for each in at_once if each["run_name"].startswith(n)] for n in ("whole", "parts"))
    assert parts == whole


def test_it_learns_from_what_it_found(project, at_once):
    go(trials=60)
    near = sum(abs(values["x"] - 3) < 3 for values in at_once[20:])
    assert near > 20  # at random 30 % are so near to the best: 12 of 40, and more than 20 once in 250 times


# ---- what decides ------------------------------------------------------------------------------------------------


def test_the_best_is_the_best_of_all_trials(project, at_once, capsys):
    go(trials=6, report=True)
    with open("outputs/search/s/trials.csv") as file:
        rows = list(csv.DictReader(file))
    xs = [values["x"] for values in at_once]
    nearest = min(range(6), key=lambda number: abs(xs[number] - 3))
    assert [float(row["x"]) for row in rows] == pytest.approx(xs)
    assert [float(row["val_top1"]) for row in rows] == pytest.approx([1 - (x - 3) ** 2 / 100 for x in xs])
    assert rows[nearest]["run"] == f"outputs/tiny/s-trial{nearest:03d}"
    shown = capsys.readouterr().out
    assert f"best: trial {nearest}, val_top1 {1 - (xs[nearest] - 3) ** 2 / 100:.4g}" in shown
    assert f"papermill s-trial{nearest:03d}" in shown
    assert Path("outputs/search/s/history.png").stat().st_size > 5000


def test_minimised_the_best_is_the_least(project, at_once):
    study = go(metric="val_x", direction="minimize")
    assert study.best_value == min(values["x"] for values in at_once)


@pytest.mark.parametrize(("epoch", "expected"), [("best", 2.0), ("last", 1.0)])
def test_the_metric_is_of_the_epoch_that_is_kept(project, at_once, epoch, expected):
    assert go(trials=1, metric="val_nll_nats", direction="minimize", epoch=epoch).best_value == expected


def test_a_notebook_that_keeps_its_last_epoch_is_judged_by_it(project):
    """Its best epoch is of a model that is gone."""
    write_notebook(Path("notebooks/tiny.ipynb"), DECLARED, f'recipe = dict(keep="last")\n{CODE}')
    with pytest.raises(search.SearchError, match="epoch is best: tiny ends with its last, expected epoch: last"):
        search.Search(CONFIG)
    search.Search(CONFIG | {"epoch": "last"})


def test_more_gpus_than_there_are_is_one_line(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = call(gpus=2, trials=1)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "a run wants 2 GPUs: this machine shows 1"
    assert "Traceback" not in result.stderr


def test_a_run_that_was_told_which_epoch_to_keep_is_judged_by_that(project):
    Path("metrics.json").write_text("{}")
    rows = [{"val_top1": 0.9, "val_nll_nats": 1.0}, {"val_top1": 0.5, "val_nll_nats": 2.0}]
    Path("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for keep, expected in (("best", 0.9), ("last", 0.5)):
        Path("params.json").write_text(json.dumps({"keep": keep}))
        for epoch in ("best", "last"):
            assert search._measured(Path("."), epoch)["val_top1"] == expected


def test_of_a_training_in_states_the_model_that_was_cut_counts(project):
    """Its log is of models before the cut."""
    Path("params.json").write_text("{}")
    Path("metrics.json").write_text('{"val_top1": 0.3, "macs_g": 2.0}')
    rows = [{"state": state, "val_top1": 0.9 - state / 10, "val_nll_nats": 1.0} for state in (0, 0, 1)]
    Path("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch in ("best", "last"):
        assert search._measured(Path("."), epoch) == {"val_top1": 0.3, "val_nll_nats": 1.0, "macs_g": 2.0}


def test_the_best_is_within_the_limit(project, at_once):
    study = go(trials=12, limit={"macs_g": 1.0})
    within = [values["x"] for values in at_once if abs(values["x"]) <= 1]
    assert 0 < len(within) < 12
    assert study.best_params["x"] == pytest.approx(max(within))  # nearest to 3
    with pytest.raises(search.SearchError, match="none of 2 trials ended within macs_g 0, see outputs/search/none"):
        go(trials=2, name="none", limit={"macs_g": 0}, report=True)
    assert Path("outputs/search/none/trials.csv").exists()


# ---- failures and interruptions, with papermill --------------------------------------------------------------------


def test_a_failed_trial_is_recorded_and_the_search_goes_on(project, at_once, capsys):
    study = go(trials=12, search={**CONFIG["search"], "kind": ["a", "broken"]}, report=True)
    failed = [trial.number for trial in study.trials if trial.state.name == "FAIL"]
    assert failed and len(failed) < 12 and len(at_once) == 12
    assert failed == [number for number, values in enumerate(at_once) if values["kind"] == "broken"]
    shown = capsys.readouterr().out
    assert all(f"failed: trial {n}, see outputs/tiny/s-trial{n:03d}/log.txt" in shown for n in failed)
    at_once.clear()
    go(trials=12, search={**CONFIG["search"], "kind": ["a", "broken"]})
    assert not at_once


def test_with_papermill_to_the_end(project):
    result = call("--trials", "3", parameters={"kind": "a"}, search={**CONFIG["search"], "count": [1, 2]})
    assert result.returncode == 0, result.stderr
    values = [json.loads((path / "params.json").read_text()) for path in sorted(Path("outputs/tiny").iterdir())]
    best = max(range(3), key=lambda number: 1 - (values[number]["x"] - 3) ** 2)
    assert f"best: trial {best}, val_top1" in result.stdout
    assert f"papermill notebooks/tiny.ipynb out.ipynb -p x {values[best]['x']}" in result.stdout
    assert [begun(number) for number in range(3)] == [1, 1, 1]
    assert not result.stderr, "a warning of Optuna's"
    again = call("--trials", "3", parameters={"kind": "a"}, search={**CONFIG["search"], "count": [1, 2]})
    assert again.stdout.splitlines()[-2:] == result.stdout.splitlines()[-2:]
    assert [begun(number) for number in range(4)] == [1, 1, 1, 0]


def test_with_papermill_an_error_leaves_its_log(project):
    result = call("--trials", "1", parameters={"kind": "broken"})
    assert result.returncode == 1 and "none of 1 trials ended, see outputs/search/s" in result.stderr
    assert "kind is broken" in Path("outputs/tiny/s-trial000/log.txt").read_text()


@pytest.mark.parametrize("whom", ["all", "search"])
def test_a_killed_search_goes_on(project, whom):
    """Killed in its second trial, with or without the notebook's own processes: nothing that is done runs again."""
    options = {"parameters": {"wait_for": "go"}}
    Path("go").touch()
    assert call("--trials", "1", **options).returncode == 0
    Path("go").unlink()
    with started("--trials", "3", **options) as process:
        until(lambda: begun(1))
        asked = json.loads(Path("outputs/tiny/s-trial001/params.json").read_text())["x"]
        if whom == "all":  # the notebook's kernel is in a session of its own
            os.kill(int(Path("outputs/tiny/s-trial001/lock.pid").read_text()), signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        with started("--trials", "3", **options) as process:
            time.sleep(4)
            assert not Path("outputs/tiny/s-trial001/DONE").exists()
            Path("go").touch()
            shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "best: trial" in shown
    assert [begun(number) for number in range(4)] == [1, 2 if whom == "all" else 1, 1, 0]
    values = [json.loads(Path(f"outputs/tiny/s-trial00{n}/params.json").read_text())["x"] for n in range(3)]
    assert values[1] == asked and len({*values}) == 3


def test_jobs_run_together_after_a_first_alone(project):
    options = {"parameters": {"wait_for": "go"}}
    with started("--trials", "3", "--jobs", "2", **options) as process:
        until(lambda: begun(0))
        time.sleep(1)
        assert not Path("outputs/tiny/s-trial001").exists()
        Path("go").touch()
        until(lambda: Path("outputs/tiny/s-trial000/DONE").exists())
        Path("go").unlink()
        until(lambda: begun(1) and begun(2))
        Path("go").touch()
        assert process.wait(timeout=60) == 0


def test_two_searches_do_not_write_one_study(project, at_once):
    one = search.Search(CONFIG)
    one.study()
    with pytest.raises(search.SearchError, match="outputs/search/s is written by another search"):
        search.Search(CONFIG).study()


def test_a_name_stands_for_one_search(project, at_once):
    go(trials=1)
    go(trials=2, threads=2)  # not what results depend on
    for changed in ({"seed": 1}, {"parameters": {"count": 3}}, {"search": {"x": {"low": 0, "high": 1}}}):
        with pytest.raises(search.SearchError, match=f"outputs/search/s has another {next(iter(changed))}: choose"):
            go(**changed)
    (Path("outputs/search/s") / "study.db").unlink()
    with pytest.raises(search.SearchError, match="s-trial000 is there without outputs/search/s"):
        go()
    assert len(at_once) == 2


# ---- files that are refused ----------------------------------------------------------------------------------------

REFUSED = [
    ({"search": {"y": [1]}}, "search: y: y is not a parameter of this notebook"),
    ({"parameters": {"cont": 3}}, "parameters: cont is not a parameter of this notebook: did you mean count?"),
    ({"search": {"x": {"low": 0, "high": 11}}}, r"search: x: x is 11.0: expected a value in [-10, 10]"),
    ({"search": {"x": {"low": -11, "high": 1}}}, r"search: x: x is -11.0: expected a value in [-10, 10]"),
    ({"search": {"kind": ["a", "c"]}}, "search: kind: kind is 'c': expected one of a, b, broken"),
    ({"search": {"kind": {"low": 1, "high": 2}}}, "search: kind: kind is 1: expected str"),
    ({"search": {"level": {"low": 0, "high": 4}}}, "search: level: it has no range, expected a list of values"),
    ({"search": {"count": {"low": 1, "high": 2.5}}}, "search: count: count is 2.5: expected int"),
    ({"search": {"count": {"low": 1, "high": 4, "step": 0.5}}}, "search: count: count is 0.5: expected int"),
    ({"search": {"x": {"low": 3, "high": 1}}}, "search: x: "),
    ({"search": {"x": {"low": 0, "high": 1, "step": 0.3}}}, "search: x: "),
    ({"search": {"x": {"low": 0, "high": 1, "log": True}}}, "search: x: "),
    ({"search": {"x": {"low": 0, "high": 1, "stepp": 0.5}}}, "stepp"),
    ({"search": {"x": {"low": 0}}}, "search: x is {'low': 0}: expected low and high, or a list of values"),
    ({"search": {"x": 3}}, "search: x is 3: expected low and high, or a list of values"),
    ({"search": {"x": []}}, "search: x is []: expected low and high, or a list of values"),
    ({"search": {}}, "search is empty"),
    ({"search": 3}, "search is 3: expected names and their values"),
    ({"search": {"run_name": ["a"]}}, "run_name is set by the search"),
    ({"parameters": {"output_dir": "a"}}, "output_dir is set by the search"),
    ({"parameters": {"x": 1}}, "x is in parameters and in search"),
    ({"trails": 3}, "this search has 'trails': expected name, notebook, metric"),
    ({"metric": "top1"}, "metric is 'top1': expected one on validation images: val_top1, val_nll_nats"),
    ({"metric": "val_top"}, "metric is 'val_top': tiny has none of this name"),
    ({"metric": None}, "metric is ''"),
    ({"name": None}, "name is ''"),
    ({"name": "../x"}, "name is '../x': expected letters"),
    ({"notebook": "tny"}, "notebook is 'tny': expected one of tiny"),
    ({"direction": "up"}, "direction is 'up': expected one of maximize, minimize"),
    ({"direction": None}, "direction is ''"),
    ({"trials": 0}, "trials is 0: expected a value in [1, 1000000]"),
    ({"trials": None}, "trials is 0"),
    ({"limit": {"top1": 0.5}}, "limit is top1: 0.5: expected a number for macs_g or params_m"),
    ({"limit": {"macs_g": "much"}}, "limit is macs_g: 'much'"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[str(changed)[:40] for changed, _ in REFUSED])
def test_a_wrong_file_is_refused_before_anything_is_written(project, monkeypatch, changed, message):
    config = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    Path("s.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["search", "s.yaml"])
    with pytest.raises(SystemExit) as error:
        search.main()
    assert message in error.value.code and "\n" not in error.value.code
    assert not Path("outputs").exists()


@pytest.mark.parametrize("text", ["a: [", "- 1", "", None])
def test_what_is_no_search_file_is_refused(project, text):
    if text is not None:
        Path("s.yaml").write_text(text)
    with pytest.raises(search.SearchError, match="s.yaml"):
        search.read(Path("s.yaml"))


def test_without_optuna_one_line_says_what_to_install(project):
    (project / "optuna.py").write_text("raise ImportError")
    result = call()
    assert result.returncode == 1 and result.stderr == "a search needs Optuna: pip install -e .[search]\n"


@pytest.mark.parametrize("file", sorted((ROOT / "searches").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_searches_fit_their_notebooks(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    one = search.read(file)
    assert one.space and str(file.name) in file.read_text() and sweeps.sources(one.notebook)
