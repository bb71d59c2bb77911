"""Where a method's notebook starts: a dense model with the data it was trained on, found, made or new."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo
from torch import nn

from lib import data, evaluate, models, runs

MAKING = ("dataset", "h5_dir", "labels_csv", "arch", "weights", "img_size", "normalise")  # of the run of dense.ipynb


class Start(NamedTuple):
    """path: of the model's run or file, "" where it does not come from one. vit: in evaluation mode, unless new.
    images: what lib.data.load returns, normalised. about: the metadata to save with every model that comes of it."""

    path: str
    vit: nn.Module
    images: Any
    about: dict[str, Any]


def dense(run: runs.Run, *of_trained: str, name: str = "ckpt") -> Start:
    """The dense model that the parameters of a notebook name, under the names of MAKING and `ckpt` (or another name).

    ckpt: a run's folder or a file; "" finds the run of dense.ipynb with the other parameters, or makes it; "scratch",
    under this name alone, takes random weights; bare weights of `arch`, a file or "pretrained", serve as they are
    (`published`). ParameterError where a parameter is set that would then do nothing; of_trained: parameters
    that want a trained model, as `weights` does.
    """
    params = {making: run.params[making] for making in MAKING if making in run.params}
    ckpt = run.params[name]
    if (name, ckpt) == ("ckpt", "scratch"):
        run.refuse("weights", *of_trained, because=f"{name} scratch has no trained model")
        return initial(run, weights="")
    if models.is_bare(runs.resolve(ckpt)):
        run.refuse("weights", because=f"{name} is what the model starts from")
        return published(run, ckpt)
    if ckpt:
        run.refuse(*params, because=f"{name} brings its own")
    params["dataset"] = params.pop("h5_dir", "") or params["dataset"]
    path = runs.resolve(ckpt) or str(runs.ensure("dense", run.params["output_dir"], **params))
    about = models.origin(path)
    return Start(path, models.load(path), load(about), about)


def initial(run: runs.Run, weights: str, **timm_kwargs: Any) -> Start:
    """A model that starts from `weights` (a file, a run, "pretrained", "": random), the rest as the parameters say; its
    path is that of a run alone.

    Images are normalised as `normalise` says; at its default weights of timm's hub, and of a run on the same images,
    get the statistics they came with.
    """
    params = {making: run.params[making] for making in MAKING if making in run.params}
    weights = runs.resolve(weights)
    size = params["img_size"] or None
    about = {"data": _source(params) | {"img_size": size}, "normalise": params["normalise"]}
    images = load(about)
    if len(images.classes) < 2:
        raise data.DataError(f"dataset {images.name} has one class, {images.classes[0]!r}: expected two or more")
    vit = models.create(params["arch"], len(images.classes), size, weights, **timm_kwargs)
    models.match(vit, evaluate.image_shape(images))
    ours = weights and not models.is_bare(weights)
    before = models.header(weights)["metadata"] if ours else {}
    if {name: runs.portable(value) for name, value in before.get("data", {}).items()} == about["data"]:
        unchanged(before, images)
    else:
        before = vit.pretrained_cfg if weights == "pretrained" else {}
    if "mean" in before and params["normalise"] == run.defaults["normalise"]:
        images = as_fed(images, before, params["normalise"])
    about |= {"classes": images.classes, "mean": images.mean, "std": images.std, "digest": images.digest}
    return Start(weights if ours and Path(weights).is_dir() else "", vit, images, about)


def published(run: runs.Run, weights: str) -> Start:
    """Weights of the parameters' `arch` as they are, for classes that their head knows: the dataset's or ImageNet-1k's.

    Of an ImageNet-1k head the rows of the dataset's classes stay, found by their WordNet ids. ModelError otherwise.
    Images are normalised as `normalise` says; at its default, weights of timm's hub get the statistics they came with.
    """
    params, synsets = run.params, ImageNetInfo("imagenet-1k").label_names()
    size = params["img_size"] or None
    source = {making: params[making] for making in MAKING if making in params}
    about = {"data": _source(source) | {"img_size": size}, "normalise": params["normalise"]}
    images, file = load(about), runs.resolve(weights)
    known = {*images.class_ids} <= {*synsets}
    try:
        vit = models.create(params["arch"], len(images.classes), size, file, fresh_head=False)
    except models.ModelError:
        if not known:
            raise
        vit = models.create(params["arch"], len(synsets), size, file, fresh_head=False)
    if known and vit.num_classes == len(synsets):
        vit = models.of_classes(vit, [synsets.index(wnid) for wnid in images.class_ids])
    elif vit.num_classes == len(synsets):
        print(f"{images.name} has 1,000 classes without WordNet ids: taken to be in ImageNet-1k's order")
    models.match(vit, evaluate.image_shape(images))
    if weights == "pretrained" and params["normalise"] == run.defaults["normalise"]:
        images = as_fed(images, vit.pretrained_cfg, params["normalise"])
    elif weights != "pretrained":
        print(
            f"{weights} does not say its pixel statistics: fed with mean {images.mean} and std {images.std} (normalise)"
        )
    about |= {"classes": images.classes, "mean": images.mean, "std": images.std, "digest": images.digest}
    return Start("", vit.eval(), images, about)


def load(about: dict[str, Any]) -> Any:
    """The data that a model's metadata names, as the model was fed it; DataError where other images are there now."""
    images = as_fed(dataset(about), about, about["normalise"])
    unchanged(about, images)
    return images


def dataset(about: dict[str, Any]) -> Any:
    """The data that a model's metadata names, as lib.data loads it; paths inside the project stand from its folder."""
    found = {name: runs.resolve(value) if isinstance(value, str) else value for name, value in about["data"].items()}
    return data.load(**found, root=runs.root() / "data")


def as_fed(images: Any, about: dict[str, Any], normalise: str) -> Any:
    """The images with the pixel statistics that a model's metadata names; by `normalise` where it names none."""
    if "mean" in about:
        return replace(images, mean=tuple(about["mean"]), std=tuple(about["std"]))
    return images.normalised(normalise)


def unchanged(about: dict[str, Any], images: Any) -> None:
    """DataError where a model was trained on other images than these: split anew, some would be tested on that it
    learnt from."""
    if about.get("digest", images.digest) != images.digest:
        raise data.DataError(f"dataset {images.name} holds other images than when this model was trained: put them "
                             "back, or train it anew (its notebook with resume: False)")  # fmt: skip


def _source(params: dict[str, Any]) -> dict[str, str | None]:
    named = params.get("h5_dir") or params["dataset"]
    return {"dataset": runs.portable(named), "labels_csv": runs.portable(params.get("labels_csv", "")) or None}
