"""What takes part in a comparison, ready to be measured: the models of finished runs, and models given by path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from lib import data, evaluate, finished, models, starts
from lib.finished import CompareError
from lib.pruners.shrunk import Shrunk
from lib.pruners.tokens import TokenPruner
from lib.resnet import ResNet20
from lib.runs import Run, resolve, root, write_json

COUNTED = 256  # test images that multiply-adds are counted on where the work depends on the image


class Arms(NamedTuple):
    """table: what finished.runs returns, with the models given by path. models: one per arm, by its name. images: the
    dataset, normalised as all of them take it now."""

    table: pd.DataFrame
    models: dict[str, nn.Module]
    images: Any


class Arm(NamedTuple):
    """A model and what was saved with it: its data, pixel statistics and classes; {} where nothing was."""

    model: nn.Module
    about: dict[str, Any]


def collect(run: Run) -> Arms:
    """The arms that the parameters of compare.ipynb name: `runs`, `dataset`, `models`, `normalise`, `img_size`.

    A model given by path is measured on the test images; its predictions and scores lie below the run's folder, in
    given/<arm>. CompareError, one line: nothing found, a file that is no such model, one for other classes or images,
    two of one name. What is left out is printed with the reason.
    """
    table = _finished(run)
    images = _images(run, table)
    firsts = table.drop_duplicates("arm").itertuples()
    found = {row.arm: Arm(models.load(row.run), _about(row.run)) for row in firsts}
    given = []
    for spec in map(str, run.params["models"]):
        name, arm = _given(spec, images)
        if name in found:
            raise CompareError(f"models: two arms are named {name!r}: rename one's file or folder")
        found[name] = arm
        given.append(name)
    if all("mean" in arm.about for arm in found.values()):
        run.refuse("normalise", because="every model says what it was trained with")
    fed = {name: starts.as_fed(images, arm.about, run.params["normalise"]) for name, arm in found.items()}
    rows = [_measured(run, name, found[name].model, fed[name]) for name in given]
    images = next(iter(fed.values()))
    for name, arm in found.items():
        renormalise(arm.model, fed[name], images)
    parts = [part for part in (table, pd.DataFrame(rows)) if len(part)]
    return Arms(pd.concat(parts, ignore_index=True), {name: arm.model for name, arm in found.items()}, images)


def _finished(run: Run) -> pd.DataFrame:
    pattern = root() / Path(run.params["runs"]).expanduser()
    try:
        table, left_out = finished.runs(pattern, run.params["dataset"], run.params["metric"])
    except finished.NoRuns as error:
        if not run.params["models"]:
            raise
        print(f"{error}; comparing the given models alone")
        return pd.DataFrame(columns=["arm", "run"])
    print(f"{len(table)} runs on {table.dataset[0]}")
    print(*(f"left out {name}: {why}" for name, why in left_out.items()), sep="\n")
    return table


def _images(run: Run, table: pd.DataFrame) -> Any:
    """The data of the runs, or without runs that of the parameters."""
    if len(table):
        run.refuse("img_size", because="the runs bring their images")
        about = _about(table.run[0])
        images = starts.dataset(about)
        starts.unchanged(about, images)
        return images
    if not run.params["dataset"]:
        raise CompareError("dataset is empty, and no run says which images: expected a name or path")
    dataset, size = resolve(run.params["dataset"]), run.params["img_size"] or None
    return data.load(dataset, img_size=size, root=root() / "data")


def loaded(folders: Sequence[str], images: Any) -> dict[str, nn.Module]:
    """The models of runs, by folder, as they take pixels normalised by images.mean and .std."""
    found = {folder: models.load(folder) for folder in folders}
    for folder, model in found.items():
        about = _about(folder)
        renormalise(model, starts.as_fed(images, about, about["normalise"]), images)
    return found


def _about(path: str | Path) -> dict[str, Any]:
    return models.header(path)["metadata"]


def _given(spec: str, images: Any) -> tuple[str, Arm]:
    """The name of a given model as an arm, and the model: a run or saved model, or arch=file for a state dict."""
    arch, bare, file = spec.partition("=")
    bare = bare and not Path(resolve(spec)).exists()  # a path may hold "="
    path = Path(resolve(file if bare else spec))
    path = path / "model.safetensors" if path.is_dir() else path
    size, wanted = images.test.images.shape[1], len(images.classes)
    try:
        if bare:
            arm = Arm(models.create(arch, wanted, size, path).eval(), {})
        else:
            arm = Arm(models.load(path).float(), _about(path))  # whatever it was saved in: all are timed in fp32
        vit = getattr(arm.model, "vit", arm.model)
        if not isinstance(arm.model, Shrunk):  # takes images of any size
            models.match(vit, evaluate.image_shape(images))
    except models.ModelError as error:
        hint = "" if bare else " (a run, a saved model, or arch=file for a state dict)"
        raise CompareError(f"models: {error}{hint}") from error
    classes = _classes(path, vit) if bare else vit.num_classes
    if classes != wanted:
        raise CompareError(f"models: {path} tells {classes} classes apart: expected the {wanted} of {images.name}")
    if arm.about.get("classes", images.classes) != images.classes:
        raise CompareError(f"models: {path} was trained for other classes than those of {images.name}")
    return (finished.name_of(path.parent) if path.name == "model.safetensors" else path.stem), arm


def _classes(path: Path, vit: nn.Module) -> int:
    """How many classes the head in a state dict tells apart. models.create lets a head for other classes start at
    random: right for training, and meaningless when measured."""
    state = timm.models.load_state_dict(str(path), weights_only=True)
    state = checkpoint_filter_fn(state, vit) if isinstance(vit, VisionTransformer) else state.get("state_dict", state)
    return len(state["head.weight"])


def _measured(run: Run, name: str, model: nn.Module, images: Any) -> dict[str, Any]:
    """A row of finished.runs' table for a given model: what its folder below the run holds, read as a run's."""
    model.to(evaluate.device())
    sample = None
    if isinstance(model, TokenPruner):
        sample = evaluate.batch(images, COUNTED).to(evaluate.device())
    scores, predicted = evaluate.test(model, images, count_on=sample)
    about = {"method": finished.GIVEN, "dataset": images.name}
    write_json(run.dir / "given" / name / "metrics.json", about | scores)
    run.arrays(f"given/{name}/test", logits=predicted.logits, labels=predicted.labels)
    numbers = {key: value for key, value in scores.items() if isinstance(value, int | float)}
    row = {"run": str(run.dir / "given" / name), "arm": name, "seed": 0, "keep_ratio": np.nan, "trained": False}
    return row | about | numbers


@torch.no_grad()
def renormalise(model: nn.Module, own: Any, images: Any) -> None:
    """Let a ViT take pixels normalised by images.mean and .std that was trained with own.mean and .std: same logits.

    The patch embedding is linear, so the change goes into its weights, costs no time and holds for whatever looks at
    the model: W(ax + b) = (Wa)x + Wb with a = images.std / own.std, b = (images.mean − own.mean) / own.std.
    """
    if (own.mean, own.std) == (images.mean, images.std):
        return
    if isinstance(model, ResNet20):
        raise CompareError("a ResNet pads with zeros, which say another thing under other pixel statistics: compare it "
                           f"with models of its mean {own.mean} and std {own.std}")  # fmt: skip
    patches = getattr(model, "vit", model).patch_embed
    if hasattr(patches, "backbone"):
        raise CompareError("a hybrid's patches come from a network that is not linear: compare it with models of its "
                           f"mean {own.mean} and std {own.std}")  # fmt: skip
    embed = patches.proj
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)
        for values in (images.mean, images.std, own.mean, own.std)
    )
    weight = embed.weight.double().cpu()
    shift = (weight * (mean - own_mean) / own_std).sum(dim=(1, 2, 3))
    before = 0 if embed.bias is None else embed.bias.double().cpu()
    embed.bias = nn.Parameter((before + shift).to(embed.weight))
    embed.weight.copy_(weight * std / own_std)


def patch_grid(shown: Mapping[str, nn.Module]) -> tuple[int, int]:
    """The (rows, columns) of patches that the token pruners share; (1, 1) where there are none."""
    pruners = [model for model in shown.values() if isinstance(model, TokenPruner)]
    if not pruners:
        return 1, 1
    grids = {getattr(model, "vit", model).patch_embed.grid_size for model in pruners}
    if len(grids) != 1:
        raise CompareError(f"token pruners cut images into different grids {sorted(grids)}: compare those of one grid")
    return grids.pop()


def kept(shown: Mapping[str, nn.Module], images: np.ndarray, data: Any) -> dict[str, list[torch.Tensor]]:
    """Per token pruner that drops anything, the patches of each image (n, H, W, 3) that stayed to its end; what merges
    drops nothing, see `merged`.

    Its end is the last block that kept any of its patches: with A-ViT an image may leave before the last block.
    """
    x = evaluate.inputs(images, data)
    patches, found = int(np.prod(patch_grid(shown))), {}
    for name, model in shown.items():
        if isinstance(model, TokenPruner) and not hasattr(model, "sources"):
            kept = model.trace(x.to(next(model.parameters()).device)).kept
            stayed = [next(ids.cpu() for ids in reversed(each) if len(ids)) for each in zip(*kept, strict=True)]
            if any(len(ids) < patches for ids in stayed):
                found[name] = stayed
    return found


def merged(shown: Mapping[str, nn.Module], images: np.ndarray, data: Any) -> dict[str, torch.Tensor]:
    """Per token pruner that merges patches, for each patch (n, P) the one by whose token it goes in the last block."""
    x = evaluate.inputs(images, data)
    return {name: model.sources(x.to(next(model.parameters()).device))[-1].cpu()
            for name, model in shown.items() if hasattr(model, "sources")}  # fmt: skip
