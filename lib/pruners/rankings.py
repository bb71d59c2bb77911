"""What a method that learns what to keep has to beat: sets of patches chosen without looking at a model or an image,
and rankings of a model's parts made without looking at data."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lib.pruners import components
from lib.pruners.surgery import sizes
from lib.pruners.tokens import kept_count


def random_set(grid: tuple[int, int], keep_ratio: float, seed: int = 0) -> Tensor:
    """floor(keep_ratio · P) patches of a (rows, columns) grid drawn uniformly: (k,) indices, ascending."""
    patches = grid[0] * grid[1]
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    return order[: kept_count(keep_ratio, patches)].sort().values


def centre_set(grid: tuple[int, int], keep_ratio: float, seed: int = 0) -> Tensor:
    """The floor(keep_ratio · P) patches nearest to the middle of a (rows, columns) grid: (k,) indices, ascending.

    Distance is Euclidean with both axes scaled to the image's extent; equal distances are ordered by seed.
    """
    rows, columns = (torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64)[1::2] for n in grid)
    distance = rows[:, None].square() + columns[None, :].square()
    shuffled = torch.randperm(distance.numel(), generator=torch.Generator().manual_seed(seed))
    order = shuffled[distance.flatten()[shuffled].argsort(stable=True)]
    return order[: kept_count(keep_ratio, grid[0] * grid[1])].sort().values


SETS = {"random": random_set, "centre": centre_set}


def random_parts(vit: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A random score per part, shaped as eap.scores gives them, NaN where there is none."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.rand(there.shape, generator=generator).to(there.device).where(there, torch.nan)
            for kind, there in components.exist(vit).items()}  # fmt: skip


def magnitude_parts(vit: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The L2 norm of every part's own weights and biases, shaped as eap.scores gives them, NaN where there is none.

    Of a head: its rows of Q, K and V and its columns of the projection; of a neuron: its row of fc1 and column of fc2;
    of a block, attention or MLP: all of it. Nothing is drawn: `seed` is ignored, as rankings share one signature.
    """
    squares = {kind: there.double() for kind, there in components.exist(vit).items()}
    for index, block in enumerate(vit.blocks):
        for kind, module in (("block", block), ("attn", block.attn), ("mlp", block.mlp)):
            squares[kind][index] *= sum(p.detach().double().square().sum() for p in module.parameters())
        heads, neurons = sizes(block)
        if heads:
            total = _per_row(block.attn.qkv).view(3, heads, -1).sum(dim=(0, 2))
            total = total + _per_column(block.attn.proj).view(heads, -1).sum(dim=1)
            squares["head"][index, :heads] *= total
        if neurons and isinstance(block.mlp, Mlp):
            squares["neuron"][index, :neurons] *= _per_row(block.mlp.fc1) + _per_column(block.mlp.fc2)
    there = components.exist(vit)
    return {kind: value.sqrt().where(there[kind], torch.nan) for kind, value in squares.items()}


def _per_row(linear: nn.Linear) -> Tensor:
    bias = 0 if linear.bias is None else linear.bias.detach().double().square()
    return linear.weight.detach().double().square().sum(dim=1) + bias


def _per_column(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().double().square().sum(dim=0)


PARTS = {"random": random_parts, "magnitude": magnitude_parts}
