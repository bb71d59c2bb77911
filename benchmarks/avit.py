"""A-ViT's speed as ratios from one process: make bench, or python benchmarks/avit.py [--batch 32] [--repeats 30].

The depths are real: those of the test images of a trained A-ViT, saved in benchmarks/depths.npz by

    python benchmarks/avit.py --record outputs/avit_imagenette/avit/imagenette-ponder_weight0.03

and planted into models of any width: channel 0 carries each token's depth unchanged through the blocks, so gates,
halting, gathering and attention all do their work, on tokens that leave when real ones did.

dense:   the bare ViT. mask, gather: the two modes of one A-ViT.
ceiling: the same blocks on as many images and tokens per block, in rectangular batches of the mean count, without
         gate, halting or gathering: what unequal counts and selection cost is what is missing to it.
share:   time of the ceiling / time of gather, round by round; 1 means that selecting costs nothing.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import evaluate, models, runs, starts
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


def against_other_modes(archs: list[str], batches: list[int], repeats: int) -> pd.DataFrame:
    """Speed relative to the dense model (mask, gather, ceiling), and the share of the ceiling that gather reaches."""
    return pd.DataFrame(against_ceiling(arch, depths(arch, batch), repeats) for arch in archs for batch in batches)


def attention_of_unequal_counts(archs: list[str], batches: list[int], repeats: int) -> pd.DataFrame:
    """Time of attention on packed tokens of unequal counts, relative to a rectangular batch of their mean count.

    by_count: a call per run of equal counts, no padding (lib's choice on CPU). padded: one call (lib's choice
    elsewhere). bucketed: four groups of similar count, each padded. nested: torch.nested's jagged layout, where CUDA
    has variable-length kernels. Counts are those of the block in the middle.
    """
    return pd.DataFrame(ways_to_attend(arch, depths(arch, batch), repeats) for arch in archs for batch in batches)


def ways_to_attend(arch: str, found: Tensor, repeats: int) -> dict:
    """One row of attention_of_unequal_counts."""
    vit = models.create(arch, 1000).eval()
    attn = vit.blocks[0].attn
    counts = sorted(n for n in (found > len(vit.blocks) // 2).sum(1).tolist() if n)
    where, dims = evaluate.device(), (attn.num_heads, attn.head_dim)
    packed = torch.randn(3, 1, sum(counts), *dims, device=where).transpose(2, 3)
    even = torch.randn(3, len(counts), round(sum(counts) / len(counts)), *dims, device=where).transpose(2, 3)
    ways = {
        "rectangular": lambda: nn.functional.scaled_dot_product_attention(*even),
        "by_count": lambda: avit._attend_by_count(attn, *packed, counts),
        "padded": lambda: avit._attend_padded(attn, *packed, counts),
        "bucketed": lambda: attend_bucketed(attn, *packed, counts),
        "nested": lambda: attend_nested(*packed, counts),
    }
    calls = {name: Call(way) for name, way in ways.items()}
    table = evaluate.latency(calls, torch.zeros(1), repeats=repeats, device=where).set_index("model")
    shape = {"arch": arch, "images": len(counts), "tokens": sum(counts), "different counts": len({*counts})}
    return shape | {name: 1 / table.speedup[name] for name in ways}


def attend_bucketed(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    """Attention within each image in four groups of similar count; q, k, v (1, H, T, d), counts ascending."""
    size = -(-len(counts) // 4)
    groups = [counts[start : start + size] for start in range(0, len(counts), size)]
    parts = zip(*(t.split([sum(group) for group in groups], dim=2) for t in (q, k, v)), strict=True)
    found = [avit._attend_padded(attn, *part, group) for part, group in zip(parts, groups, strict=True)]
    return torch.cat(found, dim=2)


@torch.inference_mode(False)
@torch.no_grad()
def attend_nested(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    """Attention within each image by torch.nested, which knows no inference mode; q, k, v (1, H, T, d)."""
    offsets = torch.tensor([0, *np.cumsum(counts)], device=q.device)
    jagged = (torch.nested.nested_tensor_from_jagged(t[0].transpose(0, 1).contiguous(), offsets) for t in (q, k, v))
    found = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in jagged))
    return found.transpose(1, 2).values().transpose(0, 1)[None]


class Call(nn.Module):
    """A function of nothing, to be timed as a model."""

    def __init__(self, function: Callable[[], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, _: Tensor) -> Tensor:
        return self.function()


def depths(arch: str, batch: int) -> Tensor:
    """Depths (batch, N) of real images, again from the first where the file has fewer; the arch must fit them."""
    found = torch.from_numpy(np.load(DEPTHS)["depths"]).long()
    vit = models.create(arch, 10)
    if vit.num_prefix_tokens + vit.patch_embed.num_patches != found.shape[1] or len(vit.blocks) < found.max():
        raise SystemExit(f"{arch} does not fit depths.npz: expected {found.shape[1]} tokens and {found.max()} blocks")
    return found[torch.arange(batch) % len(found)]


def record(run: str, count: int = 64) -> None:
    """Save how many blocks each token of test images ran in, the class token first."""
    model = models.load(run)
    images = starts.load(models.origin(run, "avit.AViT"))
    with torch.inference_mode():
        ran = model._gathered(evaluate.batch(images, count))[1]
    np.savez_compressed(DEPTHS, depths=ran.sum(0).numpy().astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--arch", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--record", metavar="RUN", help="a run of avit.ipynb whose depths to save")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
        raise SystemExit(f"{arguments.record}: depths recorded in {DEPTHS.name}")
    facts = runs.provenance()
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}, fp32")
    pd.options.display.width = 160
    for table in (against_other_modes, attention_of_unequal_counts):
        print(f"\n{table.__doc__}")
        print(table(arguments.arch, arguments.batch, arguments.repeats).round(3).to_string(index=False))
