"""RSST and Refill, state after state: what they say they did is what lies on disk, however often they were stopped."""

import lib  # noqa: F401  # isort: skip
import copy
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DROPOUT, TINY
from filelock import FileLock
from safetensors.torch import load_file
from test_lottery import matrices, table
from test_surgery import same
from test_train import on_cpu, plain  # noqa: F401
from torch import Tensor, nn

from lib import augment, ends, evaluate, models, params, runs, starts, tickets, train
from lib.pruners import lottery, units
from lib.pruners.surgery import Plan, remove

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore:state .*what is cut still has")]
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
HEADS, NEURONS = 4, 24  # of each of two blocks
# Two states would do for most of it, one pruning: three show what cumulates.
SMALL = {"batch_size": 8, "augment": "none", "epochs": 2, "rate": 0.3, "pruning_times": 2, "learning_rate": 0.05}
STRONG = {"reg_granularity_prune": 100.0, "epochs": 14, "pruning_times": 1}
CASES = {
    "refill": ("refill", {}),
    "refill, trained on": ("refill", {"rewind": "finetune", "prune_target": "both"}),
    "refill, from an epoch": ("refill", {"rewind": "rewind_lt", "rewind_epoch": 1, "prune_target": "mlp"}),
    "refill, driven out": ("refill", {"reg_granularity_prune": 20.0, "prune_target": "both", "pruning_times": 3}),
    "refill, driven out, trained on": (
        "refill",
        {"reg_granularity_prune": 20.0, "rewind": "finetune", "RST_schedule": "exp_custom"},
    ),
    "refill, some back": ("refill", {"prune_target": "both", "fillback_rate": 0.5, "criteria": "magnitude"}),
    "refill, all together": ("refill", {"prune_target": "both", "sorting_mode": "global", "criteria": "random"}),
    "refill, blocks may lose all": (
        "refill",
        {"sorting_mode": "global", "at_least": 0, "rate": 0.5, "criteria": "l1", "pruning_times": 4},
    ),
    "refill, weights": ("refill", {"vit_structured": False}),
    "refill, weights, trained on": ("refill", {"vit_structured": False, "rewind": "finetune"}),
    "rsst": ("rsst", {"criteria": "l2"}),
    "rsst, stays away": ("rsst", {"remove_each_state": True, "criteria": "saliency", "pruning_times": 3}),
    "rsst, trained on": ("rsst", {"rewind": "finetune", "prune_target": "mlp", "RST_schedule": "x^3"}),
    "rsst, from an epoch": ("rsst", {"rewind": "rewind_lt", "rewind_epoch": 2, "fillback_rate": 0.3}),
    "rsst, λ 0": ("rsst", {"reg_granularity_prune": 0.0}),
    "rsst, weights": ("rsst", {"vit_structured": False}),
    "refill, ResNet": ("refill", {"arch": "res20s", "prune_target": "mlp", "epochs": 1, "pruning_times": 1}),
    "rsst, ResNet": (
        "rsst",
        {"arch": "res20s", "prune_target": "mlp", "epochs": 1, "pruning_times": 1, "criteria": "l1"},
    ),
}
STRUCTURED = [case for case, (_, values) in CASES.items() if values.get("vit_structured", True)]
WEIGHTS = [case for case in CASES if case not in STRUCTURED]


@dataclass
class Searched:
    """A search, and what its trainings began and ended with."""

    run: runs.Run
    start: starts.Start
    untouched: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: list[nn.Module] = field(default_factory=list)
    ended: list[nn.Module] = field(default_factory=list)
    hooks: list[dict[str, Any]] = field(default_factory=list)
    recipes: list[train.Recipe] = field(default_factory=list)

    @property
    def rules(self) -> dict[str, Any]:
        return self.run.params

    @property
    def states(self) -> range:
        return range(self.rules["pruning_times"] + 1)

    def plan(self, state: int) -> Plan:
        return Plan(**self.rows[state]["plan"]).explicit(self.untouched)

    def body(self, state: int) -> Plan:
        """What should be there while a state trains."""
        if not self.removes:
            return Plan().explicit(self.untouched)
        return self.plan(max(0, state - 1) if self.rules["reg_granularity_prune"] else state)

    @property
    def removes(self) -> bool:
        return self.run.notebook == "refill" or self.rules["remove_each_state"]

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"head": ("head",), "mlp": ("neuron",), "both": ("head", "neuron")}[self.rules["prune_target"]]

    def mask(self, state: int) -> dict[str, Tensor]:
        """The weights that a state keeps where single ones go."""
        if not state:
            return {name: torch.ones_like(weight).bool() for name, weight in matrices(self.untouched).items()}
        found = load_file(self.run.part(f"state{state - 1:02d}").dir / "next.safetensors")
        return {name: mask.bool() for name, mask in found.items()}


def initial(arch: str, classes: int = 3) -> nn.Module:
    """A new model whose biases are not zero; dropout draws random numbers."""
    torch.manual_seed(0)
    if arch == "res20s":
        return models.create(arch, classes)
    vit = models.create("vit_digits", classes, **TINY | DROPOUT | {"num_heads": HEADS, "mlp_ratio": NEURONS / 16})
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return vit


def opened(folder: Path, notebook: str, values: dict[str, Any]) -> runs.Run:
    declaration = params.declared_in(NOTEBOOKS / f"{notebook}.ipynb")
    values = {"output_dir": str(folder), "run_name": "run", **SMALL, **values}
    return runs.Run(notebook, declaration, params.check(declaration, values))


def search(folder: Path, tiny: Any, notebook: str, values: dict[str, Any], vit: nn.Module | None = None) -> Searched:
    """As the notebook does it; the run is closed again."""
    run = opened(folder, notebook, values)
    vit = initial(run.params["arch"]) if vit is None else vit
    about = {"data": {"dataset": "tiny"}, "classes": tiny.classes}
    found = Searched(run, starts.Start("", vit, tiny, about), copy.deepcopy(vit))
    fit = train.fit

    def spy(model: nn.Module, *arguments: Any, **options: Any) -> list[dict]:
        found.hooks.append(options)
        found.recipes.append(arguments[1])
        found.began.append(copy.deepcopy(model))
        history = fit(model, *arguments, **options)
        found.ended.append(copy.deepcopy(model).eval())
        return history

    removes = True if notebook == "refill" else run.params["remove_each_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", spy)
        try:
            found.rows = tickets.search(run, found.start, recipe(run), remove_each_state=removes)
        finally:
            run.close()
    return found


def recipe(run: runs.Run) -> train.Recipe:
    return train.Recipe.of(run.params)


_searched: dict[str, Searched] = {}


@pytest.fixture
def searched(tmp_path_factory, tiny):
    """A case's search, made once."""

    def get(case: str) -> Searched:
        if case not in _searched:
            notebook, values = CASES[case]
            _searched[case] = search(tmp_path_factory.mktemp("outputs"), tiny, notebook, values)
        return _searched[case]

    return get


@torch.no_grad()
def logits(model: nn.Module, split: Any, data: Any) -> Tensor:
    x = torch.from_numpy(np.asarray(split.images)).permute(0, 3, 1, 2) / 255
    return copy.deepcopy(model).eval()(augment.normalise(x, data.mean, data.std))


def top1(model: nn.Module, data: Any) -> float:
    right = logits(model, data.test, data).argmax(1) == torch.from_numpy(np.asarray(data.test.labels))
    return right.double().mean().item()


def masked(vit: nn.Module, mask: dict[str, Tensor]) -> nn.Module:
    vit = copy.deepcopy(vit)
    for name, parameter in vit.named_parameters():
        if name in mask:
            parameter.data[~mask[name]] = 0
    return vit


# ---- what a state says it did ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STRUCTURED)
def test_the_sparsity_of_a_row_is_the_share_of_weights_that_the_saved_model_lost(searched, case):
    found = searched(case)
    total = sum(weight.numel() for weight in matrices(found.untouched).values())
    for state in found.states:
        row, small = found.rows[state], tickets.model(found.run, state)
        left = sum(weight.numel() for weight in matrices(small).values())
        assert row["sparsity"] == pytest.approx(1 - left / total, abs=1e-12)
        assert row["density"] == pytest.approx((1 - found.rules["rate"]) ** state)
        assert row["params_m"] * 1e6 == pytest.approx(sum(p.numel() for p in small.parameters()))
        counted = (
            evaluate.macs(small, (3, 12, 12))["macs_g"] * 1e9 if "ResNet" in case else evaluate.closed_form_macs(small)
        )
        assert row["macs_g"] * 1e9 == pytest.approx(counted)
        if "neuron" not in found.kinds:  # every head is as much of the model as any other
            heads = round((1 - row["heads_kept"]) * 2 * HEADS)
            assert row["sparsity"] * total == heads * 4 * 4 * 16
    assert found.rows[0]["sparsity"] == 0 < found.rows[-1]["sparsity"]
    assert [row["state"] for row in found.rows] == [*found.states]


@pytest.mark.parametrize("case", STRUCTURED)
def test_the_saved_models_are_as_small_as_their_plans_say(searched, case):
    found = searched(case)
    for state in found.states:
        plan, small = found.plan(state), tickets.model(found.run, state)
        header = models.header(found.run.part(f"state{state:02d}").dir)
        assert Plan(**header["model"]["plan"]).explicit(found.untouched) == plan
        assert repr(small) == repr(remove(found.untouched, plan).eval())
        shares = plan.shares(found.untouched)
        assert (found.rows[state]["heads_kept"], found.rows[state]["neurons_kept"]) == (
            shares["head"],
            shares["neuron"],
        )
        assert header["metadata"] == found.start.about
    assert found.plan(0) == Plan().explicit(found.untouched)


@pytest.mark.parametrize("case", STRUCTURED)
def test_counts_cumulate_by_the_closed_form_and_plans_are_nested(searched, case):
    found = searched(case)
    rules, layer = found.rules, found.rules["sorting_mode"] == "layer"
    for state in found.states:
        density = (1 - rules["rate"]) ** state
        for kind, name in (("head", "heads"), ("neuron", "neurons")):
            whole, kept = (getattr(plan, name) for plan in (Plan().explicit(found.untouched), found.plan(state)))
            if kind not in found.kinds:
                assert kept == whole
                continue
            sizes = [len(row) for row in whole]
            counts = [max(rules["at_least"], math.floor(density * size + 1e-9)) for size in sizes]
            least = (
                sum(counts) if layer else max(rules["at_least"] * len(sizes), math.floor(density * sum(sizes) + 1e-9))
            )
            back = math.floor(rules["fillback_rate"] * (sum(sizes) - least) + 1e-9)
            assert sum(map(len, kept)) == least + back
            assert rules["fillback_rate"] or not layer or [len(row) for row in kept] == counts
            assert all(len(row) >= rules["at_least"] for row in kept)
            if state:
                before = getattr(found.plan(state - 1), name)
                assert all({*now} <= {*then} for now, then in zip(kept, before, strict=True)), "none comes back"
    assert found.plan(1) != found.plan(0), "something went"


def test_the_cases_differ_where_they_should(searched):
    uneven = {case: {len(row) for row in searched(case).plan(1).neurons} for case in CASES}
    assert len(uneven["refill, all together"]) == 2, "blocks of unequal size"
    heads = [[len(row) for row in searched("refill, blocks may lose all").plan(state).heads] for state in range(5)]
    assert [sum(row) for row in heads] == [8, 4, 2, 1, 0] and 0 in heads[3]
    assert searched("rsst").plan(2) != searched("refill").plan(2)


@pytest.mark.parametrize("case", CASES)
def test_the_initial_weights_do_not_train_along(searched, case):
    found = searched(case)
    assert same(found.start.vit, found.untouched)
    assert len({row["initial_sha1"] for row in found.rows}) == 1
    assert not same(found.ended[0], found.untouched), "though training did something"


@pytest.mark.parametrize("case", CASES)
def test_accuracies_are_those_of_the_models_on_disk(searched, tiny, case):
    """Of the model that is really cut, on the test images; before its training that of the last state's weights."""
    found = searched(case)
    for state in found.states:
        row, small = found.rows[state], tickets.model(found.run, state)
        assert row["top1"] == pytest.approx(top1(small, tiny)) and row["n"] == 9
        nll = torch.nn.functional.cross_entropy(logits(small, tiny.test, tiny), torch.arange(9) % 3).item()
        assert row["nll_nats"] == pytest.approx(nll, rel=1e-4)
        cut = cut_to(found, state, found.ended[state], state)
        assert same(cut, small) and repr(cut) == repr(small), "it is what training ended with, cut"
        assert ("before_top1" in row) == (state > 0) and ("uncut_top1" in row) == ("lambda" in row)
        if state:
            assert row["before_top1"] == pytest.approx(
                top1(cut_to(found, state, found.ended[state - 1], state - 1), tiny)
            )
        if "uncut_top1" in row:
            assert row["uncut_top1"] == pytest.approx(top1(found.ended[state], tiny))


def cut_to(found: Searched, target: int, vit: nn.Module, body: int) -> nn.Module:
    """A trained model of state `body`, cut to what state `target` keeps."""
    if found.rules["vit_structured"]:
        return remove(vit, found.plan(target).within(found.body(body)))
    return masked(vit, found.mask(target))


@pytest.mark.parametrize("case", CASES)
def test_every_state_begins_with_what_it_should(searched, case):
    """Rewound to the initial weights or those of an epoch, or trained on; whole for RSST, small for Refill."""
    found = searched(case)
    per_epoch = 24 // 8
    for state in found.states:
        rewind, began = found.rules["rewind"] if state else "lt", found.began[state]
        if rewind == "finetune":
            expected = remove(found.ended[state - 1], found.body(state).within(found.body(state - 1)))
        elif rewind == "rewind_lt":
            source = models.load(found.run.part("state00").dir / "rewind.safetensors")
            expected = remove(source, found.body(state))
        else:
            expected = remove(found.untouched, found.body(state))
        if not found.rules["vit_structured"] and found.removes:
            expected = masked(expected, found.mask(state))
        assert found.recipes[state].keep == "last" and found.recipes[state].seed == state
        assert same(began, expected) and all(module.training for module in began.modules())
    if found.rules["rewind"] == "rewind_lt":
        at, seen = found.rules["rewind_epoch"] * per_epoch, []
        alone = copy.deepcopy(found.untouched).train()
        part = runs.Part("alone", found.run.dir / "alone")
        one = replace(recipe(found.run), seed=0, keep="last")
        train.fit(alone, found.start.images, one, run=part, on_step=lambda vit, _: seen.append(copy.deepcopy(vit)))
        shutil.rmtree(part.dir)
        assert same(seen[at - 1], source) and same(alone, found.ended[0])


def kept_away(found: Searched, state: int) -> float:
    """The share of weights that was gone before a state began."""
    body = units.outside(found.untouched, found.body(state))
    own = matrices(found.untouched)
    return sum(body[name].sum().item() for name in own) / sum(weight.numel() for weight in own.values())


@pytest.mark.parametrize("case", CASES)
def test_lambda_grows_over_a_whole_state_and_the_norm_ratio_is_the_real_one(searched, case):
    found = searched(case)
    regularised = found.rules["reg_granularity_prune"] > 0 or not found.removes
    logged = [json.loads(line) for line in (found.run.dir / "metrics.jsonl").read_text().splitlines()]
    epochs = found.rules["epochs"]
    assert [(row["state"], row["epoch"]) for row in logged] == [(s, e + 1) for s in found.states for e in range(epochs)]
    for state in found.states:
        row, growing = found.rows[state], found.hooks[state].get("on_gradient")
        if not state or not regularised:
            assert growing is None and "lambda" not in row and "norm_ratio" not in row
            assert all("norm_ratio" not in each for each in logged if each["state"] == state)
            continue
        ceiling, went = found.rules["reg_granularity_prune"], row["sparsity"] > kept_away(found, state)
        assert row["lambda"] == ceiling and growing.steps == 3 * epochs
        ended, body = found.ended[state], found.body(state)
        out = {name: ~mask for name, mask in found.mask(state).items()} if not found.rules["vit_structured"] else (
            units.outside(ended, found.plan(state).within(body)))  # fmt: skip
        assert out.keys() == growing.masks.keys() and all(torch.equal(out[name], growing.masks[name]) for name in out)
        own = matrices(ended)
        leaves, stays = (torch.cat([weight[out[name] ^ flip] for name, weight in own.items()
                          if out[name].any() or not went]).double().norm().item()
                         for flip in (False, True))  # fmt: skip
        assert row["norm_ratio"] == pytest.approx(leaves / stays, rel=1e-6) and (leaves > 0) == went
        rows = [each for each in logged if each["state"] == state]
        shape = lottery.SCHEDULES[found.rules["RST_schedule"]]
        expected = [ceiling * shape((3 * e + 2) / (3 * epochs - 1), found.rules["exponents"]) for e in range(epochs)]
        assert [each["lambda"] for each in rows] == pytest.approx(expected)
        assert rows[-1]["norm_ratio"] == pytest.approx(row["norm_ratio"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_histograms_hold_every_weight(searched, case):
    found = searched(case)
    for state in found.states:
        counts, own = found.rows[state]["weights"], matrices(found.ended[state])
        total, growing = sum(weight.numel() for weight in own.values()), found.hooks[state].get("on_gradient")
        leaving = sum(growing.masks[name].sum().item() for name in own) if growing else 0
        assert (sum(counts["stay"]), sum(counts["leave"])) == (total - leaving, leaving)
        assert len(counts["stay"]) == len(tickets.EDGES) - 1


# ---- what is selected -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STRUCTURED)
def test_units_are_selected_by_the_trained_weights(searched, case, tiny):
    """By criterion and cumulated density from what a state ended with, of those that were there."""
    found = searched(case)
    rules, total = found.rules, sum(weight.numel() for weight in matrices(found.untouched).values())
    for state in found.states[:-1]:
        ended, body, target = found.ended[state], found.body(state), found.plan(state)
        density, inner = (1 - rules["rate"]) ** (state + 1), target.within(body)
        if state == 0 or found.removes and not rules["reg_granularity_prune"]:
            assert inner == Plan().explicit(ended)
        sizes = torch.cat([weight.abs().flatten() for weight in matrices(ended).values()])
        gone = units.outside(ended, inner)
        sizes[torch.cat([gone[name].flatten() for name in matrices(ended)])] = -1
        smallest = sizes.sort(descending=True).values[min(round(density * total), int((sizes >= 0).sum())) - 1]
        mask = {name: (weight.abs() >= smallest) & ~gone[name] for name, weight in matrices(ended).items()}
        x = torch.from_numpy(tiny.val.images).permute(0, 3, 1, 2) / 255
        batches = [(augment.normalise(x, tiny.mean, tiny.std), torch.from_numpy(tiny.val.labels))]
        scores = lottery.importance(ended, rules["criteria"], batches, mask=mask, seed=state)
        wide = {}
        for kind, name in (("head", "heads"), ("neuron", "neurons")):
            whole, there, stays = (getattr(plan, name) for plan in (Plan().explicit(found.untouched), body, target))
            wide[kind] = table([[-math.inf] * len(row) for row in whole])
            for block, row in enumerate(there):
                for place, unit in enumerate(row):
                    if unit in stays[block]:
                        wide[kind][block, unit] = scores[kind][block, place]
        chosen = lottery.regroup(wide, density, found.kinds, rules["sorting_mode"], rules["at_least"])
        chosen = lottery.refill(wide, chosen, rules["fillback_rate"])
        assert chosen.explicit(found.untouched) == found.plan(state + 1)


def test_a_state_draws_its_own_order_and_a_seed_its_own_states(tmp_path, tiny):
    """Equal states of one run are trained in another order; equal seeds repeat, others do not."""
    same_run = {"rewind": "lt", "rate": 0.01, "fillback_rate": 1.0, "pruning_times": 1}
    found = [search(tmp_path / str(seed), tiny, "refill", same_run | {"seed": seed}, initial("")) for seed in (0, 1)]
    ended = [each for one in found for each in one.ended]
    assert [sum(map(len, one.plan(1).heads)) for one in found] == [8, 8], "refilled: every state trains the whole"
    assert not any(same(ended[i], ended[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("criteria", ["l2", "saliency"])
def test_the_test_images_decide_nothing(tmp_path, tiny, criteria):
    values = {"criteria": criteria, "prune_target": "both", "pruning_times": 1}
    swapped = replace(tiny, test=tiny.test.take(np.array([4, 4, 7])))
    first, second = (search(tmp_path / str(i), data, "refill", values) for i, data in enumerate((tiny, swapped)))
    assert first.plan(1) == second.plan(1) and second.rows[0]["n"] == 3
    assert all(same(a, b) for a, b in zip(first.ended, second.ended, strict=True))
    other = replace(tiny, val=tiny.val.take(np.array([0, 3, 6])))  # but the validation images do
    assert search(tmp_path / "val", other, "refill", values).plan(1) != first.plan(1)


# ---- single weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WEIGHTS)
def test_single_weights_are_exactly_zero_and_save_nothing(searched, case):
    found = searched(case)
    total = sum(weight.numel() for weight in matrices(found.untouched).values())
    for state in found.states:
        row, mask, saved = found.rows[state], found.mask(state), matrices(tickets.model(found.run, state))
        zeros = sum((weight == 0).sum().item() for weight in saved.values())
        assert zeros == total - round((1 - found.rules["rate"]) ** state * total)
        assert row["sparsity"] == pytest.approx(zeros / total, abs=1e-12)
        assert all(torch.equal(weight == 0, ~mask[name]) for name, weight in saved.items())
        for name in ("macs_g", "params_m", "heads_kept", "neurons_kept"):
            assert row[name] == found.rows[0][name], "as large as before"
        if state:
            before = found.mask(state - 1)
            assert all((before[name] | ~kept).all() for name, kept in mask.items()), "none comes back"
            trained = matrices(found.ended[state - 1])
            kept, gone = (torch.cat([trained[name][before[name] & (mask[name] ^ flip)].abs() for name in mask])
                          for flip in (False, True))  # fmt: skip
            assert kept.min() >= gone.max(), "the smallest of the trained weights went"


@pytest.mark.parametrize("case", [case for case in WEIGHTS if case.startswith("refill")])
def test_a_weight_that_went_is_zero_after_every_step(searched, tiny, case):
    found = searched(case)
    state = found.states[-1]
    mask, vit, seen = found.mask(state), copy.deepcopy(found.began[state]), []
    step_of = found.hooks[state]["on_step"]

    def on_step(vit: nn.Module, step: int) -> None:
        step_of(vit, step)
        seen.append(all((weight[~mask[name]] == 0).all() for name, weight in matrices(vit).items()))

    one = replace(recipe(found.run), seed=state, keep="last")
    train.fit(vit, tiny, one, run=runs.Part("alone", found.run.dir / "alone"), on_step=on_step)
    shutil.rmtree(found.run.dir / "alone")
    assert seen == [True] * 6 and same(vit, found.ended[state])


# ---- RSST drives out ------------------------------------------------------------------------------------------------


def warned(caught: list) -> list[str]:
    return [str(each.message) for each in caught if "what is cut still has" in str(each.message)]


@pytest.mark.parametrize("notebook, values", [
    ("rsst", {}),
    ("rsst", {"prune_target": "both", "remove_each_state": True, "rewind": "finetune"}),
    ("rsst", {"vit_structured": False}),
    ("refill", {"prune_target": "mlp", "RST_schedule": "x^2"}),
])  # fmt: skip
def test_a_strong_lambda_drives_out_and_cutting_is_harmless(tmp_path, tiny, notebook, values):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search(tmp_path, tiny, notebook, STRONG | values)
    row = found.rows[1]
    assert row["norm_ratio"] < 1e-3 and not warned(caught)
    assert row["sparsity"] > 0.05 and row["uncut_top1"] == row["top1"]
    whole, small = logits(found.ended[1], tiny.test, tiny), logits(tickets.model(found.run, 1), tiny.test, tiny)
    assert (whole - small).abs().max() < 1e-3 * whole.abs().max()
    assert whole.std() > 0.1, "the model says something"
    assert sum(row["weights"]["leave"]) > 0


@pytest.mark.parametrize("case", ["rsst", "rsst, λ 0", "rsst, weights", "refill, driven out"])
def test_a_weak_lambda_is_said(tmp_path, tiny, case):
    notebook, values = CASES[case]
    weak = {"reg_granularity_prune": min(0.1, values.get("reg_granularity_prune", 0.1)), "pruning_times": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search(tmp_path, tiny, notebook, values | weak)
    [said] = warned(caught)
    assert found.rows[1]["norm_ratio"] > 0.1 and "raise reg_granularity_prune" in said and "\n" not in said
    assert said.startswith(
        f"state 1: what is cut still has {found.rows[1]['norm_ratio']:.1e} of the norm of what stays"
    )


def test_what_the_rate_means_for_this_model_is_said(tmp_path, tiny, capsys):
    search(tmp_path, tiny, "refill", {"prune_target": "both"})
    assert "density by state: 1, 0.7, 0.49; heads: 8, 4, 2; neurons: 48, 32, 22\n" in capsys.readouterr().out
    search(tmp_path, tiny, "rsst", {"vit_structured": False, "pruning_times": 1})
    assert "density by state: 1, 0.7\n" in capsys.readouterr().out


def test_states_that_remove_nothing_are_warned_of(tmp_path, tiny):
    run = opened(tmp_path, "refill", {"rate": 0.2, "pruning_times": 3})  # of 4 heads in a block 3, 2, 2
    made = tickets._Tickets(run, starts.Start("", initial("vit_digits"), tiny, {}), recipe(run), True)
    with pytest.warns(UserWarning, match=r"^states 3 remove nothing at a rate of 0\.2: try sorting_mode global"):
        assert made.forecast().endswith("heads: 8, 6, 4, 4")
    run.params["sorting_mode"] = "global"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.forecast().endswith("heads: 8, 6, 5, 4")
    run.close()


# ---- stopped and started again --------------------------------------------------------------------------------------


class Stop(Exception):
    """A crash."""


def crash(patch: pytest.MonkeyPatch, moment: str, state: int) -> None:
    """Let a search fail at a moment of a state."""
    at = f"state{state:02d}"

    def failing(owner: Any, name: str, when: Any, after: bool = False) -> None:
        old = getattr(owner, name)

        def crashing(*arguments: Any, **options: Any) -> Any:
            result = old(*arguments, **options) if after else None
            if when(*arguments):
                raise Stop
            return result if after else old(*arguments, **options)

        patch.setattr(owner, name, crashing)

    if moment in ("training", "an epoch's end"):
        failing(train._Fitting, "step", lambda self, batch, *_: self.run.dir.name == at and (
            (self.epoch, batch) == ((self.recipe.epochs - 1, 1) if moment == "training" else (1, 0))))  # fmt: skip
    elif moment == "measuring":
        failing(tickets._Tickets, "_measure", lambda self, number, *_: number == state)
    elif moment == "saving":
        failing(models, "save", lambda _, path, **__: Path(path).parent.name == at and Path(path).name == "model")
    elif moment == "selecting":
        failing(tickets._Tickets, "_select", lambda self, number, *_: number == state)
    elif moment == "selected":
        failing(tickets._Tickets, "_select", lambda self, number, *_: number == state, after=True)
    elif moment == "writing":
        failing(runs, "write_json", lambda path, _: path.name == "state.json" and path.parent.name == at)
    elif moment == "written":
        failing(runs, "write_json", lambda path, _: path.name == "state.json" and path.parent.name == at, after=True)


def on_disk(found: Searched) -> dict[str, bytes]:
    """All models and selections of a search."""
    folder = found.run.dir / "parts"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def logged(found: Searched) -> list[dict]:
    return plain([json.loads(line) for line in (found.run.dir / "metrics.jsonl").read_text().splitlines()])


MOMENTS = {
    "refill": [("selecting", 1), ("writing", 2)],
    "refill, trained on": [("an epoch's end", 2), ("saving", 1)],
    "refill, from an epoch": [("training", 0), ("an epoch's end", 0), ("measuring", 0)],
    "refill, driven out": [("training", 2), ("written", 1)],
    "refill, driven out, trained on": [("selected", 1)],
    "refill, all together": [("writing", 1)],
    "refill, weights": [("training", 1), ("selected", 1), ("writing", 0)],
    "refill, weights, trained on": [("training", 2)],
    "rsst": [("training", 1), ("an epoch's end", 2), ("writing", 0)],
    "rsst, stays away": [("measuring", 2)],
    "rsst, trained on": [("training", 2), ("writing", 1)],
    "rsst, weights": [("training", 1)],
    "refill, ResNet": [("selecting", 0)],
}


@pytest.mark.parametrize("case, moment, state", [(case, *each) for case, some in MOMENTS.items() for each in some])
def test_a_search_stopped_at_any_moment_ends_in_the_same(tmp_path, tiny, searched, monkeypatch, case, moment, state):
    notebook, values = CASES[case]
    with monkeypatch.context() as patch:
        crash(patch, moment, state)
        with pytest.raises(Stop):
            search(tmp_path, tiny, notebook, values)
    done = sorted(path.parent.name for path in tmp_path.rglob("state.json"))
    assert len(done) == state + (moment == "written")
    torch.manual_seed(123)
    again, whole = search(tmp_path, tiny, notebook, values), searched(case)
    assert len(again.began) == whole.states.stop - len(done), "what is done is not done again"
    assert again.rows == whole.rows and logged(again) == logged(whole)
    assert on_disk(again) == on_disk(whole) and len(on_disk(whole)) >= whole.states.stop
    assert json.loads(json.dumps(again.rows)) == again.rows


def test_a_finished_search_returns_its_rows_at_once(tmp_path, tiny):
    first = search(tmp_path, tiny, "rsst", {"pruning_times": 1})
    again = search(tmp_path, tiny, "rsst", {"pruning_times": 1})
    assert not again.began and again.rows == json.loads(json.dumps(first.rows)) == first.rows
    assert not any((first.run.part(f"state{state:02d}").dir / "last").exists() for state in first.states)


def test_a_search_that_may_not_resume_starts_anew(tmp_path, tiny):
    search(tmp_path, tiny, "refill", {"pruning_times": 1})
    again = search(tmp_path, tiny, "refill", {"pruning_times": 1, "resume": False})
    assert len(again.began) == 2


def test_other_initial_weights_are_refused(tmp_path, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        crash(patch, "training", 1)
        with pytest.raises(Stop):
            search(tmp_path, tiny, "refill", {})
    other = initial("")
    other.blocks[0].mlp.fc1.bias.data[0] += 1e-6
    with pytest.raises(runs.RunError, match="the initial weights are not those that this run began with") as caught:
        search(tmp_path, tiny, "refill", {}, other)
    assert "\n" not in str(caught.value)


def test_initial_weights_that_train_along_are_noticed(tmp_path, tiny, monkeypatch):
    """Were they aliased, the state would not end."""
    monkeypatch.setattr(tickets, "remove", lambda vit, plan: vit)
    with pytest.raises(runs.RunError, match="the initial weights are not those that this run began with"):
        search(tmp_path, tiny, "refill", {})


def test_a_stopped_search_does_not_go_on_with_other_parameters(tmp_path, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        crash(patch, "training", 1)
        with pytest.raises(Stop):
            search(tmp_path, tiny, "refill", {"rate": 0.3})
    with pytest.raises(runs.RunError, match="rate was 0.3, is 0.6"):
        search(tmp_path, tiny, "refill", {"rate": 0.6})


# ---- refused --------------------------------------------------------------------------------------------------------

SINGLE = {"vit_structured": False}


@pytest.mark.parametrize("notebook, values, fault", [
    ("refill", SINGLE | {"criteria": "l1"}, "criteria is 'l1', but single weights go, by magnitude"),
    ("refill", SINGLE | {"prune_target": "both"}, "prune_target is 'both', but single weights go"),
    ("rsst", SINGLE | {"sorting_mode": "global"}, "sorting_mode is 'global', but single weights go"),
    ("rsst", SINGLE | {"at_least": 0}, "at_least is 0, but single weights go"),
    ("refill", SINGLE | {"fillback_rate": 0.5}, "fillback_rate is 0.5, but single weights go"),
    ("refill", {"RST_schedule": "exp"}, "RST_schedule is 'exp', but reg_granularity_prune is 0: nothing is regul"),
    ("refill", {"exponents": 2.0}, "exponents is 2.0, but reg_granularity_prune is 0"),
    ("rsst", {"reg_granularity_prune": 0.0, "RST_schedule": "x^2"}, "RST_schedule is 'x^2', but reg_granularity_prune"),
    ("rsst", {"exponents": 2.0}, "exponents is 2.0, but RST_schedule is 'x', which has no exponent"),
    ("rsst", {"exponents": 2.0, "RST_schedule": "exp"}, "RST_schedule is 'exp', which has no exponent"),
    ("rsst", {"analysis_batches": 9}, "analysis_batches is 9, but criteria 'remain' looks at no images"),
    ("rsst", {"rewind_epoch": 1}, "rewind_epoch is 1, but rewind is 'lt'"),
    ("rsst", {"rewind_epoch": 1, "rewind": "finetune"}, "rewind_epoch is 1, but rewind is 'finetune'"),
    ("refill", {"rewind": "rewind_lt"}, "rewind_epoch is 0: expected an epoch of state 0, from 1 to 2"),
    ("refill", {"rewind": "rewind_lt", "rewind_epoch": 3}, "rewind_epoch is 3: expected an epoch of state 0"),
    ("rsst", {"optimizer": "adamw"}, "optimizer is 'adamw': expected sgd or momentum, which take λ·w as it is added"),
    ("refill", {"arch": "res20s", "prune_target": "mlp", "at_least": 0}, "at_least is 0: expected at least one hidden"),
    ("rsst", {"prune_target": "both", "at_least": 0, "rate": 0.97}, "rate is 0.97: after 2 states nothing would be"),
    ("refill", {"arch": "res20s"}, "prune_target is 'head', but this model has no heads to remove: expected mlp"),
    ("rsst", {"arch": "res20s", "prune_target": "both"}, "prune_target is 'both', but this model has no heads"),
])  # fmt: skip
def test_parameters_that_would_do_nothing_are_one_clear_line(tmp_path, tiny, notebook, values, fault):
    run = opened(tmp_path, notebook, values)
    start = starts.Start("", initial(run.params["arch"]), tiny, {})
    with pytest.raises(params.ParameterError) as caught:
        tickets.search(run, start, recipe(run), remove_each_state=True)
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    with FileLock(run.dir / "lock").acquire(timeout=0):
        assert not (run.dir / "parts").exists(), "nothing was trained, and another process may take the run"


@pytest.mark.parametrize("values", [{"RST_schedule": "exp_custom", "exponents": 2.0}, SINGLE | {"criteria": "remain"},
                                    {"rewind": "rewind_lt", "rewind_epoch": 2},
                                    {"criteria": "l1", "analysis_batches": 9}])  # fmt: skip
def test_parameters_that_do_something_are_not_refused(tmp_path, values):
    run = opened(tmp_path, "rsst", values)
    tickets._check(run)
    run.close()


def test_single_weights_that_were_driven_out_stay_away(tmp_path, tiny):
    found = search(tmp_path, tiny, "rsst", SINGLE | {"remove_each_state": True})
    gone = {name: ~mask for name, mask in found.mask(1).items()}
    assert all((weight[gone[name]] == 0).all() for name, weight in matrices(found.began[2]).items())


# ---- at the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["rsst, stays away", "refill, weights"])
def test_the_result_is_that_of_the_last_state(searched, tiny, case):
    found = searched(case)
    result = ends.states(found.run, found.start, found.rows, latency_batch=2)
    last = found.rows[-1]
    assert all(result[name] == last[name] for name in ("state", "density", "sparsity", "heads_kept", "macs_g", "top1"))
    assert [{k: v for k, v in row.items() if k != "speedup"} for row in result["states"]] == found.rows
    assert all(row["speedup"] > 0 for row in result["states"]) and same(found.start.vit, found.untouched)
    assert same(models.load(found.run.dir), tickets.model(found.run, last["state"]))
    with np.load(found.run.dir / "test.npz") as arrays:
        assert (arrays["logits"].argmax(1) == arrays["labels"]).mean() == pytest.approx(result["top1"])
    shown = ends.state_table(result)
    assert shown["weights gone"].astype(float).tolist() == pytest.approx(
        [row["sparsity"] for row in found.rows], abs=1e-4
    )
    assert ("norm ratio" in shown) == ("rsst" in case) and len(shown) == len(found.rows)
