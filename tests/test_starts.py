"""Where notebooks start from published weights: heads as they are, cut to the dataset's classes, or refused."""

from functools import partial

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from lib import models, params, runs, starts
from lib.images import DataError
from lib.models import ModelError
from lib.params import ParameterError

NOTEBOOK = runs.root() / "notebooks" / "token_baselines.ipynb"
WNIDS = ["n01440764", "n02102040", "n03888257"]  # of Imagenette: tench, springer, parachute


def pictures(folder, names):
    """48x48 pictures, three a class, in a folder per class."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (48, 48, 3)).astype(np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """dense(model_path, …): starts.dense with the parameters of token_baselines.ipynb, on pictures named by WordNet."""
    declaration, opened = params.declared_in(NOTEBOOK), []
    pictures(tmp_path / "wnids", WNIDS)
    monkeypatch.setattr(runs, "root", lambda: tmp_path)

    def start(path, **values):
        values = {"model_path": str(path), "dataset": str(tmp_path / "wnids"), "output_dir": "out", **values}
        opened.append(runs.Run("token_baselines", declaration, params.check(declaration, values)))
        try:
            return starts.dense(opened[-1], name="model_path")
        finally:
            opened[-1].close()

    return start


def weights(path, num_classes):
    """A file of bare weights of vit_digits, and the model that has them."""
    torch.manual_seed(num_classes)
    vit = models.create("vit_digits", num_classes).eval()
    torch.nn.init.normal_(vit.head.bias)
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(vit.state_dict(), path)
    return vit


def images(number=4):
    return torch.randn(number, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_head_for_imagenet_is_cut_to_the_datasets_classes(dense, tmp_path, suffix):
    whole, start = weights(tmp_path / f"w{suffix}", 1000), dense(tmp_path / f"w{suffix}")
    columns = [ImageNetInfo("imagenet-1k").label_names().index(wnid) for wnid in WNIDS]
    assert columns == [0, 217, 701] and start.images.class_ids == WNIDS
    assert torch.equal(start.vit.head.weight, whole.head.weight[columns])
    assert torch.equal(start.vit.head.bias, whole.head.bias[columns])
    with torch.no_grad():
        torch.testing.assert_close(start.vit(images()), whole(images())[:, columns], rtol=1e-5, atol=1e-6)
    assert start.path == "" and start.vit.num_classes == 3 and not start.vit.training


def test_what_was_cut_is_saved_and_found_again(dense, tmp_path):
    weights(tmp_path / "w.pth", 1000)
    start = dense(tmp_path / "w.pth", normalise="half")
    assert start.images.mean == (0.5, 0.5, 0.5)
    models.save(start.vit, tmp_path / "run" / "model", **start.about)
    again = dense(tmp_path / "run", dataset="digits")  # the default: a saved model brings its own
    with torch.no_grad():
        assert torch.equal(again.vit(images()), start.vit(images()))
    assert again.images.digest == start.images.digest and again.images.mean == start.images.mean
    assert again.path == str(tmp_path / "run")


@pytest.mark.parametrize("named", [True, False])
def test_a_thousand_classes_are_known_by_their_ids_or_said_to_be_in_order(dense, tmp_path, named, capsys):
    """Files may hold ImageNet's classes in another order than its heads."""
    whole, synsets = weights(tmp_path / "w.pth", 1000), ImageNetInfo("imagenet-1k").label_names()[::-1]
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["images"], file["labels"] = np.zeros((3, 48, 48, 3), np.uint8), [0, 1, 999]
        file.attrs["classes"] = [f"class {n}" for n in range(1000)]
        if named:
            file.attrs["wnids"] = synsets
    with pytest.warns(UserWarning, match="all 3 images are test"):
        start = dense(tmp_path / "w.pth", dataset=str(tmp_path / "all.h5"))
    assert torch.equal(start.vit.head.weight, whole.head.weight.flip(0) if named else whole.head.weight)
    assert ("taken to be in ImageNet-1k's order" in capsys.readouterr().out) is not named


@pytest.mark.parametrize("names", [WNIDS, ["cat", "dog", "emu"]], ids=["WordNet", "others"])
def test_a_head_for_as_many_classes_is_taken_as_it_is(dense, tmp_path, names):
    folder = pictures(tmp_path / "own", names)
    own, start = weights(tmp_path / "w.safetensors", 3), dense(tmp_path / "w.safetensors", dataset=folder)
    assert all(torch.equal(*pair) for pair in zip(start.vit.parameters(), own.parameters(), strict=True))
    assert start.about["classes"] == start.images.classes and len(start.images.classes) == 3
    assert runs.resolve(start.about["data"]["dataset"]) == folder


@pytest.mark.parametrize(
    ("names", "num_classes", "expected"),
    [(WNIDS, 7, 1000), (["cat", "dog", "emu"], 7, 3), (["cat", "dog", "emu"], 1000, 3),
     (["n01440764", "n02102040", "emu"], 1000, 3), (WNIDS, 21841, 1000)],
)  # fmt: skip
def test_a_head_for_other_classes_is_refused(dense, tmp_path, names, num_classes, expected):
    weights(tmp_path / "w.safetensors", num_classes)
    folder = pictures(tmp_path / "own", names)
    fault = rf"does not fit arch 'vit_digits': head.bias is \({num_classes},\), expected \({expected},\) and 1 more"
    with pytest.raises(ModelError, match=fault) as caught:
        dense(tmp_path / "w.safetensors", dataset=folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_or_size_are_refused(dense, tmp_path):
    weights(tmp_path / "w.safetensors", 1000)
    with pytest.raises(ModelError, match="does not fit arch 'vit_cifar'"):
        dense(tmp_path / "w.safetensors", arch="vit_cifar", img_size=32)
    with pytest.raises(ModelError, match="images are 48x48, the model takes 32x32"):
        weights_of = models.create("vit_cifar_small", 3)
        torch.save(weights_of.state_dict(), tmp_path / "w.pth")
        dense(tmp_path / "w.pth", arch="vit_cifar_small")


@pytest.fixture
def hub(monkeypatch):
    """timm's hub without internet: what it would fetch are random weights."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **settings: create(name, **settings))


def test_pretrained_weights_are_cut_alike(dense, hub):
    start = dense("pretrained", arch="vit_tiny_patch16_224", img_size=48)
    assert start.vit.num_classes == 3 and start.vit.head.weight.shape == (3, 192)
    assert models.describe(start.vit) == {
        **{"arch": "vit_tiny_patch16_224", "num_classes": 3, "img_size": 48, "timm": {}},
    }


def test_pretrained_weights_are_fed_as_they_were_trained(dense, hub):
    start = dense("pretrained", arch="vit_base_patch16_clip_224", img_size=48)
    assert start.images.mean == (0.48145466, 0.4578275, 0.40821073) == start.about["mean"]
    assert start.images.std == start.about["std"] != (0.5, 0.5, 0.5)
    asked = dense("pretrained", arch="vit_base_patch16_clip_224", img_size=48, normalise="half")
    assert asked.images.mean == asked.about["mean"] == (0.5, 0.5, 0.5)


def test_a_project_may_move(dense, tmp_path, monkeypatch):
    weights(tmp_path / "w.pth", 1000)
    start = dense(tmp_path / "w.pth")
    models.save(start.vit, tmp_path / "run" / "model", **start.about)
    assert start.about["data"]["dataset"] == "wnids"
    (tmp_path / "elsewhere").mkdir()
    for name in ("wnids", "run"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    monkeypatch.setattr(runs, "root", lambda: tmp_path / "elsewhere")
    again = starts.load(models.header(tmp_path / "elsewhere" / "run")["metadata"])
    assert len(again.test) == len(start.images.test) and again.mean == start.images.mean


def test_pretrained_weights_for_other_classes_are_refused(dense, hub, tmp_path):
    folder = pictures(tmp_path / "own", ["cat", "dog", "emu"])
    for arch, theirs in (("vit_tiny_patch16_224", 1000), ("vit_tiny_patch16_224.augreg_in21k", 21843)):
        fault = f"^pretrained weights of '{arch}' tell {theirs} classes apart: expected 3$"
        with pytest.raises(ModelError, match=fault):
            dense("pretrained", arch=arch, dataset=folder, img_size=48)
    with pytest.raises(ModelError, match=r"augreg_in21k' tell 21843 classes apart: expected 1000$"):
        dense("pretrained", arch="vit_tiny_patch16_224.augreg_in21k", img_size=48)


def test_weights_beside_bare_weights_are_refused(dense, tmp_path):
    weights(tmp_path / "w.pth", 1000)
    for path in ("pretrained", tmp_path / "w.pth"):
        with pytest.raises(
            ParameterError, match="^weights is 'x', but model_path is what the model starts from: leave"
        ):
            dense(path, weights="x")


def test_a_saved_model_brings_its_own_data(dense, tmp_path):
    models.save(models.create("vit_digits", 3), tmp_path / "model")
    with pytest.raises(ParameterError, match="dataset is .*, but model_path brings its own: leave it out"):
        dense(tmp_path / "model.safetensors")


def test_which_files_are_bare(tmp_path):
    vit = models.create("vit_digits", 3)
    (tmp_path / "run").mkdir()
    saved = models.save(vit, tmp_path / "run" / "model")
    for name in ("bare.safetensors", "bare.pth"):
        weights(tmp_path / name, 3)
    save_file(vit.state_dict(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "bare.safetensors").read_bytes()[:100])
    (tmp_path / "empty.safetensors").touch()
    bare = {"bare.safetensors": True, "theirs.safetensors": True, "bare.pth": True}
    none = {"run", "", "cut.safetensors", "empty.safetensors", "nowhere.safetensors", "nowhere.pth"}
    expected = bare | dict.fromkeys(none, False)
    assert {name: models.is_bare(str(tmp_path / name)) for name in expected} == expected
    assert models.is_bare("pretrained") and not models.is_bare("") and not models.is_bare(str(saved))
    assert not models.is_bare("scratch")


def test_what_is_neither_is_one_line(dense, tmp_path):
    weights(tmp_path / "w.safetensors", 3)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    with pytest.raises(ModelError, match="cut.safetensors is not a whole safetensors file"):
        dense(tmp_path / "cut.safetensors", dataset="digits")
    with pytest.raises(ModelError, match="nowhere.pth not found: expected a file written by lib.models.save"):
        dense("nowhere.pth", dataset="digits")


def test_what_starts_from_the_shipped_checkpoint_is_no_runs_model_trained_on(tmp_path):
    """Or dense.ipynb would call each first training "tuned"."""
    declaration = params.declared_in(NOTEBOOK.with_name("dense.ipynb"))
    run = runs.Run("dense", declaration, params.check(declaration, {"output_dir": str(tmp_path)}))
    assert run.params["weights"] == "checkpoints/vit_digits.safetensors"
    assert starts.initial(run, run.params["weights"]).path == ""
    run.close()


def test_images_that_changed_are_found_by_whatever_path_they_were_trained_on(tmp_path, monkeypatch):
    declaration = params.declared_in(NOTEBOOK.with_name("dense.ipynb"))
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    folder = pictures(tmp_path / "own", ["cat", "dog"])
    for named in (folder, "own"):  # of before paths stood from the project's folder, and of now
        about = {"data": {"dataset": named, "labels_csv": None, "img_size": 48}, "digest": "other"}
        models.save(models.create("vit_digits", 2), tmp_path / "run" / "model", **about)
        values = {"output_dir": "out", "dataset": folder, "img_size": 48, "weights": str(tmp_path / "run")}
        run = runs.Run("dense", declaration, params.check(declaration, values))
        with pytest.raises(DataError, match="other images than when this model was trained"):
            starts.initial(run, run.params["weights"])
        run.close()


def test_one_class_is_no_data_to_train_on(tmp_path):
    """Often a path that leads one folder too deep."""
    declaration = params.declared_in(NOTEBOOK.with_name("dense.ipynb"))
    values = {"output_dir": str(tmp_path), "dataset": pictures(tmp_path / "own", ["cat"]), "weights": ""}
    run = runs.Run("dense", declaration, params.check(declaration, values))
    with pytest.raises(DataError, match="dataset own has one class, 'cat': expected two or more"):
        starts.initial(run, "")
    run.close()


def test_a_distilled_models_heads_for_other_classes_start_anew(tmp_path, capsys):
    arch = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(arch, img_size=32).state_dict(), tmp_path / "w.pth")
    vit = models.create(arch, 3, 32, str(tmp_path / "w.pth"))
    assert vit.head.out_features == vit.head_dist.out_features == 3
    assert "starts at random" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"\(1000, 192\), expected \(3, 192\)"):
        models.create(arch, 3, 32, str(tmp_path / "w.pth"), fresh_head=False)


def test_a_model_sees_pixels_as_its_own_statistics_say(dense, tmp_path):
    """A CLIP is fed by its own mean and std, which no name stands for."""
    weights(tmp_path / "w.pth", 1000)
    start = dense(tmp_path / "w.pth")
    own = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    models.save(start.vit, tmp_path / "run" / "model", **start.about | own)
    found = dense(tmp_path / "run", dataset="digits").images
    assert (found.mean, found.std) == (own["mean"], own["std"]) != (start.images.mean, start.images.std)


def test_both_heads_of_a_distilled_model_are_cut(hub):
    vit = models.create("deit_tiny_distilled_patch16_224", 5, 32, "pretrained").eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(x)[:, [4, 0]]
        torch.testing.assert_close(models.of_classes(vit, [4, 0])(x), expected)


def test_a_model_does_not_meet_other_images_than_it_was_trained_with(dense, initial, tmp_path):
    """Split anew, some that it has learnt from would be test images."""
    folder = pictures(tmp_path / "own", ["cat", "dog"])
    initial = partial(initial, dataset=str(folder))
    start = initial("", "one")
    file = models.save(start.vit, tmp_path / "run" / "model", **start.about)
    assert initial(tmp_path / "run", "two").path == str(tmp_path / "run")
    assert initial(file, "by-its-file").path == "", "no run: what it becomes is not called a run's model, tuned"
    assert dense(tmp_path / "run", dataset="digits").images.digest == start.images.digest
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "own" / "cat" / "more.png")
    changed = "dataset own holds other images than when this model was trained"
    for begin in (lambda: dense(tmp_path / "run", dataset="digits"), lambda: initial(tmp_path / "run", "three"),
                  lambda: initial(file, "four")):  # fmt: skip
        with pytest.raises(DataError, match=changed) as caught:
            begin()
        assert "\n" not in str(caught.value)
    assert initial("", "five").path == "", "from scratch they are any images"


@pytest.fixture
def initial(tmp_path):
    """starts.initial with the parameters of dense.ipynb."""
    declaration = params.declared_in(NOTEBOOK.with_name("dense.ipynb"))

    def begin(weights, name, **values):
        values |= {"output_dir": str(tmp_path / "out"), "run_name": name}
        run = runs.Run("dense", declaration, params.check(declaration, values))
        try:
            return starts.initial(run, str(weights))
        finally:
            run.close()

    return begin


def test_weights_that_train_on_are_fed_as_they_were_trained(initial, hub, tmp_path):
    """At the default; what is asked for otherwise holds, and other images get their own statistics."""
    start = initial("pretrained", "hub", arch="vit_base_patch16_clip_224", img_size=48)
    assert start.images.mean == start.about["mean"] == start.vit.pretrained_cfg["mean"] != (0.5, 0.5, 0.5)
    asked = initial("pretrained", "asked", arch="vit_base_patch16_clip_224", img_size=48, normalise="half")
    assert asked.images.mean == (0.5, 0.5, 0.5)

    cats, birds = (str(pictures(tmp_path / name, [name, "dog"])) for name in ("cat", "bird"))
    first = initial("", "first", dataset=cats, normalise="half")
    models.save(first.vit, tmp_path / "run" / "model", **first.about)
    again = initial(tmp_path / "run", "again", dataset=cats)
    assert [*again.images.mean, *again.images.std] == [0.5] * 6 and again.about["mean"] == again.images.mean
    assert initial(tmp_path / "run", "imagenet", dataset=cats, normalise="imagenet").images.mean[0] == 0.485
    other = initial(tmp_path / "run", "other", dataset=birds).images
    assert other.mean == initial("", "alone", dataset=birds).images.mean != again.images.mean


def test_a_model_of_bare_weights_knows_its_images_too(dense, tmp_path):
    folder, weights = pictures(tmp_path / "own", ["cat", "dog"]), tmp_path / "bare.safetensors"
    save_file(models.create("vit_digits", 2, 48).state_dict(), weights)
    start = dense(weights, dataset=str(folder), img_size=48)
    assert start.about["digest"] == start.images.digest
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "own" / "cat" / "more.png")
    with pytest.raises(DataError, match="other images than when this model was trained"):
        starts.load(start.about)
