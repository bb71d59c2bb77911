"""Runs: whole files or none, one process per run, DONE last, one clear line for each thing that cannot be."""

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECLARED, tiny_run, write_notebook
from matplotlib.figure import Figure

from lib import params, runs
from lib.runs import RunError

ROOT = Path(__file__).resolve().parents[1]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    runs.write(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write(path, half)
    assert path.read_text() == "old" and files(tmp_path) == {"deep/file.txt"}


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "model.safetensors"

    def writer(temporary):
        temporary.write_text("whole")
        assert temporary.suffix == ".safetensors" and not path.exists()

    runs.write(path, writer)
    assert path.read_text() == "whole"


@pytest.mark.parametrize(
    "metrics, where",
    [({"top1": float("nan")}, "metrics.json/top1"), ({"a": [{"b": float("inf")}]}, "metrics.json/a/0/b")],
)
def test_numbers_that_are_not_finite_are_refused_by_their_key(make_run, metrics, where):
    run = make_run()
    with pytest.raises(RunError, match=where):
        run.finish(metrics)
    assert not run.done and not (run.dir / "metrics.json").exists()


def test_rows_that_are_not_finite_leave_the_rows_before(make_run):
    run = make_run()
    run.log([{"loss": 1.0}])
    with pytest.raises(RunError, match="metrics.jsonl/1/loss is nan"):
        run.log([{"loss": 1.0}, {"loss": float("nan")}])
    assert (run.dir / "metrics.jsonl").read_text() == '{"loss": 1.0}\n'


def named(**values) -> str:
    declaration = params.declared(f'rate: float = 0.5\nweights: str = ""\nepochs: int = 1\n{DECLARED}')
    return runs.folder("toy", declaration, params.check(declaration, values)).name


def test_a_run_is_named_after_what_it_changes():
    assert named().startswith("default-")
    assert named(rate=0.3, weights="some/where/vit_tiny.safetensors").startswith("rate0.3-vit_tiny-")
    assert len(named(weights="x" * 300)) < 80
    assert re.fullmatch(r"[\w.=-]+", named(weights="ä/../b c?*"))


def test_names_are_unique_for_what_a_run_computes_and_blind_to_where_it_goes():
    names = {named(), named(rate=0.3), named(epochs=2), named(weights="a/x.pt"), named(weights="b/x.pt"), named(seed=1)}
    assert len(names) == 6
    assert named(rate=0.3, output_dir="elsewhere", resume=False) == named(rate="0.3")
    assert named(run_name="mine") == "mine"


@pytest.mark.parametrize("name", ["../out", "..", ".hidden", "a/b", "a\n", " "])
def test_a_run_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="run_name is .* expected letters"):
        tiny_run(tmp_path, run_name=name)
    assert not files(tmp_path)


@pytest.mark.parametrize("folder", [".", "notebooks", "lib/pruners"])
def test_output_dir_counts_from_the_projects_folder(monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    declaration = params.declared(DECLARED)
    values = params.check(declaration, {"run_name": "x"})
    assert runs.folder("toy", declaration, values) == ROOT / "outputs" / "toy" / "x"
    assert Path(runs.resolve("notebooks/dense.ipynb")).is_file()
    assert runs.resolve("nowhere/x.pt") == "nowhere/x.pt" and runs.resolve("") == ""


def test_from_elsewhere_the_projects_folder_is_that_of_lib(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert runs.root() == ROOT


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written .*: choose another output_dir") as caught:
        tiny_run(tmp_path / "file" / "below")
    assert "\n" not in str(caught.value)


def test_done_is_written_last(make_run, monkeypatch):
    run, written, write = make_run(), [], runs.write

    def spy(path, writer):
        assert not run.done
        write(path, writer)
        written.append(path.name)

    monkeypatch.setattr(runs, "write", spy)
    run.finish({"top1": 0.5, "n": 9, "undefined": None}, dataset_digest="abc")
    assert written == ["metrics.json", "provenance.json", "DONE"] and run.done
    provenance = json.loads((run.dir / "provenance.json").read_text())
    assert provenance["dataset_digest"] == "abc" and provenance["versions"]["torch"]
    assert json.loads((run.dir / "metrics.json").read_text())["undefined"] is None


def test_the_recorded_command_names_what_was_changed(make_run):
    command = make_run(seed=3, run_name="my run".replace(" ", "_")).command
    assert command.startswith("papermill notebooks/tiny.ipynb out.ipynb -p seed 3 -r output_dir ")
    assert command.endswith(" -r run_name my_run")


def test_arrays_and_figures_are_files_of_the_run(make_run):
    from matplotlib.figure import Figure

    run = make_run()
    run.arrays("test", logits=np.eye(2), labels=np.arange(2))
    run.figure(Figure(), "curve")
    assert np.load(run.dir / "test.npz")["logits"].tolist() == [[1, 0], [0, 1]]
    assert (run.dir / "figures" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.dir.rglob("*.tmp*"))


def test_one_process_may_start_its_run_twice(make_run, capsys):
    first, second = make_run(), make_run()
    assert first.dir == second.dir
    second.finish({})
    assert make_run().done
    assert capsys.readouterr().out.count("(done before: what is finished is reused)") == 1


def test_a_name_that_stands_for_other_parameters_is_refused(make_run):
    make_run(seed=3).close()  # has made nothing yet: nothing can be mixed up
    make_run(seed=1).finish({})
    with pytest.raises(RunError, match=r"other parameters \(seed was 1, is 2\): choose another run_name"):
        make_run(seed=2)
    again = make_run(seed=1)  # the refusal changed nothing
    assert again.done and json.loads((again.dir / "params.json").read_text())["seed"] == 1


def test_a_run_from_before_there_was_a_parameter_was_made_with_its_default(make_run):
    run = make_run()
    run.finish({})
    path = run.dir / "params.json"
    values = json.loads(path.read_text())
    assert values.pop("seed") == 0
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"other parameters \(seed was 0, is 1\)"):
        make_run(seed=1)
    assert make_run().done


def test_a_finished_run_whose_results_are_written_anew_is_unfinished(make_run):
    make_run().finish({"top1": 0.5})
    again = make_run()
    assert again.done
    again.arrays("test", logits=np.zeros(3))
    assert not again.done and (again.dir / "metrics.json").exists()
    again.finish({"top1": 0.6})
    assert again.done


def test_figures_of_another_run_of_the_name_do_not_pass_for_those_of_this(make_run):
    run = make_run(seed=1)
    run.figure(Figure(), "kept")
    run.log([{"epoch": 1}])
    run.close()
    run = make_run(seed=2)
    assert not (run.dir / "figures").exists() and not (run.dir / "metrics.jsonl").exists()
    run.figure(Figure(), "kept")
    run.finish({})
    assert [each.name for each in (make_run(seed=2).dir / "figures").iterdir()] == ["kept.png"]


@pytest.mark.parametrize("begun", ["last/state-00000001.pt", "last/search.jsonl", "parts/state00/state.json"])
def test_a_state_to_resume_is_not_taken_for_that_of_other_parameters(make_run, begun):
    run = make_run(seed=1)
    runs.write(run.dir / begun, lambda temporary: temporary.write_text("state"))
    run.close()
    with pytest.raises(RunError, match="seed was 1, is 2"):
        make_run(seed=2)
    assert run.dir not in runs._held


def test_temporaries_of_a_killed_process_are_swept(make_run):
    run = make_run()
    run.close()
    for name in (
        ".model.safetensors.99.tmp.safetensors",
        "last/.state-00000001.pt.99.tmp.pt",
        "figures/.a.png.9.tmp.png",
    ):
        path = run.dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    make_run()
    assert files(run.dir) == {"lock", "lock.pid", "params.json"}


def test_without_resume_the_state_is_cleared(make_run):
    run = make_run()
    run.finish({})
    for name in ("state-00000001.pt", "best.pt"):
        runs.write(run.dir / "last" / name, lambda temporary: temporary.write_text("old"))
    assert make_run(resume=True).done and len(list(run.dir.glob("last/*"))) == 2
    again = make_run(resume=False)
    assert not again.done and not list(run.dir.glob("last/*"))


HOLD = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from conftest import tiny_run
tiny_run({folder!r})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_always_starts_anew_is_not_done_until_it_is_again(project):
    """A notebook without `resume`: what lies there while it runs is of two runs."""
    write_notebook(project / "notebooks" / "toy.ipynb", "seed: int = 0", CODE)
    declaration = params.declared_in(project / "notebooks" / "toy.ipynb")
    assert "resume" not in declaration
    for _ in range(2):
        run = runs.Run("toy", declaration, {"seed": 0})
        assert not run.done
        run.finish({})
        assert run.done and not run.resumed


def test_a_run_remembers_places_from_the_projects_folder(project):
    run = runs.Run("toy", params.declared_in(project / "notebooks" / "toy.ipynb"), {"seed": 0, "run_name": "one"})
    run.finish({}, start=str(project / "notebooks"), dataset_digest="d" * 64)
    facts = json.loads((run.dir / "provenance.json").read_text())
    assert (facts["start"], facts["dataset_digest"]) == ("notebooks", "d" * 64)


def test_a_second_process_on_the_same_run_is_refused_until_the_first_is_gone(tmp_path):
    code = HOLD.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as holder:
        while (line := holder.stdout.readline()) != "held\n":
            assert line, "the holder died"
        with pytest.raises(RunError, match=f"is being written by process {holder.pid}: wait for it, or end it"):
            tiny_run(tmp_path)
        tiny_run(tmp_path, run_name="another").close()
        holder.kill()
    run = tiny_run(tmp_path)
    assert (run.dir / "lock.pid").read_text() == str(os.getpid())
    run.close()


def test_start_reads_checks_and_seeds(tmp_path):
    def start(**values):
        cell = f"# Parameters\n{chr(10).join(f'{name} = {value!r}' for name, value in values.items())}"
        declaration = params.declared(DECLARED)
        namespace = {name: parameter.default for name, parameter in declaration.items()} | values
        namespace["In"] = [DECLARED, cell]
        run = runs.start("toy", namespace)
        run.close()
        return namespace, torch.rand(3).tolist()

    namespace, drawn = start(seed="7", output_dir=str(tmp_path))
    assert namespace["seed"] == 7
    assert start(seed=7, output_dir=str(tmp_path))[1] == drawn != start(seed=8, output_dir=str(tmp_path))[1]
    before = files(tmp_path)
    with pytest.raises(params.ParameterError, match="seed is 77"):
        start(seed=77, output_dir=str(tmp_path), run_name="bad")
    assert files(tmp_path) == before


CODE = """\
from lib import runs
run = runs.start("toy", globals())
if seed == 9:
    raise ValueError("the ninth seed\\nis refused")
run.finish({"seed": seed})
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project with one notebook, toy, as working directory."""
    write_notebook(tmp_path / "notebooks" / "toy.ipynb", DECLARED, CODE)
    (tmp_path / "lib").symlink_to(ROOT / "lib")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ensure_makes_a_run_once(project, capsys):
    unfinished = tiny_run("outputs", seed=3)
    unfinished.close()
    unfinished.dir.parent.rename(project / "outputs" / "toy")
    made = runs.ensure("toy", seed=3)
    assert made.parent == project / "outputs" / "toy" and made.name.startswith("seed3-") and (made / "DONE").exists()
    assert json.loads((made / "metrics.json").read_text()) == {"seed": 3}
    assert "no finished run with {'seed': 3}, making it" in capsys.readouterr().out
    assert runs.ensure("toy", seed="3") == made
    assert "using" in capsys.readouterr().out
    (project / "outputs" / "older.pth").touch()
    assert runs._written("outputs/older.pth") > 0 == runs._written("outputs") == runs._written("") == runs._written(3)
    made.rename(made.with_name("mine"))  # found by what it computed, not by its name
    assert runs.ensure("toy", seed=3).name == "mine"


def test_ensure_refuses_a_run_that_was_made_from_an_older_model(project):
    write_notebook(project / "notebooks" / "toy.ipynb", f'weights: str = ""\n{DECLARED}', CODE)
    (model := project / "model.pth").touch()
    made = runs.ensure("toy", weights="model.pth")
    assert runs.ensure("toy", weights="model.pth") == made
    later = (made / "DONE").stat().st_mtime + 60
    os.utime(model, (later, later))
    fault = rf"{re.escape(str(made))} was made from an older .*model\.pth \(weights\): remove that run, or choose"
    with pytest.raises(RunError, match=f"^{fault} another output_dir$"):
        runs.ensure("toy", weights="model.pth")
    assert (made / "DONE").exists(), "what was found stays"


def test_of_two_that_need_a_run_at_once_one_makes_it(project):
    """Sweeps start such pairs."""
    write_notebook(project / "notebooks" / "toy.ipynb", DECLARED, f"import time\ntime.sleep(2)\n{CODE}")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: runs.ensure("toy", seed=4), range(2))
    assert first == second and (first / "DONE").exists()
    assert len(list((project / "outputs" / "toy").iterdir())) == 1


def test_home_is_understood_in_output_dir(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project / "home"))
    made = runs.ensure("toy", output_dir="~/out", seed=2)
    assert made.parent == project / "home" / "out" / "toy" and (made / "DONE").exists()
    assert runs.ensure("toy", output_dir="~/out", seed=2) == made and not (project / "~").exists()


def test_one_of_several_choices_is_no_path(project, monkeypatch):
    """Jupyter works in notebooks/, where a folder may have the name of a choice."""
    choice = 'way: str = "data"  # one of data, half\n'
    write_notebook(project / "notebooks" / "toy.ipynb", choice + DECLARED, CODE)
    made = runs.ensure("toy", way="data")
    (project / "notebooks" / "data").mkdir()
    monkeypatch.chdir(project / "notebooks")
    assert runs.ensure("toy", way="data") == made == runs.ensure("toy")


def test_time_since_a_run_was_resumed_is_not_called_all_of_it(tmp_path):
    for resume, resumed in ((True, False), (True, True), (False, False)):
        run = tiny_run(tmp_path, resume=resume)
        run.finish({})
        assert json.loads((run.dir / "provenance.json").read_text())["resumed"] == resumed


def test_ensure_passes_a_failure_on_and_keeps_the_notebook(project):
    with pytest.raises(RunError, match=r"toy failed \(.*is refused\): see .*notebook.ipynb") as caught:
        runs.ensure("toy", seed=9)
    log = Path(str(caught.value).rpartition("see ")[2])
    assert "the ninth seed" in log.read_text() and not (log.parent / "DONE").exists()


def test_ensure_refuses_parameters_that_the_notebook_lacks(project):
    with pytest.raises(params.ParameterError, match="sede is not a parameter of this notebook: did you mean seed"):
        runs.ensure("toy", sede=1)
    assert not (project / "outputs").exists()


def test_finished_runs_are_found_by_a_glob_from_the_project_or_from_anywhere(tmp_path, project):
    for name in ("b", "a", "half"):
        (project / "outputs" / "dense" / name).mkdir(parents=True)
    for name in ("b", "a"):
        (project / "outputs" / "dense" / name / "DONE").touch()
    expected = [project / "outputs" / "dense" / name for name in ("a", "b")]
    assert runs.finished("outputs/dense/*") == runs.finished(f"{project}/outputs/*/*") == expected
    with pytest.raises(runs.RunError, match=r"no finished run in outputs/avit/\*"):
        runs.finished("outputs/avit/*")


def test_a_process_keeps_the_memory_that_it_frees():
    """Large tensors come and go without new pages; a process that did not ask for it gets them anew each time."""
    code = """
import resource, torch
{ask}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(): return [torch.ones(12_000_000) for _ in range(4)]  # above what glibc ever keeps of itself
use()
use(); use()
before = faults()
for _ in range(10): use()
print(faults() - before)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    found = [
        int(subprocess.run([sys.executable, "-c", code.format(ask=ask)], capture_output=True, text=True).stdout)
        for ask in ("from lib import runs; runs.keep_memory()", "")
    ]
    assert 10 * found[0] < found[1], found


def test_a_runs_name_without_its_seed():
    found = [runs.without_seed(run) for run in ("outputs/acdc/digits-a0-seed12", "/x/acdc/a/", "seeds-seed1-b")]
    assert found == ["digits-a0", "a", "seeds-seed1-b"]
