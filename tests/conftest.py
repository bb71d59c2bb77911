"""What every test needs: lib first, since it lets timm import beside any torchvision."""

import torch

import lib  # noqa: F401

torch.set_num_threads(1)
