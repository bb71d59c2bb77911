"""What every test needs: lib first, since it lets timm import beside any torchvision; and a tiny dataset and ViT."""

import lib  # noqa: F401  # isort: skip
import h5py
import nbformat
import numpy as np
import pytest
import torch

from lib import data, models, params, runs

torch.set_num_threads(1)

# 16 patches, dropout and stochastic depth on.
TINY = {"img_size": 12, "patch_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
DROPOUT = {"proj_drop_rate": 0.1, "drop_path_rate": 0.1}
DECLARED = 'seed: int = 0  # of order, in [0, 9]\noutput_dir: str = "outputs"\nrun_name: str = ""\nresume: bool = True'


def tiny_run(folder, **values) -> runs.Run:
    """A run in `folder` itself: folder/tiny/run."""
    declaration = params.declared(DECLARED)
    values = {"output_dir": str(folder), "run_name": "run", **values}
    return runs.Run("tiny", declaration, params.check(declaration, values))


def write_notebook(path, parameters: str, code: str):
    """A notebook of a parameters cell and a code cell."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, code)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def make_run(tmp_path):
    opened = []

    def make(**values):
        opened.append(tiny_run(tmp_path, **values))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


@pytest.fixture(scope="session")
def tiny_h5(tmp_path_factory):
    """24, 9 and 9 images of 12x12 pixels in three classes, which differ in brightness."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "tiny.h5"
    with h5py.File(path, "w") as file:
        for split, count in {"train": 24, "val": 9, "test": 9}.items():
            labels = np.arange(count) % 3
            noise = rng.integers(0, 100, (count, 12, 12, 3))
            file[f"{split}_images"] = (noise + 70 * labels[:, None, None, None]).astype(np.uint8)
            file[f"{split}_labels"] = labels
    return path


@pytest.fixture(scope="session")
def tiny(tiny_h5):
    return data.load(tiny_h5, root=tiny_h5.parent)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return models.create("vit_digits", 3, **TINY)
