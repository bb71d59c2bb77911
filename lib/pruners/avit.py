"""A-ViT: every token decides for itself after how many blocks it has seen enough, and leaves.

Source: "A-ViT: Adaptive Tokens for Efficient Vision Transformer", arXiv 2112.07658. Per token, with t its embedding
after block l, γ = gate_scale, β = −gate_center:

    halting score  h_l = σ(γ · t[0] + β), and h_L = 1       (t[0]: the first of the embedding's channels)
    halts at       the first l with h_1 + … + h_l ≥ 1 − ε   (its depth)
    weight of t_l  h_l before it halts, the rest 1 − Σ h when it does: the weights of a token sum to one
    output         Σ_l weight_l · t_l; logits = head(norm(output)) of the class token
    ponder         ρ = depth + that rest, what the ponder loss makes small

Two ways to compute one function. "mask" keeps all tokens and hides halted ones as keys: for training, where every
token's ρ counts. "gather" is faster for real: halted tokens leave the tensor; an image leaves once the head's input
is settled (with a class token: once that has halted); what is left of all images lies packed in one tensor (T, D)
without padding, so that norms, projections and MLPs run on exactly the T running tokens.

A token's depth is the number of blocks it ran in while its image was running, in either mode: what happens after the
last token that the head reads has halted never changes the logits.
"""

import copy
import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from lib import blocks
from lib.pruners.tokens import TokenPruner, Trace


@dataclass
class Halting:
    """What every token did, for the losses: L blocks, B images, N tokens, prefix tokens first.

    ponder: ρ, (B, N), of the token's own depth, whether its image ran so long or not.
    gates: γ · t[0] + β after every block, (L, B, N): the last one's too, which halting does not ask; of no meaning for
    halted tokens.
    running: (L, B, N), whether the token entered block l.
    prefix: the number of prefix tokens.
    """

    ponder: Tensor
    gates: Tensor
    running: Tensor
    prefix: int


def halt(h: Tensor, total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One step of running tokens: the weight of this block's embedding, and which tokens halt here.

    h: halting scores of this block; total: the sum of the earlier ones. A sum of exactly 1 − eps halts.
    """
    done = total + h >= 1 - eps
    return torch.where(done, 1 - total, h), done


class AViT(TokenPruner):
    """A ViT whose tokens halt one by one.

    vit:         timm VisionTransformer, trained or not. Where the head pools patches instead of reading a class token,
                 an image runs until the last of them halts.
    gate_scale, gate_center: γ and −β of the halting score: 5 and 10, or 10 and 30 for tiny and 10 and 75 for small
                 ImageNet models. The larger the centre, the later tokens halt; at ∞ this is the dense model.
    eps:         how far from one the sum of scores may stay.
    learn_gate:  multiply γ and β by factors that are trained; else the ViT alone learns to use its first channel.
    mode:        "mask" or "gather", as described above; in training mode "mask" is run in any case.
    """

    def __init__(
        self,
        vit: nn.Module,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        eps: float = 0.01,
        learn_gate: bool = False,
        mode: str = "mask",
    ):
        blocks.check(vit)  # no visual tower of open_clip
        super().__init__(vit)
        if not 0 < gate_scale < float("inf"):
            raise ValueError(f"gate_scale is {gate_scale}: expected a finite number above 0")
        if math.isnan(gate_center):
            raise ValueError(f"gate_center is {gate_center}: expected a number")
        if not 0 < eps < 1:
            raise ValueError(f"eps is {eps}: expected a share in (0, 1)")
        self.eps, self.learn_gate, self.mode = eps, learn_gate, mode
        self._gate = {"gate_scale": gate_scale, "gate_center": gate_center}
        like = next(vit.parameters())
        for name, value in self._gate.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=like.dtype, device=like.device))
        if learn_gate:  # factors, in logarithms: a rate that suits weights moves them by as much as it should
            self.gate_log_factors = nn.Parameter(torch.zeros(2, dtype=like.dtype, device=like.device))

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in ("mask", "gather"):
            raise ValueError(f"mode is {mode!r}: expected 'mask' or 'gather'")
        self._mode = mode

    def in_mode(self, mode: str) -> "AViT":
        """This model in another mode, sharing its weights: to compare the two."""
        other = copy.copy(self)
        other.mode = mode
        return other

    @property
    def arguments(self) -> dict:
        return {**self._gate, "eps": self.eps, "learn_gate": self.learn_gate, "mode": self.mode}

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"gate_log_factors"}

    def forward(self, images: Tensor, with_halting: bool = False) -> Tensor | tuple[Tensor, Halting]:
        """Logits (B, classes) of images (B, C, H, W); with what every token did, as the losses need it."""
        if with_halting:
            return self._masked(images)
        if self.training or self.mode == "mask":
            return self._masked(images)[0]
        return self._gathered(images)[0]

    @torch.inference_mode()
    def halting(self, images: Tensor, batch_size: int = 64) -> Halting:
        """What every token of images (B, C, H, W) does, in evaluation mode and without gradient, to look at."""
        with blocks.evaluation(self):
            parts = [self._masked(part)[1] for part in images.split(batch_size)]
        ponder, *others = ([getattr(part, name) for part in parts] for name in ("ponder", "gates", "running"))
        return Halting(torch.cat(ponder), *(torch.cat(other, dim=1) for other in others), self.prefix)

    @torch.inference_mode()
    def tokens(self, images: Tensor) -> Tensor:
        """How many tokens of each image run in each block (L, B), prefix tokens included, none once it is settled."""
        with blocks.evaluation(self):
            return self._gathered(images)[1].sum(dim=2)

    @torch.inference_mode()
    def trace(self, images: Tensor) -> Trace:
        """Logits and what left where, in evaluation mode; kept: per block, a list of one index tensor per image."""
        with blocks.evaluation(self):
            logits, running = (self._masked_trace if self.mode == "mask" else self._gathered)(images)
        running = running[:, :, self.prefix :]  # (L, B, patches that are embedded)
        grid = torch.zeros(*running.shape[:2], self.grid_patches, dtype=torch.bool, device=running.device)
        grid[:, :, self.original(torch.arange(running.shape[2], device=running.device))] = running
        kept = [[row.nonzero()[:, 0] for row in block] for block in grid]
        return Trace(logits, kept, grid.sum(dim=0))

    def gate(self, x: Tensor) -> Tensor:
        """γ · t[0] + β of tokens (…, D), whose sigmoid is the halting score: (…), float32 at least, or sums of scores
        against 1 − ε would mean nothing."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale, center = self.gate_scale.to(dtype), self.gate_center.to(dtype)
        if self.learn_gate:
            factors = self.gate_log_factors.to(dtype).exp()
            scale, center = scale * factors[0], center * factors[1]
        return scale * x[..., 0].to(dtype) - center

    @property
    def _read(self) -> slice:
        """The tokens whose outputs the head reads: an image runs as long as one of them does."""
        if self.vit.global_pool == "token":
            return slice(0, blocks.classifying(self.vit))
        with_prefix = getattr(self.vit, "pool_include_prefix", self.vit.attn_pool is not None)  # as older timm pools
        return slice(0 if with_prefix or not self.vit.global_pool else self.prefix, None)

    def _head(self, out: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(out))

    def _masked(self, images: Tensor) -> tuple[Tensor, Halting]:
        x = self.embed(images)
        running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        out, ponder, total, gates, ran = 0, 0, 0, [], []
        for index in range(len(self.vit.blocks)):
            x = self.checkpointed(self._masked_block, index, x, running)
            gates.append(self.gate(x))
            ran.append(running)
            h = gates[-1].sigmoid() if index < len(self.vit.blocks) - 1 else torch.ones_like(gates[-1])
            weight, done = halt(h, total, self.eps)
            weight = weight * running
            out = out + (weight[..., None] * x)[:, : self._read.stop].to(x.dtype)
            ponder = ponder + running + weight * done
            total, running = total + h, running & ~done
        return self._head(out), Halting(ponder, torch.stack(gates), torch.stack(ran), self.prefix)

    def _masked_block(self, index: int, x: Tensor, running: Tensor) -> Tensor:
        block = self.vit.blocks[index]
        if not block.attn.num_heads:
            return block(x)
        # Halted tokens are computed on, but nobody sees them. A softmax over no key at all would be NaN.
        keys = running | ~running.any(dim=1, keepdim=True)
        fed = block.norm1(x)
        heads = blocks.attend(block.attn, *blocks.qkv(block.attn, fed), keys[:, None, None])
        x = blocks.add_attention(block, x, blocks.project(block.attn, heads, fed))
        return blocks.add_mlp(block, x)

    def _masked_trace(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, halting = self._masked(images)
        ending = halting.running[:, :, self._read].any(dim=2, keepdim=True)  # (L, B, 1): whether the image runs
        return logits, halting.running & ending

    def _gathered(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and which tokens ran where while their image did, (L, B, N)."""
        x, last = self.embed(images), len(self.vit.blocks) - 1
        B, N, D = x.shape
        out, heeded = torch.zeros_like(x[:, : self._read.stop]), torch.zeros(N, dtype=torch.bool, device=x.device)
        heeded[self._read] = True
        ran = torch.zeros(last + 1, B, N, dtype=torch.bool, device=x.device)
        # Packed: the running tokens of all running images, image after image. number = image · N + token.
        x, number, total, counts = x.flatten(0, 1), torch.arange(B * N, device=x.device), 0, [N] * B
        for index, block in enumerate(self.vit.blocks):
            ran[index].view(-1)[number] = True
            x = self._packed_block(block, x, counts)
            h = self.gate(x).sigmoid() if index < last else x.new_ones(len(x))
            weight, done = halt(h, total, self.eps)
            image, token = number // N, number % N
            read = heeded[token].nonzero()[:, 0]
            out[image[read], token[read]] += (weight[read, None] * x[read]).to(x.dtype)

            settled = torch.ones(B, dtype=torch.bool, device=x.device).index_fill_(0, image[read[~done[read]]], False)
            stay = (~(done | settled[image])).nonzero()[:, 0]
            if not len(stay):
                break
            total = total + h
            if len(stay) < len(x):
                left = image[stay].bincount(minlength=B)
                # by count, so that images of equal count lie side by side, then by image, then by token
                stay = stay[(left * B + torch.arange(B, device=x.device))[image[stay]].argsort(stable=True)]
                counts = sorted(n for n in left.tolist() if n)
                x, number, total = (t.index_select(0, stay) for t in (x, number, total))
        return self._head(out), ran

    def _packed_block(self, block: nn.Module, x: Tensor, counts: list[int]) -> Tensor:
        """A block on packed tokens x (T, D), of which the i-th image has counts[i]."""
        if not block.attn.num_heads:
            return block(x[None])[0]
        fed = block.norm1(x[None])
        heads = attend_packed(block.attn, *blocks.qkv(block.attn, fed), counts)
        x = blocks.add_attention(block, x[None], blocks.project(block.attn, heads, fed))
        return blocks.add_mlp(block, x)[0]


def attend_packed(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    """Attention within each image of packed queries, keys and values (1, H, T, d); sum(counts) = T.

    On CPU one call per run of images of equal count, without padding; elsewhere, where a call costs more than its
    arithmetic, one call padded to the largest count. `benchmarks/avit.py` measures these and what lost to them.
    """
    if q.device.type == "cpu" or len({*counts}) == 1:
        return _attend_by_count(attn, q, k, v, counts)
    return _attend_padded(attn, q, k, v, counts)


def _attend_by_count(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    alike = [(count, len([*same])) for count, same in groupby(counts)]
    parts = zip(*(t.split([count * images for count, images in alike], dim=2) for t in (q, k, v)), strict=True)
    found = []
    for (count, images), part in zip(alike, parts, strict=True):
        if images > 1:  # (1, H, images · count, d) to (images, H, count, d)
            part = (t[0].unflatten(1, (images, count)).transpose(0, 1) for t in part)
        found.append(blocks.attend(attn, *part).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[None].transpose(1, 2)


def _attend_padded(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    images, most = len(counts), max(counts)
    filled = torch.arange(most, device=q.device) < torch.tensor(counts, device=q.device)[:, None]  # (images, most)
    place = filled.flatten().cumsum(0).sub(1).clamp(min=0)  # padding repeats a token, and is hidden
    padded = (
        t[0].transpose(0, 1).index_select(0, place).unflatten(0, (images, most)).transpose(1, 2) for t in (q, k, v)
    )
    heads = blocks.attend(attn, *padded, filled[:, None, None])  # (images, H, most, d)
    return heads.transpose(1, 2).flatten(0, 1)[filled.flatten()][None].transpose(1, 2)
