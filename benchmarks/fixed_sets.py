"""Which fixed set of patches serves a stage-1 model best before fine-tuning? On validation images.

    python benchmarks/fixed_sets.py outputs/ucb_stage1/<run> --keep-ratio 0.3

ucb: what stage 2 freezes. block l: the ranking of that block alone. worst: the lowest ranked. spread: far apart
on the grid. If random or spread sets win, coverage matters more than rank: neighbours tell the model the same.
"""

import argparse
import copy

import pandas as pd
import torch

from lib import evaluate, models, runs, starts
from lib.pruners import rankings
from lib.pruners.tokens import FixedPatches, kept_count


def spread_set(grid: tuple[int, int], k: int) -> list[int]:
    """k patches chosen one by one, each as far as possible from those chosen before."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).flatten(0, 1).double()
    distances, chosen = torch.cdist(places, places), [0]
    while len(chosen) < k:
        chosen.append(int(distances[:, chosen].amin(dim=1).argmax()))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or model file of ucb_stage1.ipynb")
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--random-sets", type=int, default=8)
    arguments = parser.parse_args()
    about = models.origin(runs.resolve(arguments.run), "ucb.UCB")
    images = starts.load(about)
    stage1 = models.load(runs.resolve(arguments.run))
    grid, ratio = stage1.vit.patch_embed.grid_size, arguments.keep_ratio
    k, counts = kept_count(ratio, stage1.patches), stage1.ucb_count_scores.mean(dim=1)[:, stage1.prefix :]

    def accuracy(kept: torch.Tensor | list[int]) -> float:
        frozen = FixedPatches(copy.deepcopy(stage1.vit), kept)
        found = evaluate.predict(frozen, images.val, mean=images.mean, std=images.std)
        return evaluate.classification(*found)["top1"]

    sets = {"ucb": stage1.ranked(ratio), "worst": stage1.patch_scores().argsort()[:k]}
    sets |= {"centre": rankings.centre_set(grid, ratio), "spread": spread_set(grid, k)}
    sets |= {f"block {index}": row.argsort(descending=True, stable=True)[:k] for index, row in enumerate(counts)}
    rows = {name: accuracy(kept) for name, kept in sets.items()}
    drawn = pd.Series([accuracy(rankings.random_set(grid, ratio, seed)) for seed in range(arguments.random_sets)])
    rows |= {f"random, mean of {len(drawn)}": drawn.mean(), "random, standard deviation": drawn.std()}
    print(f"{images.name}: {k} of {stage1.patches} patches, {len(images.val)} validation images, no fine-tuning")
    print(pd.Series(rows).round(4).to_string())


if __name__ == "__main__":
    main()
