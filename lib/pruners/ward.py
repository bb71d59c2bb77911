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
import torch.nn.functional as F
from torch import Tensor, nn

from lib import blocks
from lib.pruners.baselines import ToMe, head_sum

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

    def _likeness(self, attn: nn.Module, q: Tensor, k: Tensor, size: Tensor, first: int) -> tuple[Tensor, Tensor]:
        prefix, weight = self.prefix, size
        if self.gamma:
            rows = q[:, :, :1] if self.vit.has_class_token else q
            sizes = F.pad(size.log(), (prefix, 0))[:, None, None]  # ToMe's proportional attention, (B, 1, 1, N)
            attention = blocks.probabilities(attn, rows, k, sizes).mean(dim=(1, 2))[:, prefix:] / size  # (B, n)
            attention = attention / attention.mean(dim=1, keepdim=True)  # near 1: few powers of it vanish
            power = attention.clamp(min=1e-6) ** self.gamma
            weight = size * power.clamp(min=torch.finfo(power.dtype).tiny)  # of weights 0 there is no mean
        k = k[:, :, prefix:]
        k = head_sum(k) if self.keys == "mean" else k.transpose(1, 2).flatten(2)  # (B, n, d) or (B, n, H · d)
        if self.linkage == "cosine":
            k = k / k.norm(dim=-1, keepdim=True)
        a, b = k[:, first::2], k[:, 1 - first :: 2]
        alike = a @ b.transpose(1, 2)
        if self.linkage == "cosine":
            return alike, weight
        apart = (a * a).sum(dim=2)[:, :, None] + (b * b).sum(dim=2)[:, None] - 2 * alike  # |k_A − k_B|²
        resists = 1 / weight
        return -apart / (resists[:, first::2, None] + resists[:, None, 1 - first :: 2]), weight
