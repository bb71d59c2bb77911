"""Fair comparison: Pareto fronts, paired tests on the same images, intervals over seeds, and where tokens went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def pareto(table: DataFrame, cost: str, value: str, *, group: str | Sequence[str] | None = None) -> Series:
    """True for each row that no other row (of its group) beats: cost ≤ and value ≥, one of them strictly.

    Equal rows are all kept; a row with NaN in either column is on no front. The index is the table's.
    """
    import pandas as pd

    part = 0 if group is None else table.groupby(group, dropna=False).ngroup().to_numpy()
    columns = {"cost": table[cost].to_numpy(float), "value": table[value].to_numpy(float), "part": part}
    rows = pd.DataFrame(columns, index=range(len(table)))
    on_front = pd.Series(False, index=rows.index)
    for _, mates in rows.dropna().groupby("part"):
        best = mates.groupby("cost")["value"].max()  # by rising cost
        front = best[~(best <= best.cummax().shift())]
        on_front[mates.index] = mates["value"] == mates["cost"].map(front)
    return on_front.set_axis(table.index)


def hypervolume(table: DataFrame, cost: str, value: str, reference: tuple[float, float]) -> float:
    """The area (cost unit × value unit) between the front and the reference (largest cost, least value).

    Rows beyond the reference add nothing. Only areas to the same reference compare.
    """
    most, least = reference
    rows = table[(table[cost] <= most) & (table[value] >= least)]
    front = rows[pareto(rows, cost, value)].sort_values(cost)  # equal rows: no width between them
    widths = np.diff(front[cost].to_numpy(float), append=most)
    return float(np.sum(widths * (front[value].to_numpy(float) - least)))


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test that A and B are right equally often on the same n images.

    `b`: A right and B wrong; `c`: the reverse; `difference`: accuracy of A − accuracy of B, a share.
    The exact binomial form serves any n, so there is no switch to χ² at some number of pairs.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    a, b = _paired(correct_a, correct_b)
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    only_a, only_b = int(table[0][1]), int(table[1][0])
    return {
        "n": len(a),
        "b": only_a,
        "c": only_b,
        "p_value": float(test(table, exact=True).pvalue),
        "difference": (only_a - only_b) / len(a),
    }


def paired_bootstrap(
    correct_a: Sequence[bool], correct_b: Sequence[bool], n: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Accuracy of A − accuracy of B on the same images, with its 95 % percentile bootstrap interval.

    Redrawing images only changes how many times each of three outcomes turns up (A alone right, B alone
    right, neither), so the n resamples are drawn as multinomial counts: same distribution, no (n, N) array.
    """
    a, b = _paired(correct_a, correct_b)
    only_a, only_b = np.mean(a & ~b), np.mean(~a & b)
    counts = np.random.default_rng(seed).multinomial(len(a), [only_a, only_b, max(0.0, 1 - only_a - only_b)], size=n)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / len(a), [0.025, 0.975])
    return {"difference": float(only_a - only_b), "ci95_low": float(low), "ci95_high": float(high)}


def mean_ci(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the half width of its 95 % t interval (None for a single value), as over seeds."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"mean_ci: found {values.tolist()}, expected at least one number, all finite")
    if len(values) == 1:
        return float(values[0]), None
    return float(values.mean()), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def foreground(
    kept: Tensor | Sequence[Tensor], masks: Tensor | np.ndarray, grid: tuple[int, int]
) -> dict[str, float | None]:
    """How well kept patches find the foreground: means over images of precision and recall.

    `kept`: patch indices (K,) for all images, (B, K), or a list of B index tensors of any lengths; `masks`
    (B, H, W), non-zero on the foreground; `grid`: patch rows and columns. A patch is foreground if any of its
    pixels is. `precision`: share of kept patches that are foreground, over images that keep any;
    `precision_random`: what random keeping gives, the share of foreground among all patches of those images.
    `recall`: share of the foreground patches kept, over images that have any; `recall_random`: the share of
    patches those images keep. None where no image counts. ValueError: an index outside the grid.
    """
    patches, masks = grid[0] * grid[1], torch.as_tensor(masks)
    is_foreground = F.adaptive_max_pool2d((masks != 0).float()[:, None], grid).flatten(1)  # (B, P)
    is_kept = torch.zeros_like(is_foreground)
    for row, indices in zip(is_kept, _index_rows(kept, len(masks)), strict=True):
        if indices.numel() and not 0 <= indices.min() <= indices.max() < patches:
            raise ValueError(f"kept: found {indices.tolist()}, expected indices from 0 to {patches - 1}")
        row[indices.to(row.device)] = 1
    hits, kept_count, count = (is_kept * is_foreground).sum(1), is_kept.sum(1), is_foreground.sum(1)
    keeps, has = kept_count > 0, count > 0
    return {
        "precision": _mean(hits[keeps] / kept_count[keeps]),
        "precision_random": _mean(count[keeps] / patches),
        "recall": _mean(hits[has] / count[has]),
        "recall_random": _mean(kept_count[has] / patches),
    }


def correlation(
    values: Tensor, masks: Tensor | np.ndarray, grid: tuple[int, int], seed: int = 0
) -> dict[str, float | int | None]:
    """Whether a value per patch follows the foreground: Pearson's r over an image's patches, mean over images.

    `values` (B, P): depths or scores; `masks` (B, H, W), non-zero on the foreground, of which each patch has a share.
    `correlation`: of each image's own map. `correlation_fixed`: of the mean map of all images, which knows where the
    foreground usually is but not where it is here. `correlation_random`: of the own maps with patches shuffled.
    `correlation_n`: images that count, those whose map and mask both vary; None where there are none.
    """
    values, masks = values.double().cpu(), torch.as_tensor(masks)
    share = F.adaptive_avg_pool2d((masks != 0).double()[:, None], grid).flatten(1)  # (B, P)
    counts = (values.std(dim=1) > 0) & (share.std(dim=1) > 0)
    values, share = values[counts], share[counts]
    order = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    maps = {"": values, "_fixed": values.mean(dim=0).expand_as(values), "_random": values.gather(1, order)}
    found = {f"correlation{name}": _mean(_pearson(one, share)) for name, one in maps.items()}
    return {**found, "correlation_n": len(values)}


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each row of a and b (B, P): (B,); 0 where a does not vary."""
    a, b = (t - t.mean(dim=1, keepdim=True) for t in (a, b))
    return F.cosine_similarity(a, b, dim=1)


def rank_correlation(table: DataFrame, truth: str, by: str) -> DataFrame:
    """Spearman's ρ of the magnitude of every other column with the column `truth`, within each group of `by`."""
    estimates = [name for name in table if name not in (truth, by)]
    groups = {name: rows[estimates].abs().corrwith(rows[truth], method="spearman") for name, rows in table.groupby(by)}
    return type(table)(groups).T.rename_axis(by)


def evenly(total: int, count: int) -> np.ndarray:
    """`count` indices spread evenly over 0 … total − 1, or all where there are fewer."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def interleaved(values: np.ndarray) -> np.ndarray:
    """The values in an order of which every first part is spread over all of them: by their places' bits, reversed."""
    bits = max(1, (len(values) - 1).bit_length())
    return values[np.argsort([int(f"{place:0{bits}b}"[::-1], 2) for place in range(len(values))])]


def overlap(kept_a: Tensor | Sequence[Tensor], kept_b: Tensor | Sequence[Tensor]) -> float:
    """Mean over images of |A ∩ B| / |A ∪ B| of two kept sets, given as for `foreground`; ∅ with ∅ is 1."""
    batch = max(1 if isinstance(k, Tensor) and k.ndim == 1 else len(k) for k in (kept_a, kept_b))
    rows = zip(_index_rows(kept_a, batch), _index_rows(kept_b, batch), strict=True)
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in rows]
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def overlaps(sets: Mapping[str, Tensor | Sequence[Tensor]]) -> DataFrame:
    """`overlap` of each two of several kept sets, by name."""
    import pandas as pd

    return pd.DataFrame({a: {b: overlap(sets[a], sets[b]) for b in sets} for a in sets})


def temperature(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The T > 0 for which softmax(logits / T) has the least NLL: what calibrates a model, fitted on validation images.

    logits (N, C), labels (N,). Within e⁻⁵ … e⁵: a model that is never wrong there has no best T.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    from scipy import optimize

    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    if not len(labels) or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"temperature: found {tuple(logits.shape)} and {tuple(labels.shape)}, expected (N, C) and (N,)"
        )
    nll = lambda log_t: F.cross_entropy(logits / math.exp(log_t), labels).item()  # noqa: E731
    return math.exp(optimize.minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-6}).x)


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None


def _paired(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(correct) for correct in (correct_a, correct_b))
    if a.ndim != 1 or a.shape != b.shape or not len(a) or not np.isin([a, b], (0, 1)).all():
        raise ValueError(f"correct_a, correct_b: found {a.shape} and {b.shape}, expected (N,) true and false")
    return a.astype(bool), b.astype(bool)


def _index_rows(kept: Tensor | Sequence[Tensor], batch: int) -> list[Tensor]:
    """The kept indices of each of `batch` images; one 1-D tensor serves them all."""
    rows = [kept] * batch if isinstance(kept, Tensor) and kept.ndim == 1 else list(kept)
    if len(rows) != batch:
        raise ValueError(f"kept: found {len(rows)} rows of indices for {batch} images")
    return rows
