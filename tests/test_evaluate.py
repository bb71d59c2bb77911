"""lib.evaluate against hand-computed cases, scikit-learn, brute force, and torch's own operation counter."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

from lib import costs, evaluate
from lib.evaluate import (
    batch,
    classification,
    closed_form_macs,
    confusion,
    correlation,
    foreground,
    hypervolume,
    latency,
    macs,
    mcnemar,
    mean_ci,
    overlap,
    overlaps,
    paired_bootstrap,
    pareto,
    predict,
    temperature,
    traces,
    vit_macs,
)
from lib.pruners.avit import AViT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def tiny_vit(**kwargs):
    import timm  # here and below after lib, which heals a torchvision that doesn't match torch

    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 7,
    }
    return timm.models.VisionTransformer(**settings | kwargs)


def random_predictions(n=500, num_classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes - 1, (n,), generator=generator)  # the last class never occurs
    logits = 2 * torch.randn(n, num_classes, generator=generator)
    logits[range(n), labels] += 1.5
    return logits, labels


# predict


class Recorder(nn.Module):
    """Answers with each image's channel means, so that what reached the model can be read off the logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen, self.modes = nn.Dropout(0.5), []

    def forward(self, images):
        assert images.shape[1:] == (3, 8, 6)
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return images.mean((2, 3)) * self.scale


class Lazy:
    """Like an h5py dataset: has a length and slices, nothing else."""

    def __init__(self, array):
        self.array, self.slices = array, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        assert isinstance(index, slice)
        self.slices.append(index)
        return self.array[index]


def test_predict_scales_normalises_and_keeps_the_order():
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)
    images.flags.writeable = False
    split = SimpleNamespace(images=Lazy(images), labels=np.arange(10, dtype=np.uint8))
    model = Recorder().train()
    model.frozen.eval()
    logits, labels = predict(model, split, mean=MEAN, std=STD, batch_size=4)
    expected = (images / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(logits, expected.mean((1, 2)), atol=1e-5)
    assert labels.tolist() == list(range(10)) and labels.dtype == torch.int64
    assert logits.dtype == torch.float32 and not logits.is_inference()
    assert len(split.images.slices) == 3 and model.modes == [(False, True)] * 3
    assert model.training and not model.frozen.training  # each flag is its own again


def test_predict_restores_flags_when_the_model_fails():
    model = nn.Linear(2, 2)
    split = SimpleNamespace(images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
    with pytest.raises(RuntimeError):
        predict(model, split, mean=MEAN, std=STD)
    assert model.training


def test_predict_in_bf16_is_near_fp32():
    split = SimpleNamespace(
        images=np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), labels=[0] * 4
    )
    exact, rough = (predict(tiny_vit(), split, mean=MEAN, std=STD, precision=p).logits for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "images, labels, kwargs, message",
    [
        (np.zeros((0, 4, 4, 3), np.uint8), [], {}, "found 0 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1], {}, "found 2 images, 1 labels"),
        (np.zeros((2, 4, 4, 3)), [0, 1], {}, "found torch.float64"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], {}, r"expected uint8 .N, H, W, C."),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            [0, 1],
            {"precision": "int4"},
            "found 'int4', expected one of fp32",
        ),
    ],
)
def test_predict_refuses_bad_splits(images, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        predict(Recorder(), SimpleNamespace(images=images, labels=labels), mean=MEAN, std=STD, **kwargs)


# classification


def test_classification_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.25, 0.35, 0.4]], dtype=torch.float64)
    result = classification(p.log(), torch.tensor([0, 1, 1, 2]), classes=["a", "b", "c"], topk=(1, 2, 5))
    assert result.pop("per_class_accuracy") == {"a": 1.0, "b": 0.5, "c": 1.0}
    entropy = -(p * p.log()).sum(1).mean().item()
    brier = (0.09 + 0.04 + 0.01) + (0.01 + 0.16 + 0.09) + (0.25 + 0.49 + 0.04) + (0.0625 + 0.1225 + 0.36)
    assert result == pytest.approx(
        {
            "n": 4,
            "top1": 0.75,
            "top2": 1.0,
            "precision_macro": (1 / 2 + 1 + 1) / 3,
            "recall_macro": (1 + 1 / 2 + 1) / 3,
            "f1_macro": (2 / 3 + 2 / 3 + 1) / 3,
            "confidence": (0.7 + 0.6 + 0.5 + 0.4) / 4,
            "confidence_correct": (0.7 + 0.6 + 0.4) / 3,
            "confidence_incorrect": 0.5,
            "confidence_gap": (0.7 + 0.6 + 0.4) / 3 - 0.5,
            "entropy_nats": entropy,
            "nll_nats": -math.log(0.7 * 0.6 * 0.3 * 0.4) / 4,
            "brier": brier / 4,
            "ece": (0.3 + 0.4 + 0.5 + 0.6) / 4,  # four bins of one image each
        },
        abs=1e-6,
    )


def test_classification_agrees_with_scikit_learn():
    from sklearn import metrics as sk

    logits, labels = random_predictions()
    result, y, p = classification(logits, labels), labels.numpy(), logits.double().softmax(1).numpy()
    preds, confidence = p.argmax(1), p.max(1)
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
    ):
        expected = score(y, preds, average="macro", zero_division=0)
        assert result[f"{name}_macro"] == pytest.approx(expected, abs=1e-6)
    assert result["top1"] == sk.accuracy_score(y, preds)
    assert result["top5"] == sk.top_k_accuracy_score(y, p, k=5, labels=range(6))
    assert result["nll_nats"] == pytest.approx(sk.log_loss(y, p, labels=range(6)))
    assert result["brier"] == pytest.approx(((p - np.eye(6)[y]) ** 2).sum(1).mean())
    assert (confusion(logits, labels, 6) == sk.confusion_matrix(y, preds, labels=range(6))).all()
    recalls = sk.recall_score(y, preds, average=None, labels=range(5))
    assert list(result["per_class_accuracy"].values()) == pytest.approx([*recalls, None])
    ece = 0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs((preds == y)[inside].mean() - confidence[inside].mean())
    assert result["ece"] == pytest.approx(ece, abs=1e-6)


def test_many_images_are_as_their_parts():
    """The work is cut into pieces of 4096 rows: nothing may be lost at the seams."""
    logits, labels = random_predictions(n=5000)
    whole, first, rest = (classification(logits[s], labels[s]) for s in (slice(None), slice(4096), slice(4096, None)))
    for key in ("top1", "nll_nats", "brier", "entropy_nats", "confidence"):
        assert whole[key] == pytest.approx((4096 * first[key] + 904 * rest[key]) / 5000)


def test_undefined_is_none_and_json_never_sees_nan():
    right = classification(10 * torch.eye(3), torch.arange(3))
    assert right["confidence_incorrect"] is right["confidence_gap"] is None and right["top1"] == 1
    wrong = classification(10 * torch.eye(3)[[0, 2, 0]], torch.tensor([1, 1, 1]))
    assert wrong["confidence_correct"] is wrong["confidence_gap"] is None and wrong["top1"] == 0
    assert wrong["per_class_accuracy"] == {"0": None, "1": 0.0, "2": None}
    saturated = classification(torch.tensor([[3e38, -3e38], [-3e38, 3e38]]), torch.tensor([0, 0]))
    for result in (right, wrong, saturated):
        json.dumps(result, allow_nan=False)


def test_ties_rank_the_lower_class_first():
    """A collapsed model (equal logits) answers class 0: top-k counts just the labels below k."""
    result = classification(torch.zeros(10, 10), torch.arange(10))
    assert (result["top1"], result["top5"]) == (0.1, 0.5)
    assert "top5" not in classification(torch.zeros(3, 3), torch.arange(3))


@pytest.mark.parametrize(
    "logits, labels, message",
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "N ≥ 1"),
        (torch.zeros(2, 3), torch.tensor([0]), "labels .1,."),
        (torch.zeros(2), torch.tensor([0, 1]), "logits .2,."),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "found 0 … 3, expected 0 … 2"),
        (torch.tensor([[0.0, float("nan")], [0, 0]]), torch.tensor([0, 1]), "1 of 2 rows"),
        (torch.tensor([[0.0, float("inf")]]), torch.tensor([0]), "NaN or infinity"),
    ],
)
def test_bad_predictions_are_refused_in_one_line(logits, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        classification(logits, labels)
    assert "\n" not in str(error.value)


def test_wrong_class_names_are_refused():
    for classes in (["a", "b"], ["a", "a", "b"], ["a", "b", "c", "c"]):
        with pytest.raises(ValueError, match="expected 3"):
            classification(torch.zeros(2, 3), torch.tensor([0, 1]), classes=classes)


# cost


@pytest.mark.parametrize(
    "arch, gmacs, digits",
    [
        ("deit_tiny_patch16_224", 1.25, 2),
        ("deit_small_patch16_224", 4.60, 2),
        ("vit_base_patch16_224", 17.6, 1),
        ("vit_large_patch16_224", 61.6, 1),
    ],
)
def test_counted_macs_are_the_closed_form_exactly(arch, gmacs, digits):
    import timm

    with torch.device("meta"):
        vit = timm.create_model(arch)
    counted, exact = macs(vit, (3, 224, 224)), closed_form_macs(vit)
    assert counted["macs_g"] * 1e9 == pytest.approx(exact, rel=1e-14)
    assert round(exact / 1e9, digits) == gmacs
    assert counted["params_m"] * 1e6 == sum(p.numel() for p in vit.parameters())
    assert vit.training


@pytest.mark.parametrize(
    "kwargs",
    [
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"num_classes": 0},
        {"mlp_ratio": 1.5, "in_chans": 1, "qk_norm": True, "init_values": 0.1},
    ],
)
def test_closed_form_holds_across_the_family(kwargs):
    vit = tiny_vit(**kwargs)
    counted = macs(vit, (kwargs.get("in_chans", 3), 32, 32))["macs_g"]
    assert counted * 1e9 == pytest.approx(closed_form_macs(vit), rel=1e-14)


def test_closed_form_serves_uneven_parts_and_tokens():
    """One head and ten neurons gone from block 1; tokens leaving between attention and MLP of block 0."""
    vit = tiny_vit()
    attn, mlp = vit.blocks[1].attn, vit.blocks[1].mlp
    attn.qkv, attn.proj = nn.Linear(48, 96), nn.Linear(32, 48)
    attn.num_heads, attn.attn_dim = 2, 32
    mlp.fc1, mlp.fc2 = nn.Linear(48, 182), nn.Linear(182, 48)
    counted = macs(vit, (3, 32, 32))["macs_g"]
    assert counted * 1e9 == pytest.approx(closed_form_macs(vit), rel=1e-14)
    exact = vit_macs(
        [17, 9], 48, [48, 32], [192, 182], embed_patches=16, patch_dim=192, num_classes=7, mlp_tokens=[9, 9]
    )
    blocks = 4 * 17 * 48 * 48 + 2 * 17 * 17 * 48 + 2 * 9 * 48 * 192
    blocks += 4 * 9 * 48 * 32 + 2 * 9 * 9 * 32 + 2 * 9 * 48 * 182
    assert exact == blocks + 16 * 192 * 48 + 48 * 7
    with pytest.raises(ValueError):
        vit_macs([17], 48, [48, 48], [192], embed_patches=16, patch_dim=192, num_classes=7)


def test_macs_of_images_and_of_a_shape_are_the_same():
    vit = tiny_vit().train()
    vit.blocks[0].eval()
    shape, images = macs(vit, (3, 32, 32)), macs(vit, torch.rand(3, 3, 32, 32))
    assert shape == images == macs(vit, (8, 3, 32, 32))
    assert vit.training and not vit.blocks[0].training
    assert next(vit.parameters()).device.type == "cpu"


class DropsDarkPixels(nn.Module):
    """Its work depends on the image: a product per bright pixel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 10))

    def forward(self, images):
        return images[images > 0.5][:, None] @ self.weight


def test_macs_that_depend_on_the_image_are_a_mean_over_images():
    images = torch.zeros(2, 1, 4, 4)
    images[0, 0, 0, :3] = 1
    assert macs(DropsDarkPixels(), images)["macs_g"] * 1e9 == pytest.approx((30 + 0) / 2)
    with pytest.raises(ValueError, match="DropsDarkPixels can't be counted from a shape, give images"):
        macs(DropsDarkPixels(), (1, 4, 4))


def test_closed_form_refuses_what_it_does_not_cover():
    with pytest.raises(ValueError, match="pools by attention"):
        closed_form_macs(tiny_vit(global_pool="map", class_token=False))
    from timm.layers import GluMlp, SwiGLU

    with pytest.raises(ValueError, match="is gated"):
        closed_form_macs(tiny_vit(mlp_layer=GluMlp))
    with pytest.raises(ValueError, match="^GluMlp is not two layers"):  # as ViTamin's, without timm's names
        vit = tiny_vit(mlp_layer=GluMlp)
        for block in vit.blocks:
            del block.mlp.fc1, block.mlp.fc2
        closed_form_macs(vit)
    with torch.device("meta"), pytest.raises(ValueError, match="^HybridEmbed embeds by a network"):
        closed_form_macs(timm.create_model("vit_tiny_r_s16_p8_224"))
    with pytest.raises(ValueError, match="SwiGLU is gated"):
        closed_form_macs(tiny_vit(mlp_layer=SwiGLU))


def test_latency_gives_one_sane_row_per_model():
    models = {"wide": nn.Linear(64, 64), "none": nn.Identity()}
    models["wide"].train()
    before = torch.get_num_threads()
    settings = {"repeats": 5, "warmup": 1, "threads": before + 1, "baseline": "none", "precision": "bf16"}
    table = latency(models, torch.rand(4, 64), **settings)
    assert list(table["model"]) == ["wide", "none"]
    columns = "model batch_size latency_ms latency_iqr_ms throughput_ips speedup speedup_iqr device threads"
    assert " ".join(table.columns) == columns + " precision repeats"
    numbers = table[["latency_ms", "throughput_ips", "speedup"]]
    assert np.isfinite(numbers).all(axis=None) and (numbers > 0).all(axis=None)
    assert (table[["latency_iqr_ms", "speedup_iqr"]] >= 0).all(axis=None)
    assert np.allclose(table["throughput_ips"], 4000 / table["latency_ms"])
    row = table.set_index("model").loc["none"]
    assert (row["speedup"], row["speedup_iqr"]) == (1, 0)
    assert (row["batch_size"], row["threads"], row["precision"], row["repeats"]) == (4, before + 1, "bf16", 5)
    assert row["device"] == "cpu"
    assert torch.get_num_threads() == before and models["wide"].training


def test_latency_takes_turns_and_pairs_within_a_round(monkeypatch):
    """The ratios of the rounds are 3, 1, 2 while the machine slows down: the ratio of the medians would be 1."""
    models = {"slow": nn.Identity(), "fast": nn.Identity()}
    times = {models["slow"]: [99, 99, 3, 10, 200], models["fast"]: [1, 1, 1, 10, 100]}
    monkeypatch.setattr(costs, "_time_ms", lambda model, images: times[model].pop(0))
    table = latency(models, torch.zeros(1, 1), repeats=3, warmup=2).set_index("model")
    assert table.loc["fast", "speedup"] == 2 and table.loc["fast", "speedup_iqr"] == 1
    assert table.loc["slow", "speedup"] == 1  # the first model is the baseline
    assert table["latency_ms"].tolist() == [10, 10]

    calls = []
    monkeypatch.setattr(costs, "_time_ms", lambda model, images: calls.append(model) or 1.0)
    latency(models, torch.zeros(1, 1), repeats=20, warmup=0)
    rounds = {tuple(calls[i : i + 2]) for i in range(0, 40, 2)}
    assert rounds == {(models["slow"], models["fast"]), (models["fast"], models["slow"])}


def test_latency_refuses_bad_settings():
    models = {"a": nn.Identity()}
    for kwargs in ({"baseline": "b"}, {"repeats": 0}, {"warmup": -1}, {"precision": "fp64"}):
        with pytest.raises(ValueError, match="expected"):
            latency(models, torch.zeros(1), **kwargs)
    with pytest.raises(ValueError, match="baseline None"):
        latency({}, torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_predicts_times_and_counts():
    vit = tiny_vit().cuda()
    split = SimpleNamespace(images=np.full((5, 32, 32, 3), 200, np.uint8), labels=[0] * 5)
    on_gpu = predict(vit, split, mean=MEAN, std=STD)
    images = torch.rand(2, 3, 32, 32)
    table = latency({"a": vit, "b": nn.Identity()}, images, repeats=5, precision="bf16", device="cuda")
    assert (table["latency_ms"] > 0).all() and table["device"][0] == torch.cuda.get_device_name()
    assert macs(vit, images.cuda()) == macs(vit, (3, 32, 32))
    on_cpu = predict(vit, split, mean=MEAN, std=STD, device="cpu")
    assert on_gpu.logits.device.type == "cpu" and torch.allclose(on_gpu.logits, on_cpu.logits, atol=1e-3)


# fronts


def brute_force_front(rows):
    """Straight from the definition; a comparison with NaN is never true, and x == x sorts NaN rows out."""
    return [
        cost == cost
        and value == value
        and not any(c <= cost and v >= value and (c < cost or v > value) for c, v in rows)
        for cost, value in rows
    ]


def test_pareto_is_its_definition():
    rng = np.random.default_rng(0)
    for size in range(40):
        rows = rng.integers(0, 8, (size, 2)).astype(float)  # few values: many ties
        rows[rng.random((size, 2)) < 0.1] = np.nan
        table = pd.DataFrame(rows, columns=["ms", "top1"], index=rng.integers(0, 5, size))
        front = pareto(table, "ms", "top1")
        assert front.tolist() == brute_force_front(rows) and front.dtype == bool
        assert front.index.equals(table.index)
        groups = rng.choice(["a", "b", "c"], size)
        grouped = pareto(table.assign(data=groups), "ms", "top1", group="data").to_numpy()
        for name in "abc":
            assert grouped[groups == name].tolist() == brute_force_front(rows[groups == name])


def test_pareto_keeps_ties_and_takes_several_groups():
    table = pd.DataFrame({"c": [1, 1, 2, 2], "v": [5, 5, 5, 6], "a": [0, 0, 0, 0], "b": [1, 1, None, 1]})
    assert pareto(table, "c", "v").tolist() == [True, True, False, True]
    assert pareto(table, "c", "v", group=["a", "b"]).tolist() == [True, True, True, True]


def test_hypervolume_by_hand():
    table = pd.DataFrame({"ms": [1, 2, 2, 3, 9, 1], "top1": [0.5, 0.8, 0.8, 0.7, 0.99, np.nan]})
    assert hypervolume(table, "ms", "top1", (4, 0.4)) == pytest.approx(1 * 0.1 + 2 * 0.4)
    assert hypervolume(table, "ms", "top1", (0.5, 0.4)) == 0
    more = pd.concat([table, pd.DataFrame({"ms": [1.5], "top1": [0.7]})])
    assert hypervolume(more, "ms", "top1", (4, 0.4)) == pytest.approx(0.5 * 0.1 + 0.5 * 0.3 + 2 * 0.4)


# paired tests


def test_mcnemar_by_hand():
    a = [True] * 6 + [False] * 1 + [True] * 10 + [False] * 3
    b = [False] * 6 + [True] * 1 + [True] * 10 + [False] * 3
    p_value = 2 * (math.comb(7, 0) + math.comb(7, 1)) / 2**7
    expected = {"n": 20, "b": 6, "c": 1, "p_value": p_value, "difference": 5 / 20}
    assert mcnemar(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    assert mcnemar(b, a) == pytest.approx(expected | {"b": 1, "c": 6, "difference": -5 / 20})
    assert mcnemar(a, a) == {"n": 20, "b": 0, "c": 0, "p_value": 1.0, "difference": 0.0}


def test_paired_bootstrap_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.random(300) < 0.8, rng.random(300) < 0.7
    ours = paired_bootstrap(a, b)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, method="percentile", rng=rng
    ).confidence_interval
    assert ours["difference"] == pytest.approx(a.mean() - b.mean())
    assert (ours["ci95_low"], ours["ci95_high"]) == pytest.approx((theirs.low, theirs.high), abs=1 / 150)
    assert ours == paired_bootstrap(a, b) and ours != paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap(a, a) == {"difference": 0, "ci95_low": 0, "ci95_high": 0}
    for won in range(1, 10):  # no image on which both are right or wrong: shares add up to 1 but for rounding
        apart = np.arange(10) < won
        assert paired_bootstrap(apart, ~apart)["difference"] == pytest.approx(won / 5 - 1)


def test_pairs_that_do_not_match_are_refused():
    for a, b in (([True], [True, False]), ([], []), ([0.3], [1]), ([[True]], [[True]])):
        for test in (mcnemar, paired_bootstrap):
            with pytest.raises(ValueError, match="correct_a, correct_b"):
                test(a, b)


def test_mean_ci():
    mean, half = mean_ci([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-6)
    assert mean_ci([0.5]) == (0.5, None) and mean_ci([2, 2, 2]) == (2, 0)
    for bad in ([], [1, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="mean_ci"):
            mean_ci(bad)


# temperature


def calibrated(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which softmax(logits / scale) says exactly how often each label occurs."""
    rows = [(1, 7, 2), (4, 4, 2), (3, 1, 6), (8, 1, 1)]  # labels 0, 1 and 2 of ten images each
    logits = [row for row in rows for _ in range(10)]
    labels = [label for row in rows for label, count in enumerate(row) for _ in range(count)]
    return scale * torch.tensor(logits).double().log() + 3.0, torch.tensor(labels)


@pytest.mark.parametrize("scale", [0.05, 0.7, 1.0, 2.5, 40.0])
def test_temperature_undoes_a_scale(scale):
    logits, labels = calibrated(scale)
    assert temperature(logits, labels) == pytest.approx(scale, rel=1e-4)
    assert temperature(logits.float().numpy(), labels.numpy()) == pytest.approx(scale, rel=1e-4)


def test_temperature_has_the_least_nll():
    logits, labels = random_predictions()
    found = temperature(logits, labels)
    best, *others = (
        classification(logits / (found * factor), labels)["nll_nats"] for factor in (1, 0.99, 1.01, 1 / found)
    )
    assert best < min(others)


def test_temperature_is_bounded_where_there_is_no_best():
    logits = torch.eye(3).repeat(4, 1)
    always, never = logits.argmax(dim=1), (logits.argmax(dim=1) + 1) % 3
    found = temperature(logits, always)
    assert math.exp(-5) <= found < 0.05 and classification(logits / found, always)["nll_nats"] < 1e-9
    assert temperature(logits, never) == pytest.approx(math.exp(5), rel=1e-3)


@pytest.mark.parametrize(
    "logits, labels", [((0, 3), (0,)), ((2, 3), (3,)), ((4,), (4,)), ((2, 3, 1), (2,)), ((2, 3), (2, 1))]
)
def test_temperature_refuses_other_shapes(logits, labels):
    with pytest.raises(ValueError, match="temperature: found .* expected .N, C. and .N,."):
        temperature(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


# kept patches


def test_foreground_by_hand():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True  # patch 0 of the 2 × 2 grid
    masks[1, 7, :5] = True  # touches patches 2 and 3
    kept = torch.tensor([[0, 1], [1, 2], [0, 3]])  # the third image has no foreground
    expected = {"precision": (1 / 2 + 1 / 2 + 0) / 3, "precision_random": (1 / 4 + 2 / 4 + 0) / 3}
    expected |= {"recall": (1 + 1 / 2) / 2, "recall_random": 1 / 2}
    assert foreground(kept, masks, (2, 2)) == pytest.approx(expected)
    assert foreground(list(kept), masks.byte(), (2, 2)) == pytest.approx(expected)
    shared = foreground(torch.tensor([0]), masks, (2, 2))
    assert shared["precision"] == pytest.approx(1 / 3) and shared["recall"] == pytest.approx(1 / 2)
    ragged = foreground(
        [torch.tensor([0, 1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])], masks, (2, 2)
    )
    assert ragged["precision"] == pytest.approx((1 / 3 + 0) / 2) and ragged["recall"] == pytest.approx(1 / 2)
    nothing = foreground(torch.tensor([], dtype=torch.int64), masks * False, (2, 2))
    assert set(nothing.values()) == {None}


def test_foreground_refuses_bad_indices():
    for kept in (torch.tensor([4]), torch.tensor([-1]), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="kept: found"):
            foreground(kept, torch.ones(3, 8, 8), (2, 2))


def test_correlation_by_hand():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True  # patch 0 of the 2 × 2 grid
    masks[1, 4:, 4:] = True  # patch 3
    follows = torch.tensor([[6, 1, 1, 1], [2, 2, 2, 5], [1, 2, 3, 4]])  # the third image has no foreground
    found = correlation(follows, masks, (2, 2))
    assert found["correlation"] == pytest.approx(1) and found["correlation_n"] == 2
    assert correlation(7 - follows, masks, (2, 2))["correlation"] == pytest.approx(-1)
    # the mean map (4, 1.5, 1.5, 3) is for each image the same, and no better than it is
    share = np.eye(4)[[0, 3]]
    fixed = np.mean([np.corrcoef([4, 1.5, 1.5, 3], one)[0, 1] for one in share])
    assert found["correlation_fixed"] == pytest.approx(fixed)
    constant = correlation(torch.ones(3, 4), masks, (2, 2))
    assert constant == {name: None for name in found if name != "correlation_n"} | {"correlation_n": 0}


def test_correlation_of_half_covered_patches_and_of_shuffled_maps():
    generator = np.random.default_rng(0)
    masks = np.zeros((500, 16, 16), dtype=bool)
    masks[:, 2:11, 2:11] = generator.random((500, 1, 1)) > -1  # patches covered by a quarter to all of their pixels
    share = masks.reshape(500, 4, 4, 4, 4).mean(axis=(2, 4)).reshape(500, 16)
    values = torch.from_numpy(share + 0.2 * generator.standard_normal(share.shape))
    found = correlation(values, masks, (4, 4))
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(values.numpy(), share, strict=True)])
    assert found["correlation"] == pytest.approx(expected) and 0.8 < expected < 0.99
    assert abs(found["correlation_random"]) < 0.05


def test_a_batch_is_spread_over_the_split_and_fed_as_predict_feeds(tiny):
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.eye(3)[torch.zeros(len(images), dtype=torch.int64)]

    predict(Spy(), tiny.test, mean=tiny.mean, std=tiny.std)
    assert torch.equal(batch(tiny, 100), seen[0]) and len(seen[0]) == 9
    assert torch.equal(batch(tiny, 3), seen[0][[0, 4, 8]])
    assert batch(tiny, 2, split="val").shape == (2, 3, 12, 12)


def test_traces_are_those_of_every_test_image(tiny, vit):
    pruner = AViT(vit.eval(), gate_scale=5.0, gate_center=1.0, mode="gather")
    with torch.no_grad():  # halting scores that differ between patches
        vit.patch_embed.proj.weight[0] *= 20
    found = traces(pruner, tiny, batch_size=4)
    whole = pruner.trace(batch(tiny, 9))
    assert torch.equal(found.depth, whole.depth) and found.depth.unique().numel() > 1
    assert found.tokens.tolist() == [[len(block[image]) for block in whole.kept] for image in range(9)]
    scores, _ = evaluate.test(pruner, tiny, count_on=batch(tiny, 9))
    assert scores["macs_g"] == macs(pruner, batch(tiny, 9))["macs_g"] < macs(vit, (3, 12, 12))["macs_g"]


def test_overlap_by_hand():
    assert overlap(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 5])) == 2 / 4
    assert overlap(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])) == pytest.approx((1 + 0) / 2)
    empty = torch.tensor([], dtype=torch.int64)
    assert overlap([empty, torch.tensor([1])], [empty, empty]) == 1 / 2
    with pytest.raises(ValueError, match="kept: found 2 rows"):
        overlap(torch.zeros(2, 1), torch.zeros(3, 1))


def test_overlaps_are_those_of_each_two():
    generator = torch.Generator().manual_seed(0)
    sets = {"a": torch.rand(5, 16, generator=generator).argsort(dim=1)[:, :6], "b": torch.arange(9)}
    sets["c"] = [torch.arange(count) for count in (0, 1, 5, 16, 3)]
    table = overlaps(sets)
    assert [*table.index] == [*table.columns] == ["a", "b", "c"]
    assert np.array_equal(table, table.T) and np.array_equal(np.diag(table), np.ones(3))
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert table[one][other] == overlap(sets[one], sets[other]) and 0 < table[one][other] < 1
    assert overlaps({}).empty


def test_import_is_light():
    """A notebook that only trains pays for no statistics package."""
    code = "import sys, lib.evaluate; print({'torchmetrics', 'statsmodels', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_two_classes_of_one_name_go_by_their_ids(tiny):
    twins = replace(tiny, classes=["crane", "crane", "pot"], class_ids=["n01", "n02", "n03"])
    scores, _ = evaluate.test(tiny_vit(img_size=12, patch_size=3, num_classes=3), twins)
    assert [*scores["per_class_accuracy"]] == ["n01", "n02", "n03"]


def test_val_is_measured_while_something_is_chosen(tiny):
    model = tiny_vit(img_size=12, patch_size=3, num_classes=3)
    brighter = replace(tiny, test=tiny.test.take(np.arange(3)))
    assert evaluate.test(model, brighter, split="val")[0]["n"] == 9 and evaluate.test(model, brighter)[0]["n"] == 3


def test_batches_are_whole_labelled_and_spread(tiny):
    found = evaluate.batches(tiny, 2, 4, split="train")
    assert [len(images) for images, _ in found] == [4, 4]
    rows = np.linspace(0, 23, 8).astype(int)
    labels = np.asarray(tiny.train.labels)[rows]
    assert torch.cat([labels for _, labels in found]).tolist() == labels[[0, 4, 2, 6, 1, 5, 3, 7]].tolist()
    torch.testing.assert_close(found[0][0][:1], evaluate.inputs(tiny.train.images[:1], tiny))
    assert sum(len(labels) for _, labels in evaluate.batches(tiny, 9, 4)) == 9, "no more than there are"
    with pytest.raises(ValueError, match="no val images to look at"):
        evaluate.batches(replace(tiny, val=tiny.val.take(np.arange(0))), 1, 1)


@pytest.mark.parametrize("total", [1, 2, 7, 64, 100])
def test_every_first_part_of_interleaved_values_is_spread(total):
    found = evaluate.interleaved(np.arange(total))
    assert sorted(found) == [*range(total)]
    for count in range(2, total):
        assert np.diff(sorted([*found[:count], total])).max() <= 4 * total / count


def test_rank_correlation_is_spearmans_of_magnitudes_within_groups():
    table = pd.DataFrame(
        {"kind": ["a"] * 3 + ["b"] * 3, "effect": [1.0, 2, 3, 3, 2, 1], "score": [-1.0, -4, -9, 1, 2, 3]}
    )
    found = evaluate.rank_correlation(table, "effect", by="kind")
    assert found.score.to_dict() == {"a": pytest.approx(1), "b": pytest.approx(-1)}
