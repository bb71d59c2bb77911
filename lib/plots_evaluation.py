"""Everything a comparison measured, in one figure: three prices of accuracy above, three views of every arm below."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from lib.compare import COSTS
from lib.plots import HEAT, methods_markers, methods_palette

PRICES = {  # the title and the label of each of compare.COSTS
    "latency": ("Accuracy against time", "ms per batch of {}"),
    "macs": ("Accuracy against multiply-adds", "GMACs per image"),
    "params": ("Accuracy against size", "parameters (10⁶)"),
}
FEW_CLASSES = 20  # more are shown as quantiles
WIDE = 30  # letters of an arm's name that are shown
LABEL = (0.4, 0.055)  # room for a name beside its point, as a share of the panel
LEAST_SPAN = 0.04  # of the metric: a panel must not make mountains of half a point


def results(measured: pd.DataFrame, metric: str) -> Figure:
    """The rows of compare.evaluation, 2 × 3 panels: the metric against time, multiply-adds and parameters with the
    Pareto fronts; confidence and calibration, accuracy per class, throughput, with a line per arm."""
    rows = measured.sort_values(["method", "macs_g"], ascending=[True, False], ignore_index=True)
    palette, height = methods_palette(rows.method), max(2.6, 0.21 * len(rows) + 1.2)
    markers = methods_markers(palette)
    figure = plt.figure(figsize=(15, 5.2 + height), layout="constrained")
    above, below = figure.subplots(2, 3, height_ratios=[4.6, height])
    for axis, (name, cost) in zip(above, COSTS.items(), strict=True):
        _trade_off(axis, rows, metric, cost, rows[f"pareto_{name}"], palette, markers)
        title, label = PRICES[name]
        axis.set(xlabel=label.format(int(rows.batch_size[0])), ylabel=f"test {metric}")
        axis.set_title(title, loc="left", weight="bold")
    _confidence(below[0], rows, palette)
    _classes(below[1], rows)
    _throughput(below[2], rows, palette)
    for axis, title in zip(below, ("Confidence and calibration", "Accuracy per class", "Speed"), strict=True):
        axis.set_title(title, loc="left", weight="bold")
        axis.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=[])
        axis.tick_params(axis="y", length=0)
    below[0].set_yticklabels([_short(arm) for arm in rows.arm], fontsize=9)
    shown = {"linestyle": "", "markersize": 9}
    handles = [Line2D([], [], color=palette[m], marker=markers[m], label=m, **shown) for m in palette]
    front = Line2D([], [], color="k", marker="*", markerfacecolor="none", linestyle=":", markersize=14)
    front.set_label("Pareto front")
    figure.legend(handles=[*handles, front], loc="outside upper center", ncols=min(8, len(handles) + 1), frameon=False)
    sns.despine(figure)
    return figure


def _short(arm: str) -> str:
    """An arm's name with its middle left out where it is long."""
    half = WIDE // 2
    return arm if len(arm) <= WIDE else f"{arm[:half]}…{arm[-half:]}"


def _trade_off(
    axis: Axes, rows: pd.DataFrame, metric: str, cost: str, front: pd.Series, palette: dict[str, Any], markers: dict
) -> None:
    for method, arms in rows.groupby("method"):
        axis.scatter(arms[cost], arms[metric], color=palette[method], marker=markers[method], s=45, zorder=3)
    best = rows[front].sort_values(cost)
    star = {"marker": "*", "markersize": 17, "markerfacecolor": "none", "color": "k", "linestyle": ":", "linewidth": 1}
    axis.plot(best[cost], best[metric], zorder=4, **star)
    if rows[cost].max() > 20 * rows[cost].min():
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(0, 1.1 * rows[cost].max())
    middle, span = (rows[metric].max() + rows[metric].min()) / 2, rows[metric].max() - rows[metric].min()
    reach = 0.6 * max(span, LEAST_SPAN)
    axis.set_ylim(middle - reach, middle + reach)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _name(axis, best, cost, metric)


def _name(axis: Axes, best: pd.DataFrame, cost: str, metric: str) -> None:
    """Names at the points of a front, the most accurate and the cheapest first, where there is room for them."""
    taken = []
    points = axis.transAxes.inverted().transform(axis.transData.transform(best[[cost, metric]].to_numpy(float)))
    for index in sorted(range(len(best)), key=lambda i: (i not in (0, len(best) - 1), -i)):
        x, y = points[index]
        left = x > 1 - LABEL[0]  # no room to the right
        corner = np.array([x - LABEL[0] if left else x, y])
        if all((abs(corner - other) > LABEL).any() for other in taken):
            taken.append(corner)
            offset, side = ((-7, -14), "right") if left else ((7, -14), "left")
            text = _short(best.arm.iloc[index])
            axis.annotate(
                text, best[[cost, metric]].iloc[index], offset, textcoords="offset points", ha=side, fontsize=9
            )


def _confidence(axis: Axes, rows: pd.DataFrame, palette: dict[str, Any]) -> None:
    y, colours = np.arange(len(rows)), [palette[method] for method in rows.method]
    axis.hlines(y, rows.confidence_incorrect, rows.confidence_correct, color=colours, linewidth=1.5)
    axis.scatter(rows.confidence_incorrect, y, marker="o", facecolor="w", edgecolor=colours, zorder=3)
    axis.scatter(rows.confidence_correct, y, marker="o", color=colours, zorder=3)
    axis.scatter(rows.top1, y, marker="|", s=90, color="k", zorder=4)
    for row, ece in zip(y, rows.ece, strict=True):
        axis.text(1.02, row, f"{ece:.3f}", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.text(1.02, 1.01, "ECE", transform=axis.transAxes, va="bottom", fontsize=9, weight="bold")
    axis.set(xlim=(0, 1.02), xlabel="mean confidence: ○ where wrong, ● where right; | accuracy")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _classes(axis: Axes, rows: pd.DataFrame) -> None:
    share = pd.DataFrame([*rows.per_class_accuracy]).astype(float)
    label = "classes"
    if share.shape[1] > FEW_CLASSES:
        label = f"quantiles of {share.shape[1]} classes"
        points = {"worst": 0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "best": 1}
        share = pd.DataFrame({name: share.quantile(q, axis=1) for name, q in points.items()})
    macro = {"P": rows.precision_macro, "R": rows.recall_macro, "F1": rows.f1_macro}
    gap = pd.DataFrame({" ": np.nan}, index=rows.index)
    table = pd.concat([share, gap, pd.DataFrame(macro)], axis=1)
    drawn = axis.imshow(table, cmap=HEAT, vmax=1, aspect="auto")
    names = {column: str(name)[:16] for column, name in enumerate(table) if name != " "}
    axis.set_xticks([*names], names.values(), fontsize=9, rotation=90 if max(map(len, names.values())) > 3 else 0)
    axis.set_xlabel(f"{label}; macro precision, recall, F1")
    if table.size <= 200:
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            bright = value > (1 + drawn.norm.vmin) / 2
            text = "" if np.isnan(value) else f"{100 * value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color="k" if bright else "w")
    axis.figure.colorbar(drawn, ax=axis, format=PercentFormatter(1, decimals=0), pad=0.01)


def _throughput(axis: Axes, rows: pd.DataFrame, palette: dict[str, Any]) -> None:
    y = np.arange(len(rows))
    bars = axis.barh(y, rows.throughput_ips, color=[palette[method] for method in rows.method])
    axis.bar_label(bars, [f"{speedup:.2f}×" for speedup in rows.speedup], padding=3, fontsize=9)
    axis.set(xlabel="images per second; speed, baseline = 1×", xlim=(0, 1.12 * rows.throughput_ips.max()))
