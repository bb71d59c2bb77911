"""Figures of a ViT's parts: which are kept, what removing them does. Every function returns a matplotlib Figure."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure

from lib.plots import HEAT, methods_palette

WHOLES = ("block", "attn", "mlp")
GONE = "#c8ced6"
SORTED = 40  # more cells in a row than this are sorted: single ones cannot be told apart


def parts_map(found: Iterable[tuple[Any, float, bool]], label: str, *, log: bool = True) -> Figure:
    """Every part of a ViT as a cell, blocks from top to bottom: coloured by its value where it stays, grey where it is
    removed, white where there is no such part. More than 40 parts in a row are sorted, those that stay first.

    found: (part, value, removed) with part a lib.pruners.components.Component; label: what the values are.
    """
    cells = {kind: [] for kind in (*WHOLES, "head", "neuron")}
    for part, value, removed in found:
        cells[part.kind].append((part.block, part.units, value, removed))
    depth = 1 + max(block for rows in cells.values() for block, *_ in rows)
    wholes = [kind for kind in WHOLES if cells[kind]]
    panels = {"whole": wholes} if wholes else {}
    panels |= {kind: sorted({units[0] for _, units, *_ in cells[kind]}) for kind in ("head", "neuron") if cells[kind]}
    size = max((len(units) for _, units, *_ in cells["neuron"]), default=1)
    kept = [value for rows in cells.values() for *_, value, removed in rows if not removed and value > 0]
    norm = LogNorm(min(kept), max(kept)) if log and kept else Normalize(0, max(kept, default=1))
    widths = [min(8, max(2, 0.45 * len(columns))) for columns in panels.values()]
    figure, axes = plt.subplots(1, len(panels), figsize=(sum(widths) + 2, 0.32 * depth + 1.8), squeeze=False,
                                width_ratios=widths, layout="constrained", sharey=True)  # fmt: skip
    for axis, (name, columns) in zip(axes[0], panels.items(), strict=True):
        rows = [[] for _ in range(depth)]
        for kind in columns if name == "whole" else [name]:
            for block, units, value, removed in cells[kind]:
                place = columns.index(kind if name == "whole" else units[0])
                colour = to_rgba(GONE) if removed else plt.colormaps[HEAT](norm(max(value, norm.vmin)))
                rows[block].append((place, colour, (removed, -value)))
        picture = np.ones((depth, len(columns), 4))
        for block, row in enumerate(rows):
            if len(columns) > SORTED:
                row = [(place, *rest) for place, (_, *rest) in enumerate(sorted(row, key=lambda cell: cell[2]))]
            for place, colour, _ in row:
                picture[block, place] = colour
        axis.imshow(picture, aspect="auto", interpolation="none")
        _cell_labels(axis, name, columns, depth, size)
    drawn = plt.cm.ScalarMappable(norm, HEAT)
    figure.colorbar(drawn, ax=list(axes[0]), label=label, shrink=0.9)
    axes[0, 0].set_ylabel("block")
    figure.suptitle("grey: removed", fontsize=10)
    return figure


def _cell_labels(axis: plt.Axes, name: str, columns: Sequence[Any], depth: int, size: int) -> None:
    axis.set_yticks(range(depth))
    if name == "whole":
        axis.set_xticks(range(len(columns)), ["all" if kind == "block" else kind for kind in columns])
        axis.set_xlabel("whole sublayer")
    elif name == "head":
        axis.set_xticks(range(len(columns)), columns)
        axis.set_xlabel("head")
    else:
        few, many = max(1, len(columns) // 6), len(columns) > SORTED
        axis.set_xticks(range(0, len(columns), few), columns[::few])
        axis.set_xlabel(f"hidden neurons{f', {size} per cell' * (size > 1)}{', sorted' * many}")
    if len(columns) <= SORTED:
        axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(depth + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="w", linewidth=1)
    axis.tick_params(which="minor", length=0)
    sns.despine(ax=axis, left=True, bottom=True)


def kl_path(decisions: Sequence[Any], threshold: float, rule: str) -> Figure:
    """KL as parts go, late to early: that of all removed so far, and what each part tried would have made of it.

    decisions: lib.pruners.acdc.Decision. KLs of parts that stay may be lower bounds: trying them ended early.
    """
    table = pd.DataFrame({"kind": each.part.kind, "block": each.part.block, "removed": each.removed, "kl": each.kl,
                          "so_far": each.so_far} for each in decisions)  # fmt: skip
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    steps = np.arange(1, len(table) + 1)
    axis.step(steps, table.so_far, where="post", color="k", label="removed so far")
    palette = methods_palette(table.kind)
    for kind, rows in table.groupby("kind"):
        for removed, marker in ((True, "o"), (False, "x")):
            chosen = rows[rows.removed == removed]
            label = f"{kind} {'removed' if removed else 'stays'} ({len(chosen)})"
            if len(chosen):
                axis.scatter(steps[chosen.index], chosen.kl, marker=marker, s=22, color=palette[kind], label=label)
    if rule == "absolute" and threshold:
        axis.axhline(threshold, color="0.5", linestyle="--", linewidth=1)
        axis.annotate("τ", (len(table), threshold), va="bottom", ha="right", color="0.3")
    positive = table.kl[table.kl > 0]
    axis.set_yscale("symlog", linthresh=max(float(positive.quantile(0.1)), 1e-6) if len(positive) else 1e-6)
    axis.set(xlabel="parts tried, last block first", ylabel="KL from the clean model (nats)", ylim=(0, None))
    axis.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    sns.despine(figure)
    return figure


def score_effect(table: pd.DataFrame, label: str) -> Figure:
    """Estimated against true effect, both without sign on logarithmic axes: columns kind, score, effect (nats)."""
    figure, axis = plt.subplots(figsize=(5.4, 4), layout="constrained")
    shown = table.assign(score=table.score.abs()).query("score > 0 and effect > 0")
    for kind, rows in shown.groupby("kind"):
        rank = rows.score.corr(rows.effect, method="spearman")
        name = f"{kind} (n={len(rows)}, ρ={rank:.2f})"
        axis.scatter(rows.score, rows.effect, s=18, alpha=0.8, color=methods_palette(table.kind)[kind], label=name)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="KL when removed alone (nats)")
    axis.legend(fontsize=9)
    sns.despine(figure)
    return figure
