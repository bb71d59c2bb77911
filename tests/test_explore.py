"""The explorer: what it shows equals what the methods do, it changes nothing, and a fault is one line."""

import asyncio
import io
import json
import warnings
from dataclasses import replace
from datetime import UTC, datetime

import matplotlib
import numpy as np
import pytest
import timm
import torch
from conftest import DROPOUT, TINY
from PIL import Image

from lib import (
    blocks,
    data,
    evaluate,
    explore,
    images,
    models,
    plots,
    plots_explore,
    runs,
    strengths,
    training_free,
    widgets,
)
from lib.pruners import acdc, baselines, components, eap, surgery
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.shrunk import Shrunk
from lib.pruners.tokens import FixedPatches
from lib.pruners.ucb import UCB
from lib.pruners.ward import Ward

matplotlib.use("Agg")
CLASSES = ["dark", "grey", "bright"]
TOKENS = {  # name: (strength, the method itself)
    "random": (0.5, lambda vit: baselines.RandomDrop(vit, 0.5)),
    "grid": (0.5, lambda vit: baselines.GridDrop(vit, 0.5)),
    "topk": (0.5, lambda vit: baselines.TopK(vit, 0.5)),
    "evit": (0.5, lambda vit: baselines.EViT(vit, 0.5)),
    "tome": (2, lambda vit: baselines.ToMe(vit, 2)),
    "ward": (2, lambda vit: Ward(vit, 2)),
    "anchors": (0.5, lambda vit: Anchors(vit, k_anchors=1, top_m=7)),
    "avit": (0.7, lambda vit: AViT(vit, gate_scale=0.5, gate_center=0.7)),
}
SAVED = {  # name: (method and strength that it begins with, the model)
    "topk": (("topk", 0.3), lambda vit: baselines.TopK(vit, 0.3, blocks=[2])),
    "random": (("random", 0.5), lambda vit: baselines.RandomDrop(vit, 0.5, seed=3)),
    "tome": (("tome", 7), lambda vit: baselines.ToMe(vit, 7)),
    "ward": (("ward", 3), lambda vit: Ward(vit, 3, gamma=2.0)),
    "avit": (("avit", 0.8), lambda vit: AViT(vit, 2.0, 0.8, eps=0.05)),
    "ucb": (("ucb", 0.5), UCB),
    "schedule": (("ward", 1.5), lambda vit: Ward(vit, [1, 3, 0, 2], gamma=2.0)),
    "ratios": (("topk", 0.7), lambda vit: baselines.TopK(vit, [0.5, 0.9], [1, 2])),
    "anchors": (("anchors", 0.5), lambda vit: Anchors(vit, 3, 5, alpha=1.0, start_block=2)),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Caches, and what the explorer finds in the project's folder, lie in a folder of the test."""
    monkeypatch.setattr(runs, "root", lambda: tmp_path)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **TINY | {"depth": 4}, **DROPOUT).eval()
    with torch.no_grad():  # attention that differs from patch to patch, answers that are no toss-up
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit


@pytest.fixture
def subject(vit, tiny):
    return explore.Subject("tiny", vit, tiny, CLASSES)


@pytest.fixture
def image(subject):
    return subject.image("1")


def save(model, path, dataset, **changed):
    """The model as a notebook's run saves it."""
    about = {"data": {"dataset": str(dataset)}, "normalise": "data", "classes": CLASSES}
    about |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]} | changed
    return models.save(model, path, **about)


def shares(model, x):
    with torch.inference_mode():
        return model(x)[0].double().softmax(0).numpy()


def fed(image, source):
    """The image as the model is fed it, by the definition."""
    return torch.tensor(((image / 255 - np.array(source.mean)) / np.array(source.std)).transpose(2, 0, 1)[None]).float()


# views


@pytest.mark.parametrize("method", strengths.METHODS)
def test_the_mildest_strength_is_the_dense_model(subject, image, method):
    dense, mildest = subject.look(image, "dense", 0.0), subject.slider(method)[0]
    view = subject.look(image, method, mildest)
    np.testing.assert_allclose(view.probabilities, dense.probabilities, atol=1e-6)
    assert [ids.tolist() for ids in view.kept] == [list(range(16))] * 4 and view.tokens == [17] * 4
    assert view.macs_g == pytest.approx(dense.macs_g, rel=1e-6)
    assert view.plan == view.whole, "all parts, or none are told"


@pytest.mark.parametrize("method", TOKENS)
def test_a_view_of_tokens_is_what_the_method_does(subject, vit, image, method):
    strength, make = TOKENS[method]
    view, direct, x = subject.look(image, method, strength), make(vit).eval(), fed(image, subject.images)
    trace = direct.trace(x)
    assert [ids.tolist() for ids in view.kept] == [ids[0].tolist() for ids in trace.kept]
    assert len(view.kept[-1]) < 16, "it removes something, or nothing would be tested"
    np.testing.assert_allclose(view.probabilities, shares(direct, x), atol=1e-5)
    np.testing.assert_allclose(view.probabilities, trace.logits[0].double().softmax(0), atol=1e-5)
    counts = direct.tokens(x)[:, 0].tolist() if method == "avit" else direct.counts()[1]
    assert view.tokens == counts
    cheap = AViT(vit, 0.5, 0.7, mode="gather").eval() if method == "avit" else direct
    assert view.macs_g == pytest.approx(evaluate.macs(cheap, x)["macs_g"])
    assert view.plan is view.whole is None and view.latency_ms > 0 and view.speedup > 0


def test_tokens_include_the_one_that_evit_fuses(subject, image):
    evit, topk = (subject.look(image, method, 0.5) for method in ("evit", "topk"))
    assert topk.tokens == [17, 9, 5, 3] and evit.tokens == [17, 10, 7, 5]


def test_a_view_of_ucb_is_that_of_its_own_counts(subject, vit, tiny, image):
    bandit = UCB(vit, keep_ratio=1.0)
    bandit.training = True
    with torch.no_grad():
        bandit(evaluate.batch(tiny, 16, split="val"))
    frozen = bandit.eval().freeze(0.5)
    view = subject.look(image, "ucb", 0.5)
    assert [ids.tolist() for ids in view.kept] == [frozen.kept.tolist()] * 4 and view.tokens == [9] * 4
    np.testing.assert_allclose(view.probabilities, shares(frozen, fed(image, tiny)), atol=1e-5)
    assert view.macs_g < 0.6 * subject.look(image, "dense", 0.0).macs_g


@pytest.mark.parametrize("method, strength", [("eap", 0.5), ("acdc", 0.01)])
def test_a_view_of_parts_is_what_the_method_removes(subject, vit, tiny, image, method, strength):
    batches = evaluate.batches(tiny, 1, 16, split="val")
    if method == "eap":
        plan = eap.plan(eap.scores(vit, batches), strength)
    else:
        found = acdc.decide(vit, [x[:4] for x, _ in batches], strength, rule="increment", group_size=32, progress=False)
        plan = components.plan(vit, [each.part for each in found if each.removed])
    view, small, x = subject.look(image, method, strength), surgery.remove(vit, plan), fed(image, tiny)
    assert view.plan == plan.explicit(vit) != view.whole
    assert view.whole == surgery.Plan(heads=[[0, 1]] * 4, neurons=[list(range(64))] * 4).explicit(vit)
    np.testing.assert_allclose(view.probabilities, shares(small, x), atol=1e-5)
    assert view.macs_g == pytest.approx(evaluate.macs(small, x)["macs_g"])
    assert [ids.tolist() for ids in view.kept] == [list(range(16))] * 4 and view.tokens == [17] * 4


@pytest.mark.parametrize("left", [[True, False, False, True], [False] * 4])
def test_where_whole_blocks_go_every_block_still_has_its_entry(subject, image, monkeypatch, left):
    monkeypatch.setattr(acdc, "search", lambda *_, **__: surgery.Plan(blocks=left))
    view = subject.look(image, "acdc", 0.3)
    assert [bool(heads) for heads in view.plan.heads] == left and view.tokens == [17] * 4
    assert [ids.tolist() for ids in view.kept] == [list(range(16))] * 4
    table = explore.table(subject, image, [view])
    assert len(plots_explore.strips(image, subject.grid, [view], table).axes) == 1
    assert table.macs_g[1] < table.macs_g[0]


def test_the_sources_of_tome_partition_the_patches_and_only_ever_join(subject, image):
    view = subject.look(image, "tome", 3)
    before = np.arange(16)
    for sources, kept in zip(view.sources, view.kept, strict=True):
        assert (sources[sources] == sources).all(), "a group goes by one of its own"
        assert sorted({*sources}) == kept.tolist()
        assert (sources == sources[before]).all(), "what was together stays so"
        before = sources
    assert view.tokens == [14, 11, 8, 5]
    direct = baselines.ToMe(subject.vit, 3).eval().sources(fed(image, subject.images))
    assert [each.tolist() for each in view.sources] == [each[0].tolist() for each in direct]


def test_a_model_that_embeds_only_some_patches_shows_the_others_as_gone(vit, tiny):
    kept = [0, 1, 2, 5, 7, 8, 13, 15]
    frozen = explore.Subject("frozen", FixedPatches(vit, kept), tiny, CLASSES)
    image = frozen.image("1")
    assert [ids.tolist() for ids in frozen.look(image, "dense", 0.0).kept] == [kept] * 4
    assert [ids.tolist() for ids in frozen.look(image, "eap", 0.5).kept] == [kept] * 4
    view = frozen.look(image, "tome", 2)
    gone = np.setdiff1d(np.arange(16), kept)
    assert all((sources[gone] == -1).all() and {*sources[kept]} <= {*kept} for sources in view.sources)
    nothing = frozen.look(image, "tome", 0)
    picture, veiled = (plots_explore.picture(nothing, image, frozen.grid, 0), plots.overlay(image, kept, frozen.grid))
    inner = np.s_[8::17, 8::17]  # away from the lines around patches
    assert (picture[inner] == veiled.repeat(17, 0).repeat(17, 1)[inner]).all()
    with pytest.raises(blocks.UnsupportedBlock, match="freeze the dense model"):
        frozen.look(image, "ucb", 0.5)


def test_nothing_is_trained_or_changed_by_looking(subject, vit, image):
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    for method in strengths.METHODS:
        for strength in subject.slider(method)[:: len(subject.slider(method)) - 1]:
            subject.look(image, method, strength)
    assert state.keys() == vit.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not any(module.training for module in vit.modules())


def test_what_was_seen_is_kept_and_another_image_or_strength_is_looked_at(subject, vit, image):
    calls = []
    vit.patch_embed.register_forward_hook(lambda *_: calls.append(1))

    def runs_model(image, strength):
        before = len(calls)
        view = subject.look(image, "topk", strength)
        assert view is subject.look(image.copy(), "topk", strength)
        return len(calls) > before

    first = subject.look(image, "topk", 0.5)
    done = len(calls)
    assert subject.look(image.copy(), "topk", 0.5) is first and len(calls) == done > 0
    assert not runs_model(image, 0.5) and runs_model(image, 0.45) and runs_model(subject.image("2"), 0.5)
    assert subject.look(subject.image("2"), "topk", 0.5).probabilities.tolist() != first.probabilities.tolist()
    assert subject.look(image, "evit", 0.5).method == "evit"


def test_the_dear_parts_are_computed_once_for_all_images_and_strengths(subject, monkeypatch):
    counted, true = [], eap.scores
    monkeypatch.setattr(eap, "scores", lambda *given: counted.append(1) or true(*given))
    for which in ("0", "1"):
        for strength in (0.5, 0.75):
            subject.look(subject.image(which), "eap", strength)
    bandit = subject.look(subject.image("0"), "ucb", 0.25).kept[0]
    assert len(counted) == 1 and {*bandit} <= {*subject.look(subject.image("1"), "ucb", 0.5).kept[0]}


# strengths


@pytest.mark.parametrize("method", strengths.METHODS)
def test_every_value_of_a_slider_is_accepted_the_mildest_first(subject, image, method):
    values = subject.slider(method)
    assert len({*values}) == len(values) and subject.strength(method) == values[len(values) // 2]
    assert all(subject.strength(method, value) == value for value in values)
    assert values in (sorted(values), sorted(values, reverse=True))
    costs = [subject.look(image, method, values[index]).macs_g for index in (0, len(values) // 2, -1)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


@pytest.mark.parametrize("method, wanted", [
    ("topk", 0.0), ("topk", 1.01), ("ucb", -0.5), ("tome", 2.5), ("tome", 99),
    ("acdc", 0.4), ("acdc", -0.1), ("eap", float("nan")), ("anchors", 2),
])  # fmt: skip
def test_a_strength_that_cannot_be_is_refused_with_its_unit(subject, method, wanted):
    with pytest.raises(explore.ExploreError, match=f"strength is {wanted:g}: expected for {method} the ") as caught:
        subject.strength(method, wanted)
    assert strengths.WHAT[method] in str(caught.value) and "\n" not in str(caught.value)


def test_shares_between_and_whole_numbers_of_patches_are_strengths(subject):
    assert subject.strength("topk", 0.333) == 0.333 and subject.strength("eap", 0.02) == 0.02
    assert type(subject.strength("tome", 3.0)) is int and subject.strength("avit", -40.0) == -40.0


def test_an_unknown_method_is_refused(subject):
    with pytest.raises(explore.ExploreError, match="method is 'top': expected one of random, grid, topk"):
        subject.strength("top")


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_begins_as_it_was_saved(vit, tiny_h5, tmp_path, name):
    (method, strength), make = SAVED[name]
    model = make(vit).eval()
    if name == "ucb":
        model.ucb_count_scores += torch.arange(17) % 5
    subject = explore.load(str(save(model, tmp_path / "model", tiny_h5)))
    assert subject.begins() == (method, strength) and subject.strength(method) == strength
    other = "eap" if method == "topk" else "topk"
    assert subject.strength(other) == subject.slider(other)[len(subject.slider(other)) // 2]
    image, x = subject.image("1"), fed(subject.image("1"), subject.images)
    own = model.freeze(0.5) if name == "ucb" else model
    view, trace = subject.look(image, method, subject.strength(method)), own.trace(x)
    np.testing.assert_allclose(view.probabilities, shares(own, x), atol=1e-5)
    assert [ids.tolist() for ids in view.kept] == [ids[0].tolist() for ids in trace.kept]


def test_a_saved_strength_beyond_the_slider_stays_itself(vit, tiny):
    subject = explore.Subject("merged", baselines.ToMe(vit, 8), tiny, CLASSES)
    assert max(subject.slider("tome")) < 8 and subject.strength("tome") == subject.strength("tome", 8) == 8
    assert widgets.Explorer(subject, "1", [("tome", 8)]).strengths[0].value == 8


def test_a_gate_that_was_trained_halts_as_it_learned(vit, tiny):
    model = AViT(vit, 2.0, 0.8, learn_gate=True)
    model.gate_log_factors.data = torch.tensor([0.4, 0.9])
    subject = explore.Subject("learned", model.eval(), tiny, CLASSES)
    strength, image = subject.strength("avit"), subject.image("1")
    assert strength == pytest.approx(0.8 * np.exp(0.9))
    view, trace = subject.look(image, "avit", strength), model.trace(fed(image, tiny))
    np.testing.assert_allclose(view.probabilities, trace.logits[0].double().softmax(0), atol=1e-5)
    assert [ids.tolist() for ids in view.kept] == [ids[0].tolist() for ids in trace.kept]


@pytest.mark.parametrize("centre", [0.0, -3.0])
def test_gates_centred_at_or_below_zero_have_a_slider_too(vit, tiny, centre):
    values = explore.Subject("early", AViT(vit, 2.0, centre), tiny, CLASSES).slider("avit")
    assert len(values) == 15 and values[0] > 0 and values == sorted(values, reverse=True)


def test_a_dense_model_begins_nowhere(subject):
    assert subject.begins() is None


def test_other_strengths_of_a_saved_schedule_are_in_proportion(vit, tiny):
    look = lambda model, *how: explore.Subject("any", model, tiny, CLASSES).look(tiny.test.images[1], *how)  # noqa: E731
    assert look(Ward(vit, [1, 3, 0, 2]), "ward", 3).tokens == [15, 9, 9, 5]
    assert look(Ward(vit, 0), "ward", 2).tokens == [15, 13, 11, 9], "of none at all: evenly"
    assert look(baselines.TopK(vit, [0.25, 0.75], [1, 2]), "topk", 1.0).tokens == [17, 9, 9, 9]


def test_a_model_that_shrinks_its_images_looks_at_shrunken_ones(vit, tiny):
    subject = explore.Subject("small", Shrunk.down(vit, 9), tiny, CLASSES)
    for method in ("eap", "acdc", "ucb"):
        assert len(subject.look(subject.image("1"), method, subject.slider(method)[1]).tokens) == 4


def test_halted_prefix_tokens_do_not_count_either(subject, vit, image):
    avit = AViT(vit, 0.5, -5.0, mode="gather").eval()
    tokens = subject.look(image, "avit", -5.0).tokens
    assert tokens[0] == 17 and tokens[-1] == 0
    assert tokens == avit._gathered(fed(image, subject.images))[1][:, 0].sum(dim=1).tolist()


def test_a_circuit_is_searched_in_groups_of_the_largest_block(subject, vit, image, monkeypatch):
    sizes, search = [], acdc.search
    monkeypatch.setattr(acdc, "search", lambda *a, **how: sizes.append(how["group_size"]) or search(*a, **how))
    small = surgery.remove(vit, surgery.Plan(heads=[None] * 4, neurons=[[], [0, 1, 2], None, None]))
    explore.Subject("pruned", small, subject.images, CLASSES).look(image, "acdc", 0.01)
    assert {*sizes} == {32}


# images and models


def test_an_image_is_a_test_image_a_file_or_its_bytes(subject, tiny, tmp_path):
    assert (subject.image("3") == tiny.test.images[3]).all()
    drawn = np.zeros((24, 36, 3), np.uint8)
    drawn[:, 6:30] = 200
    file = tmp_path / "wide.png"
    Image.fromarray(drawn).save(file)
    for given in (str(file), "wide.png", file.read_bytes()):
        assert subject.image(given).shape == (12, 12, 3) and (subject.image(given)[:, 1:-1] > 190).all(), "the middle"


@pytest.mark.parametrize("which", ["9", "-1", "one", "", "²", "nowhere.png"])
def test_an_image_that_is_not_there_is_refused(subject, which):
    with pytest.raises(explore.ExploreError, match="expected a file, or the number of a test image, 0 to 8"):
        subject.image(which)


def test_what_is_no_image_is_refused(subject, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for given, named in ((str(tmp_path / "notes.txt"), "notes.txt: 8 bytes"), (b"no image", "the upload: 8 bytes")):
        with pytest.raises(images.DataError, match=f"{named} that do not decode") as caught:
            subject.image(given)
        assert "\n" not in str(caught.value)


def test_a_run_is_shown_with_its_own_images_as_it_was_fed_them(vit, tiny_h5, tiny, tmp_path):
    save(vit, tmp_path / "outputs" / "dense" / "mine" / "model", tiny_h5)
    for name in ("outputs/dense/mine", str(tmp_path / "outputs/dense/mine/model.safetensors")):
        subject = explore.load(name)
        assert subject.name == name and subject.classes == CLASSES and subject.begins() is None
        assert (subject.image("4") == tiny.test.images[4]).all()
        assert subject.images.mean == (0.5, 0.4, 0.3) and subject.images.std == (0.2, 0.2, 0.3)
    image = subject.image("4")
    torch.testing.assert_close(subject.inputs(image).cpu(), fed(image, subject.images))
    np.testing.assert_allclose(
        subject.look(image, "dense", 0.0).probabilities, shares(vit, fed(image, subject.images)), atol=1e-6
    )


def test_other_images_are_fitted_to_the_model_and_its_classes_stay(vit, tiny_h5, tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.full((40, 30, 3), 20 * number, np.uint8)).save(
                tmp_path / "pets" / label / f"{number}.png"
            )
    path = save(vit.double(), tmp_path / "model", tiny_h5)
    subject = explore.load(str(path), "pets")
    assert subject.classes == CLASSES and subject.images.classes == ["cats", "dogs"]
    assert subject.images.mean == (0.5, 0.4, 0.3) and subject.image("0").shape == (12, 12, 3)
    for method in ("topk", "eap"):  # the latter looks at others of them
        assert subject.look(subject.image("0"), method, 0.5).probabilities.shape == (3,), "in single precision"
    with pytest.raises(data.DataError):
        explore.load(str(path), "nowhere")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return f"vit_tiny_patch16_224={path}"


def test_a_timm_vit_sees_photographs_as_it_was_trained_to_and_names_what_it_sees(published):
    subject = explore.load(published)
    assert subject.size == (224, 224) and subject.grid == (14, 14) and subject.name == published
    assert subject.images.mean == subject.images.std == (0.5, 0.5, 0.5)
    assert len(subject.classes) == 1000 and len(subject.images.test) == 2
    assert [subject.classes[index] for index in (0, 207, 985)] == ["tench", "golden retriever", "daisy"]
    china, flower = subject.image("0"), subject.image("1")
    assert china.shape == (224, 224, 3) and china.dtype == np.uint8
    assert flower[112, 112, 0] > 150 and china[:40].mean() > 150, "a bright petal, a bright sky"
    expected = timm.create_model("vit_tiny_patch16_224").eval()
    expected.load_state_dict(torch.load(published.partition("=")[2], weights_only=True))
    view = subject.look(flower, "topk", 0.5)
    direct = baselines.TopK(expected, 0.5).eval()
    np.testing.assert_allclose(view.probabilities, shares(direct, fed(flower, subject.images)), atol=1e-5)


def test_a_timm_vit_sees_other_images_in_its_own_scale(published, tiny_h5, tiny):
    subject = explore.load(published, str(tiny_h5))
    assert subject.images.mean == (0.5, 0.5, 0.5) and subject.image("8").shape == (224, 224, 3)
    assert len(subject.images.test) == len(tiny.test) and len(subject.classes) == 1000


def unlabelled(tmp_path, tiny_h5):
    return {"model": str(models.save(models.create("vit_digits", 3, **TINY), tmp_path / "bare"))}


def resnet(tmp_path, tiny_h5):
    return {"model": str(save(models.create("resnet20", 3), tmp_path / "resnet", tiny_h5))}


def resnet_with_images(tmp_path, tiny_h5):
    return resnet(tmp_path, tiny_h5) | {"dataset": str(tiny_h5)}


def not_a_model(tmp_path, tiny_h5):
    (tmp_path / "notes.txt").write_text("no model")
    return {"model": "notes.txt"}


def damaged(tmp_path, tiny_h5):
    path = save(models.create("vit_digits", 3, **TINY), tmp_path / "half", tiny_h5)
    path.write_bytes(path.read_bytes()[:1000])
    return {"model": str(path)}


def convolutional(tmp_path, tiny_h5):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    return {"model": f"test_resnet={tmp_path / 'weights.pth'}"}


def ill_fitting(tmp_path, tiny_h5):
    torch.save({"head.weight": torch.zeros(3, 16)}, tmp_path / "weights.pth")
    return {"model": f"vit_tiny_patch16_224={tmp_path / 'weights.pth'}"}


def of_other_classes(tmp_path, tiny_h5):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "weights.pth")
    return {"model": f"vit_tiny_patch16_224={tmp_path / 'weights.pth'}"}


@pytest.mark.parametrize("make, kind, message", [
    (lambda *_: {"model": "vit_tinny_patch16_224"}, models.ModelError, "did you mean vit_tiny_patch16_224"),
    (lambda *_: {"model": "outputs/dense/nowhere"}, models.ModelError, "'outputs/dense/nowhere' is unknown"),
    (lambda *_: {"model": ""}, models.ModelError, "not found"),
    (lambda *_: {"model": "vit_tiny_patch16_224=nowhere.pth"}, models.ModelError, "weights nowhere.pth not found"),
    (unlabelled, explore.ExploreError, "does not say what it was trained on"),
    (not_a_model, models.ModelError, "not a whole safetensors file"),
    (damaged, models.ModelError, "not a whole safetensors file"),
    (ill_fitting, models.ModelError, "does not fit arch 'vit_tiny_patch16_224'"),
    (of_other_classes, models.ModelError, "expected \\(1000"),
    (resnet, blocks.UnsupportedBlock, "ResNet20 is not supported: expected a timm VisionTransformer"),
    (resnet_with_images, blocks.UnsupportedBlock, "ResNet20 is not supported: expected a timm VisionTransformer"),
    (convolutional, blocks.UnsupportedBlock, "ResNet is not supported: expected a timm VisionTransformer"),
])  # fmt: skip
def test_a_model_that_cannot_be_shown_is_refused_in_one_line(tmp_path, tiny_h5, make, kind, message):
    with pytest.raises(kind, match=message) as caught:
        explore.load(**make(tmp_path, tiny_h5))
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert isinstance(caught.value, widgets.FAULTS), "the explorer says it"


def test_images_that_are_not_square_are_refused(tiny):
    wide = timm.create_model("vit_tiny_patch16_224", img_size=(16, 32), depth=1, embed_dim=12, num_classes=3)
    with pytest.raises(explore.ExploreError, match="images of 16x32 pixels: expected one of square images"):
        explore.Subject("wide", wide, tiny, CLASSES)


# tables and figures


def test_the_table_tells_each_view_beside_the_dense_model(subject, image):
    views = [subject.look(image, "topk", 0.5), subject.look(image, "tome", 3)]
    views[1] = views[1]._replace(probabilities=np.roll(views[1].probabilities, 1))  # another answer than dense's
    dense, table = subject.look(image, "dense", 0.0), explore.table(subject, image, views)
    assert table.method.tolist() == ["dense", "topk", "tome"]
    assert table.strength.isna().tolist() == [True, False, False] and table.strength.tolist()[1:] == [0.5, 3]
    best = dense.probabilities.argmax()
    for row, view in zip(table.to_dict("records"), [dense, *views], strict=True):
        assert row["answer"] == CLASSES[view.probabilities.argmax()]
        assert row["confidence"] == view.probabilities.max() and row["dense_answer"] == view.probabilities[best]
        assert row["tokens"] == view.tokens[-1] and row["macs_g"] == view.macs_g
        assert row["fewer_macs"] == dense.macs_g / view.macs_g and row["speedup"] == view.speedup
    assert table.fewer_macs[0] == 1 and table.fewer_macs[1] > 1


def test_a_spread_goes_from_mild_to_strong_and_has_the_given_strength(subject, image):
    assert [view.strength for view in explore.spread(subject, image, "topk", 0.5, 3)] == [1.0, 0.55, 0.5, 0.1]
    assert [view.strength for view in explore.spread(subject, image, "tome", 0, 2)] == [0, max(subject.slider("tome"))]


def test_strips_have_a_row_for_each_view_and_tell_its_numbers(subject, image):
    views = [subject.look(image, method, strength) for method, strength in (("topk", 0.5), ("tome", 3), ("eap", 0.5))]
    table = explore.table(subject, image, views)
    figure = plots_explore.strips(image, subject.grid, views, table)
    assert len(figure.axes) == 3
    for axis, view, row in zip(figure.axes, views, table.iloc[1:].to_dict("records"), strict=True):
        assert axis.get_title(loc="left").startswith(f"{view.method} {view.strength:g} answers {row['answer']!r}, ")
        assert f"{row['fewer_macs']:.2f}× fewer MACs" in axis.get_title(loc="left")
        captions = [label.get_text() for label in axis.get_xticklabels()]
        assert captions[0] == "image" and len(captions) == 5
        told = f"{view.tokens[2]} tokens"
        if view.plan:
            told = f"{len(view.plan.heads[2])} of 2 heads\n{len(view.plan.neurons[2])} neurons"
        assert captions[3] == f"block 2\n{told}"
    plots_explore.plt.close(figure)


def test_deeper_models_show_twelve_blocks(tiny):
    torch.manual_seed(0)
    deep = explore.Subject("deep", models.create("vit_digits", 3, **TINY | {"depth": 24}), tiny, CLASSES)
    view, image = deep.look(deep.image("0"), "topk", 0.5), deep.image("0")
    [axis] = plots_explore.strips(image, deep.grid, [view], explore.table(deep, image, [view])).axes
    captions = [label.get_text().partition("\n")[0] for label in axis.get_xticklabels()]
    assert len(captions) == 13 and captions[:2] == ["image", "block 0"] and captions[-1] == "block 23"


def test_a_picture_is_the_image_less_what_left(subject, image):
    picture = lambda method, strength, index: plots_explore.picture(  # noqa: E731
        subject.look(image, method, strength), image, subject.grid, index
    )
    for method in ("topk", "avit", "ucb"):
        assert (picture(method, subject.slider(method)[0], 3) == image).all()
    view = subject.look(image, "topk", 0.5)
    gone = (picture("topk", 0.5, 3) != image).any(axis=2).reshape(4, 3, 4, 3).any(axis=(1, 3)).flatten()
    assert np.flatnonzero(~gone).tolist() == view.kept[3].tolist()
    merged, sources = picture("tome", 3, 3), subject.look(image, "tome", 3).sources[3]
    assert (merged == plots.mosaic(image, sources, subject.grid)).all()


@pytest.mark.parametrize("heads, neurons", [([0, 1], range(64)), ([1], range(16)), ([], [])])
def test_parts_that_stay_are_blue_one_column_for_each_head(subject, image, heads, neurons):
    plan = surgery.Plan(heads=[heads] + [None] * 3, neurons=[[*neurons]] + [None] * 3).explicit(subject.vit)
    view = subject.look(image, "dense", 0.0)._replace(plan=plan, whole=surgery.Plan().explicit(subject.vit))
    picture = plots_explore.picture(view, image, subject.grid, 0)
    blue = (picture == plots_explore.KEPT).all(axis=2)
    top, bottom = blue[10], blue[-10]
    starts = np.flatnonzero(np.diff(top.astype(int), prepend=0) == 1)
    assert [int(start * 2 / len(top)) for start in starts] == heads, "a column for each head that stays, in its place"
    assert bottom.mean() == pytest.approx(len(neurons) / 64, abs=0.02)
    whole = plots_explore.picture(view, image, subject.grid, 1)
    assert (whole == plots_explore.KEPT).all(axis=2)[-10].all()
    small = view._replace(plan=view.plan, whole=surgery.Plan(neurons=[[*neurons]] * 4).explicit(subject.vit))
    gone = (plots_explore.picture(small, image, subject.grid, 0) == plots_explore.VEIL).all(axis=2)
    assert not gone[-10].any(), "of few, all"


def test_the_price_has_a_line_for_each_method_and_a_star_for_dense(subject, image):
    spread = {method: explore.spread(subject, image, method, 0.5, 3) for method in ("topk", "eap")}
    dense = subject.look(image, "dense", 0.0)
    [axis] = plots_explore.price(spread, dense, "grey").axes
    *lines, star = axis.get_lines()
    assert [line.get_label() for line in lines] == ["topk", "eap"] and star.get_marker() == "*"
    best = dense.probabilities.argmax()
    for line, views in zip(lines, spread.values(), strict=True):
        points = {(view.macs_g, view.probabilities[best]) for view in views}
        assert {*zip(*line.get_data(), strict=True)} == points and list(line.get_xdata()) == sorted(line.get_xdata())
    assert [*map(float, star.get_data()[0]), *map(float, star.get_data()[1])] == [
        dense.macs_g,
        dense.probabilities[best],
    ]
    assert "'grey'" in axis.get_ylabel()


# widgets


@pytest.fixture
def explorer(subject):
    return widgets.Explorer(subject, "1", [("topk", 0.5), ("tome", 3)])


def seen(explorer):
    return explorer.picture.value, explorer.numbers.value


def check_shows(explorer, which, *pairs):
    """The explorer shows this image under these methods at these strengths, and says nothing."""
    subject = explorer.subject
    image = subject.image(which)
    views = [subject.look(image, *pair) for pair in pairs]
    assert explorer.numbers.value.count("<tr>") == 2 + len(pairs) and explorer.said.value == ""
    for method, strength in pairs:
        assert f">{method}</td>" in explorer.numbers.value and f">{strength:g}</td>" in explorer.numbers.value
    figure = plots_explore.strips(image, subject.grid, views, explore.table(subject, image, views))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    shown, expected = (np.asarray(Image.open(io.BytesIO(png))) for png in (explorer.picture.value, drawn.getvalue()))
    assert shown.shape == expected.shape and (shown == expected).all()


def test_it_begins_with_what_was_chosen(explorer, subject):
    check_shows(explorer, "1", ("topk", 0.5), ("tome", 3))
    assert explorer.number.value == 1 and explorer.number.max == 8 and explorer.model.value == "tiny"
    assert [unit.value for unit in explorer.units] == [strengths.WHAT["topk"], strengths.WHAT["tome"]]
    assert [value for _, value in explorer.strengths[0].options] == subject.slider("topk")


def test_a_slider_changes_the_picture_and_the_table_at_once(explorer):
    before = seen(explorer)
    explorer.strengths[0].value = 0.25
    assert all(old != new for old, new in zip(before, seen(explorer), strict=True))
    check_shows(explorer, "1", ("topk", 0.25), ("tome", 3))
    explorer.number.value = 4
    check_shows(explorer, "4", ("topk", 0.25), ("tome", 3))


def test_a_method_brings_its_own_slider(explorer, subject):
    explorer.methods[1].value = "avit"
    assert [value for _, value in explorer.strengths[1].options] == subject.slider("avit")
    assert explorer.strengths[1].value == subject.strength("avit") and explorer.units[1].value == strengths.WHAT["avit"]
    check_shows(explorer, "1", ("topk", 0.5), ("avit", subject.strength("avit")))
    explorer.strengths[1].value = 0.0
    check_shows(explorer, "1", ("topk", 0.5), ("avit", 0.0))


def test_a_strength_between_is_put_in_its_place(subject):
    explorer = widgets.Explorer(subject, "1", [("topk", 0.333)])
    values = [value for _, value in explorer.strengths[0].options]
    assert explorer.strengths[0].value == 0.333 and values == sorted({*strengths.RATIOS, 0.333}, reverse=True)


def test_a_fault_is_said_and_what_was_there_stays(explorer, monkeypatch, tmp_path):
    before, subject = seen(explorer), explorer.subject
    explorer.model.value = "vit_tinny_patch16_224"
    assert "did you mean vit_tiny_patch16_224" in explorer.said.value
    assert seen(explorer) == before and explorer.subject is subject and explorer.model.value == subject.name
    explorer._uploaded({"new": ({"content": memoryview(b"no image")},)})
    assert "the upload: 8 bytes that do not decode" in explorer.said.value and seen(explorer) == before
    explorer.number.value = 2
    check_shows(explorer, "2", ("topk", 0.5), ("tome", 3))


def test_a_method_that_a_model_cannot_bear_is_said(tiny):
    torch.manual_seed(0)
    pooled = models.create("vit_digits", 3, **TINY, global_pool="avg", class_token=False)
    explorer = widgets.Explorer(explore.Subject("pooled", pooled, tiny, CLASSES), "0", [("topk", 0.5)])
    before = seen(explorer)
    explorer.methods[0].value = "anchors"
    assert "has no class token: anchors are what that attends to" in explorer.said.value and seen(explorer) == before
    explorer.methods[0].value = "grid"
    check_shows(explorer, "0", ("grid", strengths.RATIOS[len(strengths.RATIOS) // 2]))


def test_an_upload_is_shown_from_either_ipywidgets(explorer, subject, tmp_path):
    pngs = []
    for grey in (30, 220):
        drawn = io.BytesIO()
        Image.new("RGB", (12, 12), (grey, grey, 0)).save(drawn, "PNG")
        pngs.append(drawn.getvalue())
    explorer._uploaded({"new": {"mine.png": {"metadata": {}, "content": pngs[0]}}})  # ipywidgets 7
    check_shows(explorer, pngs[0], ("topk", 0.5), ("tome", 3))
    # ipywidgets 8
    explorer.file.value = ({"name": "mine.png", "type": "image/png", "size": 1, "content": memoryview(pngs[1]),
                            "last_modified": datetime.now(UTC)},)  # fmt: skip
    check_shows(explorer, pngs[1], ("topk", 0.5), ("tome", 3))
    explorer.number.value = 5
    check_shows(explorer, "5", ("topk", 0.5), ("tome", 3))


def test_another_model_brings_its_images_and_its_strength(explorer, vit, tiny_h5, tmp_path):
    path = save(AViT(vit, 2.0, 0.8), tmp_path / "model", tiny_h5)
    explorer.number.value = 0
    explorer.model.value = str(path)
    assert explorer.subject.name == str(path) and explorer.number.value == 0
    check_shows(explorer, "0", ("avit", 0.8), ("tome", explorer.subject.strength("tome")))


def test_an_upload_stays_when_the_model_changes_and_so_do_the_images_asked_for(
    explorer, subject, vit, tiny_h5, tmp_path, monkeypatch
):
    Image.fromarray(np.full((20, 20, 3), 77, np.uint8)).save(tmp_path / "mine.png")
    mine = (tmp_path / "mine.png").read_bytes()
    explorer.number.value = len(subject.images.test) - 1
    explorer._uploaded({"new": {"mine.png": {"content": mine}}})
    few = explore.Subject("few", vit, replace(subject.images, test=subject.images.test.take(np.arange(2))), CLASSES)
    asked = []
    monkeypatch.setattr(explore, "load", lambda *how: asked.append(how) or few)
    explorer.dataset = "others"
    explorer.model.value = "few"
    assert asked == [("few", "others")] and explorer.number.value == 1 and explorer.upload == mine
    pairs = zip(explorer.methods, explorer.strengths, strict=True)
    check_shows(explorer, mine, *[(one.value, at.value) for one, at in pairs])


def test_runs_that_are_finished_can_be_picked(subject, vit, tiny_h5, tmp_path):
    for name, done in {"mine": True, "half": False}.items():
        save(vit, tmp_path / "outputs" / "dense" / name / "model", tiny_h5)
        if done:
            (tmp_path / "outputs" / "dense" / name / "DONE").write_text("")
    options = widgets.Explorer(subject, "1", [("topk", 0.5)]).model.options
    assert options[0] == "outputs/dense/mine" and "outputs/dense/half" not in options
    assert "vit_tiny_patch16_224" in options


def test_in_jupyter_a_burst_of_changes_is_computed_once(explorer, monkeypatch):
    drawn, true = [], plots_explore.strips
    monkeypatch.setattr(plots_explore, "strips", lambda *given: drawn.append(given[2][0].strength) or true(*given))

    async def drag():
        values = [value for _, value in explorer.strengths[0].options if value != explorer.strengths[0].value][:10]
        for value in values:
            explorer.strengths[0].value = value
        assert not drawn, "nothing is computed while the slider moves"
        while not drawn:
            await asyncio.sleep(0.01)
        await asyncio.sleep(5 * widgets.QUIET)
        return values

    values = asyncio.run(drag())
    assert drawn == values[-1:] and len(values) == 10
    check_shows(explorer, "1", ("topk", values[-1]), ("tome", 3))


def test_class_names_are_text_in_the_table(vit, tiny):
    subject = explore.Subject("tiny", vit, tiny, [f"<b>{name}</b>" for name in CLASSES])
    image = subject.image("1")
    html = widgets.shown(explore.table(subject, image, [subject.look(image, "topk", 0.5)]))
    assert "<b>" not in html and "&lt;b&gt;" in html


def test_the_mildest_anchors_warn_of_nothing(subject, image):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject.look(image, "anchors", 1.0)


def test_the_table_is_fit_for_metrics(subject, image):
    records = training_free.records(explore.table(subject, image, [subject.look(image, "topk", 0.5)]))
    assert json.loads(json.dumps(records)) == records and records[0]["strength"] is None
