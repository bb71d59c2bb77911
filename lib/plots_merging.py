"""Figures of merging schedules. Every function returns a matplotlib Figure."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from lib.plots import methods_palette


def schedules(candidates: Sequence[dict[str, Any]]) -> Figure:
    """Tokens merged per block, the chosen candidate as bars, the others as lines, the darker the more images they saw;
    and the KL of each, where images saw them. Keys r, kl_nats, images, shape (bell, even, …); the chosen one first."""
    best, most = candidates[0], max(each["images"] for each in candidates)
    panels = 2 if most else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.4), layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    for each in candidates[1:]:
        left.plot(each["r"], color="0.3", alpha=0.15 + 0.5 * each["images"] / most, linewidth=1)
    left.bar(range(len(best["r"])), best["r"], color="C0", label="chosen")
    left.set(xlabel="block", ylabel="patches merged")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    sns.despine(figure)
    if not most:
        return figure
    table = pd.DataFrame(candidates)
    palette = methods_palette(sorted(table["shape"].unique()))
    sns.scatterplot(table, x="images", y="kl_nats", style="shape", hue="shape", palette=palette, s=60, ax=right)
    right.set(xlabel="images seen until it was dropped", ylabel="KL from the dense model (nats)", yscale="log")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.legend(frameon=False)
    return figure
