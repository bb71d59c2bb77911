"""Lottery pruning: what units own, how much they matter, which stay, and how the others are driven out."""

import lib  # noqa: F401  # isort: skip
import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import images, make
from test_resnet import photos, resnet, uneven
from test_surgery import EVEN, MODELS, built
from test_train import on_cpu, weights  # noqa: F401
from torch import Tensor, nn

from lib import blocks
from lib.pruners import lottery, units
from lib.pruners.lottery import SCHEDULES, Growing, regroup
from lib.pruners.surgery import Plan, remove
from lib.resnet import Residual
from lib.train import Recipe, fit

CLOSE = {"rtol": 0, "atol": 1e-12}
SAME = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
ALL, HEADS, NEURONS = None, 3, 192
PLANS = {
    "heads": Plan(heads=[[0, 2], ALL, [1]]),
    "neurons": Plan(neurons=[EVEN, [191], ALL]),
    "both": Plan(heads=[[1], [0, 2], ALL], neurons=[[3, 5, 90], ALL, EVEN]),
    "no heads": Plan(heads=[[], [1, 2], []]),
    "no neurons": Plan(neurons=[[3], [], []]),
    "all but the embedding": Plan(heads=[[]] * 3, neurons=[[]] * 3),
}
SOME = ["heads", "neurons", "both"]  # which leave something of every sublayer
CASES = ["vit", "layerscale", "registers", "qk norm", "attention pooling", "gated attention", "no biases", "pruned",
         "resnet"]  # fmt: skip


def model(case: str) -> nn.Module:
    """A family's model, one with another number of heads and neurons in each block, or a ResNet-20."""
    if case == "pruned":
        return remove(make("vit"), Plan(heads=[[0, 2], ALL, []], neurons=[EVEN, [], [4, 8, 90]]))
    return resnet(7) if case == "resnet" else built(case)


def shown(vit: nn.Module, batch: int = 5) -> Tensor:
    return photos(batch) if hasattr(vit, "stem") else images(vit, batch)


def labelled(vit: nn.Module, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of these sizes."""
    x = shown(vit, sum(sizes))
    labels = torch.arange(len(x)) % vit(x[:1]).shape[1]
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def slices(vit: nn.Module) -> Iterator[tuple[str, int, int, list[tuple[str, tuple]]]]:
    """Every unit with what it owns of which parameter, index by index: kind, block, unit, [(name, index), …]."""
    every = slice(None)
    for index, block in enumerate(vit.blocks):
        where = f"blocks.{index}"
        if isinstance(block, Residual):
            for unit in range(len(block.conv1.weight)):
                own = [(f"{where}.{name}", (unit,)) for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
                yield "neuron", index, unit, [*own, (f"{where}.conv2.weight", (every, unit))]
            continue
        for head in range(block.attn.num_heads):
            d = block.attn.head_dim
            rows = [d * (part * block.attn.num_heads + head) + i for part in range(3) for i in range(d)]
            own = [(f"{where}.attn.qkv.weight", (rows,)), (f"{where}.attn.qkv.bias", (rows,))]
            own += [(f"{where}.attn.gate.{name}", (rows[:d],)) for name in ("weight", "bias")]
            yield "head", index, head, [*own, (f"{where}.attn.proj.weight", (every, rows[:d]))]
        for unit in range(0 if isinstance(block.mlp, blocks.Bias) else len(block.mlp.fc1.weight)):
            own = [(f"{where}.mlp.fc1.weight", (unit,)), (f"{where}.mlp.fc1.bias", (unit,))]
            yield "neuron", index, unit, [*own, (f"{where}.mlp.fc2.weight", (every, unit))]


def summed(vit: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over units by loops."""
    found = {"head": [[] for _ in vit.blocks], "neuron": [[] for _ in vit.blocks]}
    for kind, index, _, own in slices(vit):
        found[kind][index].append(sum(values[name][where].sum().item() for name, where in own if name in values))
    return {kind: table(rows) for kind, rows in found.items()}


def averaged(vit: nn.Module, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a ResNet's channels means over their weights: its blocks are not of one size."""
    if not hasattr(vit, "stem"):
        return sums
    counts = summed(vit, {name: torch.ones_like(weight) for name, weight in matrices(vit).items()})
    return {kind: sums[kind] / counts[kind] for kind in sums}


def table(rows: list) -> Tensor:
    """Rows of unequal length in float64, filled up with NaN."""
    whole = torch.full((len(rows), max(map(len, rows))), math.nan, dtype=torch.float64)
    for line, row in zip(whole, rows, strict=True):
        line[: len(row)] = torch.as_tensor(row, dtype=torch.float64)
    return whole


def matrices(vit: nn.Module) -> dict[str, Tensor]:
    """What may be pruned, by names."""
    ends = (
        "qkv.weight",
        "gate.weight",
        "attn.proj.weight",
        "fc1.weight",
        "mlp.fc2.weight",
        "conv1.weight",
        "conv2.weight",
    )
    return {
        name: p.detach() for name, p in vit.named_parameters() if name.startswith("blocks.") and name.endswith(ends)
    }


def assert_tables(found: dict[str, Tensor], expected: dict[str, Tensor], **close) -> None:
    assert found.keys() == {"head", "neuron"}
    for kind, each in expected.items():
        assert found[kind].dtype == torch.float64 and not found[kind].requires_grad
        torch.testing.assert_close(found[kind], each, **(SAME | close))


def random_like(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in tensors.items()}


# ---- units ----------------------------------------------------------------------------------------------------------


def without(vit: nn.Module, plan: Plan) -> nn.Module:
    """The same in full size with zeros for all that the units own which go."""
    vit, masks = copy.deepcopy(vit), units.outside(vit, plan)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name in masks:
                parameter[masks[name]] = 0
    return vit


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", MODELS)
def test_units_that_are_zero_are_units_that_are_removed(case, plan):
    vit, plan = model(case), PLANS[plan]
    x, expected = images(vit), remove(vit, plan)(images(vit))
    torch.testing.assert_close(without(vit, plan)(x), expected, **CLOSE)
    assert (vit(x) - expected).abs().max() > 1e-4, "what went mattered"


@pytest.mark.parametrize("seed", range(3))
def test_channels_that_are_zero_are_channels_that_are_removed(seed):
    vit, plan, x = resnet(), uneven(seed), photos()
    torch.testing.assert_close(without(vit, plan)(x), remove(vit, plan)(x), **CLOSE)


def test_a_pruned_model_can_lose_more():
    vit = model("pruned")
    plan, x = Plan(heads=[[1], [0, 2], []], neurons=[[0, 5], [], [1]]), images(vit)
    torch.testing.assert_close(without(vit, plan)(x), remove(vit, plan)(x), **CLOSE)
    assert not any("blocks.2.attn" in name or "blocks.1.mlp" in name for name in units.outside(vit, plan))


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("case", MODELS)
def test_what_a_unit_owns_is_what_surgery_removes(case, plan):
    """Element by element: what is not masked is, in its order, the smaller model's parameter."""
    vit, plan = model(case), PLANS[plan]
    assert_left(vit, remove(vit, plan), units.outside(vit, plan))


def test_what_a_channel_owns_is_what_surgery_removes():
    vit, plan = resnet(), uneven()
    assert_left(vit, remove(vit, plan), units.outside(vit, plan))


def assert_left(vit: nn.Module, small: nn.Module, masks: dict[str, Tensor]) -> None:
    whole, left = dict(vit.named_parameters()), dict(small.named_parameters())
    assert whole.keys() == left.keys() and masks.keys() < whole.keys()
    for name, parameter in whole.items():
        mask = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        assert mask.dtype == torch.bool and mask.shape == parameter.shape
        assert torch.equal(parameter[~mask], left[name].flatten()), name
    gone = sum(mask.sum().item() for mask in masks.values())
    assert 0 < gone == sum(p.numel() for p in whole.values()) - sum(p.numel() for p in left.values())


@pytest.mark.parametrize("case", ["vit", "no biases", "pruned", "resnet"])
def test_the_mask_of_a_unit_is_the_unit(case):
    """One at a time, against loops over rows and columns."""
    vit, parameters = model(case), dict(model(case).named_parameters())
    whole, seen = Plan().explicit(vit), [*units.outside(vit, Plan())]
    few = [one for one in slices(vit) if one[0] == "head" or one[2] % 29 == 0]
    for kind, index, unit, own in few:
        kept = [list(row) for row in (whole.heads if kind == "head" else whole.neurons)]
        kept[index].remove(unit)
        masks = units.outside(vit, Plan(heads=kept) if kind == "head" else Plan(neurons=kept))
        expected = {name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in seen}
        for name, where in own:
            if name in parameters:
                expected[name][where] = True
        assert masks.keys() == expected.keys()
        assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert {kind for kind, *_ in few} == ({"neuron"} if case == "resnet" else {"head", "neuron"})


def test_a_mask_of_heads_takes_a_multiple_of_one_head():
    vit = make("vit", num_heads=4)
    plan = Plan(heads=[[0], [1, 2, 3], ALL])
    for name, mask in units.outside(vit, plan).items():
        gone = {"0": 3, "1": 1, "2": 0}[name.split(".")[1]] if ".attn." in name else 0
        assert mask.sum().item() * 4 == gone * mask.numel()
    assert not any(mask.any() for mask in units.outside(vit, Plan()).values()), "all stays: nothing is outside"


@pytest.mark.parametrize("case", CASES)
def test_sums_over_units_are_those_of_loops(case):
    vit = model(case)
    for some in (matrices(vit), {}):
        values = random_like(some)
        assert_tables(units.per_unit(vit, values), summed(vit, values))


@pytest.mark.parametrize("case", ["vit", "pruned", "resnet"])
def test_biases_have_sums_over_units_too(case):
    vit = model(case)
    values = random_like(dict(vit.named_parameters()))
    assert_tables(units.per_unit(vit, values), summed(vit, values))


@pytest.mark.parametrize("case", CASES)
def test_sums_over_units_add_up_to_the_matrices(case):
    vit = model(case)
    values = random_like(units.prunable(vit))
    found = units.per_unit(vit, values)
    for kind, names in {"head": (".attn.",), "neuron": (".mlp.", ".conv")}.items():
        for index, row in enumerate(found[kind]):
            own = [v for name, v in values.items()
                   if name.startswith(f"blocks.{index}.") and any(each in name for each in names)]  # fmt: skip
            assert row.nansum().item() == pytest.approx(sum(v.sum().item() for v in own), abs=1e-9)
            assert row.isnan().all() == (not own)


@pytest.mark.parametrize("case", CASES)
def test_what_is_pruned_are_the_matrices_of_units(case):
    vit = model(case)
    found, expected = units.prunable(vit), matrices(vit)
    assert [*found] == [*expected] and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- the element mask -----------------------------------------------------------------------------------------------


def flat(masks: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([mask.flatten() for mask in masks.values()]).numpy()


@pytest.mark.parametrize("case, rate", [("vit", 0.1), ("vit", 1 / 3), ("vit", 0.9), ("resnet", 0.5)])
def test_the_element_mask_follows_its_law_over_many_states(case, rate):
    """round((1 − rate)^(s+1) N), each within the one before, and of those the largest, though weights train."""
    vit = model(case)
    total, kept = sum(weight.numel() for weight in units.prunable(vit).values()), None
    generator = torch.Generator().manual_seed(3)
    for state in range(12):
        with torch.no_grad():
            for weight in vit.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        found = units.element_mask(vit, (1 - rate) ** (state + 1), among=kept)
        assert [*found] == [*matrices(vit)] and {mask.dtype for mask in found.values()} == {torch.bool}
        assert all(mask.shape == matrices(vit)[name].shape for name, mask in found.items())
        count = round((1 - rate) ** (state + 1) * total)
        before = np.ones(total, bool) if kept is None else flat(kept)
        sizes = flat({name: weight.abs() for name, weight in matrices(vit).items()})
        order = np.argsort(-sizes, kind="stable")
        order = order[before[order]][:count]
        assert flat(found).nonzero()[0].tolist() == sorted(order.tolist()) and len(order) == count
        kept = found


def test_without_among_all_weights_are_ranked_anew():
    vit = make("vit")
    first = units.element_mask(vit, 0.5)
    with torch.no_grad():
        for weight in units.prunable(vit).values():
            weight.copy_(1 / weight)
    assert not (flat(units.element_mask(vit, 0.5)) & flat(first)).any()


def test_equal_weights_fall_to_the_earlier():
    vit = make("vit")
    with torch.no_grad():
        for weight in units.prunable(vit).values():
            weight.fill_(-2.0)
    found = flat(units.element_mask(vit, 0.3))
    assert found[: found.sum()].all() and found.sum() == round(0.3 * len(found))
    everything = units.element_mask(vit, 1)
    assert flat(everything).all()


def test_a_density_counts_in_what_the_whole_model_has():
    vit = make("vit")
    total = len(flat(matrices(vit)))
    small = remove(vit, PLANS["both"])
    left = len(flat(matrices(small)))
    assert 0.2 * total < left < 0.8 * total
    assert flat(units.element_mask(small, 0.2, total=total)).sum() == round(0.2 * total)
    assert flat(units.element_mask(small, 0.2)).sum() == round(0.2 * left)
    assert flat(units.element_mask(small, 0.8, total=total)).all(), "there are no more"
    stays = {name: ~mask for name, mask in units.outside(vit, PLANS["both"]).items()}
    found = units.element_mask(vit, 0.8, among=stays)
    assert flat(found).sum() == left and all((stays[name] == mask).all() for name, mask in found.items())


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan])
def test_what_is_no_density_is_refused(density):
    scores = {"head": torch.rand(2, 3), "neuron": torch.rand(2, 3)}
    for refused in (lambda: units.element_mask(make("vit"), density), lambda: regroup(scores, density)):
        with pytest.raises(ValueError, match=r"density is .*: expected a share in \(0, 1\]"):
            refused()


# ---- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_magnitude_is_the_sum_of_sizes(case):
    vit = model(case)
    sizes = {name: weight.abs() for name, weight in matrices(vit).items()}
    assert_tables(lottery.importance(vit, "magnitude"), averaged(vit, summed(vit, sizes)))


@pytest.mark.parametrize("case", CASES)
def test_remain_counts_what_survives(case):
    vit = model(case)
    mask = units.element_mask(vit, 0.3)
    found = lottery.importance(vit, "remain", mask=mask)
    assert_tables(found, averaged(vit, summed(vit, mask)), rtol=0, atol=0)
    assert len(found["neuron"].unique()) > 5


@torch.no_grad()
def handed_on(vit: nn.Module, x: Tensor) -> dict[str, list[list[Tensor]]]:
    """What every unit hands on, (B, …) each, from a forward pass of our own."""
    found = {"head": [], "neuron": []}

    def look(block: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        x = inputs[0]
        if isinstance(block, Residual):
            inner = block.bn1(block.conv1(x)).relu()
            found["head"].append([])
            found["neuron"].append([*inner.movedim(1, 0)])
            return
        attn, heads = block.attn, []
        fed, y = block.norm1(x), attn(block.norm1(x))
        for head in range(attn.num_heads):
            own = [slice(d := attn.head_dim * (part * attn.num_heads + head), d + attn.head_dim) for part in range(3)]
            q, k, v = (F.linear(fed, attn.qkv.weight[rows], None if attn.qkv.bias is None else attn.qkv.bias[rows])
                       for rows in own)  # fmt: skip
            q, k = attn.q_norm(q), attn.k_norm(k)
            out = (q @ k.mT / math.sqrt(attn.head_dim)).softmax(-1) @ v
            if getattr(attn, "gate", None) is not None:
                out = out * attn.gate(fed)[..., own[0]].sigmoid()
            heads.append(out)
        found["head"].append(heads)
        x = x + block.ls1(y)
        hidden = (
            [] if isinstance(block.mlp, blocks.Bias) else block.mlp.act(block.mlp.fc1(block.norm2(x))).movedim(2, 0)
        )
        found["neuron"].append([*hidden])

    hooks = [block.register_forward_hook(look) for block in vit.blocks]
    vit(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("case", CASES)
def test_l1_and_l2_are_norms_of_what_units_hand_on(case):
    vit = model(case)
    batches = labelled(vit, 2, 2, 1)
    handed = handed_on(vit, torch.cat([x for x, _ in batches]))
    norms = {"l1": lambda t: t.abs().flatten(1).sum(1), "l2": lambda t: t.square().flatten(1).sum(1).sqrt()}
    if case == "resnet":  # means over pixels: the blocks' images are not of one size
        norms = {"l1": lambda t: t.abs().flatten(1).mean(1), "l2": lambda t: t.square().flatten(1).mean(1).sqrt()}
    for criteria, norm in norms.items():
        expected = {kind: table([[norm(unit).mean().item() for unit in row] for row in rows])
                    for kind, rows in handed.items()}  # fmt: skip
        assert_tables(lottery.importance(vit, criteria, iter(batches)), expected, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_saliency_is_weight_times_slope_of_all_batches_together(case):
    vit = model(case)
    batches, by_hand = labelled(vit, 2, 1, 4), copy.deepcopy(vit)
    F.cross_entropy(by_hand(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches])).backward()
    values = {name: (p * p.grad).abs().detach() for name, p in by_hand.named_parameters() if name in matrices(vit)}
    expected = averaged(vit, summed(vit, values))
    assert_tables(lottery.importance(vit, "saliency", iter(batches)), expected, rtol=1e-9)
    with torch.no_grad():
        assert_tables(lottery.importance(vit, "saliency", labelled(vit, 7)), expected, rtol=1e-9)
    assert not torch.allclose(expected["neuron"], summed(vit, {n: w.abs() for n, w in matrices(vit).items()})["neuron"])


@torch.no_grad()
@pytest.mark.parametrize("kind, block, unit", [("head", 1, 1), ("neuron", 0, 17)])
def test_saliency_by_finite_differences(kind, block, unit):
    """Weight after weight of one unit: |w · (L(w + ε) − L(w − ε)) / 2ε|."""
    vit = make("vit", depth=2, embed_dim=12, patch_size=32)
    batches, (x, labels), step = labelled(vit, 3, 2), labelled(vit, 5)[0], 1e-5
    [own] = [own for *where, own in slices(vit) if where == [kind, block, unit]]
    total = 0.0
    for name, where in own:
        if name not in matrices(vit):
            continue
        weight = matrices(vit)[name]
        line = weight.view(-1)
        for place in torch.arange(len(line)).view(weight.shape)[where].flatten():
            before, losses = line[place].item(), []
            for change in (step, -step):
                line[place] = before + change
                losses.append(F.cross_entropy(vit(x), labels).item())
            line[place] = before
            total += abs(before * (losses[0] - losses[1]) / (2 * step))
    found = lottery.importance(vit, "saliency", batches)[kind][block, unit].item()
    assert found == pytest.approx(total, rel=1e-6) and found > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_random_repeats_by_its_seed(case):
    vit = model(case)
    found, again, other = (lottery.importance(vit, "random", seed=seed) for seed in (5, 5, 6))
    assert_tables(again, found, rtol=0, atol=0)
    sizes = lottery.importance(vit, "magnitude")
    for kind, each in found.items():
        there = ~sizes[kind].isnan()
        assert torch.equal(~each.isnan(), there) and ((each[there] >= 0) & (each[there] < 1)).all()
        assert len(each[there].unique()) == there.sum()
        assert not there.any() or not torch.equal(each[there], other[kind][there])


@pytest.mark.parametrize("criteria", ["l1", "l2", "saliency"])
@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_looking_leaves_no_trace(case, criteria):
    """Clean even where the model is in training; flags, gradients, statistics, hooks and weights as they were."""
    vit = model(case) if case == "resnet" else make("vit", proj_drop_rate=0.5, drop_path_rate=0.5)
    batches = labelled(vit, 3, 2)
    expected = lottery.importance(vit, criteria, batches)
    vit.train()
    vit.blocks[0].requires_grad_(True)
    mark = torch.ones_like(vit.head.weight)
    vit.head.weight.grad = mark.clone()
    before = copy.deepcopy(vit.state_dict())
    assert_tables(lottery.importance(vit, criteria, batches), expected, rtol=0, atol=0)
    assert {module.training for module in vit.modules()} == {True}
    assert [name for name, p in vit.named_parameters() if p.grad is not None] == ["head.weight"]
    assert torch.equal(vit.head.weight.grad, mark)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize("criteria", ["l2", "saliency"])
def test_a_model_that_fails_is_left_as_it_was(criteria):
    vit = make("vit").train()
    with pytest.raises((AssertionError, RuntimeError)):
        lottery.importance(vit, criteria, [(torch.rand(2, 3, 9, 9).double(), torch.zeros(2, dtype=torch.int64))])
    assert vit.training and not any(module._forward_pre_hooks for module in vit.modules())


def test_every_module_gets_its_own_training_flag_back():
    vit = make("vit").train()
    vit.blocks[0].eval()
    lottery.importance(vit, "l1", labelled(vit, 2))
    assert not vit.blocks[0].training and vit.blocks[1].training


@pytest.mark.parametrize(
    "criteria, batches, fault",
    [
        ("l3", [], "criteria is 'l3': expected one of remain, magnitude, l1, l2, saliency, random"),
        ("remain", [], "criteria is 'remain': expected the element mask with it"),
        ("l1", [], "criteria is 'l1': expected batches of images with it"),
        ("l2", [], "criteria is 'l2': expected batches of images with it"),
        ("saliency", [(torch.zeros(0, 3, 64, 64), torch.zeros(0))], "criteria is 'saliency': expected batches"),
    ],
)
def test_what_a_criterion_needs_and_does_not_get_is_one_clear_line(criteria, batches, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        lottery.importance(make("vit"), criteria, batches)
    assert "\n" not in str(caught.value)


# ---- regroup --------------------------------------------------------------------------------------------------------


def by_sorting(scores: Tensor, density: float, mode: str, at_least: int) -> list[list[int]]:
    """Which units stay of each block, by sorted lists."""
    rows = [[(-score, block, unit) for unit, score in enumerate(row) if not math.isnan(score)]
            for block, row in enumerate(scores.tolist())]  # fmt: skip
    count = lambda number: math.floor(round(density * number, 9))  # noqa: E731
    if mode == "layer":
        best = [each for row in rows for each in sorted(row)[: max(at_least, count(len(row)))]]
    else:
        best = [each for row in rows for each in sorted(row)[:at_least]]
        others = sorted(each for row in rows for each in row if each not in best)
        best += others[: max(0, count(sum(map(len, rows))) - len(best))]
    return [sorted(unit for _, where, unit in best if where == block) for block in range(len(rows))]


def scored(seed: int) -> dict[str, Tensor]:
    """Random scores with many ties, rows of another length each, some of them removed and one row empty."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for kind, lengths in {"head": [4, 3, 0, 6], "neuron": [30, 7, 50, 1]}.items():
        rows = [torch.randint(0, 6, (length,), generator=generator).double() for length in lengths]
        for row in rows:
            row[torch.rand(len(row), generator=generator) < 0.2] = -math.inf
        found[kind] = table(rows)
    return found


@pytest.mark.parametrize("at_least", [0, 1, 2])
@pytest.mark.parametrize("mode", lottery.SORTING)
def test_the_best_units_stay(mode, at_least):
    for seed in range(6):
        scores = scored(seed)
        for density in (0.01, 0.2, 0.29, 0.5, 0.67, 0.9, 1.0):
            for parts in (["head"], ["neuron"], ["head", "neuron"]):
                found = regroup(scores, density, parts, mode, at_least)
                for kind, kept in (("head", found.heads), ("neuron", found.neurons)):
                    expected = by_sorting(scores[kind], density, mode, at_least) if kind in parts else None
                    assert kept == expected
                assert found.blocks is None and found.attn is None and found.mlp is None


def test_equal_scores_fall_to_the_earlier_unit():
    scores = {"head": torch.full((3, 40), 2.0)}
    assert regroup(scores, 0.5).heads == [[*range(20)]] * 3
    assert regroup(scores, 0.5, sorting_mode="global", at_least=0).heads == [[*range(40)], [*range(20)], []]
    assert regroup(scores, 0.5, sorting_mode="global").heads == [[*range(40)], [*range(19)], [0]]


def test_what_was_removed_stays_away_as_long_as_there_are_others():
    gone = -math.inf
    scores = {"head": table([[gone, -5.0, -9.0], [gone, gone, -1.0]])}
    assert regroup(scores, 0.34).heads == [[1], [2]]
    assert regroup(scores, 0.67).heads == [[1, 2], [0, 2]]
    assert regroup(scores, 0.5, sorting_mode="global", at_least=0).heads == [[1, 2], [2]]
    assert regroup(scores, 0.34, sorting_mode="global", at_least=0).heads == [[1], [2]]


@pytest.mark.parametrize("mode", lottery.SORTING)
def test_a_density_of_one_keeps_everything(mode):
    for case in ("vit", "pruned", "resnet"):
        vit = model(case)
        scores = lottery.importance(vit, "random")
        assert regroup(scores, 1, ("head", "neuron"), mode).explicit(vit) == Plan().explicit(vit)


@pytest.mark.parametrize("density, count, kept", [(0.29, 100, 29), (1 - 0.9, 10, 1), (0.7**2, 100, 49), (1 / 3, 3, 1),
                                                  (0.3333, 3, 1), (0.6666, 3, 1), (2 / 3, 3, 2)])  # fmt: skip
@pytest.mark.parametrize("mode", lottery.SORTING)
def test_shares_are_exact_in_floating_point(mode, density, count, kept):
    scores = {"head": torch.rand(1, count, dtype=torch.float64)}
    assert len(regroup(scores, density, sorting_mode=mode).heads[0]) == kept


@pytest.mark.parametrize("mode", lottery.SORTING)
@pytest.mark.parametrize("criteria", ["remain", "random"])
def test_densities_cumulate_and_plans_are_nested(mode, criteria):
    """Not one one-shot step repeated: state after state fewer, by the closed form, and none comes back."""
    vit = make("vit", num_heads=12)
    total, before, scores = 3 * 12, [{*range(12)}] * 3, None
    for state in range(8):
        density = 0.75 ** (state + 1)
        scores = lottery.importance(vit, criteria, mask=units.element_mask(vit, density), seed=state)["head"]
        for row, alive in zip(scores, before, strict=True):
            row[[unit for unit in range(12) if unit not in alive]] = -math.inf
        kept = regroup({"head": scores}, density, sorting_mode=mode).heads
        layer, whole = max(1, math.floor(12 * density)), max(3, math.floor(total * density))
        assert {*map(len, kept)} == {layer} if mode == "layer" else sum(map(len, kept)) == whole
        assert all({*now} <= alive for now, alive in zip(kept, before, strict=True))
        before = [{*now} for now in kept]


@pytest.mark.parametrize("mode", lottery.SORTING)
@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_pruned_twice_is_pruned_once(case, mode):
    vit = model(case)
    parts = ("neuron",) if case == "resnet" else ("head", "neuron")
    scores = lottery.importance(vit, "magnitude")
    once = regroup(scores, 0.5, parts, mode).explicit(vit)
    small = remove(vit, once)
    for kind, kept in (("head", once.heads), ("neuron", once.neurons)):
        for row, alive in zip(scores[kind], kept, strict=True):
            row[[unit for unit in range(int((~row.isnan()).sum())) if unit not in alive]] = -math.inf
    again = regroup(scores, 0.5, parts, mode).explicit(vit)
    assert again == once
    twice, x = remove(small, again.within(once)), shown(vit)
    assert torch.equal(twice(x), small(x))
    assert regroup(lottery.importance(small, "magnitude"), 1, parts, mode).explicit(small) == again.within(once)


def test_an_unknown_sorting_is_refused():
    with pytest.raises(ValueError, match="sorting_mode is 'block': expected one of layer, global"):
        regroup({"head": torch.rand(2, 3)}, 0.5, sorting_mode="block")


# ---- refill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("mode", lottery.SORTING)
def test_refill_brings_back_the_most_important(mode, rate):
    for seed in range(6):
        scores = scored(seed)
        plain_plan = regroup(scores, 0.4, ("head", "neuron"), mode)
        found = lottery.refill(scores, plain_plan, rate)
        for kind, kept, now in (("head", plain_plan.heads, found.heads),
                                ("neuron", plain_plan.neurons, found.neurons)):  # fmt: skip
            removed = sorted((-score, block, unit) for block, row in enumerate(scores[kind].tolist())
                             for unit, score in enumerate(row)
                             if not math.isnan(score) and unit not in kept[block])  # fmt: skip
            back = removed[: math.floor(round(rate * len(removed), 9))]
            expected = [sorted([*row, *(unit for score, where, unit in back if where == block and score < math.inf)])
                        for block, row in enumerate(kept)]  # fmt: skip
            assert now == expected


def test_refilled_to_the_brim_is_dense_and_not_at_all_is_plain():
    vit = make("vit")
    x, scores = images(vit), lottery.importance(vit, "magnitude")
    for parts in (("head",), ("neuron",), ("head", "neuron")):
        found = regroup(scores, 0.4, parts)
        assert lottery.refill(scores, found, 0) == found
        full = lottery.refill(scores, found, 1)
        assert (full.heads is None) == ("head" not in parts) and (full.neurons is None) == ("neuron" not in parts)
        assert full.explicit(vit) == Plan().explicit(vit) and torch.equal(remove(vit, full)(x), vit(x))
        half = lottery.refill(scores, found, 0.5)
        for kind, was, now in (("head", found.heads, half.heads), ("neuron", found.neurons, half.neurons)):
            if kind in parts:
                removed = (~scores[kind].isnan()).sum().item() - sum(map(len, was))
                assert sum(map(len, now)) - sum(map(len, was)) == removed // 2


def test_refill_does_not_bring_back_what_earlier_states_removed():
    gone = -math.inf
    scores = {"head": table([[3.0, gone, 1.0, gone], [gone, 2.0, gone, gone]])}
    assert lottery.refill(scores, Plan(heads=[[0], [1]]), 1).heads == [[0, 2], [1]]
    assert lottery.refill(scores, Plan(heads=[[0], []]), 1 / 7).heads == [[0], [1]]
    assert lottery.refill(scores, Plan(heads=[[0], []]), 0.14).heads == [[0], []]


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_what_is_no_share_to_refill_is_refused(rate):
    with pytest.raises(ValueError, match=r"fillback_rate is .*: expected a share in \[0, 1\]"):
        lottery.refill({"head": torch.rand(2, 3)}, Plan(heads=[[0], [1]]), rate)


# ---- growing regularisation -----------------------------------------------------------------------------------------

FORMS = {
    "x": lambda x, p: x,
    "x^2": lambda x, p: x * x,
    "x^3": lambda x, p: x * x * x,
    "exp": lambda x, p: (math.exp(x) - 1) / (math.e - 1),
    "exp_custom": lambda x, p: (math.exp(p * x) - 1) / (math.exp(p) - 1),
    "exp_custom_exponents": lambda x, p: (math.exp(x**p) - 1) / (math.e - 1),
}


@pytest.mark.parametrize("exponents", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_grows_by_its_closed_form_from_zero_to_the_ceiling(schedule, exponents):
    steps, ceiling = 37, 2.5
    growing = Growing({}, ceiling, steps, schedule, exponents)
    found = [growing.strength(step) for step in range(steps)]
    expected = [ceiling * FORMS[schedule](step / (steps - 1), exponents) for step in range(steps)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)
    assert found[0] == 0 and found[-1] == pytest.approx(ceiling, rel=1e-12)
    assert all(a < b for a, b in zip(found, found[1:], strict=False) if b > 1e-12) and found == sorted(found)
    assert found.count(0) < 10


def test_every_schedule_is_tested():
    assert FORMS.keys() == SCHEDULES.keys()


def test_one_step_or_no_ceiling_regularises_nothing():
    assert Growing({}, 5.0, 1).strength(0) == 0
    assert [Growing({}, 0.0, 4, "exp_custom").strength(step) for step in range(4)] == [0] * 4


@pytest.mark.parametrize("case", ["vit", "layerscale", "no biases", "pruned", "resnet"])
def test_only_what_leaves_gets_extra_gradient(case):
    vit = model(case)
    plan = uneven() if case == "resnet" else Plan(heads=[[1], [0, 2], []], neurons=[[0, 5], ALL, [1]])
    masks = units.outside(vit, plan)
    growing, (x, labels) = Growing(masks, 3.0, 11, "x^2"), labelled(vit, 5)[0]
    F.cross_entropy(vit(x), labels).backward()
    vit.head.bias.grad = None  # a parameter that has none
    before = {name: (p.detach().clone(), None if p.grad is None else p.grad.clone())
              for name, p in vit.named_parameters()}  # fmt: skip
    growing(vit, 7)
    touched = set()
    for name, parameter in vit.named_parameters():
        weight, grad = before[name]
        assert torch.equal(parameter, weight), "the weights themselves stay"
        if grad is None:
            assert parameter.grad is None
            continue
        mask = masks.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(parameter.grad[~mask], grad[~mask]), name
        extra = 3.0 * (7 / 10) ** 2 * weight[mask]
        torch.testing.assert_close(parameter.grad[mask], grad[mask] + extra, rtol=1e-14, atol=1e-15)
        touched |= {name} if extra.abs().sum() > 0 else set()
    assert touched == {name for name, mask in masks.items() if mask.any()} and len(touched) > 5


def leaving(vit: nn.Module) -> dict[str, Tensor]:
    return units.outside(vit, Plan(heads=[[1], ALL], neurons=[[0, 5, 9], ALL]))


@pytest.mark.parametrize("schedule", ["x", "exp_custom"])
def test_without_a_task_weights_decay_by_one_minus_rate_times_lambda(schedule):
    vit = make("vit", depth=2)
    masks, steps, rate = leaving(vit), 20, 0.05
    growing, before = Growing(masks, 7.0, steps, schedule), copy.deepcopy(vit)
    optimizer = torch.optim.SGD(vit.parameters(), lr=rate)
    for step in range(steps):
        for parameter in vit.parameters():
            parameter.grad = torch.zeros_like(parameter)
        growing(vit, step)
        optimizer.step()
    factor = math.prod(1 - rate * growing.strength(step) for step in range(steps))
    assert 0 < factor < 0.5
    for (name, parameter), first in zip(vit.named_parameters(), before.parameters(), strict=True):
        mask = masks.get(name, torch.zeros_like(first, dtype=torch.bool))
        torch.testing.assert_close(parameter[mask], factor * first[mask], rtol=1e-12, atol=0)
        assert torch.equal(parameter[~mask], first[~mask])


@pytest.mark.usefixtures("on_cpu")
def test_in_training_lambda_is_neither_clipped_nor_started_again(make_run, tiny, vit):
    """SGD as torch has it, by λ alone, over all steps of all epochs; interrupted or not."""
    recipe = Recipe(4, 8, 0.02, "sgd", weight_decay=0.0, warmup_epochs=1, clip_norm=1e-6, keep="last", save_minutes=0)
    masks, begun, by_hand, calls = leaving(vit), copy.deepcopy(vit), copy.deepcopy(vit), []
    growing = Growing(masks, 50.0, 12, "x^2")

    def on_gradient(model, step):
        calls.append(step)
        if len(calls) == 8:
            raise KeyError("stopped")
        growing(model, step)

    nothing = lambda model, images, targets: (0 * model(images).sum(), {})  # noqa: E731
    arguments = {"run": make_run(), "loss": nothing, "on_gradient": on_gradient}
    with pytest.raises(KeyError):
        fit(vit, tiny, recipe, **arguments)
    vit = begun
    fit(vit, tiny, recipe, **arguments)
    assert calls == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11]
    before = weights(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = recipe.rate(step, 3)
        for parameter in by_hand.parameters():
            parameter.grad = torch.zeros_like(parameter)
        growing(by_hand, step)
        optimizer.step()
    for name, parameter in vit.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=1e-4, atol=1e-7)
        mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask])
        assert parameter[mask].norm() <= 0.3 * before[name][mask].norm()


@pytest.mark.parametrize("case", ["vit", "pruned", "resnet"])
def test_the_norm_ratio_is_that_of_what_leaves_to_what_stays(case):
    vit = model(case)
    plan = uneven() if case == "resnet" else Plan(heads=[[1], [0, 2], []], neurons=[[0, 5], ALL, [1]])
    masks, own = units.outside(vit, plan), matrices(vit)
    out, stay = (torch.cat([own[name][mask ^ flip] for name, mask in masks.items()
                            if name in own and mask.any()]).norm().item()
                 for flip in (False, True))  # fmt: skip
    found = Growing(masks, 1.0, 5).norm_ratio(vit)
    assert found == pytest.approx(out / stay, rel=1e-12) and found > 0.1
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name in masks:
                parameter[masks[name]] *= 1e-3
    assert Growing(masks, 1.0, 5).norm_ratio(vit) == pytest.approx(1e-3 * found, rel=1e-9)
    assert Growing(units.outside(vit, Plan()), 1.0, 5).norm_ratio(vit) == 0


@pytest.mark.parametrize(
    "options, fault",
    [
        (
            {"schedule": "x^4"},
            r"RST_schedule is 'x\^4': expected one of x, x\^2, x\^3, exp, exp_custom, exp_custom_exp",
        ),
        ({"ceiling": -1.0}, "ceiling -1.0, exponents 4.0, steps 5: expected ≥ 0, > 0 and ≥ 1"),
        ({"ceiling": math.nan}, "ceiling nan"),
        ({"exponents": 0.0}, "exponents 0.0"),
        ({"exponents": math.nan}, "exponents nan"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_what_does_not_grow_is_one_clear_line(options, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        Growing({}, **({"ceiling": 1.0, "steps": 5} | options))
    assert "\n" not in str(caught.value)


# ---- plans within plans ---------------------------------------------------------------------------------------------


def drawn(vit: nn.Module, generator: torch.Generator, wholes: bool) -> Plan:
    """A random explicit plan for a model, of which whole parts may go, too."""

    def coins(count: int, share: float = 0.7) -> list[bool]:
        return (torch.rand(count, generator=generator) < share).tolist()

    depth, whole = len(vit.blocks), Plan().explicit(vit)
    chosen = {name: [[unit for unit, stays in zip(row, coins(len(row)), strict=True) if stays] for row in rows]
              for name, rows in (("heads", whole.heads), ("neurons", whole.neurons))}  # fmt: skip
    stays = {name: coins(depth, 0.8) if wholes else [True] * depth for name in ("blocks", "attn", "mlp")}
    return Plan(**chosen, **stays).explicit(vit)


@pytest.mark.parametrize("wholes", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_within_undoes_after(seed, wholes):
    vit, generator = make("vit", depth=5, num_heads=4, mlp_ratio=0.5), torch.Generator().manual_seed(seed)
    earlier = drawn(vit, generator, wholes)
    small = remove(vit, earlier)
    later = drawn(small, generator, wholes)
    both = later.after(earlier)
    inner = both.within(earlier)
    assert inner.after(earlier) == both, "and after undoes within"
    assert inner.heads == later.heads and inner.neurons == later.neurons and inner.blocks == later.blocks
    assert wholes or inner == later  # of a sublayer that is gone already, nobody asks whether it stays
    x = images(vit)
    assert torch.equal(remove(small, inner)(x), remove(small, later)(x))
    torch.testing.assert_close(remove(small, inner)(x), remove(vit, both)(x), **CLOSE)
    whole = Plan().explicit(vit)
    assert both.within(whole) == both and both.within(both).heads == [[*range(len(row))] for row, stays in
                                                                      zip(both.heads, both.blocks, strict=True)
                                                                      if stays]  # fmt: skip


def test_a_plan_that_keeps_what_is_gone_is_not_within():
    vit = make("vit")
    earlier = Plan(heads=[[0, 2], ALL, ALL]).explicit(vit)
    with pytest.raises(ValueError, match=r"heads \[1\] of block 0 were removed before"):
        Plan(heads=[[1], ALL, ALL]).explicit(vit).within(earlier)
