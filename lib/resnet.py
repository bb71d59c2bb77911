"""ResNet-20 for small images: the convolutional network that ViTs are compared with.

Source: "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2: a 3×3 convolution, three stages
of three residual blocks with 16, 32 and 64 channels, of which the second and third halve the resolution, mean pooling
and one linear layer. Shortcuts have no weights: where the shape changes they take every second pixel and add zeros
(option A). 269,722 parameters with ten classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))); hidden channels are those between."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, outputs, H / stride, W / stride) of x (B, inputs, H, W)."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(inner + shortcut)


class ResNet20(nn.Module):
    """Images (B, 3, H, W) of any size to logits (B, num_classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        shapes = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.blocks = nn.Sequential(
            *(
                Residual(*(shape if first else (shape[1], shape[1])))
                for shape in shapes
                for first in (True, False, False)
            )
        )
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
