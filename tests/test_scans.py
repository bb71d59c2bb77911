"""Token methods side by side: equal ceilings, one setting at a time, and sets of kept patches by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from test_training_free import RULES, SHAPE, quiet, untrained

from lib import evaluate, models, scans, training_free
from lib.pruners import surgery
from lib.pruners.anchors import Anchors
from lib.pruners.baselines import EViT, TopK
from lib.pruners.dropping import predicted_macs
from lib.starts import Start


@pytest.fixture
def start(tiny) -> Start:
    return untrained(tiny)


def masked(start):
    """The same with the upper half of every test image as foreground."""
    masks = np.zeros((9, 12, 12), dtype=bool)
    masks[:, :6] = True
    return start._replace(images=replace(start.images, test=replace(start.images.test, masks=masks)))


def test_peers_hide_no_faults(start, capsys):
    with pytest.raises(ValueError, match="start_block is 40"):
        scans.peers(start.vit, RULES | {"start_block": 40}, 1.0)
    bare = models.create("vit_digits", 3, **TINY, class_token=False, global_pool="avg").eval()
    found = scans.peers(bare, RULES, 1.0)
    assert [*found] == ["random", "grid", "topk", "evit", "tome", "ward"]
    assert capsys.readouterr().out.startswith("left out anchors: ")


@quiet
def test_anchors_choose_in_the_next_block_with_heads(start, capsys):
    """A model that was cut before may have lost those of the default's."""
    heads = [each.attn.num_heads for each in start.vit.blocks]
    cut = surgery.remove(start.vit, surgery.Plan([[*range(count)] * (place != 1) for place, count in enumerate(heads)],
                                                 [None] * 4))  # fmt: skip
    found = scans.peers(cut, RULES, evaluate.macs(cut, SHAPE)["macs_g"] / 1.3)
    assert found["anchors"].start_block == 2 and capsys.readouterr().out == ""
    table = scans.vary(start._replace(vit=cut), RULES, [0.5])
    assert table.value[table.setting == "start_block"].tolist() == ["2", "3"]


@quiet
def test_peers_leave_out_and_say_what_cannot_be_so_cheap(start, capsys):
    whole = evaluate.macs(start.vit, SHAPE)["macs_g"]
    assert {*scans.peers(start.vit, RULES, whole / 1.5)} == {*training_free.METHODS}
    assert capsys.readouterr().out == ""
    found = scans.peers(start.vit, RULES, whole / 2.5)
    assert [*found] == ["tome", "ward"] and all(predicted_macs(each) <= whole / 2.5 for each in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": macs_g is ")[0] for line in lines] == [
        *(f"left out {name}" for name in ("random", "grid", "topk", "evit", "anchors"))
    ]


@quiet
def test_scan_holds_every_method_at_every_ceiling(start, capsys):
    table = scans.at_ceilings(start, RULES, [1.5, 2.5], latency_batch=2)
    whole = table.macs_g[0]
    assert table.method.tolist() == ["dense", *training_free.METHODS, "tome", "ward"]
    assert table.ceiling.tolist()[1:] == [1.5] * 7 + [2.5] * 2 and np.isnan(table.ceiling[0])
    assert (table.macs_g[1:] < 1.02 * whole / table.ceiling[1:]).all() and (table.speedup[1:] > 0).all()
    assert (table.n == 9).all() and table.agreement[0] == 1 and "left out anchors" in capsys.readouterr().out
    topk = training_free.build(start.vit, RULES, "topk", whole / 1.5)
    scores, found = evaluate.test(topk, start.images)
    row = table[table.method == "topk"].iloc[0]
    assert row.top1 == scores["top1"] and row.nll_nats == scores["nll_nats"] and row.tokens == topk.counts()[1][-1]
    _, dense = evaluate.test(start.vit, start.images)
    assert row.agreement == training_free.agreement(found, dense)


def varied(monkeypatch, start, rules, shares):
    """What `vary` compares: (names, pruner), and on which split."""
    seen = []
    monkeypatch.setattr(scans, "compared", lambda _, pruners, split: seen.append(([*pruners], split)))
    scans.vary(start, rules, shares)
    return seen[0]


@pytest.mark.parametrize("given", [{}, {"k_anchors": 2.0, "top_m": 6.0}])
def test_settings_are_varied_alone(start, monkeypatch, given):
    rules = RULES | given
    mix = 0.25 if given else 0.2
    pairs, split = varied(monkeypatch, start, rules, [0.25, 0.5])
    assert split == "val"
    own = {"alpha": {"alpha"}, "anchors among kept": {"k_anchors", "top_m"}, "start_block": {"start_block"},
           "normalise_scores": {"normalise"}}  # fmt: skip
    values = {name: [] for name in own}
    for (names, pruner), share in zip(pairs, [0.25, 0.5] * (len(pairs) // 2), strict=True):
        k, m = training_free.parted(mix, round(16 * share))
        usual = {"k_anchors": k, "top_m": m, "alpha": 0.3, "start_block": 1, "normalise": "minmax"}
        changed = {name for name, value in pruner.arguments.items() if usual[name] != value}
        assert changed <= own[names["setting"]] and names["method"] == "anchors"
        assert pruner.k + pruner.m == round(16 * share), "settings differ, costs do not"
        values[names["setting"]].append(names["value"])
        if names["setting"] != "anchors among kept":
            assert str(pruner.arguments[own[names["setting"]].copy().pop()]) == names["value"]
    assert {name: each[::2] for name, each in values.items()} == {
        "alpha": ["0.0", "0.25", "0.5", "0.75", "1.0"],
        "anchors among kept": ["0.1", "0.25", "0.5", "0.75", "0.95"],
        "start_block": ["1", "2", "3"],
        "normalise_scores": ["minmax", "none"],
    }
    ks = [pruner.k for names, pruner in pairs if names["setting"] == "anchors among kept"]
    assert ks == [1, 1, 1, 2, 2, 4, 3, 6, 3, 7]  # of 4 and of 8, at least one of each kind


def test_what_is_varied_is_measured_where_it_may_be(start, monkeypatch):
    table = scans.vary(start, RULES, [0.5])
    assert len(table) == 1 + 5 + 5 + 3 + 2 and (table.n == 9).all() and (table.tokens[1:] == 9).all()
    same = table[(table.setting == "alpha") & (table.value == "0.0")].iloc[0]
    expected, _ = evaluate.test(Anchors(start.vit, 2, 6, alpha=0.0), start.images, split="val")
    assert same.nll_nats == expected["nll_nats"] and same.macs_g == expected["macs_g"]
    empty = start._replace(images=replace(start.images, val=start.images.val.take(np.arange(0))))
    assert varied(monkeypatch, empty, RULES, [0.5])[1] == "test"


def test_overlaps_by_hand():
    sets = {"a": [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1])], "b": [torch.tensor([2, 3]), torch.tensor([0, 1])],
            "c": [torch.tensor([7, 8]), torch.tensor([1, 2])]}  # fmt: skip
    table = evaluate.overlaps(sets)
    third = 1 / 3  # {0, 1} and {1, 2}
    assert np.allclose(table, [[1, 0.75, third / 2], [0.75, 1, third / 2], [third / 2, third / 2, 1]])
    assert [*table.index] == [*table.columns] == ["a", "b", "c"]


def test_kept_sets_are_those_of_the_last_block(start):
    topk, evit = TopK(start.vit, 0.5, [0, 2]), EViT(start.vit, 0.5, [0])
    x = evaluate.inputs(start.images.test.images, start.images)
    assert [ids.tolist() for ids in scans.kept(topk, x)] == topk.trace(x).kept[-1].tolist()
    found = scans.kept(evit, x)
    assert [len(ids) for ids in found] == [8] * 9 and min(ids.min() for ids in found) >= 0, "no fused token"
    sets = scans.kept_in({"topk": topk, "evit": evit, "tome": training_free.build(start.vit, RULES, "tome")},
                                 start.images)  # fmt: skip
    assert [*sets] == ["topk", "evit"] and [ids.tolist() for ids in sets["evit"]] == [ids.tolist() for ids in found]


def test_foreground_by_hand(start, monkeypatch):
    sets = {"upper": [torch.arange(4)] * 9, "mixed": [torch.tensor([0, 8, 9, 15])] * 9}
    assert scans.foreground(sets, start) is None
    table = scans.foreground(sets, masked(start))
    assert table.method.tolist() == ["upper", "mixed"]
    assert table.precision.tolist() == [1, 0.25] and table.recall.tolist() == [0.5, 0.125]
    assert table.precision_random.tolist() == [0.5, 0.5] and table.recall_random.tolist() == [0.25, 0.25]

    monkeypatch.setattr(scans, "COUNTED", 4)  # of some images alone: masks and kept patches of the same
    masks = np.zeros((9, 12, 12), dtype=bool)
    for image in range(9):
        masks[image, 0, image] = True  # in one of three patches
    images = replace(start.images, test=replace(start.images.test, masks=masks))
    sets = {"one": [torch.tensor([image // 3]) for image in evaluate.evenly(9, 4)]}
    assert len(scans.kept_in({"one": TopK(start.vit, 0.5)}, images)["one"]) == 4
    assert scans.foreground(sets, start._replace(images=images)).precision.tolist() == [1]
