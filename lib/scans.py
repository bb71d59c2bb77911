"""Token methods side by side on one model: at the same price, with one setting varied, and the patches they keep."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from lib import evaluate
from lib.blocks import UnsupportedBlock
from lib.costs import NotCovered
from lib.pruners import baselines
from lib.pruners.dropping import Unreachable
from lib.pruners.tokens import TokenPruner
from lib.starts import Start
from lib.training_free import METHODS, agreement, build, parted

COUNTED = 256  # test images on which kept patches are compared


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


def at_ceilings(start: Start, rules: Mapping[str, Any], ceilings: Sequence[float], latency_batch: int) -> pd.DataFrame:
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
    patches, blocks = TokenPruner(start.vit).patches, start.vit.blocks
    depth = len(blocks)
    given = [value if value >= 1 else value * patches for value in (rules["k_anchors"], rules["top_m"])]
    mix = given[0] / sum(given)
    values = {
        "alpha": [0.0, 0.25, 0.5, 0.75, 1.0],
        "anchors among kept": sorted({0.1, 0.25, 0.5, 0.75, 0.95}),
        "start_block": [i for i in sorted({1, *(depth * i // 4 for i in (1, 2, 3))} - {0}) if blocks[i].attn.num_heads],
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
