"""Anchor token pruning: training-free, in one block of a ViT or of CLIP's visual tower.

In block `start_block`, per image, with Ā the attention averaged over heads and x what the attention is fed:

    anchors     the k patches with the highest Ā[CLS, ·]
    importance  I_i = mean over anchors j of Ā[i, j]
    diversity   D_i = 1 − max over anchors j of cos(x_i, x_j)
    score       S_i = α · I_i + (1 − α) · D_i     of all patches that are no anchors

The class token, the anchors and the m patches of the highest score go on, in their order, after the attention residual
and before the MLP; the blocks before run whole, those after run what is left.

I is about 1/N and D lies in [0, 2], so that α = 0.5 would be nearly pure diversity: with normalise="minmax" both are
first stretched to [0, 1] over each image's candidates; "none" is the literal rule.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import blocks
from lib.pruners.tokens import TokenPruner, gather, highest, kept_count, with_prefix

NORMALISE = ("minmax", "none")


def minmax(values: Tensor, among: Tensor) -> Tensor:
    """values (B, P) stretched so that those `among` (B, P) reach from 0 to 1, image by image; all 0 where equal."""
    low = values.masked_fill(~among, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(~among, -torch.inf).amax(dim=1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def choose(
    attention: Tensor, fed: Tensor, prefix: int, k: int, m: int, alpha: float, normalise: str = "minmax"
) -> tuple[Tensor, Tensor]:
    """The anchors (B, k), best first, and the m others (B, m) that go on, best first: patch indices.

    attention: Ā (B, N, N), rows are queries; fed: (B, N, D). k + m at most the number of patches.
    """
    anchors = highest(attention[:, 0, prefix:], k)
    patches, unit = fed[:, prefix:], F.normalize(gather(fed, anchors + prefix), dim=2)
    importance = attention[:, prefix:, prefix:].gather(2, anchors[:, None].expand(-1, patches.shape[1], -1)).mean(dim=2)
    diversity = 1 - (patches @ unit.transpose(1, 2)).amax(dim=2) / patches.norm(dim=2).clamp(min=1e-12)
    rest = torch.ones_like(importance, dtype=torch.bool).scatter(1, anchors, False)
    if normalise == "minmax":
        importance, diversity = minmax(importance, rest), minmax(diversity, rest)
    score = (alpha * importance + (1 - alpha) * diversity).masked_fill(~rest, -torch.inf)
    return anchors, highest(score, m)


class Anchors(TokenPruner):
    """A ViT, or a visual tower of open_clip, that keeps anchors and what matters to them or differs from them.

    k_anchors, top_m: numbers of patches, or shares of all patches where below 1 (float). alpha: weight of importance,
    in [0, 1]. start_block: where pruning happens. normalise: "minmax" or "none", see above.
    ValueError: anything not as above, or a model without a class token.
    """

    def __init__(
        self,
        vit: nn.Module,
        k_anchors: int | float = 10,
        top_m: int | float = 50,
        alpha: float = 0.5,
        start_block: int = 1,
        normalise: str = "minmax",
    ):
        super().__init__(vit)
        if not self.vit.has_class_token:
            raise blocks.UnsupportedBlock(f"{blocks.name_of(vit)} has no class token: anchors are what that attends to")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}: expected a weight in [0, 1]")
        if start_block not in range(len(self.vit.blocks)) or not self.vit.blocks[start_block].attn.num_heads:
            raise ValueError(f"start_block is {start_block}: expected a block with heads, below {len(self.vit.blocks)}")
        if normalise not in NORMALISE:
            raise ValueError(f"normalise is {normalise!r}: expected one of {', '.join(NORMALISE)}")
        self.k_anchors, self.top_m, self.alpha = k_anchors, top_m, alpha
        self.start_block, self.normalise = start_block, normalise
        self.k, self.m = (self._number(name, value) for name, value in (("k_anchors", k_anchors), ("top_m", top_m)))
        if self.k + self.m >= self.patches:
            warnings.warn(f"k_anchors {self.k} + top_m {self.m} reach the {self.patches} patches there are: nothing is "
                          "pruned; shares such as top_m=0.25 fit any model", stacklevel=2)  # fmt: skip

    def _number(self, name: str, value: int | float) -> int:
        if isinstance(value, float) and 0 < value < 1:
            return kept_count(value, self.patches)
        if not 1 <= value < math.inf or value != int(value):
            raise ValueError(f"{name} is {value}: expected a number of patches from 1, or a share below 1")
        return int(value)

    @property
    def arguments(self) -> dict:
        names = ("k_anchors", "top_m", "alpha", "start_block", "normalise")
        return {name: getattr(self, name) for name in names}

    def counts(self) -> tuple[list[int], list[int]]:
        """Tokens of every block's attention, and of its MLP, prefix tokens included."""
        before, after = self.prefix + self.patches, self.prefix + min(self.patches, self.k + self.m)
        depth, start = len(self.vit.blocks), self.start_block
        return [before] * (start + 1) + [after] * (depth - start - 1), [before] * start + [after] * (depth - start)

    def block(self, index: int, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """One block; where it prunes also the patches kept, and which of them are anchors."""
        block, prefix = self.vit.blocks[index], self.prefix
        if index != self.start_block or self.k + self.m >= self.patches:
            return block(x), ids
        fed, attn = block.norm1(x), block.attn
        heads, attention = [], 0.0
        # The scores need all of softmax(q kᵀ), so it serves the attention itself, too, instead of the fused kernel.
        # Head after head: a third faster than all at once, as what one head needs stays in the cache.
        for q, k, v in zip(*(part.unbind(1) for part in blocks.qkv(attn, fed)), strict=True):
            p = blocks.probabilities(attn, q, k)
            heads.append(F.dropout(p, attn.attn_drop.p, attn.training) @ v)
            attention = attention + p
        x = blocks.add_attention(block, x, blocks.project(attn, torch.stack(heads, dim=1), fed))
        attention = attention / attn.num_heads
        anchors, others = choose(attention, fed, prefix, self.k, self.m, self.alpha, self.normalise)
        chosen = torch.cat([anchors, others], dim=1).sort(dim=1).values
        ids, anchors = ids.gather(1, chosen), ids.gather(1, anchors)
        return blocks.add_mlp(block, gather(x, with_prefix(chosen, prefix))), ids, ids, anchors

    @torch.inference_mode()
    def anchors(self, images: Tensor) -> Tensor:
        """The anchors (B, k) of images (B, C, H, W), best first, as indices on the patch grid."""
        with blocks.evaluation(self):
            record = self.run(images)[1]
        found = record[self.start_block][1:]
        return self.original(found[0]) if found else torch.empty(len(images), 0, dtype=torch.long)
