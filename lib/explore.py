"""One image and what a method does with it, block by block, and what that costs: what explore.ipynb shows.

What depends neither on the image nor on a method's strength is computed once for a model and kept: which patches a
bandit selects, the scores of heads and neurons. A strength is in the method's own unit, see WHAT and `slider`.
"""

import io
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch import Tensor, nn

from lib import blocks, data, evaluate, models, runs, training_free
from lib.images import Split, decode, fit
from lib.pruners import acdc, baselines, components, eap, shrunk, surgery
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.tokens import TokenPruner
from lib.pruners.ucb import UCB

WHAT = {
    **dict.fromkeys(baselines.DROPPING, "share of the running patches that stay, in three blocks"),
    **dict.fromkeys(training_free.MERGING, "patches merged in every block, r"),
    "anchors": "share of the patches that stay, from block 1 on",
    "ucb": "share of the patches that are embedded at all",
    "avit": "centre of the halting gate: the lower, the earlier tokens halt",
    "eap": "share of the heads and of the neurons that stay",
    "acdc": "how much KL each part may cost, in nats",
}
METHODS = tuple(WHAT)
RATIOS = [round(1 - step / 20, 2) for step in range(19)]  # 1 to 0.1
THRESHOLDS = [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
IMAGENET = ImageNetInfo("imagenet-1k")
KINDS = {**baselines.DROPPING, **training_free.MERGING, "anchors": Anchors}
LOOKED_AT = 16  # images that decide which parts stay, or which patches do for all images
SEARCHED_ON = 4  # of them, by ACDC: it runs them once for every part that it tries


class ExploreError(ValueError):
    """A model, image or strength that cannot be shown: one line saying what was found and what was expected."""


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
        source = {"dataset": runs.resolve(dataset), "img_size": _side(found)} if dataset else about["data"]
        images = replace(_dataset(source), mean=tuple(about["mean"]), std=tuple(about["std"]))
        return Subject(model, found, images, about["classes"])
    vit = models.create(arch, IMAGENET.num_classes(), None, runs.resolve(file) or "pretrained", fresh_head=False)
    side = _side(vit)
    statistics = {name: tuple(vit.pretrained_cfg[name]) for name in ("mean", "std")}
    if dataset:
        images = replace(_dataset({"dataset": runs.resolve(dataset), "img_size": side}), **statistics)
    else:
        photos = np.stack([fit(photo, side) for photo in load_sample_images().images])
        images = SimpleNamespace(name="photographs", test=Split(photos, np.full(len(photos), -1)), **statistics)
    names = [IMAGENET.index_to_description(index).split(",")[0] for index in range(IMAGENET.num_classes())]
    return Subject(model, vit, images, names)


def _dataset(source: dict[str, Any]) -> data.Dataset:
    return data.load(**source, root=runs.root() / "data")


def _side(model: nn.Module) -> int:
    vit = getattr(model, "vit", model)
    blocks.check(vit)
    height, width = vit.patch_embed.img_size
    if height != width:
        raise ExploreError(f"the model takes images of {height}x{width} pixels: expected one of square images")
    return height


class Subject:
    """A model that is looked at, with the images it can be shown.

    name: what it was loaded by. vit: the dense model. size: (H, W) of its images. images: what lib.data.load returns,
    or anything with `test`, `mean` and `std`. classes: what its head tells apart.
    """

    def __init__(self, name: str, model: nn.Module, images: Any, classes: list[str]):
        self.name, self.model, self.images, self.classes = name, model.to(evaluate.device()).eval(), images, classes
        self.vit = getattr(self.model, "vit", self.model)
        self.size, self.grid = (_side(self.vit),) * 2, tuple(self.vit.patch_embed.grid_size)
        embed = self.vit.patch_embed
        self.patches = getattr(embed, "kept", torch.arange(embed.num_patches)).cpu().numpy()  # those it embeds
        self._known: dict[Any, Any] = {}

    def begins(self) -> tuple[str, float] | None:
        """The method and strength that the model was saved with, of a bandit half; None where it is dense."""
        if isinstance(self.model, AViT):
            return "avit", self._gate()["gate_center"]
        if isinstance(self.model, UCB):
            return "ucb", 0.5
        found = {kind: name for name, kind in KINDS.items()}.get(type(self.model))
        if found in training_free.MERGING:
            return found, fmean(self.model.rs)
        if found == "anchors":
            return found, (self.model.k + self.model.m) / self.model.patches
        return (found, float(np.mean(self.model.keep_ratio))) if found else None

    def slider(self, method: str) -> list[float]:
        """The strengths to choose from, the mildest first."""
        if method in training_free.MERGING:
            return list(range(3 * self.vit.patch_embed.num_patches // max(1, len(self.vit.blocks)) // 2 + 1))
        if method == "avit":
            centre = abs(self._gate()["gate_center"]) or 1.0
            return [round(centre * step / 10, 4) for step in range(14, -1, -1)]
        return THRESHOLDS if method == "acdc" else RATIOS

    def strength(self, method: str, wanted: float = -1.0) -> float:
        """A wanted strength, checked; -1: the one the model was saved with, or the middle of the slider."""
        if method not in WHAT:
            raise ExploreError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
        values, saved = self.slider(method), self.begins()
        if saved and saved[0] == method and wanted in (-1, saved[1]):  # be it outside the slider
            return saved[1]
        if wanted == -1:
            return values[len(values) // 2]
        low, high, whole = min(values), max(values), method in training_free.MERGING
        low = 1e-9 if values is RATIOS else low  # a share may be any
        if (method != "avit" and not low <= wanted <= high) or (whole and wanted != int(wanted)):
            unit = f"{WHAT[method]}, {min(values):g} to {max(values):g}"
            raise ExploreError(f"strength is {wanted:g}: expected for {method} the {unit}")
        return int(wanted) if whole else wanted

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
        model, plan = self._made(method, strength)
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

    def _made(self, method: str, strength: float) -> tuple[nn.Module, surgery.Plan | None]:
        """The model as the method makes it, sharing the weights of tokens' methods; the plan of what removes parts."""
        if method in KINDS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*nothing is pruned")  # as is meant at the mildest
                if type(self.model) is KINDS[method]:
                    return self._as_saved(strength).eval(), None
                return training_free.build(self.vit, self._rules(method, strength), method).eval(), None
        if method == "ucb":
            return self._once("ucb", self._counted).freeze(strength), None
        if method == "avit":
            return AViT(self.vit, **self._gate() | {"gate_center": strength}, mode="gather").eval(), None
        plan = self._plan(method, strength).explicit(self.vit) if method != "dense" else None
        return (surgery.remove(self.vit, plan) if plan else self.vit), plan

    def _as_saved(self, strength: float) -> nn.Module:
        """A method by the settings that it was saved with, but for the strength: a schedule in proportion."""
        method, saved = self.begins()
        if method in baselines.DROPPING:
            ratio = self.model.keep_ratio
            several = [min(1.0, each * strength / saved) for each in ratio] if isinstance(ratio, list) else strength
            settings = {"keep_ratio": several}
        if method in training_free.MERGING:
            settings = {"r": [round(each * strength / saved) if saved else int(strength) for each in self.model.rs]}
        if method == "anchors":
            share, kept = self.model.k / (self.model.k + self.model.m), round(strength * self.model.patches)
            settings = dict(zip(("k_anchors", "top_m"), training_free.parted(share, kept), strict=True))
        return type(self.model)(self.vit, **self.model.arguments | settings)

    def _rules(self, method: str, strength: float) -> dict[str, Any]:
        rules = {"blocks": [], "seed": 0, "alpha": 0.5, "start_block": 1, "normalise_scores": "minmax", "macs_g": 0.0}
        if method == "anchors":  # one anchor to five others, as token_baselines.ipynb has them
            k, m = training_free.parted(1 / 6, round(strength * self.vit.patch_embed.num_patches))
            return rules | {"k_anchors": k, "top_m": m}
        return rules | {"r" if method in training_free.MERGING else "keep_ratio": strength}

    def _gate(self) -> dict[str, float]:
        if not isinstance(self.model, AViT):
            return {"gate_scale": 0.5, "gate_center": 10.0}  # as avit.ipynb begins
        scale, centre = self.model.gate_log_factors.exp().tolist() if self.model.learn_gate else (1.0, 1.0)
        own = self.model.arguments
        found = {"gate_scale": scale * own["gate_scale"], "gate_center": centre * own["gate_center"]}
        return found | {"eps": own["eps"]}

    def _counted(self) -> UCB:
        """The bandit that the model was saved with, or one that has seen a few images: nothing is trained."""
        if isinstance(self.model, UCB):
            return self.model
        # counts the best half, as ucb_stage1.ipynb; new, so in training mode, where it counts, but for its blocks
        bandit = UCB(self.vit, keep_ratio=1.0)
        with torch.no_grad():
            for x, _ in self._looked_at():
                bandit(x)
        return bandit.eval()

    def _plan(self, method: str, strength: float) -> surgery.Plan:
        scores = self._once("eap", lambda: eap.scores(self.vit, self._looked_at()))
        if method == "eap":
            return eap.plan(scores, strength)
        values = self.slider(method)
        for value in values if strength in values else [strength]:  # all at once: from then on the slider moves freely
            self._once((method, value), partial(self._searched, scores, value))
        return self._known[method, strength]

    def _searched(self, scores: dict[str, Tensor], threshold: float) -> surgery.Plan:
        """ACDC's circuit on a few images, neurons in halves, what EAP says is needed untried: someone waits for it."""
        neurons = [surgery.sizes(block)[1] for block in self.vit.blocks]  # of a pruned model each has its own
        images, size = [x[:SEARCHED_ON] for x, _ in self._looked_at()], max([2, *neurons]) // 2
        needed = acdc.screen(scores, components.of(self.vit, size), threshold, "increment")
        return acdc.search(self.vit, images, threshold, rule="increment", group_size=size, keep=needed, progress=False)

    def _looked_at(self) -> list[tuple[Tensor, Tensor]]:
        split = "val" if len(getattr(self.images, "val", ())) else "test"
        found = [(x.to(evaluate.device()), y) for x, y in evaluate.batches(self.images, 1, LOOKED_AT, split=split)]
        return [(x if x.shape[-2:] == self.size else shrunk.resized(x, self.size), y) for x, y in found]

    def _once(self, name: Any, make: Any) -> Any:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


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
