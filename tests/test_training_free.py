"""Token methods on a trained model as it is: built by rules or to a price, and measured."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from lib import evaluate, models, params, runs, training_free
from lib.evaluate import Predictions
from lib.pruners import surgery
from lib.pruners.baselines import ToMe, TopK
from lib.pruners.dropping import predicted_macs
from lib.pruners.tokens import TokenPruner
from lib.starts import Start

RULES = {"method": "topk", "keep_ratio": 0.5, "blocks": [], "r": 2, "k_anchors": 0.1, "top_m": 0.4, "alpha": 0.3,
         "start_block": 1, "normalise_scores": "minmax", "macs_g": 0.0, "seed": 0}  # fmt: skip
SHAPE = (3, 12, 12)
quiet = pytest.mark.filterwarnings("ignore:k_anchors")  # a search for a ceiling tries to drop nothing, too


def untrained(tiny) -> Start:
    """Four blocks on 16 patches."""
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **{**TINY, "depth": 4}).eval()
    about = {"data": {"dataset": "tiny"}, "normalise": "data", "classes": tiny.classes}
    return Start("", vit, tiny, about)


@pytest.fixture
def start(tiny) -> Start:
    return untrained(tiny)


@pytest.mark.parametrize(
    ("rules", "kind", "arguments"),
    [({}, "TopK", {"keep_ratio": 0.5, "blocks": [1, 2, 3]}),
     ({"method": "evit", "blocks": [0, 2], "keep_ratio": 0.25}, "EViT", {"keep_ratio": 0.25, "blocks": [0, 2]}),
     ({"keep_ratio": 0.3}, "TopK", {"keep_ratio": 0.3, "blocks": [1, 2, 3]}),
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


def refused(folder, notebook, check, values, fault):
    """A run of this notebook with these values is refused with this fault, or where it is "", is not."""
    declaration = params.declared_in(Path(training_free.__file__).parents[1] / "notebooks" / f"{notebook}.ipynb")
    values = params.check(declaration, {"output_dir": str(folder), "run_name": "run", **values})
    run = runs.Run(notebook, declaration, values)
    if fault:
        with pytest.raises(params.ParameterError, match=f"^{re.escape(fault)}: leave it out$"):
            check(run)
    else:
        check(run)
    run.close()


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
    refused(tmp_path, "token_baselines", training_free.check, values, fault)


def test_a_price_is_met_by_merging_in_some_blocks_only(start):
    whole = predicted_macs(ToMe(start.vit, 0))
    for method in ("tome", "ward"):
        pruner = training_free.build(start.vit, RULES | {"merge_every": 2}, method, 0.75 * whole)
        r = pruner.rs
        assert r[1] == r[3] == 0 and r[0] and abs(r[0] - r[2]) <= 1
        milder = training_free.MERGING[method].of_total(start.vit, sum(r) - 1, 2)
        assert predicted_macs(pruner) <= 0.75 * whole < predicted_macs(milder)


@quiet
@pytest.mark.parametrize("method", training_free.METHODS)
@pytest.mark.parametrize("ceiling", [1.15, 1.5, 2.0])
def test_under_a_ceiling_is_the_mildest_below(start, method, ceiling):
    whole = evaluate.macs(start.vit, SHAPE)["macs_g"]
    found = training_free.build(start.vit, RULES, method, whole / ceiling)
    assert predicted_macs(found) <= whole / ceiling
    assert 0.85 * whole / ceiling < evaluate.macs(found, SHAPE)["macs_g"] < 1.02 * whole / ceiling
    with pytest.raises(ValueError, match=r"macs_g is 5: expected less than the .* GMACs of the model as it is"):
        training_free.build(start.vit, RULES | {"macs_g": 5.0, "method": method})
    named = training_free.build(start.vit, RULES | {"macs_g": whole / ceiling, "method": method})
    assert named.arguments == found.arguments and named.counts() == found.counts()
    if method == "anchors":
        kept = found.k + found.m
        assert found.counts()[1] == [17, *[1 + kept] * 3] and found.k == max(1, round(0.2 * kept)), "0.1 to 0.4"


@pytest.mark.parametrize(
    ("share", "kept", "expected"),
    [(0.2, 10, (2, 8)), (0.0, 10, (1, 9)), (1.0, 10, (9, 1)), (0.5, 0, (1, 1)), (0.9, 2, (1, 1)), (0.34, 3, (1, 2))],
)
def test_kept_patches_are_parted(share, kept, expected):
    assert training_free.parted(share, kept) == expected


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"latency_batch": 8}, "latency_batch is 8, but enable_pruning is off"),
     ({"alpha": 0.1, "shares": []}, "alpha is 0.1, but enable_pruning is off and nothing is varied"),
     ({"alpha": 0.1}, ""), ({}, ""), ({"latency_batch": 8, "enable_pruning": True}, "")],
)  # fmt: skip
def test_without_pruning_clip_refuses_what_nothing_uses(tmp_path, values, fault):
    values = {"enable_pruning": False, "shares": [0.5]} | values
    refused(tmp_path, "clip_zeroshot", training_free.check_anchors, values, fault)


def test_agreement_by_hand():
    labels = torch.tensor([0, 1, 1, 0])
    ours = Predictions(torch.tensor([[2.0, 1], [0, 3], [5, 1], [1, 0]]), labels)
    theirs = Predictions(torch.tensor([[9.0, 1], [8, 3], [0, 1], [1, 0]]), labels)
    assert training_free.agreement(ours, theirs) == 0.5 and training_free.agreement(ours, ours) == 1


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
