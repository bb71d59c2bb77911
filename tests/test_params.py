"""Parameters: declared in one place, read exactly or refused in one line, on text and on the real notebooks."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import write_notebook

from lib.params import ParameterError, check, declared, declared_in, from_namespace

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOTTERY = (
    "arch dataset criteria rate pruning_times epochs vit_structured prune_target reg_granularity_prune RST_schedule "
    "exponents fillback_rate"
)
CONTRACT = {
    "dense": "dataset arch epochs batch_size learning_rate seed resume",
    "ucb_stage1": "keep_ratio beta num_train_epochs learning_rate h5_dir output_dir run_name",
    "ucb_stage2": "stage1_checkpoint_path frozen_keep_ratio num_train_epochs learning_rate",
    "avit": "ckpt gate_scale gate_center ponder_weight distr_weight target_depth lr batch_size",
    "avit_visual": "ckpt img_idxs",
    "acdc": "model_path threshold rule analysis_batches finetune_epochs",
    "eap": "model_path keep_ratio analysis_batches use_task_loss objective finetune_epochs",
    "rsst": LOTTERY,
    "refill": LOTTERY,
    "clip_zeroshot": "model pretrained dataset enable_pruning k_anchors top_m alpha extract_attention attention_output",
    "token_baselines": "method keep_ratio r blocks",
    "compare": "runs baseline metric latency_budget_ms",
    "explore": "model image method strength",
}
CELL = """\
keep_ratio: float = 0.9  # share of patches kept per block, in (0, 1]
steps: int = 3  # how many, in [1, 10]
mode: str = "mask"  # how patches are dropped, one of mask, gather
blocks: list = [1, 2]  # which, in [0, 11]
tags: list[str] = []  # any, may be empty
resume: bool = True
"""
DECLARED = declared(CELL)


def test_a_declaration_is_name_type_default_and_help():
    ratio, tags = DECLARED["keep_ratio"], DECLARED["tags"]
    assert (ratio.type, ratio.default, ratio.help) == (float, 0.9, "share of patches kept per block, in (0, 1]")
    assert (tags.type, tags.default, DECLARED["resume"].help) == (list, [], "")
    assert check(DECLARED, {}) == {name: parameter.default for name, parameter in DECLARED.items()}


@pytest.mark.parametrize("source", ["", "x = 1", "x: int", "x: int = 1\nprint(x)", "x: int ="])
def test_other_cells_declare_nothing(source):
    assert declared(source) == {}


@pytest.mark.parametrize(
    "source, fault",
    [
        ("x: dict = {}", "x is declared as dict: expected one of int"),
        ("x: int = 2 * 3", "x is 2 * 3: expected a plain"),
    ],
)
def test_a_declaration_that_cannot_be_checked_is_refused(source, fault):
    with pytest.raises(ParameterError, match=fault.replace("*", r"\*")):
        declared(source)


@pytest.mark.parametrize(
    "name, given, read",
    [
        ("keep_ratio", "1e-4", 1e-4),
        ("keep_ratio", 1, 1.0),
        ("steps", 7.0, 7),
        ("steps", "7", 7),
        ("blocks", "[1,2]", [1, 2]),
        ("blocks", "1, 2", [1, 2]),
        ("blocks", (3, 4), [3, 4]),
        ("blocks", [3.0, "4"], [3, 4]),
        ("tags", "[]", []),
        ("resume", "true", True),
        ("resume", "False", False),
        ("mode", "gather", "gather"),
    ],
)
def test_papermills_types_are_read_where_that_is_exact(name, given, read):
    value = check(DECLARED, {name: given})[name]
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    "name, given, fault",
    [
        ("mode", 7, r"mode is 7: expected str \(quote it: papermill -r"),
        ("mode", "gahter", "mode is 'gahter': expected one of mask, gather, did you mean gather"),
        ("mode", None, "mode is None: expected str"),
        ("keep_ratio", float("nan"), "keep_ratio is nan: expected a finite number"),
        ("keep_ratio", float("inf"), "keep_ratio is inf: expected a finite number"),
        ("keep_ratio", "nan", "keep_ratio is 'nan': expected float"),
        ("keep_ratio", "much", "keep_ratio is 'much': expected float"),
        ("keep_ratio", "{[]: 1}", "expected float"),
        ("keep_ratio", True, "keep_ratio is True: expected float"),
        ("keep_ratio", 0, r"keep_ratio is 0.0: expected a value in \(0, 1\]"),
        ("keep_ratio", 1.5, r"keep_ratio is 1.5: expected a value in \(0, 1\]"),
        ("keep_ratio", -1, r"keep_ratio is -1.0: expected a value in \(0, 1\]"),
        ("steps", 2.5, "steps is 2.5: expected int"),
        ("steps", True, "steps is True: expected int"),
        ("steps", 0, r"steps is 0: expected a value in \[1, 10\]"),
        ("resume", 1, "resume is 1: expected bool"),
        ("resume", "yes", "resume is 'yes': expected bool"),
        ("blocks", [], "blocks is an empty list: expected at least one"),
        ("blocks", "[1, 12]", r"blocks is 12: expected a value in \[0, 11\]"),
        ("blocks", 3, "blocks is 3: expected list"),
        ("blocks", [1, "two"], "blocks holds 'two': expected whole numbers"),
        ("blocks", [1, 1.5], "blocks holds 1.5: expected whole numbers"),
        ("blocks", ["1e2"], r"blocks is 100: expected a value in \[0, 11\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, given, fault):
    with pytest.raises(ParameterError, match=fault) as caught:
        check(DECLARED, {name: given})
    assert "\n" not in str(caught.value)


def test_the_ends_of_an_interval_belong_to_it_as_its_brackets_say():
    assert check(DECLARED, {"keep_ratio": 1.0, "steps": 10}) | {} == check(DECLARED, {"keep_ratio": 1, "steps": "10"})
    half_open = declared("share: float = 0.0  # 0 is off, in [0, 1)")
    assert check(half_open, {"share": 0})["share"] == 0.0
    with pytest.raises(ParameterError, match=r"in \[0, 1\)"):
        check(half_open, {"share": 1.0})


def test_every_fault_gets_its_line():
    with pytest.raises(ParameterError) as caught:
        check(DECLARED, {"keep_ratoi": 0.5, "steps": "many", "zzz": 1, "resume": 0})
    lines = str(caught.value).splitlines()
    assert lines[0] == "keep_ratoi is not a parameter of this notebook: did you mean keep_ratio?"
    assert lines[1].startswith("zzz is not a parameter of this notebook: expected one of keep_ratio, steps")
    assert [line.split()[0] for line in lines[2:]] == ["steps", "resume"]


def test_the_values_of_a_namespace_are_the_declared_and_the_injected():
    cells = ["", "import os", CELL, "# Parameters\nkeep_ratio = 0.5\nkeep_ratoi = 0.1\n", "other = 3"]
    namespace = {name: parameter.default for name, parameter in DECLARED.items()}
    namespace |= {"In": cells, "keep_ratio": 0.5, "keep_ratoi": 0.1, "other": 3}
    declaration, values = from_namespace(namespace)
    assert declaration == DECLARED
    assert values["keep_ratio"] == 0.5 and values["keep_ratoi"] == 0.1 and "other" not in values


def test_without_a_parameters_cell_nothing_starts():
    ran = {"In": [""], "ratio": 0.5, "name": "x"}  # by %run, which leaves no history
    shipped = declared('ratio: float = 0.9\nname: str = "y"')
    assert from_namespace(ran, shipped) == (shipped, {"ratio": 0.5, "name": "x"})
    with pytest.raises(ParameterError, match="no parameters cell has run"):
        from_namespace({"In": [""], "ratio": 0.5}, shipped)
    with pytest.raises(ParameterError, match="no parameters cell has run"):
        from_namespace({"In": ["", "import os"]})


def test_papermill_fails_on_an_unknown_parameter_before_anything_is_written(tmp_path):
    cell = f"{CELL}output_dir: str = {str(tmp_path / 'made')!r}"
    source = write_notebook(tmp_path / "toy.ipynb", cell, "from lib import runs\nruns.start('toy', globals())")
    command = [sys.executable, "-m", "papermill", str(source), str(tmp_path / "run.ipynb"), "-p", "keep_ratoi", "0.5"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert "keep_ratoi is not a parameter of this notebook: did you mean keep_ratio?" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"toy.ipynb", "run.ipynb"}


def test_a_notebook_without_a_parameters_cell_is_named(tmp_path):
    source = tmp_path / "bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x: int = 1")]), source)
    with pytest.raises(ParameterError, match="bare.ipynb has no cell tagged parameters"):
        declared_in(source)


def cells_of(notebook: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_declare_each_parameter_on_one_commented_line(notebook):
    declaration = declared_in(notebook)
    [cell] = [cell for cell in cells_of(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    assert len("".join(cell["source"]).splitlines()) == len(declaration) > 0
    assert all(parameter.help for parameter in declaration.values())
    assert check(declaration, {}) == {name: parameter.default for name, parameter in declaration.items()}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_short(notebook):
    content, cells = json.loads(notebook.read_text()), cells_of(notebook)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert not {"papermill", "widgets"} & content["metadata"].keys()
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    assert not any("papermill" in cell["metadata"] or "execution" in cell["metadata"] for cell in cells)
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert len(lines) <= 70
    defined = [node for cell in cells for node in ast.walk(ast.parse("".join(cell["source"])))]
    assert not any(isinstance(node, ast.ClassDef) for node in defined)


@pytest.mark.parametrize("name", CONTRACT)
def test_notebooks_keep_the_names_of_the_methods_parameters(name):
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    if not notebook.exists() and name not in ("dense", "ucb_stage1", "ucb_stage2"):
        pytest.skip(f"{name}.ipynb is not written yet")
    assert set(CONTRACT[name].split()) <= declared_in(notebook).keys()
