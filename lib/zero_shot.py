"""Zero-shot classification with open_clip: every class is a text, and an image belongs to the one nearest to it.

    w_c = normalised mean over prompts of normalised text features of the prompt with class c's name
    logits = 100 · f · W,  f the normalised features of the image

Models come from open_clip: by name and tag from its hub, from a file, or from a folder in its own layout, such as those
that lib.captions makes without internet.

Source: "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
"""

import difflib
import string
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo
from torch import nn

from lib import evaluate, finished, models, runs, starts
from lib.data import DataError
from lib.params import ParameterError
from lib.pruners.tokens import TokenPruner
from lib.starts import Start
from lib.towers import Tower

KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
PHOTOS = [f"a {kind}photo of {article} {{}}." for article in ("a", "the") for kind in KINDS]
SIZES = [f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big")]
DIGITS = ["a picture of the digit {}.", "the number {} among clutter.", "a photo of a handwritten {}."]
TEMPLATES = {"digits": DIGITS, "cifar": PHOTOS + SIZES}  # by a part of the dataset's name; others as ImageNet
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Clip(NamedTuple):
    """name, pretrained: what it was loaded by. model: of open_clip, in evaluation mode. tokenizer: texts to (n, L).
    config: open_clip's own (embed_dim, vision_cfg, text_cfg, …). size, mean, std: how images are fed."""

    name: str
    pretrained: str
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load(model: str, pretrained: str = "") -> Clip:
    """A model of open_clip: its name and a tag or file of weights, or `hf-hub:…` or `local-dir:folder` alone.

    Weights of a tag that were trained with QuickGELU get it, whatever the name says; of a file nobody knows, which is
    warned of. ModelError, one line: an unknown name or
    tag, weights that cannot be fetched, no weights at all, or images prepared in another way than lib.data does.
    """
    open_clip = needed()
    kind, schema, where = model.partition(":")
    source = f"{kind}:{runs.resolve(where)}" if kind == "local-dir" else model
    if schema and pretrained:
        raise models.ModelError(f"pretrained is {pretrained!r}, but {model} brings its own weights: leave it out")
    if not schema and model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise models.ModelError(
            f"model {model!r} is unknown: expected a name of open_clip's, hf-hub:… or local-dir:…{hint}"
        )
    if not schema and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise models.ModelError(f"model {model!r} has no weights: expected pretrained, a file or a tag ({tags})")
    tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else None
    quick = bool((tag or {}).get("quick_gelu"))
    try:
        file = runs.resolve(pretrained) or None
        clip = open_clip.create_model(source, file, force_quick_gelu=quick, require_pretrained=True)
        config = open_clip.get_model_config(source)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip and the hub raise a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise models.ModelError(f"model {model!r} with pretrained {pretrained!r} cannot be loaded: {reason}") from error
    tags = open_clip.list_pretrained_tags_by_model(model) if file and Path(file).is_file() else []
    if not config.get("quick_gelu") and any(
        open_clip.get_pretrained_cfg(model, each).get("quick_gelu") for each in tags
    ):
        warnings.warn(f"{pretrained}: if these weights were trained with QuickGELU, as OpenAI's were, name the model "
                      f"{model}-quickgelu", stacklevel=2)  # fmt: skip
    fed = clip.visual.preprocess_cfg
    size = fed["size"] if isinstance(fed["size"], int) else fed["size"][0]
    if (fed["size"] not in (size, (size, size), [size, size])) or fed["resize_mode"] != "shortest":
        found = f"{fed['size']} px, resized by {fed['resize_mode']!r}"
        raise models.ModelError(f"model {model!r} takes images of {found}: expected squares, resized by 'shortest'")
    config["quick_gelu"] = quick or bool(config.get("quick_gelu"))
    return Clip(model, pretrained, clip.eval(), tokenizer, config, size, tuple(fed["mean"]), tuple(fed["std"]))


def needed() -> Any:
    """The module open_clip; ModelError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")  # its progress bars want no widgets
            import open_clip
    except ImportError as error:
        raise models.ModelError("open_clip is not installed: pip install -e '.[clip]'") from error
    return open_clip


def templates(dataset: str) -> list[str]:
    """The prompts of a dataset, with {} for the class: those of the CLIP paper for CIFAR, and its 80 of ImageNet where
    there are no others."""
    for name, known in TEMPLATES.items():
        if name in dataset.lower():
            return known
    return [template("{}") for template in needed().OPENAI_IMAGENET_TEMPLATES]


def class_names(images: Any) -> list[str]:
    """The classes as words: digits spelled out, open_clip's names for ImageNet-1k's classes, of others the first of
    several names, without underscores."""
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if {*images.class_ids} <= {*synsets}:
        return [needed().IMAGENET_CLASSNAMES[synsets.index(wnid)] for wnid in images.class_ids]
    if images.classes == [str(n) for n in range(10)]:
        return list(NUMBERS)
    return [name.split(",")[0].replace("_", " ").strip() for name in images.classes]


def check(run: runs.Run) -> None:
    """ParameterError where a prompt of the parameters has not one place for the class."""
    if faulty := [prompt for prompt in run.params["templates"] if not _fits(str(prompt))]:
        raise ParameterError(f"templates hold {faulty[0]!r}: expected texts with one {{}} for the class")


def _fits(prompt: str) -> bool:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError:  # a single brace
        return False
    return fields == [""]


def start(run: runs.Run, clip: Clip) -> Start:
    """The parameters' dataset as the model is fed it, and the model's visual tower as a classifier of its classes.

    The classes' texts are the parameters' templates, or those known for the dataset. ParameterError: see `check`.
    """
    check(run)
    params = run.params
    source = {"dataset": runs.portable(params["dataset"]), "img_size": clip.size, "labels_csv": None}
    images = replace(starts.dataset({"data": source}), mean=clip.mean, std=clip.std)
    made = {"digest": images.digest} if params["model"] in ("", "captions") else {}  # from their training images
    if not params["model"]:
        folder = Path(clip.name.removeprefix("local-dir:")).parent
        if finished.read(folder, "provenance")["dataset_digest"] != images.digest:
            found = f"dataset {images.name} holds other images than when the model in {folder} was trained"
            raise DataError(f"{found}: put them back, or remove that run")
    prompts, words, where = params["templates"] or templates(images.name), class_names(images), evaluate.device()
    if twice := next((word for word in words if words.count(word) > 1), None):
        print(f"two classes of {images.name} are {twice!r}: of them only the first is ever answered", flush=True)
    print(f"asked for {', '.join(repr(prompts[0].format(word)) for word in words[:3])}, …", flush=True)
    weights = (
        needed()
        .build_zero_shot_classifier(clip.model.to(where), clip.tokenizer, words, prompts, device=where, use_tqdm=True)
        .cpu()
    )
    clip.model.cpu()
    config = {name: clip.config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu")}
    about = {"data": source, "normalise": "data", "classes": images.classes, "mean": clip.mean, "std": clip.std} | made
    return Start("", Tower(clip.model.visual, weights.contiguous(), config).eval(), images, about)


def report(scores: dict[str, Any], start: Start, clip: Clip, model: nn.Module | None = None) -> dict[str, Any]:
    """The scores of evaluate.test as CLIP_benchmark writes its results; acc5 is None for fewer than five classes.

    model: what was measured; of a pruner of start.vit its settings are added as `pruning`.
    """
    recalls = [share for share in scores["per_class_accuracy"].values() if share is not None]  # of classes with images
    recall = sum(recalls) / len(recalls)
    metrics = {"acc1": scores["top1"], "acc5": scores.get("top5"), "mean_per_class_recall": recall}
    task = {"task": "zeroshot_classification", "metrics": metrics, "language": "en"}
    found = {"dataset": start.images.name, "model": clip.name, "pretrained": clip.pretrained} | task
    return found | ({"pruning": model.arguments} if isinstance(model, TokenPruner) else {})
