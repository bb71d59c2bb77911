"""Figures of lottery pruning, state by state. Every function returns a matplotlib Figure.

`rows` are the states of a finished result of lib.tickets, in order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def states(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of every state's cut model before and after training, and what the model costs, the first state = 1."""
    table = pd.DataFrame(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    drawn = {"top1": ("cut and trained", "o", "-"), "uncut_top1": ("trained, not cut", "s", "--"),
             "before_top1": ("cut before training", "x", ":")}  # fmt: skip
    for name, (label, marker, line) in drawn.items():
        if name in table:
            left.plot(table.state, table[name], marker=marker, linestyle=line, label=label)
    left.set(xlabel="state", ylabel=f"test accuracy (n={table.n[0]})")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.legend(fontsize=9)
    costs = pd.DataFrame({
        "weights not zero": 1 - table.sparsity,
        "parameters": table.params_m / table.params_m[0],
        "multiply-adds": table.macs_g / table.macs_g[0],
        "measured time": table.speedup[0] / table.speedup,
    })  # fmt: skip
    for (name, values), marker in zip(costs.items(), "xs^o", strict=True):
        right.plot(table.state, values, marker=marker, label=name)
    right.set(xlabel="state", ylabel="first state = 1", ylim=(0, None))
    right.legend(fontsize=9)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.despine(figure)
    return figure


def alive(rows: Sequence[dict[str, Any]]) -> Figure:
    """Every head by the last state that it was part of, block by block; of neurons the share alive in every state.

    Only of what something was removed; heads where nothing was.
    """
    last, heads, neurons = len(rows) - 1, rows[0]["plan"]["heads"], rows[0]["plan"]["neurons"]
    panels = [name for name in ("heads", "neurons") if rows[-1]["plan"][name] != rows[0]["plan"][name]] or ["heads"]
    widths = [
        max(2.5, 0.45 * max(map(len, heads))) if name == "heads" else max(2.5, 0.6 * len(rows)) for name in panels
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(sum(widths) + 3, 0.32 * len(heads) + 1.6), squeeze=False,
                                width_ratios=widths, layout="constrained", sharey=True)  # fmt: skip
    for axis, name in zip(axes[0], panels, strict=True):
        if name == "heads":
            until = np.full((len(heads), max(map(len, heads))), np.nan)
            for row in rows:
                for block, kept in enumerate(row["plan"]["heads"]):
                    until[block, kept] = row["state"]
            colours = plt.get_cmap("viridis", last + 1)
            image = axis.imshow(
                until, cmap=colours, norm=BoundaryNorm(np.arange(last + 2) - 0.5, last + 1), aspect="auto"
            )
            figure.colorbar(image, ax=axis, label="last state", ticks=MaxNLocator(integer=True, nbins=10))
            axis.set(xlabel="head", xticks=range(until.shape[1]))
        else:
            share = np.array([[len(kept) / len(whole) if whole else np.nan for row in rows
                               for kept in [row["plan"]["neurons"][block]]]
                              for block, whole in enumerate(neurons)])  # fmt: skip
            image = axis.imshow(share, cmap="magma", vmin=0, vmax=1, aspect="auto")
            bar = figure.colorbar(image, ax=axis, label="neurons left", format=PercentFormatter(1, decimals=0))
            bar.outline.set_visible(False)
            axis.set(xlabel="state", xticks=range(0, len(rows), max(1, len(rows) // 10)))
        axis.set(ylabel="block", yticks=range(len(heads)))
        sns.despine(ax=axis, left=True, bottom=True)
    return figure


def weights(rows: Sequence[dict[str, Any]], edges: np.ndarray) -> Figure:
    """How large the weights are when each state is trained: those that stay, and those that are cut then."""
    shown = [rows[place] for place in sorted({*np.linspace(0, len(rows) - 1, min(6, len(rows))).round().astype(int)})]
    figure, axes = plt.subplots(len(shown), 1, figsize=(6, 0.8 * len(shown) + 1.2), sharex=True, layout="constrained",
                                squeeze=False)  # fmt: skip
    colours = {"stay": sns.color_palette()[0], "leave": sns.color_palette()[3]}
    used = np.sum([counts for row in shown for counts in row["weights"].values()], axis=0).nonzero()[0]
    middle, total = (edges[1:] + edges[:-1]) / 2, max(sum(map(sum, row["weights"].values())) for row in shown)
    for axis, row in zip(axes[:, 0], shown, strict=True):
        for what, counts in row["weights"].items():
            if any(counts):
                axis.fill_between(middle, np.array(counts) / total, step="mid", alpha=0.6, color=colours[what],
                                  label={"stay": "stays", "leave": "is cut"}[what])  # fmt: skip
        axis.set(yticks=[], ylabel=f"state {row['state']}")
        axis.yaxis.label.set(rotation=0, ha="right", va="center")
    handles = {
        label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0, 0].legend(handles.values(), handles.keys(), fontsize=9, loc="upper left")
    axes[-1, 0].set(xlabel="size of the weight", xlim=(edges[used[0]], edges[used[-1] + 1]))
    axes[-1, 0].xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
    sns.despine(figure, left=True)
    return figure


def driven_out(rows: Sequence[dict[str, Any]], file: Path, bound: float) -> Figure:
    """λ and the norm ratio of what is on its way out, from the start of each state and after each of its epochs.

    file: the run's metrics.jsonl. bound: of the norm ratio, below which cutting is harmless.
    """
    table = pd.read_json(file, lines=True)
    table["at"] = np.arange(1, len(table) + 1)
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, layout="constrained")
    for row in rows:
        if row.get("norm_ratio_before") is not None:
            epochs = table[table.state == row["state"]]
            at = [epochs["at"].min() - 1, *epochs["at"]]
            colour = sns.color_palette("viridis", len(rows))[row["state"]]
            above.plot(at, [0, *epochs["lambda"]], marker=".", color=colour, label=f"state {row['state']}")
            ratios = np.clip([row["norm_ratio_before"], *epochs.norm_ratio.astype(float)], 1e-12, None)
            below.plot(at, ratios, marker=".", color=colour)
    below.axhline(bound, color="0.5", linestyle="--", linewidth=1)
    below.annotate("cutting is harmless below", (1, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                   fontsize=8, color="0.3")  # fmt: skip
    above.set(ylabel="λ")
    below.set(yscale="log", ylabel="norm, cut / kept", xlabel="epoch, all states", xlim=(0, len(table)))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(rows) <= 9:
        above.legend(fontsize=8)
    else:
        colours = ScalarMappable(Normalize(0, len(rows) - 1), "viridis")
        figure.colorbar(colours, ax=[above, below], label="state", ticks=MaxNLocator(integer=True, nbins=10))
    sns.despine(figure)
    return figure
