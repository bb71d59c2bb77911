"""RSST and Refill: which heads, neurons and channels a ticket loses, and how they are driven out. The loop of states
that trains, selects and rewinds is `lib.tickets`.

Sources: "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets" (arXiv 2202.04736: regroup, refill),
"Dual Lottery Ticket Hypothesis" (2203.04248) and "Neural Pruning via Growing Regularization" (2012.09243: RSST).

    element mask   the (1 − rate)^(s+1) weights of all qkv, proj, fc1, fc2 (of a ResNet conv1, conv2) that are largest
    regroup        per unit (head, neuron, channel) an importance; each block, or the model, keeps its best units
    Refill         brings a share of the removed units back and removes the others now
    RSST           keeps them for one more state and adds λ·w to the gradient of their weights:

        w ← w − lr (∂L/∂w + λ_i w),   λ growing from 0 to `ceiling` over the state's steps i

Which weights a unit has: `lib.pruners.units`. Plans and masks are in the numbering of the model they are made for.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lib import blocks
from lib.pruners.surgery import Plan, sizes
from lib.pruners.units import padded, per_unit, prunable
from lib.resnet import Residual

CRITERIA = ("remain", "magnitude", "l1", "l2", "saliency", "random")
LOOKS = ("l1", "l2", "saliency")  # criteria that look at images
SORTING = ("layer", "global")
PARTS = {"head": ("head",), "mlp": ("neuron",), "both": ("head", "neuron")}  # prune_target → kinds of units

# How λ grows: x from 0 to 1 over the state's steps, p the exponent → share of the ceiling, from 0 to 1.
SCHEDULES = {
    "x": lambda x, p: x,
    "x^2": lambda x, p: x**2,
    "x^3": lambda x, p: x**3,
    "exp": lambda x, p: math.expm1(x) / math.expm1(1),
    "exp_custom": lambda x, p: math.expm1(p * x) / math.expm1(p),
    "exp_custom_exponents": lambda x, p: math.expm1(x**p) / math.expm1(1),
}


def importance(
    model: nn.Module,
    criteria: str,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    *,
    mask: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How much every unit matters: "head", "neuron" (L, U) float64, NaN where a block has no such unit.

    criteria:
        remain     how many of its weights survive in `mask`, an `element_mask`
        magnitude  Σ|w| of its weights
        l1, l2     norm of its activations (a head's slice of the input of proj, a neuron's of fc2, a channel's of
                   conv2) over tokens or pixels, mean over images
        saliency   Σ|w · ∂L/∂w| of its weights, L the mean cross-entropy over all batches
        random     drawn by `seed`: what the others must beat

    Matrices count, biases do not. A ResNet's blocks are not of one size: its channels get means over weights and pixels
    for sums, so that they can be ranked together. batches: (images (B, 3, H, W), labels (B,)) on the model's device,
    clean, for l1, l2 and saliency; the model is run in evaluation mode. ValueError: an unknown criterion, or what it
    needs is missing.
    """
    if criteria not in CRITERIA:
        raise ValueError(f"criteria is {criteria!r}: expected one of {', '.join(CRITERIA)}")
    if criteria == "remain":
        if mask is None:
            raise ValueError("criteria is 'remain': expected the element mask with it")
        return _of_units(model, mask)
    weights = prunable(model)
    if criteria == "magnitude":
        return _of_units(model, {name: weight.detach().abs() for name, weight in weights.items()})
    if criteria == "random":
        drawn, generator = per_unit(model, weights), torch.Generator().manual_seed(seed)
        return {kind: torch.rand(value.shape, generator=generator, dtype=value.dtype).where(~value.isnan(), torch.nan)
                for kind, value in drawn.items()}  # fmt: skip
    batches = list(batches)
    if not sum(len(images) for images, _ in batches):
        raise ValueError(f"criteria is {criteria!r}: expected batches of images with it")
    with blocks.evaluation(model):
        return _saliency(model, batches) if criteria == "saliency" else _activations(model, batches, int(criteria[1]))


def _saliency(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    weights = {name: weight.detach().requires_grad_() for name, weight in prunable(model).items()}
    slopes, count = dict.fromkeys(weights, 0.0), sum(len(images) for images, _ in batches)
    for images, labels in batches if weights else ():
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(model, weights, (images,)), labels, reduction="sum") / count
        found = torch.autograd.grad(loss, [*weights.values()])
        slopes = {name: slopes[name] + slope for name, slope in zip(weights, found, strict=True)}
    return _of_units(model, {name: (weight.detach() * slopes[name]).abs() for name, weight in weights.items()})


def _of_units(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sums = per_unit(model, values)
    if not any(isinstance(block, Residual) for block in model.blocks):
        return sums
    counts = per_unit(model, {name: torch.ones_like(weight) for name, weight in prunable(model).items()})
    return {kind: sums[kind] / counts[kind] for kind in sums}


def _activations(model: nn.Module, batches: list[tuple[Tensor, Tensor]], order: int) -> dict[str, Tensor]:
    """Norms of order 1 or 2 of what every unit hands on, from the inputs of proj, fc2 and conv2."""
    found = {(kind, index): 0.0 for kind in ("head", "neuron") for index in range(len(model.blocks))}

    def look(kind: str, index: int, count: int) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            channels = inputs[0].ndim == 4
            x = inputs[0] if channels else inputs[0].movedim(2, 1)  # (B, U · d, N)
            x = x.detach().double().reshape(len(x), count, -1)
            size = x.shape[2] ** (1 / order) if channels else 1
            found[kind, index] = found[kind, index] + x.norm(order, dim=2).sum(dim=0) / size

        return hook

    with ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(model.blocks):
            heads, neurons = sizes(block)
            for kind, count, reader in (("head", heads, "attn.proj"), ("neuron", neurons, "mlp.fc2")):
                if count:
                    module = block.conv2 if isinstance(block, Residual) else block.get_submodule(reader)
                    stack.callback(module.register_forward_pre_hook(look(kind, index, count)).remove)
        for images, _ in batches:
            model(images)
    total = sum(len(images) for images, _ in batches)
    rows = {kind: [found[kind, index] for index in range(len(model.blocks))] for kind in ("head", "neuron")}
    return {kind: padded([row / total if isinstance(row, Tensor) else torch.zeros(0) for row in each])
            for kind, each in rows.items()}  # fmt: skip


def regroup(
    scores: Mapping[str, Tensor],
    density: float,
    parts: Collection[str] = ("head",),
    sorting_mode: str = "layer",
    at_least: int = 1,
) -> Plan:
    """The Plan that keeps the most important units: floor(density · units) of each block ("layer") or of all blocks
    together ("global"), of each kind in `parts`; of each block at least `at_least`.

    scores: of `importance`; NaN is no unit. −inf marks units that earlier states removed: they count among the units
    and are chosen last. Equal scores fall to the earlier unit. density: what all states so far leave together, (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: expected a share in (0, 1]")
    if sorting_mode not in SORTING:
        raise ValueError(f"sorting_mode is {sorting_mode!r}: expected one of {', '.join(SORTING)}")
    kept = {}
    for kind in parts:
        value = scores[kind]
        there = ~value.isnan()
        best = torch.zeros_like(there)
        for row, exists, score in zip(best, there, value, strict=True):
            units = int(exists.sum())
            count = at_least if sorting_mode == "global" else max(at_least, _floor(density * units))
            row[_order(score)[: min(count, units)]] = True
        if sorting_mode == "global":
            missing = _floor(density * int(there.sum())) - int(best.sum())
            rest = value.masked_fill(best, torch.nan).flatten()
            best.view(-1)[_order(rest)[: max(0, missing)]] = True
        kept[kind] = best
    return _plan(kept)


def refill(scores: Mapping[str, Tensor], plan: Plan, fillback_rate: float) -> Plan:
    """The plan with that share of the units it removes brought back, of each kind floor(fillback_rate · removed), the
    most important of all blocks first. scores: as for `regroup`; those of −inf are not brought back."""
    if not 0 <= fillback_rate <= 1:
        raise ValueError(f"fillback_rate is {fillback_rate}: expected a share in [0, 1]")
    kept = {}
    for kind, units in (("head", plan.heads), ("neuron", plan.neurons)):
        if units is None:
            continue
        value, best = scores[kind], torch.zeros_like(scores[kind], dtype=torch.bool)
        for row, stays in zip(best, units, strict=True):
            row[stays] = True
        removed = ~best & ~value.isnan()
        count = min(_floor(fillback_rate * int(removed.sum())), int((removed & (value > -torch.inf)).sum()))
        best.view(-1)[_order(value.masked_fill(~removed, torch.nan).flatten())[:count]] = True
        kept[kind] = best
    return _plan(kept)


def _plan(kept: Mapping[str, Tensor]) -> Plan:
    units = {kind: [row.nonzero().flatten().tolist() for row in best] for kind, best in kept.items()}
    return Plan(units.get("head"), units.get("neuron"))


def _order(scores: Tensor) -> Tensor:
    """Indices of what is not NaN, the highest score first, the earlier of equals."""
    order = scores.argsort(descending=True, stable=True)
    return order[~scores[order].isnan()]


def _floor(number: float) -> int:
    return math.floor(number + 1e-9)  # 0.29 · 100 is 28.99… in floating point


class Growing:
    """Growing regularisation: adds λ·w to the gradients of weights on their way out.

    masks: True for those weights, by parameter, as `outside` gives them. ceiling: λ at the last of `steps` optimiser
    steps; it starts at 0 and grows by `schedule`, one of SCHEDULES, with the exponent `exponents` where that has one.
    Call it between the backward pass and the optimiser's step. It keeps no state: λ is a function of the step.
    """

    def __init__(
        self, masks: Mapping[str, Tensor], ceiling: float, steps: int, schedule: str = "x", exponents: float = 4.0
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"RST_schedule is {schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if not (ceiling >= 0 and exponents > 0 and steps >= 1):
            raise ValueError(f"ceiling {ceiling}, exponents {exponents}, steps {steps}: expected ≥ 0, > 0 and ≥ 1")
        self.masks, self.ceiling, self.steps = dict(masks), ceiling, steps
        self.schedule, self.exponents = schedule, exponents

    def strength(self, step: int) -> float:
        """λ at a step counted from 0: 0 at the first, the ceiling at the last."""
        return self.ceiling * SCHEDULES[self.schedule](step / max(1, self.steps - 1), self.exponents)

    def __call__(self, model: nn.Module, step: int) -> None:
        strength = self.strength(step)
        for name, parameter in model.named_parameters():
            if name in self.masks and parameter.grad is not None:
                self.masks[name] = self.masks[name].to(parameter.device)  # moves once
                parameter.grad.add_(parameter.detach() * self.masks[name], alpha=strength)

    @torch.no_grad()
    def norm_ratio(self, model: nn.Module) -> float | None:
        """Norm of the weights on their way out over that of the others in the same matrices: None where there are no
        others, 0 where nothing is on its way out."""
        out, others = 0.0, 0.0
        for name, weight in prunable(model).items():
            mask = self.masks[name].to(weight.device)
            if mask.any():
                square = weight.double().square()
                out, others = out + square[mask].sum().item(), others + square[~mask].sum().item()
        return math.sqrt(out / others) if others else None if out else 0.0
