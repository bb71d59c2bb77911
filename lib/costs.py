"""What a model costs: multiply-accumulates, counted and by the closed form, and time, as ratios within one process."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.blocks import Bias

if TYPE_CHECKING:
    from pandas import DataFrame

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotCovered(ValueError):
    """A model whose multiply-adds the closed form does not give."""


def macs(model: nn.Module, images_or_shape: Tensor | Sequence[int]) -> dict[str, float]:
    """Multiply-accumulates of one image, in units of 1e9 (`macs_g`), and parameters in 1e6 (`params_m`).

    Matrix products and convolutions are counted, one image at a time, under the math attention backend (torch counts
    fused CPU attention wrongly) and without the fast path of nn.MultiheadAttention (which it does not count at all).
    From a shape (C, H, W) it counts on the meta device, free of cost; a model whose work depends on the image raises
    ValueError there: give it images (B, C, H, W), on the model's device, and it reports their mean.
    """
    from torch.func import functional_call
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counting = FlopCounterMode(display=False)
    with evaluating([model]), sdpa_kernel(SDPBackend.MATH), _no_fast_path(), counting as counter:
        if isinstance(images_or_shape, Tensor):
            images = images_or_shape
            for image in images.split(1):
                model(image)
        else:
            images = torch.empty(1, *images_or_shape[-3:], device="meta")
            tensors = [*model.named_parameters(), *model.named_buffers()]
            try:
                functional_call(model, {k: torch.empty_like(t, device="meta") for k, t in tensors}, (images,))
            except RuntimeError as error:
                name, reason = type(model).__name__, str(error).splitlines()[0]
                raise ValueError(f"{name} can't be counted from a shape, give images ({reason})") from error
    params = sum(parameter.numel() for parameter in model.parameters())
    return {"macs_g": counter.get_total_flops() / 2 / len(images) / 1e9, "params_m": params / 1e6}


@contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def vit_macs(
    tokens: Sequence[int],
    dim: int,
    attn_dims: Sequence[int],
    hidden_dims: Sequence[int],
    *,
    embed_patches: int,
    patch_dim: int,
    num_classes: int,
    mlp_tokens: Sequence[int] | None = None,
) -> int:
    """MACs of one image through a ViT: Σ_blocks (4·N·d·a + 2·N²·a + 2·N·d·h) + embedding + head.

    Per block: `tokens` N with prefix tokens, `attn_dims` a (kept heads × head dimension), `hidden_dims` h
    (kept MLP neurons); `mlp_tokens`, where tokens leave between attention and MLP. `dim`: d; `embed_patches`
    patches of `patch_dim` numbers (3·16·16) are embedded; the head reads one token. With a = d and h = ρ·d a
    block has the usual N(4d² + 2ρd²) + 2N²d. ValueError: lists of unequal length.
    """
    mlp_tokens = tokens if mlp_tokens is None else mlp_tokens
    blocks = sum(
        4 * n * dim * attn + 2 * n * n * attn + 2 * n_mlp * dim * hidden
        for n, n_mlp, attn, hidden in zip(tokens, mlp_tokens, attn_dims, hidden_dims, strict=True)
    )
    return blocks + embed_patches * patch_dim * dim + dim * num_classes


def closed_form_macs(
    vit: nn.Module, tokens: Sequence[int] | None = None, mlp_tokens: Sequence[int] | None = None
) -> int:
    """`vit_macs` with the numbers read off a timm VisionTransformer, whole or with heads and neurons removed.

    tokens, mlp_tokens: of every block, as `vit_macs` takes them; None is all of them in every block.
    NotCovered: attention pooling, an MLP that is not two layers, a network before the patches.
    """
    if getattr(vit, "attn_pool", None) is not None:
        raise NotCovered(f"{type(vit).__name__} pools by attention: the closed form does not cover that")
    if hasattr(vit.patch_embed, "backbone"):
        raise NotCovered(f"{type(vit.patch_embed).__name__} embeds by a network: the closed form does not cover that")
    last = lambda mlp: getattr(mlp, "fc2", getattr(mlp, "c_proj", None))  # noqa: E731  (timm's name, and open_clip's)
    sublayers = [(getattr(block.attn, "proj", None), last(block.mlp)) for block in vit.blocks]
    for block, (_, fc2) in zip(vit.blocks, sublayers, strict=True):
        # timm's GluMlp makes both halves in fc1, its SwiGLU the gate in fc1_g
        fc1 = getattr(block.mlp, "fc1", None)
        if hasattr(block.mlp, "fc1_g") or (fc1 is not None and fc1.out_features != fc2.in_features):
            raise NotCovered(f"{type(block.mlp).__name__} is gated: the closed form does not cover that")
        if fc2 is None and type(block.mlp) is not Bias:
            raise NotCovered(f"{type(block.mlp).__name__} is not two layers: the closed form does not cover that")
    patches = vit.patch_embed.num_patches
    return vit_macs(
        tokens=[patches + vit.num_prefix_tokens] * len(vit.blocks) if tokens is None else tokens,
        mlp_tokens=mlp_tokens,
        dim=vit.embed_dim,
        attn_dims=[getattr(proj, "in_features", 0) for proj, _ in sublayers],  # 0 where no head is left
        hidden_dims=[getattr(fc2, "in_features", 0) for _, fc2 in sublayers],
        embed_patches=patches,
        patch_dim=vit.patch_embed.proj.weight[0].numel(),
        # a ViT without a head has an Identity there, a tower projects to its features
        num_classes=getattr(vit.head, "out_features", 0) if hasattr(vit, "head") else vit.num_classes,
    )


def latency(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    repeats: int = 30,
    warmup: int = 3,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    threads: int | None = None,
    baseline: str | None = None,
) -> DataFrame:
    """Times all models on the same batch (B, C, H, W), taking turns in a new random order each round.

    A shared machine is noisy, and slows for minutes at a time: a time measured alone says little. Here all
    models meet the same disturbance, and `speedup` is the median over rounds of time(baseline) / time(model)
    within a round. The ratio is the claim; `latency_ms` (median, per batch) tells the order of magnitude.
    One row per model: model, batch_size, latency_ms, latency_iqr_ms, throughput_ips (images per second),
    speedup, speedup_iqr, device, threads, precision, repeats. `baseline`: None is the first model. Models
    move to `device` (None: where the first one is). ValueError: no models, an unknown baseline or precision,
    repeats < 1, warmup < 0.
    """
    import pandas as pd

    baseline = next(iter(models), None) if baseline is None else baseline
    if baseline not in models or repeats < 1 or warmup < 0:
        raise ValueError(
            f"latency: found baseline {baseline!r}, repeats {repeats}, warmup {warmup}, "
            f"expected a baseline among {list(models)}, repeats ≥ 1, warmup ≥ 0"
        )
    device = place(models.values(), device)
    images = images.to(device)
    before, shuffler = torch.get_num_threads(), random.Random(0)
    threads = before if threads is None else threads
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        torch.set_num_threads(threads)
        with evaluating(models.values(), device, precision):
            for _ in range(warmup + repeats):
                for name in shuffler.sample(list(models), len(models)):
                    times[name].append(_time_ms(models[name], images))
    finally:
        torch.set_num_threads(before)
    rounds = pd.DataFrame(times).iloc[warmup:]
    ratios = rounds.rdiv(rounds[baseline], axis=0)
    median = rounds.median()
    columns = {
        "batch_size": len(images),
        "latency_ms": median,
        "latency_iqr_ms": rounds.quantile(0.75) - rounds.quantile(0.25),
        "throughput_ips": 1000 * len(images) / median,
        "speedup": ratios.median(),
        "speedup_iqr": ratios.quantile(0.75) - ratios.quantile(0.25),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "precision": precision,
        "repeats": repeats,
    }
    return pd.DataFrame(columns, index=list(models)).rename_axis("model").reset_index()


@contextmanager
def evaluating(
    models: Sequence[nn.Module], device: torch.device | None = None, precision: str = "fp32"
) -> Iterator[None]:
    """Inference and eval mode inside; afterwards every submodule has its own training flag again."""
    if precision not in AUTOCAST:
        raise ValueError(f"precision: found {precision!r}, expected one of {', '.join(AUTOCAST)}")
    dtype, kind = AUTOCAST[precision], "cpu" if device is None else device.type
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype is not None):
            yield
    finally:
        for module, training in flags:
            module.training = training


def place(models: Sequence[nn.Module], device: torch.device | str | None) -> torch.device:
    """Moves the models to the device (None: to that of the first one) and returns it."""
    if device is None:
        device = next((p.device for p in next(iter(models)).parameters()), "cpu")
    for model in models:
        model.to(device)
    return torch.device(device)


def _time_ms(model: nn.Module, images: Tensor) -> float:
    if images.device.type != "cuda":
        start = time.perf_counter()
        model(images)
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(images.device)
    start.record()
    model(images)
    end.record()
    torch.cuda.synchronize(images.device)
    return start.elapsed_time(end)
