"""The model families that identities are checked on: small, float64, every parameter random and non-zero."""

import lib  # noqa: F401  # isort: skip (first: it lets timm import, in spawned processes too)
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

# name: (timm architecture, overrides). All take 64x64 images but DINOv2, whose patches are 14 wide.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "layerscale": ("deit3_small_patch16_224", {}),  # LayerScale, and position embeddings without the class token
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "no class token": ("vit_base_patch16_gap_224", {}),
    "registers, mean pooling": ("vit_medium_patch16_reg4_gap_256", {}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norm before blocks": ("vit_base_patch32_clip_224", {"patch_size": 16}),
    "attention pooling": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "scaled norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
}
OTHERS = {"distilled": ("deit_tiny_distilled_patch16_224", {})}  # its head reads two tokens
WITHOUT_CLASS_TOKEN = ("no class token", "registers, mean pooling", "attention pooling")


def make(name: str, **overrides) -> nn.Module:
    """A three-block float64 model of a family in evaluation mode; biases and scales are random and not zero."""
    arch, own = (FAMILIES | OTHERS)[name]
    settings = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7} | own | overrides
    vit = timm.create_model(arch, **settings).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return vit


def by_onnx(model: nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """What onnxruntime makes of images x with the model, exported for any number of images by twice as many."""
    onnxruntime = pytest.importorskip("onnxruntime")
    shapes = ({0: torch.export.Dim("batch")},)
    export = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes}
    torch.onnx.export(model, (torch.cat([x, x]),), folder / "model.onnx", **export)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def images(vit: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images (batch, 3, H, W) of the size that the model wants."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator, dtype=torch.float64)
