"""What a token method has to beat: ways to drop or merge tokens of a pretrained model without any training.

RandomDrop, GridDrop   do not look: any method that loses to them has learnt nothing of where to look
TopK                   by the class token's attention
EViT                   TopK, with one token that stands for the rest (arXiv 2202.07800)
ToMe                   merges what is alike (arXiv 2210.09461)
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import blocks
from lib.pruners.dropping import Dropping
from lib.pruners.tokens import TokenPruner, gather, highest


class TopK(Dropping):
    """Keeps the patches that get most of the class token's attention, mean over heads."""

    def select(self, index: int, scores: Tensor, ids: Tensor, count: int) -> Tensor:
        return highest(scores, count)


class EViT(TopK):
    """TopK, and one token more that stands for what is dropped: its sum, weighted by the class token's attention.

    Source: "Not All Patches are What You Need" (arXiv 2202.07800), equation 3. The fused token takes part in later
    selections like any patch; an image that keeps it there keeps one patch less.
    """

    fuses = True


class RandomDrop(Dropping):
    """Keeps random patches, others for each image of a batch.

    Drawn once, from `seed`: priorities of every patch for 64 images, through which the images of a batch go in turn. So
    the model is a function of its input, that repeats and exports.
    """

    looks = False

    def __init__(
        self,
        vit: nn.Module,
        keep_ratio: float | Sequence[float] = 0.7,
        blocks: Sequence[int] | None = None,
        seed: int = 0,
    ):
        super().__init__(vit, keep_ratio, blocks)
        self.seed = seed
        drawn = torch.rand(64, self.patches, generator=torch.Generator().manual_seed(seed), device="cpu").argsort(dim=1)
        self.register_buffer("priority", drawn.to(next(self.vit.parameters()).device), persistent=False)

    @property
    def arguments(self) -> dict:
        return super().arguments | {"seed": self.seed}

    def select(self, index: int, scores: Tensor, ids: Tensor, count: int) -> Tensor:
        image = torch.arange(ids.shape[0], device=ids.device) % len(self.priority)
        return self.priority[image].gather(1, ids).topk(count, dim=1).indices  # no two are equal


class GridDrop(Dropping):
    """Keeps patches that are spread evenly over the image, the same for all images: the first in `spread_order`."""

    looks = False

    def __init__(self, vit: nn.Module, keep_ratio: float | Sequence[float] = 0.7, blocks: Sequence[int] | None = None):
        super().__init__(vit, keep_ratio, blocks)
        device = next(self.vit.parameters()).device
        place = spread_order(self.vit.patch_embed.grid_size).to(device)
        self.register_buffer("place", place[self.original(torch.arange(self.patches, device=device))], persistent=False)

    def select(self, index: int, scores: Tensor, ids: Tensor, count: int) -> Tensor:
        return self.place[ids].topk(count, dim=1, largest=False).indices  # no two are equal


def spread_order(grid: tuple[int, int]) -> Tensor:
    """(P,): the rank of every patch of a (rows, columns) grid in an order whose first k are spread evenly, for any k.

    By the Bayer matrix: the bits of row ^ column and of row, interleaved, the lowest first.
    """
    bits = max(1, (max(grid) - 1).bit_length())
    values = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = [((row ^ column) >> bit & 1, row >> bit & 1) for bit in range(bits)]  # low bits weigh most
            values.append(
                sum((2 * first + second) << 2 * (bits - 1 - bit) for bit, (first, second) in enumerate(places))
            )
    return torch.tensor(values).argsort().argsort()


class ToMe(TokenPruner):
    """Merges the patches that are most alike, in every block between attention and MLP, instead of dropping any.

    Source: "Token Merging: Your ViT But Faster" (arXiv 2210.09461). Patches are dealt into two sets by turns, A and B;
    each of A meets the one of B whose key (mean over heads) has the highest cosine, and of the r most alike pairs the
    one of A is merged into that of B: a mean, weighted by how many patches each token stands for. As a key, a token
    counts as often as it stands for patches: attention adds log(size) to its logits, and so does a head that pools over
    patches. Prefix tokens never merge.

    r: tokens merged per block, one for all or one for each; at most half of those running. A merged token goes by the
    index of the patch of B.
    """

    def __init__(self, vit: nn.Module, r: int | Sequence[int] = 8):
        super().__init__(vit)
        rs = list(r) if isinstance(r, Sequence) else [r] * len(self.vit.blocks)
        if len(rs) != len(self.vit.blocks) or any(each < 0 or each != int(each) for each in rs):
            raise ValueError(
                f"r is {r}: expected a number of tokens from 0, or one for each of {len(self.vit.blocks)} blocks"
            )
        self.r, self.rs = r, [int(each) for each in rs]

    @classmethod
    def of_total(cls, vit: nn.Module, total: float, every: int = 1, **others: object) -> "ToMe":
        """Merge `total` tokens in all, as evenly as whole numbers allow, over the blocks that `merging` names: fewer
        matchings are faster. others: of the constructor."""
        blocks = TokenPruner(vit).vit.blocks
        r, places = [0] * len(blocks), merging(blocks, every)
        steps = [round(total * index / max(1, len(places))) for index in range(len(places) + 1)]
        for place, before, after in zip(places, steps, steps[1:], strict=False):
            r[place] = after - before
        return cls(vit, r, **others)

    @property
    def arguments(self) -> dict:
        return {"r": self.r}

    def counts(self) -> tuple[list[int], list[int]]:
        """Tokens of every block's attention, and of its MLP, prefix tokens included."""
        attention, mlp, running = [], [], self.patches
        for r, block in zip(self.rs, self.vit.blocks, strict=True):
            attention.append(self.prefix + running)
            running -= min(r, running // 2) if block.attn.num_heads else 0
            mlp.append(self.prefix + running)
        return attention, mlp

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self._head(*self._blocks(images, told=self.pools))

    def run(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits (B, classes), and per block the ids of its tokens (B, n) and which of them each patch is in (B, P)."""
        x, moves = self._blocks(images)
        return self._head(x, moves), self._followed(x, moves)

    @property
    def pools(self) -> bool:
        """Whether the head reads patches."""
        return self.vit.attn_pool is not None or self.vit.global_pool != "token"

    def _blocks(self, images: Tensor, told: bool = True) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Tokens after the last block, and what moved in each. told: whether what moved in the last one is read: a head
        of prefix tokens alone is the same whichever r patches go there, so they need no match."""
        x, size, moves, last = self.embed(images), None, [], len(self.rs) - 1
        for index, (block, r) in enumerate(zip(self.vit.blocks, self.rs, strict=True)):
            x, size, *moved = self.checkpointed(self._step, block, r, x, size, told or index < last)
            moves.append(tuple(moved))
        return x, moves

    def _step(
        self, block: nn.Module, r: int, x: Tensor, size: Tensor | None, matched: bool = True
    ) -> tuple[Tensor | None, ...]:
        prefix = self.prefix
        if not block.attn.num_heads:
            return block(x), size
        x, _, q, k = blocks.attended(block, x, None if size is None else size.log()[:, None, None])
        moved, running = (), x.shape[1] - prefix
        if (r := min(r, running // 2)) and not matched:
            x = x[:, : x.shape[1] - r]
        elif r:
            size = x.new_ones(x.shape[:2]) if size is None else size
            with torch.no_grad():
                likeness, weight = self._likeness(block.attn, q, k, size)
            x, size, *moved = merge(x, likeness, r, size, weight, prefix)
        return blocks.add_mlp(block, x), size, *moved

    def _likeness(self, attn: nn.Module, q: Tensor, k: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """How alike each of A and each of B are, (B, |A|, |B|), and by what tokens count in a mean, (B, N); what is
        said of prefix tokens is not read.

        q, k: of all tokens, (B, H, N, d); size: of all tokens, (B, N). Without gradient: what is chosen has none.
        """
        keys = head_sum(k[:, :, self.prefix :])  # in the direction of their mean
        keys.div_(torch.linalg.vector_norm(keys, dim=2, keepdim=True))  # in place: a fresh result costs as much
        a, b = dealt(keys, self.prefix)
        return a @ b.transpose(1, 2), size

    def _head(self, x: Tensor, moves: list[tuple[Tensor, ...]]) -> Tensor:
        # what pools over patches takes a merged one as often as it stands for some
        if any(moves) and self.pools:
            ids, sources = self._followed(x, moves)[-1]
            place = torch.arange(ids.shape[1], device=x.device).expand_as(ids)
            place = torch.zeros_like(sources).scatter(1, ids, place).gather(1, sources)
            x = torch.cat([x[:, : self.prefix], gather(x[:, self.prefix :], place)], dim=1)
        return self.vit.forward_head(self.vit.norm(x))

    def _followed(self, x: Tensor, moves: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, Tensor]]:
        """Per block the ids of its tokens (B, n), and which of them each patch is in (B, P)."""
        sources = torch.arange(self.patches, device=x.device).expand(x.shape[0], -1)
        ids, record = F.pad(sources, (self.prefix, 0), value=-1), []
        for moved in moves:
            ids, sources = follow(ids, sources, *moved) if moved else (ids, sources)
            record.append((ids[:, self.prefix :], sources))
        return record

    @torch.inference_mode()
    def sources(self, images: Tensor) -> list[Tensor]:
        """Per block (B, P): the patch by whose index the token goes that each patch is part of."""
        with blocks.evaluation(self):
            return [self.original(sources) for _, sources in self.run(images)[1]]


def dealt(patches: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Of patches (B, n, …) those of A and those of B. A are at even places of the whole sequence, as in the paper."""
    return patches[:, prefix % 2 :: 2], patches[:, 1 - prefix % 2 :: 2]


def merge(
    x: Tensor, likeness: Tensor, r: int, size: Tensor, weight: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of ToMe: tokens x (B, N, D), not to be read afterwards, their sizes (B, N), and weights (B, N) by which
    they count in a mean. likeness: of each of A and each of B (see `dealt`), (B, |A|, |B|). The r most alike merge.

    Returns tokens and sizes of what goes on: prefix tokens, what stays of A, in order, then B. And of the B · N tokens
    in a row the places of those that are left (B, N − r), that go, and that they go into (B, r).
    """
    order = highest(likeness.amax(dim=2), likeness.shape[1])
    going, stays = order[:, :r], order[:, r:].sort(dim=1).values
    partner = gather(likeness, going).max(dim=2).indices  # of those that go: a maximum is cheaper than its place
    place = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    a, b = dealt(place[:, prefix:], prefix)
    left = torch.cat([place[:, :prefix], a.gather(1, stays), b], dim=1)
    goes, into = a.gather(1, going), b.gather(1, partner)
    # The mean Σ w x / Σ w is x_B + Σ_A (x_A − x_B) w_A / Σ w: only rows that something is merged into are touched.
    rows, taken, taker = x.flatten(0, 1), goes.flatten(), into.flatten()  # rows: of x itself, or of a contiguous copy
    added = weight.flatten().index_select(0, taken)
    mass = weight.flatten().index_add(0, taker, added)
    total = mass if weight is size else size.flatten().index_add(0, taker, size.flatten().index_select(0, taken))
    share = added / mass.index_select(0, taker)
    moved = rows.index_select(0, taken).sub_(rows.index_select(0, taker)).mul_(share[:, None])  # (B · r, D)
    rows.index_add_(0, taker, moved)  # many may go into one
    x, size = (each.index_select(0, left.flatten()).unflatten(0, left.shape) for each in (rows, total))
    return x, size, left, goes, into


def merging(blocks: Sequence[nn.Module], every: int) -> list[int]:
    """Indices of the blocks that can merge, those with heads: the first, and each `every`-th of them from there on."""
    if every < 1 or every != int(every):
        raise ValueError(f"every is {every}: expected a whole number of blocks from 1")
    return [index for index, block in enumerate(blocks) if block.attn.num_heads][:: int(every)]


def head_sum(k: Tensor) -> Tensor:
    """Keys (B, H, n, d) summed over heads: (B, n, d), a fresh tensor."""
    first, *others = k.unbind(1)
    return reduce(Tensor.add_, others[1:], first + others[0]) if others else first.clone()


def follow(ids: Tensor, sources: Tensor, left: Tensor, goes: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, N) of tokens after one `merge`, (B, N − r), and by which of them each patch goes (B, P), where `sources`
    said it before."""
    after, gone, taker = (ids.flatten()[places] for places in (left, goes, into))
    parent = torch.arange(sources.shape[1], device=ids.device).expand_as(sources)
    return after, parent.scatter(1, gone, taker).gather(1, sources)


DROPPING = {"random": RandomDrop, "grid": GridDrop, "topk": TopK, "evit": EViT}
