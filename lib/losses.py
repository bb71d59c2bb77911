"""Losses. Each takes (model, images, targets) and returns the loss to minimise with named parts to log."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def task(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, mean over images; targets are labels (B,) or probabilities (B, classes)."""
    return F.cross_entropy(model(images), targets), {}


@dataclass(frozen=True)
class halting:  # noqa: N801 - called like a function, a class so that other processes can be handed it
    """The loss of A-ViT: cross-entropy + ponder_weight · ponder + distr_weight · KL of the halting distribution and
    its target, and with a teacher + distill_weight · KL(teacher ‖ model) of the predictions. Parts are logged without
    their weights, and as `depth` the number of blocks of all tokens, whether their image ran so long or not.

    The model is a lib.pruners.avit.AViT, bare or wrapped for several processes. distr_kl: the direction, see
    `divergence`. teacher: a dense model, used in evaluation mode without gradient.
    """

    ponder_weight: float
    distr_weight: float
    target_depth: float
    distr_kl: str = "forward"
    teacher: nn.Module | None = None
    distill_weight: float = 0.0

    def __post_init__(self):
        if self.distr_kl not in ("forward", "reverse"):
            raise ValueError(f"distr_kl is {self.distr_kl!r}: expected forward or reverse")
        if self.distill_weight and self.teacher is None:
            raise ValueError(f"distill_weight is {self.distill_weight}: expected a teacher with it")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, found = model(images, with_halting=True)
        shares = halting_distribution(found)
        wanted = target_distribution(len(shares), self.target_depth).to(shares)
        parts = {
            "task": F.cross_entropy(logits, targets),
            "ponder": ponder(found),
            "distr": divergence(shares, wanted, self.distr_kl),
        }
        value = parts["task"] + self.ponder_weight * parts["ponder"] + self.distr_weight * parts["distr"]
        if self.distill_weight:
            parts["distill"] = distillation(logits, _predict(self.teacher, images))
            value = value + self.distill_weight * parts["distill"]
        return value, {**parts, "depth": found.running.sum(dim=0).float().mean()}


def ponder(found: Any) -> Tensor:
    """Mean of ρ over all tokens of all images, in blocks; found: a lib.pruners.avit.Halting."""
    return found.ponder.mean()


def halting_distribution(found: Any) -> Tensor:
    """log H (L,): of the mean halting score of each block over the patches that run in it, normalised to sum to one.

    Over all images, those of the other processes of torch.distributed included; a block in which no patch runs has the
    smallest float and passes no gradient. found: a lib.pruners.avit.Halting. Prefix tokens do not count: a class
    token that halts early says nothing of where the image is dull. In logarithms, since a gate centred at 75 scores
    near 1e-33. Of the last block it takes the gate's score like any other's, not the 1 that ends every token: with that
    the target could not be reached.
    """
    patches = slice(found.prefix, None)
    running = found.running[:, :, patches].flatten(1)  # (L, B · P)
    floor = torch.finfo(found.gates.dtype).min
    scores = F.logsigmoid(found.gates[:, :, patches].flatten(1).clamp(min=floor)).where(running, floor)
    top, counts = scores.detach().amax(dim=1), running.sum(dim=1).to(scores)
    if distributed := dist.is_available() and dist.is_initialized():
        dist.all_reduce(top, dist.ReduceOp.MAX)
        dist.all_reduce(counts)
    sums = ((scores - top[:, None]).exp() * running).sum(dim=1)
    if distributed:
        sums = _over_processes(sums)
    means = (sums.where(counts > 0, 1).log() + top - counts.clamp(min=1).log()).where(counts > 0, floor)
    return means.log_softmax(dim=0)


def _over_processes(part: Tensor) -> Tensor:
    """The sum of every process's part. A process's gradient is that of its own part, times the number of processes:
    DistributedDataParallel will divide by it."""
    whole, own = part.detach().clone(), part * dist.get_world_size()
    dist.all_reduce(whole)
    return whole + (own - own.detach())


def target_distribution(blocks: int, depth: float) -> Tensor:
    """The logarithm (L,) of a normal distribution of mean `depth` and variance one at the blocks 1 … L, normalised."""
    if not 1 <= depth <= blocks:
        raise ValueError(f"target_depth is {depth}: expected a block from 1 to {blocks}")
    return torch.log_softmax(-0.5 * (torch.arange(1, blocks + 1, dtype=torch.float64) - depth) ** 2, dim=0)


def divergence(found: Tensor, target: Tensor, direction: str = "forward") -> Tensor:
    """KL in nats of two distributions given by their logarithms (L,): KL(found ‖ target) where direction is
    "forward", KL(target ‖ found) where it is "reverse".

    A block that is as good as impossible in `found` costs "reverse" what the smallest positive float would.
    """
    if direction == "reverse":
        found, target = target, found.clamp(min=math.log(torch.finfo(found.dtype).tiny))
    return (found.exp() * (found - target)).sum()


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ model) in nats of the predicted distributions, mean over images; both logits (B, classes)."""
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


@torch.no_grad()
def _predict(teacher: nn.Module, images: Tensor) -> Tensor:
    return teacher.to(images.device).eval()(images)
