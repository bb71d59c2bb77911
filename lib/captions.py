"""A small CLIP made without internet: which caption fits an image, learnt from the classes of a dataset.

Its visual tower starts as a trained ViT of timm (as in "LiT", arXiv 2111.07991) and learns with a small text tower. The
folder it leaves is in open_clip's own layout, which open_clip reads as `local-dir:folder`. What is zero-shot
about it are the prompts, which it never saw; its classes were all in its training.
"""

import copy
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import blocks, plots, runs, train
from lib.starts import initial
from lib.towers import SCALE
from lib.zero_shot import NUMBERS, Clip, check, class_names, load, needed

MAKING = ("dataset", "arch", "weights", "img_size", "normalise", "epochs", "batch_size", "learning_rate", "seed")
CAPTIONS = ("a photo of the digit {}", "a handwritten {}", "{}", "an image of {}", "this is the number {}.")
GENERAL = ("a photo of a {}", "a picture of a {}", "{}", "an image of the {}", "this is a {}.")
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}  # of the text tower
EMBED_DIM = 64


class Captions(nn.Module):
    """What `fit` trains: a model of open_clip as a classifier of captions, (B, C) for images (B, 3, H, W).

    texts: (T, C, L) tokens, T captions of each class. In training (T, B, C), a classifier per caption.
    """

    def __init__(self, clip: nn.Module, texts: Tensor):
        super().__init__()
        self.clip = clip
        self.register_buffer("texts", texts)

    def forward(self, images: Tensor) -> Tensor:
        words = self.clip.encode_text(self.texts.flatten(0, 1), normalize=True).unflatten(0, self.texts.shape[:2])
        if not self.training:
            words = F.normalize(words.mean(dim=0), dim=-1)
        return self.clip.logit_scale.exp() * self.clip.encode_image(images, normalize=True) @ words.transpose(-1, -2)


def caption_loss(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """CLIP's loss from image to text, with all captions of the dataset for candidates: nats, mean over captions."""
    logits = model(images)  # (T, B, C)
    wanted = targets.expand(len(logits), *targets.shape)
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1)), {}


def model(run: runs.Run) -> Clip:
    """The model that the parameters of clip_zeroshot.ipynb name: open_clip's, or one made here.

    "captions" trains it in this run, "" finds the finished run that did or makes it.
    """
    check(run)  # before anything is trained
    params = {name: run.params[name] for name in MAKING}
    name = run.params["model"]
    if name in ("", "captions"):
        run.refuse("pretrained", because="the model is made here")
    else:
        run.refuse(*(each for each in MAKING if each != "dataset"), because="the model brings its own")
        return load(name, run.params["pretrained"])
    if not name:
        least = {"model": "captions", "enable_pruning": False, "shares": []}
        return load(f"local-dir:{runs.ensure('clip_zeroshot', run.params['output_dir'], **params, **least) / 'clip'}")
    start = initial(run, params["weights"])
    return fit(run, start.vit, start.images, train.Recipe.of(run.params, warmup_epochs=0.1))


def fit(run: runs.Run, vit: nn.Module, images: Any, recipe: train.Recipe) -> Clip:
    """Train a model on captions of the training images, and keep it in <run>/clip, in open_clip's layout.

    vit: a trained timm ViT, as which the visual tower starts.
    """
    open_clip = needed()
    config = {"embed_dim": EMBED_DIM, "vision_cfg": vision_config(vit), "text_cfg": TEXT, "quick_gelu": False}
    clip = open_clip.CLIP(**copy.deepcopy(config), init_logit_scale=math.log(SCALE))
    clip.logit_scale.requires_grad_(False)  # zero-shot logits have this scale, too
    clip.visual.load_state_dict(tower_state(vit), strict=False)  # all but the projection
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    names = class_names(images)
    said = CAPTIONS if names == list(NUMBERS) else GENERAL
    texts = torch.stack([tokenizer([caption.format(name) for name in names]) for caption in said])
    history = train.fit(Captions(clip, texts), images, recipe, run=run, loss=caption_loss)
    run.figure(plots.training(history, recipe.keep), "training")
    size = config["vision_cfg"]["image_size"]
    fed = {"size": [size, size], "mean": images.mean, "std": images.std, "interpolation": "bicubic"}
    fed["resize_mode"] = "shortest"
    state = {name: tensor.cpu().contiguous() for name, tensor in clip.state_dict().items()}
    folder = run.dir / "clip"
    runs.write(folder / "open_clip_model.safetensors", lambda temporary: save_file(state, temporary))
    text = json.dumps({"model_cfg": config, "preprocess_cfg": fed}, indent=1)
    runs.write(folder / "open_clip_config.json", lambda temporary: temporary.write_text(text))
    return load(f"local-dir:{folder}")


def vision_config(vit: nn.Module) -> dict[str, Any]:
    """open_clip's configuration of a visual tower that computes what this timm ViT does before its head.

    UnsupportedBlock where open_clip's plain tower has no such thing: another pooling, register tokens, q/k-norm, …
    """
    blocks.check(vit)
    block, size, patch = vit.blocks[0], vit.patch_embed.img_size, vit.patch_embed.patch_size
    plain = {"class token": vit.has_class_token and vit.num_prefix_tokens == 1, "pooling": vit.global_pool == "token",
             "norm": isinstance(vit.norm_pre, nn.Identity) and isinstance(vit.fc_norm, nn.Identity),
             "attention": all(isinstance(norm, nn.Identity) for norm in (block.attn.q_norm, block.attn.norm)),
             "mlp": isinstance(block.mlp.act, nn.GELU) and isinstance(block.mlp.norm, nn.Identity),
             "scale": isinstance(block.ls1, nn.Identity), "squares": size[0] == size[1] and patch[0] == patch[1],
             "bias": block.attn.qkv.bias is not None,
             "position": vit.pos_embed.shape[1] == vit.patch_embed.num_patches + 1}  # fmt: skip
    if odd := [name for name, same in plain.items() if not same]:
        raise blocks.UnsupportedBlock(f"{blocks.name_of(vit)} has another {odd[0]} than a tower of open_clip")
    return {
        **{"layers": len(vit.blocks), "width": vit.embed_dim, "head_width": block.attn.head_dim},
        **{"mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim, "patch_size": patch[0], "image_size": size[0]},
        **{"no_ln_pre": True, "norm_kwargs": {"eps": vit.norm.eps}},
    }


def tower_state(vit: nn.Module) -> dict[str, Tensor]:
    """The weights of a timm ViT under the names of open_clip's tower; the patches' bias goes into their positions."""
    own = vit.state_dict()
    position = own["pos_embed"][0].clone()
    position[1:] += own["patch_embed.proj.bias"]
    state = {
        **{"class_embedding": own["cls_token"][0, 0], "positional_embedding": position},
        **{"conv1.weight": own["patch_embed.proj.weight"]},
        **{f"ln_post.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")},
    }
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for index in range(len(vit.blocks)):
        old, new = f"blocks.{index}", f"transformer.resblocks.{index}"
        for kind in ("weight", "bias"):
            state[f"{new}.attn.in_proj_{kind}"] = own[f"{old}.attn.qkv.{kind}"]
            state |= {f"{new}.{theirs}.{kind}": own[f"{old}.{ours}.{kind}"] for ours, theirs in names.items()}
    return state
