"""Models given by path: what they are called, that they are measured as they were trained, and what is refused."""

import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file
from test_finished import run as make_run

from lib import arms, compare, data, evaluate, evidence, finished, models, params, runs
from lib.pruners.baselines import ToMe
from lib.pruners.shrunk import Shrunk
from lib.pruners.tokens import FixedPatches

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "compare.ipynb"
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def tiny(classes: int = 3, **overrides) -> torch.nn.Module:
    return models.create("vit_tiny_patch16_224", classes, **{**TINY, **overrides}).eval()


@pytest.fixture
def images(tiny_h5, tmp_path):
    return data.load(tiny_h5, root=tmp_path / "data")


@pytest.fixture
def take(tmp_path, tiny_h5, monkeypatch):
    """The arms that parameters of compare.ipynb name, in a project at tmp_path, and the comparison's run."""
    monkeypatch.setattr(arms, "root", lambda: tmp_path)
    opened = []

    def take(*given, **values) -> tuple[arms.Arms, runs.Run]:
        declared = params.declared_in(NOTEBOOK)
        values = {"output_dir": str(tmp_path), "run_name": "c", "models": [str(one) for one in given], **values}
        opened.append(runs.Run("compare", declared, params.check(declared, {"dataset": str(tiny_h5), **values})))
        return arms.collect(opened[-1]), opened[-1]

    yield take
    for run in opened:
        run.close()


def method_run(folder: Path, name: str, images, model: torch.nn.Module, **more) -> Path:
    """A finished run of these images with its model."""
    made = make_run(folder, name, digest=images.digest, dataset=images.name, **more)
    about = {"data": {"dataset": more["source"]}, "normalise": "data", "classes": images.classes}
    models.save(model, made / "model", **about, mean=images.mean, std=images.std)
    logits, labels = evaluate.predict(model, images.test, mean=images.mean, std=images.std)
    np.savez(made / "test.npz", logits=logits, labels=labels)
    return made


def test_papermill_explains_every_parameter():
    """It does not parse a line that holds a second equals sign."""
    assert papermill.inspect_notebook(NOTEBOOK).keys() == params.declared_in(NOTEBOOK).keys()


def test_given_models_alone_are_measured_as_they_were_trained(take, images, tmp_path):
    saved, bare = tiny(), models.create("vit_digits", 3, 12).eval()
    path = models.save(saved, tmp_path / "mine", **HALF, classes=images.classes)
    torch.save({"state_dict": bare.state_dict()}, tmp_path / "theirs.pth")
    found, run = take(path, f"vit_digits={tmp_path}/theirs.pth", normalise="imagenet")
    assert [*found.models] == found.table.arm.tolist() == ["mine", "theirs"]
    assert {*found.table.method} == {"given"} and found.table.keep_ratio.isna().all()
    imagenet = images.normalised("imagenet")
    for model, name, fed in ((saved, "mine", images.normalised("half")), (bare, "theirs", imagenet)):
        row, below = found.table.set_index("arm").loc[name], run.dir / "given" / name
        expected, predicted = evaluate.test(model, fed)
        assert row.run == str(below) and row.top1 == expected["top1"] and row.params_m == expected["params_m"]
        written = json.loads((below / "metrics.json").read_text())
        assert written == {"method": "given", "dataset": "tiny.h5", **expected}
        with np.load(below / "test.npz") as arrays:
            assert np.array_equal(arrays["logits"], predicted.logits)
            assert np.array_equal(arrays["labels"], images.test.labels)
        # timing and pictures feed all models the same pixels: those of the first
        now = evaluate.predict(found.models[name], images.test, mean=found.images.mean, std=found.images.std)
        torch.testing.assert_close(now.logits, predicted.logits, atol=1e-5, rtol=1e-4)
    assert found.images.mean == (0.5, 0.5, 0.5)
    assert compare.baseline_arm(found.table, "dense") == "mine"
    paired = evidence.significance(found.table, "dense").set_index("arm")
    right = [(evaluate.predict(model, images.test, mean=found.images.mean, std=found.images.std).logits.argmax(1)
              == torch.as_tensor(images.test.labels)).double().mean() for model in found.models.values()]  # fmt: skip
    assert paired.difference["theirs"] == pytest.approx(float(right[1] - right[0])) and paired.p["mine"] == 1


def test_a_model_that_shrinks_its_images_is_taken(take, tmp_path):
    models.save(Shrunk.down(tiny(), 6), tmp_path / "small")
    found, _ = take(tmp_path / "small.safetensors")
    assert [*found.models] == ["small"] and found.table.macs_g[0] < 0.5 * evaluate.macs(tiny(), (3, 12, 12))["macs_g"]


def test_given_models_join_runs(take, images, tiny_h5, tmp_path, capsys):
    dense, pruner = tiny(), FixedPatches(tiny(), [0, 5, 6])
    made = method_run(tmp_path, "dense/one", images, dense, method="dense", ratio=1.0, source=str(tiny_h5))
    make_run(tmp_path, "dense/half", done=False)
    models.save(dense, tmp_path / "run" / "one" / "model", mean=images.mean, std=images.std)
    models.save(pruner.bfloat16(), tmp_path / "keep=3")
    found, run = take(tmp_path / "run" / "one", tmp_path / "keep=3.safetensors", runs="dense/*", dataset="")
    assert [*found.models] == found.table.arm.tolist() == ["dense 1", "run/one", "keep=3"]
    assert "1 runs on tiny.h5\nleft out dense/half: not finished (no DONE)" in capsys.readouterr().out
    assert found.table.run[0] == str(made) and found.table.macs_g[2] < found.table.macs_g[1]
    table = found.table.assign(latency_ms=1.0, speedup=1.0)
    summary = compare.summary(table, "top1", "dense").set_index("arm")
    assert summary.p["run/one"] == 1 and summary.method["run/one"] == "given"
    assert not list(Path(run.dir).rglob("DONE")), "no glob takes what lies there for runs"


def test_runs_trained_on_other_pixel_statistics_are_fed_alike(take, images, tiny_h5, tmp_path):
    ours, theirs = tiny(), tiny()
    method_run(tmp_path, "dense/one", images, ours, method="dense", ratio=1.0, source=str(tiny_h5))
    half = images.normalised("half")
    method_run(tmp_path, "dense/two", half, theirs, method="ucb", ratio=1.0, source=str(tiny_h5))
    found, _ = take(runs="dense/*", dataset="")
    x = evaluate.batch(found.images, 9)
    alone = arms.loaded([str(tmp_path / "dense" / name) for name in ("one", "two")], found.images)
    names = zip((("dense 1", ours, images), ("ucb 1", theirs, half)), alone.values(), strict=True)
    for (arm, model, fed), loaded in names:
        with torch.no_grad():
            expected = model(evaluate.batch(fed, 9))
            for each in (found.models[arm], loaded):
                torch.testing.assert_close(each(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrap", [lambda vit: vit, lambda vit: FixedPatches(vit, [0, 5, 6])])
def test_renormalised_models_give_the_same_logits(images, wrap, bias):
    vit = tiny().double()
    if not bias:
        vit.patch_embed.proj.bias = None
    model = wrap(vit)
    imagenet, half = images.normalised("imagenet"), images.normalised("half")
    with torch.no_grad():
        before = model(evaluate.batch(imagenet, 9).double())
        arms.renormalise(model, imagenet, half)
        after, unadapted = (model(evaluate.batch(data, 9).double()) for data in (half, imagenet))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)  # images are normalised in float32
    assert not torch.allclose(unadapted, before, atol=1e-3)


@pytest.mark.parametrize("form", ["saved", "bare", "nested"])
def test_heads_for_other_classes_are_refused(take, tmp_path, form):
    if form == "saved":
        given = models.save(tiny(5), tmp_path / "five")
    else:
        state = models.create("vit_digits", 5, 12).state_dict()
        given = f"vit_digits={tmp_path}/five.{'pth' if form == 'nested' else 'safetensors'}"
        if form == "nested":
            torch.save({"model": state}, tmp_path / "five.pth")
        else:
            save_file(state, tmp_path / "five.safetensors")
    with pytest.raises(finished.CompareError, match=r"five\.\w+ tells 5 classes apart: expected the 3 of tiny.h5"):
        take(given)
    assert not (tmp_path / "compare" / "c" / "given").exists()


def test_what_is_no_such_model_is_refused_in_one_line(take, images, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    save_file(tiny().state_dict(), tmp_path / "bare.safetensors")
    models.save(tiny(), tmp_path / "good")
    models.save(tiny(), tmp_path / "other" / "good")
    models.save(tiny(img_size=24), tmp_path / "large")
    models.save(tiny(), tmp_path / "cats", classes=["a", "b", "c"])
    hint = r"\(a run, a saved model, or arch=file for a state dict\)"
    for given, message in {
        ("nowhere.safetensors",): f"models: model .*nowhere.safetensors not found: .* {hint}",
        ("bare.pth",): f"bare.pth is not a whole safetensors file.*{hint}",
        ("bare.safetensors",): f"bare.safetensors holds bare weights.*{hint}",
        ("vit_digit=bare.pth",): "models: arch 'vit_digit' is unknown.*did you mean vit_digits",
        ("vit_digits=bare.pth",): "bare.pth does not fit arch 'vit_digits'",
        ("vit_digits=nowhere.pth",): "models: weights .*nowhere.pth not found",
        ("large.safetensors",): "models: images are 12x12, the model takes 24x24",
        ("cats.safetensors",): "cats.safetensors was trained for other classes than those of tiny.h5",
        ("good.safetensors", "other/good.safetensors"): "models: two arms are named 'good'",
    }.items():
        paths = [f"{arch}{equals}{tmp_path / file}" for arch, equals, file in map(split, given)]
        with pytest.raises(finished.CompareError, match=message) as caught:
            take(*paths, run_name=f"r{len(message)}")
        assert "\n" not in str(caught.value)


def split(spec: str) -> tuple[str, str, str]:
    return spec.rpartition("=")


def test_parameters_that_would_do_nothing_are_refused(take, images, tiny_h5, tmp_path):
    made = method_run(tmp_path, "dense/one", images, tiny(), method="dense", ratio=1.0, source=str(tiny_h5))
    for values, message in (
        ({"img_size": 6}, "img_size is 6, but the runs bring their images"),
        ({"normalise": "half"}, "normalise is 'half', but every model says what it was trained with"),
    ):
        with pytest.raises(params.ParameterError, match=message):
            take(made, runs="dense/*", dataset="", run_name=[*values][0], **values)


def test_without_runs_the_dataset_has_to_be_named(take, tmp_path):
    models.save(tiny(), tmp_path / "good")
    with pytest.raises(finished.NoRuns, match="no finished run in"):
        take()
    with pytest.raises(finished.CompareError, match="dataset is empty, and no run says which images"):
        take(tmp_path / "good.safetensors", dataset="", run_name="d")


def test_images_of_a_dataset_without_runs_take_the_size_asked_for(take, tmp_path):
    models.save(tiny(img_size=24), tmp_path / "large")
    found, _ = take(tmp_path / "large.safetensors", img_size=24)
    assert evaluate.image_shape(found.images) == (3, 24, 24)


def test_only_token_pruners_must_share_a_patch_grid(images):
    fine, coarse = FixedPatches(tiny(), [0, 5]), FixedPatches(tiny(patch_size=6), [0, 1])
    assert arms.patch_grid({"dense": coarse.vit, "fine": fine}) == (4, 4)
    assert arms.patch_grid({"a": tiny(), "b": tiny(patch_size=6), "c": models.create("resnet20", 3)}) == (1, 1)
    found = arms.kept({"dense": tiny(patch_size=6), "fine": fine}, images.test.images[:3], images)
    assert {name: [ids.tolist() for ids in sets] for name, sets in found.items()} == {"fine": [[0, 5]] * 3}
    with pytest.raises(finished.CompareError, match="different grids"):
        arms.patch_grid({"coarse": coarse, "fine": fine})


def test_what_merges_is_shown_merged_and_not_as_dropped(images):
    shown = {"dense": tiny(), "fixed": FixedPatches(tiny(), [0, 5]), "tome": ToMe(tiny(), [3, 2])}
    chosen = images.test.images[:2]
    assert [*arms.kept(shown, chosen, images)] == ["fixed"]
    found = arms.merged(shown, chosen, images)
    assert [*found] == ["tome"] and found["tome"].shape == (2, 16)
    assert [len(row.unique()) for row in found["tome"]] == [11, 11]


def test_resnets_take_part_but_not_under_other_pixel_statistics(take, images, tiny_h5, tmp_path):
    model = models.create("res20s", 3)
    method_run(tmp_path, "dense/one", images, model, method="dense", ratio=1.0, source=str(tiny_h5))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pth")
    torch.save(models.create("res20s", 5).state_dict(), tmp_path / "five.pth")
    found, _ = take(f"resnet20={tmp_path}/mine.pth", runs="dense/*", dataset="", normalise="data")
    assert {*found.models} == {"dense 1", "mine"} and arms.kept(found.models, images.test.images[:2], images) == {}
    x = evaluate.batch(found.images, 3)
    torch.testing.assert_close(found.models["mine"](x), found.models["dense 1"](x))
    with pytest.raises(finished.CompareError, match="five.pth tells 5 classes apart: expected the 3"):
        take(f"resnet20={tmp_path}/five.pth", run_name="five")
    with pytest.raises(finished.CompareError, match="a ResNet pads with zeros"):
        arms.renormalise(model, images.normalised("imagenet"), images.normalised("half"))
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, num_classes=3)
    with pytest.raises(finished.CompareError, match="a hybrid's patches come from a network that is not linear"):
        arms.renormalise(hybrid, images.normalised("imagenet"), images.normalised("half"))
