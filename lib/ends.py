"""Where a notebook that removes parts begins and ends: what decides; the smaller model, or one per state, measured."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import Tensor, nn

from lib import evaluate, models, plots, starts, tickets, train
from lib.pruners import surgery
from lib.runs import Run, resolve
from lib.starts import Start
from lib.training_free import FINETUNING


def begin(run: Run, *fine_tuning: str) -> tuple[Start, list[tuple[Tensor, Tensor]]]:
    """The dense model that the notebook names and the labelled batches that decide, on the device of evaluation.

    fine_tuning: parameters that nothing else reads. ParameterError where such a one was given though nothing is tuned,
    or a parameter that does nothing to these parts; ValueError where fine-tuning could not begin.
    """
    if not run.params["finetune_epochs"]:
        alone = [name for name in FINETUNING if name != "batch_size"]  # which says how many images decide, too
        run.refuse(*alone, "optimizer", *fine_tuning, because="finetune_epochs is 0")
    if "neuron" not in run.params["parts"]:
        run.refuse("group_size", because="no neurons are among the parts")
    train.Recipe.of(run.params, epochs=run.params["finetune_epochs"])  # refuses what would only fail after the search
    start, where = starts.dense(run, name="model_path"), evaluate.device()
    start.vit.to(where)
    count, size, split = (run.params[name] for name in ("analysis_batches", "batch_size", "analysis_split"))
    batches = evaluate.batches(start.images, count, size, split=split)
    return start, [(images.to(where), labels.to(where)) for images, labels in batches]


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
    _keep(run, start, small, predicted)
    speed = evaluate.latency({"dense": dense, "pruned": small}, evaluate.batch(images, latency_batch), device=where)
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


def _keep(run: Run, start: Start, vit: nn.Module, predicted: evaluate.Predictions) -> None:
    """What every run keeps of its final model: the model, its predictions of the test images, and how it errs."""
    run.arrays("test", logits=predicted.logits, labels=predicted.labels)
    confused = evaluate.confusion(*predicted, len(start.images.classes))
    run.figure(plots.confusion(confused, start.images.classes), "confusion")
    models.save(vit, run.dir / "model", **start.about)


def states(run: Run, start: Start, rows: list[dict[str, Any]], latency_batch: int) -> dict[str, Any]:
    """Measure the models of all states of a lottery search (lib.tickets), in turns with the initial one.

    rows: what the search returned. Saves the last model, its predictions and figures in the run's folder. Returns what
    belongs in metrics.json besides the method's own: all scores of the last model, `kept` (the share of units, or of
    single weights, that it has left) and `states`, a row each.
    """
    images, where = start.images, evaluate.device()
    found = [tickets.model(run, row["state"]).to(where) for row in rows]
    named = {"initial": start.vit.to(where)} | {f"state {state}": vit for state, vit in enumerate(found)}
    speed = evaluate.latency(named, evaluate.batch(images, latency_batch), device=where)
    rows = [row | {"speedup": round(float(ratio), 3)} for row, ratio in zip(rows, speed.speedup[1:], strict=True)]
    scores, predicted = evaluate.test(found[-1], images)
    _keep(run, start, found[-1], predicted)
    last = {name: value for name, value in rows[-1].items() if name not in ("plan", "weights")}
    kept = min(last["heads_kept"], last["neurons_kept"]) if run.params["vit_structured"] else 1 - last["sparsity"]
    return {
        **last,
        **scores,
        "kept": round(kept, 4),
        "latency_ms": round(float(speed.latency_ms.iloc[-1]), 3),
        "states": rows,
    }


def state_table(result: dict[str, Any]) -> pd.DataFrame:
    """The result of `states` as a table to show, a row per state."""
    names = {
        **{"density": "density", "heads_kept": "heads", "neurons_kept": "neurons", "sparsity": "weights gone"},
        **{"macs_g": "GMACs", "params_m": "parameters (10⁶)", "speedup": "speed, initial = 1", "lambda": "λ"},
        **{"norm_ratio": "norm ratio", "uncut_top1": "not cut", "before_top1": "before", "top1": "accuracy"},
    }
    shown = pd.DataFrame(result["states"]).set_index("state")
    return shown[[name for name in names if name in shown]].rename(columns=names).map("{:.4g}".format)


def shares(run: Run, vit: nn.Module) -> float | dict[str, float]:
    """The share of its parts that a model keeps, by the notebook's parameters: `keep_ratio`, or the shares of heads and
    neurons that the pruned model `like` keeps. ParameterError where both are set, ModelError where `like` was not
    pruned, or not from a model of this shape.
    """
    if not run.params["like"]:
        return run.params["keep_ratio"]
    run.refuse("keep_ratio", because="like says how much stays")
    config = models.header(resolve(run.params["like"]))["model"]
    plan, earlier = (each.get("plan") for each in (config, models.describe(vit)))
    try:  # both plans are in the numbering of the model before all pruning
        if plan is None or plan == earlier:
            raise ValueError("nothing of it was pruned")
        plan = surgery.Plan(**plan)
        return (plan.within(surgery.Plan(**earlier)) if earlier else plan).shares(vit)
    except (ValueError, KeyError) as error:
        fault = f"like is {run.params['like']}: expected a model that was pruned from this one ({error})"
        raise models.ModelError(fault) from error


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
