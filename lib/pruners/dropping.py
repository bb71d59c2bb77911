"""What drops a share of the running patches in chosen blocks: the machinery of the training-free baselines.

A method overrides `select`, a pure function from scores to positions. All of them drop at the same place, between
attention and MLP, keep equally many, and attend with the fused kernel; the class token's attention is one extra row of
queries, softmax(q_cls Kᵀ / √d), mean over heads, beside it.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lib import blocks, costs
from lib.pruners.tokens import TokenPruner, gather, with_prefix


def rounded_up(ratio: float, total: int) -> int:
    """max(1, ceil(ratio · total)); the epsilon keeps 0.7 · 10 at 7, where float arithmetic says 7.000…1."""
    if not 0 < ratio <= 1:
        raise ValueError(f"keep ratio is {ratio}: expected a share in (0, 1]")
    return max(1, math.ceil(ratio * total - 1e-9))


class Dropping(TokenPruner):
    """Drops patches between attention and MLP of some blocks. A method overrides `select`.

    keep_ratio: share of the running patches that stay, in (0, 1], rounded up; one for all `blocks` or one for each.
    blocks: indices of the blocks that drop; None is a quarter, half and three quarters of the depth, or the next block
        after each that has heads left.
    """

    looks = True  # whether `select` wants the class token's attention
    fuses = False  # whether one token more goes on, made of what is dropped

    def __init__(self, vit: nn.Module, keep_ratio: float | Sequence[float] = 0.7, blocks: Sequence[int] | None = None):
        super().__init__(vit)
        depth = len(self.vit.blocks)
        if blocks is None:  # where heads are left, from each quarter on
            there = [index for index, block in enumerate(self.vit.blocks) if block.attn.num_heads]
            blocks = sorted({min([i for i in there if i >= depth * k // 4] or there[-1:]) for k in (1, 2, 3) if there})
        else:
            blocks = list(blocks)
        ratios = list(keep_ratio) if isinstance(keep_ratio, Sequence) else [keep_ratio] * len(blocks)
        if len(ratios) != len(blocks):
            raise ValueError(
                f"keep_ratio has {len(ratios)} entries: expected one, or one for each of {len(blocks)} blocks"
            )
        if len({*blocks}) != len(blocks) or not {*blocks} <= {*range(depth)}:
            raise ValueError(f"blocks are {blocks}: expected distinct indices below {depth}")
        if headless := [index for index in blocks if not self.vit.blocks[index].attn.num_heads]:
            raise ValueError(f"block {headless[0]} has no head left: expected blocks that have, found {blocks}")
        self.keep_ratio, self.blocks = keep_ratio, blocks
        self.schedule = dict(zip(blocks, ratios, strict=True))
        self.counts()  # refuses ratios outside (0, 1]

    @property
    def arguments(self) -> dict:
        return {"keep_ratio": self.keep_ratio, "blocks": self.blocks}

    def counts(self) -> tuple[list[int], list[int]]:
        """Tokens of every block's attention, and of its MLP, prefix tokens included."""
        attention, mlp, running = [], [], self.patches
        for index in range(len(self.vit.blocks)):
            attention.append(self.prefix + running)
            kept = rounded_up(self.schedule.get(index, 1.0), running)
            running = kept + (self.fuses and kept < running)
            mlp.append(self.prefix + running)
        return attention, mlp

    def select(self, index: int, scores: Tensor, ids: Tensor, count: int) -> Tensor:
        """Which `count` of the running patches stay in block `index`: positions (B, count).

        scores: the class token's attention to each, (B, n), or zeros for what does not look; ids: (B, n), which patches
        they are, −1 for a fused token.
        """
        raise NotImplementedError

    def block(self, index: int, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        block, running = self.vit.blocks[index], ids.shape[1]
        count = rounded_up(self.schedule.get(index, 1.0), running)
        if count == running:
            return block(x), ids
        x, _, q, k = blocks.attended(block, x)
        scores = x.new_zeros(ids.shape)
        if self.looks:  # without a class token by all queries' attention
            rows = q[:, :, :1] if self.vit.has_class_token else q
            scores = blocks.probabilities(block.attn, rows, k).mean(dim=(1, 2))[:, self.prefix :]
        chosen = self.select(index, scores, ids, count).sort(dim=1).values
        kept, ids = gather(x, with_prefix(chosen, self.prefix)), ids.gather(1, chosen)
        if self.fuses:
            rest = scores.scatter(1, chosen, 0.0)  # (B, n): 0 where a patch stays
            kept = torch.cat([kept, rest[:, None] @ x[:, self.prefix :]], dim=1)
            ids = torch.cat([ids, ids.new_full((ids.shape[0], 1), -1)], dim=1)
        return blocks.add_mlp(block, kept), ids


class FirstTokens(TokenPruner):
    """What a method of these counts could reach at most: the same blocks, and the first tokens for chosen ones.

    mlp_counts: tokens of every block's MLP, prefix tokens included, as `counts` gives them. whole_blocks: tokens leave
    before a block, as with A-ViT, and not between its attention and its MLP.
    """

    def __init__(self, vit: nn.Module, mlp_counts: Sequence[int], whole_blocks: bool = False):
        super().__init__(vit)
        self.mlp_counts, self.whole_blocks = list(mlp_counts), whole_blocks

    @property
    def arguments(self) -> dict:
        return {"mlp_counts": self.mlp_counts, "whole_blocks": self.whole_blocks}

    def block(self, index: int, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        block, count = self.vit.blocks[index], self.mlp_counts[index]
        ids = ids[:, : count - self.prefix]
        if count == x.shape[1] or self.whole_blocks:
            return block(x[:, :count]), ids
        x, *_ = blocks.attended(block, x)
        return blocks.add_mlp(block, x[:, :count]), ids


def predicted_macs(pruner: TokenPruner) -> float:
    """GMACs of one image by the closed form, for methods whose counts do not depend on the image (`counts`); what
    selecting takes (up to 3 % of a small model) is not in it."""
    attention, mlp = pruner.counts()
    return costs.closed_form_macs(pruner.vit, attention, mlp) / 1e9


class Unreachable(ValueError):
    """A ceiling of multiply-adds under which a method cannot come."""


def refuse_met(vit: nn.Module, macs_g: float) -> None:
    """ValueError where `vit` as it is comes under a ceiling of GMACs: what met it would be vit itself."""
    if macs_g >= (whole := predicted_macs(Dropping(vit, 1.0))):
        raise ValueError(f"macs_g is {macs_g:g}: expected less than the {whole:.3g} GMACs of the model as it is")


def reaching(make: Callable[[float], TokenPruner], macs_g: float, most: float) -> TokenPruner:
    """The mildest `make(strength)` of at most macs_g GMACs per image (`predicted_macs`), by bisection over [0, most].

    make: builds a method that costs less, or as much, the stronger. Unreachable where even the strongest costs more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at strength 0 nothing is pruned, as is meant
        if (found := predicted_macs(make(most))) > macs_g:
            raise Unreachable(f"macs_g is {macs_g:g}: this method needs at least {found:.3g} GMACs")
        low, high = 0.0, most
        if predicted_macs(make(low)) <= macs_g:
            return make(low)
        while high - low > 1e-4 * most:
            middle = (low + high) / 2
            low, high = (low, middle) if predicted_macs(make(middle)) <= macs_g else (middle, high)
    return make(high)
