"""Token methods on a trained model as it is: equal ceilings, one setting at a time, and comparisons by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from lib import evaluate, models, params, runs, training_free
from lib.evaluate import Predictions
from lib.pruners import surgery
from lib.pruners.anchors import Anchors
from lib.pruners.baselines import EViT, ToMe, TopK
from lib.pruners.dropping import predicted_macs
from lib.pruners.tokens import TokenPruner
from lib.starts import Start

RULES = {"method": "topk", "keep_ratio": 0.5, "blocks": [], "r": 2, "k_anchors": 0.1, "top_m": 0.4, "alpha": 0.3,
         "start_block": 1, "normalise_scores": "minmax", "macs_g": 0.0, "seed": 0}  # fmt: skip
SHAPE = (3, 12, 12)
quiet = pytest.mark.filterwarnings("ignore:k_anchors")  # a search for a ceiling tries to drop nothing, too


@pytest.fixture
def start(tiny):
    """Four blocks on 16 patches, untrained."""
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **{**TINY, "depth": 4}).eval()
    about = {"data": {"dataset": "tiny"}, "normalise": "data", "classes": tiny.classes}
    return Start("", vit, tiny, about)


def masked(start):
    """The same with the upper half of every test image as foreground."""
    masks = np.zeros((9, 12, 12), dtype=bool)
    masks[:, :6] = True
    return start._replace(images=replace(start.images, test=replace(start.images.test, masks=masks)))


@pytest.mark.parametrize(
    ("rules", "kind", "arguments"),
    [({}, "TopK", {"keep_ratio": 0.5, "blocks": [1, 2, 3]}),
     ({"method": "evit", "blocks": [0, 2], "keep_ratio": 0.25}, "EViT", {"keep_ratio": 0.25, "blocks": [0, 2]}),
     ({"method": "random", "seed": 3}, "RandomDrop", {"keep_ratio": 0.5, "blocks": [1, 2, 3], "seed": 3}),
     ({"method": "tome"}, "ToMe", {"r": 2}),
     ({"method": "tome", "merge_every": 2}, "ToMe", {"r": [2, 0, 2, 0]}),
     ({"method": "tome", "merge_every": 3, "r": 3}, "ToMe", {"r": [3, 0, 0, 3]}),
     ({"method": "ward", "gamma": 1.0}, "Ward", {"r": 2, "gamma": 1.0, "linkage": "ward", "keys": "heads"}),
     ({"method": "anchors", "k_anchors": 3.0, "start_block": 2, "normalise_scores": "none"}, "Anchors",
      {"k_anchors": 3, "top_m": 0.4, "alpha": 0.3, "start_block": 2, "normalise": "none"})],
)  # fmt: skip
def test_methods_are_built_as_the_rules_say(start, rules, kind, arguments):
    pruner = training_free.build(start.vit, RULES | rules)
    assert type(pruner).__name__ == kind and pruner.arguments == arguments and pruner.vit is start.vit
    if kind == "Anchors":
        assert type(pruner.k_anchors) is int


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"method": "tome", "keep_ratio": 0.3}, "keep_ratio is 0.3, but method is 'tome'"),
     ({"r": 3}, "r is 3, but method is 'topk'"),
     ({"gamma": 1.0, "ceilings": []}, "gamma is 1.0, but method is 'topk'"),
     ({"merge_every": 2, "ceilings": []}, "merge_every is 2, but method is 'topk'"),
     ({"method": "ward", "keep_ratio": 0.3}, "keep_ratio is 0.3, but method is 'ward'"),
     ({"method": "ward", "r": 3, "macs_g": 0.1}, "r is 3, but macs_g says how strong"),
     ({"method": "ward", "alpha": 0.1, "ceilings": []}, "alpha is 0.1, but method is 'ward'"),
     ({"keep_ratio": 0.3, "macs_g": 0.1}, "keep_ratio is 0.3, but macs_g says how strong"),
     ({"method": "tome", "blocks": [2], "ceilings": []}, "blocks is [2], but method is 'tome'"),
     ({"seed": 1, "ceilings": []}, "seed is 1, but method is 'topk'"),
     ({"alpha": 0.1, "ceilings": []}, "alpha is 0.1, but method is 'topk'"),
     ({"method": "anchors", "keep_ratio": 0.3}, "keep_ratio is 0.3, but method is 'anchors'"),
     ({"learning_rate": 1e-3}, "learning_rate is 0.001, but finetune_epochs is 0"),
     ({"finetune_epochs": 1, "learning_rate": 1e-3, "seed": 1, "ceilings": []}, ""),
     ({"method": "anchors", "alpha": 0.1, "top_m": 3, "ceilings": []}, ""),
     ({"method": "random", "seed": 1, "blocks": [1], "ceilings": []}, ""),
     ({"method": "tome", "r": 3, "ceilings": []}, ""),
     ({"method": "ward", "r": 3, "gamma": 1.0, "ceilings": []}, ""),
     ({"gamma": 1.0, "merge_every": 2}, ""),
     ({"method": "ward", "merge_every": 2, "macs_g": 0.1, "ceilings": []}, ""),
     ({"method": "tome", "alpha": 0.1, "blocks": [2], "seed": 1}, ""),  # all methods are shown at ceilings
     ({"alpha": 0.1, "ceilings": [], "shares": [0.5]}, "")],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(tmp_path, values, fault):
    declaration = params.declared_in(Path(training_free.__file__).parents[1] / "notebooks" / "token_baselines.ipynb")
    values = params.check(declaration, {"output_dir": str(tmp_path), "run_name": "run", **values})
    run = runs.Run("token_baselines", declaration, values)
    if fault:
        with pytest.raises(params.ParameterError, match=f"^{re.escape(fault)}: leave it out$"):
            training_free.check(run)
    else:
        training_free.check(run)
    run.close()


def test_a_price_is_met_by_merging_in_some_blocks_only(start):
    whole = predicted_macs(ToMe(start.vit, 0))
    for method in ("tome", "ward"):
        pruner = training_free.build(start.vit, RULES | {"merge_every": 2}, method, 0.75 * whole)
        r = pruner.rs
        assert r[1] == r[3] == 0 and r[0] and abs(r[0] - r[2]) <= 1
        milder = training_free.MERGING[method].of_total(start.vit, sum(r) - 1, 2)
        assert predicted_macs(pruner) <= 0.75 * whole < predicted_macs(milder)


def test_peers_hide_no_faults(start, capsys):
    with pytest.raises(ValueError, match="start_block is 40"):
        training_free.peers(start.vit, RULES | {"start_block": 40}, 1.0)
    bare = models.create("vit_digits", 3, **TINY, class_token=False, global_pool="avg").eval()
    found = training_free.peers(bare, RULES, 1.0)
    assert [*found] == ["random", "grid", "topk", "evit", "tome", "ward"]
    assert capsys.readouterr().out.startswith("left out anchors: ")


@quiet
@pytest.mark.parametrize("method", training_free.METHODS)
@pytest.mark.parametrize("ceiling", [1.15, 1.5, 2.0])
def test_under_a_ceiling_is_the_mildest_below(start, method, ceiling):
    whole = evaluate.macs(start.vit, SHAPE)["macs_g"]
    found = training_free.build(start.vit, RULES, method, whole / ceiling)
    assert predicted_macs(found) <= whole / ceiling
    assert 0.85 * whole / ceiling < evaluate.macs(found, SHAPE)["macs_g"] < 1.02 * whole / ceiling
    named = training_free.build(start.vit, RULES | {"macs_g": whole / ceiling, "method": method})
    assert named.arguments == found.arguments and named.counts() == found.counts()
    if method == "anchors":
        kept = found.k + found.m
        assert found.counts()[1] == [17, *[1 + kept] * 3] and found.k == max(1, round(0.2 * kept)), "0.1 to 0.4"


@quiet
def test_peers_leave_out_and_say_what_cannot_be_so_cheap(start, capsys):
    whole = evaluate.macs(start.vit, SHAPE)["macs_g"]
    assert {*training_free.peers(start.vit, RULES, whole / 1.5)} == {*training_free.METHODS}
    assert capsys.readouterr().out == ""
    found = training_free.peers(start.vit, RULES, whole / 2.5)
    assert [*found] == ["tome", "ward"] and all(predicted_macs(each) <= whole / 2.5 for each in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": macs_g is ")[0] for line in lines] == [
        *(f"left out {name}" for name in ("random", "grid", "topk", "evit", "anchors"))
    ]


@quiet
def test_scan_holds_every_method_at_every_ceiling(start, capsys):
    table = training_free.scan(start, RULES, [1.5, 2.5], latency_batch=2)
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
    monkeypatch.setattr(training_free, "compared", lambda _, pruners, split: seen.append(([*pruners], split)))
    training_free.vary(start, rules, shares)
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
    table = training_free.vary(start, RULES, [0.5])
    assert len(table) == 1 + 5 + 5 + 3 + 2 and (table.n == 9).all() and (table.tokens[1:] == 9).all()
    same = table[(table.setting == "alpha") & (table.value == "0.0")].iloc[0]
    expected, _ = evaluate.test(Anchors(start.vit, 2, 6, alpha=0.0), start.images, split="val")
    assert same.nll_nats == expected["nll_nats"] and same.macs_g == expected["macs_g"]
    empty = start._replace(images=replace(start.images, val=start.images.val.take(np.arange(0))))
    assert varied(monkeypatch, empty, RULES, [0.5])[1] == "test"


@pytest.mark.parametrize(
    ("share", "kept", "expected"),
    [(0.2, 10, (2, 8)), (0.0, 10, (1, 9)), (1.0, 10, (9, 1)), (0.5, 0, (1, 1)), (0.9, 2, (1, 1)), (0.34, 3, (1, 2))],
)
def test_kept_patches_are_parted(share, kept, expected):
    assert training_free.parted(share, kept) == expected


def test_agreement_by_hand():
    labels = torch.tensor([0, 1, 1, 0])
    ours = Predictions(torch.tensor([[2.0, 1], [0, 3], [5, 1], [1, 0]]), labels)
    theirs = Predictions(torch.tensor([[9.0, 1], [8, 3], [0, 1], [1, 0]]), labels)
    assert training_free.agreement(ours, theirs) == 0.5 and training_free.agreement(ours, ours) == 1


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
    assert [ids.tolist() for ids in training_free.kept(topk, x)] == topk.trace(x).kept[-1].tolist()
    found = training_free.kept(evit, x)
    assert [len(ids) for ids in found] == [8] * 9 and min(ids.min() for ids in found) >= 0, "no fused token"
    sets = training_free.kept_in({"topk": topk, "evit": evit, "tome": training_free.build(start.vit, RULES, "tome")},
                                 start.images)  # fmt: skip
    assert [*sets] == ["topk", "evit"] and [ids.tolist() for ids in sets["evit"]] == [ids.tolist() for ids in found]


def test_foreground_by_hand(start, monkeypatch):
    sets = {"upper": [torch.arange(4)] * 9, "mixed": [torch.tensor([0, 8, 9, 15])] * 9}
    assert training_free.foreground(sets, start) is None
    table = training_free.foreground(sets, masked(start))
    assert table.method.tolist() == ["upper", "mixed"]
    assert table.precision.tolist() == [1, 0.25] and table.recall.tolist() == [0.5, 0.125]
    assert table.precision_random.tolist() == [0.5, 0.5] and table.recall_random.tolist() == [0.25, 0.25]

    monkeypatch.setattr(training_free, "COUNTED", 4)  # of some images alone: masks and kept patches of the same
    masks = np.zeros((9, 12, 12), dtype=bool)
    for image in range(9):
        masks[image, 0, image] = True  # in one of three patches
    images = replace(start.images, test=replace(start.images.test, masks=masks))
    sets = {"one": [torch.tensor([image // 3]) for image in evaluate.evenly(9, 4)]}
    assert len(training_free.kept_in({"one": TopK(start.vit, 0.5)}, images)["one"]) == 4
    assert training_free.foreground(sets, start._replace(images=images)).precision.tolist() == [1]


def test_measure_of_a_pruner(start, make_run):
    run, pruner = make_run(), TopK(start.vit, 0.25, [0])
    result, dense = training_free.measure(run, start, pruner, latency_batch=2)
    scores, predicted = evaluate.test(pruner, start.images)
    whole, answers = evaluate.test(start.vit, start.images)
    assert {name: result[name] for name in scores} == scores and dense == whole
    assert result["dense_top1"] == whole["top1"] and result["dense_macs_g"] == whole["macs_g"] > result["macs_g"]
    assert result["agreement"] == training_free.agreement(predicted, answers)
    assert result["tokens"] == [5] * 4 and {"speedup", "ceiling", "share_of_ceiling", "latency_ms"} <= result.keys()
    assert result["share_of_ceiling"] == pytest.approx(result["speedup"] / result["ceiling"], abs=0.01)
    with np.load(run.dir / "test.npz") as arrays:
        assert np.array_equal(arrays["logits"], predicted.logits) and arrays["labels"].tolist() == [0, 1, 2] * 3
    assert models.load(run.dir / "model.safetensors").arguments == pruner.arguments
    assert models.header(run.dir)["metadata"] == json.loads(json.dumps(start.about))


def test_measure_of_the_whole_model(start, make_run):
    run = make_run()
    result, dense = training_free.measure(run, start, start.vit, latency_batch=2)
    facts = {"dense_top1": dense["top1"], "dense_macs_g": dense["macs_g"], "agreement": 1.0}
    assert result == dense | facts, "no speed-up of a model over itself"
    assert not isinstance(models.load(run.dir), TokenPruner)


def test_a_model_that_was_cut_before_is_said_in_the_setting(start, tmp_path):
    assert training_free.setting(start, "0.5 GMACs") == "0.5 GMACs"
    small = surgery.remove(start.vit, surgery.Plan(heads=[[0], None, None, None]))
    path = models.save(small, tmp_path / "small", **start.about)
    for cut in (small, models.load(path)):
        assert training_free.setting(start._replace(vit=cut), "0.5 GMACs") == "0.5 GMACs, on fewer parts"


def test_random_tokens_are_told_from_random_sets_and_parts():
    found = [training_free.label({"method": method, "finetune_epochs": epochs})
             for method, epochs in (("random", 0), ("random", 1), ("topk", 0), ("tome", 2))]  # fmt: skip
    assert found == ["random tokens", "random tokens-tuned", "topk", "tome-tuned"]
