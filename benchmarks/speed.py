"""Speed as ratios from one process: make bench, or python benchmarks/speed.py [--batch 32] [--repeats 30].

frozen:  the model that UCB stage 2 makes: it embeds and runs only the kept patches.
ceiling: the same blocks fed that many tokens, with the patches cut out beforehand: what no token method can beat.
share:   time of the ceiling / time of the frozen model, round by round; 1 means that selecting costs nothing.
"""

import argparse
import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import evaluate, models, runs
from lib.pruners import rankings
from lib.pruners.tokens import FixedPatches
from lib.pruners.ucb import UCB


class Ceiling(nn.Module):
    """A frozen model's own embedding and blocks on patches that somebody else has cut out for nothing."""

    def __init__(self, frozen: FixedPatches, batch: int):
        super().__init__()
        self.vit = frozen.vit
        weight = frozen.vit.patch_embed.proj.weight
        self.register_buffer("pixels", torch.randn(batch, len(frozen.kept), weight[0].numel()))

    def forward(self, images: Tensor) -> Tensor:
        embed = self.vit.patch_embed
        x = embed.norm(F.linear(self.pixels, embed.proj.weight.flatten(1), embed.proj.bias))
        return self.vit.forward_head(self.vit.norm(self.vit.blocks(self.vit.norm_pre(self.vit._pos_embed(x)))))


def frozen_against_ceiling(arch: str, batch: int, repeats: int) -> pd.DataFrame:
    """One row per keep ratio: speed-up over the dense model, of the ceiling, and the share reached."""
    dense = models.create(arch, 1000).eval()
    images = torch.randn(batch, 3, *dense.patch_embed.img_size)
    rows = []
    for ratio in (0.7, 0.5, 0.3):
        kept = rankings.random_set(dense.patch_embed.grid_size, ratio)
        frozen = FixedPatches(copy.deepcopy(dense), kept).eval()
        arms = {"dense": dense, "frozen": frozen, "ceiling": Ceiling(frozen, batch).eval()}
        over_dense = evaluate.latency(arms, images, repeats=repeats, device=evaluate.device()).set_index("model")
        pair = {name: arms[name] for name in ("ceiling", "frozen")}
        share = evaluate.latency(pair, images, repeats=repeats, device=evaluate.device()).set_index("model")
        row = {"arch": arch, "keep_ratio": ratio, "tokens": len(kept) + dense.num_prefix_tokens}
        row["macs_ratio"] = evaluate.closed_form_macs(dense) / evaluate.closed_form_macs(frozen.vit)
        row |= {"speedup": over_dense.speedup["frozen"], "ceiling": over_dense.speedup["ceiling"]}
        row |= {"share": share.speedup["frozen"], "share_iqr": share.speedup_iqr["frozen"]}
        rows.append(row)
    return pd.DataFrame(rows)


def exploring_against_dense(arch: str, batch: int, repeats: int) -> pd.DataFrame:
    """What stage 1 costs: evaluation with pruning in every block, by mode, as speed relative to the dense model."""
    dense = models.create(arch, 1000).eval()
    images = torch.randn(batch, 3, *dense.patch_embed.img_size)
    arms = {"dense": dense} | {
        f"{mode} {ratio}": UCB(copy.deepcopy(dense), ratio, mode=mode).eval()
        for mode in ("mask", "gather")
        for ratio in (0.9, 0.7)
    }
    return evaluate.latency(arms, images, repeats=repeats, device=evaluate.device())[
        ["model", "speedup", "speedup_iqr"]
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--arch", default="vit_tiny_patch16_224")
    arguments = parser.parse_args()
    facts = runs.provenance()
    versions = f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    print(f"{versions}, batch {arguments.batch}, fp32")
    pd.options.display.width = 140
    for table in (frozen_against_ceiling, exploring_against_dense):
        print(f"\n{table.__doc__}")
        print(table(arguments.arch, arguments.batch, arguments.repeats).round(3).to_string(index=False))
