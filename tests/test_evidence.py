"""How sure a comparison is: tests, hypervolumes, calibration, ceilings and kept patches, against direct computation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import TINY
from scipy import stats
from test_finished import run as make_run

from lib import compare, evaluate, evidence, finished, models
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.baselines import EViT, RandomDrop, ToMe, TopK
from lib.pruners.dropping import FirstTokens
from lib.pruners.tokens import FixedPatches, TokenPruner
from lib.pruners.ucb import UCB


def four_blocks(**overrides) -> torch.nn.Module:
    """Four blocks on 16 patches, whose attention prefers some patches to others."""
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **{**TINY, "depth": 4, **overrides}).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 20
    return vit


# significance

ANSWERED = {  # method: (GMACs, share of 200 answers that are right)
    "dense": (1.0, 0.85),
    "dense-tuned": (1.0, 0.85),
    "ucb": (0.5, 0.8),
    "random": (0.485, 0.7),
    "random parts": (0.51, 0.6),
    "random-tuned": (0.736, 0.8),  # 5.1 % of 0.7, and 4.9 % of 0.736
    "tome": (0.7, 0.9),
}


def answers(folder: Path, name: str, method: str, right: np.ndarray, **more) -> None:
    """A finished run that gives the right answer where `right` is true."""
    made = make_run(folder, f"a/{name}", method, ratio=ANSWERED[method][0], **more)
    np.savez(made / "test.npz", logits=np.eye(2)[np.where(right, 0, 1)], labels=np.zeros(len(right), dtype=int))


@pytest.fixture
def answered(tmp_path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table of these runs, and which of their first seeds' answers are right."""
    rng = np.random.default_rng(0)
    right = {method: rng.random(200) < share for method, (_, share) in ANSWERED.items()}
    right["dense-tuned"] = right["dense"]
    for method, each in right.items():
        answers(tmp_path, method.replace(" ", "_"), method, each)
    answers(tmp_path, "ucb_again", "ucb", ~right["ucb"], seed=1)
    table, _ = finished.runs(tmp_path / "*/*")
    return table, {f"{method} {ANSWERED[method][0]:g}": each for method, each in right.items()}


def direct(ours: np.ndarray, theirs: np.ndarray) -> float:
    """McNemar's exact p: as many heads in as many throws as answers differ."""
    only, other = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return stats.binomtest(only, only + other).pvalue if only + other else 1.0


def test_of_random_arms_at_one_cost_the_one_tuned_alike_is_what_an_arm_has_to_beat(tmp_path):
    for method in ("dense", "random tokens", "random tokens-tuned", "topk", "topk-tuned"):
        for seed in (0, 1):
            make_run(tmp_path, f"a/{method}{seed}", method, ratio=0.5, seed=seed)
    table, _ = finished.runs(tmp_path / "*/*")
    found = evidence.significance(table, "dense").set_index("arm").random
    assert found["topk 0.5"] == found["dense 0.5"] == "random tokens 0.5"
    assert found["topk-tuned 0.5"] == "random tokens-tuned 0.5"
    assert found[["random tokens 0.5", "random tokens-tuned 0.5"]].isna().all()


def test_what_is_trained_has_to_beat_trained_random_choices(tmp_path):
    """By what runs did, whatever their method is called: most that train are not named tuned."""
    tuned, left = {"params": {"finetune_epochs": 2}}, {"params": {"finetune_epochs": 0}}
    make_run(tmp_path, "dense/one", "dense", ratio=1.0)
    make_run(tmp_path, "ucb_stage2/ucb", "ucb", ratio=0.5)
    make_run(tmp_path, "ucb_stage2/random", "random", ratio=0.51)
    make_run(tmp_path, "token_baselines/blind", "random tokens", ratio=0.49, **left)
    make_run(tmp_path, "token_baselines/tome", "tome", ratio=0.505, **left)
    make_run(tmp_path, "avit/avit", "avit-finetuned", ratio=0.495)
    make_run(tmp_path, "acdc/cut", "acdc", ratio=0.5, **tuned)
    make_run(tmp_path, "acdc/cut-alone", "acdc cut", ratio=0.5, **left)
    make_run(tmp_path, "clip_zeroshot/anchors", "anchors", ratio=0.5)
    table, _ = finished.runs(tmp_path / "*/*")
    found = evidence.significance(table, "dense").set_index("arm").random
    trained, as_is = "random 0.51", "random tokens 0.49"
    assert {found["ucb 0.5"], found["avit-finetuned 0.495"], found["acdc 0.5"]} == {trained}
    assert {found["tome 0.505"], found["acdc cut 0.5"], found["anchors 0.5"]} == {as_is}


def test_random_parts_are_for_what_has_as_few_parts(tmp_path):
    parameters = {"dense": 5.5, "tome": 5.5, "random tokens-tuned": 5.5, "acdc": 2.4, "random parts": 2.8}
    for method, millions in parameters.items():
        path = make_run(tmp_path, f"a/{method}", method, ratio=0.5) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"params_m": millions}))
    table, _ = finished.runs(tmp_path / "*/*")
    found = evidence.significance(table, "dense").set_index("arm").random
    assert found["acdc 0.5"] == "random parts 0.5" and found["tome 0.5"] == "random tokens-tuned 0.5"


def test_first_seeds_are_tested_in_pairs_against_the_baseline(answered):
    table, right = answered
    rows = evidence.significance(table, "dense").set_index("arm")
    assert {*rows.index} == {*right}
    for arm, row in rows.iterrows():
        assert row.p == pytest.approx(direct(right[arm], right["dense 1"]), rel=1e-9), arm
        found = evaluate.paired_bootstrap(right[arm], right["dense 1"])
        assert [row.difference, row.low, row.high] == [found[key] for key in ("difference", "ci95_low", "ci95_high")]
        assert row.difference == pytest.approx(right[arm].mean() - right["dense 1"].mean())
        assert row.low < row.difference < row.high or row.low == row.high == 0 == row.difference
    assert rows.p["dense-tuned 1"] == 1 and rows.difference["dense-tuned 1"] == 0
    assert rows.p["random parts 0.51"] < 0.001 < rows.p["ucb 0.5"], "these data tell arms apart, and not all"


def test_holm_is_by_hand_and_leaves_the_baseline_out(answered):
    rows = evidence.significance(answered[0], "dense").set_index("arm")
    assert np.isnan(rows.p_holm["dense 1"]) and [*rows.columns].index("p_holm") == [*rows.columns].index("p") + 1
    least = 0.0
    for place, (arm, p) in enumerate(rows.p.drop("dense 1").sort_values().items()):
        least = max(least, min(1.0, (6 - place) * p))
        assert rows.p_holm[arm] == pytest.approx(least), arm
    assert (rows.p_holm.drop("dense 1") > rows.p.drop("dense 1")).sum() >= 4, "these data need correcting"


def test_random_choices_are_those_of_the_nearest_cost_within_5_percent(answered):
    table, right = answered
    rows = evidence.significance(table, "dense").set_index("arm")
    assert {arm: twin for arm, twin in rows.random.items() if isinstance(twin, str)} == {"ucb 0.5": "random parts 0.51"}
    row, pair = rows.loc["ucb 0.5"], (right["ucb 0.5"], right["random parts 0.51"])
    found = evaluate.paired_bootstrap(*pair)
    against = [row[f"{name}_random"] for name in ("difference", "low", "high")]
    assert against == [found[key] for key in ("difference", "ci95_low", "ci95_high")]
    assert row.p_random == pytest.approx(direct(*pair), rel=1e-9) and row.low_random > 0
    assert rows.drop("ucb 0.5").filter(like="_random").isna().all(axis=None)


def test_the_baseline_may_be_an_arm_or_alone(answered):
    table, right = answered
    rows = evidence.significance(table, "tome 0.7").set_index("arm")
    assert rows.p["dense 1"] == pytest.approx(direct(right["dense 1"], right["tome 0.7"]), rel=1e-9)
    assert np.isnan(rows.p_holm["tome 0.7"]) and rows.p_holm["dense 1"] > 0
    row, *others = compare.records(evidence.significance(table[table.arm == "dense 1"], "dense"))
    assert row["p"] == 1 and row["p_holm"] is None and row["random"] is None and not others


# volumes


def method_rows(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["method", "macs_g", "top1"]).assign(arm=lambda t: t.method + t.index.astype(str))


def test_volumes_are_rectangles_by_hand():
    summary = method_rows(
        *[("dense", 2.0, 0.8), ("ucb", 0.5, 0.6), ("ucb", 1.0, 0.7), ("ucb", 1.5, 0.65), ("perfect", 0.0, 1.0)],
        *[("dear", 3.0, 0.99), ("blind", 0.1, 0.1), ("mixed", 0.5, 0.6), ("mixed", 2.5, 0.9), ("mixed", 0.1, 0.15)],
    )
    found = evidence.volumes(summary, "top1", "dense0", 5)
    assert found.volume.is_monotonic_decreasing and found.method[0] == "perfect" and found.method[1] == "ucb"
    found, whole = found.set_index("method"), 2.0 * (1 - 1 / 5)
    expected = {"perfect": whole, "ucb": 0.5 * 0.4 + 1.0 * 0.5, "mixed": 1.5 * 0.4, "dense": 0, "dear": 0, "blind": 0}
    assert found.volume.to_dict() == pytest.approx({method: area / whole for method, area in expected.items()})
    assert found.arms.to_dict() == {"perfect": 1, "ucb": 3, "mixed": 3, "dense": 1, "dear": 1, "blind": 1}
    assert found.loc["mixed", ["cheapest", "best"]].tolist() == [0.1, 0.9]


def test_chance_is_fivefold_where_five_answers_count():
    summary = method_rows(("dense", 2.0, 0.9), ("ucb", 1.0, 0.75), ("blind", 0.5, 0.5)).rename(columns={"top1": "top5"})
    found = evidence.volumes(summary, "top5", "dense0", 10).set_index("method").volume
    assert found.to_dict() == pytest.approx({"ucb": 1.0 * 0.25 / (2.0 * 0.5), "dense": 0, "blind": 0})


# calibration


class Pixel(torch.nn.Module):
    """Answers by the brightness of one pixel: often right, and `sure` of it."""

    def __init__(self, sure: float):
        super().__init__()
        self.sure = torch.nn.Parameter(torch.tensor(sure))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -self.sure * (images[:, :1, 5, 5] - torch.tensor([-1.0, 0.0, 1.0])) ** 2


@pytest.fixture
def calibrating(tiny, tmp_path):
    """Two arms, one with a second seed, and their images: 24 for validation."""
    images = replace(tiny, val=tiny.train)
    shown, rows = {"sure": Pixel(9.0), "shy": Pixel(0.2)}, []
    for name, arm, model in (
        ("sure0", "sure", shown["sure"]),
        ("sure1", "sure", Pixel(3.0)),
        ("shy0", "shy", shown["shy"]),
    ):
        scores, predicted = evaluate.test(model, images, count_on=evaluate.batch(images, 1))
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(scores))
        np.savez(tmp_path / name / "test.npz", logits=predicted.logits, labels=predicted.labels)
        rows.append({"arm": arm, "run": str(tmp_path / name)})
    return pd.DataFrame(rows), shown, images


def test_calibration_is_fitted_on_validation_and_measured_on_test(calibrating):
    table, shown, images = calibrating
    rows = evidence.calibration(table, shown, images).set_index("arm")
    assert [*rows.index] == ["sure", "shy"] and rows.temperature["sure"] > 1 > rows.temperature["shy"]
    for arm, row in rows.iterrows():
        seen = evaluate.predict(shown[arm], images.val, mean=images.mean, std=images.std)
        assert row.temperature == evaluate.temperature(seen.logits, seen.labels)
        run = table.run[table.arm == arm].iloc[0]
        said, (logits, labels) = finished.read(run, "metrics"), map(torch.from_numpy, finished.predictions(run))
        assert [row.ece, row.nll_nats] == [said["ece"], said["nll_nats"]]
        scaled = evaluate.classification(logits / row.temperature, labels)
        assert [row.ece_scaled, row.nll_nats_scaled] == [scaled["ece"], scaled["nll_nats"]]
    assert rows.nll_nats_scaled["sure"] < rows.nll_nats["sure"]


def test_temperatures_do_not_know_the_test_images(calibrating):
    table, shown, images = calibrating
    before = evidence.calibration(table, shown, images)
    for run in table.run:
        logits, labels = finished.predictions(run)
        np.savez(Path(run) / "test.npz", logits=logits, labels=(labels + 1) % 3)
    test = replace(images.test, images=255 - images.test.images, labels=(images.test.labels + 1) % 3)
    after = evidence.calibration(table, shown, replace(images, test=test))
    assert after.temperature.equals(before.temperature) and (after.nll_nats != before.nll_nats).all()
    val = replace(images.val, labels=(images.val.labels + 1) % 3)
    moved = evidence.calibration(table, shown, replace(images, val=val))
    assert (moved.temperature != before.temperature).all(), "but they do know those of validation"


def test_without_validation_images_nothing_is_calibrated(calibrating):
    table, shown, images = calibrating
    found = evidence.calibration(table, shown, replace(images, val=images.val.take(np.arange(0))))
    assert len(found) == 0 and compare.records(found) == []


# ceilings


def test_ceilings_of_fixed_counts_are_those_counts(tiny_images):
    vit = four_blocks()
    shown = {"topk": TopK(vit, [0.5, 0.5], [1, 2]), "evit": EViT(vit, 0.25, [1]), "tome": ToMe(vit, [3, 2, 0, 1]),
             "anchors": Anchors(vit, k_anchors=2, top_m=3, start_block=2)}  # fmt: skip
    by_hand = {"topk": [17, 9, 5, 5], "evit": [17, 6, 6, 6], "tome": [14, 12, 12, 11], "anchors": [17, 17, 6, 6]}
    found, batch = evidence.ceilings(shown, tiny_images), evaluate.batch(tiny_images, 4)
    assert {name: model.mlp_counts for name, model in found.items()} == by_hand
    for name, model in found.items():
        assert type(model) is FirstTokens and model.vit is vit and not model.training, name
        assert model.mlp_counts == shown[name].counts()[1]
        with torch.no_grad():
            assert model(batch).shape == (4, 3) and model(batch).isfinite().all()
        assert [ids.shape[1] + 1 for ids in model.trace(batch).kept] == by_hand[name]


def halting(vit: torch.nn.Module, **settings) -> AViT:
    """A-ViT whose patches halt after different numbers of blocks."""
    with torch.no_grad():
        vit.patch_embed.proj.weight[0] *= 20
    return AViT(vit, gate_scale=5.0, mode="gather", **settings).eval()


def test_the_ceiling_of_adaptive_depth_runs_the_mean_number_of_tokens(tiny_images):
    model = halting(four_blocks(), gate_center=1.0)
    tokens = evaluate.traces(model, tiny_images).tokens.double()  # (images, blocks)
    assert (tokens.std(dim=0) > 0).any(), "images differ"
    found = evidence.ceilings({"avit": model}, tiny_images)["avit"]
    assert found.mlp_counts == [1 + round(mean) for mean in tokens.mean(dim=0).tolist()]
    assert found.mlp_counts[0] == 17 > found.mlp_counts[-1] and found.mlp_counts == sorted(found.mlp_counts)[::-1]
    with torch.no_grad():
        assert found(evaluate.batch(tiny_images, 4)).isfinite().all()


def test_a_ceiling_keeps_a_token_where_all_images_have_left(tiny_images):
    vit = four_blocks(class_token=False, global_pool="avg")
    found = evidence.ceilings({"avit": halting(vit, gate_center=-1e3)}, tiny_images)["avit"]
    assert found.mlp_counts == [16, 1, 1, 1]
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=12, patch_size=3, num_classes=3, depth=3)
    two = evidence.ceilings({"avit": halting(distilled.eval(), gate_center=-1e3)}, tiny_images)["avit"]
    assert two.mlp_counts == [18, 2, 2], "its head reads two tokens"
    with torch.no_grad():
        for ceiling in (found, two):
            assert ceiling(evaluate.batch(tiny_images, 4)).isfinite().all()


class Fickle(TokenPruner):
    """Keeps 3 and 5 patches of every other image in one block, more in the next, and fewer in those that follow."""

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        counts = torch.tensor([(3, 5), (7, 9), (2, 2), (5, 5)])
        return 1 + counts[:, torch.arange(len(images)) % 2]


def test_counts_of_a_ceiling_never_rise(tiny_images, monkeypatch):
    monkeypatch.setattr(evidence, "LOOKED_AT", 8)
    assert evidence.ceilings({"a": Fickle(four_blocks())}, tiny_images)["a"].mlp_counts == [1 + 4, 1 + 4, 1 + 2, 1 + 2]


def test_what_chooses_nothing_is_its_own_ceiling(tiny_images):
    shown = {
        "dense": four_blocks(),
        "ucb while it learns": UCB(four_blocks(), 0.5),
        "frozen": FixedPatches(four_blocks(), [0, 5, 6]),
        "resnet": models.create("resnet20", 3),
    }
    assert evidence.ceilings(shown, tiny_images) == {}
    on_frozen = evidence.ceilings(shown | {"both": TopK(shown["frozen"].vit, 0.5, [0])}, tiny_images)
    assert {name: model.mlp_counts for name, model in on_frozen.items()} == {"both": [3, 3, 3, 3]}


# kept patches


@pytest.fixture
def tiny_images(tiny):
    """Images with the foreground at another place in each."""
    masks = np.zeros((9, 12, 12), dtype=bool)
    for image in range(9):
        masks[image, image : image + 3, 2 : 3 + image] = True
    return replace(tiny, test=replace(tiny.test, masks=masks))


def pruners() -> dict[str, torch.nn.Module]:
    vit = four_blocks()
    return {"dense": vit, "topk": TopK(vit, 0.5, [1, 2]), "tome": ToMe(vit, 2), "random": RandomDrop(vit, 0.25, [1]),
            "frozen": FixedPatches(four_blocks(), [0, 5, 6])}  # fmt: skip


@pytest.mark.parametrize("looked_at", [256, 4])
def test_where_patches_stay_is_what_sets_say(tiny_images, monkeypatch, looked_at):
    monkeypatch.setattr(evidence, "LOOKED_AT", looked_at)
    shown, chosen = pruners(), range(9) if looked_at > 9 else (0, 2, 5, 8)
    foreground, overlaps = evidence.where(shown, tiny_images, (4, 4))
    assert foreground.arm.tolist() == [*overlaps.index] == [*overlaps.columns] == ["topk", "random", "frozen"]
    x = evaluate.batch(tiny_images, len(chosen))
    sets = {name: [{*ids.tolist()} for ids in shown[name].trace(x).kept[-1]] for name in overlaps}
    touched = []  # patches of 3 x 3 pixels that hold any foreground
    for image in chosen:
        rows, columns = np.nonzero(tiny_images.test.masks[image])
        touched.append({4 * (row // 3) + column // 3 for row, column in zip(rows, columns, strict=True)})
    for row in foreground.itertuples():
        pairs = [*zip(sets[row.arm], touched, strict=True)]
        assert row.precision == pytest.approx(np.mean([len(kept & there) / len(kept) for kept, there in pairs]))
        assert row.recall == pytest.approx(np.mean([len(kept & there) / len(there) for kept, there in pairs]))
        assert row.precision_random == pytest.approx(np.mean([len(there) / 16 for there in touched]))
        assert row.recall_random == pytest.approx({"topk": 4, "random": 4, "frozen": 3}[row.arm] / 16)
    both = [len(a & b) / len(a | b) for a, b in zip(sets["topk"], sets["frozen"], strict=True)]
    assert overlaps.topk.frozen == pytest.approx(np.mean(both)) and 0 < overlaps.topk.frozen < 1
    assert np.array_equal(overlaps, overlaps.T) and np.array_equal(np.diag(overlaps), np.ones(3))


def test_without_masks_there_is_no_foreground_but_an_overlap(tiny):
    foreground, overlaps = evidence.where(pruners(), tiny, (4, 4))
    assert len(foreground) == 0 and compare.records(foreground) == [] and overlaps.shape == (3, 3)
    foreground, overlaps = evidence.where({"dense": pruners()["dense"]}, tiny, (1, 1))
    assert len(foreground) == len(overlaps) == 0
