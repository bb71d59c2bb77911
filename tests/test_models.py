"""Models: made by name, saved and loaded bit for bit however wrapped, and never from code in a file."""

import json
import pickle

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from lib import models, runs
from lib.models import ModelError
from lib.pruners.tokens import FixedPatches
from lib.pruners.ucb import UCB


def make(num_classes: int = 3, **changes):
    return models.create("vit_digits", num_classes, **{**TINY, **changes})


def same(a, b) -> bool:
    """Whether two models have the same weights, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_presets_and_timm_names_take_timms_overrides():
    assert make().patch_embed.num_patches == 16
    assert sum(p.numel() for p in models.create("vit_cifar", 100).parameters()) == 2_714_980
    vit = models.create("deit_tiny_patch16_224", 5, 32, depth=1, embed_dim=24)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 5) and len(vit.blocks) == 1


@pytest.mark.parametrize(
    "arch, changes, fault",
    [
        ("vit_digit", {}, "arch 'vit_digit' is unknown: .*, did you mean vit_digits"),
        ("vit_tiny_patch16_242", {}, "did you mean vit_tiny_patch16_224"),
        ("vit_digits", {"img_size": 50}, "img_size 50 is not a multiple of patch_size 6"),
        ("vit_tiny_patch16_224", {"img_size": 50}, "img_size 50 is not a multiple of patch_size 16"),
        ("vit_tiny_patch16_224", {"patch_size": 15}, "img_size 224 is not a multiple of patch_size 15"),
        ("vit_digits", {"num_heads": 5}, "arch 'vit_digits' cannot be made with"),
        ("vit_digits", {"colour": 5}, "cannot be made with .*colour"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(arch, changes, fault):
    with pytest.raises(ModelError, match=fault):
        models.create(arch, 3, **changes)


def test_pretrained_weights_that_cannot_be_had_are_one_line(monkeypatch):
    with pytest.raises(ModelError, match="arch 'vit_digits' has no pretrained weights"):
        make(weights="pretrained")

    def offline(*_, **__):
        raise OSError("cannot find the file on the Hub\nTraceback …")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match="pretrained weights of 'deit_tiny_patch16_224' cannot be fetched: .* Hub$"):
        models.create("deit_tiny_patch16_224", 3, weights="pretrained")


def trained_ucb():
    model = UCB(make(), 0.5, beta=0.3, warmup_steps=1).train()
    for _ in range(3):
        model(torch.randn(4, 3, 12, 12))
    return model


KINDS = {
    "dense": make,
    "float64": lambda: make().double(),
    "ucb": trained_ucb,
    "frozen": lambda: trained_ucb().freeze(0.3),
    "frozen ucb": lambda: UCB(FixedPatches(make(), [3, 5, 7]).vit, 0.9),
}


@pytest.mark.parametrize("kind", ["dense", "float64", "ucb", "frozen"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, kind):
    torch.manual_seed(0)
    model = KINDS[kind]()
    path = models.save(model, tmp_path / "model", classes=["a", "b", "c"], mean=(0.1, 0.2, 0.3))
    loaded = models.load(tmp_path)
    assert path == tmp_path / "model.safetensors" and type(loaded) is type(model)
    assert same(loaded, model) and not loaded.training
    assert repr(loaded) == repr(model) and models.describe(loaded) == models.describe(model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(2, 3, 12, 12, dtype=next(model.parameters()).dtype)
    assert torch.equal(loaded(images), model.eval()(images))
    header = models.header(path)
    assert header["metadata"] == {"classes": ["a", "b", "c"], "mean": [0.1, 0.2, 0.3]}
    assert json.loads(path.with_suffix(".json").read_text()) == header
    if kind == "ucb":
        assert loaded.ucb_count_scores.max() > 1 and int(loaded.steps) == 3


def test_a_loaded_model_trains(tmp_path, vit):
    models.save(vit, tmp_path / "model")
    loaded = models.load(tmp_path).train()
    loaded(torch.randn(2, 3, 12, 12)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_name_with_a_dot_keeps_it(tmp_path, vit):
    assert models.save(vit, tmp_path / "keep0.3").name == "keep0.3.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"keep0.3.safetensors", "keep0.3.json"}


def test_a_foreign_timm_model_is_saved_where_its_configuration_says_it_all(tmp_path):
    foreign = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=4)
    models.save(foreign, tmp_path / "model")
    assert same(models.load(tmp_path), foreign)


@pytest.mark.parametrize(
    "foreign, fault",
    [
        (lambda: timm.create_model("deit3_small_patch16_224", depth=1, qk_norm=True), "would not rebuild"),
        (lambda: VisionTransformer(img_size=32, depth=1, embed_dim=24), "cannot describe a VisionTransformer"),
        (lambda: torch.nn.Linear(2, 2), "cannot describe a Linear"),
        (KINDS["frozen ucb"], "would not rebuild this UCB"),
        (lambda: (vit := make(), setattr(vit, "head", torch.nn.Linear(16, 9)))[0], "would not rebuild"),
    ],
)
def test_a_model_that_its_configuration_would_not_rebuild_is_not_saved(tmp_path, foreign, fault):
    with pytest.raises(ModelError, match=fault):
        models.save(foreign(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_is_whole_or_not_at_all(tmp_path, vit, monkeypatch):
    path = models.save(vit, tmp_path / "model")
    before = path.read_bytes()

    def full(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        models.save(make(5), tmp_path / "model")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_model_is_refused(tmp_path, vit, size):
    path = models.save(vit, tmp_path / "model")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="model.safetensors is not a whole safetensors file"):
        models.load(path)
    with pytest.raises(ModelError, match="model.safetensors is not a readable state dict"):
        models.create("vit_digits", 3, weights=path, **TINY)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="model.safetensors not found"):
        models.load(tmp_path)
    with pytest.raises(ModelError, match="weights .*x.pth not found: expected a local file"):
        make(weights=tmp_path / "x.pth")


def test_bare_weights_are_for_create(tmp_path, vit):
    path = tmp_path / "bare.safetensors"
    save_file(vit.state_dict(), path)
    with pytest.raises(ModelError, match="holds bare weights: give it to lib.models.create"):
        models.load(path)
    assert same(make(weights=path), vit)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_a_state_dict_file_is_read(tmp_path, vit, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(vit.state_dict()), path)
    assert same(make(weights=str(path)), vit)


class Bomb:
    """Unpickling it creates the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, vit, dump):
    path, mark = tmp_path / "evil.pth", tmp_path / "executed"
    dump({**vit.state_dict(), "x": Bomb(mark)}, path)
    with pytest.raises(
        ModelError, match=r"evil.pth is not a readable state dict \(truncated, or it holds code\)"
    ) as caught:
        make(weights=path)
    assert not mark.exists() and "weights_only" not in str(caught.value)
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists()  # the bomb was live


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"model": 3}, {"head.weight": [1.0]}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ModelError, match="odd.pth is not a state dict"):
        make(weights=tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"depth": 3}, "does not fit arch 'vit_digits': blocks.2.norm1.weight is missing and 11 more"),
        ({"depth": 1}, "blocks.1.attn.proj.bias is unknown and 11 more"),
        ({"embed_dim": 32}, r"blocks.0.attn.proj.bias is \(16,\), expected \(32,\) and 29 more"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, vit, changes, fault):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=fault) as caught:
        make(weights=tmp_path / "w.safetensors", **changes)
    assert "\n" not in str(caught.value)


def test_a_head_for_other_classes_is_replaced_and_said(tmp_path, vit, capsys):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    other = make(7, weights=tmp_path / "w.safetensors")
    assert capsys.readouterr().out.startswith("w.safetensors: head for 7 classes starts at random")
    assert other.head.weight.shape == (7, 16) and torch.equal(
        other.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight
    )


def test_position_embeddings_follow_the_image_size(tmp_path, vit):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    larger = make(img_size=18, weights=tmp_path / "w.safetensors")
    assert larger.pos_embed.shape == (1, 37, 16) and torch.equal(larger.pos_embed[:, 0], vit.pos_embed[:, 0])


def edited(path, change):
    """The model file with its header changed."""
    header = models.header(path)
    change(header)
    save_file(load_file(path), path, metadata={"lib": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda h: h.update(format=99), "has format 99: this version reads 1"),
        (lambda h: h["model"].update(pruner="future.New", arguments={}), "pruner 'future.New' is unknown"),
        (lambda h: h["model"].update(pruner="ucb.copy", arguments={}), "pruner 'ucb.copy' is unknown"),
        (
            lambda h: h["model"].update(pruner="tokens.checkpoint", arguments={}),
            "pruner 'tokens.checkpoint' is unknown",
        ),
        (lambda h: h["model"].update(pruner="..runs.Run", arguments={}), "pruner '..runs.Run' is unknown"),
        (lambda h: h["model"].update(num_classes=9), "does not fit its own configuration .*head.bias"),
        (lambda h: h["model"].update(arch="vit_of_tomorrow"), "arch 'vit_of_tomorrow' is unknown"),
    ],
)
def test_a_header_that_this_version_cannot_follow_is_refused(tmp_path, vit, change, fault):
    path = edited(models.save(vit, tmp_path / "model"), change)
    with pytest.raises(ModelError, match=fault) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_a_run_folder_is_found_by_a_path_from_the_project(tmp_path, vit, monkeypatch):
    models.save(vit, tmp_path / "outputs" / "dense" / "x" / "model")
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    assert same(models.load(runs.resolve("outputs/dense/x")), vit)


def test_weights_may_come_from_a_run(tmp_path, vit):
    models.save(vit, tmp_path / "run" / "model")
    again = models.create("vit_digits", 3, weights=tmp_path / "run", **TINY)
    assert all(torch.equal(mine, other) for mine, other in zip(again.parameters(), vit.parameters(), strict=True))
    with pytest.raises(models.ModelError, match="model.safetensors not found"):
        models.create("vit_digits", 3, weights=tmp_path, **TINY)


@pytest.mark.parametrize("dynamic", [False, True])
def test_images_of_another_size_than_the_model_counts_with_are_refused(dynamic):
    vit = models.create("vit_tiny_patch16_224", 3, **TINY, dynamic_img_size=dynamic)
    models.match(vit, (3, 12, 12))
    with pytest.raises(ModelError, match="images are 24x24, the model takes 12x12: set img_size"):
        models.match(vit, (3, 24, 24))
