"""Token methods on a pretrained model as it is: built by name, at a strength or at a price, and measured."""

import copy
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn

from lib import evaluate, models, plots, train
from lib.blocks import UnsupportedBlock
from lib.pruners import baselines
from lib.pruners.anchors import Anchors
from lib.pruners.dropping import FirstTokens, reaching, refuse_met
from lib.pruners.tokens import TokenPruner
from lib.pruners.ward import Ward
from lib.runs import Run
from lib.starts import Start

MERGING = {"tome": baselines.ToMe, "ward": Ward}
METHODS = (*baselines.DROPPING, *MERGING, "anchors")
FINETUNING = (
    *("learning_rate", "batch_size", "weight_decay", "warmup_epochs"),
    *("label_smoothing", "augment", "precision", "num_processes"),
)  # parameters


def build(vit: nn.Module, rules: Mapping[str, Any], method: str = "", macs_g: float | None = None) -> TokenPruner:
    """The method that the parameters of token_baselines.ipynb describe, or another `method` with its settings.

    macs_g: instead of keep_ratio, r or top_m, the mildest strength of at most so many GMACs per image; None takes
    rules["macs_g"], where 0 is no such ceiling. Unreachable: a ceiling that the method cannot reach; ValueError:
    settings that do not fit the model.
    """
    method, blocks = method or rules["method"], rules.get("blocks") or None
    patches = TokenPruner(vit).patches
    if macs_g is None and (macs_g := rules["macs_g"]):
        refuse_met(vit, macs_g)
    headed = [index for index, block in enumerate(vit.blocks) if block.attn.num_heads and index >= rules["start_block"]]
    fixed = {"alpha": rules["alpha"], "normalise": rules["normalise_scores"]}
    fixed["start_block"] = headed[0] if headed else rules["start_block"]  # a block may have lost its heads
    if method in baselines.DROPPING:
        seed = {"seed": rules["seed"]} if method == "random" else {}
        make = lambda keep: baselines.DROPPING[method](vit, keep, blocks, **seed)  # noqa: E731
        return reaching(lambda strength: make(1 - strength), macs_g, 1 - 1e-3) if macs_g else make(rules["keep_ratio"])
    if method in MERGING:
        gamma = {"gamma": rules.get("gamma", 0.5)} if method == "ward" else {}
        every = rules.get("merge_every", 1)
        merging = len(baselines.merging(vit.blocks, every))
        make = lambda total: MERGING[method].of_total(vit, total, every, **gamma)  # noqa: E731
        if macs_g:
            return reaching(make, macs_g, merging * patches // 2)  # half in each
        return make(merging * rules["r"]) if every > 1 else MERGING[method](vit, rules["r"], **gamma)
    if not headed and rules["start_block"] < len(vit.blocks):
        raise UnsupportedBlock(f"no block from {rules['start_block']} on has heads: anchors need attention")
    if not macs_g:
        return Anchors(vit, _number(rules["k_anchors"]), _number(rules["top_m"]), **fixed)
    given = [value if value >= 1 else value * patches for value in (rules["k_anchors"], rules["top_m"])]
    share = given[0] / sum(given)  # of anchors among what is kept

    def make(strength: float) -> Anchors:
        return Anchors(vit, *parted(share, round((1 - strength) * patches)), **fixed)

    return reaching(make, macs_g, 1.0)


def check(run: Run) -> None:
    """ParameterError where token_baselines.ipynb was given a setting that its method does not take."""
    method, free = run.params["method"], set()
    if method in baselines.DROPPING:
        free = {"blocks", "seed"} if method == "random" else {"blocks"}
    strength = {"tome": {"r"}, "ward": {"r"}, "anchors": {"k_anchors", "top_m"}}.get(method, {"keep_ratio"})
    if method == "ward" or run.params["ceilings"]:
        free |= {"gamma"}
    if method in MERGING or run.params["ceilings"]:
        free |= {"merge_every"}
    if method == "anchors" or run.params["ceilings"] or run.params["shares"]:  # all methods take part, or anchors do
        free |= {"alpha", "start_block", "normalise_scores", "k_anchors", "top_m"}
    if run.params["ceilings"]:
        free |= {"blocks", "seed"}
    if not run.params["macs_g"]:
        free |= strength
    if run.params["finetune_epochs"]:
        free |= {"seed"}
        train.Recipe.of(run.params, epochs=run.params["finetune_epochs"])  # refuses what would only fail later
    else:
        run.refuse(*FINETUNING, because="finetune_epochs is 0")
    others = {"keep_ratio", "r", "gamma", "merge_every", "blocks", "seed", "k_anchors", "top_m", "alpha", "start_block"}
    for name in sorted({*others, "normalise_scores"} - free):
        ceiling = name in strength and run.params["macs_g"]
        run.refuse(name, because="macs_g says how strong" if ceiling else f"method is {method!r}")


def check_anchors(run: Run) -> None:
    """ParameterError where clip_zeroshot.ipynb was given settings of anchors, or of the timing, that nothing uses."""
    if not run.params["enable_pruning"]:
        run.refuse("latency_batch", because="enable_pruning is off")
    if not run.params["enable_pruning"] and not run.params["shares"]:
        run.refuse("k_anchors", "top_m", "alpha", "start_block", "normalise_scores",
                   because="enable_pruning is off and nothing is varied")  # fmt: skip


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def measure(run: Run, start: Start, pruner: nn.Module, latency_batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs in metrics.json besides the method's own, and the scores of the dense model, on the test images.

    Scores, how often it answers as the dense model does, its speed and that of its ceiling: the same blocks on as many
    tokens, chosen for nothing. The dense model itself (start.vit) for pruner: its scores alone. Saves the model and its
    predictions in the run's folder.
    """
    images, where = start.images, evaluate.device()
    arms = {"dense": start.vit.to(where).eval(), "pruned": pruner.to(where).eval()}
    dense, answers = evaluate.test(arms["dense"], images)
    scores, predicted = (dense, answers) if pruner is start.vit else evaluate.test(pruner, images)
    run.arrays("test", logits=predicted.logits, labels=predicted.labels)
    models.save(pruner, run.dir / "model", **start.about)
    result = scores | {"dense_top1": dense["top1"], "dense_macs_g": dense["macs_g"]}
    result["agreement"] = agreement(predicted, answers)
    if pruner is start.vit:
        return result, dense
    arms["ceiling"] = FirstTokens(start.vit, pruner.counts()[1]).eval()
    speed = evaluate.latency(arms, evaluate.batch(images, latency_batch), device=where).set_index("model")
    fast, limit = speed.speedup["pruned"], speed.speedup["ceiling"]
    return {
        **result,
        "tokens": pruner.counts()[1],
        "speedup": round(float(fast), 3),
        "ceiling": round(float(limit), 3),
        "share_of_ceiling": round(float(fast / limit), 3),
        "latency_ms": round(float(speed.latency_ms["pruned"]), 3),
    }, dense


def setting(start: Start, cost: str) -> str:
    """What tells arms of one method apart: their cost, and whether the model had been cut before."""
    return f"{cost}, on fewer parts" if "plan" in getattr(start.vit, "config", {}) else cost


def label(rules: Mapping[str, Any]) -> str:
    """What metrics.json calls the method of token_baselines.ipynb: random sets and random parts are other methods."""
    name = "random tokens" if rules["method"] == "random" else rules["method"]
    return f"{name}-tuned" if rules["finetune_epochs"] else name


def finetune(run: Run, start: Start, pruner: nn.Module) -> dict[str, Any]:
    """Train a pruner for run.params["finetune_epochs"] as it then runs; its scores before, `oneshot_…`, for
    metrics.json. {} for no epochs."""
    if not (epochs := run.params["finetune_epochs"]):
        return {}
    fresh = build(copy.deepcopy(start.vit), run.params)  # a cell that runs again has a pruner that was trained
    before, _ = evaluate.test(fresh.to(evaluate.device()).eval(), start.images)
    recipe = train.Recipe.of(run.params, epochs=epochs)
    run.figure(plots.training(train.fit(pruner, start.images, recipe, run=run), recipe.keep), "training")
    return {"finetune_epochs": epochs} | {f"oneshot_{name}": before[name] for name in ("top1", "f1_macro", "nll_nats")}


def agreement(predicted: evaluate.Predictions, answers: evaluate.Predictions) -> float:
    """The share of images for which two models answer the same."""
    ours, theirs = (torch.as_tensor(each.logits).argmax(1) for each in (predicted, answers))
    return (ours == theirs).double().mean().item()


def parted(share: float, kept: int) -> tuple[int, int]:
    """k anchors and m others among `kept` patches, `share` of them anchors; at least one of each."""
    kept = max(2, kept)
    k = min(kept - 1, max(1, round(share * kept)))
    return k, kept - k


def records(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """A table as metrics.json takes it: a dict per row, None where there is no value; [] for no table."""
    return [] if table is None else table.astype(object).where(table.notna(), None).to_dict("records")
