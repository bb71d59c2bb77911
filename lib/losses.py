"""Losses. Each takes (model, images, targets) and returns the loss to minimise with named parts to log."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def task(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, mean over images; targets are labels (B,) or probabilities (B, classes)."""
    return F.cross_entropy(model(images), targets), {}


def halting(
    ponder_weight: float,
    distr_weight: float,
    target_depth: float,
    distr_kl: str = "forward",
    teacher: nn.Module | None = None,
    distill_weight: float = 0.0,
) -> Loss:
    """The loss of A-ViT: cross-entropy + ponder_weight · ponder + distr_weight · KL of the halting distribution and
    its target, and with a teacher + distill_weight · KL(teacher ‖ model) of the predictions. Parts are logged without
    their weights.

    The model is a lib.pruners.avit.AViT, bare or wrapped for several processes. distr_kl: see `divergence`. teacher: a
    dense model, used in evaluation mode without gradient.
    """
    if distill_weight and teacher is None:
        raise ValueError(f"distill_weight is {distill_weight}: expected a teacher with it")

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, found = model(images, with_halting=True)
        scores = halting_distribution(found)
        parts = {
            "task": F.cross_entropy(logits, targets),
            "ponder": ponder(found),
            "distr": divergence(scores, target_distribution(len(scores), target_depth).to(scores), distr_kl),
        }
        value = parts["task"] + ponder_weight * parts["ponder"] + distr_weight * parts["distr"]
        if distill_weight:
            parts["distill"] = distillation(logits, _predict(teacher, images))
            value = value + distill_weight * parts["distill"]
        return value, {**parts, "depth": found.running.sum(dim=0).float().mean()}

    return loss


def ponder(found: Any) -> Tensor:
    """Mean of ρ over all tokens of all images, in blocks; found: a lib.pruners.avit.Halting."""
    return found.ponder.mean()


def halting_distribution(found: Any) -> Tensor:
    """H (L,): the mean halting score of each block over the patches that run in it, normalised to sum to one.

    Over all images, those of the other processes of torch.distributed included; a block in which no patch runs has 0.
    found: a lib.pruners.avit.Halting. Prefix tokens do not count: a class token that halts early says nothing of where
    the image is dull.
    """
    patches = slice(found.prefix, None)
    sums = found.scores[:, :, patches].sum(dim=(1, 2))
    counts = found.running[:, :, patches].sum(dim=(1, 2))
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce  # the one that gradients pass through

        sums, counts = all_reduce(sums), all_reduce(counts.to(sums))
    means = sums / counts.clamp(min=1)
    return means / means.sum().clamp(min=torch.finfo(means.dtype).tiny)


def target_distribution(blocks: int, depth: float) -> Tensor:
    """A normal distribution of mean `depth` and variance one at the blocks 1 … L, normalised to sum to one: (L,)."""
    return torch.softmax(-0.5 * (torch.arange(1, blocks + 1, dtype=torch.float64) - depth) ** 2, dim=0)


def divergence(found: Tensor, target: Tensor, direction: str = "forward") -> Tensor:
    """KL(found ‖ target) in nats where direction is "forward", KL(target ‖ found) where it is "reverse"; both (L,).

    Where found is 0 the forward terms are 0 and pass no gradient; the reverse ones take the smallest float for it.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}: expected forward or reverse")
    tiny = torch.finfo(found.dtype).tiny
    log_found, log_target = found.clamp(min=tiny).log(), target.clamp(min=tiny).log()
    return (found * (log_found - log_target) if direction == "forward" else target * (log_target - log_found)).sum()


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ model) in nats of the predicted distributions, mean over images; both logits (B, classes)."""
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


@torch.no_grad()
def _predict(teacher: nn.Module, images: Tensor) -> Tensor:
    return teacher.to(images.device).eval()(images)
