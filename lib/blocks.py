"""One view of a transformer block: its attention cut into steps, scores on request, its MLP.

The functions below run a block's own submodules (norms, projections, q/k-norm, LayerScale, DropPath), so a
DeiT, an AugReg ViT, a DeiT-III or an already pruned model needs no code of its own. The order of steps is that
of `timm.models.vision_transformer.Block`:

    x = x + DropPath(LayerScale(Attention(Norm(x))))
    x = x + DropPath(LayerScale(MLP(Norm(x))))
"""

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class UnsupportedBlock(TypeError):
    """A model or block whose steps are not known here: refused by name, never pruned wrongly or not at all."""


class Bias(nn.Module):
    """What is left of an attention or MLP without heads or neurons: `bias` (D,) added to every token, or nothing.

    drop: the dropout that the sublayer ends with.
    """

    num_heads = 0

    def __init__(self, bias: nn.Parameter | None = None, drop: nn.Module | None = None):
        super().__init__()
        self.bias, self.drop = bias, nn.Identity() if drop is None else drop

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """(B, N, D) of tokens x (B, N, D), from which only the shape is taken; timm's blocks pass masks along."""
        return self.drop((x.new_zeros(()) if self.bias is None else self.bias).expand_as(x))


def check(vit: nn.Module) -> None:
    """Raise UnsupportedBlock unless every step of `vit` is one that this module knows how to run."""
    if not isinstance(vit, VisionTransformer):
        raise UnsupportedBlock(f"{name_of(vit)} is not supported: expected a timm VisionTransformer")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise UnsupportedBlock(f"{name_of(vit.patch_drop)} drops patches at random: expected patch_drop_rate=0")
    for index, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise UnsupportedBlock(f"blocks.{index} is a {name_of(block)}: expected timm's Block")
        if type(block.attn) not in (Attention, Bias):
            raise UnsupportedBlock(f"blocks.{index}.attn is a {name_of(block.attn)}: expected timm's Attention")


def classifying(vit: nn.Module) -> int:
    """How many tokens a head without pooling reads, from the first on: the class token, of a distilled DeiT two."""
    return 2 if hasattr(vit, "dist_token") else 1


def check_removable(block: Block, *, heads: bool, neurons: bool) -> None:
    """Raise UnsupportedBlock where some heads or neurons of a block cannot go without changing what the others do."""
    if heads and not isinstance(getattr(block.attn, "norm", None), nn.Identity | None):
        raise UnsupportedBlock("the attention normalises over all heads: heads cannot be removed one by one")
    if neurons and type(block.mlp) not in (Mlp, Bias):
        raise UnsupportedBlock(f"{name_of(block.mlp)} is not supported: expected timm's Mlp to remove neurons from")
    if neurons and not isinstance(getattr(block.mlp, "norm", None), nn.Identity | None):
        raise UnsupportedBlock("the MLP normalises over all neurons: neurons cannot be removed one by one")


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def name_of(module: nn.Module) -> str:
    """Where a module's class comes from, for messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def qkv(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, H, N, d), of normalised tokens x (B, N, D), after q/k-norm."""
    B, N, _ = x.shape
    q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention output (B, H, Nq, d) by the fused kernel; `bias` is added to the logits, or a boolean key mask."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)


def first_token(block: Block, x: Tensor) -> Tensor:
    """The block's output (B, 1, D) of the first token alone, which attends to all tokens x (B, N, D)."""
    attn, first = block.attn, x[:, :1]
    if attn.num_heads:
        fed, width, bias = block.norm1(x), attn.num_heads * attn.head_dim, attn.qkv.bias
        weight = attn.qkv.weight
        q = F.linear(fed[:, :1], weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(fed, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = project(attn, attend(attn, attn.q_norm(q), attn.k_norm(k), v), fed[:, :1])
    else:
        y = attn(block.norm1(first))
    return add_mlp(block, add_attention(block, first, y))


def probabilities(attn: Attention, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention probabilities (B, H, Nq, Nk); rows sum to one. For scores cheaply, pass only the rows needed. bias is
    added to the logits."""
    logits = q * attn.scale @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def project(attn: Attention, heads: Tensor, x: Tensor) -> Tensor:
    """Join heads (B, H, N, d) to (B, N, D) by the block's own projection; x is what the attention was fed."""
    return attn.proj_drop(attn.proj(join(attn, heads, x)))


def join(attn: Attention, heads: Tensor, x: Tensor) -> Tensor:
    """What the projection is fed, (B, N, H · d): head after head of (B, H, N, d); x is what the attention was fed."""
    y = attn.norm(heads.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:  # timm >= 1.0.20
        y = y * attn.gate(x).sigmoid()
    return y


def attended(block: Block, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens x (B, N, D) after the attention residual, with what token methods score by: what the attention was fed
    (B, N, D), and queries and keys (B, H, N, d). bias: see `attend`."""
    fed = block.norm1(x)
    q, k, v = qkv(block.attn, fed)
    return add_attention(block, x, project(block.attn, attend(block.attn, q, k, v, bias), fed)), fed, q, k


def add_attention(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """The attention residual: x plus the projected attention output y, both (B, N, D)."""
    return x + block.drop_path1(block.ls1(y))


def add_mlp(block: Block, x: Tensor) -> Tensor:
    """The MLP residual: x (B, N, D) plus the block's MLP of it."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
