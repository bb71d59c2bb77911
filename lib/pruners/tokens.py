"""Running a ViT's own blocks while tokens leave: what every token method shares.

A method decides which patches stay (a pure function from scores to indices); this file embeds, gathers, runs
and records. Tokens are always ordered prefix (CLS, registers) first, then patches; prefix tokens never leave.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib import blocks, towers


@dataclass
class Trace:
    """What left where, for one batch.

    logits: (B, classes).
    kept:   per block, the indices of the patches it kept, ascending and row-major on the patch grid: (B, k), or a list
            of B tensors (k_b,) where images may keep unequally many.
    depth:  (B, patches), the number of blocks that kept each patch.
    """

    logits: Tensor
    kept: list[Tensor] | list[list[Tensor]]
    depth: Tensor


def kept_count(ratio: float, total: int) -> int:
    """max(1, floor(ratio * total)); the epsilon keeps 0.29 * 100 at 29, where float arithmetic says 28.99…"""
    if not 0 < ratio <= 1:
        raise ValueError(f"keep ratio is {ratio}: expected a share in (0, 1]")
    return max(1, math.floor(ratio * total + 1e-9))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of x (B, N, …): (B, K, …)."""
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    # whole rows are copied at once: five times as fast on a CPU as gathering number by number
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions (B, count) of the highest of scores (B, n), best first; equal ones in their order."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK keeps the order of equals (torch's not)
        return scores.topk(count, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def with_prefix(kept: Tensor, prefix: int) -> Tensor:
    """Token indices (B, prefix + K) of the patches `kept` (B, K) together with all prefix tokens."""
    head = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)  # len would fix an export's batch size
    return torch.cat([head, kept + prefix], dim=1)


def check_fixed_places(vit: nn.Module) -> None:
    """Raise UnsupportedBlock where a patch's index does not always mean the same place of an image."""
    if vit.dynamic_img_size or vit.pos_embed is None:
        raise blocks.UnsupportedBlock(f"{blocks.name_of(vit)}: expected a fixed image size and position embedding")


def check_embeds_alone(embed: nn.Module) -> None:
    """Raise UnsupportedBlock where patches cannot be embedded one without the others."""
    if type(embed) is not PatchEmbed or not embed.flatten:
        raise blocks.UnsupportedBlock(f"{blocks.name_of(embed)}: expected timm's PatchEmbed with flattened output")


class TokenPruner(nn.Module):
    """A ViT whose blocks may lose tokens. A method overrides `block`; with no override this is the dense model.

    vit: any timm VisionTransformer made of plain Blocks, or a visual tower of open_clip, as it is or
        as a Tower (UnsupportedBlock otherwise).
    It is held, not copied: its parameters train with the wrapper.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        if towers.is_tower(vit):
            vit = towers.Tower(vit)
        elif not isinstance(vit, towers.Tower):
            blocks.check(vit)
        self.vit = vit

    @property
    def prefix(self) -> int:
        return self.vit.num_prefix_tokens

    @property
    def patches(self) -> int:
        """Number of patches that enter the first block."""
        return self.vit.patch_embed.num_patches

    @property
    def grid_patches(self) -> int:
        """Number of patches on the image's full grid, embedded or not."""
        return math.prod(self.vit.patch_embed.grid_size)

    @property
    def arguments(self) -> dict:
        """Constructor arguments besides `vit`, as plain JSON values: what models.save stores to rebuild this."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers must not decay: those of the ViT."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def block(self, index: int, x: Tensor, ids: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """Run block `index` on tokens x (B, N, D) whose patches are ids (B, N - prefix).

        Returns x and ids of the tokens that go on to the next block. A method may return more, which `run`
        collects; the first of it are the ids the block kept, where these are not simply those that go on.
        """
        return self.vit.blocks[index](x), ids

    def extra(self) -> list[tuple[Tensor, ...]]:
        """Per block, tensors to hand to `block`: fixed before the first block runs, so that a block recomputed
        by gradient checkpointing decides as it did the first time."""
        return [()] * len(self.vit.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens (B, prefix + patches, D) as they enter the first block."""
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        if x.shape[1] != self.prefix + self.patches:  # of dynamic size: what knows places and numbers would be wrong
            height, width = self.vit.patch_embed.img_size
            raise ValueError(
                f"images give {x.shape[1] - self.prefix} patches: expected {height}x{width}, {self.patches}"
            )
        return x

    def checkpointed(self, step: Callable, *arguments: Any) -> Any:
        """step(*arguments), recomputed in the backward pass where the ViT's gradient checkpointing is on."""
        if self.vit.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(step, *arguments, use_reentrant=False)
        return step(*arguments)

    def run(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits (B, classes), and per block the ids it kept (B, k) with whatever else `block` returned."""
        x = self.embed(images)
        ids = torch.arange(x.shape[1] - self.prefix, device=x.device).expand(x.shape[0], -1)
        record = []
        for index, extra in enumerate(self.extra()):
            x, ids, *more = self.checkpointed(self.block, index, x, ids, *extra)
            record.append(tuple(more) or (ids,))
        return self.vit.forward_head(self.vit.norm(x)), record

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.run(images)[0]

    @torch.inference_mode()
    def trace(self, images: Tensor) -> Trace:
        """Logits and what left where, in evaluation mode (nothing is learnt or counted by looking)."""
        with blocks.evaluation(self):
            logits, record = self.run(images)
        kept = [self.original(first).sort(dim=1).values for first, *_ in record]
        depth = torch.zeros(len(images), self.grid_patches, dtype=torch.long, device=logits.device)
        for ids in kept:
            depth.scatter_add_(1, ids.clamp(min=0), (ids >= 0).long())
        if any((ids < 0).any() for ids in kept):
            kept = [[row[row >= 0] for row in ids] for ids in kept]
        return Trace(logits, kept, depth)

    def original(self, ids: Tensor) -> Tensor:
        """Indices on the image's full patch grid, of indices into the patches that enter the first block; −1, a token
        that is no patch, stays −1."""
        kept = getattr(self.vit.patch_embed, "kept", None)
        return ids if kept is None else kept[ids].where(ids >= 0, -1)


class KeptPatchEmbed(nn.Module):
    """A PatchEmbed that unfolds and projects only the patches `kept`: (B, C, H, W) to (B, K, D).

    A convolution with stride = kernel is a matrix product per patch, so the patches left out cost nothing.
    """

    def __init__(self, embed: nn.Module, kept: Tensor):
        super().__init__()
        check_embeds_alone(embed)
        self.proj, self.norm = embed.proj, embed.norm
        self.img_size, self.patch_size, self.grid_size = embed.img_size, embed.patch_size, embed.grid_size
        self.num_patches = len(kept)
        self.register_buffer("kept", kept)

    def forward(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        if tuple(self.img_size) != (H, W):
            raise ValueError(f"images are {H}x{W}: this model was frozen for {self.img_size[0]}x{self.img_size[1]}")
        (gh, gw), (ph, pw) = self.grid_size, self.patch_size
        x = images[..., : gh * ph, : gw * pw].reshape(B, C, gh, ph, gw, pw)
        rows, columns = self.kept // gw, self.kept % gw
        x = x.permute(0, 2, 4, 1, 3, 5)[:, rows, columns]  # (B, K, C, ph, pw)
        return self.norm(F.linear(x.flatten(2), self.proj.weight.flatten(1), self.proj.bias))


class FixedPatches(TokenPruner):
    """The same patches `kept` for every image: embedded alone, run alone. What UCB stage 2 freezes to.

    vit becomes physically smaller (it is changed in place: pass a copy to keep it): its patch embedding unfolds
    only the kept patches and its position embedding loses the other rows. What remains is a plain timm ViT, so
    compile, export, fine-tuning and every other method work on it unchanged.
    """

    def __init__(self, vit: nn.Module, kept: Tensor | list[int]):
        blocks.check(vit)  # no visual tower of open_clip
        super().__init__(vit)
        kept = torch.as_tensor(kept, dtype=torch.long, device="cpu").sort().values
        total = vit.patch_embed.num_patches
        if kept.ndim != 1 or not len(kept) or len(kept.unique()) != len(kept) or kept[0] < 0 or kept[-1] >= total:
            raise ValueError(f"kept patches: expected distinct indices in 0..{total - 1}, got {kept.tolist()}")
        check_fixed_places(vit)
        embed = vit.patch_embed
        if isinstance(embed, KeptPatchEmbed):
            raise blocks.UnsupportedBlock("this model embeds only some patches already: freeze the dense model")
        vit.patch_embed = KeptPatchEmbed(embed, kept.to(vit.pos_embed.device))
        first = vit.pos_embed.shape[1] - total  # rows of prefix tokens come first, where they have any
        rows = torch.cat([torch.arange(first, device="cpu"), kept + first])
        vit.pos_embed = nn.Parameter(
            vit.pos_embed.detach()[:, rows.to(vit.pos_embed.device)].clone(), vit.pos_embed.requires_grad
        )

    @property
    def kept(self) -> Tensor:
        """The kept patches (K,), ascending, on the image's patch grid."""
        return self.vit.patch_embed.kept

    @property
    def arguments(self) -> dict:
        return {"kept": self.kept.tolist()}
