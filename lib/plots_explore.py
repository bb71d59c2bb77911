"""Figures of what methods do to one image, block by block. Every function returns a matplotlib Figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from lib.plots import VEIL, methods_palette, mosaic, overlay
from lib.statistics import evenly

SIDE = 120  # pixels of a picture
COLUMNS = 12  # pictures in a row; of deeper models as many blocks, spread evenly
KEPT = np.array([52, 101, 164])  # parts that stay


def strips(image: np.ndarray, grid: tuple[int, int], views: Sequence[Any], table: pd.DataFrame) -> Figure:
    """A row per view: the image, then a picture per block of what the method leaves of it.

    views: lib.explore.View; table: of lib.explore, dense first, for the titles. Patches that left are veiled, merged
    ones painted in their mean colour. Of methods that remove parts a picture shows a block's heads above its neurons,
    blue where they stay. One axes per row: a hundred would take a second to draw.
    """
    depth = len(views[0].tokens)
    chosen = evenly(depth, COLUMNS)
    gap, columns = SIDE // 12, len(chosen) + 1
    width, height = columns * (SIDE + gap) - gap, SIDE + 74
    figure = plt.figure(figsize=((width + 20) / 100, len(views) * height / 100))
    rows = table.iloc[1:].to_dict("records")
    for place, (view, row) in enumerate(zip(views, rows, strict=True)):
        pictures = [image, *(picture(view, image, grid, index) for index in chosen)]
        strip = np.full((SIDE, width, 3), 255, np.uint8)
        for column, one in enumerate(pictures):
            left = column * (SIDE + gap)
            strip[:, left : left + SIDE] = _sized(one)
        bottom = 1 - ((place + 1) * height - 48) / (len(views) * height)
        axis = figure.add_axes((10 / (width + 20), bottom, width / (width + 20), SIDE / (len(views) * height)))
        axis.imshow(strip, interpolation="none", aspect="auto")
        axis.set_title(_title(row), loc="left", fontsize=10, pad=5)
        captions = ["image", *(_caption(view, index) for index in chosen)]
        axis.set_xticks([SIDE / 2 + column * (SIDE + gap) for column in range(columns)], captions, fontsize=8)
        axis.set_yticks([])
        axis.tick_params(length=0, pad=2)
        sns.despine(ax=axis, left=True, bottom=True)
    return figure


def picture(view: Any, image: np.ndarray, grid: tuple[int, int], index: int) -> np.ndarray:
    """What a view (lib.explore.View) leaves of an image (H, W, 3), or of the model's parts, in a block: (h, w, 3)."""
    if view.plan is not None:
        return _parts(view.plan, view.whole, index)
    if view.sources is not None:
        sources = view.sources[index]
        there = sources >= 0  # of all patches that the model embeds
        whole = mosaic(image, np.where(there, sources, np.arange(len(sources))), grid)
        return overlay(whole, np.flatnonzero(there), grid)
    return overlay(image, view.kept[index], grid)


def _parts(plan: Any, whole: Any, index: int) -> np.ndarray:
    """Heads above neurons of a block, those that stay in blue: a column for each head, and for each 64th of the
    neurons, sorted."""
    shown = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for units, everything, top, columns in (
        (plan.heads[index], whole.heads[index], 0, len(whole.heads[index])),
        (range(len(plan.neurons[index])), whole.neurons[index], SIDE // 2 + 3, min(64, len(whole.neurons[index]))),
    ):
        ends = np.linspace(0, SIDE, max(1, columns) + 1).round().astype(int)
        stays = {unit * columns // max(1, len(everything)) for unit in units}
        for column in range(columns):
            colour = KEPT if column in stays else VEIL
            line = 2 * (columns < SIDE // 4)  # between heads
            shown[top : top + SIDE // 2 - 3, ends[column] : ends[column + 1] - line] = colour
    return shown


def _sized(picture: np.ndarray) -> np.ndarray:
    kind = Image.Resampling.NEAREST if len(picture) < SIDE else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), kind))


def _caption(view: Any, index: int) -> str:
    if view.plan is not None:
        heads, neurons = len(view.plan.heads[index]), len(view.plan.neurons[index])
        return f"block {index}\n{heads} of {len(view.whole.heads[index])} heads\n{neurons} neurons"
    return f"block {index}\n{view.tokens[index]} tokens"


def _title(row: dict[str, Any]) -> str:
    """A row of lib.explore.table in words, above its strip."""
    cost = f"{row['fewer_macs']:.2f}× fewer MACs, {row['speedup']:.2f}× as fast"
    return f"{row['method']} {row['strength']:g} answers {row['answer']!r}, {row['confidence']:.0%} sure · {cost}"


def price(views: dict[str, Sequence[Any]], dense: Any, answer: str) -> Figure:
    """How much is left of dense's confidence in its answer, against multiply-adds, a line per method; views:
    lib.explore.View by method; dense: one of the whole model."""
    best = int(dense.probabilities.argmax())
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    palette = methods_palette(views)
    for method, some in views.items():
        points = sorted((view.macs_g, view.probabilities[best]) for view in some)
        axis.plot(*zip(*points, strict=True), marker="o", label=method, color=palette[method])
    axis.plot(
        dense.macs_g, dense.probabilities[best], marker="*", markersize=14, color="k", linestyle="", label="dense"
    )
    axis.set(xlabel="GMACs for this image", ylabel=f"probability of {answer!r}", xlim=(0, None), ylim=(-0.02, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure
