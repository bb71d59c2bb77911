"""Losses. Each takes (model, images, targets) and returns the loss to minimise with named parts to log."""

import torch.nn.functional as F
from torch import Tensor, nn


def task(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats, mean over images; targets are labels (B,) or probabilities (B, classes)."""
    return F.cross_entropy(model(images), targets), {}
