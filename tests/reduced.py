"""A sweep made small: every stage of it, on 120 tiny images and with short training, in minutes instead of hours.

python tests/reduced.py sweeps/quick.yaml outputs/reduced > reduced.yaml
python tests/reduced.py --whole sweeps/quick.yaml outputs/elsewhere > moved.yaml     (only its output folder changes)
"""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib import params  # noqa: E402

SMALL = {  # of every notebook that declares them
    "batch_size": 16,
    "augment": "none",
    "epochs": 1,
    "num_train_epochs": 1,
    "effect_images": 0,
    "latency_batch": 8,
    "repeats": 3,
    "ceilings": [],
    "shares": [],
    "thresholds": [],
    "ratios": [],
}
OF = {  # of some
    "dense": {"epochs": 12},  # a training long enough to be stopped in its middle
    "acdc": {"group_size": 96, "threshold": 0.05, "analysis_batches": 1},
    "eap": {"analysis_batches": 1},
    "avit_visual": {"img_idxs": [0, 5], "extremes": 3},
    "merging": {"calibration_images": 16},
    "token_baselines": {"finetune_epochs": 1},
}


def tiny_images(path: Path) -> Path:
    """120 images of 48x48 pixels in the one-file format, with masks; the class can be read off their brightness."""
    rng, labels = np.random.default_rng(0), np.arange(120) % 4
    images = rng.integers(0, 40, (120, 48, 48, 3)) + 60 * labels[:, None, None, None]
    masks = np.zeros((120, 48, 48), dtype=bool)
    masks[:, 12:24, 12:30] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["images"], file["labels"], file["masks"] = images.astype(np.uint8), labels, masks
    return path


def moved(value: Any, old: str, new: str) -> Any:
    """A sweep with another output folder, also in the globs among its parameters."""
    if isinstance(value, dict):
        return {key: moved(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [moved(each, old, new) for each in value]
    return new + value[len(old) :] if isinstance(value, str) and f"{value}/".startswith(f"{old}/") else value


def whole(sweep: Path, out: Path) -> dict[str, Any]:
    """A sweep file's content with `out` as its output folder."""
    config = yaml.safe_load(sweep.read_text())
    return moved(config, config.get("output_dir", "outputs"), str(out)) | {"output_dir": str(out)}


def reduced(sweep: Path, out: Path, **top: Any) -> dict[str, Any]:
    """A sweep file's content with every stage small, runs in `out` and `top` (such as threads) on top of it.

    The first list that a stage varies keeps two values, the others one. Images are those of tiny.h5, written beside it.
    """
    images, config = str(tiny_images(out.parent / "tiny.h5").resolve()), whole(sweep, out)
    for stage in config["stages"]:
        declared = params.declared_in(ROOT / "notebooks" / f"{stage['notebook']}.ipynb")
        given, needs, kept = dict(stage.get("parameters") or {}), stage.get("needs") or {}, 2
        for name, value in given.items():
            if isinstance(value, list) and declared[name].type is not list:
                given[name], kept = value[:kept], 1
        given |= {name: value for name, value in SMALL.items() if name in declared}
        if "dataset" in declared and needs.keys() <= {"weights"}:  # other stages get it with the model they need
            given["dataset"] = images
            if "weights" in declared and "weights" not in needs and given.get("ckpt") != "scratch":
                given["weights"] = ""
        stage["parameters"] = given | OF.get(stage["notebook"], {})
    return config | top


if __name__ == "__main__":
    options = [each for each in sys.argv[1:] if each != "--whole"]
    if len(options) != 2:
        sys.exit("usage: python tests/reduced.py [--whole] SWEEP OUT")
    make = whole if "--whole" in sys.argv else reduced
    print(yaml.safe_dump(make(Path(options[0]), Path(options[1])), sort_keys=False), end="")
