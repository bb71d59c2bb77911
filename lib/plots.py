"""Figures. Every function returns a matplotlib Figure; patches are numbered row-major on a (rows, columns) grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lib.statistics import evenly, pareto

sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"figure.dpi": 100, "savefig.dpi": 150})
MARKERS = "osD^vPX<>"  # colours alone do not tell many methods apart
HEAT = "viridis"
VEIL, VEILED = np.array([200, 206, 214]), 0.82  # a dropped patch is this much of this light grey: seen on black too


def _grid(rows: int, columns: int, size: float = 1.6) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, size * rows + 0.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        sns.despine(ax=axis, left=True, bottom=True)
    return figure, axes


def spread(split: Any, count: int) -> np.ndarray:
    """`count` images (n, H, W, 3) spread evenly over a split, or all where it has fewer."""
    return split.images[evenly(len(split), count)]


def samples(split: Any, classes: Sequence[str], count: int = 16) -> Figure:
    """Images spread evenly over a split, with their classes; the foreground outlined where the split has masks."""
    chosen = evenly(len(split), count)
    columns = min(8, len(chosen))
    figure, axes = _grid(-(-len(chosen) // columns), columns)
    for axis, index in zip(axes.flat, chosen, strict=False):
        axis.imshow(split.images[index])
        axis.set_title(str(classes[split.labels[index]])[:14], fontsize=9)
        if split.masks is not None:
            axis.contour(split.masks[index], levels=[0.5], colors=["tab:orange"], linewidths=0.8)
    return figure


def training(history: list[dict], keep: str = "best") -> Figure:
    """Training loss and validation accuracy per epoch, the epoch whose weights were kept marked: best or last."""
    table = pd.DataFrame(history)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(table.epoch, table.train_loss, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="training loss (nats)")
    right.plot(table.epoch, table.val_top1, marker="o", markersize=3, color="C1")
    best = table.sort_values(["val_top1", "val_nll_nats"], ascending=[False, True]).iloc[0]
    kept = best if keep == "best" else table.iloc[-1]
    right.plot(kept.epoch, kept.val_top1, marker="*", markersize=14, color="C3", linestyle="", label="kept weights")
    right.set(xlabel="epoch", ylabel=f"validation accuracy (n={int(table.n_val.iloc[0])})")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.legend()
    for axis in (left, right):
        axis.set_xlim(0.5, len(table) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.despine(figure)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Share of each true class (rows, summing to one) predicted as each class (columns)."""
    share = np.asarray(matrix) / np.maximum(np.asarray(matrix).sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 20
    figure, axis = plt.subplots(figsize=(6.2, 5.2), layout="constrained")
    names = [str(name)[:16] for name in classes] if few else False
    sns.heatmap(share, vmin=0, vmax=1, cmap=HEAT, square=True, xticklabels=names, yticklabels=names, ax=axis,
                annot=share if few else None, fmt=".2f", annot_kws={"fontsize": 7},
                cbar_kws={"label": "share of the true class"})  # fmt: skip
    axis.set(xlabel="predicted class", ylabel="true class")
    return figure


def overlay(image: np.ndarray, kept: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """The image (H, W, 3) uint8 with every patch that is not kept veiled: what a pruned model gets to see."""
    shown = np.zeros(grid[0] * grid[1], dtype=bool)
    shown[np.asarray(kept, dtype=int)] = True
    clear = _upsampled(shown.reshape(grid), image)[..., None]
    return np.where(clear, image, (1 - VEILED) * image + VEILED * VEIL).astype(np.uint8)


def _upsampled(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Values on the patch grid, repeated to the image's pixels; pixels beyond the last whole patch repeat it."""
    sides = zip(image.shape[:2], values.shape, strict=True)
    rows, columns = (np.minimum(np.arange(n) // (n // g), g - 1) for n, g in sides)
    return values[rows[:, None], columns]


def kept_patches(
    images: np.ndarray, kept: dict[str, Any], grid: tuple[int, int], merged: dict[str, Any] | None = None
) -> Figure:
    """Images (n, H, W, 3) as rows of methods see them; kept: per name one set (K,) for all, or one per image; merged:
    per name, for each patch (n, P), the patch whose token it is part of."""
    merged = merged or {}
    if not kept and not merged:
        kept = {"all": np.arange(grid[0] * grid[1])}
    figure, axes = _grid(len(kept) + len(merged), len(images))
    for row, (name, sets) in zip(axes, {**kept, **merged}.items(), strict=True):
        each = [sets] * len(images) if np.ndim(sets[0]) == 0 else sets
        mean = np.mean([len({*np.asarray(one).tolist()}) for one in each])
        label = name.replace(" ", "\n", 1)  # method above setting
        row[0].set_ylabel(f"{label}\n{round(mean, 1):g} of {grid[0] * grid[1]}", fontsize=9)
        for axis, image, one in zip(row, images, each, strict=True):
            axis.imshow(mosaic(image, one, grid) if name in merged else overlay(image, one, grid))
    return figure


def mosaic(image: np.ndarray, sources: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """The image (H, W, 3) uint8, enlarged, with every merged group of patches in its mean colour, a line around each;
    a patch that was not merged stays as it is. sources: per patch (P,) the one whose token it is part of."""
    big = image.repeat(-(-200 // len(image)), axis=0).repeat(-(-200 // len(image)), axis=1)
    groups, patches = _upsampled(np.asarray(sources).reshape(grid), big), grid[0] * grid[1]
    pixels = np.maximum(1, np.bincount(groups.ravel(), minlength=patches))
    sums = [np.bincount(groups.ravel(), big[..., channel].ravel(), minlength=patches) for channel in range(3)]
    single = np.bincount(np.asarray(sources), minlength=patches)[groups] == 1
    shown = np.where(single[..., None], big, (np.stack(sums, axis=1) / pixels[:, None])[groups])
    edge = np.zeros(groups.shape, bool)
    edge[:-1] |= groups[:-1] != groups[1:]
    edge[:, :-1] |= groups[:, :-1] != groups[:, 1:]
    shown[edge] = VEIL
    return shown.astype(np.uint8)


def heat(values: np.ndarray, grid: tuple[int, int], images: np.ndarray, label: str) -> Figure:
    """A value per patch (P,): alone, and laid over example images (n, H, W, 3)."""
    figure, axes = _grid(1, len(images) + 1, size=2.0)
    field = np.asarray(values).reshape(grid)
    drawn = axes[0, 0].imshow(field, cmap=HEAT)
    axes[0, 0].set_title("all images", fontsize=10)
    for axis, image in zip(axes[0, 1:], images, strict=True):
        axis.imshow(image.mean(axis=-1), cmap="gray")
        axis.imshow(_upsampled(field, image), cmap=HEAT, alpha=0.55, vmin=field.min(), vmax=field.max())
    figure.colorbar(drawn, ax=list(axes[0]), label=label, shrink=0.8)
    return figure


def depth_maps(
    images: Any, depth: np.ndarray, sets: dict[str, np.ndarray], grid: tuple[int, int], blocks: int
) -> Figure:
    """Per name in `sets` the images (n, H, W, 3) of these indices, above how many blocks each of their patches ran in;
    depth (n, P)."""
    figure, axes = _grid(2 * len(sets), max(map(len, sets.values())))
    for rows, (name, indices) in zip(axes.reshape(len(sets), 2, -1), sets.items(), strict=True):
        rows[0, 0].set_ylabel(name)
        for (top, below), image, one in zip(rows.T, images[indices], np.asarray(depth)[indices], strict=False):
            top.imshow(image)
            below.set_xlabel(f"{one.mean():.1f} blocks", fontsize=9)
            drawn = below.imshow(one.reshape(grid), cmap=HEAT, vmin=1, vmax=blocks)
    figure.colorbar(drawn, ax=list(axes.flat), label="depth (blocks)", shrink=0.8)
    return figure


def halting_maps(images: np.ndarray, depth: np.ndarray, grid: tuple[int, int], blocks: int) -> Figure:
    """One row per image (n, H, W, 3) with its depth (n, P): five ways to see which patches ran how long."""
    figure, axes = _grid(len(images), 5, size=2.0)
    titles = ("image", "depth", "image × depth", "ran to the end", "what ran to the end")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for row, image, one in zip(axes, images, np.asarray(depth), strict=True):
        ended = one == one.max()  # the image ends with its longest-running patches
        row[0].imshow(image)
        drawn = row[1].imshow(_upsampled(one.reshape(grid), image), cmap=HEAT, vmin=1, vmax=blocks)
        row[2].imshow((image * (_upsampled(one.reshape(grid), image) / blocks)[..., None]).astype(np.uint8))
        row[3].imshow(_upsampled(ended.reshape(grid), image), cmap="gray", vmin=0, vmax=1.2)  # not white on white
        row[3].set_xlabel(f"{ended.sum()} of {ended.size}", fontsize=9)
        row[4].imshow(overlay(image, np.flatnonzero(ended), grid))
    figure.colorbar(drawn, ax=list(axes[:, :2].flat), label="depth (blocks)", shrink=0.8, location="left")
    return figure


def halting(depth: np.ndarray, tokens: np.ndarray, shares: np.ndarray, target: np.ndarray) -> Figure:
    """How long patches run: depth (n, P) as a histogram, tokens (n, L) left per block, and the halting distribution
    `shares` (L,) against its `target` (L,)."""
    depth, tokens, blocks = np.asarray(depth), np.asarray(tokens), np.arange(1, len(shares) + 1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    counted = np.bincount(depth.flatten(), minlength=len(shares) + 1)[1:] / depth.size
    left.bar(blocks, counted, color="C0")
    left.axvline(depth.mean(), color="k", linestyle="--", linewidth=1)
    left.set(xlabel="depth (blocks)", ylabel="share of the patches", title=f"mean depth {depth.mean():.2f}")
    middle.fill_between(blocks, *np.quantile(tokens, [0.1, 0.9], axis=0), alpha=0.25, label="8 of 10 images")
    middle.plot(blocks, tokens.mean(axis=0), marker="o", label="mean")
    middle.axhline(depth.shape[1], color="0.6", linestyle=":", label="dense")
    middle.set(xlabel="block", ylabel="patches that run", ylim=(0, None))
    middle.legend()
    right.bar(blocks, shares, color="C2", label="halting scores")
    right.plot(blocks, target, color="k", marker="o", markersize=4, label="target")
    right.set(xlabel="block", ylabel="share, summing to one")
    right.legend()
    for axis in (left, right):
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axis in (left, middle, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.despine(figure)
    return figure


def layers(values: np.ndarray, grid: tuple[int, int], label: str) -> Figure:
    """A value per block and patch (L, P): one map per block on one colour scale, and their mean."""
    values = np.asarray(values)
    maps = [*values, values.mean(axis=0)]
    columns = min(7, len(maps))
    figure, axes = _grid(-(-len(maps) // columns), columns, size=1.7)
    low, high = values.min(), values.max()
    for axis in axes.flat[len(maps) :]:
        axis.remove()
    for index, (axis, one) in enumerate(zip(axes.flat, maps, strict=False)):
        drawn = axis.imshow(one.reshape(grid), cmap=HEAT, vmin=low, vmax=high)
        axis.set_title("mean of blocks" if index == len(values) else f"block {index}", fontsize=10)
    figure.colorbar(drawn, ax=list(axes.flat[: len(maps)]), label=label, shrink=0.8)
    return figure


def nested_sets(scores: np.ndarray, grid: tuple[int, int], image: np.ndarray, ratios: Sequence[float]) -> Figure:
    """What stays of an image at each keep ratio when patches leave in the order of their scores (P,)."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    figure, axes = _grid(1, len(ratios), size=1.5)
    for axis, ratio in zip(axes[0], ratios, strict=True):
        axis.imshow(overlay(image, order[: max(1, int(ratio * len(order) + 1e-9))], grid))
        axis.set_title(f"keep {ratio:g}", fontsize=10)
    return figure


def count_histogram(counts: np.ndarray) -> Figure:
    """How unequally patches were selected: counts (P,), against the count that all would have at random."""
    counts = np.asarray(counts)
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    sns.histplot(x=counts, bins=24, ax=axis)
    axis.axvline(counts.mean(), color="k", linestyle="--", linewidth=1)
    axis.annotate(" if all were equal", (counts.mean(), axis.get_ylim()[1]), va="top", fontsize=10)
    axis.set(xlabel="selections of a patch (share of the images, summed over steps)", ylabel="patches")
    sns.despine(figure)
    return figure


def foreground(table: pd.DataFrame) -> Figure:
    """Share of the foreground kept against the share of patches kept: columns keep_ratio, recall, method."""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    palette = methods_palette(table.method)
    sns.lineplot(table, x="keep_ratio", y="recall", hue="method", palette=palette, marker="o", ax=axis)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="random on average")
    axis.set(xlabel="share of the patches kept", ylabel="share of the foreground kept", xlim=(0, 1), ylim=(0, 1.02))
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(PercentFormatter(1))
    axis.legend()
    sns.despine(figure)
    return figure


def methods_palette(methods: Sequence[str]) -> dict[str, Any]:
    """A colour per method, by alphabet, so that two figures of the same methods agree."""
    names = sorted({*methods})
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def methods_markers(methods: Sequence[str]) -> dict[str, str]:
    """A marker per method, by alphabet: of more than ten, two that share a colour have different ones."""
    return {method: MARKERS[i % len(MARKERS)] for i, method in enumerate(sorted({*methods}))}


def trade_off(summary: pd.DataFrame, cost: str, label: str, metric: str) -> Figure:
    """A metric against a cost, as compare.summary gives them: means over seeds, 95 % intervals, the front starred."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    palette, markers = methods_palette(summary.method), methods_markers(summary.method)
    for method, arms in summary.groupby("method"):
        arms = arms.sort_values(cost)
        half = arms["±"].astype(float)
        axis.errorbar(arms[cost], arms[metric], yerr=half, marker=markers[method], capsize=3, color=palette[method],
                      label=method)  # fmt: skip
    front = summary[pareto(summary, cost, metric)]
    star = {"marker": "*", "s": 190, "facecolor": "none", "edgecolor": "k", "zorder": 5, "label": "Pareto front"}
    axis.scatter(front[cost], front[metric], **star)
    axis.set(xlabel=label, ylabel=f"test {metric}, mean over seeds")
    axis.set_ylim(top=min(1.01, axis.get_ylim()[1]))  # an interval from two seeds may reach beyond what is possible
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside right upper", frameon=False)
    sns.despine(figure)
    return figure


def metrics(scores: dict[str, Any]) -> pd.DataFrame:
    """The single numbers among scores as a table to show."""
    return pd.DataFrame({"value": {k: v for k, v in scores.items() if isinstance(v, int | float)}}).round(4)


def at_costs(table: pd.DataFrame, by: str, dense: float, label: str) -> Figure:
    """Accuracy against cost, a line per value of column `by`; columns macs_g, top1, n (images) besides it. dense: the
    accuracy of the whole model; label: what accuracy it is."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    sns.lineplot(table, x="macs_g", y="top1", hue=by, palette=methods_palette({*table[by]}), marker="o", ax=axis)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.axhline(dense, color="0.6", linestyle=":", label="dense")
    axis.set(xlabel="GMACs per image", ylabel=f"{label} (n={table.n.iloc[0]})")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(fontsize=9)
    sns.despine(figure)
    return figure


def overlaps(table: pd.DataFrame) -> Figure:
    """How much methods agree on what to keep: intersection over union of each two kept sets."""
    figure, axis = plt.subplots(figsize=(1.2 + 0.8 * len(table), 0.9 + 0.7 * len(table)), layout="constrained")
    sns.heatmap(table, vmin=0, vmax=1, cmap=HEAT, annot=True, fmt=".2f", square=True, ax=axis,
                cbar_kws={"label": "overlap of kept patches (IoU)"})  # fmt: skip
    return figure


def varied(table: pd.DataFrame, split: str) -> Figure:
    """Accuracy against cost with one setting varied at a time: the rows of scans.vary, dense first."""
    dense, rows = table.iloc[0], table.iloc[1:]
    settings = list(rows.setting.unique())
    figure, axes = plt.subplots(1, len(settings), figsize=(4 * len(settings), 3.6), sharey=True, layout="constrained")
    for axis, setting in zip(np.atleast_1d(axes), settings, strict=True):
        part = rows[rows.setting == setting]
        colours = dict(zip(part.value.unique(), sns.color_palette("viridis", part.value.nunique()), strict=True))
        sns.lineplot(part, x="macs_g", y="top1", hue="value", palette=colours, marker="o", ax=axis)
        axis.axhline(dense.top1, color="0.6", linestyle=":", label="dense")
        axis.set(xlabel="GMACs per image", ylabel=f"accuracy on the {split} images (n={int(dense.n)})")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(title=setting, fontsize=8, title_fontsize=9)
    sns.despine(figure)
    return figure
