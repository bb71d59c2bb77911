"""ACDC: remove every part whose removal the prediction hardly notices, trying one after another, late to early.

Source: "Towards Automated Circuit Discovery" (arXiv 2304.14997). With p the clean model's prediction and p_R that
without the parts R, in nats, mean over images:

    for part c, late to early:  R ← R ∪ {c}  if  KL(p ‖ p_{R∪{c}}) < τ                  rule "absolute"
                                             if  KL(p ‖ p_{R∪{c}}) − KL(p ‖ p_R) < τ    rule "increment", the paper's

With "absolute" the final model's KL is below τ. `naive` is this loop as written. `decide` takes the same decisions
sooner, exactly but for rounding (see lib.pruners.probe):

* going late to early, what lies before the tested block is clean and cached: only the rest runs;
* a head or a group of neurons is subtracted from its block's output, the block's attention does not run again;
* where only the class token is read, the last block computes that one row;
* blocks that are done run physically without what was removed from them;
* once the KL of some images adds up to more than all may have, the part stays: no image's KL is below 0;
* parts are tried together on the guess that the next fare as the last: {c₁}, {c₁,c₂}, … after removals, {c₁}, {c₂}, …
  after refusals. What a wrong guess computed is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import blocks
from lib.pruners import components
from lib.pruners.components import KINDS, Component
from lib.pruners.probe import STAGES, WHOLE, Probe, divergence, log_p, some_images
from lib.pruners.surgery import Plan

if TYPE_CHECKING:
    from pandas import DataFrame

RULES = ("absolute", "increment")


class Decision(NamedTuple):
    """What became of a part. kl: KL(clean ‖ without it and all removed before), in nats, mean over images; where the
    part stays it may be a lower bound. so_far: the KL of all that is removed after this decision."""

    part: Component
    removed: bool
    kl: float
    so_far: float


def search(
    vit: nn.Module,
    batches: Iterable[Tensor],
    threshold: float,
    rule: str = "absolute",
    parts: Collection[str] = KINDS,
    group_size: int = 64,
    **how: object,
) -> Plan:
    """The Plan of what ACDC keeps; arguments as for `decide`."""
    found = decide(vit, batches, threshold, rule, parts, group_size, **how)
    return components.plan(vit, [each.part for each in found if each.removed])


def decide(
    vit: nn.Module,
    batches: Iterable[Tensor],
    threshold: float,
    rule: str = "absolute",
    parts: Collection[str] = KINDS,
    group_size: int = 64,
    *,
    keep: Collection[Component] = (),
    cache_mb: float = 2048,
    ahead: int | None = None,
    journal: Path | None = None,
    progress: bool = True,
) -> list[Decision]:
    """ACDC's decisions in the order in which they are taken; what goes with a larger part is not listed.

    batches: image tensors (B, 3, H, W), clean and un-augmented, on the model's device. threshold: τ in nats, from 0.
    rule: absolute or increment. parts: some of block, attn, mlp, head, neuron; group_size: neurons that go together.
    keep: parts that stay untried (see `screen`). cache_mb: memory for what is cached. ahead: how many parts are tried
    together at most; None is 8 on a GPU, and 1 on a CPU, which gains nothing from larger batches. journal: a file that
    takes every decision as it falls; a search that was stopped takes them over from it and goes on (images are then
    taken in another order: of parts that stay, another lower bound of their KL). The model is left untouched.
    ValueError: anything not as above, or a journal of another search.
    """
    _check(threshold, rule)
    tried = [part for part in components.of(vit, group_size, parts) if part not in {*keep}]
    batches = some_images(batches)
    known = _read(journal, _identity(vit, batches, tried, threshold, rule)) if journal else []
    probe, found, streak = Probe(vit, batches, cache_mb), [], 0  # streak: how many fared alike, below 0 if they stayed
    ahead = ahead or probe.ahead
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(tried), desc="ACDC", mininterval=1, disable=not progress))
        record = stack.enter_context(open(journal, "a")) if journal else None
        for index, stage in _walk(vit, probe):
            queue = [part for part in reversed(tried) if (part.block, part.kind) == (index, stage)]
            if not probe.begin(stage):
                bar.update(len(queue))
                continue
            while queue:
                some = queue[: min(ahead, 1 + abs(streak))]
                if len(found) < len(known):
                    tries = _recall(probe, stage, some[0], known[len(found)])
                else:
                    tries = _try(probe, stage, some, threshold, rule, streak >= 0)
                for part, removed, kl in tries:
                    found.append(Decision(part, removed, kl, probe.kl))
                    if record and len(found) > len(known):
                        line = [part.kind, part.block, part.units, removed, kl]
                        print(json.dumps(line), file=record, flush=True)
                    streak = max(streak, 0) + 1 if removed else min(streak, 0) - 1
                    queue.remove(part)
                    bar.update()
                bar.set_postfix(kl=f"{probe.kl:.4f}", removed=sum(each.removed for each in found), refresh=False)
    return found


def _try(
    probe: Probe, stage: str, queue: Sequence[Component], threshold: float, rule: str, guess: bool
) -> Iterator[tuple[Component, bool, float]]:
    """Try parts together on the guess that all go, or that all stay: (part, removed, KL) as far as the guess held."""
    increment = rule == "increment"
    sets = [queue[: i + 1] if guess else queue[i : i + 1] for i in range(len(queue))]
    # The highest KL with which a set could still pass: with "increment" every removal before it allows τ more.
    limits = [threshold * (1 + i * (guess and increment)) + increment * probe.kl for i in range(len(sets))]
    for part, kl in zip(queue, (kl.mean().item() for kl in probe.effects(stage, sets, limits)), strict=True):
        removed = kl < threshold + increment * probe.kl
        if removed:
            probe.remove(stage, part, kl)
        yield part, removed, kl
        if removed != guess:
            return


def _recall(
    probe: Probe, stage: str, part: Component, known: tuple[Component, bool, float]
) -> list[tuple[Component, bool, float]]:
    """Take over a decision from a journal: the same as `_try` on that one part gave."""
    if known[1]:
        probe.remove(stage, part, known[2])
    return [known]


def _identity(vit: nn.Module, batches: list[Tensor], tried: list[Component], threshold: float, rule: str) -> str:
    """A digest of all that a search's decisions depend on."""
    found = hashlib.sha1(repr((threshold, rule, [(part.kind, part.block, part.units) for part in tried])).encode())
    for tensor in (*vit.state_dict().values(), *batches):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(journal: Path, identity: str) -> list[tuple[Component, bool, float]]:
    """The decisions in a journal, which is made where it is missing; half a line at its end is cut off."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    text = journal.read_bytes() if journal.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole:
        journal.write_text(identity + "\n")
        return []
    os.truncate(journal, len(whole))
    first, *lines = whole.decode().splitlines()
    if first != identity:
        raise ValueError(f"{journal} is of another search (model, images, parts, threshold or rule): delete it")
    return [(Component(kind, block, tuple(units)), removed, kl)
            for kind, block, units, removed, kl in map(json.loads, lines)]  # fmt: skip


def naive(
    vit: nn.Module,
    batches: Iterable[Tensor],
    threshold: float,
    rule: str = "absolute",
    parts: Collection[str] = KINDS,
    group_size: int = 64,
) -> Iterator[Decision]:
    """`decide` by running the whole model on all images for every part: what the fast way must agree with."""
    _check(threshold, rule)
    images = some_images(batches)
    place = lambda part: (-part.block, STAGES.index(part.kind), *(-unit for unit in part.units))  # noqa: E731
    tried = sorted(components.of(vit, group_size, parts), key=place)
    gone, so_far = [], 0.0
    with blocks.evaluation(vit):
        with torch.inference_mode():
            clean = [log_p(vit(x)) for x in images]
        for part in tried:
            if {(part.block, "block"), (part.block, WHOLE.get(part.kind))} & {(one.block, one.kind) for one in gone}:
                continue
            with torch.inference_mode(), components.gates(vit, components.without(vit, [*gone, part])):
                total = sum(divergence(p, vit(x)).sum().item() for p, x in zip(clean, images, strict=True))
            kl = total / sum(map(len, images))
            removed = kl < threshold + (so_far if rule == "increment" else 0)
            if removed:
                gone, so_far = [*gone, part], kl
            yield Decision(part, removed, kl, so_far)


def effects(
    vit: nn.Module,
    batches: Iterable[Tensor],
    parts: Collection[str] = KINDS,
    group_size: int = 64,
    *,
    cache_mb: float = 2048,
    ahead: int | None = None,
    progress: bool = True,
) -> dict[Component, float]:
    """What removing each part alone does: KL(clean ‖ without it) in nats, mean over images; arguments as `decide`."""
    tried, found = components.of(vit, group_size, parts), {}
    probe = Probe(vit, batches, cache_mb)
    ahead = ahead or probe.ahead
    with tqdm(total=len(tried), desc="effects", mininterval=1, disable=not progress) as bar:
        for index, stage in _walk(vit, probe):
            queue = [part for part in tried if (part.block, part.kind) == (index, stage)]
            probe.begin(stage)
            for start in range(0, len(queue), ahead):
                some = queue[start : start + ahead]
                losses = probe.effects(stage, [[part] for part in some])
                found |= {part: kl.mean().item() for part, kl in zip(some, losses, strict=True)}
                bar.update(len(some))
    return {part: found[part] for part in tried}


def _walk(vit: nn.Module, probe: Probe) -> Iterator[tuple[int, str]]:
    """Every stage of every block, late to early."""
    for index in reversed(range(len(vit.blocks))):
        probe.enter(index)
        for stage in STAGES:
            yield index, stage
        probe.leave()


def against(effects: Mapping[Component, float], scores: Mapping[str, Mapping[str, Tensor]]) -> DataFrame:
    """What `effects` found beside what rankings (by name, shaped as eap.scores) say: kind, effect, and each ranking."""
    import pandas as pd

    rankings = {name: [components.score(each, part) for part in effects] for name, each in scores.items()}
    return pd.DataFrame({"kind": [part.kind for part in effects], "effect": [*effects.values()], **rankings})


def screen(
    scores: Mapping[str, Tensor],
    tried: Iterable[Component],
    threshold: float,
    rule: str = "absolute",
    margin: float = 4.0,
) -> list[Component]:
    """The parts that EAP is sure must stay, for `decide(keep=…)`: those whose estimated KL is above `margin` · bound.

    scores: of eap.scores, objective "fisher": an estimate of the KL that removing a part costs; of several neurons
    their sum. The bound is τ for "increment"; for "absolute" the largest estimate that fits when the smallest add up
    to τ.
    """
    _check(threshold, rule)
    estimate = {part: components.score(scores, part) for part in tried}
    bound, spent = threshold, 0.0
    if rule == "absolute":
        for value in sorted(estimate.values()):
            spent += value
            if spent >= threshold:
                break
            bound = value
    return [part for part, value in estimate.items() if value > margin * bound]


def _check(threshold: float, rule: str) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}: expected a KL in nats, at least 0")
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: expected one of {', '.join(RULES)}")
