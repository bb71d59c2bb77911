"""EAP, edge attribution patching for pruning: what every part of a ViT matters, from gradients of gates.

Source: "Attribution Patching Outperforms Automated Circuit Discovery" (arXiv 2310.10348). Every part gets a gate
z = 1 (`components.gates`); one forward and one backward pass through all of them estimates what removing each would
do, where ACDC removes each and looks. With L what an image's prediction should not lose:

    ce       z · ∂L/∂z,            L = cross-entropy of the label: to first order −ΔL when the gate closes
    fisher   ½ · E_y [(∂ log p(y)/∂z)²], y drawn from the prediction p
    taylor   ½ · (∂ log p(y)/∂z)²,  y the label (Molchanov et al. 2019): Fisher with the labels for predictions
    ig       ∫₀¹ ∂L/∂z dα along a path that opens all gates of one kind in one block together, all others open

Why not the gradient of KL(p ‖ p_z), which ACDC measures? At z = 1 it is exactly zero, for every part, and what floating
point leaves of it ranks noise. `fisher` is the first term of that KL which is not zero: KL ≈ ε² · score for a gate of
1 − ε. `ig` leaves the point z = 1 and integrates that KL; its scores add up, over the parts of a kind and block, to
minus the KL of removing them all.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib import blocks
from lib.pruners import components
from lib.pruners.surgery import Plan, sizes
from lib.pruners.tokens import kept_count

OBJECTIVES = ("fisher", "ce", "taylor", "ig")
EXACT_CLASSES = 16  # up to so many the Fisher term takes one backward pass per class


def scores(
    vit: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: str = "fisher",
    *,
    use_task_loss: bool = False,
    samples: int | None = None,
    steps: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """A score per part, mean over images, float64: "block", "attn", "mlp" (L,), "head" (L, H), "neuron" (L, M).

    batches: (images (B, 3, H, W), labels (B,)), clean and un-augmented, on the model's device; only ce, taylor and
    the task loss look at the labels. use_task_loss: the effect on the task's cross-entropy instead of on the KL to the
    model's own predictions: fisher becomes ce, as in the first order nothing vanishes, and ig integrates the
    cross-entropy. samples: for fisher, random projections per image, unbiased, one backward pass each; 0 is exact,
    one per class; None is exact up to 16 classes and 4 projections beyond. steps: midpoints of ig's integral.
    NaN where a block has fewer heads or neurons than the widest. The model is run in evaluation mode.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if samples is not None and samples < 0:
        raise ValueError(f"samples is {samples}: expected a number of projections from 1, or 0 for the exact term")
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected a number of points from 1")
    blocks.check(vit)
    if use_task_loss and objective == "fisher":
        objective = "ce"
    generator, total, count = torch.Generator().manual_seed(seed), None, 0
    with blocks.evaluation(vit):
        for images, labels in tqdm(batches, desc=f"EAP, {objective}", mininterval=1, disable=not progress):
            if objective == "ig":
                found = _integrated(vit, images, labels if use_task_loss else None, steps, progress)
            else:
                found = _at_one(vit, images, labels, objective, samples, generator)
            total = found if total is None else {kind: total[kind] + found[kind] for kind in found}
            count += len(images)
    if not count:
        raise ValueError("batches are empty: expected at least one (images, labels)")
    there = components.exist(vit)
    return {kind: (value / count).where(there[kind], torch.nan) for kind, value in total.items()}


def _at_one(
    vit: nn.Module, images: Tensor, labels: Tensor, objective: str, samples: int | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Scores that take derivatives at the open gates, summed over images."""
    gate = {kind: value.requires_grad_() for kind, value in components.ones(vit, len(images)).items()}
    with torch.enable_grad(), components.gates(vit, gate):
        logits = vit(images)
        log_p = logits.log_softmax(dim=1)
        if objective == "fisher":
            found = dict.fromkeys(gate, 0.0)
            for direction, weight in _directions(log_p.detach(), samples, generator):
                slopes = _slopes((log_p * direction).sum(), gate)
                found = {kind: found[kind] + weight * (slopes[kind] ** 2).sum(dim=0) for kind in gate}
            return {kind: 0.5 * value for kind, value in found.items()}
        slopes = _slopes(F.nll_loss(log_p, labels, reduction="sum"), gate)
    if objective == "taylor":
        return {kind: 0.5 * (value**2).sum(dim=0) for kind, value in slopes.items()}
    return {kind: value.sum(dim=0) for kind, value in slopes.items()}


def _slopes(value: Tensor, gate: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂value/∂gate in float64; images do not mix, so each has its own row. Of a kind that is gone everywhere nothing
    comes of its gates."""
    found = torch.autograd.grad(value, [*gate.values()], retain_graph=True, materialize_grads=True)
    return dict(zip(gate, (slope.double() for slope in found), strict=True))


def _directions(log_p: Tensor, samples: int | None, generator: torch.Generator) -> Iterable[tuple[Tensor, float]]:
    """Directions v (B, C) and weights w with Σ w (∂(v · log p)/∂z)² = E_y [(∂ log p(y)/∂z)²], exactly or on average.

    Exactly: v = √p(y) at y, for every class. On average: the same with a random sign per class, all at once.
    """
    root, classes = log_p.mul(0.5).exp(), log_p.shape[1]
    if samples is None:
        samples = 0 if classes <= EXACT_CLASSES else 4
    if not samples:
        for label in range(classes):
            direction = torch.zeros_like(root)
            direction[:, label] = root[:, label]
            yield direction, 1.0
    for _ in range(samples):
        signs = torch.randint(2, root.shape, generator=generator).to(root) * 2 - 1
        yield root * signs, 1 / samples


def _integrated(vit: nn.Module, images: Tensor, labels: Tensor | None, steps: int, progress: bool) -> dict[str, Tensor]:
    """Gradients integrated along each block's path, summed over images; labels None: of the KL to the prediction."""
    with torch.no_grad():
        clean = vit(images).log_softmax(dim=1)
    total = {kind: torch.zeros_like(value, dtype=torch.float64) for kind, value in components.ones(vit).items()}
    paths = [(kind, index) for kind in total for index, block in enumerate(vit.blocks)
             if kind not in ("head", "neuron") or sizes(block)[kind == "neuron"]]  # fmt: skip
    for kind, index in tqdm(paths, desc="paths of a batch", mininterval=1, leave=False, disable=not progress):
        for step in range(steps):
            gate = components.ones(vit)[kind]
            gate[index] = (step + 0.5) / steps
            gate.requires_grad_()
            with torch.enable_grad(), components.gates(vit, {kind: gate}):
                log_p = vit(images).log_softmax(dim=1)
                lost = F.kl_div(log_p, clean, reduction="sum", log_target=True)
                value = lost if labels is None else F.nll_loss(log_p, labels, reduction="sum")
            (slope,) = torch.autograd.grad(value, gate)
            total[kind][index] += slope[index].double() / steps
    return total


def plan(
    scores: Mapping[str, Tensor],
    keep_ratio: float | Mapping[str, float],
    *,
    parts: Collection[str] = ("head", "neuron"),
    group_size: int = 1,
) -> Plan:
    """The Plan that keeps, of each kind in `parts`, the share with the scores of largest magnitude over all blocks.

    scores: as `scores` gives them, or any with these shapes; NaN is no part. keep_ratio: a share in (0, 1], or one per
    kind, where 0 keeps none; max(1, floor) of the parts stay, equal scores falling to the earlier. group_size: neurons
    that stay or go together, by the sum of their scores. Ranking each kind alone makes plans of one ratio cost the
    same, whatever ranks them, where heads and neurons alone are chosen: each costs the same in every block.
    """
    if unknown := {*parts} - {*scores} or not parts:
        raise ValueError(f"parts are {sorted(unknown) if parts else '()'}: expected some of {', '.join(scores)}")
    if isinstance(keep_ratio, Mapping) and {*parts} - {*keep_ratio}:
        raise ValueError(f"keep_ratio is {dict(keep_ratio)}: expected a share for each of {', '.join(parts)}")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}: expected a number of neurons from 1")
    stays = {}
    for kind in parts:
        ratio = keep_ratio[kind] if isinstance(keep_ratio, Mapping) else keep_ratio
        value = _by_group(scores[kind], group_size) if kind == "neuron" else scores[kind].abs()
        there = ~value.isnan()
        order = value.masked_fill(~there, -1).flatten().argsort(descending=True, stable=True)
        kept = torch.zeros(value.numel(), dtype=torch.bool)
        none = ratio == 0 and isinstance(keep_ratio, Mapping)
        kept[order[: 0 if none else kept_count(ratio, int(there.sum()))].cpu()] = True
        stays[kind] = kept.view(value.shape)
    units = {kind: [[i for i, stay in enumerate(row) if stay] for row in stays[kind].tolist()]
             for kind in ("head", "neuron") if kind in stays}  # fmt: skip
    if group_size > 1 and "neuron" in units:
        there = (~scores["neuron"].isnan()).tolist()
        units["neuron"] = [[i for i in range(len(row)) if row[i] and i // group_size in {*groups}]
                           for row, groups in zip(there, units["neuron"], strict=True)]  # fmt: skip
    # Where a sublayer is no part, because it has no head or neuron left, the bias that it still adds stays.
    whole = {
        kind: (stays[kind] | scores[kind].isnan().cpu()).tolist() for kind in ("block", "attn", "mlp") if kind in stays
    }
    return Plan(units.get("head"), units.get("neuron"), whole.get("block"), whole.get("attn"), whole.get("mlp"))


def _by_group(neurons: Tensor, size: int) -> Tensor:
    """Magnitudes of sums over groups of `size` of (L, M): (L, ceil(M / size)), NaN where a group has no neuron."""
    padded = F.pad(neurons, (0, -neurons.shape[1] % size), value=torch.nan)
    groups = padded.unflatten(1, (-1, size))
    return groups.nansum(dim=2).abs().masked_fill(groups.isnan().all(dim=2), torch.nan)
