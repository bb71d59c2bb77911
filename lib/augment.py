"""Random augmentation on the device: a whole batch at once, every image with its own random numbers.

Stateless: all randomness comes from the generator handed in. Seeded by `step_generator` from (seed, epoch,
step), a resumed run replays the same augmentation bit for bit, and nothing needs saving. Numbers are drawn on
the CPU and moved, so that a GPU run sees a CPU run's draws. Images are NCHW in [0, 1], not yet normalised.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# What each entry of a policy means, with the largest magnitude it may have; an entry left out is off.
LIMITS = {
    "flip": 1.0,  # probability of a horizontal flip
    "crop": 0.5,  # shift by whole pixels, at most this share of a side: a crop of the zero-padded image
    "translate": 0.5,  # shift, at most this share of a side, down to fractions of a pixel
    "rotate": 180.0,  # degrees either way
    "scale": 1.0,  # size changes by at most a factor 1 + scale either way
    "shear": 60.0,  # degrees either way, along x
    "brightness": 1.0,  # factor in 1 ± brightness
    "contrast": 1.0,  # factor in 1 ± contrast, about the image's mean
    "saturation": 1.0,  # factor in 1 ± saturation, about the pixel's luma
    "hue": 0.5,  # turns of the colour circle either way
    "erase": 1.0,  # probability that a random rectangle is painted over in a random colour
}
PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    # Digits: what handwriting varies by. No flip, a mirrored digit is another sign.
    "shift": {"translate": 0.06, "rotate": 8.0, "scale": 0.08, "shear": 5.0},
    # CIFAR's usual one: at 32 px a share of 0.125 is "pad 4, crop 32".
    "crop-flip": {"flip": 0.5, "crop": 0.125},
    # For ViTs that train from scratch on little data, together with `mix`.
    "strong": {
        "flip": 0.5, "crop": 0.125, "rotate": 15.0, "scale": 0.1, "shear": 10.0,
        "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03, "erase": 0.25,
    },
}  # fmt: skip
GEOMETRY = ("flip", "crop", "translate", "rotate", "scale", "shear")
RGB_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64
)


def step_generator(seed: int, epoch: int, step: int) -> Generator:
    """A CPU generator that depends on (seed, epoch, step) alone; negative numbers raise ValueError."""
    return torch.Generator().manual_seed(_words(seed, epoch, step)[0])


def model_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of what a model draws in this step (dropout, stochastic depth), below 2⁶³: another than
    step_generator's, whose first numbers decide what is flipped and turned."""
    return _words(seed, epoch, step)[1] // 2


def _words(seed: int, epoch: int, step: int) -> list[int]:
    return np.random.SeedSequence([seed, epoch, step]).generate_state(2, np.uint64).tolist()


@dataclass
class Share:
    """A generator for some images of a batch that several processes share: they draw what one process would.

    total: images of the whole batch. places: which of them are here, (B,).
    """

    generator: Generator
    total: int
    places: Tensor

    @property
    def device(self) -> torch.device:
        return self.generator.device


def places(total: int, rank: int, world: int) -> Tensor:
    """Which images of a batch of `total` process `rank` of `world` takes: total / world of them.

    Mirrored pairs stay together, image i and image −1−i, since `mix` mixes those; where a process takes an odd number
    they cannot, and mixed pairs are others than in one process.
    """
    each, odd = divmod(total // world, 2)
    if odd:
        return torch.arange(rank, total, world) if world > 1 else torch.arange(total)
    first = torch.arange(rank * each, (rank + 1) * each)
    return torch.cat([first, total - 1 - first.flip(0)])


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images − mean) / std per channel, for float images (B, C, H, W) and C means and deviations."""
    mean, std = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (mean, std))
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


class Augment:
    """Augments a batch: `Augment("crop-flip")(images, step_generator(seed, epoch, step))`.

    `policy`: a name from PRESETS, or a dict of magnitudes whose entries LIMITS explains. `self.policy` is
    the resulting dict, fit for JSON. Called with images (B, C, H, W), uint8 or float in [0, 1], and a CPU
    generator; returns new float images in [0, 1] of the same shape (float32 from uint8, else the same dtype).
    ValueError: an unknown name or entry (with the nearest known one), a magnitude outside 0 … its limit, a
    generator that is not on the CPU, hue or saturation for images that are not RGB.
    """

    def __init__(self, policy: str | Mapping[str, float]):
        if isinstance(policy, str):
            _check_known(policy, PRESETS, "augmentation")
            policy = PRESETS[policy]
        for name, magnitude in policy.items():
            _check_known(name, LIMITS, "augmentation entry")
            is_number = isinstance(magnitude, int | float) and not isinstance(magnitude, bool)
            if not is_number or not 0 <= magnitude <= LIMITS[name]:
                raise ValueError(f"augmentation {name}: found {magnitude!r}, expected 0 to {LIMITS[name]}")
        self.policy = {name: float(magnitude) for name, magnitude in policy.items() if magnitude > 0}

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: Generator | Share) -> Tensor:
        if images.ndim != 4:
            raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, C, H, W)")
        if generator.device.type != "cpu":
            raise ValueError(f"generator: found one on {generator.device}, expected one on the CPU")
        images = images.clone() if images.is_floating_point() else images.float() / 255
        policy = self.policy
        if any(name in policy for name in GEOMETRY):
            images = warp(images, *_draw_geometry(policy, images.shape, generator))
        if "hue" in policy or "saturation" in policy:
            images = _recolour(images, policy.get("hue", 0), policy.get("saturation", 0), generator)
        if "contrast" in policy:
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            images = mean + (images - mean) * _factors(policy["contrast"], images, generator)
        if "brightness" in policy:
            images = images * _factors(policy["brightness"], images, generator)
        if "erase" in policy:
            images = _erase(images, policy["erase"], generator)
        return images.clamp_(0, 1)  # bilinear weights and colour changes may leave the range


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Resamples images (B, C, H, W) bilinearly, zeros outside: out(p) = in(matrix · (p − shift)).

    Positions p = (x, y) are in pixels from the image's centre, so a rotation stays one on oblong images.
    `matrix` (B, 2, 2) leads from output to input; `shift` (B, 2) moves the content, in pixels right and down.
    """
    half = torch.tensor([images.shape[3] / 2, images.shape[2] / 2], dtype=matrix.dtype)
    # affine_grid counts in half sides; matrices are composed on the CPU and cross to the device once.
    linear = matrix * half / half[:, None]
    offset = -(matrix @ shift[:, :, None]) / half[:, None]
    theta = torch.cat([linear, offset], dim=2).to(images)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    smoothing: float,
    generator: Generator | Share,
) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix by timm's `Mixup`, one draw per batch; with both alphas > 0 either at even odds.

    images (B, C, H, W) float and labels (B,) int64 → new images and soft targets (B, num_classes) whose rows
    sum to one. Both alphas 0: label smoothing alone. timm draws from numpy's global state: here that state is
    seeded from `generator` and put back. Sources: Zhang et al. 2018 (MixUp), Yun et al. 2019 (CutMix).
    """
    from timm.data import Mixup

    if not (mixup_alpha >= 0 and cutmix_alpha >= 0 and 0 <= smoothing < 1):
        raise ValueError(
            f"mix: expected mixup_alpha ≥ 0, cutmix_alpha ≥ 0, 0 ≤ smoothing < 1, "
            f"found {mixup_alpha}, {cutmix_alpha}, {smoothing}"
        )
    mixer = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=smoothing, num_classes=num_classes)
    mixer.mixup_enabled = mixup_alpha > 0 or cutmix_alpha > 0
    batch, generator = len(images), getattr(generator, "generator", generator)  # one draw per batch, whoever shares it
    # timm pairs image i with image −1−i and wants an even batch: an odd one lends itself its first image.
    order = torch.arange(batch + batch % 2, device=images.device) % batch
    state = np.random.get_state()
    try:
        np.random.seed(int(torch.randint(2**32, (), generator=generator)))
        mixed, targets = mixer(images[order], labels[order])
    finally:
        np.random.set_state(state)
    return mixed[:batch], targets[:batch]


def _draw_geometry(policy: Mapping[str, float], shape: torch.Size, generator: Generator | Share) -> list[Tensor]:
    """The matrix (B, 2, 2) and shift (B, 2) for `warp`; float64, on the CPU."""
    batch, _, height, width = shape
    sides = torch.tensor([width, height], dtype=torch.float64)
    one, zero = torch.ones(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.float64)
    mirror = 1 - 2 * (_uniform(batch, 0, 1, generator) < policy.get("flip", 0)).double()
    angle = _either_way(batch, math.radians(policy.get("rotate", 0)), generator)
    shear = _either_way(batch, math.radians(policy.get("shear", 0)), generator).tan()
    zoom = _either_way(batch, math.log1p(policy.get("scale", 0)), generator).exp()
    matrix = (
        _matrix(mirror, zero, zero, one)
        @ _matrix(1 / zoom, zero, zero, 1 / zoom)
        @ _matrix(one, shear, zero, one)
        @ _matrix(angle.cos(), angle.sin(), -angle.sin(), angle.cos())
    )
    glide = _either_way((batch, 2), policy.get("translate", 0), generator) * sides
    padding = (policy.get("crop", 0) * sides).round()
    crop = (_uniform((batch, 2), 0, 1, generator) * (2 * padding + 1)).floor() - padding  # −padding … padding
    return [matrix, glide + crop]


def _recolour(images: Tensor, hue: float, saturation: float, generator: Generator | Share) -> Tensor:
    """Turns and scales the chroma plane of YIQ per image, luma kept: one 3×3 matrix each."""
    batch, channels = images.shape[:2]
    if channels != 3:
        raise ValueError(f"hue and saturation need RGB images, found {channels} channels")
    angle = _either_way(batch, 2 * math.pi * hue, generator)
    strength = 1 + _either_way(batch, saturation, generator)
    chroma = torch.eye(3, dtype=torch.float64).repeat(batch, 1, 1)
    turn = _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    chroma[:, 1:, 1:] = strength[:, None, None] * turn
    matrix = RGB_TO_YIQ.inverse() @ chroma @ RGB_TO_YIQ
    return (matrix.to(images) @ images.flatten(2)).view_as(images)


def _erase(images: Tensor, probability: float, generator: Generator | Share) -> Tensor:
    """Random erasing (Zhong et al. 2020): 2 to 33 % of the area, aspect 0.3 to 3.3, one random colour."""
    batch, channels, height, width = images.shape
    chosen = _uniform(batch, 0, 1, generator) < probability
    area = _uniform(batch, 0.02, 1 / 3, generator)
    aspect = _either_way(batch, math.log(3.3), generator).exp()
    sizes = torch.stack([area * aspect, area / aspect], dim=1).sqrt().clamp(max=1)  # (B, 2): down, right
    starts = _uniform((batch, 2), 0, 1, generator) * (1 - sizes)
    inside = []
    for axis, side in enumerate((height, width)):
        centres = (torch.arange(side) + 0.5) / side
        start, size = starts[:, axis, None], sizes[:, axis, None]
        inside.append((centres >= start) & (centres < start + size))  # (B, side)
    hole = (inside[0][:, :, None] & inside[1][:, None, :] & chosen[:, None, None])[:, None]  # (B, 1, H, W)
    colour = _uniform((batch, channels, 1, 1), 0, 1, generator)
    return torch.where(hole.to(images.device), colour.to(images), images)


def _uniform(shape: int | Sequence[int], low: float, high: float, generator: Generator | Share) -> Tensor:
    if isinstance(generator, Share):
        shape = (generator.total, *(() if isinstance(shape, int) else shape[1:]))
        return _uniform(shape, low, high, generator.generator)[generator.places]
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _either_way(shape: int | Sequence[int], magnitude: float, generator: Generator | Share) -> Tensor:
    return _uniform(shape, -magnitude, magnitude, generator)


def _factors(magnitude: float, images: Tensor, generator: Generator | Share) -> Tensor:
    return (1 + _either_way((len(images), 1, 1, 1), magnitude, generator)).to(images)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(B, 2, 2) with rows (a, b) and (c, d)."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _check_known(name: str, known: Mapping[str, object], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")
