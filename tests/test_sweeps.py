"""Sweep files: every one expands to runs whose parameters their notebooks accept, before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lib import params

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = [path for path in sorted((ROOT / "sweeps").glob("*.yaml")) if "stages" in yaml.safe_load(path.read_text())]
PARAMETER_FILES = sorted({*(ROOT / "sweeps").glob("*.yaml")} - {*SWEEPS})


def dry_run(sweep: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--nolock", "--configfile", str(sweep)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


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
