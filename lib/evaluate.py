"""What a model is worth: its predictions and their quality. Costs and comparison are in lib.costs and lib.statistics,
and can be had from here as well.

Knows no pruning method: a model is a module from images to logits, and methods meet as rows of one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.augment import normalise
from lib.costs import closed_form_macs, evaluating, latency, macs, place, vit_macs
from lib.statistics import (
    correlation,
    evenly,
    foreground,
    hypervolume,
    interleaved,
    mcnemar,
    mean_ci,
    overlap,
    overlaps,
    paired_bootstrap,
    pareto,
    rank_correlation,
    temperature,
)

__all__ = [
    "Predictions",
    "Traces",
    "batch",
    "batches",
    "classification",
    "closed_form_macs",
    "confusion",
    "correlation",
    "device",
    "evenly",
    "foreground",
    "hypervolume",
    "image_shape",
    "inputs",
    "latency",
    "macs",
    "mcnemar",
    "mean_ci",
    "overlap",
    "overlaps",
    "paired_bootstrap",
    "pareto",
    "predict",
    "rank_correlation",
    "temperature",
    "test",
    "traces",
    "vit_macs",
]  # fmt: skip


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
    device = place([model], device)
    logits = []
    with evaluating([model], device, precision):
        for start in tqdm(range(0, len(labels), batch_size), desc="predict", delay=5, leave=False):
            images = torch.tensor(np.asarray(split.images[start : start + batch_size]))
            if images.dtype != torch.uint8 or images.ndim != 4:
                found = f"{images.dtype} {tuple(images.shape)}"
                raise ValueError(f"split.images: found {found}, expected uint8 (N, H, W, C)")
            images = normalise(images.to(device).permute(0, 3, 1, 2).float() / 255, mean, std)
            logits.append(model(images).float().cpu())
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


def test(
    model: nn.Module, data: Any, *, batch_size: int = 256, count_on: Tensor | None = None, split: str = "test"
) -> tuple[dict[str, Any], Predictions]:
    """What every method reports of a model: `classification` on data.test, and `macs`; with the predictions.

    split: "val" while something is still being chosen.
    count_on: images (B, 3, H, W) to count multiply-adds on, for a model whose work depends on the image.
    """
    found = predict(model, getattr(data, split), mean=data.mean, std=data.std, batch_size=batch_size)
    distinct = len({*data.classes}) == len(data.classes)  # ImageNet has two cranes
    scores = classification(found.logits, found.labels, classes=data.classes if distinct else data.class_ids)
    return {**scores, **macs(model, image_shape(data) if count_on is None else count_on)}, found


class Traces(NamedTuple):
    """Where the patches of N images went, on the CPU: depth (N, patches), how many blocks kept each; tokens (N, L),
    how many patches each block kept."""

    depth: Tensor
    tokens: Tensor


def traces(model: nn.Module, data: Any, *, batch_size: int = 256) -> Traces:
    """`model.trace` of a token pruner over all test images."""
    depth, tokens, where = [], [], next(model.parameters()).device
    for start in range(0, len(data.test), batch_size):
        trace = model.trace(inputs(data.test.images[start : start + batch_size], data).to(where))
        depth.append(trace.depth.cpu())
        tokens.append(torch.tensor([[len(ids) for ids in block] for block in trace.kept]).T)
    return Traces(torch.cat(depth), torch.cat(tokens))


def batch(data: Any, count: int, *, split: str = "test") -> Tensor:
    """`count` images spread evenly over a split (all, where it has fewer), as a model is fed them: (n, 3, H, W).

    For timing and counting, too: where the work depends on the image, noise would not do.
    """
    images = getattr(data, split).images
    return inputs(images[evenly(len(images), count)], data)


def batches(data: Any, count: int, size: int, *, split: str = "val") -> list[tuple[Tensor, Tensor]]:
    """`count` batches of `size` images spread evenly over a split, un-augmented, as (images, labels): what methods look
    at to decide. Every batch, and every first part of one, is spread as well: files are often sorted by class. Fewer
    where the split has fewer images; ValueError where it has none."""
    part = getattr(data, split)
    if not len(part):
        raise ValueError(f"dataset {data.name} has no {split} images to look at")
    chosen = interleaved(evenly(len(part), count * size))
    labels = torch.as_tensor(np.asarray(part.labels)[chosen])
    return list(zip(inputs(part.images[chosen], data).split(size), labels.split(size), strict=True))


def inputs(images: np.ndarray, data: Any) -> Tensor:
    """Images uint8 (n, H, W, 3) as a model is fed them: (n, 3, H, W), normalised by data.mean and data.std."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 255
    return normalise(x, data.mean, data.std)


def device() -> torch.device:
    """Where speed is measured: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def image_shape(data: Any) -> tuple[int, int, int]:
    """(3, H, W) of a dataset's images as a model is fed them."""
    return 3, *data.test.images.shape[1:3]


def confusion(logits: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column): int64 (C, C)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(logits.argmax(1), labels, num_classes).numpy()


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
