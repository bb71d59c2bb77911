"""How sure a comparison is, and what lies behind it: paired tests, hypervolumes, calibration, ceilings, kept patches.

Each function answers one question of compare.ipynb with a table, a row per arm or method.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.multitest import multipletests
from torch import nn

from lib import arms, evaluate
from lib.compare import baseline_arm
from lib.finished import predictions
from lib.pruners.dropping import FirstTokens
from lib.pruners.tokens import FixedPatches, TokenPruner

SAME_COST = 0.05  # share of multiply-adds by which two arms may differ to be at the same cost
LOOKED_AT = 256  # test images on which kept patches are compared


def significance(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Is an arm really better or worse than the baseline, and than random choices at its cost?

    By the answers of the first seeds on the same test images: difference in accuracy with its 95 % interval by the
    paired bootstrap, McNemar's exact p, and p_holm, which holds for all arms at once. random: of the arms whose method
    is random (sets, tokens, parts) and whose MACs differ at most by SAME_COST the one most alike: by parameters, which
    tell parts from tokens, then trained or not, then by MACs; None where there is none.
    """
    against = baseline_arm(table, baseline)
    firsts = table.drop_duplicates("arm").set_index("arm")
    right = {arm: _correct(run) for arm, run in firsts.run.items()}
    blind = firsts[firsts.method.str.startswith("random")]
    rows = []
    for arm, row in firsts.iterrows():
        found = {"arm": arm, **_paired(right[arm], right[against])}
        trained, apart = blind.trained != row.trained, (blind.macs_g - row.macs_g).abs() / row.macs_g
        parts = np.log2(blind.params_m / row.params_m).abs().round()  # half as many, or as many
        near = pd.DataFrame({"parts": parts, "trained": trained, "apart": apart})
        near = near[near.apart <= SAME_COST].sort_values(["parts", "trained", "apart"])
        found["random"] = near.index[0] if len(near) and not row.method.startswith("random") else None
        if found["random"]:
            found |= {f"{name}_random": value for name, value in _paired(right[arm], right[found["random"]]).items()}
        rows.append(found)
    rows = pd.DataFrame(rows)
    rows.insert(5, "p_holm", np.nan)
    others = rows.arm != against
    if others.any():
        rows.loc[others, "p_holm"] = multipletests(rows.p[others], method="holm")[1]
    return rows


def _correct(run: str) -> np.ndarray:
    logits, labels = predictions(run)
    return logits.argmax(axis=1) == labels


def _paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    found = evaluate.paired_bootstrap(ours, theirs)
    names = {"difference": "difference", "ci95_low": "low", "ci95_high": "high"}
    return {name: found[key] for key, name in names.items()} | {"p": evaluate.mcnemar(ours, theirs)["p_value"]}


def volumes(summary: pd.DataFrame, metric: str, baseline: str, classes: int) -> pd.DataFrame:
    """Which method is best over all budgets: the hypervolume of its arms (multiply-adds, metric) to a fixed reference.

    The reference is the baseline's MACs and chance; `volume` is the share of what a free and perfect method would have.
    summary: of compare.summary; baseline: an arm.
    """
    most, chance = summary.macs_g[summary.arm == baseline].iloc[0], (5 if metric == "top5" else 1) / classes
    whole = most * max(1e-9, 1 - chance)  # of as many classes as answers count every method is as good
    rows = [{"method": method, "arms": len(rows), "cheapest": rows.macs_g.min(), "best": rows[metric].max(),
             "volume": evaluate.hypervolume(rows, "macs_g", metric, (most, chance)) / whole}
            for method, rows in summary.groupby("method")]  # fmt: skip
    return pd.DataFrame(rows).sort_values("volume", ascending=False, ignore_index=True)


def calibration(table: pd.DataFrame, shown: Mapping[str, nn.Module], images: Any) -> pd.DataFrame:
    """Is an arm as sure as it is right, before and after temperature scaling?

    The temperature is fitted on the validation images, ECE and NLL are of the test images. Of the first seed's model;
    no rows where there are no validation images.
    """
    rows = []
    for arm, model in shown.items() if len(images.val) else ():
        seen = evaluate.predict(model, images.val, mean=images.mean, std=images.std, device=evaluate.device())
        fitted = evaluate.temperature(seen.logits, seen.labels)
        logits, labels = (torch.from_numpy(each) for each in predictions(table.run[table.arm == arm].iloc[0]))
        row = {"arm": arm, "temperature": fitted}
        for name, scaled in (("", logits), ("_scaled", logits / fitted)):
            scores = evaluate.classification(scaled, labels)
            row |= {f"ece{name}": scores["ece"], f"nll_nats{name}": scores["nll_nats"]}
        rows.append(row)
    return pd.DataFrame(rows)


def ceilings(shown: Mapping[str, nn.Module], images: Any) -> dict[str, nn.Module]:
    """What an arm's speed is measured against: per token pruner the same blocks on as many tokens, chosen for nothing.

    Where each image keeps its own number (A-ViT) it is the mean. A model that is physically smaller, as one of frozen
    patches is, chooses nothing: it is its own ceiling and not here.
    """
    found = {}
    for name, model in shown.items():
        if not isinstance(model, TokenPruner) or isinstance(model, FixedPatches):
            continue
        if hasattr(model, "counts"):
            tokens = model.counts()[1]
        elif not hasattr(model, "tokens"):  # UCB while it learns: what it masks is gone from one block alone
            continue
        else:
            running = model.tokens(evaluate.batch(images, LOOKED_AT).to(next(model.parameters()).device))
            least = max(1, model.prefix)  # an image that has left runs 0
            tokens = running.double().mean(dim=1).round().clamp(min=least).int().tolist()
        whole = not hasattr(model, "counts")  # A-ViT's tokens leave between blocks
        found[name] = FirstTokens(model.vit, np.minimum.accumulate(tokens).tolist(), whole_blocks=whole).eval()
    return found


def where(shown: Mapping[str, nn.Module], images: Any, grid: tuple[int, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which patches stay: foreground precision and recall, a row per arm, where masks say what is foreground, and the
    overlap of the kept sets of each two arms.

    On up to LOOKED_AT test images spread evenly. What merges keeps all, in a way, and is not here.
    """
    places = evaluate.evenly(len(images.test), LOOKED_AT)
    sets = arms.kept(shown, images.test.images[places], images)
    rows = []
    if images.test.masks is not None:
        masks = np.asarray(images.test.masks)[places]
        rows = [{"arm": arm, **evaluate.foreground(kept, masks, grid)} for arm, kept in sets.items()]
    return pd.DataFrame(rows), evaluate.overlaps(sets)
