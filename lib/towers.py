"""open_clip's visual towers seen as timm ViTs, so that training-free token methods run on them.

With class weights made of prompts (`lib.zero_shot`) a tower is a zero-shot classifier, otherwise it gives features.

A view is made of the tower's own modules and copies no forward: attention is cut into the steps of `lib.blocks` by the
weights of its nn.MultiheadAttention, and a block that no method touches runs as open_clip's own. Blocks of
both layouts, (N, L, D) and (L, N, D), look the same from here. open_clip need not be installed.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.blocks import UnsupportedBlock, name_of

SCALE = 100.0  # of cosines to logits, as CLIP's own training ends with


class AttentionView:
    """An nn.MultiheadAttention with the names of timm's Attention."""

    def __init__(self, attn: nn.MultiheadAttention):
        self._attn, self.num_heads, self.head_dim = attn, attn.num_heads, attn.head_dim
        self.scale = 1 / math.sqrt(attn.head_dim)
        self.proj, self.attn_drop = attn.out_proj, nn.Dropout(attn.dropout)
        self.q_norm = self.k_norm = self.norm = self.proj_drop = nn.Identity()

    @property
    def training(self) -> bool:
        return self._attn.training

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values (B, N, 3 D) of x (B, N, D)."""
        return F.linear(x, self._attn.in_proj_weight, self._attn.in_proj_bias)


class BlockView:
    """A ResidualAttentionBlock with the names of timm's Block."""

    def __init__(self, block: nn.Module):
        self._block, self.attn = block, AttentionView(block.attn)
        self.norm1, self.ls1, self.norm2, self.ls2, self.mlp = block.ln_1, block.ls_1, block.ln_2, block.ls_2, block.mlp
        self.drop_path1 = self.drop_path2 = nn.Identity()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N, D) of tokens x (B, N, D), by open_clip's own forward."""
        return self._block(x) if self._block.attn.batch_first else self._block(x.transpose(0, 1)).transpose(0, 1)


class EmbedView:
    """What a tower does before its first block: patches, class token, positions and norm, in one call."""

    def __init__(self, visual: nn.Module):
        self.grid_size, self._embeds = tuple(visual.grid_size), visual._embeds
        self.num_patches, self.img_size = math.prod(self.grid_size), tuple(visual.image_size)
        self.proj = visual.conv1

    def __call__(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + P, D) of images (B, 3, H, W)."""
        return self._embeds(images)


class Tower(nn.Module):
    """A visual tower of open_clip (`clip.visual`) with the names of timm's VisionTransformer.

    weights: (E, C), a normalised text embedding per class: logits are 100 · f · weights, f the normalised features.
    Without them logits are the features (B, E) themselves. config: open_clip's embed_dim, vision_cfg and quick_gelu, by
    which lib.models saves and rebuilds this. UnsupportedBlock names what is something else: of a timm tower take
    `clip.visual.trunk`.
    """

    num_prefix_tokens, has_class_token, grad_checkpointing, dynamic_img_size = 1, True, False, False
    attn_pool = property(lambda self: self.visual.attn_pool)
    global_pool = property(lambda self: {"tok": "token"}.get(self.visual.pool_type, self.visual.pool_type))

    def __init__(self, visual: nn.Module, weights: Tensor | None = None, config: dict[str, Any] | None = None):
        super().__init__()
        check(visual)
        self.visual = visual
        self.register_buffer("weights", weights)
        if config is not None:
            self.config = {"tower": config, "num_classes": self.num_classes, "zero_shot": weights is not None}
        self.embed_dim = visual.positional_embedding.shape[1]
        self.norm_pre = self.norm = nn.Identity()
        self.blocks = [BlockView(block) for block in visual.transformer.resblocks]  # not modules: registered once

    @property
    def num_classes(self) -> int:
        if self.weights is not None:
            return self.weights.shape[1]
        return 0 if self.visual.proj is None else self.visual.output_dim

    @property
    def patch_embed(self) -> EmbedView:
        return EmbedView(self.visual)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return x  # open_clip has added it where it embeds

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits (B, C) of the last block's tokens (B, N, D), as the tower pools and projects them."""
        pooled, _ = self.visual._pool(x)
        return self._logits(pooled if self.visual.proj is None else pooled @ self.visual.proj)

    def _logits(self, features: Tensor) -> Tensor:
        return features if self.weights is None else SCALE * F.normalize(features, dim=-1) @ self.weights

    def no_weight_decay(self) -> set[str]:
        return {f"visual.{name}" for name in self.visual.no_weight_decay()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W), by open_clip's own forward."""
        found = self.visual(images)
        return self._logits(found[0] if isinstance(found, tuple) else found)


def build(config: dict[str, Any]) -> Tower:
    """The Tower of this `config` with fresh weights."""
    from open_clip import CLIP  # here: an extra, and slow to import

    least = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # of the text: not wanted
    made = config["tower"]
    visual = CLIP(made["embed_dim"], made["vision_cfg"], least, made["quick_gelu"]).visual
    weights = torch.zeros(made["embed_dim"], config["num_classes"]) if config["zero_shot"] else None
    return Tower(visual, weights, made)


def is_tower(model: nn.Module) -> bool:
    """Whether this is a visual tower of open_clip's own."""
    return name_of(model) == "open_clip.transformer.VisionTransformer"


def check(visual: nn.Module) -> None:
    """Raise UnsupportedBlock unless every step of the tower is one that its view knows how to run."""
    if not is_tower(visual):
        raise UnsupportedBlock(f"{name_of(visual)} is not supported: expected open_clip's VisionTransformer")
    if not isinstance(visual.patch_dropout, nn.Identity):
        raise UnsupportedBlock(f"{name_of(visual.patch_dropout)} drops patches at random: expected none")
    if visual.attn_pool is None and visual.pool_type not in ("tok", "avg"):
        raise UnsupportedBlock(f"the tower pools by {visual.pool_type!r}: expected one feature per image (tok or avg)")
    for index, block in enumerate(visual.transformer.resblocks):
        if name_of(block) != "open_clip.transformer.ResidualAttentionBlock":
            raise UnsupportedBlock(
                f"resblocks.{index} is a {name_of(block)}: expected open_clip's ResidualAttentionBlock"
            )
        attn = block.attn
        odd = type(attn) is not nn.MultiheadAttention or attn.in_proj_weight is None
        if odd or attn.bias_k is not None or attn.add_zero_attn:
            raise UnsupportedBlock(f"resblocks.{index}.attn is a {name_of(attn)}: expected plain nn.MultiheadAttention")
