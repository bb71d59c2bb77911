"""`import lib` beside matching, mismatched and missing torchvision wheels, played by stand-ins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH = """
from types import SimpleNamespace
class Library:
    def __init__(self, *names): self.defined = []
    def define(self, schema): self.defined.append(schema)
library = SimpleNamespace(Library=Library)
ops = SimpleNamespace(torchvision=SimpleNamespace())
def load(file): ops.torchvision.nms = file
def refuse(file): raise OSError("undefined symbol")
ops.load_library = refuse
"""


def import_lib(
    folder: Path, torch_tag: str, vision_tag: str, vision: str, then: str, torch: str = TORCH
) -> subprocess.CompletedProcess:
    """Import lib in a fresh process where torch and torchvision are stand-ins with these builds and this code."""
    for name, tag, code in (("torch", torch_tag, torch), ("torchvision", vision_tag, vision)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(code)
        (folder / name / "version.py").write_text(f"__version__ = '1.0{tag}'\n")
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-c", f"import sys, lib\nassert 'torch' not in sys.modules\n{then}"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=folder)


@pytest.mark.parametrize("tag", ["+cu130", "+cpu", ""])
def test_matching_wheels_are_left_alone(tmp_path, tag):
    then = "import torchvision\nassert 'torch' not in sys.modules and not hasattr(lib, '_OPERATORS')"
    result = import_lib(tmp_path, tag, tag, "", then)
    assert result.returncode == 0, result.stderr


def test_cuda_torchvision_beside_cpu_torch_is_healed(tmp_path):
    vision = "import lib\nif not hasattr(lib, '_OPERATORS'): raise RuntimeError('torchvision::nms does not exist')"
    then = (
        "import torchvision\nsignature = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'\n"
        "assert lib._OPERATORS.defined == ['nms' + signature, 'qnms' + signature], lib._OPERATORS.defined"
    )
    result = import_lib(tmp_path, "+cpu", "+cu130", vision, then)
    assert result.returncode == 0, result.stderr


def test_builds_that_differ_but_work_are_left_alone(tmp_path):
    torch, then = TORCH + "ops.load_library = load\n", "import torchvision\nassert not hasattr(lib, '_OPERATORS')"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "_C.so").touch()
    result = import_lib(tmp_path, "+cpu", "+cu130", "", then, torch)
    assert result.returncode == 0, result.stderr


def test_other_errors_are_not_swallowed(tmp_path):
    result = import_lib(tmp_path, "+cpu", "+cu130", "raise RuntimeError('something else')", "import torchvision")
    assert result.returncode != 0 and "something else" in result.stderr


def test_a_missing_torchvision_stays_missing():
    then = "sys.path_importer_cache.clear(); sys.path[:] = []; import torchvision"
    result = subprocess.run([sys.executable, "-c", f"import sys, lib; {then}"], capture_output=True, text=True)
    assert "No module named 'torchvision'" in result.stderr


def test_timm_imports_after_lib():
    result = subprocess.run([sys.executable, "-c", "import lib, timm"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
