"""Create, save and load models. A saved model rebuilds itself, however it was wrapped or pruned.

A saved model is one .safetensors file whose header carries the configuration, so weights and configuration cannot
be mixed up, with a readable copy of it in the .json beside. Nothing is ever unpickled.
"""

import contextlib
import difflib
import hashlib
import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from lib import runs, towers
from lib.resnet import ResNet20

# Small ViTs that timm does not name. Everything not set here is as in timm's vit_tiny_patch16_224.
PRESETS = {
    # The default of the embedded digits: 64 patches, 0.69 M parameters.
    "vit_digits": {"img_size": 48, "patch_size": 6, "embed_dim": 96, "depth": 6, "num_heads": 3},
    # 1.84 times fewer multiply-adds, as many as vit_digits at 36 px: what a method that saves as much has to beat.
    "vit_digits_narrow": {"img_size": 48, "patch_size": 6, "embed_dim": 69, "depth": 6, "num_heads": 3},
    # For 32x32 images from scratch: 64 patches; 0.68 M parameters.
    "vit_cifar_small": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
    "vit_cifar_narrow": {"img_size": 32, "patch_size": 4, "embed_dim": 69, "depth": 6, "num_heads": 3},
    # For 64x64 images (Tiny ImageNet): 64 patches; 18,885,512 parameters with 200 classes.
    "vit_tiny_imagenet": {
        **{"img_size": 64, "patch_size": 8, "embed_dim": 576, "depth": 6, "num_heads": 6, "mlp_ratio": 8 / 3},
        **{"pos_drop_rate": 0.1, "proj_drop_rate": 0.1},
    },
    # For 32x32 images (CIFAR-100): 64 patches; 2,714,980 parameters with 100 classes.
    "vit_cifar": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3, "mlp_ratio": 2.0},
}
RESNETS = ("resnet20", "res20s")  # one model under the name of this project and that of the lottery papers
FORMAT = 1


class ModelError(ValueError):
    """A model that cannot be made, saved or loaded: one line naming what was found and what was expected."""


def create(
    arch: str,
    num_classes: int,
    img_size: int | None = None,
    weights: str | Path | None = None,
    *,
    fresh_head: bool = True,
    **timm_kwargs,
) -> nn.Module:
    """A ViT by name: one of PRESETS or any timm ViT, with timm's own overrides (patch_size, embed_dim, depth, …); or
    resnet20 (also res20s), which takes images of any size and no overrides.

    weights: None (random), "pretrained" (timm's hub), a run's folder or a local file: .safetensors, or a .bin/.pth
    state dict read with weights_only. A head for other classes is left out and stays random (without fresh_head: is
    refused), position embeddings are resized to img_size; anything else that does not fit raises ModelError.
    """
    if arch in RESNETS:
        return _resnet(arch, num_classes, img_size, weights, fresh_head, timm_kwargs)
    overrides = dict(timm_kwargs, num_classes=num_classes)
    if img_size is not None:
        overrides["img_size"] = img_size
    name, settings = arch, overrides
    if arch in PRESETS:
        if weights == "pretrained":
            raise ModelError(f"arch {arch!r} has no pretrained weights: expected a timm ViT, or weights from a file")
        name, settings = "vit_tiny_patch16_224", PRESETS[arch] | overrides
    elif not timm.is_model(arch):
        near = difflib.get_close_matches(arch, [*PRESETS, *RESNETS, *timm.list_models("*vit*")], n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        known = ", ".join([*PRESETS, *RESNETS[:1]])
        raise ModelError(f"arch {arch!r} is unknown: expected a timm ViT or one of {known}{hint}")
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", **settings)
    except (TypeError, AssertionError) as error:
        raise ModelError(f"arch {arch!r} cannot be made with {settings}: {error}") from error
    except (OSError, RuntimeError) as error:  # no connection, or no such weights
        reason = str(error).partition("\n")[0]
        raise ModelError(f"pretrained weights of {arch!r} cannot be fetched: {reason}") from error
    if isinstance(model, VisionTransformer) and {"img_size", "patch_size"} & settings.keys():
        size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
        if size and any(side % width for side, width in zip(size, patch, strict=True)):
            raise ModelError(f"img_size {size[0]} is not a multiple of patch_size {patch[0]}")
    model.config = {"arch": arch, "num_classes": num_classes, "img_size": img_size, "timm": timm_kwargs}
    theirs = model.pretrained_cfg.get("num_classes")
    if weights == "pretrained" and not fresh_head and theirs != num_classes:
        raise ModelError(f"pretrained weights of {arch!r} tell {theirs} classes apart: expected {num_classes}")
    _load_weights(model, weights, fresh_head)
    return model


def _resnet(
    arch: str, num_classes: int, img_size: int | None, weights: str | Path | None, fresh_head: bool, others: dict
) -> nn.Module:
    used = {name: value for name, value in others.items() if value}  # drop_path_rate=0.0 asks for nothing
    if used or weights == "pretrained":
        fault = next(iter(used), "weights 'pretrained'")
        raise ModelError(f"arch {arch!r} takes no {fault}: expected random weights or a local file")
    model = ResNet20(num_classes)
    model.config = {"arch": arch, "num_classes": num_classes, "img_size": img_size, "timm": {}}
    _load_weights(model, weights, fresh_head)
    return model


def match(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raise ModelError unless a model of `create` takes images of this (channels, height, width)."""
    if isinstance(model, ResNet20):
        return
    if not isinstance(model, VisionTransformer | towers.Tower):
        raise ModelError(f"{type(model).__name__} is not supported: expected a timm VisionTransformer")
    wanted = tuple(model.patch_embed.img_size)
    if wanted != image_shape[1:]:  # though one of dynamic size would run: patches are counted by the size it takes
        found = f"{image_shape[1]}x{image_shape[2]}"
        raise ModelError(f"images are {found}, the model takes {wanted[0]}x{wanted[1]}: set img_size, or another arch")


def of_classes(vit: nn.Module, rows: list[int]) -> nn.Module:
    """A model of `create` that tells only some of its classes apart: these rows of its head, in this order."""
    for name in ("head", "head_dist"):  # a distilled DeiT has two
        if (old := getattr(vit, name, None)) is not None:
            head = nn.Linear(old.in_features, len(rows), bias=old.bias is not None)
            with torch.no_grad():
                for new, whole in zip(head.parameters(), old.parameters(), strict=True):
                    new.copy_(whole[rows])
            setattr(vit, name, head)
    vit.num_classes = len(rows)
    vit.config = describe(vit) | {"num_classes": len(rows)}
    return vit


def is_bare(path: str) -> bool:
    """Whether this names weights without a configuration of ours, for `create`: "pretrained", or a file without."""
    file = Path(path)
    if path == "pretrained" or not file.is_file() or file.suffix != ".safetensors":
        return path == "pretrained" or file.is_file()
    try:
        with safe_open(file, framework="pt") as opened:
            return "lib" not in (opened.metadata() or {})
    except SafetensorError:
        return False


def _load_weights(model: nn.Module, weights: str | Path | None, fresh_head: bool) -> None:
    """Fill a dense model from a state dict, with fresh_head but for the head where the number of classes differs."""
    if weights in (None, "", "pretrained"):  # timm has loaded its own
        return
    path = Path(weights) / "model.safetensors" if Path(weights).is_dir() else Path(weights)
    state = _read_tensors(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a state dict: expected tensors by name")
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(dict(state), model)
    own = model.state_dict()
    heads = ("head.", "head_dist.") if fresh_head else ()
    fresh = [k for k in state if k.startswith(heads) and k in own and own[k].shape != state[k].shape]
    faults = [f"{k} is {tuple(v.shape)}, expected {tuple(own[k].shape)}" for k, v in state.items()
              if k in own and k not in fresh and v.shape != own[k].shape]  # fmt: skip
    faults += [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ModelError(f"{path} does not fit arch {model.config['arch']!r}: {faults[0]}{more}")
    model.load_state_dict({k: v for k, v in state.items() if k not in fresh}, strict=not fresh)
    if fresh:
        print(f"{path.name}: head for {len(own[fresh[0]])} classes starts at random (the file's is for other classes)")


def _read_tensors(path: Path) -> dict:
    if not path.is_file():
        raise ModelError(f"weights {path} not found: expected a local file, 'pretrained' or none")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                # copies lie aligned in memory, unlike the file: on some CPUs the last bit of an answer depends on that
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged or unsafe files
        # torch's own words for what is no plain state dict advise to unpickle it
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "expected tensors by name" if unsafe else (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} is not a readable state dict (truncated, or it holds code): {reason}") from error


def describe(model: nn.Module) -> dict:
    """The configuration from which `build` makes this model again, weights aside."""
    if hasattr(model, "arguments"):  # a pruner that wraps `model.vit`
        module = type(model).__module__.removeprefix("lib.pruners.")
        name = f"{module}.{type(model).__qualname__}"
        return {"pruner": name, "arguments": model.arguments, "model": describe(model.vit)}
    if hasattr(model, "config"):
        return model.config
    if not isinstance(model, VisionTransformer) or not hasattr(model, "pretrained_cfg"):  # timm.create_model sets it
        raise ModelError(f"cannot describe a {type(model).__name__}: make models by lib.models.create")
    embed, first = model.patch_embed, model.blocks[0]
    if not hasattr(first.mlp, "fc1"):
        raise ModelError(f"cannot describe a {type(first.mlp).__name__}: make models by lib.models.create")
    return {
        "arch": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "img_size": embed.img_size[0],
        "timm": {
            "patch_size": embed.patch_size[0],
            "in_chans": embed.proj.in_channels,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": first.attn.num_heads,
            "mlp_ratio": first.mlp.fc1.out_features / model.embed_dim,
            "global_pool": model.global_pool,
        },
    }


def build(config: dict) -> nn.Module:
    """A model of this configuration with fresh weights."""
    if "tower" in config:
        return towers.build(config)
    if "pruner" not in config:
        model = create(config["arch"], config["num_classes"], config["img_size"], **config["timm"])
        if "plan" in config:  # parts of it were removed
            surgery = importlib.import_module("lib.pruners.surgery")
            model = surgery.remove(model, surgery.Plan(**config["plan"]))
        return model
    module, _, name = config["pruner"].partition(".")
    wrapper = None
    if module.isidentifier() and name.isidentifier():
        # By name, so that this module knows no method: whatever lib/pruners/ holds can be loaded.
        with contextlib.suppress(ModuleNotFoundError):
            wrapper = getattr(importlib.import_module(f"lib.pruners.{module}"), name, None)
    if not (isinstance(wrapper, type) and issubclass(wrapper, nn.Module)):
        raise ModelError(f"pruner {config['pruner']!r} is unknown: expected module.Class below lib.pruners")
    return wrapper(build(config["model"]), **config["arguments"])


def save(model: nn.Module, path: str | Path, **metadata) -> Path:
    """Write path (.safetensors) and its .json, each whole or not at all; metadata: JSON values to keep with it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")  # not with_suffix: it would cut "keep0.3" to "keep0"
    config = describe(model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        twin = build(config)
    if _outline(twin) != _outline(model):
        raise ModelError(f"{config} would not rebuild this {type(model).__name__}: make models by lib.models.create")
    header = json.dumps({"format": FORMAT, "model": config, "metadata": metadata}, indent=1)
    runs.write(path, lambda temporary: save_file(state, temporary, metadata={"lib": header}))
    runs.write(path.with_suffix(".json"), lambda temporary: temporary.write_text(header))
    return path


def _outline(model: nn.Module) -> tuple:
    """What two models of equal outline share besides the values of their weights."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, repr(model), [m.num_heads for m in model.modules() if hasattr(m, "num_heads")]


def header(path: str | Path) -> dict:
    """The saved configuration and metadata of a model file: {"format", "model", "metadata"}."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"model {path} not found: expected a file written by lib.models.save")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lib")
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
    if text is None:
        raise ModelError(f"{path} holds bare weights: give it to lib.models.create(arch, …, weights=path) instead")
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ModelError(f"{path} has format {content['format']}: this version reads {FORMAT}")
    return content


def sha1(state: Mapping[str, Tensor]) -> str:
    """A digest of the names and values of a state_dict."""
    found = hashlib.sha1()
    for name, tensor in state.items():
        # bytes: numpy has no bfloat16
        found.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def origin(path: str | Path, pruner: str | None = None) -> dict:
    """The metadata of a model that a notebook saved: its data, normalisation and classes, for the next stage.

    pruner: the wrapper that the next stage needs, such as "ucb.UCB"; None is a bare ViT. ModelError otherwise.
    """
    content = header(path)
    found = content["model"].get("pruner")
    if found != pruner:
        raise ModelError(f"{path} holds {found or 'a bare model'}: expected {pruner or 'a bare model'}")
    if "data" not in content["metadata"]:
        raise ModelError(f"{path} does not say what data it was trained on: expected the model of a notebook's run")
    return content["metadata"]


def load(path: str | Path) -> nn.Module:
    """The model saved at path (a .safetensors file or a run's folder), in evaluation mode."""
    content = header(path)
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    model = build(content["model"])
    try:
        model.load_state_dict(_read_tensors(path), assign=True)  # assign keeps the dtype that was saved
    except RuntimeError as error:
        fault = str(error).splitlines()[-1].strip()
        raise ModelError(f"{path} does not fit its own configuration {content['model']}: {fault}") from error
    return model.eval()
