"""Attention maps of a ViT, whole or pruned, with what is needed to read them: written as HDF5 or safetensors.

Of every block: `attention` (B, H, N, N), softmax(q kᵀ / √d), rows are queries; and `tokens` (B, N), which patch of the
grid every token is, row-major, −1 where it is none (class token, registers, fused tokens).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from lib import blocks, evaluate, runs
from lib.params import ParameterError
from lib.pruners.tokens import TokenPruner
from lib.starts import Start

SUFFIXES = (".h5", ".hdf5", ".safetensors")


class Maps(NamedTuple):
    """Per block, of B images: attention (B, H, N, N), float32; tokens (B, N), int64; see above. logits (B, C)."""

    attention: list[Tensor]
    tokens: list[Tensor]
    logits: Tensor


@torch.inference_mode()
def extract(pruner: TokenPruner, images: Tensor) -> Maps:
    """The attention of every block to which the model itself feeds it, for images (B, 3, H, W), in evaluation mode.

    UnsupportedBlock for a method whose attention is not that of its block alone (ToMe, A-ViT, UCB), and for blocks that
    have no head left.
    """
    own = type(pruner)
    if own.run is not TokenPruner.run or own.forward is not TokenPruner.forward:
        raise blocks.UnsupportedBlock(f"{blocks.name_of(pruner)} attends in a way of its own: no maps of it")
    attention, tokens = [], []
    with blocks.evaluation(pruner):
        x = pruner.embed(images)
        ids = torch.arange(x.shape[1] - pruner.prefix, device=x.device).expand(len(x), -1)
        for index, (block, extra) in enumerate(zip(pruner.vit.blocks, pruner.extra(), strict=True)):
            if not block.attn.num_heads:
                raise blocks.UnsupportedBlock(f"block {index} has no head left: no map of it")
            q, k, _ = blocks.qkv(block.attn, block.norm1(x))
            attention.append(blocks.probabilities(block.attn, q, k).float().cpu())
            none = ids.new_full((len(x), pruner.prefix), -1)
            tokens.append(torch.cat([none, pruner.original(ids)], dim=1).cpu())
            x, ids, *_ = pruner.block(index, x, ids, *extra)
        logits = pruner.vit.forward_head(pruner.vit.norm(x)).float().cpu()
    return Maps(attention, tokens, logits)


def check(run: runs.Run, start: Start | None = None) -> None:
    """ParameterError where the run's parameters ask for a file that cannot be written, or for none and yet name it, or,
    once there is a start, for images that it does not have."""
    if not run.params["extract_attention"]:
        run.refuse("attention_output", "img_idxs", because="extract_attention is off")
    elif Path(name := run.params["attention_output"]).suffix not in SUFFIXES or Path(name).name != name:
        raise ParameterError(f"attention_output is {name!r}: expected a file's name that ends in {', '.join(SUFFIXES)}")
    elif name == "model.safetensors":
        raise ParameterError(f"attention_output is {name!r}, the run's model: expected another name")
    elif start and (beyond := [index for index in run.params["img_idxs"] if index >= len(start.images.test)]):
        found = f"img_idxs hold {beyond[0]}"
        raise ParameterError(f"{found}: expected indices below {len(start.images.test)}, the test images")


def of_run(run: runs.Run, start: Start, model: nn.Module) -> Path:
    """Write the maps of the test images img_idxs to attention_output in the run's folder; returns where.

    model: what was measured, a pruner of start.vit or start.vit itself. The file also holds the images (B, H, W, 3) as
    the model saw them before normalisation, their labels, and the run's parameters.
    """
    check(run, start)
    test, chosen, params = start.images.test, np.asarray(run.params["img_idxs"]), run.params
    pruner = model if isinstance(model, TokenPruner) else TokenPruner(model)
    images = np.stack([test.images[index] for index in chosen])
    x = evaluate.inputs(images, start.images).to(next(pruner.parameters()).device)
    grid = list(pruner.vit.patch_embed.grid_size)
    about = {"parameters": params, "classes": start.images.classes, "grid": grid, "pruner": pruner.arguments}
    path = run.dir / params["attention_output"]
    save(path, extract(pruner, x), about, images=images, labels=test.labels[chosen], indices=chosen)
    return path


def save(path: Path, maps: Maps, about: dict[str, Any], **arrays: np.ndarray) -> None:
    """Write maps to path (.h5, .hdf5 or .safetensors), whole or not at all, with arrays (images, labels, …) beside.

    Names are block_00/attention, block_00/tokens, …, logits. about: JSON values, which end in HDF5's attributes or in
    the header of safetensors, each as JSON text. ValueError for any other suffix.
    """
    content = {"logits": maps.logits.numpy(), **{name: np.asarray(array) for name, array in arrays.items()}}
    for index, pair in enumerate(zip(maps.attention, maps.tokens, strict=True)):
        content |= {
            f"block_{index:02d}/{kind}": t.numpy() for kind, t in zip(("attention", "tokens"), pair, strict=True)
        }
    facts = {name: json.dumps(value) for name, value in (about | {"axes": "image, head, query, key"}).items()}
    if path.suffix == ".safetensors":
        whole = {name: np.ascontiguousarray(array) for name, array in content.items()}
        runs.write(path, lambda temporary: save_file(whole, temporary, metadata=facts))
    elif path.suffix in (".h5", ".hdf5"):
        runs.write(path, lambda temporary: _save_hdf5(temporary, content, facts))
    else:
        raise ValueError(f"{path.name}: expected a name that ends in .h5, .hdf5 or .safetensors")


def _save_hdf5(path: Path, content: dict[str, np.ndarray], facts: dict[str, str]) -> None:
    with h5py.File(path, "w") as file:
        for name, array in content.items():
            file.create_dataset(name, data=array, compression="gzip" if array.ndim > 2 else None)
        file.attrs.update(facts)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file that `save` wrote, by name, and what it says about them."""
    if Path(path).suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            facts = file.metadata()
        return load_file(path), {name: json.loads(text) for name, text in facts.items()}
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        return found, {name: json.loads(text) for name, text in file.attrs.items()}
