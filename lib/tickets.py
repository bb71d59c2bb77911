"""The loop of RSST and Refill: states that train, select and rewind, each on disk when it is done.

    state s = 0 … T:  train `epochs` from the rewound weights what density (1 − rate)^s leaves
                      cut what is on its way out, measure the model that is really smaller
                      select what density (1 − rate)^(s+1) leaves, for the next state

Refill removes at once and trains the small model. RSST trains the whole model while growing regularisation drives out
what is not selected, cuts it to measure, and rewinds the whole model; with `remove_each_state` what was driven out
stays away, which is Refill with a `reg_granularity_prune` above 0. Cutting is real (`surgery.remove`) where units go;
without `vit_structured` single weights go, which are set to zero and cost as before.

T is `pruning_times`: state 0 trains the whole model, and each of the T prunings is followed by a training.
"""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import blocks, evaluate, models, params, runs, train
from lib.pruners import lottery, units
from lib.pruners.surgery import Plan, remove
from lib.resnet import ResNet20
from lib.starts import Start

DRIVEN_OUT = 1e-3  # norm of the weights on their way out over that of the others, below which cutting them is harmless
SCORES = ("top1", "f1_macro", "nll_nats", "n", "macs_g", "params_m", "val_top1", "val_nll_nats")
EDGES = np.linspace(-9, 1, 51)  # of the histograms of log10|w|


def search(run: runs.Run, start: Start, recipe: train.Recipe, *, remove_each_state: bool) -> list[dict[str, Any]]:
    """Run all states that the parameters of rsst.ipynb or refill.ipynb ask for; a row of results each.

    Each state's model, row and selection lie in parts/state<s>/ of the run: a killed run goes on in the state it was
    in, to the same result. ParameterError: units that the model does not have, parameters that would do nothing;
    RunError: initial weights that changed.
    """
    _check(run)
    tickets = _Tickets(run, start, recipe, remove_each_state)
    tickets.untouched()
    print(tickets.forecast())
    rows, logged = [], []
    for state in range(run.params["pruning_times"] + 1):
        rows.append(tickets.state(state))
        epochs = (run.part(f"state{state:02d}").dir / "metrics.jsonl").read_text().splitlines()
        logged += [{"state": state, **json.loads(line)} for line in epochs]
        run.log(logged)
    return rows


def _check(run: runs.Run) -> None:
    rules = run.params
    if not rules["vit_structured"]:
        run.refuse("criteria", "prune_target", "sorting_mode", "at_least", "fillback_rate",
                   because="single weights go, by magnitude")  # fmt: skip
    if not rules["reg_granularity_prune"]:
        run.refuse("RST_schedule", "exponents", because="reg_granularity_prune is 0: nothing is regularised")
    elif "exp_custom" not in rules["RST_schedule"]:
        run.refuse("exponents", because=f"RST_schedule is {rules['RST_schedule']!r}, which has no exponent")
    if rules["criteria"] not in lottery.LOOKS:
        run.refuse("analysis_batches", because=f"criteria {rules['criteria']!r} looks at no images")
    if rules["rewind"] != "rewind_lt":
        run.refuse("rewind_epoch", because=f"rewind is {rules['rewind']!r}")
    fault = None
    if rules["reg_granularity_prune"] and rules["optimizer"] not in ("sgd", "momentum"):
        fault = f"optimizer is {rules['optimizer']!r}: expected sgd or momentum, which take λ·w as it is added"
    elif rules["rewind"] == "rewind_lt" and not 1 <= rules["rewind_epoch"] <= rules["epochs"]:
        fault = f"rewind_epoch is {rules['rewind_epoch']}: expected an epoch of state 0, from 1 to {rules['epochs']}"
    if fault:
        run.close()
        raise params.ParameterError(fault)


def model(run: runs.Run, state: int) -> nn.Module:
    """The model that a state of a finished search ended with, as small as it is."""
    return models.load(run.part(f"state{state:02d}").dir)


class _Tickets:
    """What the states share: the initial model, which must not change, and the rules."""

    def __init__(self, run: runs.Run, start: Start, recipe: train.Recipe, remove_each_state: bool):
        self.run, self.start, self.recipe, self.removes = run, start, recipe, remove_each_state
        self.rules, self.initial, self.images = run.params, start.vit, start.images
        if not isinstance(self.initial, ResNet20):
            blocks.check(self.initial)
        self.whole = Plan().explicit(self.initial)
        self.total = sum(weight.numel() for weight in units.prunable(self.initial).values())
        self.kinds = lottery.PARTS[self.rules["prune_target"]] if self.rules["vit_structured"] else ()
        self.densities = [(1 - self.rules["rate"]) ** state for state in range(self.rules["pruning_times"] + 1)]
        there = {kind: any(map(len, rows)) for kind, rows in units.slots(self.initial).items()}
        fault = None
        if missing := [kind for kind in self.kinds if not there[kind]]:
            fault = f"prune_target is {self.rules['prune_target']!r}, but this model has no {missing[0]}s to remove"
            fault += ": expected mlp, a ResNet's hidden channels" if there["neuron"] else ""
        elif self.kinds and isinstance(self.initial, ResNet20) and not self.rules["at_least"]:
            fault = "at_least is 0: expected at least one hidden channel in every block of a ResNet"
        elif self.kinds and not any(self._counts(kind)[-1] for kind in there):
            fault = f"rate is {self.rules['rate']}: after {self.rules['pruning_times']} states nothing would be left"
        if fault:
            run.close()
            raise params.ParameterError(fault)
        for block in [] if isinstance(self.initial, ResNet20) else self.initial.blocks:
            blocks.check_removable(block, heads="head" in self.kinds, neurons="neuron" in self.kinds)

    def _counts(self, kind: str) -> list[int]:
        """How many units of a kind every state keeps of the whole model."""
        anything, rules = units.per_unit(self.initial, {}), self.rules
        if kind not in self.kinds:
            return [int((~anything[kind].isnan()).sum())] * len(self.densities)
        plans = [lottery.regroup(anything, density, (kind,), rules["sorting_mode"], rules["at_least"])
                 for density in self.densities]  # fmt: skip
        plans = [lottery.refill(anything, plan, rules["fillback_rate"]) for plan in plans]
        return [sum(map(len, plan.heads if kind == "head" else plan.neurons)) for plan in plans]

    def forecast(self) -> str:
        """What the rate means for this model: with three heads in a block it allows three outcomes.

        Warns of states that remove nothing: they train once more what was there.
        """
        left = [self._counts(kind) for kind in self.kinds]
        idle = [state for state, (before, now) in enumerate(pairwise(zip(*left, strict=True)), 1) if before == now]
        if idle:
            shown = f"states {', '.join(map(str, idle[:9]))}{', …' if len(idle) > 9 else ''}"
            hint = "try sorting_mode global, or a higher rate"
            warnings.warn(f"{shown} remove nothing at a rate of {self.rules['rate']}: {hint}", stacklevel=3)
        counts = [f"{kind}s: {', '.join(map(str, each))}" for kind, each in zip(self.kinds, left, strict=True)]
        return "; ".join([f"density by state: {', '.join(f'{density:.3g}' for density in self.densities)}", *counts])

    # ---- a state ------------------------------------------------------------------------------------------------

    def state(self, state: int) -> dict[str, Any]:
        """Train, cut, measure and select for the next one; or what was found when that was done before."""
        part = self.run.part(f"state{state:02d}")
        if (part.dir / "state.json").exists():
            row = json.loads((part.dir / "state.json").read_text())["row"]
            shutil.rmtree(part.dir / "last", ignore_errors=True)  # killed before it was
            return row
        target, mask, before = self._selected(state)
        body = self._body(state)
        vit = self._begin(state, body)
        hooks = self._hooks(vit, state, body, target, mask)
        outgoing = hooks.get("on_gradient")
        if outgoing:
            before |= {"norm_ratio_before": outgoing.norm_ratio(vit)}
        recipe = replace(self.recipe, seed=100 * self.recipe.seed + state, keep="last")
        train.fit(vit, self.images, recipe, run=part, **hooks)
        vit.cpu().eval()
        small = self._cut(vit, target.within(body), mask)
        row = self._measure(state, small, target, mask) | before
        if outgoing:
            row |= {"lambda": outgoing.ceiling, "norm_ratio": outgoing.norm_ratio(vit), "uncut_top1": self._top1(vit)}
            self._warn(row)
        row["weights"] = _histograms(vit, outgoing.masks if outgoing else {})
        row["initial_sha1"] = self.untouched()
        models.save(small, part.dir / "model", **self.start.about)
        if self.rules["rewind"] == "finetune":
            models.save(vit, part.dir / "trained", **self.start.about)
        last = state == self.rules["pruning_times"]
        following = {} if last else self._select(state, vit, body, target, mask)
        runs.write_json(part.dir / "state.json", {"row": row, "plan": asdict(target), "next": following})
        shutil.rmtree(part.dir / "last")
        return row

    def _selected(self, state: int) -> tuple[Plan, dict[str, Tensor] | None, dict[str, float]]:
        """What the state before selected: plan, element mask if single weights go, and the accuracy before training."""
        if not state:
            return self.whole, None, {}
        folder = self.run.part(f"state{state - 1:02d}").dir
        chosen = json.loads((folder / "state.json").read_text())["next"]
        mask = None if self.kinds else load_file(folder / "next.safetensors")
        return Plan(**chosen["plan"]), mask, {"before_top1": chosen["before_top1"]}

    def _body(self, state: int) -> Plan:
        """What is physically there while a state trains: what it keeps, and what is on its way out."""
        if not self.removes:
            return self.whole
        return self._selected(max(0, state - 1) if self.rules["reg_granularity_prune"] else state)[0]

    def _begin(self, state: int, body: Plan) -> nn.Module:
        """The model that a state starts with: rewound, reduced to `body`."""
        if state and self.rules["rewind"] == "finetune":
            trained = self.run.part(f"state{state - 1:02d}").dir / "trained.safetensors"
            return remove(models.load(trained), body.within(self._body(state - 1))).train()
        rewound = state and self.rules["rewind"] == "rewind_lt"
        vit = models.load(self.run.part("state00").dir / "rewind.safetensors") if rewound else self.initial
        return remove(vit, body).train()

    def _hooks(
        self, vit: nn.Module, state: int, body: Plan, target: Plan, mask: dict[str, Tensor] | None
    ) -> dict[str, Callable]:
        """What training a state needs: growing regularisation, zeros that stay zero, or weights kept for rewinding."""
        per_epoch = train.steps_per_epoch(self.images, self.recipe)
        if not state:
            if self.rules["rewind"] != "rewind_lt":
                return {}
            at, file = self.rules["rewind_epoch"] * per_epoch, self.run.part("state00").dir / "rewind"
            return {"on_step": partial(_save_at, at, file)}
        at_once, hooks = self.removes and not self.rules["reg_granularity_prune"], {}
        if self.removes and (gone := mask if at_once else self._selected(state - 1)[1]) is not None:
            _zero(vit, gone)
            hooks["on_step"] = partial(_keep_zero, gone)
        if at_once:
            return hooks
        out = units.outside(vit, target.within(body)) if mask is None else {name: ~kept for name, kept in mask.items()}
        rules = self.rules
        growing = lottery.Growing(out, rules["reg_granularity_prune"], self.recipe.epochs * per_epoch,
                                  rules["RST_schedule"], rules["exponents"])  # fmt: skip
        return hooks | {"on_gradient": growing, "watch": partial(_watch, growing)}

    def _cut(self, vit: nn.Module, plan: Plan, mask: dict[str, Tensor] | None) -> nn.Module:
        if self.kinds:
            return remove(vit, plan)
        small = copy.deepcopy(vit)
        if mask is not None:
            _zero(small, mask)
        return small

    # ---- what comes of it ---------------------------------------------------------------------------------------

    def _measure(self, state: int, small: nn.Module, target: Plan, mask: dict[str, Tensor] | None) -> dict[str, Any]:
        """The row of a state: the cut model's accuracy on the test images, its size, and how much of it is gone."""
        scores, _ = evaluate.test(small.to(evaluate.device()), self.images)
        if len(self.images.val):  # what a search may decide by: the log's are of the model before it was cut
            val, _ = evaluate.test(small, self.images, split="val")
            scores |= {f"val_{name}": val[name] for name in ("top1", "nll_nats")}
        small.cpu()
        shares = target.shares(self.initial)
        weights = units.prunable(small)
        left = sum(weight.numel() if mask is None else weight.count_nonzero().item() for weight in weights.values())
        planned = units.outside(self.initial, target) if mask is None else {name: ~kept for name, kept in mask.items()}
        gone = sum(planned[name].sum().item() for name in units.prunable(self.initial))
        if (left != self.total - gone) if mask is None else (left > self.total - gone):
            raise runs.RunError(f"state {state}: {left} of {self.total} weights are left, expected {self.total - gone}")
        return {
            "state": state,
            "density": self.densities[state],
            "sparsity": gone / self.total,
            "heads_kept": shares["head"],
            "neurons_kept": shares["neuron"],
            "plan": {"heads": target.heads, "neurons": target.neurons},
            **{name: scores[name] for name in SCORES if name in scores},
        }

    def _select(
        self, state: int, vit: nn.Module, body: Plan, target: Plan, mask: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """What the next state keeps, and the accuracy of this state's weights when cut to it."""
        rules, density = self.rules, self.densities[state + 1]
        stays = {name: ~out for name, out in units.outside(vit, target.within(body)).items()} if mask is None else mask
        chosen = target
        if self.kinds:
            largest = units.element_mask(vit, density, among=stays, total=self.total)
            where, looked_at = evaluate.device(), []
            if rules["criteria"] in lottery.LOOKS:
                looked_at = evaluate.batches(self.images, rules["analysis_batches"], rules["batch_size"])
                looked_at = [(x.to(where), y.to(where)) for x, y in looked_at]
            seed = 100 * rules["seed"] + state
            found = lottery.importance(vit.to(where), rules["criteria"], looked_at, mask=largest, seed=seed)
            vit.cpu()
            scores = self._widened(found, body, target)
            chosen = lottery.regroup(scores, density, self.kinds, rules["sorting_mode"], rules["at_least"])
            chosen = lottery.refill(scores, chosen, rules["fillback_rate"]).explicit(self.initial)
        else:
            mask = units.element_mask(vit, density, among=stays, total=self.total)
            file = self.run.part(f"state{state:02d}").dir / "next.safetensors"
            runs.write(file, lambda temporary: save_file(mask, temporary))
        return {"plan": asdict(chosen), "before_top1": self._top1(self._cut(vit, chosen.within(body), mask))}

    def _widened(self, scores: dict[str, Tensor], body: Plan, target: Plan) -> dict[str, Tensor]:
        """Scores of the body's units in the numbering of the initial model; −inf for what is removed already."""
        wide = units.per_unit(self.initial, {})
        for kind, there, stays in (("head", body.heads, target.heads), ("neuron", body.neurons, target.neurons)):
            if kind not in self.kinds:
                continue
            wide[kind] += -torch.inf
            for row, score, own, kept in zip(wide[kind], scores[kind], there, stays, strict=True):
                row[own] = score[: len(own)]
                row[[unit for unit in own if unit not in {*kept}]] = -torch.inf
        return wide

    def _top1(self, vit: nn.Module) -> float:
        found, _ = evaluate.test(copy.deepcopy(vit).to(evaluate.device()), self.images)
        return found["top1"]

    def untouched(self) -> str:
        """The digest of the initial weights; RunError where it, or that of the images, is not the search's start's."""
        file, digest = self.run.dir / "parts" / "initial.json", models.sha1(self.initial.state_dict())
        now = {"sha1": digest, "images": self.images.digest}
        if not file.exists():
            runs.write_json(file, now)
        for name, what in (("sha1", "initial weights"), ("images", "images")):
            if json.loads(file.read_text()).get(name, now[name]) != now[name]:
                self.run.close()
                raise runs.RunError(f"the {what} are not those that this run began with: choose another run_name")
        return digest

    def _warn(self, row: dict[str, Any]) -> None:
        if row["norm_ratio"] is not None and row["norm_ratio"] > DRIVEN_OUT:
            warnings.warn(
                f"state {row['state']}: what is cut still has {row['norm_ratio']:.1e} of the norm of what "
                f"stays, expected below {DRIVEN_OUT:g}: raise reg_granularity_prune, learning_rate or epochs (the sum "
                "of learning rate · λ should be about 7, a tenth of that with momentum 0.9)",
                stacklevel=3,
            )


# What training calls, as functions that other processes can be handed.
def _save_at(step: int, file: Path, vit: nn.Module, now: int) -> None:
    if now + 1 == step:
        models.save(vit, file)


def _keep_zero(mask: dict[str, Tensor], vit: nn.Module, _: int) -> None:
    _zero(vit, mask)


def _watch(growing: lottery.Growing, vit: nn.Module, step: int) -> dict[str, float | None]:
    return {"lambda": growing.strength(step), "norm_ratio": growing.norm_ratio(vit)}


@torch.no_grad()
def _zero(vit: nn.Module, mask: dict[str, Tensor]) -> None:
    for name, parameter in vit.named_parameters():
        if name in mask:
            mask[name] = mask[name].to(parameter.device)  # moves once
            parameter.mul_(mask[name])


def _histograms(vit: nn.Module, out: dict[str, Tensor]) -> dict[str, list[int]]:
    """How many weights have which log10|w| (see EDGES), of those that stay and those on their way out."""
    counts = {"stay": np.zeros(len(EDGES) - 1, int), "leave": np.zeros(len(EDGES) - 1, int)}
    for name, weight in units.prunable(vit).items():
        size = weight.detach().abs().clamp(10 ** EDGES[0], 10 ** EDGES[-1]).log10()
        leaves = out[name].cpu() if name in out else torch.zeros_like(weight, dtype=torch.bool)
        for what, chosen in (("stay", size[~leaves]), ("leave", size[leaves])):
            counts[what] += np.histogram(chosen.numpy(), EDGES)[0]
    return {what: count.tolist() for what, count in counts.items()}
