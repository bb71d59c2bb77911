"""Token methods on a pretrained model as it is: built by name, at a strength or at a price, and measured."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import evaluate, models, plots, train
from lib.blocks import UnsupportedBlock
from lib.costs import NotCovered
from lib.pruners import baselines
from lib.pruners.anchors import Anchors
from lib.pruners.dropping import FirstTokens, Unreachable, reaching
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
COUNTED = 256  # test images on which kept patches are compared


def build(vit: nn.Module, rules: Mapping[str, Any], method: str = "", macs_g: float | None = None) -> TokenPruner:
    """The method that the parameters of token_baselines.ipynb describe, or another `method` with its settings.

    macs_g: instead of keep_ratio, r or top_m, the mildest strength of at most so many GMACs per image; None takes
    rules["macs_g"], where 0 is no such ceiling. Unreachable: a ceiling that the method cannot reach; ValueError:
    settings that do not fit the model.
    """
    method, blocks = method or rules["method"], rules.get("blocks") or None
    macs_g = rules["macs_g"] if macs_g is None else macs_g
    patches = TokenPruner(vit).patches
    fixed = {name: rules[name] for name in ("alpha", "start_block", "normalise_scores")}
    fixed["normalise"] = fixed.pop("normalise_scores")
    if method in baselines.DROPPING:
        seed = {"seed": rules["seed"]} if method == "random" else {}
        make = lambda strength: baselines.DROPPING[method](vit, 1 - strength, blocks, **seed)  # noqa: E731
        return reaching(make, macs_g, 1 - 1e-3) if macs_g else make(1 - rules["keep_ratio"])
    if method in MERGING:
        gamma = {"gamma": rules.get("gamma", 0.5)} if method == "ward" else {}
        every = rules.get("merge_every", 1)
        merging = len(vit.blocks[::every])
        make = lambda total: MERGING[method].of_total(vit, total, every, **gamma)  # noqa: E731
        if macs_g:
            return reaching(make, macs_g, merging * patches // 2)  # half in each
        return make(merging * rules["r"]) if every > 1 else MERGING[method](vit, rules["r"], **gamma)
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
    else:
        run.refuse(*FINETUNING, because="finetune_epochs is 0")
    others = {"keep_ratio", "r", "gamma", "merge_every", "blocks", "seed", "k_anchors", "top_m", "alpha", "start_block"}
    for name in sorted({*others, "normalise_scores"} - free):
        ceiling = name in strength and run.params["macs_g"]
        run.refuse(name, because="macs_g says how strong" if ceiling else f"method is {method!r}")


def check_anchors(run: Run) -> None:
    """ParameterError where clip_zeroshot.ipynb was given settings of anchors that nothing uses."""
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
    before, _ = evaluate.test(pruner.to(evaluate.device()).eval(), start.images)
    recipe = train.Recipe.of(run.params, epochs=epochs)
    run.figure(plots.training(train.fit(pruner, start.images, recipe, run=run), recipe.keep), "training")
    return {"finetune_epochs": epochs} | {f"oneshot_{name}": before[name] for name in ("top1", "f1_macro", "nll_nats")}


def agreement(predicted: evaluate.Predictions, answers: evaluate.Predictions) -> float:
    """The share of images for which two models answer the same."""
    ours, theirs = (torch.as_tensor(each.logits).argmax(1) for each in (predicted, answers))
    return (ours == theirs).double().mean().item()


def compared(start: Start, pruners: Iterable[tuple[dict[str, Any], TokenPruner]], split: str = "test") -> pd.DataFrame:
    """A row for the dense model, then one for each of (its names, a pruner of it): macs_g, tokens in the last block,
    top1, nll_nats, agreement with dense, n, besides the names."""
    where = evaluate.device()
    dense, answers = evaluate.test(start.vit.to(where), start.images, split=split)
    shown = ("macs_g", "top1", "nll_nats", "n")
    rows = [{"method": "dense", "agreement": 1.0} | {name: dense[name] for name in shown}]
    for names, pruner in pruners:
        found, predicted = evaluate.test(pruner.to(where), start.images, split=split)
        left = {"tokens": pruner.counts()[1][-1], "agreement": agreement(predicted, answers)}
        rows.append(names | left | {name: found[name] for name in shown})
    return pd.DataFrame(rows)


def scan(start: Start, rules: Mapping[str, Any], ceilings: Sequence[float], latency_batch: int) -> pd.DataFrame:
    """`compared` of every method at the MACs of dense divided by each of `ceilings`; no row where a method cannot be so
    cheap. Nothing is chosen by it: method and strength are given.

    Columns besides: method, ceiling, speedup (measured in turns with dense, whose speed is 1).
    """
    whole = evaluate.macs(start.vit, evaluate.image_shape(start.images))["macs_g"]
    batch, rows = evaluate.batch(start.images, latency_batch), []
    for ceiling in ceilings:
        found = peers(start.vit, rules, whole / ceiling)
        arms = {"dense": start.vit, **{name: each.eval() for name, each in found.items()}}
        speed = evaluate.latency(arms, batch, repeats=15, device=evaluate.device()).set_index("model").speedup
        rows += [({"method": name, "ceiling": ceiling, "speedup": round(float(speed[name]), 3)}, each)
                 for name, each in found.items()]  # fmt: skip
    return compared(start, rows)


def peers(vit: nn.Module, rules: Mapping[str, Any], macs_g: float) -> dict[str, TokenPruner]:
    """Every method at so many GMACs or a little less, by name; what cannot be so cheap is printed and left out."""
    found = {}
    for method in METHODS:
        try:
            found[method] = build(vit, rules, method, macs_g)
        except (Unreachable, NotCovered, UnsupportedBlock) as error:
            print(f"left out {method}: {error}")
    return found


def vary(start: Start, rules: Mapping[str, Any], shares: Sequence[float]) -> pd.DataFrame:
    """`compared` of anchors with each of their settings varied alone, at each share of the patches kept.

    Columns setting and value say what was varied; `rules` hold the others. On the validation images, or, where there
    are none, on the test images: then it is for looking, not for choosing.
    """
    patches, depth = TokenPruner(start.vit).patches, len(start.vit.blocks)
    given = [value if value >= 1 else value * patches for value in (rules["k_anchors"], rules["top_m"])]
    mix = given[0] / sum(given)
    values = {
        "alpha": [0.0, 0.25, 0.5, 0.75, 1.0],
        "anchors among kept": sorted({0.1, 0.25, 0.5, 0.75, 0.95}),
        "start_block": sorted({1, *(depth * i // 4 for i in (1, 2, 3))} - {0}),
        "normalise_scores": ["minmax", "none"],
    }

    def pruners() -> Iterator[tuple[dict[str, Any], TokenPruner]]:
        for setting, each in values.items():
            for value in each:
                changed = {**rules, setting: value}
                for share in shares:
                    k, m = parted(changed.get("anchors among kept", mix), round(share * patches))
                    made = build(start.vit, changed | {"k_anchors": k, "top_m": m}, "anchors", 0)
                    yield {"method": "anchors", "setting": setting, "value": str(value)}, made

    return compared(start, pruners(), "val" if len(start.images.val) else "test")


def parted(share: float, kept: int) -> tuple[int, int]:
    """k anchors and m others among `kept` patches, `share` of them anchors; at least one of each."""
    kept = max(2, kept)
    k = min(kept - 1, max(1, round(share * kept)))
    return k, kept - k


def records(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """A table as metrics.json takes it: a dict per row, None where there is no value; [] for no table."""
    return [] if table is None else table.astype(object).where(table.notna(), None).to_dict("records")


def kept(pruner: TokenPruner, images: Tensor) -> list[Tensor]:
    """The patches of each image (B, C, H, W) that run in the last block, as indices on the grid."""
    last = pruner.trace(images.to(next(pruner.parameters()).device)).kept[-1]
    return [ids.cpu() for ids in last]


def kept_in(pruners: Mapping[str, TokenPruner], images: Any) -> dict[str, list[Tensor]]:
    """`kept` of up to 256 test images spread evenly, by method; without what merges, which keeps all in a way."""
    x = evaluate.batch(images, COUNTED)
    return {name: kept(pruner, x) for name, pruner in pruners.items() if not isinstance(pruner, baselines.ToMe)}


def foreground(sets: Mapping[str, Sequence[Tensor]], start: Start) -> pd.DataFrame | None:
    """Precision and recall of the foreground among the sets of `kept_in`, a row per method; None without masks."""
    test = start.images.test
    if test.masks is None:
        return None
    masks = np.asarray(test.masks)[evaluate.evenly(len(test), COUNTED)]
    grid = start.vit.patch_embed.grid_size
    return pd.DataFrame([{"method": name, **evaluate.foreground(each, masks, grid)} for name, each in sets.items()])
