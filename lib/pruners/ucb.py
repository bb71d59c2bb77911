"""UCB patch pruning: a bandit learns which patch positions matter (stage 1), then only those are run (stage 2).

Source: "Bandit-based Attention Mechanism in Vision Transformers" (WACV 2025). Per block l, head h, patch p and
training step t:

    importance  s[b,h,p] = P · mean over queries q of A[b,h,q,p],    A = softmax(Q Kᵀ / √d)
    bonus       u[h,p]   = β · √(ln t / N[l,h,p])                    (UCB1)
    score       z[b,p]   = mean over heads of (s + u)

Each image keeps its k = max(1, floor(keep_ratio · P)) best patches in each block; prefix tokens always stay.

Two choices the paper leaves open, and what they are here:

* Scale. Attention is about 1/P while the bonus is of order one, so with an unscaled s any usual β drowns what
  the model says. Here s is multiplied by the number P of patches: a patch attended to like all others has s = 1,
  and β = 1 means "an unexplored patch is worth about as much as twice the average attention".
* Counting. N counts the patches among the `explore_ratio` · P best, not simply those kept: with keep_ratio = 1
  every patch is kept, all counts would tie and stage 2 would freeze an arbitrary set. By default the counted
  are the kept, or half the patches where all are kept.
"""

import copy
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib import blocks
from lib.pruners.tokens import (
    FixedPatches,
    KeptPatchEmbed,
    TokenPruner,
    check_embeds_alone,
    check_fixed_places,
    gather,
    highest,
    kept_count,
    with_prefix,
)


def ucb_scores(importance: Tensor, bonus: Tensor) -> Tensor:
    """Scores (B, P) of importance (B, H, P) and bonus (H, P): the sum, averaged over heads."""
    return (importance + bonus).mean(dim=1)


class UCB(TokenPruner):
    """Stage 1: a ViT that prunes patches by upper confidence bound and counts what it selects.

    vit:           timm VisionTransformer for images of one size (UnsupportedBlock otherwise).
    keep_ratio:    share of the patches a block keeps, in (0, 1]. With mode="gather" of those that reach it.
    beta:          weight of the exploration bonus; 0 is plain attention top-k.
    explore_ratio: share of the patches that count as selected, see above; None is the default described there.
    warmup_steps:  training steps that run dense and count nothing.
    mode:          "mask": a dropped patch is hidden from the attention of its block alone and may return in the
                   next, as in the paper. "gather": it leaves the model for good, which is physically faster.

    Buffers: `ucb_count_scores` (L, H, N) over all N = prefix + P tokens, starting at one; a patch selected for c
    of B images gains c/B, prefix tokens gain nothing. `steps`, training steps so far. Both move in training mode
    only. Across processes of torch.distributed selections are summed, so one process with batch 2B equals two
    with B.
    """

    def __init__(
        self,
        vit: nn.Module,
        keep_ratio: float = 0.9,
        beta: float = 1.0,
        explore_ratio: float | None = None,
        warmup_steps: int = 0,
        mode: str = "mask",
    ):
        blocks.check(vit)  # no visual tower of open_clip
        check_fixed_places(vit)
        if not isinstance(vit.patch_embed, KeptPatchEmbed):
            check_embeds_alone(vit.patch_embed)  # or no ranking could ever be frozen
        super().__init__(vit)
        kept_count(keep_ratio, self.patches)  # refuses ratios outside (0, 1]
        kept_count(1.0 if explore_ratio is None else explore_ratio, self.patches)
        if explore_ratio is not None and keep_ratio < 1 and explore_ratio > keep_ratio:
            raise ValueError(
                f"explore_ratio {explore_ratio} is above keep_ratio {keep_ratio}: what is dropped cannot count"
            )
        if explore_ratio is not None and self.patches == kept_count(explore_ratio, self.patches) > 1:
            raise ValueError(
                f"explore_ratio is {explore_ratio}: all patches would count alike, expected a share below 1"
            )
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta is {beta}: expected a finite number, at least 0")
        if mode not in ("mask", "gather"):
            raise ValueError(f"mode is {mode!r}: expected 'mask' or 'gather'")
        self.keep_ratio, self.beta, self.mode = keep_ratio, beta, mode
        self.explore_ratio, self.warmup_steps = explore_ratio, warmup_steps
        heads = max([1, *(block.attn.num_heads for block in vit.blocks)])  # rows beyond a block's own heads count alike
        device = next(vit.parameters()).device
        counts = torch.ones(len(vit.blocks), heads, self.prefix + self.patches, device=device)
        self.register_buffer("ucb_count_scores", counts)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))

    @property
    def arguments(self) -> dict:
        names = ("keep_ratio", "beta", "explore_ratio", "warmup_steps", "mode")
        return {name: getattr(self, name) for name in names}

    def _counted(self, patches: int) -> int:
        """How many of a block's patches count as selected."""
        kept = kept_count(self.keep_ratio, patches)
        if self.explore_ratio is not None:
            return kept_count(self.explore_ratio, patches)
        return kept if kept < patches else kept_count(0.5, patches)

    def extra(self) -> list[tuple[Tensor, ...]]:
        """The bonus β√(ln t / N) of every block, (H, N)."""
        t = (self.steps - self.warmup_steps + 1).clamp(min=1)
        return [(bonus,) for bonus in self.beta * (t.log() / self.ucb_count_scores).sqrt()]

    def block(self, index: int, x: Tensor, ids: Tensor, bonus: Tensor) -> tuple[Tensor, ...]:
        """One block; returns x, the ids that go on, the ids it kept and the ids that count as selected."""
        block, prefix, patches = self.vit.blocks[index], self.prefix, ids.shape[1]
        k = kept_count(self.keep_ratio, patches)
        if k == patches and not self.training:  # nothing to drop, nothing to count: the dense block
            return block(x), ids, ids, ids
        if not block.attn.num_heads:  # pruned away: nothing here says which patches matter
            return block(x), ids, ids, ids[:, :0]

        attn, fed = block.attn, block.norm1(x)
        query, key, value = blocks.qkv(attn, fed)
        with torch.no_grad():  # the mean over all queries needs the whole matrix, but no gradient
            A = blocks.probabilities(attn, query, key)  # (B, H, N, N)
            s = A.mean(dim=2)[..., prefix:] * patches  # (B, H, P)
            u = bonus[: attn.num_heads, prefix:][:, ids].transpose(0, 1)  # (B, H, P), of the patches still here
            order = highest(ucb_scores(s, u), patches)  # (B, P)
        chosen = order[:, :k].sort(dim=1).values  # (B, k), in grid order
        kept, counted = ids.gather(1, chosen), ids.gather(1, order[:, : self._counted(patches)])
        tokens = with_prefix(chosen, prefix)

        # Softmax over the kept keys alone is the masked, renormalised attention: both modes compute the same rows.
        if self.mode == "gather" or block is self.vit.blocks[-1]:  # after the last block nothing can return
            x, fed, ids, shown = gather(x, tokens), gather(fed, tokens), kept, None
            query, key, value = (gather(t.transpose(1, 2), tokens).transpose(1, 2) for t in (query, key, value))
        else:
            shown = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, tokens, True)
            shown = shown[:, None, None, :]  # (B, 1, 1, N): a mask of key columns, every query still runs
        x = blocks.add_attention(block, x, blocks.project(attn, blocks.attend(attn, query, key, value, shown), fed))
        return blocks.add_mlp(block, x), ids, kept, counted

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes). In training mode every call is one step of the bandit."""
        if not self.training:
            return super().forward(images)
        warm = int(self.steps) < self.warmup_steps
        if warm:
            logits = self.vit(images)
        else:
            logits, record = self.run(images)
            self._count([counted for _, counted in record])
        self.steps += 1
        return logits

    @torch.no_grad()
    def _count(self, counted: list[Tensor]) -> None:
        """Add to every patch the share of the images that selected it; selected (B, k) per block."""
        votes = torch.zeros_like(self.ucb_count_scores[:, 0])  # (L, N)
        for row, ids in zip(votes, counted, strict=True):
            chosen = ids.flatten() + self.prefix
            row.index_add_(0, chosen, torch.ones_like(chosen, dtype=row.dtype))
        images = votes.new_tensor(len(counted[0]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(votes)
            dist.all_reduce(images)
        self.ucb_count_scores += (votes / images)[:, None]

    def patch_scores(self) -> Tensor:
        """(P,): the counts, averaged over blocks and heads. What `freeze` ranks by."""
        return self.ucb_count_scores.mean(dim=(0, 1))[self.prefix :]

    def ranked(self, frozen_keep_ratio: float) -> Tensor:
        """The floor(frozen_keep_ratio · P) best patches, ascending; equal scores fall to the lower index.

        Warns where the scores cannot rank, because no training step has counted.
        """
        k, scores = kept_count(frozen_keep_ratio, self.patches), self.patch_scores()
        if k < self.patches and scores.min() == scores.max():
            warnings.warn("all UCB counts are equal: train stage 1 first, this set is arbitrary", stacklevel=2)
        return scores.argsort(descending=True, stable=True)[:k].sort().values

    def freeze(self, frozen_keep_ratio: float) -> FixedPatches:
        """Stage 2: a copy of the ViT that embeds and runs only the `ranked` patches; this model stays as it is."""
        return FixedPatches(copy.deepcopy(self.vit), self.ranked(frozen_keep_ratio))
