"""Efficient Vision Transformers: what every notebook shares. See README.md for the map of the modules."""

import contextlib
import importlib.util
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

__version__ = "0.1.0"


class _HealTorchvision(MetaPathFinder):
    """Lets `import torchvision` (which timm needs) work beside a torch that its binary was not built for.

    A CUDA-built torchvision cannot load its C++ operators next to a CPU-only torch and then fails with
    "operator torchvision::nms does not exist", because its Python half registers shapes for operators that nobody
    declared. Nothing here calls these two detection operators, so declaring their signatures is enough. Looks only
    when torchvision is first imported, and leaves a pair of wheels alone that match, or that work all the same.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        if _built_for("torch") == _built_for("torchvision"):
            return
        import torch

        global _OPERATORS  # a Library undeclares its operators when it is garbage-collected
        with contextlib.suppress(OSError, ImportError):
            binary = importlib.util.find_spec("torchvision").submodule_search_locations[0]
            for file in Path(binary).glob("_C*"):
                torch.ops.load_library(str(file))
        if not hasattr(torch.ops.torchvision, "nms"):
            _OPERATORS = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _built_for(package: str) -> str:
    """The build tag in a package's version.py, such as cpu or cu130; empty where it has none."""
    found = importlib.util.find_spec(package)
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = version.read_text() if version and version.is_file() else ""
    match = re.search(r"__version__ = ['\"][^+'\"]*\+(\w+)", text)
    return match.group(1) if match else ""


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _HealTorchvision())
