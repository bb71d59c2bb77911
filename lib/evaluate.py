"""What a model is worth and what it costs: predictions, their quality, MACs, latency, and fair comparison.

Knows no pruning method: a model is a module from images to logits, and methods meet as rows of one table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.augment import normalise

if TYPE_CHECKING:
    from pandas import DataFrame, Series

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Predictions(NamedTuple):
    """logits (N, C) float32 and labels (N,) int64, both on the CPU."""

    logits: Tensor
    labels: Tensor


def predict(
    model: nn.Module,
    split: Any,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    device: torch.device | str | None = None,
    precision: str = "fp32",
) -> Predictions:
    """Runs the model over a split, in order and without augmentation; training flags come back as they were.

    `split.images`: uint8 (N, H, W, C), anything that slices to arrays; `split.labels`: (N,) integers.
    The model is moved to `device` (None: stays). `precision`: fp32, or bf16/fp16 by autocast.
    ValueError: an empty split, images and labels of unequal number, images that are not uint8 NHWC.
    """
    from tqdm import tqdm

    labels = torch.as_tensor(np.asarray(split.labels), dtype=torch.int64)
    if len(labels) == 0 or len(split.images) != len(labels):
        raise ValueError(f"split: found {len(split.images)} images, {len(labels)} labels, expected n > 0 of each")
    device = _place([model], device)
    logits = []
    with _evaluating([model], device, precision):
        for start in tqdm(range(0, len(labels), batch_size), desc="predict", delay=5, leave=False):
            images = torch.tensor(np.asarray(split.images[start : start + batch_size]))
            if images.dtype != torch.uint8 or images.ndim != 4:
                found = f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"split.images: found {found}, expected uint8 (N, H, W, C)")
            images = images.to(device).permute(0, 3, 1, 2).float() / 255
            logits.append(model(normalise(images, mean, std)).float().cpu())
    return Predictions(torch.cat(logits), labels)  # outside inference mode: an ordinary tensor


def classification(
    logits: Tensor, labels: Tensor, *, classes: Sequence[str] | None = None, topk: Sequence[int] = (1, 5)
) -> dict[str, Any]:
    """The quality of predictions: logits (N, C) and labels (N,) to a dict of plain numbers, fit for JSON.

    Accuracies and confidences are shares 0 … 1; a top-k with k > C is left out; among equal logits the lower
    class index ranks first. Macro averages run over the classes that occur in labels or predictions, 0/0
    counting 0. `per_class_accuracy`: class name → recall. Confidence: the largest softmax probability.
    `brier`: Σ_c (p_c − y_c)², 0 … 2; `ece`: expected calibration error in 15 equal bins (Guo et al. 2017).
    What is undefined (confidence of wrong answers where there are none) is None, never NaN.
    ValueError: no images, mismatched shapes, labels outside 0 … C − 1, a logit that is not finite.
    """
    from torchmetrics.functional import classification as tm

    count, num_classes = _check_predictions(logits, labels)
    names = [str(c) for c in (range(num_classes) if classes is None else classes)]
    if len(set(names)) != num_classes or len(names) != num_classes:
        raise ValueError(f"classes: found {len(names)}, {len(set(names))} different, expected {num_classes}")
    parts = [_per_image(*rows) for rows in zip(logits.split(4096), labels.split(4096), strict=True)]
    per_image = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    confidence, correct = per_image["confidence"], per_image["rank"] == 0
    preds = logits.argmax(1)
    table = confusion(logits, labels, num_classes)
    macro = {"num_classes": num_classes, "average": "macro"}
    right, wrong = _mean(confidence[correct]), _mean(confidence[~correct])
    return {
        "n": count,
        **{f"top{k}": _mean(per_image["rank"] < k) for k in topk if k <= num_classes},
        "precision_macro": tm.multiclass_precision(preds, labels, **macro).item(),
        "recall_macro": tm.multiclass_recall(preds, labels, **macro).item(),
        "f1_macro": tm.multiclass_f1_score(preds, labels, **macro).item(),
        "per_class_accuracy": {
            name: float(row[c] / row.sum()) if row.sum() else None
            for c, (name, row) in enumerate(zip(names, table, strict=True))
        },
        "confidence": _mean(confidence),
        "confidence_correct": right,
        "confidence_incorrect": wrong,
        "confidence_gap": None if right is None or wrong is None else right - wrong,
        "entropy_nats": _mean(per_image["entropy"]),
        "nll_nats": _mean(per_image["nll"]),
        "brier": _mean(per_image["brier"]),
        # The binary form on (confidence, correct) is the multiclass one without a second softmax over (N, C).
        "ece": tm.binary_calibration_error(confidence, correct.long(), n_bins=15).item(),
    }


def test(model: nn.Module, data: Any, *, batch_size: int = 256) -> tuple[dict[str, Any], Predictions]:
    """What every method reports of a model: `classification` on data.test, and `macs`; with the predictions."""
    found = predict(model, data.test, mean=data.mean, std=data.std, batch_size=batch_size)
    scores = classification(found.logits, found.labels, classes=data.classes)
    return {**scores, **macs(model, image_shape(data))}, found


def image_shape(data: Any) -> tuple[int, int, int]:
    """(3, H, W) of a dataset's images as a model is fed them."""
    return 3, *data.test.images.shape[1:3]


def confusion(logits: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column): int64 (C, C)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(logits.argmax(1), labels, num_classes).numpy()


def macs(model: nn.Module, images_or_shape: Tensor | Sequence[int]) -> dict[str, float]:
    """Multiply-accumulates of one image, in units of 1e9 (`macs_g`), and parameters in 1e6 (`params_m`).

    Matrix products and convolutions are counted, one image at a time, under the math attention backend
    (torch counts fused CPU attention wrongly). From a shape (C, H, W) it counts on the meta device, free of
    cost; a model whose work depends on the image raises ValueError there: give it images (B, C, H, W), on
    the model's device, and it reports their mean.
    """
    from torch.func import functional_call
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with _evaluating([model]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if isinstance(images_or_shape, Tensor):
            images = images_or_shape
            for image in images.split(1):
                model(image)
        else:
            images = torch.empty(1, *images_or_shape[-3:], device="meta")
            tensors = [*model.named_parameters(), *model.named_buffers()]
            try:
                functional_call(model, {k: torch.empty_like(t, device="meta") for k, t in tensors}, (images,))
            except RuntimeError as error:
                name, reason = type(model).__name__, str(error).splitlines()[0]
                raise ValueError(f"{name} can't be counted from a shape, give images ({reason})") from error
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"macs_g": counter.get_total_flops() / 2 / len(images) / 1e9, "params_m": params / 1e6}


def vit_macs(
    tokens: Sequence[int],
    dim: int,
    attn_dims: Sequence[int],
    hidden_dims: Sequence[int],
    *,
    embed_patches: int,
    patch_dim: int,
    num_classes: int,
    mlp_tokens: Sequence[int] | None = None,
) -> int:
    """MACs of one image through a ViT: Σ_blocks (4·N·d·a + 2·N²·a + 2·N·d·h) + embedding + head.

    Per block: `tokens` N with prefix tokens, `attn_dims` a (kept heads × head dimension), `hidden_dims` h
    (kept MLP neurons); `mlp_tokens`, where tokens leave between attention and MLP. `dim`: d; `embed_patches`
    patches of `patch_dim` numbers (3·16·16) are embedded; the head reads one token. With a = d and h = ρ·d a
    block has the usual N(4d² + 2ρd²) + 2N²d. ValueError: lists of unequal length.
    """
    mlp_tokens = tokens if mlp_tokens is None else mlp_tokens
    blocks = sum(
        4 * n * dim * attn + 2 * n * n * attn + 2 * n_mlp * dim * hidden
        for n, n_mlp, attn, hidden in zip(tokens, mlp_tokens, attn_dims, hidden_dims, strict=True)
    )
    return blocks + embed_patches * patch_dim * dim + dim * num_classes


def closed_form_macs(vit: nn.Module) -> int:
    """`vit_macs` with the numbers read off a timm VisionTransformer, whole or with heads and neurons removed.

    ValueError: attention pooling or a gated MLP, which the closed form does not cover.
    """
    if getattr(vit, "attn_pool", None) is not None:
        raise ValueError(f"{type(vit).__name__} pools by attention: the closed form does not cover that")
    for block in vit.blocks:
        if block.mlp.fc1.out_features != block.mlp.fc2.in_features:
            raise ValueError(f"{type(block.mlp).__name__} is gated: the closed form does not cover that")
    patches = vit.patch_embed.num_patches
    return vit_macs(
        tokens=[patches + vit.num_prefix_tokens] * len(vit.blocks),
        dim=vit.embed_dim,
        attn_dims=[block.attn.proj.in_features for block in vit.blocks],
        hidden_dims=[block.mlp.fc2.in_features for block in vit.blocks],
        embed_patches=patches,
        patch_dim=vit.patch_embed.proj.weight[0].numel(),
        num_classes=getattr(vit.head, "out_features", 0),  # a ViT without a head has an Identity there
    )


def latency(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    repeats: int = 30,
    warmup: int = 3,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    threads: int | None = None,
    baseline: str | None = None,
) -> DataFrame:
    """Times all models on the same batch (B, C, H, W), taking turns in a new random order each round.

    A shared machine is noisy, and slows for minutes at a time: a time measured alone says little. Here all
    models meet the same disturbance, and `speedup` is the median over rounds of time(baseline) / time(model)
    within a round. The ratio is the claim; `latency_ms` (median, per batch) tells the order of magnitude.
    One row per model: model, batch_size, latency_ms, latency_iqr_ms, throughput_ips (images per second),
    speedup, speedup_iqr, device, threads, precision, repeats. `baseline`: None is the first model. Models
    move to `device` (None: where the first one is). ValueError: no models, an unknown baseline or precision,
    repeats < 1, warmup < 0.
    """
    import pandas as pd

    baseline = next(iter(models), None) if baseline is None else baseline
    if baseline not in models or repeats < 1 or warmup < 0:
        raise ValueError(
            f"latency: found baseline {baseline!r}, repeats {repeats}, warmup {warmup}, "
            f"expected a baseline among {list(models)}, repeats ≥ 1, warmup ≥ 0"
        )
    device = _place(models.values(), device)
    images = images.to(device)
    before, shuffler = torch.get_num_threads(), random.Random(0)
    threads = before if threads is None else threads
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        torch.set_num_threads(threads)
        with _evaluating(models.values(), device, precision):
            for _ in range(warmup + repeats):
                for name in shuffler.sample(list(models), len(models)):
                    times[name].append(_time_ms(models[name], images))
    finally:
        torch.set_num_threads(before)
    rounds = pd.DataFrame(times).iloc[warmup:]
    ratios = rounds.rdiv(rounds[baseline], axis=0)
    median = rounds.median()
    columns = {
        "batch_size": len(images),
        "latency_ms": median,
        "latency_iqr_ms": rounds.quantile(0.75) - rounds.quantile(0.25),
        "throughput_ips": 1000 * len(images) / median,
        "speedup": ratios.median(),
        "speedup_iqr": ratios.quantile(0.75) - ratios.quantile(0.25),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "precision": precision,
        "repeats": repeats,
    }
    return pd.DataFrame(columns, index=list(models)).rename_axis("model").reset_index()


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
    counts = np.random.default_rng(seed).multinomial(len(a), [only_a, only_b, 1 - only_a - only_b], size=n)
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


def overlap(kept_a: Tensor | Sequence[Tensor], kept_b: Tensor | Sequence[Tensor]) -> float:
    """Mean over images of |A ∩ B| / |A ∪ B| of two kept sets, given as for `foreground`; ∅ with ∅ is 1."""
    batch = max(1 if isinstance(k, Tensor) and k.ndim == 1 else len(k) for k in (kept_a, kept_b))
    rows = zip(_index_rows(kept_a, batch), _index_rows(kept_b, batch), strict=True)
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in rows]
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


@contextmanager
def _evaluating(
    models: Sequence[nn.Module], device: torch.device | None = None, precision: str = "fp32"
) -> Iterator[None]:
    """Inference and eval mode inside; afterwards every submodule has its own training flag again."""
    if precision not in AUTOCAST:
        raise ValueError(f"precision: found {precision!r}, expected one of {', '.join(AUTOCAST)}")
    dtype, kind = AUTOCAST[precision], "cpu" if device is None else device.type
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype is not None):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _place(models: Sequence[nn.Module], device: torch.device | str | None) -> torch.device:
    """Moves the models to the device (None: to that of the first one) and returns it."""
    if device is None:
        device = next((p.device for p in next(iter(models)).parameters()), "cpu")
    for model in models:
        model.to(device)
    return torch.device(device)


def _time_ms(model: nn.Module, images: Tensor) -> float:
    if images.device.type != "cuda":
        start = time.perf_counter()
        model(images)
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(images.device)
    start.record()
    model(images)
    end.record()
    torch.cuda.synchronize(images.device)
    return start.elapsed_time(end)


def _check_predictions(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0 or logits.shape[1] < 2:
        raise ValueError(
            f"predictions: found logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
            "expected (N, C) and (N,) with N ≥ 1, C ≥ 2"
        )
    if not logits.isfinite().all():
        broken = int((~logits.isfinite()).any(1).sum())
        raise ValueError(f"logits: {broken} of {len(logits)} rows hold NaN or infinity")
    if not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        found = f"{int(labels.min())} … {int(labels.max())}"
        raise ValueError(f"labels: found {found}, expected 0 … {logits.shape[1] - 1}")
    return logits.shape[0], logits.shape[1]


def _per_image(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per image (N,): rank of the true class, and the softmax's confidence, entropy, NLL and Brier score."""
    log_p = logits.double().log_softmax(1)  # float64: a saturated softmax keeps its tail
    p, true = log_p.exp(), labels[:, None]
    own = logits.gather(1, true)
    ties_before = (logits == own) & (torch.arange(logits.shape[1]) < true)
    return {
        "rank": ((logits > own) | ties_before).sum(1),
        "confidence": p.max(1).values,
        "entropy": -(p * log_p).sum(1),
        "nll": -log_p.gather(1, true)[:, 0],
        "brier": (p.scatter_add(1, true, -torch.ones_like(p[:, :1])) ** 2).sum(1),
    }


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
