"""The same model on smaller images: what dropping patches has to beat, since it needs no method at all."""

import torch.nn.functional as F
from torch import Tensor, nn

from lib import blocks


class Shrunk(nn.Module):
    """A ViT for small images that takes images of any size, and shrinks them first.

    vit: takes images of its patch_embed.img_size. `Shrunk.down(vit, size)` makes one of a model for larger images.
    """

    def __init__(self, vit: nn.Module):
        blocks.check(vit)
        super().__init__()
        self.vit = vit

    @classmethod
    def down(cls, vit: nn.Module, size: int) -> "Shrunk":
        """The model on images of size × size pixels, its position embeddings resampled (bicubic) to fewer patches.

        vit is changed in place: pass a copy to keep it. ValueError unless whole patches fit, and fewer than before.
        """
        blocks.check(vit)
        patch, before = vit.patch_embed.patch_size, vit.patch_embed.img_size
        if size < 1 or any(size % side for side in patch) or size >= min(before):
            shown = f"{patch[0]}" if patch[0] == patch[1] else f"{patch[0]} and {patch[1]}"
            raise ValueError(f"images are shrunk to {size} pixels: expected a multiple of {shown} below {min(before)}")
        vit.set_input_size(img_size=size)
        if hasattr(vit, "config"):  # of models.create, by which it is saved
            vit.config = {**vit.config, "img_size": size}
        return cls(vit)

    @property
    def arguments(self) -> dict:
        """Constructor arguments besides `vit`: what models.save stores to rebuild this."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers must not decay: those of the ViT."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        size = tuple(self.vit.patch_embed.img_size)
        return self.vit(images if images.shape[-2:] == size else resized(images, size))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) in another size (H, W)."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)
