"""Where a notebook that removes parts ends: the smaller model, made, fine-tuned, measured and saved."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import nn

from lib import evaluate, models, plots, train
from lib.pruners import surgery
from lib.runs import Run, resolve
from lib.starts import Start


def pruned(run: Run, start: Start, plan: surgery.Plan, recipe: train.Recipe, latency_batch: int) -> dict[str, Any]:
    """Slice the model, measure it on the test images, fine-tune it for recipe.epochs (0: not at all) and measure again.

    Saves the model, its predictions and figures in the run's folder. Returns what belongs in metrics.json besides the
    method's own: all scores of the final model, `oneshot_…` those before fine-tuning, and the costs.
    """
    images, where = start.images, evaluate.device()
    small = surgery.remove(start.vit, plan)
    dense, small = start.vit.to(where), small.to(where)
    oneshot, predicted = evaluate.test(small, images)
    scores = oneshot
    if recipe.epochs:
        history = train.fit(small, images, recipe, run=run)
        run.figure(plots.training(history, recipe.keep), "training")
        scores, predicted = evaluate.test(small, images)
    small.eval()
    run.arrays("test", logits=predicted.logits, labels=predicted.labels)
    run.figure(plots.confusion(evaluate.confusion(*predicted, len(images.classes)), images.classes), "confusion")
    speed = evaluate.latency({"dense": dense, "pruned": small}, evaluate.batch(images, latency_batch), device=where)
    models.save(small, run.dir / "model", **start.about)
    whole = evaluate.macs(dense, evaluate.image_shape(images))
    shares = plan.shares(dense)
    return {
        **scores,
        **{f"oneshot_{name}": oneshot[name] for name in ("top1", "f1_macro", "nll_nats")},
        "finetune_epochs": recipe.epochs,
        "dense_macs_g": whole["macs_g"],
        "dense_params_m": whole["params_m"],
        "heads_kept": shares["head"],
        "neurons_kept": shares["neuron"],
        "speedup": round(speed.speedup[1], 3),
        "latency_ms": round(speed.latency_ms[1], 3),
    }


def shares(run: Run, vit: nn.Module) -> float | dict[str, float]:
    """The share of its parts that a model keeps, by the notebook's parameters: `keep_ratio`, or the shares of heads and
    neurons that the pruned model `like` keeps. ParameterError where both are set, ModelError where nothing was pruned.
    """
    if not run.params["like"]:
        return run.params["keep_ratio"]
    run.refuse("keep_ratio", because="like says how much stays")
    config = models.header(resolve(run.params["like"]))["model"]
    if "plan" not in config:
        raise models.ModelError(f"like is {run.params['like']}: expected a model that acdc.ipynb or eap.ipynb pruned")
    return surgery.Plan(**config["plan"]).shares(vit)


def compared(start: Start, plans: Iterable[tuple[dict[str, Any], surgery.Plan]]) -> pd.DataFrame:
    """What plans cost and keep before any fine-tuning, on the validation images: a row each of (its names, its plan).

    Empty where there are no plans or no validation images; the test images decide nothing.
    """
    rows = []
    for names, plan in plans if len(start.images.val) else ():
        scores, _ = evaluate.test(surgery.remove(start.vit, plan), start.images, split="val")
        rows.append({**names, **{name: scores[name] for name in ("macs_g", "params_m", "top1", "n")}})
    return pd.DataFrame(rows)


def before_and_after(result: dict[str, Any]) -> pd.DataFrame:
    """The result of `pruned` as a table of two rows to show: sliced, and fine-tuned."""
    names = {"top1": "accuracy", "f1_macro": "macro-F1", "nll_nats": "NLL (nats)"}
    costs = {"macs_g": "GMACs", "params_m": "parameters (10⁶)", "speedup": "speed, dense = 1"}
    shared = {label: result[name] for name, label in costs.items()}
    rows = {"sliced": {label: result[f"oneshot_{name}"] for name, label in names.items()} | shared}
    if result["finetune_epochs"]:
        rows |= {"and fine-tuned": {label: result[name] for name, label in names.items()} | shared}
    return pd.DataFrame(rows).T.round(3)
