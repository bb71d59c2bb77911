"""Units and their weights: what a head, a hidden neuron or a ResNet's hidden channel owns of a model's parameters.

A head owns its rows of Q, K and V in `qkv` with their biases (and of a gate), and its columns of `proj`; a neuron its
row of `fc1` with its bias, and its column of `fc2`; a hidden channel its row of `conv1` with normalisation, and its
column of `conv2`.
What `surgery` removes with a unit is what it owns here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lib.pruners.surgery import Plan, sizes
from lib.resnet import Residual

# Of each kind the parameters of its block that units stand in, and the axis along which, seen as `_seen` says.
HEAD = {"attn.qkv.weight": 1, "attn.qkv.bias": 1, "attn.gate.weight": 0, "attn.gate.bias": 0, "attn.proj.weight": 1}
NEURON = {"mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.fc2.weight": 1}
CHANNEL = {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1}


class Slot(NamedTuple):
    """Where the units of a block stand in a parameter: seen as `shape`, unit u is index u along `axis`."""

    name: str
    shape: tuple[int, ...]
    axis: int


def slots(model: nn.Module) -> dict[str, list[list[Slot]]]:
    """Of each kind of unit, "head" and "neuron", the slots of every block; none where it has no such units."""
    found = {"head": [], "neuron": []}
    for index, block in enumerate(model.blocks):
        where, (heads, neurons) = f"blocks.{index}", sizes(block)
        own = {"head": {}, "neuron": {}}
        if isinstance(block, Residual):
            own["neuron"] = CHANNEL
        else:
            own["head"] = HEAD if heads else {}
            own["neuron"] = NEURON if neurons and type(block.mlp) is Mlp else {}
        parameters = dict(block.named_parameters())
        for kind, axes in own.items():
            found[kind].append([Slot(f"{where}.{name}", _seen(parameters[name], name, heads), axis)
                                for name, axis in axes.items() if name in parameters])  # fmt: skip
    return found


def _seen(parameter: Tensor, name: str, heads: int) -> tuple[int, ...]:
    """The shape in which a parameter shows its units: qkv as (3, H, d, …), gate as (H, d, …), proj as (D, H, d)."""
    rows, *columns = parameter.shape
    if ".qkv." in name:
        return 3, heads, rows // (3 * heads), *columns
    if ".gate." in name:
        return heads, rows // heads, *columns
    return (rows, heads, columns[0] // heads) if ".proj." in name else (rows, *columns)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weight matrices that units stand in, by name: qkv, proj, fc1, fc2 of every block, or conv1, conv2."""
    named = {slot.name for rows in slots(model).values() for row in rows for slot in row}
    return {name: tensor for name, tensor in model.named_parameters() if name in named and tensor.ndim > 1}


def per_unit(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over each unit of values given per element of parameters, by name; parameters without values add nothing.

    "head", "neuron" (L, U) float64 on the CPU, NaN where a block has no such unit.
    """
    found = {}
    for kind, rows in slots(model).items():
        sums = [torch.zeros(row[0].shape[row[0].axis] if row else 0, dtype=torch.float64) for row in rows]
        for total, slot in ((total, slot) for total, row in zip(sums, rows, strict=True) for slot in row):
            if slot.name in values:
                total += (
                    values[slot.name]
                    .double()
                    .cpu()
                    .reshape(slot.shape)
                    .movedim(slot.axis, 0)
                    .reshape(len(total), -1)
                    .sum(1)
                )
        found[kind] = padded(sums)
    return found


def padded(rows: list[Tensor]) -> Tensor:
    """Rows of unequal length as one float64 tensor (L, U) on the CPU, filled up with NaN."""
    return nn.utils.rnn.pad_sequence([row.double().cpu() for row in rows], batch_first=True, padding_value=torch.nan)


def outside(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Per parameter with units a mask of its shape: True for the weights of units that the plan does not keep."""
    plan, found = plan.explicit(model), {}
    parameters = dict(model.named_parameters())
    for kind, kept in (("head", plan.heads), ("neuron", plan.neurons)):
        for row, stays in zip(slots(model)[kind], kept, strict=True):
            for slot in row:
                parameter = parameters[slot.name]
                gone = torch.ones(slot.shape, dtype=torch.bool, device=parameter.device)
                gone.movedim(slot.axis, 0)[stays] = False
                found[slot.name] = gone.view_as(parameter)
    return found


def element_mask(
    model: nn.Module, density: float, among: Mapping[str, Tensor] | None = None, total: int | None = None
) -> dict[str, Tensor]:
    """True for the weights of `prunable` of largest magnitude, ranked together: round(density · total) of them.

    among: only these weights may stay; None is all. total: the density is a share of so many weights; None is their
    number in this model. ValueError: a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: expected a share in (0, 1]")
    weights = prunable(model)
    if not weights:
        return {}
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).double()
    if among is not None:
        magnitudes[~torch.cat([among[name].flatten() for name in weights]).to(magnitudes.device)] = -1
    count = min(round(density * (total or len(magnitudes))), int((magnitudes >= 0).sum()))
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.argsort(descending=True, stable=True)[:count]] = True
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}
