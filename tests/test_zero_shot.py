"""Zero-shot classification: open_clip's own features and CLIP_benchmark's own numbers, and what is refused."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from lib import captions, data, evaluate, models, runs, zero_shot
from lib.params import ParameterError
from lib.pruners.anchors import Anchors
from lib.pruners.tokens import TokenPruner
from lib.towers import Tower
from lib.train import Recipe

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

VISION = {"image_size": 12, "patch_size": 3, "layers": 3, "width": 16, "head_width": 8}  # 16 patches
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISIONS = {"plain": {}, "layer scale": {"ls_init_value": 0.1}, "mean pooling": {"pool_type": "avg"},
           "no norm first": {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}}  # fmt: skip


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """open_clip knows the name tiny-clip; load() makes such a model with random weights, by a file of them."""

    def make(suffix="pt", **vision):
        config = {"embed_dim": 8, "vision_cfg": VISION | vision, "text_cfg": TEXT}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
        path = tmp_path / f"weights.{suffix}"
        torch.save(randomised(open_clip.create_model("tiny-clip")).state_dict(), path)
        return zero_shot.load("tiny-clip", str(path))

    monkeypatch.setattr(runs, "root", lambda: tmp_path)  # where caches of data go
    return make


@pytest.fixture
def start(load, tiny_h5):
    """start(clip, dataset, templates): a Start as clip_zeroshot.ipynb makes it."""
    return lambda clip, dataset=tiny_h5, templates=(): zero_shot.start(
        SimpleNamespace(params={"dataset": str(dataset), "templates": list(templates), "model": "tiny-clip"}), clip
    )


def images(number=5):
    return torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_before_2_24(clip):
    """The same tower in the layout (L, N, D)."""
    visual = clip.model.visual
    state = visual.transformer.state_dict()
    visual.transformer = open_clip.transformer.Transformer(16, 3, 2, 4.0, batch_first=False).eval()
    visual.transformer.load_state_dict(state)


@pytest.mark.parametrize("layout", ["NLD", "LND"])
def test_logits_are_open_clips_own_and_no_use_changes_the_model(load, start, layout):
    clip = load()
    if layout == "LND":
        as_before_2_24(clip)
    tower, x = start(clip).vit, images()
    before = copy.deepcopy(clip.model.state_dict())
    with torch.no_grad():
        expected = 100 * clip.model.encode_image(x, normalize=True) @ tower.weights
        assert expected.shape == (5, 3) and torch.equal(tower(x), expected)
        whole = TokenPruner(tower)(x)
        assert torch.equal(whole, expected) if layout == "NLD" else torch.allclose(whole, expected, rtol=0, atol=1e-4)
        pruner = Anchors(tower, 2, 3)
        assert (pruner(x) - expected).abs().max() > 0.1, "something was pruned"
        pruner.trace(x)
        assert torch.equal(tower(x), expected)
        assert torch.equal(100 * clip.model.encode_image(x, normalize=True) @ tower.weights, expected)
    assert same(before, clip.model.state_dict()) and not clip.model.training


def test_class_weights_are_normalised_means_of_normalised_prompts(load, start):
    clip, prompts = load(), ["a photo of a {}", "my {}."]
    weights = start(clip, templates=prompts).vit.weights
    for index, name in enumerate(("0", "1", "2")):
        with torch.no_grad():
            one, two = (clip.model.encode_text(clip.tokenizer([prompt.format(name)]))[0] for prompt in prompts)
        mean = (one / one.norm() + two / two.norm()) / 2
        torch.testing.assert_close(weights[:, index], mean / mean.norm())
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("faulty", ["a photo", "{} and {}", "a {x} {}", "a {} {"])
def test_prompts_without_one_place_for_the_class_are_refused(load, start, faulty):
    with pytest.raises(ParameterError, match=r"^templates hold '.*': expected texts with one \{\} for the class$"):
        start(load(), templates=["a {}", faulty])


def test_known_templates_are_those_of_the_paper():
    cifar, others = zero_shot.templates("CIFAR100"), zero_shot.templates("imagenette")
    assert zero_shot.templates("cifar10") == cifar and len({*cifar}) == len(cifar) == 18
    assert {"a photo of a {}.", "a bad photo of the {}.", "a photo of the big {}."} <= {*cifar}
    assert len({*others}) == len(others) == 80 and "a tattoo of the {}." in others
    assert zero_shot.templates("digits") == zero_shot.DIGITS
    assert all(prompt.count("{}") == 1 for prompt in [*cifar, *others, *zero_shot.DIGITS])
    assert not {*zero_shot.DIGITS} & {*captions.CAPTIONS}, "the prompts are what captions never said"


def test_classes_become_words():
    named = lambda *names: zero_shot.class_names(SimpleNamespace(classes=[*names], class_ids=[*names]))  # noqa: E731
    assert named("n03000684", "n01440764") == ["chainsaw", "tench"], "open_clip's own of ImageNet"
    assert named("tench, Tinca tinca", "garden_spider", "3") == ["tench", "garden spider", "3"]
    assert " ".join(named(*"0123456789")) == "zero one two three four five six seven eight nine"
    assert named(*"1023456789")[:2] == ["1", "0"], "not the digits in their order"


def dataset(path, classes=6):
    """An HDF5 of 12x12 images of one colour, 4 a class in training and 5 in the test."""
    rng, labels = np.random.default_rng(0), {"train": np.arange(4 * classes) % classes}
    labels["val"] = labels["train"]
    labels["test"] = np.arange(5 * classes) % classes
    with h5py.File(path, "w") as file:
        for split, own in labels.items():
            colours = rng.integers(0, 256, (len(own), 1, 1, 3)).astype(np.uint8)
            file[f"{split}_images"] = colours.repeat(12, axis=1).repeat(12, axis=2)
            file[f"{split}_labels"] = own
    return path


def test_classes_of_one_word_are_told_of(load, start, tmp_path, capsys):
    with h5py.File(dataset(tmp_path / "d.h5"), "a") as file:
        file.attrs["class_names"] = ["crane", "maillot", "sunglasses", "crane", "tench", "oboe"]
    start(load(), tmp_path / "d.h5")
    said = "two classes of d.h5 are 'crane': of them only the first is ever answered\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("classes", [3, 6])
def test_report_is_as_clip_benchmark_writes_it(load, start, tmp_path, classes):
    clip = load()
    begun = start(clip, dataset(tmp_path / "d.h5", classes))
    scores, _ = evaluate.test(begun.vit, begun.images)
    found = zero_shot.report(scores, begun, clip)
    assert json.loads(json.dumps(found)) == {
        **{"dataset": "d.h5", "model": "tiny-clip", "pretrained": str(tmp_path / "weights.pt")},
        **{"task": "zeroshot_classification", "language": "en"},
        "metrics": {"acc1": scores["top1"], "acc5": scores["top5"] if classes == 6 else None,
                    "mean_per_class_recall": pytest.approx(np.mean([*scores["per_class_accuracy"].values()]))},
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("whole", [True, False], ids=["all classes", "one is not there"])
def test_metrics_are_clip_benchmarks(load, start, tmp_path, monkeypatch, whole):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(theirs, "float", lambda array: array.item(), raising=False)  # newer numpy refuses (1,) arrays
    clip, prompts = load(), ["a photo of a {}", "my {}."]
    with torch.no_grad():  # so that images matter more than biases, and many classes are answered
        for name, parameter in clip.model.visual.named_parameters():
            parameter.mul_(0 if "bias" in name or "embedding" in name else 3)
    begun = start(clip, dataset(tmp_path / "d.h5"), prompts)
    if not whole:  # no image of a class that is answered
        test = begun.images.test
        answers, counts = evaluate.test(begun.vit, begun.images)[1].logits.argmax(1).unique(return_counts=True)
        answered = answers[counts.argmin()].item()
        others = np.where(test.labels == answered, (answered + 1) % 6, test.labels)
        begun = begun._replace(images=replace(begun.images, test=replace(test, labels=others)))
    scores, _ = evaluate.test(TokenPruner(begun.vit), begun.images)
    inputs = evaluate.inputs(begun.images.test.images, begun.images)
    pairs = [*zip(inputs, torch.as_tensor(begun.images.test.labels), strict=True)]
    loader = torch.utils.data.DataLoader(Listed(pairs, begun.images.classes), batch_size=8)
    said = [prompt.replace("{}", "{c}") for prompt in prompts]
    words = zero_shot.class_names(begun.images)
    expected = theirs.evaluate(clip.model, loader, clip.tokenizer, words, said, "cpu", amp=False)
    assert zero_shot.report(scores, begun, clip)["metrics"] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["acc1"] < expected["acc5"] < 1


class Listed(list):
    """A dataset of pairs that knows its classes, as CLIP_benchmark wants them to."""

    def __init__(self, pairs, classes):
        super().__init__(pairs)
        self.classes = classes


@pytest.mark.parametrize(
    ("name", "pretrained", "fault"),
    [("ViT-B-23", "openai", "model 'ViT-B-23' is unknown: expected a name of open_clip's, .*, did you mean ViT-B-32?"),
     ("zzz", "openai", "model 'zzz' is unknown: .*local-dir:…$"),
     ("ViT-B-32", "", r"model 'ViT-B-32' has no weights: expected pretrained, a file or a tag \(openai, .*laion2b"),
     ("tiny-clip", "", r"'tiny-clip' has no weights: .*\(none\)"),
     ("tiny-clip", "nowhere", "with pretrained 'nowhere' cannot be loaded: .*'nowhere' is not a known tag"),
     ("tiny-clip", "broken.pt", "'tiny-clip' with pretrained 'broken.pt' cannot be loaded: "),
     ("local-dir:nowhere", "", "'local-dir:nowhere' .*cannot be loaded: Directory .*not found: .*nowhere"),
     ("local-dir:bare", "", "'local-dir:bare' .*cannot be loaded: Required pretrained weights"),
     ("local-dir:bare", "openai", "pretrained is 'openai', but local-dir:bare brings its own weights: leave it out")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(load, tmp_path, name, pretrained, fault):
    load()
    (tmp_path / "broken.pt").write_bytes(b"PK")
    (tmp_path / "bare").mkdir()  # a configuration alone would be a model of random weights
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}}
    (tmp_path / "bare" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(models.ModelError, match=fault) as caught:
        zero_shot.load(name, pretrained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_weights_come_from_a_file(load, tmp_path, suffix):
    clip = load(suffix)
    state = torch.load(tmp_path / f"weights.{suffix}", weights_only=True)
    assert same(clip.model.state_dict(), state) and not clip.model.training
    assert same(zero_shot.load("tiny-clip", f"weights.{suffix}").model.state_dict(), state), "from the project's folder"
    assert clip.size == 12 and clip.mean == open_clip.OPENAI_DATASET_MEAN and clip.std == open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize("quick", [True, False])
def test_weights_that_were_trained_with_quickgelu_get_it(load, tmp_path, monkeypatch, quick):
    load()
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-clip", {"tag": {"quick_gelu": quick, "mean": (0, 0, 1)}}
    )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    clip = zero_shot.load("tiny-clip", "tag")
    wanted = open_clip.transformer.QuickGELU if quick else torch.nn.GELU
    assert all(type(block.mlp.gelu) is wanted for block in clip.model.visual.transformer.resblocks)
    assert clip.config["quick_gelu"] is quick and clip.mean == (0, 0, 1)


def test_weights_of_a_file_may_want_quickgelu(load, tmp_path, monkeypatch):
    load()
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"openai": {"quick_gelu": True}})
    with pytest.warns(UserWarning, match="if these weights were trained with QuickGELU.* name the model tiny-clip-qui"):
        zero_shot.load("tiny-clip", str(tmp_path / "weights.pt"))


def test_classes_of_imagenet_have_the_names_of_open_clip():
    images = SimpleNamespace(class_ids=["n03126707", "n02012849"], classes=["crane", "crane"])  # a machine and a bird
    assert zero_shot.class_names(images) == ["construction crane", "crane bird"]


@pytest.mark.parametrize(
    ("fed", "found"), [({"resize_mode": "squash"}, r"12\) px, resized by 'squash'"), ({"size": [12, 16]}, "12, 16")]
)
def test_images_prepared_in_another_way_are_refused(load, monkeypatch, fed, found):
    create = open_clip.create_model

    def created(*arguments, **options):
        clip = create(*arguments, **options)
        clip.visual.preprocess_cfg |= fed
        return clip

    load()
    monkeypatch.setattr(open_clip, "create_model", created)
    with pytest.raises(
        models.ModelError, match=f"takes images of .*{found}.*: expected squares, resized by 'shortest'$"
    ):
        zero_shot.load("tiny-clip", "weights.pt")


def test_images_are_fed_as_the_model_wants_them(load, start, tiny_h5, tmp_path):
    clip = load(image_size=24)._replace(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    begun = start(clip)
    assert begun.images.test.images.shape == (9, 24, 24, 3)
    x = evaluate.inputs(begun.images.test.images, begun.images)
    resized = data.load(tiny_h5, img_size=24, root=tmp_path).test.images / 255
    torch.testing.assert_close(x.permute(0, 2, 3, 1), torch.tensor((resized - clip.mean) / clip.std).float())


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
def test_towers_come_back_from_a_file(load, start, tmp_path, vision):
    begun = start(load(**vision))
    for model in (begun.vit, Anchors(begun.vit, 2, 0.3, alpha=0.2)):
        loaded = models.load(models.save(model, tmp_path / "model", **begun.about))
        assert type(loaded) is type(model) and same(loaded.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(loaded(images()), model(images())) and loaded(images()).shape == (5, 3)
    assert models.origin(tmp_path / "model.safetensors", "anchors.Anchors")["classes"] == ["0", "1", "2"]


def test_features_without_classes_come_back_from_a_file(load, tmp_path):
    clip = load()
    tower = Tower(
        clip.model.visual, None, {name: clip.config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu")}
    )
    loaded = models.load(models.save(tower, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(images()), clip.model.encode_image(images())) and loaded.weights is None


def test_a_model_of_captions_is_not_tested_on_other_images_than_it_was_made_for(load, tiny_h5, tmp_path):
    """Its own dataset with another split: what it is tested on now, it may have learnt from."""
    clip, folder = load(), tmp_path / "made"
    clip = clip._replace(name=f"local-dir:{folder / 'clip'}")
    again = tmp_path / "split_anew.h5"
    with h5py.File(tiny_h5) as old, h5py.File(again, "w") as new:
        for split, other in {"train": "train", "val": "test", "test": "val"}.items():
            for name in ("images", "labels"):
                new[f"{split}_{name}"] = old[f"{other}_{name}"][:]
    asked = lambda dataset: SimpleNamespace(params={"dataset": str(dataset), "templates": [], "model": ""})  # noqa: E731
    runs.write_json(folder / "provenance.json", {"dataset_digest": data.load(tiny_h5).digest})
    assert zero_shot.start(asked(tiny_h5), clip).about["digest"] == data.load(tiny_h5).digest
    with pytest.raises(
        data.DataError, match=r"split_anew\.h5 holds other images than when the model in .*made was trained: "
    ):
        zero_shot.start(asked(again), clip)


def test_folders_of_captions_are_open_clips_own(make_run, tiny, monkeypatch):
    torch.manual_seed(0)
    vit, run = models.create("vit_digits", 3, **TINY), make_run()
    clip = captions.fit(run, vit, tiny, Recipe(1, 8, 1e-3))
    theirs = open_clip.create_model(f"local-dir:{run.dir / 'clip'}").eval()
    assert same(theirs.state_dict(), clip.model.state_dict())
    texts = clip.tokenizer(["a photo of a 2"])
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(images()), clip.model.encode_image(images()))
        assert torch.equal(theirs.encode_text(texts), clip.model.encode_text(texts))
    torch.testing.assert_close(torch.tensor(clip.mean), torch.tensor(tiny.mean).float())
    assert clip.size == 12 and clip.pretrained == "" and clip.name == f"local-dir:{run.dir / 'clip'}"
    monkeypatch.setattr(runs, "root", lambda: run.dir)
    again = zero_shot.load("local-dir:clip")  # from the project's folder, as every path
    assert same(again.model.state_dict(), clip.model.state_dict())
    assert F.cosine_similarity(*again.model.encode_text(again.tokenizer(["one", "two"])), dim=0) < 1
