"""Efficient Vision Transformers: what every notebook shares. See README.md for the map of the modules."""

import importlib.util
import re
from pathlib import Path

__version__ = "0.1.0"


def _heal_torchvision() -> None:
    """Let `import torchvision` (which timm needs) work beside a torch that its binary was not built for.

    A CUDA-built torchvision cannot load its C++ operators next to a CPU-only torch and then fails with
    "operator torchvision::nms does not exist", because its Python half registers shapes for operators that nobody
    declared. Nothing here calls these two detection operators, so declaring their signatures is enough. A matching
    pair of wheels is recognised without importing either, and left alone.
    """
    if _built_for("torch") == _built_for("torchvision"):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        global _OPERATORS  # a Library undeclares its operators when it is garbage-collected
        _OPERATORS = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:  # not installed: timm will say so where it matters
        pass


def _built_for(package: str) -> str:
    """The build tag in a package's version.py, such as cpu or cu130; empty where it has none."""
    found = importlib.util.find_spec(package)
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = version.read_text() if version and version.is_file() else ""
    match = re.search(r"__version__ = ['\"][^+'\"]*\+(\w+)", text)
    return match.group(1) if match else ""


_heal_torchvision()
