"""Token methods on a pretrained model as it is: built by name, at a strength or at a price, and measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib import evaluate, models
from lib.pruners import baselines
from lib.pruners.anchors import Anchors
from lib.pruners.dropping import FirstTokens, reaching
from lib.pruners.tokens import TokenPruner
from lib.runs import Run
from lib.starts import Start

METHODS = (*baselines.DROPPING, "tome", "anchors")


def build(vit: nn.Module, rules: Mapping[str, Any], method: str = "", macs_g: float | None = None) -> TokenPruner:
    """The method that the parameters of token_baselines.ipynb describe, or another `method` with its settings.

    macs_g: instead of keep_ratio, r or top_m, the mildest strength of at most so many GMACs per image; None takes
    rules["macs_g"], where 0 is no such ceiling. ValueError: a ceiling that the method cannot reach.
    """
    method, blocks = method or rules["method"], rules["blocks"] or None
    macs_g = rules["macs_g"] if macs_g is None else macs_g
    patches = TokenPruner(vit).patches
    fixed = {name: rules[name] for name in ("alpha", "start_block", "normalise_scores")}
    fixed["normalise"] = fixed.pop("normalise_scores")
    if method in baselines.DROPPING:
        seed = {"seed": rules["seed"]} if method == "random" else {}
        make = lambda strength: baselines.DROPPING[method](vit, 1 - strength, blocks, **seed)  # noqa: E731
        return reaching(make, macs_g, 1 - 1e-3) if macs_g else make(1 - rules["keep_ratio"])
    if method == "tome":
        if macs_g:
            most = len(vit.blocks) * patches // 2  # half in every block
            return reaching(lambda total: baselines.ToMe.of_total(vit, total), macs_g, most)
        return baselines.ToMe(vit, rules["r"])
    if not macs_g:
        return Anchors(vit, _number(rules["k_anchors"]), _number(rules["top_m"]), **fixed)
    given = [value if value >= 1 else value * patches for value in (rules["k_anchors"], rules["top_m"])]
    share = given[0] / sum(given)  # of anchors among what is kept

    def make(strength: float) -> Anchors:
        kept = max(2, round((1 - strength) * patches))
        k = min(kept - 1, max(1, round(share * kept)))
        return Anchors(vit, k, kept - k, **fixed)

    return reaching(make, macs_g, 1.0)


def _number(value: float) -> int | float:
    return int(value) if value >= 1 else value


def measure(run: Run, start: Start, pruner: TokenPruner, latency_batch: int) -> dict[str, Any]:
    """Scores on the test images, how often it answers as the dense model does, its speed and that of its ceiling.

    Saves the model and its predictions in the run's folder. Returns what belongs in metrics.json besides the method's
    own. ceiling: the speed of the same blocks on as many tokens, chosen for nothing.
    """
    images, where = start.images, evaluate.device()
    arms = {"dense": start.vit.to(where).eval(), "pruned": pruner.to(where).eval()}
    arms["ceiling"] = FirstTokens(start.vit, pruner.counts()[1]).eval()
    scores, predicted = evaluate.test(pruner, images)
    dense, answers = evaluate.test(arms["dense"], images)
    speed = evaluate.latency(arms, evaluate.batch(images, latency_batch), device=where).set_index("model")
    run.arrays("test", logits=predicted.logits, labels=predicted.labels)
    models.save(pruner, run.dir / "model", **start.about)
    same = torch.as_tensor(predicted.logits).argmax(1) == torch.as_tensor(answers.logits).argmax(1)
    fast, limit = speed.speedup["pruned"], speed.speedup["ceiling"]
    return {
        **scores,
        "dense_top1": dense["top1"],
        "dense_macs_g": dense["macs_g"],
        "agreement": same.double().mean().item(),
        "tokens": pruner.counts()[1],
        "speedup": round(float(fast), 3),
        "ceiling": round(float(limit), 3),
        "share_of_ceiling": round(float(fast / limit), 3),
        "latency_ms": round(float(speed.latency_ms["pruned"]), 3),
    }


def scan(start: Start, rules: Mapping[str, Any], methods: Sequence[str], ceilings: Sequence[float]) -> pd.DataFrame:
    """Accuracy on the test images of several methods, each at the MACs of dense divided by each of `ceilings`.

    Nothing is chosen by it: method and strength are given. Columns: method, ceiling, macs_g, top1, agreement, n; no row
    where a method cannot be so cheap.
    """
    where, rows = evaluate.device(), []
    dense, answers = evaluate.test(start.vit.to(where), start.images)
    rows.append({"method": "dense", "ceiling": 1.0, "agreement": 1.0} | {k: dense[k] for k in ("macs_g", "top1", "n")})
    for method in methods:
        for ceiling in ceilings:
            try:
                pruner = build(start.vit, rules, method, dense["macs_g"] / ceiling).to(where)
            except ValueError as error:
                print(f"{method} at 1/{ceiling:g} of dense: {error}")
                continue
            found, predicted = evaluate.test(pruner, start.images)
            same = torch.as_tensor(predicted.logits).argmax(1) == torch.as_tensor(answers.logits).argmax(1)
            rows.append({"method": method, "ceiling": ceiling, "agreement": same.double().mean().item(),
                         **{k: found[k] for k in ("macs_g", "top1", "n")}})  # fmt: skip
    return pd.DataFrame(rows)


def kept(pruner: TokenPruner, images: Tensor) -> list[Tensor]:
    """The patches of each image (B, C, H, W) that run in the last block, as indices on the grid."""
    last = pruner.trace(images.to(next(pruner.parameters()).device)).kept[-1]
    return [ids.cpu() for ids in last]
