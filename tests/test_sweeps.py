"""Sweep files: every one expands to runs whose parameters their notebooks accept, before anything starts."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_notebook
from filelock import FileLock
from reduced import reduced
from test_finished import run as make_run

from lib import compare, finished, params, sweeps

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = [path for path in sorted((ROOT / "sweeps").glob("*.yaml")) if "stages" in yaml.safe_load(path.read_text())]
PARAMETER_FILES = sorted({*(ROOT / "sweeps").glob("*.yaml")} - {*SWEEPS})


COMPARED = [path for path in SWEEPS if "notebook: compare" in path.read_text()]


def dry_run(sweep: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--nolock", "--configfile", str(sweep)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_weights_of_a_hub_leave_none_to_start_from(sweep):
    """starts.dense would refuse the run when its time comes."""
    for run, planned in sweeps.expand(yaml.safe_load(sweep.read_text()), ROOT / "notebooks").items():
        if "pretrained" in (planned.parameters.get("ckpt"), planned.parameters.get("model_path")):
            assert "weights" not in planned.parameters, run


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_sweep_expands(sweep):
    result = dry_run(sweep)
    assert result.returncode == 0, result.stderr[-2000:]
    stages = yaml.safe_load(sweep.read_text())["stages"]
    runs = 0
    for stage in stages:
        declared = params.declared_in(ROOT / "notebooks" / f"{stage['notebook']}.ipynb")
        lists = [values for name, values in stage.get("parameters", {}).items()
                 if isinstance(values, list) and declared[name].type is not list]  # fmt: skip
        count = 1
        for values in lists:
            count *= len(values)
        runs += count
    assert f": {runs} runs below" in result.stderr


@pytest.mark.parametrize("sweep", COMPARED, ids=lambda path: path.stem)
def test_the_baseline_of_a_comparison_is_among_its_runs(sweep, tmp_path):
    """On run folders as the sweep would leave them; an arm's name says how its runs were made."""
    config = yaml.safe_load(sweep.read_text())
    whole = config | {"output_dir": str(tmp_path)}
    planned = sweeps.expand(whole, ROOT / "notebooks")
    for name, one in planned.items():
        notebook, params = name.split("/")[0], one.parameters
        if notebook == "dense":
            method = ("low-resolution" if params.get("shrink_to") else "dense") + ("-tuned" if one.upstream else "")
        elif params.get("frozen_keep_ratio") == 1:
            method = "dense-tuned"
        else:
            continue  # pruned
        make_run(tmp_path, name, method, params=params, ratio=1.0, seed=params.get("seed", 0))
    (asked,) = [one.parameters for name, one in planned.items() if name.startswith("compare/")]
    pattern = tmp_path / Path(asked["runs"]).relative_to(config.get("output_dir", "outputs"))
    table, _ = finished.runs(pattern)
    assert compare.baseline_arm(table, asked["baseline"]).startswith("dense")


@pytest.mark.parametrize("file", PARAMETER_FILES, ids=lambda path: path.stem)
def test_parameter_file_fits_dense(file):
    params.check(params.declared_in(ROOT / "notebooks" / "dense.ipynb"), yaml.safe_load(file.read_text()))


def test_typing_errors_are_found_before_anything_starts(tmp_path):
    sweep = tmp_path / "bad.yaml"
    sweep.write_text(
        f"name: bad\noutput_dir: {tmp_path}/out\nstages:\n  - notebook: ucb_stage2\n"
        "    parameters: {frozen_keep_ration: 0.3, selection: randm}\n"
    )
    result = dry_run(sweep)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert "frozen_keep_ration is not a parameter of this notebook: did you mean frozen_keep_ratio?" in result.stderr
    assert "did you mean random?" in result.stderr


def test_a_run_is_named_after_a_path_by_its_file(tmp_path):
    sweep, out = tmp_path / "paths.yaml", tmp_path / "out"
    stage = "  - notebook: dense\n    parameters: {dataset: [a/b/one.h5, digits], weights: ''}\n"
    sweep.write_text(f"name: s\noutput_dir: {out}\nstages:\n{stage}")
    shown = dry_run(sweep).stdout
    assert f"{out}/dense/s-one/DONE" in shown and f"{out}/dense/s-digits/DONE" in shown
    sweep.write_text(f"name: s\noutput_dir: {out}\nstages:\n{stage}{stage}")
    result = dry_run(sweep)
    assert result.returncode != 0 and "dense/s-one: two runs of this name" in result.stderr


STAGES = """
name: s
output_dir: {out}
stages:
  - notebook: dense
    parameters: {{seed: [0, 1]}}
  - notebook: dense
    name: tuned
    needs: {{weights: dense}}
    parameters: {{seed: [0, 1]}}
  - notebook: avit
    needs: {{ckpt: {needed}}}
    parameters: {{seed: [0, 1]}}
  - notebook: compare
    needs: {{runs: [dense, avit]}}
"""


def test_a_stage_takes_the_agreeing_run_of_the_stage_it_names(tmp_path):
    sweep = tmp_path / "s.yaml"
    sweep.write_text(STAGES.format(out=tmp_path / "out", needed="dense/tuned"))
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--nolock", "--configfile", str(sweep)]
    result = subprocess.run([*command, "--printshellcmds"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for seed in (0, 1):
        assert f'"seed": {seed}, "ckpt": "{tmp_path}/out/dense/tuned-seed{seed}", "run_name": "s-seed{seed}"' in (
            result.stdout
        )
        assert f'"seed": {seed}, "weights": "{tmp_path}/out/dense/s-seed{seed}", "run_name": "tuned-seed{seed}"' in (
            result.stdout
        )
    assert all(f"{tmp_path}/out/{run}-seed{seed}/DONE" in result.stdout for seed in (0, 1)
               for run in ("dense/s", "dense/tuned", "avit/s"))  # fmt: skip


def test_a_need_that_several_runs_fit_is_refused(tmp_path):
    sweep = tmp_path / "s.yaml"
    sweep.write_text(STAGES.format(out=tmp_path / "out", needed="dense"))
    result = dry_run(sweep)
    assert result.returncode != 0
    assert "avit/s-seed0: 2 runs of dense fit its ckpt, expected one" in result.stderr
    sweep.write_text(STAGES.format(out=tmp_path / "out", needed="dense/tuned").replace("[dense, avit]", "[dens, avit]"))
    result = dry_run(sweep)
    assert result.returncode != 0 and "compare/s: its runs needs dens, no earlier stage" in result.stderr


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "stage", "message"),
    [({"stage": []}, {}, "this sweep has 'stage': expected name, stages, output_dir, threads, resources"),
     ({}, {"paramters": {}}, "stage 'dense' has 'paramters': expected notebook, name, parameters, needs, threads, "),
     ({"threads": "two"}, {}, "threads of this sweep is 'two': expected int"),
     ({}, {"threads": "two"}, "threads of stage 'dense' is 'two': expected int"),
     ({"name": None}, {}, "this sweep has no name: expected one"),
     ({"resources": {"mem": 1}}, {}, "the resources of this sweep has 'mem': expected gpu, mem_mb, runtime"),
     ({}, {"resources": {"gpus": 1}}, "the resources of stage 'dense' has 'gpus': expected gpu, mem_mb, runtime"),
     ({}, {"parameters": {"run_name": "r", "seed": 1}}, "parameters of stage 'dense' set run_name: expected a name of"),
     ({}, {"parameters": {"output_dir": "outputs"}}, "parameters of stage 'dense' set output_dir: expected a name of"),
     ({}, {"parameters": [1]}, "parameters of stage 'dense' is [1]: expected dict"),
     ({}, {"notebook": "dence"}, "no notebook 'dence': expected one of acdc, avit, avit_visual, clip_zeroshot, comp")],
)  # fmt: skip
def test_what_a_sweep_may_not_say_is_refused_by_name(more, stage, message):
    with pytest.raises(sweeps.SweepError) as refused:
        sweeps.expand({"name": "s", "stages": [{"notebook": "dense", **stage}], **more}, ROOT / "notebooks")
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["name", "stages"])
def test_a_sweep_has_a_name_and_stages(missing):
    config = {"name": "s", "stages": [{"notebook": "dense"}]}
    del config[missing]
    with pytest.raises(sweeps.SweepError, match=f"this sweep has no {missing}"):
        sweeps.expand(config)


def test_keys_left_empty_are_as_if_not_there():
    empty = {"name": None, "parameters": None, "needs": None, "threads": None, "resources": None}
    stage = {"notebook": "dense"}
    expected = sweeps.expand({"name": "s", "stages": [stage]}, ROOT / "notebooks")
    found = {"name": "s", "stages": [stage | empty], "threads": None, "resources": None}
    assert sweeps.expand(found, ROOT / "notebooks") == expected


def test_a_stage_that_is_only_a_word_is_refused():
    with pytest.raises(sweeps.SweepError, match="'dense' among the stages: expected"):
        sweeps.expand({"name": "s", "stages": ["dense"]}, ROOT / "notebooks")


# ---- what a run depends on ----------------------------------------------------------------------------------------


def test_sources_are_what_a_notebook_imports_directly_or_not(tmp_path):
    files = {
        "lib/__init__.py": "",
        "lib/direct.py": "def late():\n    from lib.inner import deep\n",
        "lib/inner/__init__.py": "",
        "lib/inner/deep.py": "import lib.last as last",
        "lib/last.py": "import torch",
        "lib/other.py": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    write_notebook(tmp_path / "notebooks" / "one.ipynb", "seed: int = 0", "from lib import direct")
    found = {str(Path(path).relative_to(tmp_path)) if Path(path).is_absolute() else path
             for path in sweeps.sources("one", tmp_path)}  # fmt: skip
    assert found == {"notebooks/one.ipynb", *files} - {"lib/other.py"}


# ---- sweeps of made-up notebooks, in a project of their own -------------------------------------------------------

STEP = """
source: str = ""  # a run that it needs
fault: str = ""  # a file that makes the run fail while it is there
output_dir: str = "outputs"
run_name: str = ""
"""
CODE = """
import os
{imports}
from lib import runs
run = runs.start("{name}", globals())
assert not os.path.exists(fault), "asked to fail"
run.finish({{"threads": os.environ["OMP_NUM_THREADS"]}})
"""


def snakemake(project: Path, sweep: Path, *options: str) -> subprocess.CompletedProcess:
    """A sweep of `project`, as make sweep calls it."""
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--cores", "2"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*command, "--configfile", str(sweep), *options], cwd=project, capture_output=True, text=True,
                          env=environment)  # fmt: skip


def written(folder: Path, config: dict) -> Path:
    """A sweep as a file, its keys in their order: runs are named after what varies, in this order."""
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "sweep.yaml"


def done(out: Path) -> dict[str, int]:
    """When each run of an output folder was finished, in nanoseconds."""
    return {str(mark.parent.relative_to(out)): mark.stat().st_mtime_ns for mark in sorted(out.glob("*/*/DONE"))}


@pytest.fixture
def project(tmp_path) -> Path:
    """The project with three notebooks that take seconds: first imports lib/inner.py by lib/direct.py."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "report", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "lib" / "direct.py").write_text("from lib import inner")
    (folder / "lib" / "inner.py").write_text("")
    for name, imports in {"first": "from lib import direct", "second": "", "alone": ""}.items():
        write_notebook(folder / "notebooks" / f"{name}.ipynb", STEP, CODE.format(name=name, imports=imports))
    return folder


def test_a_failed_run_stops_only_what_needs_it_and_is_named_at_the_end(project):
    (fault := project / "fault").touch()
    stages = [
        {"notebook": "first", "name": "bad", "parameters": {"fault": str(fault)}},
        {"notebook": "first", "name": "good"},
        {"notebook": "second", "name": "waits", "needs": {"source": "first/bad"}},
        {"notebook": "second", "name": "goes", "needs": {"source": "first/good"}},
    ]
    sweep = written(project, {"name": "s", "stages": stages})
    result = snakemake(project, sweep)
    assert result.returncode != 0
    out = project / "outputs"
    assert {*done(out)} == {"first/good", "second/goes"}
    *_, failed, waiting = result.stderr.strip().splitlines()
    assert failed == "failed: first/bad, see outputs/first/bad/log.txt"
    assert waiting == "not begun: second/waits, which needs it"
    assert "AssertionError: asked to fail" in (out / "first" / "bad" / "log.txt").read_text()
    assert "AssertionError: asked to fail" in result.stdout, "shown when it happens"
    page = (out / "report" / "index.html").read_text()
    assert "first: good" in page and "second: goes" in page and "first/bad" in page

    fault.unlink()
    before = done(out)
    result = snakemake(project, sweep)
    assert result.returncode == 0, result.stderr[-2000:]
    assert done(out).items() >= before.items() and len(done(out)) == 4, "what was done is not done again"


def test_an_edit_reruns_what_depends_on_it_and_nothing_else(project):
    stages = [
        {"notebook": "first", "threads": 2},
        {"notebook": "second", "needs": {"source": "first"}},
        {"notebook": "alone", "parameters": {"source": "weights.bin"}},
    ]
    (project / "weights.bin").write_text("one")
    sweep, out = written(project, {"name": "s", "stages": stages}), project / "outputs"

    def planned():
        """What a call would run now, going by snakemake's own list."""
        result = snakemake(project, sweep, "--summary")
        assert result.returncode == 0, result.stderr[-2000:]
        rows = [row.split("\t") for row in result.stdout.splitlines() if "/DONE\t" in row]
        return {"/".join(row[0].split("/")[-3:-1]) for row in rows if row[-1] != "no update"}

    result = snakemake(project, sweep)
    assert result.returncode == 0, result.stderr[-2000:]
    began = done(out)
    assert {*began} == {"first/s", "second/s", "alone/s"} and planned() == set()
    threads = {run: json.loads((out / run / "metrics.json").read_text())["threads"] for run in began}
    assert threads == {"first/s": "2", "second/s": "1", "alone/s": "1"}

    def edit(name):
        notebook = project / "notebooks" / f"{name}.ipynb"
        notebook.write_text(notebook.read_text().replace("asked to fail", "edited"))

    (project / "notebooks" / "alone.ipynb").touch()
    assert planned() == set(), "what it says is the same"
    edit("second")
    assert planned() == {"second/s"}
    (project / "lib" / "inner.py").write_text("# edited")
    assert planned() == {"first/s", "second/s"}
    (out / "second" / "s" / "last").mkdir()
    (out / "second" / "s" / "last" / "state-1.pt").touch()  # as training leaves one
    result = snakemake(project, sweep)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {run for run, when in done(out).items() if when != began[run]} == {"first/s", "second/s"}
    executed = (out / "second" / "s" / "notebook.ipynb").read_text()
    assert "edited" in executed and "(new)" in executed, "from the start, by the notebook as it is now"
    assert planned() == set()
    (project / "weights.bin").write_text("two")
    assert planned() == {"alone/s"}
    edit("first")
    assert planned() == {"first/s", "second/s", "alone/s"}


def test_a_stopped_run_goes_on_unless_what_it_starts_from_was_made_again(project):
    stages = [{"notebook": "first"}, {"notebook": "second", "needs": {"source": "first"}}]
    sweep, second = written(project, {"name": "s", "stages": stages}), project / "outputs" / "second" / "s"
    (project / "lib" / "inner.py").write_text("# one")
    assert snakemake(project, sweep).returncode == 0

    def stopped():
        for file in ("DONE", "provenance.json"):
            (second / file).unlink()
        (second / "last").mkdir()
        (second / "last" / "state-1.pt").touch()

    stopped()
    assert snakemake(project, sweep).returncode == 0
    assert "(resumes)" in (second / "notebook.ipynb").read_text()
    shutil.rmtree(second / "last")
    stopped()
    (project / "lib" / "inner.py").write_text("# two")  # first imports it
    assert snakemake(project, sweep).returncode == 0
    assert "(new)" in (second / "notebook.ipynb").read_text()
    stopped()  # and then asked for something else
    sweep = written(project, {"name": "s", "stages": [stages[0], stages[1] | {"parameters": {"fault": "other"}}]})
    assert snakemake(project, sweep).returncode == 0
    assert "(new)" in (second / "notebook.ipynb").read_text()


# ---- the same results ---------------------------------------------------------------------------------------------


def test_a_run_that_another_process_writes_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "dense" / "live"
    (folder / "last").mkdir(parents=True)
    for name, text in (("params.json", json.dumps({"epochs": 3})), ("log.txt", "so far"), ("last/best.pt", "state")):
        (folder / name).write_text(text)
    with FileLock(folder / "lock"):
        before = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert sweeps.run("dense", folder, {"epochs": 5}, threads=1) == 1
        assert {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    said = capsys.readouterr().out
    assert "FAILED dense/live: another process is writing it" in said and said.count("\n") == 1


def test_two_sweeps_are_the_same_but_for_timings(tmp_path):
    spec = importlib.util.spec_from_file_location("same_results", ROOT / "benchmarks" / "same_results.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def write(folder, run, **metrics):
        (tmp_path / folder / run).mkdir(parents=True)
        (tmp_path / folder / run / "metrics.json").write_text(json.dumps(metrics))

    one, other = tmp_path / "one", tmp_path / "other"
    assert list(benchmark.compare(one, other)) == [f"no metrics.json in {one} or {other}"]
    timings = ("latency_ms", "speedup", "wall_s", "seconds", "throughput_ips", "pareto_latency", "ceiling")
    for folder, found in {"one": 1.0, "other": 2.0}.items():
        write(folder, "a/same", top1=0.5, **dict.fromkeys(timings, found))
        write(folder, "a/differs", top1=found, table=[{"f1_macro": found, "latency_ms": found}, {"macs_g": 1}])
        write(folder, f"b/{folder}")
    assert list(benchmark.compare(one, other)) == [
        f"b/one: only in {one}",
        f"b/other: only in {other}",
        "a/differs/table/0/f1_macro: 1.0 and 2.0",
        "a/differs/top1: 1.0 and 2.0",
    ]


# ---- the main sweep, made small -----------------------------------------------------------------------------------


def test_the_quick_sweep_in_small(tmp_path):
    config, out = reduced(ROOT / "sweeps" / "quick.yaml", tmp_path / "outputs"), tmp_path / "outputs"
    planned = sweeps.expand(config, ROOT / "notebooks")
    whole = yaml.safe_load((ROOT / "sweeps" / "quick.yaml").read_text())
    assert len(config["stages"]) == len(whole["stages"]) and len(planned) <= 20

    sweep = written(tmp_path, config)
    result = snakemake(ROOT, sweep)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    finished = done(out)
    assert finished.keys() >= planned.keys()
    page = (out / "report" / "index.html").read_text()
    for name in planned:
        notebook, run_name = name.split("/")
        assert f">{notebook}: {run_name}</a>" in page
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert not {"top1", "method"} <= {*metrics} or f"accuracy {metrics['top1']:.1%}," in page
    assert not any("Traceback" in text.read_text() for text in (out / "report").glob("*.html"))

    result = snakemake(ROOT, sweep)
    assert result.returncode == 0, result.stderr[-2000:]
    assert done(out) == finished, "a second call has nothing to do"
