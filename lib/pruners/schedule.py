"""How many tokens to merge in which block, for a budget: a schedule, chosen by what it does to the model's answers.

Candidates are bells over the depth (centre, width) and even merging, each as strong as the budget asks; for a budget of
time also those that merge in every second block only. Matching takes time, though hardly any multiply-adds: a bell ends
where its tails would take a matching for a token or two.
Unlabelled images decide, by KL(dense ‖ merged), by successive halving (Karnin et al. 2013): all candidates on a few
images, the better half on as many more, until all images were seen and one is left. A bell has two numbers, which a few
images can tell; a number for every block would fit the images.
"""

import json
import math
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from lib import blocks, costs
from lib.pruners.baselines import ToMe, merging
from lib.pruners.dropping import Unreachable, predicted_macs

CENTRES = (0.15, 0.3, 0.45, 0.6, 0.75)  # of the depth
WIDTHS = (0.15, 0.22, 0.33)
SHARE = 2 / 3  # share of the blocks that a bell takes in, those nearest to its centre,
AT_LEAST = 8  # or so many blocks
BATCH = 64  # images that are asked at once
NAMES = ("r", "centre", "width", "kl_nats", "images", "cost", "unit")


class Schedule(NamedTuple):
    """r: tokens merged per block. centre, width: of its bell, in shares of the depth; width None is even merging.

    kl_nats: from the dense model, mean over `images` images; None where none was asked. cost: of one image in GMACs, or
    of a batch in ms (`unit`). every: of the blocks with heads only the first and each `every`-th from there on merge.
    """

    r: list[int]
    centre: float
    width: float | None
    kl_nats: float | None
    images: int
    cost: float
    unit: str
    every: int = 1

    @property
    def shape(self) -> str:
        """What kind of schedule this is, for tables and figures."""
        return ("even" if self.width is None else "bell") + (f", each {self.every} blocks" if self.every > 1 else "")

    def to_json(self) -> str:
        """The schedule as one line of JSON."""
        return json.dumps(self._asdict())


def read(path: str | Path) -> Schedule:
    """The schedule in a JSON file that holds one; ValueError, one line, where it does not."""
    try:
        content = json.loads(Path(path).read_text())
        found = Schedule(**{name: content[name] for name in NAMES}, every=content.get("every", 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no schedule ({error}): expected a JSON object of {', '.join(NAMES)}") from None
    if not isinstance(found.r, list) or not all(isinstance(each, int) and each >= 0 for each in found.r):
        raise ValueError(f"{path}: r is {found.r}: expected a number of tokens from 0 for each block")
    return found


def bell(depth: int, centre: float, width: float) -> list[float]:
    """exp(−(l − centre)² / 2 width²) with l the middle of each block, all in shares of the depth; 0 in blocks that do
    not belong to it."""
    apart = [abs((block + 0.5) / depth - centre) for block in range(depth)]
    furthest = sorted(apart)[min(depth, max(AT_LEAST, round(SHARE * depth))) - 1] + 1e-9  # of two as far both belong
    return [math.exp(-((each / width) ** 2) / 2) if each <= furthest else 0.0 for each in apart]


def spaced(shape: Sequence[float], places: Collection[int]) -> list[float]:
    """A shape that is 0 but in these blocks."""
    return [each if block in places else 0.0 for block, each in enumerate(shape)]


def fitted(shape: Sequence[float], patches: int, cost: Callable[[list[int]], float], limit: float) -> list[int] | None:
    """The mildest r, in proportion to `shape` but for rounding, at most half of what runs, that costs at most `limit`;
    None where no strength is enough."""

    def at(strength: float) -> list[int]:
        due = [round(strength * each) for each in accumulate(shape)]  # so that all of r, too, is as near as may be
        running, r = patches, []
        for before, after in zip([0, *due], due, strict=False):
            r.append(min(after - before, running // 2))
            running -= r[-1]
        return r

    low, high = 0.0, float(patches)
    if cost(at(low)) <= limit:
        return at(low)
    if cost(at(high)) > limit:
        return None
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= limit else (middle, high)
    return at(high)


def choose(
    vit: nn.Module,
    make: Callable[[nn.Module, list[int]], ToMe],
    images: Tensor,
    limit: float,
    cost: Callable[[ToMe], float] = predicted_macs,
    unit: str = "GMACs",
    every: Sequence[int] = (1,),
) -> tuple[Schedule, list[Schedule]]:
    """The schedule under which a merging model answers most as `vit` does at a cost of at most `limit`, and the best of
    every candidate: those that were dropped early saw fewer images.

    make: the merging model of vit that merges r per block, as Ward or ToMe. images: (N, 3, H, W), on the model's
    device; never test on them. cost: of a merging model, in `unit`. every: candidates merge in each block (1), each
    second from the first on (2), …. Unreachable where no candidate is so cheap.
    """
    depth, patches = len(vit.blocks), make(vit, 0).patches
    shapes = [(centre, width, bell(depth, centre, width)) for centre in CENTRES for width in WIDTHS]
    found: dict[tuple[int, ...], Schedule] = {}
    for step, (centre, width, shape) in product(every, [(0.5, None, [1.0] * depth), *shapes]):
        r = fitted(spaced(shape, merging(vit.blocks, step)), patches, lambda r: cost(make(vit, r)), limit)
        if r is not None:
            found.setdefault(tuple(r), Schedule(r, centre, width, 0.0, 0, cost(make(vit, r)), unit, step))
    if not found:
        raise Unreachable(f"no schedule costs at most {limit:g} {unit}: expected a higher limit")
    seen, running = [], list(found.values())
    rounds = max(1, math.ceil(math.log2(len(running))))
    for part in images.tensor_split([len(images) >> left for left in range(rounds - 1, 0, -1)]):
        if not len(part):  # few images: nothing is dropped unseen
            continue
        for batch in part.split(BATCH):
            with torch.inference_mode(), blocks.evaluation(vit):
                clean = vit(batch).double().log_softmax(1)
                running = [_further(each, make(vit, each.r).eval(), batch, clean) for each in running]
        running.sort(key=lambda each: each.kl_nats)
        keep = (len(running) + 1) // 2  # rounded up: one is left only when all images were seen
        seen, running = seen + running[keep:], running[:keep]
    return running[0], sorted(running + seen, key=lambda each: (-each.images, each.kl_nats))


def _further(schedule: Schedule, pruner: nn.Module, images: Tensor, clean: Tensor) -> Schedule:
    """A schedule with its mean KL over further images, whose dense log-probabilities are `clean`."""
    merged = pruner(images).double().log_softmax(1)
    total = schedule.kl_nats * schedule.images + (clean.exp() * (clean - merged)).sum().item()
    count = schedule.images + len(images)
    return schedule._replace(kl_nats=total / count, images=count)


def milliseconds(
    vit: nn.Module, make: Callable[[nn.Module, list[int]], ToMe], images: Tensor
) -> Callable[[ToMe], float]:
    """A cost for `choose`: milliseconds for a batch like `images` (B, 3, H, W) on this machine and device, estimated.

    Up to thirteen schedules are timed in turns. Their times are fitted by what they consist of, with no part below 0:
    tokens, pairs of tokens, merging blocks and a constant.
    """
    depth = len(vit.blocks)
    patches = make(vit, [0] * depth).patches
    even, each, second = [1.0] * depth, merging(vit.blocks, 1), merging(vit.blocks, 2)
    shapes = [spaced(shape, each) for shape in (even, bell(depth, 0.25, 0.2), bell(depth, 0.6, 0.2))]
    shapes.insert(1, spaced(even, second))
    left = [0.7 * patches, 0.4 * patches, 0.1 * patches]
    schedules = [fitted(shape, patches, lambda r: patches - sum(r), most) for most in left for shape in shapes]
    pruners = {str(place): make(vit, r) for place, r in enumerate([[0] * depth, *filter(None, schedules)])}
    times = costs.latency(pruners, images, repeats=15).latency_ms
    parts, _ = nnls(np.array([_work(pruner) for pruner in pruners.values()]), times.to_numpy())
    return lambda pruner: float(parts @ _work(pruner))


def _work(pruner: ToMe) -> np.ndarray:
    """What the time of a merging model consists of: tokens, pairs of tokens, merging blocks, one."""
    attention, mlp = (np.array(counts, dtype=float) for counts in pruner.counts())
    matched = (attention != mlp)[: None if pruner.pools else -1]  # a last block that nobody reads patches of has none
    return np.array([mlp.sum() / 1e3, (attention**2).sum() / 1e6, matched.sum() / 10, 1.0])
