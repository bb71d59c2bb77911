"""One image and what a method does with it, block by block, and what that costs: what explore.ipynb shows."""

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch import Tensor, nn

from lib import evaluate, models, runs, starts
from lib.images import Split, decode, fit
from lib.pruners import surgery
from lib.pruners.avit import AViT
from lib.pruners.tokens import TokenPruner
from lib.strengths import ExploreError, Methods, side_of

IMAGENET = ImageNetInfo("imagenet-1k")


class View(NamedTuple):
    """What a method of one strength does with one image.

    kept: per block the patches (k,) that it ran, ascending.
    sources: per block, for each patch (P,), the one whose token it is part of, -1 where the model never embeds it; None
        where nothing merges.
    tokens: per block, prefix tokens included.
    plan: the heads and neurons that stay, of all in `whole`, both explicit; None for methods that drop tokens.
    probabilities: (classes,). macs_g: counted, for this image. speedup: of this image alone, in turns with dense, and
        latency_ms, which follows from it and the time of dense.
    """

    method: str
    strength: float
    kept: list[np.ndarray]
    sources: list[np.ndarray] | None
    tokens: list[int]
    plan: surgery.Plan | None
    whole: surgery.Plan | None
    probabilities: np.ndarray
    macs_g: float
    latency_ms: float
    speedup: float


def load(model: str, dataset: str = "") -> "Subject":
    """A run, a saved model, or a timm ViT: `arch` with weights of timm's hub, `arch=file` with those of a state dict.

    dataset: a name or path of images to show; "" takes those the model was trained on, for a timm ViT two photographs.
    ExploreError, ModelError, DataError or UnsupportedBlock where there is no such model, or it cannot be shown.
    """
    path, (arch, _, file) = Path(runs.resolve(model)), model.partition("=")
    if path.exists():
        found, about = models.load(path).float(), models.header(path)["metadata"]
        if "data" not in about:
            raise ExploreError(f"model {model} does not say what it was trained on: expected that of a notebook's run")
        source = {"dataset": dataset, "img_size": side_of(found)} if dataset else about["data"]
        images = replace(starts.dataset({"data": source}), mean=tuple(about["mean"]), std=tuple(about["std"]))
        return Subject(model, found, images, about["classes"])
    vit = models.create(arch, IMAGENET.num_classes(), None, runs.resolve(file) or "pretrained", fresh_head=False)
    side = side_of(vit)
    statistics = {name: tuple(vit.pretrained_cfg[name]) for name in ("mean", "std")}
    if dataset:
        images = replace(starts.dataset({"data": {"dataset": dataset, "img_size": side}}), **statistics)
    else:
        photos = np.stack([fit(photo, side) for photo in load_sample_images().images])
        images = SimpleNamespace(name="photographs", test=Split(photos, np.full(len(photos), -1)), **statistics)
    names = [IMAGENET.index_to_description(index).split(",")[0] for index in range(IMAGENET.num_classes())]
    return Subject(model, vit, images, names)


class Subject(Methods):
    """A model that is looked at, with the images it can be shown.

    name: what it was loaded by. classes: what its head tells apart; the others as for Methods. What was shown once is
    kept.
    """

    def __init__(self, name: str, model: nn.Module, images: Any, classes: list[str]):
        super().__init__(model, images)
        self.name, self.classes = name, classes
        embed = self.vit.patch_embed
        self.grid = tuple(embed.grid_size)
        self.patches = getattr(embed, "kept", torch.arange(embed.num_patches)).cpu().numpy()  # those it embeds

    def image(self, which: str | bytes) -> np.ndarray:
        """An image (H, W, 3) uint8 as large as the model takes it: a test image by its number, a file, or its bytes."""
        if isinstance(which, bytes):
            return fit(decode(io.BytesIO(which), "the upload"), self.size[0])
        if (path := Path(runs.resolve(which))).is_file():
            return fit(decode(str(path), str(path)), self.size[0])
        test = self.images.test
        if not which.isdecimal() or int(which) >= len(test):
            raise ExploreError(
                f"image is {which!r}: expected a file, or the number of a test image, 0 to {len(test) - 1}"
            )
        return fit(np.asarray(test.images[int(which)]), self.size[0])

    def inputs(self, image: np.ndarray) -> Tensor:
        """An image (H, W, 3) uint8 as the model is fed it: (1, 3, H, W)."""
        return evaluate.inputs(image[None], self.images).to(evaluate.device())

    def look(self, image: np.ndarray, method: str, strength: float) -> View:
        """What a method, or "dense", does with an image (H, W, 3) uint8 of the model's size."""
        key = ("view", hash(image.tobytes()), method, strength)
        return self._once(key, lambda: self._look(image, method, strength))

    def _look(self, image: np.ndarray, method: str, strength: float) -> View:
        x = self.inputs(image)
        model, plan = self.made(method, strength)
        pruner = model if isinstance(model, TokenPruner) else TokenPruner(model)
        if hasattr(model, "sources"):  # what merges: both from one run
            with torch.inference_mode():
                logits, record = model.run(x)
            kept = [model.original(ids[0]).sort().values.cpu().numpy() for ids, _ in record]
            sources = [self._on_grid(model.original(each[0])) for _, each in record]
        else:
            trace, sources = pruner.trace(x), None
            logits, kept = trace.logits, [ids[0].cpu().numpy() for ids in trace.kept]
            kept = [self.patches] * len(self.vit.blocks) if plan else kept  # whole blocks may be gone
        speedup = self._speedup(x, model) if model is not self.vit else 1.0
        if hasattr(model, "counts"):  # a token that EViT has fused is no patch
            counts = model.counts()[1]
        else:
            halting = isinstance(model, AViT)  # prefix tokens, too
            counts = model.tokens(x)[:, 0].tolist() if halting else [len(ids) + pruner.prefix for ids in kept]
        shares = logits[0].double().softmax(0).cpu().numpy()
        whole = surgery.Plan().explicit(self.vit) if plan else None
        cost = evaluate.macs(model, x)["macs_g"], self._dense_ms(x) / speedup, speedup
        return View(method, strength, kept, sources, counts, plan, whole, shares, *cost)

    def _dense_ms(self, x: Tensor) -> float:
        return self._once("dense_ms", lambda: evaluate.latency({"dense": self.vit}, x, repeats=9).latency_ms[0])

    def _speedup(self, x: Tensor, model: nn.Module) -> float:
        """In turns with dense, over as many rounds as that takes for a twentieth of a second, but three at least: a
        slider moves, and small models still have a steady median."""
        rounds = min(30, max(3, int(50 / self._dense_ms(x))))
        return evaluate.latency({"dense": self.vit, "": model}, x, repeats=rounds, warmup=0).speedup.iloc[-1]

    def _on_grid(self, sources: Tensor) -> np.ndarray:
        found = np.full(self.grid[0] * self.grid[1], -1)
        found[self.patches] = sources.cpu()
        return found


def spread(subject: Subject, image: np.ndarray, method: str, strength: float, count: int = 5) -> list[View]:
    """What a method does with an image at `count` strengths spread over its slider, and at the given one, if others."""
    values = subject.slider(method)
    chosen = {values[index] for index in evaluate.evenly(len(values), count)} | {strength}
    return [subject.look(image, method, value) for value in sorted(chosen, reverse=values[0] > values[-1])]


def table(subject: Subject, image: np.ndarray, views: Iterable[View]) -> pd.DataFrame:
    """What the dense model and views of an image say and cost, a row each.

    method, strength; answer and confidence in it; dense_answer, the probability of what dense answers; tokens after the
    last block; macs_g, and fewer_macs, those of dense divided by them; latency_ms and speedup.
    """
    dense = subject.look(image, "dense", 0.0)
    answer = int(dense.probabilities.argmax())
    return pd.DataFrame([
        {"method": view.method, "strength": None if view is dense else view.strength,
         "answer": subject.classes[view.probabilities.argmax()], "confidence": float(view.probabilities.max()),
         "dense_answer": float(view.probabilities[answer]), "tokens": view.tokens[-1], "macs_g": view.macs_g,
         "fewer_macs": dense.macs_g / view.macs_g, "latency_ms": view.latency_ms, "speedup": view.speedup}
        for view in (dense, *views)
    ])  # fmt: skip
