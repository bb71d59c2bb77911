"""The loop of RSST and Refill: states that train, select and rewind, each on disk when it is done.

    state s = 0 … T − 1:  train `epochs` from the rewound weights what density (1 − rate)^s leaves
                          cut what is on its way out, measure the model that is really smaller
                          select what density (1 − rate)^(s+1) leaves, for the next state

Refill removes at once and trains the small model. RSST trains the whole model while growing regularisation drives out
what is not selected, cuts it to measure, and rewinds the whole model; with `remove_each_state` what was driven out
stays away, which is Refill with a `reg_granularity_prune` above 0. Cutting is real (`surgery.remove`) where units go;
without `vit_structured` single weights go, which are set to zero and cost as before.

T states prune T − 1 times between them: the first trains the whole model.
"""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import evaluate, models, params, plots, runs, train
from lib.pruners import lottery, units
from lib.pruners.surgery import Plan, remove
from lib.starts import Start

DRIVEN_OUT = 1e-3  # norm of the weights on their way out over that of the others, below which cutting them is harmless
EDGES = np.linspace(-9, 1, 51)  # of the histograms of log10|w|


def search(run: runs.Run, start: Start, recipe: train.Recipe, *, remove_each_state: bool) -> list[dict[str, Any]]:
    """Run all states that the parameters of rsst.ipynb or refill.ipynb ask for; a row of results each.

    Each state's model, row and selection lie in parts/state<s>/ of the run: a killed run goes on in the state it was
    in, to the same result. ParameterError: units that the model does not have, parameters that would do nothing;
    RunError: initial weights that changed.
    """
    _check(run)
    tickets = _Tickets(run, start, recipe, remove_each_state)
    print(tickets.forecast())
    rows, logged = [], []
    for state in range(run.params["pruning_times"]):
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
    if rules["rewind"] != "rewind_lt":
        run.refuse("rewind_epoch", because=f"rewind is {rules['rewind']!r}")
    elif not 1 <= rules["rewind_epoch"] <= rules["epochs"]:
        run.close()
        raise params.ParameterError(f"rewind_epoch is {rules['rewind_epoch']}: expected an epoch of the first state, "
                                    f"from 1 to {rules['epochs']}")  # fmt: skip


def model(run: runs.Run, state: int) -> nn.Module:
    """The model that a state of a finished search ended with, as small as it is."""
    return models.load(run.part(f"state{state:02d}").dir)


def finish(run: runs.Run, start: Start, rows: list[dict[str, Any]], latency_batch: int) -> dict[str, Any]:
    """Measure the last state's model as every method's is, and the speed of all states against the initial model.

    Saves the model, its predictions and figures. Returns what belongs in metrics.json besides the method's own.
    """
    images, where = start.images, evaluate.device()
    found = {f"state {row['state']}": model(run, row["state"]).to(where) for row in rows}
    speed = evaluate.latency(
        {"initial": start.vit.to(where), **found}, evaluate.batch(images, latency_batch), device=where
    )
    rows = [row | {"speedup": round(float(ratio), 3)} for row, ratio in zip(rows, speed.speedup[1:], strict=True)]
    small = [*found.values()][-1]
    scores, predicted = evaluate.test(small, images)
    run.arrays("test", logits=predicted.logits, labels=predicted.labels)
    run.figure(plots.confusion(evaluate.confusion(*predicted, len(images.classes)), images.classes), "confusion")
    models.save(small, run.dir / "model", **start.about)
    last = {name: value for name, value in rows[-1].items() if name not in ("plan", "weights")}
    return {**last, **scores, "latency_ms": round(float(speed.latency_ms.iloc[-1]), 3), "states": rows}


def table(result: dict[str, Any]) -> pd.DataFrame:
    """The states of a finished result as a table to show."""
    names = {
        **{"density": "density", "heads_kept": "heads", "neurons_kept": "neurons", "sparsity": "weights gone"},
        **{"macs_g": "GMACs", "params_m": "parameters (10⁶)", "speedup": "speed", "lambda": "λ"},
        **{"norm_ratio": "norm ratio", "uncut_top1": "not cut", "before_top1": "before", "top1": "accuracy"},
    }
    shown = pd.DataFrame(result["states"]).set_index("state")
    return shown[[name for name in names if name in shown]].rename(columns=names).round(4)


class _Tickets:
    """What the states share: the initial model, which must not change, and the rules."""

    def __init__(self, run: runs.Run, start: Start, recipe: train.Recipe, remove_each_state: bool):
        self.run, self.start, self.recipe, self.removes = run, start, recipe, remove_each_state
        self.rules, self.initial, self.images = run.params, start.vit, start.images
        self.digest = _digest(self.initial)
        self.whole = Plan().explicit(self.initial)
        self.total = sum(weight.numel() for weight in units.prunable(self.initial).values())
        self.kinds = lottery.PARTS[self.rules["prune_target"]] if self.rules["vit_structured"] else ()
        for kind, some in (("head", self.whole.heads), ("neuron", self.whole.neurons)):
            if kind in self.kinds and not any(some):
                run.close()
                raise params.ParameterError(f"prune_target is {self.rules['prune_target']!r}, but this model has no "
                                            f"{kind}s: set mlp for a ResNet's hidden channels")  # fmt: skip

    def forecast(self) -> str:
        """What the rate means for this model: with three heads it allows three outcomes."""
        densities = [(1 - self.rules["rate"]) ** state for state in range(self.rules["pruning_times"])]
        text = f"density by state: {', '.join(f'{density:.3g}' for density in densities)}"
        for kind in self.kinds:
            plans = [lottery.regroup(units.per_unit(self.initial, {}), density, (kind,), self.rules["sorting_mode"],
                                     self.rules["at_least"]) for density in densities]  # fmt: skip
            text += f"; {kind}s: {', '.join(str(sum(map(len, plan.heads or plan.neurons))) for plan in plans)}"
        return text

    # ---- a state ------------------------------------------------------------------------------------------------

    def state(self, state: int) -> dict[str, Any]:
        """Train, cut, measure and select for the next one; or what was found when that was done before."""
        part = self.run.part(f"state{state:02d}")
        if (part.dir / "state.json").exists():
            row = json.loads((part.dir / "state.json").read_text())["row"]
            self._unchanged(row["initial_sha1"])
            return row
        target, mask, before = self._selected(state)
        body = self._body(state)
        vit = self._begin(state, body)
        hooks = self._hooks(vit, state, body, target, mask)
        recipe = replace(self.recipe, seed=100 * self.recipe.seed + state, keep="last")
        train.fit(vit, self.images, recipe, run=part, **hooks)
        vit.cpu().eval()
        small = self._cut(vit, target.within(body), mask)
        row = self._measure(state, small, target, mask) | before
        outgoing = hooks.get("on_gradient")
        if isinstance(outgoing, lottery.Growing):
            row |= {"lambda": outgoing.ceiling, "norm_ratio": outgoing.norm_ratio(vit), "uncut_top1": self._top1(vit)}
            self._warn(row)
        row["weights"] = _histograms(vit, outgoing.masks if isinstance(outgoing, lottery.Growing) else {})
        row["initial_sha1"] = self._unchanged(_digest(self.initial))
        models.save(small, part.dir / "model", **self.start.about)
        if small is not vit and self.rules["rewind"] == "finetune":
            models.save(vit, part.dir / "trained", **self.start.about)
        following = {} if state + 1 == self.rules["pruning_times"] else self._select(state, vit, body, target, mask)
        runs.write_json(part.dir / "state.json", {"row": row, "plan": asdict(target), "next": following})
        shutil.rmtree(part.dir / "last")
        return row

    def _selected(self, state: int) -> tuple[Plan, dict[str, Tensor] | None, dict[str, float]]:
        """What the state before selected: plan, element mask if single weights go, and the accuracy before training."""
        if not state:
            return self.whole, None, {}
        folder = self.run.part(f"state{state - 1:02d}").dir
        chosen = json.loads((folder / "state.json").read_text())["next"]
        mask = (
            None if self.kinds else {name: kept.bool() for name, kept in load_file(folder / "next.safetensors").items()}
        )
        return Plan(**chosen["plan"]), mask, {"before_top1": chosen["before_top1"]}

    def _body(self, state: int) -> Plan:
        """What is physically there while a state trains: what it keeps, and what is on its way out."""
        if not self.removes:
            return self.whole
        return self._selected(max(0, state - 1) if self.rules["reg_granularity_prune"] else state)[0]

    def _begin(self, state: int, body: Plan) -> nn.Module:
        """The model that a state starts with: rewound, reduced to `body`."""
        if state and self.rules["rewind"] == "finetune":
            folder = self.run.part(f"state{state - 1:02d}").dir
            trained = folder / "trained.safetensors"
            vit, earlier = (
                (trained, self._body(state - 1)) if trained.exists() else (folder, self._selected(state - 1)[0])
            )
            return remove(models.load(vit), body.within(earlier)).train()
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
            return {"on_step": lambda vit, step: models.save(vit, file) if step + 1 == at else None}
        if self.removes and not self.rules["reg_granularity_prune"]:
            if mask is None:
                return {}
            _zero(vit, mask)
            return {"on_step": lambda vit, _: _zero(vit, mask)}
        out = units.outside(vit, target.within(body)) if mask is None else {name: ~kept for name, kept in mask.items()}
        rules = self.rules
        growing = lottery.Growing(out, rules["reg_granularity_prune"], self.recipe.epochs * per_epoch,
                                  rules["RST_schedule"], rules["exponents"])  # fmt: skip
        watch = lambda vit, step: {"lambda": growing.strength(step), "norm_ratio": growing.norm_ratio(vit)}  # noqa: E731
        return {"on_gradient": growing, "watch": watch}

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
            "density": (1 - self.rules["rate"]) ** state,
            "sparsity": gone / self.total,
            "heads_kept": shares["head"],
            "neurons_kept": shares["neuron"],
            "plan": {"heads": target.heads, "neurons": target.neurons},
            **{name: scores[name] for name in ("top1", "f1_macro", "nll_nats", "n", "macs_g", "params_m")},
        }

    def _select(
        self, state: int, vit: nn.Module, body: Plan, target: Plan, mask: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """What the next state keeps, and the accuracy of this state's weights when cut to it."""
        rules, density = self.rules, (1 - self.rules["rate"]) ** (state + 1)
        stays = {name: ~out for name, out in units.outside(vit, target.within(body)).items()} if mask is None else mask
        chosen = target
        if self.kinds:
            largest = units.element_mask(vit, density, among=stays, total=self.total)
            looked_at = evaluate.batches(self.images, rules["analysis_batches"], rules["batch_size"])
            found = lottery.importance(
                vit, rules["criteria"], looked_at, mask=largest, seed=100 * rules["seed"] + state
            )
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
            wide[kind] += -torch.inf
            for row, score, own, kept in zip(wide[kind], scores[kind], there, stays, strict=True):
                row[own] = score[: len(own)]
                row[[unit for unit in own if unit not in {*kept}]] = -torch.inf
        return wide

    def _top1(self, vit: nn.Module) -> float:
        found, _ = evaluate.test(copy.deepcopy(vit).to(evaluate.device()), self.images)
        return found["top1"]

    def _unchanged(self, digest: str) -> str:
        if digest != self.digest:
            raise runs.RunError("the initial weights are not those that this run began with: choose another run_name")
        return digest

    def _warn(self, row: dict[str, Any]) -> None:
        if row["norm_ratio"] > DRIVEN_OUT:
            warnings.warn(
                f"state {row['state']}: what is cut still has {row['norm_ratio']:.1e} of the norm of what stays, "
                f"expected below {DRIVEN_OUT:g}: raise reg_granularity_prune, learning_rate or epochs (the sum of "
                "learning rate · λ should be about 7, a tenth of that with momentum 0.9)",
                stacklevel=3,
            )


@torch.no_grad()
def _zero(vit: nn.Module, mask: dict[str, Tensor]) -> None:
    for name, parameter in vit.named_parameters():
        if name in mask:
            parameter.mul_(mask[name].to(parameter.device))


def _digest(vit: nn.Module) -> str:
    found = hashlib.sha1()
    for name, tensor in vit.state_dict().items():
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _histograms(vit: nn.Module, out: dict[str, Tensor]) -> dict[str, list[int]]:
    """How many weights have which log10|w| (see EDGES), of those that stay and those on their way out."""
    counts = {"stay": np.zeros(len(EDGES) - 1, int), "leave": np.zeros(len(EDGES) - 1, int)}
    for name, weight in units.prunable(vit).items():
        size = weight.detach().abs().clamp(10 ** EDGES[0], 10 ** EDGES[-1]).log10()
        leaves = out.get(name, torch.zeros_like(weight, dtype=torch.bool))
        for what, chosen in (("stay", size[~leaves]), ("leave", size[leaves])):
            counts[what] += np.histogram(chosen.numpy(), EDGES)[0]
    return {what: count.tolist() for what, count in counts.items()}
