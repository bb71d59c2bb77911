"""Removing parts of a ViT for real: fewer rows and columns, not zeros.

A head is `head_dim` rows of each of Q, K and V in `qkv` with their biases, and as many columns of `proj`; a neuron is a
row of `fc1` with its bias, and a column of `fc2`. The biases of `proj` and `fc2` stay: without any head a block still
adds `proj.bias`, without any neuron `fc2.bias`. A sublayer or block that is removed as a whole adds nothing.

Of a ResNet's residual block the hidden channels are the neurons: rows of `conv1` with their normalisation, columns of
`conv2`.

All of it equals multiplying the inputs of `proj` and `fc2`, or a sublayer's output, by zero (`components.gates`).
Zeroing the rows of `qkv` or `fc1` instead would not: their biases would leak through the softmax and the GELU.
"""

import contextlib
import copy
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lib import blocks, models
from lib.resnet import Residual, ResNet20


@dataclass(frozen=True)
class Plan:
    """What stays of a ViT, per block.

    heads, neurons: indices of the kept heads and hidden MLP neurons, ascending; None keeps all, of one block or of
    every block. blocks, attn, mlp: whether the block, its attention, its MLP stays; None keeps all.
    """

    heads: list[list[int] | None] | None = None
    neurons: list[list[int] | None] | None = None
    blocks: list[bool] | None = None
    attn: list[bool] | None = None
    mlp: list[bool] | None = None

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote; ValueError otherwise."""
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            names = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"this is not the JSON of a plan ({error}): expected an object of {names}") from None

    def explicit(self, vit: nn.Module) -> "Plan":
        """The same with nothing left to None, for this model; ValueError where it does not fit the model."""
        depth = len(vit.blocks)
        counts = dict(zip(("heads", "neurons"), zip(*map(sizes, vit.blocks), strict=True), strict=False))
        stays = {name: [True] * depth if getattr(self, name) is None else [bool(kept) for kept in getattr(self, name)]
                 for name in ("blocks", "attn", "mlp")}  # fmt: skip
        units = {name: [None] * depth if getattr(self, name) is None else getattr(self, name)
                 for name in ("heads", "neurons")}  # fmt: skip
        for name, given in (stays | units).items():
            if len(given) != depth:
                raise ValueError(f"plan: {name} has {len(given)} entries, expected one for each of {depth} blocks")
        for name, whole in (("heads", "attn"), ("neurons", "mlp")):
            full = []
            for index, (given, size) in enumerate(zip(units[name], counts.get(name, ()), strict=True)):
                kept = [*range(size)] if given is None else sorted(map(int, given))
                if len({*kept}) != len(kept) or (kept and not 0 <= kept[0] <= kept[-1] < size):
                    raise ValueError(f"plan: {name} {given} of block {index}: expected distinct indices below {size}")
                full.append(kept if stays["blocks"][index] and stays[whole][index] else [])
            units[name] = full
        return Plan(**units, **stays)

    def shares(self, vit: nn.Module) -> dict[str, float]:
        """The shares of a model's heads and neurons that stay (1 of none): what another ranking must keep to cost as
        much."""
        plan, all_of_it = self.explicit(vit), Plan().explicit(vit)
        kept, whole = ([sum(map(len, units)) for units in (one.heads, one.neurons)] for one in (plan, all_of_it))
        return {"head": kept[0] / whole[0] if whole[0] else 1.0, "neuron": kept[1] / whole[1] if whole[1] else 1.0}

    def after(self, earlier: "Plan") -> "Plan":
        """This explicit plan, made for what an explicit `earlier` one left, as a plan for the model before both."""
        left = [index for index, kept in enumerate(earlier.blocks) if kept]
        gone = {"heads": [], "neurons": [], "blocks": False, "attn": False, "mlp": False}
        merged = {name: [copy.copy(none) for _ in earlier.blocks] for name, none in gone.items()}
        for own, index in enumerate(left):
            for name in ("blocks", "attn", "mlp"):
                merged[name][index] = getattr(earlier, name)[index] and getattr(self, name)[own]
            for name in ("heads", "neurons"):
                merged[name][index] = [getattr(earlier, name)[index][unit] for unit in getattr(self, name)[own]]
        return Plan(**merged)

    def within(self, earlier: "Plan") -> "Plan":
        """This explicit plan for what an explicit `earlier` one left: undoes `after`. ValueError: it keeps what that
        removed."""
        left = [index for index, kept in enumerate(earlier.blocks) if kept]
        own = {name: [getattr(self, name)[index] for index in left] for name in ("blocks", "attn", "mlp")}
        for name in ("heads", "neurons"):
            places = [{unit: i for i, unit in enumerate(getattr(earlier, name)[index])} for index in left]
            for index, place in zip(left, places, strict=True):
                if back := {*getattr(self, name)[index]} - {*place}:
                    raise ValueError(f"plan: {name} {sorted(back)} of block {index} were removed before")
            own[name] = [[place[unit] for unit in getattr(self, name)[index]]
                         for index, place in zip(left, places, strict=True)]  # fmt: skip
        return Plan(**own)


def sizes(block: nn.Module) -> tuple[int, int]:
    """How many heads and hidden neurons a block has; of a residual block the neurons are its hidden channels."""
    if isinstance(block, Residual):
        return 0, block.conv1.out_channels
    return block.attn.num_heads, getattr(getattr(block.mlp, "fc2", None), "in_features", 0)


def remove(vit: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of a timm VisionTransformer that keeps what the plan says; `vit` is left untouched.

    The result is a timm VisionTransformer: it trains, compiles, exports, saves, and any token pruner wraps it.
    A ResNet20 may lose hidden channels, but no block all of them. UnsupportedBlock: see lib.blocks; ValueError: a plan
    that does not fit the model.
    """
    if not isinstance(vit, ResNet20):
        blocks.check(vit)
    plan = plan.explicit(vit)
    if isinstance(vit, ResNet20) and not all(plan.blocks):
        raise ValueError("plan: a block of a ResNet is removed: expected hidden channels only")
    small = copy.deepcopy(vit)
    kept = [index for index, stays in enumerate(plan.blocks) if stays]
    for index in kept:
        slice_block(small.blocks[index], plan.heads[index], plan.neurons[index], plan.attn[index], plan.mlp[index])
    small.blocks = nn.Sequential(*(small.blocks[index] for index in kept))
    small.blocks.training = vit.blocks.training
    with contextlib.suppress(models.ModelError):  # a model made elsewhere may be pruned, if not saved
        config = models.describe(vit)
        earlier = config.get("plan")
        small.config = config | {"plan": asdict(plan.after(Plan(**earlier)) if earlier else plan)}
    return small


def slice_block(block: nn.Module, heads: list[int], neurons: list[int], attn: bool = True, mlp: bool = True) -> None:
    """Reduce a block, in place, to these heads and neurons, or to nothing of its attention or MLP."""
    if isinstance(block, Residual):
        _slice_residual(block, neurons)
        return
    attention, perceptron = block.attn, block.mlp
    some_heads, some_neurons = 0 < len(heads) < attention.num_heads, bool(neurons)
    some_neurons = some_neurons and len(neurons) < perceptron.fc2.in_features
    blocks.check_removable(block, heads=some_heads, neurons=some_neurons)
    if not attn:
        block.attn = blocks.Bias()
    elif not heads and attention.num_heads:
        block.attn = blocks.Bias(attention.proj.bias, attention.proj_drop)
    elif some_heads:
        _slice_attention(attention, heads)
    if not mlp:
        block.mlp = blocks.Bias()
    elif not neurons and not isinstance(perceptron, blocks.Bias):
        block.mlp = blocks.Bias(perceptron.fc2.bias, perceptron.drop2)
    elif some_neurons:
        _keep(perceptron.fc1, rows=neurons)
        _keep(perceptron.fc2, columns=neurons)
    for norm, sublayer in (("norm1", block.attn), ("norm2", block.mlp)):
        if isinstance(sublayer, blocks.Bias):  # it does not look at what it is fed
            setattr(block, norm, nn.Identity())
            getattr(block, norm).train(block.training)
            sublayer.train(block.training)


def _slice_attention(attn: nn.Module, heads: list[int]) -> None:
    d = attn.head_dim
    rows = [head * d + i for head in heads for i in range(d)]
    _keep(attn.qkv, rows=[part * attn.num_heads * d + row for part in range(3) for row in rows])
    _keep(attn.proj, columns=rows)
    if getattr(attn, "gate", None) is not None:  # timm >= 1.0.20
        _keep(attn.gate, rows=rows)
    attn.num_heads, attn.attn_dim = len(heads), len(rows)  # the scale stays 1/√d: d does not change


def _slice_residual(block: Residual, channels: list[int]) -> None:
    if not channels:
        raise ValueError("plan: a residual block keeps no hidden channel: expected at least one")
    norm = block.bn1
    block.conv1.weight, block.conv1.out_channels = _taken(block.conv1.weight, 0, channels), len(channels)
    block.conv2.weight, block.conv2.in_channels = _taken(block.conv2.weight, 1, channels), len(channels)
    norm.weight, norm.bias, norm.num_features = (
        *(_taken(p, 0, channels) for p in (norm.weight, norm.bias)),
        len(channels),
    )
    norm.running_mean, norm.running_var = (t[channels] for t in (norm.running_mean, norm.running_var))


def _keep(linear: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    if rows is not None:
        linear.weight = _taken(linear.weight, 0, rows)
        linear.bias = _taken(linear.bias, 0, rows)
        linear.out_features = len(rows)
    if columns is not None:
        linear.weight = _taken(linear.weight, 1, columns)
        linear.in_features = len(columns)


def _taken(parameter: nn.Parameter | None, dim: int, index: list[int]) -> nn.Parameter | None:
    if parameter is None:
        return None
    chosen: Tensor = parameter.detach().index_select(dim, torch.tensor(index, device=parameter.device))
    return nn.Parameter(chosen, parameter.requires_grad)
