"""Every method on one model at any strength, without training: what the explorer's sliders set.

A strength is in the method's own unit, see WHAT and `Methods.slider`. What does not depend on it is computed once for a
model and kept: which patches a bandit selects, the scores of heads and neurons.
"""

import warnings
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import blocks, evaluate, training_free
from lib.pruners import acdc, baselines, components, eap, shrunk, surgery
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.ucb import UCB

WHAT = {
    **dict.fromkeys(baselines.DROPPING, "share of the running patches that stay, in three blocks"),
    **dict.fromkeys(training_free.MERGING, "patches merged per block, r"),
    "anchors": "share of the patches that stay, from block 1 on",
    "ucb": "share of the patches that are embedded at all",
    "avit": "centre of the halting gate: the lower, the earlier tokens halt",
    "eap": "share of the heads and of the neurons that stay",
    "acdc": "how much KL each part may cost, in nats",
}
METHODS = tuple(WHAT)
RATIOS = [round(1 - step / 20, 2) for step in range(19)]  # 1 to 0.1
THRESHOLDS = [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
KINDS = {**baselines.DROPPING, **training_free.MERGING, "anchors": Anchors}
LOOKED_AT = 16  # images that decide which parts stay, or which patches do for all images
SEARCHED_ON = 4  # of them, by ACDC: it runs them once for every part that it tries


class ExploreError(ValueError):
    """A model, image or strength that cannot be shown: one line saying what was found and what was expected."""


def side_of(model: nn.Module) -> int:
    """Pixels along the images that a model takes; ExploreError where they are not square."""
    vit = getattr(model, "vit", model)
    blocks.check(vit)
    height, width = vit.patch_embed.img_size
    if height != width:
        raise ExploreError(f"the model takes images of {height}x{width} pixels: expected one of square images")
    return height


class Methods:
    """A model and what any method makes of it.

    vit: the dense model. size: (H, W) of its images. images: what lib.data.load returns, or anything with `test`,
    `mean` and `std`; some of them decide where a method looks beyond the one image.
    """

    def __init__(self, model: nn.Module, images: Any):
        self.model, self.images = model.to(evaluate.device()).eval(), images
        self.vit = getattr(self.model, "vit", self.model)
        self.size = (side_of(self.vit),) * 2
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

    def made(self, method: str, strength: float) -> tuple[nn.Module, surgery.Plan | None]:
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
