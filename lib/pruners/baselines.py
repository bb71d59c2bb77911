"""What a method has to beat: sets of patches chosen without looking at a model or an image."""

import torch
from torch import Tensor

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
