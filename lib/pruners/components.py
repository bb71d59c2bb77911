"""The parts of a ViT that can be removed, and gates on them.

A gate is a number that multiplies a part: 1 is the model as it is, 0 is without the part, and the derivative at 1 says
how much the part matters to first order. Where it multiplies is where removal cuts (`surgery`):

    block    what the block adds to its input           (L,)
    attn     the attention's output                     (L,)
    mlp      the MLP's output                           (L,)
    head     a head's slice of the input of attn.proj   (L, H)
    neuron   a hidden neuron: an entry of the input of mlp.fc2, after the GELU  (L, M)
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lib import blocks
from lib.pruners.surgery import Plan, sizes

KINDS = ("block", "attn", "head", "mlp", "neuron")


@dataclass(frozen=True)
class Component:
    """One removable part. units: its heads or neurons; () where it is a whole block, attention or MLP."""

    kind: str
    block: int
    units: tuple[int, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        ends = {*self.units[:1], *self.units[-1:]}
        return f"{self.kind} {self.block}" + (f".{'-'.join(map(str, sorted(ends)))}" if ends else "")


def of(vit: nn.Module, group_size: int = 64, parts: Collection[str] = KINDS) -> list[Component]:
    """The parts of a timm VisionTransformer in the order in which they run, larger before smaller.

    group_size: hidden neurons that go together, from 1; the last group of a block may be smaller. parts: which of
    KINDS. ValueError: an unknown kind; UnsupportedBlock: a part that could not be removed.
    """
    blocks.check(vit)
    if unknown := {*parts} - {*KINDS} or not parts:
        raise ValueError(f"parts are {sorted(unknown) if parts else '()'}: expected some of {', '.join(KINDS)}")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}: expected a number of neurons from 1")
    found = []
    for index, block in enumerate(vit.blocks):
        blocks.check_removable(block, heads="head" in parts, neurons="neuron" in parts)
        heads, neurons = sizes(block)
        groups = [tuple(range(i, min(i + group_size, neurons))) for i in range(0, neurons, group_size)]
        found.append(Component("block", index))
        if not isinstance(block.attn, blocks.Bias):
            found += [Component("attn", index), *(Component("head", index, (head,)) for head in range(heads))]
        if not isinstance(block.mlp, blocks.Bias):
            found += [Component("mlp", index), *(Component("neuron", index, group) for group in groups)]
    return [part for part in found if part.kind in parts]


def ones(vit: nn.Module, images: int | None = None) -> dict[str, Tensor]:
    """Open gates of all kinds: (L,), (L, H) and (L, M), each with a leading (images,) where every image has its own.

    Blocks with fewer heads or neurons than the widest leave the rest of their row unused.
    """
    blocks.check(vit)
    like = next(vit.parameters())
    widths = [max(column, default=0) for column in zip(*map(sizes, vit.blocks), strict=True)] or [0, 0]
    units = dict(zip(("head", "neuron"), widths, strict=True))
    shapes = {kind: (len(vit.blocks), *([units[kind]] if kind in units else [])) for kind in KINDS}
    batch = () if images is None else (images,)
    return {kind: torch.ones(*batch, *shape, dtype=like.dtype, device=like.device) for kind, shape in shapes.items()}


def exist(vit: nn.Module) -> dict[str, Tensor]:
    """Which entries of `ones` are of a part that is there, as booleans."""
    there = {kind: torch.zeros_like(gate, dtype=torch.bool) for kind, gate in ones(vit).items()}
    for part in of(vit, 1, [kind for kind in KINDS if _removable(vit, kind)]):
        there[part.kind][part.block, list(part.units) or ...] = True
    return there


def _removable(vit: nn.Module, kind: str) -> bool:
    with contextlib.suppress(blocks.UnsupportedBlock):
        for block in vit.blocks:
            blocks.check_removable(block, heads=kind == "head", neurons=kind == "neuron")
        return True
    return False


def score(scores: Mapping[str, Tensor], part: Component) -> float:
    """A part's score, given scores shaped like `ones`: of several units their sum."""
    return float(scores[part.kind][part.block][list(part.units) or ...].sum())


def scored(vit: nn.Module, values: Mapping[Component, float], plan: Plan) -> list[tuple[Component, float, bool]]:
    """(part, value, whether `plan` removes it) for all parts that have a value, as figures take it."""
    plan = plan.explicit(vit)

    def removed(part: Component) -> bool:
        if part.kind in ("head", "neuron"):
            kept = (plan.heads if part.kind == "head" else plan.neurons)[part.block]
            return not {*part.units} & {*kept}
        return not getattr(plan, "blocks" if part.kind == "block" else part.kind)[part.block]

    return [(part, value, removed(part)) for part, value in values.items()]


def without(vit: nn.Module, removed: Iterable[Component]) -> dict[str, Tensor]:
    """Gates that are closed for the removed parts and open for all others."""
    closed = ones(vit)
    for part in removed:
        closed[part.kind][part.block, list(part.units) or ...] = 0
    return closed


def plan(vit: nn.Module, removed: Iterable[Component]) -> Plan:
    """The Plan that removes these parts."""
    gate = without(vit, removed)
    units = {kind: [[unit for unit in range(sizes(block)[place]) if row[unit]]
                    for block, row in zip(vit.blocks, gate[kind].tolist(), strict=True)]
             for place, kind in enumerate(("head", "neuron"))}  # fmt: skip
    stays = {kind: gate[kind].bool().tolist() for kind in ("block", "attn", "mlp")}
    return Plan(units["head"], units["neuron"], stays["block"], stays["attn"], stays["mlp"])


@contextlib.contextmanager
def gates(vit: nn.Module, values: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Within, the parts of `vit` are multiplied by `values` (see `ones`; kinds left out stay open), also in autograd.

    Gives the gates in use. Afterwards the model is as before. Only the model itself is gated, not a token pruner
    around it.
    """
    blocks.check(vit)
    gate = ones(vit) if values is None else values
    if unknown := {*gate} - {*KINDS}:
        raise ValueError(f"gates are {sorted(unknown)}: expected some of {', '.join(KINDS)}")
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(vit.blocks):
            for handle in _hooks(block, index, gate):
                hooks.callback(handle.remove)
        yield gate


def _hooks(block: nn.Module, index: int, gate: dict[str, Tensor]) -> Iterator[Any]:
    def of_block(kind: str) -> Tensor:
        """(1, 1, 1) or (B, 1, 1), or with the units' axis last."""
        value = gate[kind]
        if kind in ("head", "neuron"):
            return value[..., index, None, :].reshape(-1, 1, value.shape[-1])
        return value[..., index].reshape(-1, 1, 1)

    def scale_heads(attn: nn.Module, x: Tensor) -> Tensor:
        return x * of_block("head")[..., : attn.num_heads].repeat_interleave(attn.head_dim, dim=-1)

    attn, mlp = block.attn, block.mlp
    if "block" in gate:
        yield block.register_forward_hook(lambda _, fed, y: fed[0] + of_block("block") * (y - fed[0]))
    for kind, sublayer in (("attn", attn), ("mlp", mlp)):
        if kind in gate:
            yield sublayer.register_forward_hook(lambda _, __, y, kind=kind: y * of_block(kind))
    if "head" in gate and attn.num_heads:
        yield attn.proj.register_forward_pre_hook(lambda _, fed: (scale_heads(attn, fed[0]),))
    if "neuron" in gate and hasattr(mlp, "fc2"):
        yield mlp.fc2.register_forward_pre_hook(lambda fc2, fed: (fed[0] * of_block("neuron")[..., : fc2.in_features],))
