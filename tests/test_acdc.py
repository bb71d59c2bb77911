"""ACDC: the fast decisions are those of the loop as written, and those of physically removing the parts."""

import copy
import functools

import pytest
import torch
from families import FAMILIES, images, make
from test_surgery import MIXED, MODELS, built
from torch import Tensor, nn

from lib import blocks
from lib.pruners import acdc, components, probe
from lib.pruners.acdc import RULES, Decision
from lib.pruners.components import KINDS, Component
from lib.pruners.surgery import Plan, remove

CASES = [*FAMILIES, *MODELS[-3:], "pruned"]
ORDER = ("block", "mlp", "neuron", "attn", "head")  # late to early, larger before smaller
LARGER = {"neuron": "mlp", "head": "attn"}
decide = functools.partial(acdc.decide, progress=False)
effects = functools.partial(acdc.effects, progress=False)


def model(case: str) -> nn.Module:
    return remove(make("vit", depth=6), MIXED) if case == "pruned" else built(case)


def kinds(case: str) -> tuple[str, ...]:
    return ("block", "attn", "mlp") if case == "scaled norms" else KINDS


@functools.cache
@torch.no_grad()
def alone(case: str) -> dict[Component, float]:
    """What removing each part alone costs, by physical removal."""
    vit = model(case)
    x, parts = images(vit, 10), components.of(vit, parts=kinds(case))
    clean = vit(x)
    return {part: cost(clean, remove(vit, components.plan(vit, [part]))(x)) for part in parts}


def cost(clean: Tensor, logits: Tensor) -> float:
    """KL(clean ‖ pruned) of logits, mean over images."""
    clean, pruned = clean.log_softmax(dim=1), logits.log_softmax(dim=1)
    return (clean.exp() * (clean - pruned)).sum(dim=1).mean().item()


def threshold(case: str, rule: str, share: float) -> float:
    """A KL of which some parts stay below and some do not."""
    quantile = torch.tensor([*alone(case).values()], dtype=torch.float64).quantile(share).item()
    return quantile * (2.1 if rule == "absolute" else 1.01)


@functools.cache
def slow(case: str, rule: str, share: float = 0.6, count: int = 10, group_size: int = 64) -> list[Decision]:
    vit = model(case)
    batches = images(vit, count).split(6)
    return list(acdc.naive(vit, batches, threshold(case, rule, share), rule, kinds(case), group_size))


class Chunked(probe.Probe):
    """On small models many images run at once, on a CPU part after part. Here four images, as if they were large."""

    chunk_, ahead_ = 4, 1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.chunk, self.ahead = self.chunk_, self.ahead_
        self.chunks = len(self.images.split(self.chunk))


@pytest.fixture(autouse=True)
def few_images_at_once(monkeypatch):
    monkeypatch.setattr(acdc, "Probe", Chunked)


@torch.no_grad()
def by_hand(vit, x, threshold, rule="absolute", parts=KINDS, group_size=64, keep=()) -> list[Decision]:
    """ACDC with physical removal, nothing shared with the library but the removal."""
    gone, so_far, found, clean = [], 0.0, [], vit(x)
    tried = [part for part in components.of(vit, group_size, parts) if part not in keep]
    for index in reversed(range(len(vit.blocks))):
        for kind in ORDER:
            for part in reversed([part for part in tried if (part.block, part.kind) == (index, kind)]):
                if any(one.block == index and one.kind in ("block", LARGER.get(kind)) for one in gone):
                    continue
                kl = cost(clean, remove(vit, components.plan(vit, [*gone, part]))(x))
                removed = kl < threshold if rule == "absolute" else kl - so_far < threshold
                gone, so_far = ([*gone, part], kl) if removed else (gone, so_far)
                found.append(Decision(part, removed, kl, so_far))
    return found


def assert_agree(found, expected) -> None:
    """The same decisions in the same order; a KL may end early, as a lower bound, where the part stays."""
    expected = list(expected)
    assert [(each.part, each.removed) for each in found] == [(each.part, each.removed) for each in expected]
    for fast, slow in zip(found, expected, strict=True):
        assert abs(fast.so_far - slow.so_far) < 1e-9
        assert abs(fast.kl - slow.kl) < 1e-9 if slow.removed else -1e-12 < fast.kl < slow.kl + 1e-9


def mixed(found: list[Decision], least: int = 2) -> bool:
    """Whether some parts went and some stayed: or agreeing says little."""
    return least <= sum(each.removed for each in found) <= len(found) - least


# ---- the same decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["layerscale", "registers, mean pooling", "scaled norms", "pruned"])
def test_naive_is_the_loop_as_written(case, rule):
    vit = model(case)
    found, expected = slow(case, rule), by_hand(vit, images(vit, 10), threshold(case, rule, 0.6), rule, kinds(case))
    assert_agree(found, expected)
    assert [each.kl for each in found] == pytest.approx([each.kl for each in expected], abs=1e-10)


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_fast_decisions_are_the_naive_ones(case, rule, share):
    vit = model(case)
    found = decide(vit, [images(vit, 10)], threshold(case, rule, share), rule, kinds(case))
    assert_agree(found, slow(case, rule, share))
    assert mixed(found, 1)


LAYER = 10 * 17 * 48 * 8 / 2**20  # MB of what a block is fed


@pytest.mark.parametrize("cache_mb", [0, 0.3 * LAYER, 3 * LAYER, 9 * LAYER, 10.5 * LAYER, 2048])
@pytest.mark.parametrize("ahead", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_memory_and_looking_ahead_change_nothing(rule, ahead, cache_mb):
    case = "vit" if rule == "absolute" else "registers, mean pooling"
    vit, tau = model(case), threshold(case, rule, 0.6)
    found = decide(vit, [images(vit, 10)], tau, rule, group_size=30, ahead=ahead, cache_mb=cache_mb)
    assert_agree(found, slow(case, rule, group_size=30))
    assert mixed(found, 6)


@pytest.mark.parametrize("count, split", [(1, 1), (2, 1), (4, 3), (5, 4), (17, 16), (17, 17)])
@pytest.mark.parametrize("rule", RULES)
def test_batches_do_not_matter(rule, count, split):
    vit, tau = model("deit"), threshold("deit", rule, 0.6)
    for cache_mb in (5 * LAYER, 2048):
        found = decide(vit, (part for part in images(vit, count).split(split)), tau, rule, cache_mb=cache_mb)
        assert_agree(found, slow("deit", rule, count=count))


@pytest.mark.parametrize("chunk, ahead", [(1, 1), (6, 8), (32, 8), (None, None)])
@pytest.mark.parametrize("rule", RULES)
def test_how_much_a_device_runs_at_once_does_not_matter(monkeypatch, rule, chunk, ahead):
    vit, tau = model("layerscale"), threshold("layerscale", rule, 0.6)
    if chunk is None:  # what this one does by itself
        monkeypatch.setattr(acdc, "Probe", probe.Probe)
    else:
        monkeypatch.setattr(Chunked, "chunk_", chunk)
        monkeypatch.setattr(Chunked, "ahead_", ahead)
    assert_agree(decide(vit, [images(vit, 10)], tau, rule), slow("layerscale", rule))


def test_a_cache_that_fills_late_keeps_its_images_in_order():
    """Beside a wide MLP the last few images may fit into the cache before others do."""
    vit = make("vit", depth=4, mlp_ratio=30)
    x, image = images(vit, 13), 17 * 48 * 8 / 2**20
    expected = list(acdc.naive(vit, [x], 0.01, group_size=360))
    for count in (144, 150, 156):
        assert_agree(decide(vit, [x], 0.01, group_size=360, cache_mb=count * image), expected)


@pytest.mark.parametrize(
    "parts, group_size",
    [(["head"], 64), (["neuron"], 9), (["head", "neuron"], 50), (["block"], 64), (["attn", "neuron"], 192)],
)
@pytest.mark.parametrize("rule", RULES)
def test_some_kinds_alone(rule, parts, group_size):
    vit = make("vit")
    x, costs = images(vit, 10), sorted(kl for part, kl in alone("vit").items() if part.kind in parts)
    tau = costs[len(costs) // 2]
    found = decide(vit, [x], tau, rule, parts, group_size)
    assert_agree(found, acdc.naive(vit, [x], tau, rule, parts, group_size))
    assert {each.part.kind for each in found} == {*parts} and any(each.removed for each in found)


@pytest.mark.parametrize("rule", RULES)
def test_a_head_that_reads_two_tokens(rule):
    vit = make("distilled")
    x = [images(vit, 10)]
    assert_agree(decide(vit, x, 0.05, rule), acdc.naive(vit, x, 0.05, rule))


def test_a_journal_of_a_model_in_half_precision(tmp_path):
    vit = make("vit").bfloat16()
    x, journal = [images(vit, 4).bfloat16()], tmp_path / "search.jsonl"
    found = decide(vit, x, 0.05, journal=journal)
    assert found and decide(vit, x, 0.05, journal=journal) == found


@pytest.mark.parametrize("case", CASES)
def test_effects_are_those_of_single_removals(case):
    vit = model(case)
    found = effects(vit, images(vit, 10).split(7), kinds(case))
    assert [*found] == components.of(vit, parts=kinds(case)), "in the order of the parts"
    assert found == pytest.approx(alone(case), abs=1e-10)


@pytest.mark.parametrize("cache_mb", [0, 2 * LAYER, 9.5 * LAYER])
@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_effects_with_little_memory_and_many_at_once(ahead, cache_mb):
    vit = make("registers")
    found = effects(vit, [images(vit, 10)], ahead=ahead, cache_mb=cache_mb)
    assert found == pytest.approx(alone("registers"), abs=1e-10)


# ---- what the rules promise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_a_threshold_of_zero_removes_nothing(case, rule):
    vit = model(case)
    found = decide(vit, [images(vit)], 0, rule, kinds(case))
    assert len(found) == len(components.of(vit, parts=kinds(case))) and not any(each.removed for each in found)
    assert acdc.search(vit, [images(vit)], 0.0, rule, kinds(case), progress=False) == Plan().explicit(vit)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["vit", "registers, mean pooling"])
def test_a_threshold_of_zero_does_not_even_remove_what_does_nothing(family, rule):
    """Rounding must not make a KL of zero negative."""
    vit = make(family)
    for block in vit.blocks:
        block.attn.proj.weight.data[:, 16:32] = 0
        block.mlp.fc2.weight.data[:, :64] = 0
    batches = images(vit, 20).split(7)
    for found in (decide(vit, batches, 0, rule), acdc.naive(vit, batches, 0, rule)):
        assert not [str(each.part) for each in found if each.removed]


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_of_infinity_removes_every_block(rule):
    vit = make("vit")
    found = decide(vit, [images(vit)], float("inf"), rule)
    assert [str(each.part) for each in found] == ["block 2", "block 1", "block 0"]
    assert all(each.removed for each in found)
    found = decide(vit, [images(vit)], float("inf"), rule, ("head", "neuron"))
    assert len(found) == 18 and all(each.removed for each in found)


@pytest.mark.parametrize("case", CASES)
def test_the_pruned_model_is_within_the_threshold(case):
    """Independently: the KL of the physically pruned model."""
    vit, x = model(case), images(model(case), 10)
    for rule in RULES:
        tau = threshold(case, rule, 0.6)
        plan = acdc.search(vit, [x], tau, rule, kinds(case), progress=False)
        found = decide(vit, [x], tau, rule, kinds(case))
        assert plan == components.plan(vit, [each.part for each in found if each.removed])
        final = cost(vit(x), remove(vit, plan)(x))
        assert abs(final - found[-1].so_far) < 1e-10 and final > 0
        before = [0.0, *(each.so_far for each in found)]
        for each, so_far in zip(found, before, strict=False):
            bound = tau if rule == "absolute" else so_far + tau
            assert each.removed == (each.kl < bound) and each.so_far == (each.kl if each.removed else so_far)
        assert final < tau or rule == "increment"


def test_parts_are_tried_late_to_early_larger_before_smaller():
    vit = make("vit", depth=2)
    found = decide(vit, [images(vit)], 0)
    assert [str(each.part) for each in found] == [
        f"{kind} {index}{end}"
        for index in (1, 0)
        for kind, ends in (("block", [""]), ("mlp", [""]), ("neuron", [".128-191", ".64-127", ".0-63"]), ("attn", [""]),
                           ("head", [".2", ".1", ".0"]))
        for end in ends
    ]  # fmt: skip


# ---- parts that are not tried ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parts", [("head", "neuron"), KINDS])
def test_parts_to_keep_stay_and_are_not_listed(rule, parts):
    vit, tau = make("vit"), threshold("vit", rule, 0.6)
    x = images(vit, 10)
    gone = [each.part for each in decide(vit, [x], tau, rule, parts) if each.removed]
    keep = gone[::2]
    found = decide(vit, [x], tau, rule, parts, keep=keep)
    assert not {each.part for each in found} & {*keep}
    assert_agree(found, by_hand(vit, x, tau, rule, parts, keep=keep))
    if parts == ("head", "neuron"):  # where no larger part takes them along
        plan = acdc.search(vit, [x], tau, rule, parts, keep=keep, progress=False)
        for part in keep:
            assert {*part.units} <= {*(plan.heads if part.kind == "head" else plan.neurons)[part.block]}


SCORES = {
    "head": torch.tensor([[0.01, 0.02, 0.03], [0.5, 0.07, 0.09]], dtype=torch.float64),
    "neuron": torch.tensor([[0.01, 0.03, 0.2], [0.0, 0.0, 0.001]], dtype=torch.float64),
    "attn": torch.tensor([0.3, 2.0], dtype=torch.float64),
}
HEADS = [Component("head", block, (head,)) for block in range(2) for head in range(3)]
GROUPS = [Component("neuron", block, units) for block in range(2) for units in ((0, 1), (2,))]
ATTN = [Component("attn", block) for block in range(2)]


@pytest.mark.parametrize(
    "tried, tau, rule, margin, kept",
    [
        # increment: what is above margin · τ
        (HEADS, 0.02, "increment", 4, ["head 1.0", "head 1.2"]),
        (HEADS, 0.02, "increment", 3, ["head 1.0", "head 1.1", "head 1.2"]),
        (GROUPS, 0.03, "increment", 1, ["neuron 0.0-1", "neuron 0.2"]),  # the sum: 0.04
        (ATTN, 0.3, "increment", 1, ["attn 1"]),
        ([*HEADS, *ATTN], 0, "increment", 4, [*map(str, [*HEADS, *ATTN])]),
        # absolute: 0.01 + 0.02 < 0.06 ≤ 0.01 + 0.02 + 0.03, so the bound is 0.02
        (HEADS, 0.06, "absolute", 4, ["head 1.0", "head 1.2"]),
        (HEADS, 0.06, "absolute", 3, ["head 1.0", "head 1.1", "head 1.2"]),
        (HEADS, 0.065, "absolute", 3, ["head 1.0"]),  # 0.06 < 0.065: the bound is 0.03
        (GROUPS, 0.05, "absolute", 1, ["neuron 0.2"]),  # 0 + 0.001 + 0.04 fits
        (ATTN, 0.2, "absolute", 4, ["attn 1"]),  # not even the smallest fits: τ itself
        (HEADS, 9.0, "absolute", 1, []),  # all fit: the largest
        (HEADS, 0.06, "absolute", 1000, []),
    ],
)
def test_screening_keeps_what_is_far_above_the_bound(tried, tau, rule, margin, kept):
    found = acdc.screen(SCORES, tried, tau, rule, margin=margin)
    assert [str(part) for part in found] == kept


def test_screening_that_keeps_nothing_changes_nothing():
    vit = make("vit")
    tau, parts = threshold("vit", "increment", 0.5), components.of(vit)
    scores = {kind: torch.rand(gate.shape) for kind, gate in components.ones(vit).items()}
    none = acdc.screen(scores, parts, tau, "increment", margin=1e6)
    assert none == [] and decide(vit, [images(vit)], tau, "increment", keep=none) == decide(
        vit, [images(vit)], tau, "increment"
    )
    every = acdc.screen(scores, parts, 0.0, "increment")
    assert every == parts and decide(vit, [images(vit)], tau, "increment", keep=every) == []


# ---- a stopped search -----------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 9])
@pytest.mark.parametrize("ahead", [1, 8])
@pytest.mark.parametrize("rule", RULES)
def test_a_stopped_search_goes_on_where_it_was(tmp_path, monkeypatch, rule, ahead, after):
    vit, journal, tau = model("vit"), tmp_path / "last" / "search.jsonl", threshold("vit", rule, 0.6)
    x, tries, run = [images(vit, 10)], [], Chunked.effects

    def effects(self, stage, sets, limits):
        if len(tries) == after:
            raise Stopped
        tries.append(stage)
        return run(self, stage, sets, limits)

    monkeypatch.setattr(Chunked, "effects", effects)
    with pytest.raises(Stopped):
        decide(vit, x, tau, rule, ahead=ahead, journal=journal)
    with open(journal, "a") as file:
        file.write('["head", 0, [')  # as a machine that loses power leaves it
    known, again = journal.read_text().count("\n") - 1, []
    monkeypatch.setattr(Chunked, "effects", lambda *all: again.append(all) or run(*all))
    found = decide(vit, x, tau, rule, ahead=ahead, journal=journal)
    assert_agree(found, slow("vit", rule))
    assert known >= after and len(again) <= len(found) - known
    again.clear()
    assert decide(vit, x, tau, rule, journal=journal) == found and not again


@pytest.mark.parametrize("other", [
    {"threshold": 0.1}, {"rule": "increment"}, {"parts": ["mlp"]}, {"group_size": 32}, {"batches": 4},
    {"vit": "layerscale"}, {"keep": [Component("head", 0, (0,))]},
])  # fmt: skip
def test_a_journal_of_another_search_is_refused(tmp_path, other):
    journal, asked = tmp_path / "search.jsonl", {"vit": "vit", "batches": 3, "threshold": 0, "rule": "absolute"}

    def search(vit: str, batches: int, **how: object) -> list[Decision]:
        return decide(model(vit), [images(model(vit), batches)], **how, journal=journal)

    found = search(**asked)
    with pytest.raises(ValueError, match=r"search\.jsonl is of another search .* delete it"):
        search(**asked | other)
    assert search(**asked) == found


# ---- the model given, and bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_untouched_and_run_in_evaluation_mode(training):
    vit = make("vit", proj_drop_rate=0.5, drop_path_rate=0.5).train(training)
    vit.blocks[1].attn.proj.requires_grad_(False)
    before, x, tau = copy.deepcopy(vit), images(vit, 10), threshold("vit", "absolute", 0.5)
    for found in (decide(vit, [x], tau), [*acdc.naive(vit, [x], tau)]):
        assert_agree(found, slow("vit", "absolute"))
    assert effects(vit, [x]) == pytest.approx(alone("vit"), abs=1e-10)
    assert {module.training for module in vit.modules()} == {training} and repr(vit) == repr(before)
    for (name, mine), (_, was) in zip(vit.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(mine, was), name
    assert [p.requires_grad for p in vit.parameters()] == [p.requires_grad for p in before.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_heads_and_neurons_that_cannot_go_are_refused_by_name():
    vit = make("scaled norms")
    for parts, norm in ((KINDS, "attention"), (["head"], "attention"), (["neuron"], "MLP")):
        with pytest.raises(blocks.UnsupportedBlock, match=f"the {norm} normalises over all"):
            decide(vit, [images(vit)], 0.1, parts=parts)


CALLS = {
    "decide": decide,
    "search": functools.partial(acdc.search, progress=False),
    "naive": lambda *arguments, **more: list(acdc.naive(*arguments, **more)),
    "screen": lambda vit, _, *arguments: acdc.screen(SCORES, HEADS, *arguments),
    "effects": lambda vit, batches, _: effects(vit, batches),
}


@pytest.mark.parametrize("call", ["decide", "search", "naive", "screen"])
@pytest.mark.parametrize(
    "arguments, fault",
    [
        ((-0.1,), "threshold is -0.1: expected a KL in nats, at least 0"),
        ((float("nan"),), "threshold is nan: expected a KL in nats, at least 0"),
        ((0.1, "relative"), "rule is 'relative': expected one of absolute, increment"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, arguments, fault):
    vit = make("vit", depth=1)
    with pytest.raises(ValueError, match=fault) as caught:
        CALLS[call](vit, [images(vit)], *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["decide", "search", "naive", "effects"])
@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 64, 64, dtype=torch.float64)]], ids=["none", "of no image"])
def test_empty_batches_are_one_clear_line(call, batches):
    with pytest.raises(ValueError, match="batches are empty: expected at least one image"):
        CALLS[call](make("vit", depth=1), batches, 0.1)


def test_bad_parts_and_groups_are_refused_as_everywhere():
    vit = make("vit", depth=1)
    with pytest.raises(ValueError, match=r"parts are \['layer'\]: expected some of"):
        decide(vit, [images(vit)], 0.1, parts=["layer"])
    with pytest.raises(ValueError, match="group_size is 0: expected"):
        decide(vit, [images(vit)], 0.1, group_size=0)
