"""A-ViT's speed as ratios from one process: make bench, or python benchmarks/avit.py [--batch 32] [--repeats 30].

The depths are real: those of the test images of a trained A-ViT, saved in benchmarks/depths.npz by

    python benchmarks/avit.py --record outputs/imagenette/avit/<run>

and planted into models of any width: channel 0 carries each token's depth unchanged through the blocks, so gates,
halting, gathering and attention all do their work, on tokens that leave when real ones did.

dense:   the bare ViT. mask, gather: the two modes of one A-ViT.
ceiling: the same blocks on as many images and tokens per block, in rectangular batches of the mean count, without
         gate, halting or gathering: what unequal counts and selection cost is what is missing to it.
share:   time of the ceiling / time of gather, round by round; 1 means that selecting costs nothing.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import evaluate, models
from lib.pruners import avit
from lib.pruners.avit import AViT

DEPTHS = Path(__file__).parent / "depths.npz"


class Planted(AViT):
    """An A-ViT whose tokens halt at given depths (B, N), whatever the images show."""

    def __init__(self, vit: nn.Module, depths: Tensor, **arguments):
        super().__init__(vit, **arguments)
        share = (1 - self.eps / 2) / depths  # reaches 1 − ε at that block and not before
        self.register_buffer("code", (share.logit() + self.gate_center) / self.gate_scale)
        with torch.no_grad():
            for block in vit.blocks:
                for last in (block.attn.proj, block.mlp.fc2):
                    last.weight[0], last.bias[0] = 0, 0

    def embed(self, images: Tensor) -> Tensor:
        x = super().embed(images)
        x[..., 0] = self.code
        return x


class Ceiling(nn.Module):
    """A ViT's blocks on rectangular batches of given shape (images, tokens) per block, nothing passed on."""

    def __init__(self, vit: nn.Module, shapes: list[tuple[int, int]]):
        super().__init__()
        self.vit, self.shapes = vit, shapes

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for block, (count, tokens) in zip(vit.blocks, self.shapes, strict=True):
            if count:
                block(x[:count, :tokens])
        return vit.forward_head(vit.norm(x[:, :1]))


def against_ceiling(arch: str, depths: Tensor, repeats: int) -> dict:
    """One row: speed-ups over dense, of the ceiling and over mask, and the share of the ceiling reached."""
    vit = models.create(arch, 1000).eval()
    images = torch.randn(len(depths), 3, *vit.patch_embed.img_size)
    modes = {mode: Planted(vit, depths, mode=mode).eval() for mode in ("mask", "gather")}
    running = depths[..., None] > torch.arange(len(vit.blocks))  # (B, N, L)
    count, tokens = running[:, 0].sum(0), running.sum((0, 1))
    shapes = [(int(c), round(int(t) / max(int(c), 1))) for c, t in zip(count, tokens, strict=True)]
    arms = {"dense": vit, **modes, "ceiling": Ceiling(vit, shapes).eval()}
    over_dense = evaluate.latency(arms, images, repeats=repeats, device=evaluate.device()).set_index("model").speedup
    pair = {name: arms[name] for name in ("ceiling", "gather")}
    share = evaluate.latency(pair, images, repeats=repeats, device=evaluate.device()).set_index("model")
    row = {"arch": arch, "batch": len(depths), "mean_depth": depths[:, 1:].double().mean().item()}
    row |= {"mask": over_dense["mask"], "gather": over_dense["gather"], "ceiling": over_dense["ceiling"]}
    row |= {"gather/mask": over_dense["gather"] / over_dense["mask"], "share": share.speedup["gather"]}
    return row | {"share_iqr": share.speedup_iqr["gather"]}


def attention_of_unequal_counts(arch: str, depths: Tensor, repeats: int) -> pd.DataFrame:
    """Ways to run attention on packed tokens of unequal counts, in time relative to a rectangular batch of their mean.

    Counts are those of the block in the middle. by_count: a call per run of equal counts, no padding (lib's choice on
    CPU). padded: one call (lib's choice elsewhere). nested: torch.nested's jagged layout.
    """
    vit = models.create(arch, 1000).eval()
    attn = vit.blocks[0].attn
    middle = len(vit.blocks) // 2
    counts = sorted(n for n in (depths > middle).sum(1).tolist() if n)
    mean = round(sum(counts) / len(counts))
    packed = torch.randn(3, 1, sum(counts), attn.num_heads, attn.head_dim).transpose(2, 3)
    even = torch.randn(3, len(counts), mean, attn.num_heads, attn.head_dim).transpose(2, 3)
    ways = {
        "rectangular": lambda: nn.functional.scaled_dot_product_attention(*even),
        "by_count": lambda: avit._attend_by_count(attn, *packed, counts),
        "padded": lambda: avit._attend_padded(attn, *packed, counts),
        "nested": lambda: _attend_nested(*packed, counts),
    }
    models_of = {name: _Call(way) for name, way in ways.items()}
    table = evaluate.latency(models_of, torch.zeros(1), repeats=repeats, device="cpu")
    return table.assign(time=1 / table.speedup, arch=arch)[["arch", "model", "time"]]


def _attend_nested(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    offsets = torch.tensor([0, *np.cumsum(counts)])
    jagged = (torch.nested.nested_tensor_from_jagged(t[0].transpose(0, 1).contiguous(), offsets) for t in (q, k, v))
    found = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in jagged))
    return found.transpose(1, 2).values().transpose(0, 1)[None]


class _Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, _: Tensor) -> Tensor:
        return self.function()
