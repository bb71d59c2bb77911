"""Ward merging: ToMe, with pairs and means that disturb least what attention reads. Training-free.

Bipartite matching, merging in every block and sizes as in ToMe (arXiv 2210.09461). Ours is by what pairs are chosen. Of
a token let s be the number of patches it stands for, k its keys, of all heads side by side, and a the class token's
attention to it per patch, mean over heads (without a class token that of all queries):

    weight   w = s · a^γ
    cost     c(A, B) = w_A w_B / (w_A + w_B) · |k_A − k_B|²     the lowest merge
    merged   (w_A x_A + w_B x_B) / (w_A + w_B)

c is what replacing both keys by their weighted mean adds to Σ w |k − mean|², the criterion of Ward's clustering (1963):
large groups and what the class token reads resist, and a small token goes into a large one rather than two large into
each other. ToMe looks at the angle between mean keys alone. That importance helps merging is known from PiToMe (arXiv
2405.16148) and MCTF (2403.10030).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib import blocks
from lib.pruners.baselines import ToMe, dealt, head_sum

LINKAGES = ("ward", "cosine")
KEYS = ("heads", "mean")


class Ward(ToMe):
    """ToMe by the cost above.

    r: as for ToMe. gamma: how much the class token's attention counts, from 0. For comparison, each part of it alone:
    linkage "cosine" takes the angle between keys for the cost, keys "mean" the mean over heads; with both and gamma 0
    this is ToMe. ValueError: anything not as above.
    """

    def __init__(
        self,
        vit: nn.Module,
        r: int | Sequence[int] = 8,
        gamma: float = 0.5,
        linkage: str = "ward",
        keys: str = "heads",
    ):
        super().__init__(vit, r)
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma is {gamma}: expected a finite number from 0")
        for name, value, known in (("linkage", linkage, LINKAGES), ("keys", keys, KEYS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: expected one of {', '.join(known)}")
        self.gamma, self.linkage, self.keys = gamma, linkage, keys

    @property
    def arguments(self) -> dict:
        return {"r": self.r, "gamma": self.gamma, "linkage": self.linkage, "keys": self.keys}

    def _likeness(self, attn: nn.Module, q: Tensor, k: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        prefix, weight = self.prefix, size
        keys = k.transpose(1, 2).flatten(2)  # (B, N, H · d), as the projection laid them: mostly no copy
        if self.gamma:
            weight = size * self._read(attn, q, k, size) ** self.gamma
            weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # of weights 0 there is no mean
        keys = head_sum(k[:, :, prefix:]) if self.keys == "mean" else keys[:, prefix:]
        if self.linkage == "cosine":
            a, b = dealt(keys / torch.linalg.vector_norm(keys, dim=2, keepdim=True), prefix)
            return a @ b.transpose(1, 2), weight
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))  # half precision leaves no digits of differences
        a, b = dealt(keys, prefix)
        squares = torch.linalg.vector_norm(keys, dim=2).square()  # one pass, where squares and their sum take two
        with torch.autocast("cpu" if keys.is_meta else keys.device.type, enabled=False):  # there is none of meta
            apart = pairs(*dealt(squares, prefix)).sub_(a @ b.transpose(1, 2), alpha=2)  # |k_A − k_B|²
        return apart.div_(pairs(*dealt(-1 / weight[:, prefix:], prefix))), weight

    def _read(self, attn: nn.Module, q: Tensor, k: Tensor, size: Tensor) -> Tensor:
        """The class token's attention to tokens, per patch, (B, N), in shares of the patches' mean: few powers of it
        vanish."""
        sizes = size.log()[:, None]  # ToMe's proportional attention
        if self.vit.has_class_token:
            heads = zip(q[:, :, :1].unbind(1), k.unbind(1), strict=True)  # one product over heads would copy k first
            logits = torch.cat([row @ keys.transpose(1, 2) for row, keys in heads], dim=1) * attn.scale  # (B, H, N)
            attention = (logits + sizes).softmax(dim=-1).mean(dim=1)
        else:
            attention = blocks.probabilities(attn, q, k, sizes[:, None]).mean(dim=(1, 2))
        read = attention / size
        return (read / read[:, self.prefix :].mean(dim=1, keepdim=True)).clamp(min=1e-6)


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """Sums of each of a (B, |A|) and each of b (B, |B|): (B, |A|, |B|)."""
    return a[:, :, None] + b[:, None]
