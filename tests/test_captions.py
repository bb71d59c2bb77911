"""A small CLIP made of a timm ViT and captions: its tower is the ViT, its loss is CLIP's, and training resumes."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from families import FAMILIES, images, make

from lib import blocks, captions, models, params, runs, zero_shot
from lib.pruners.tokens import TokenPruner
from lib.towers import Tower
from lib.train import Recipe

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

SUPPORTED = {"vit": {}, "deit": {}, "other widths": {"mlp_ratio": 3.0, "patch_size": 8, "num_heads": 4, "depth": 2}}
REFUSED = {"layerscale": "scale", "registers": "class token", "no class token": "class token", "qk norm": "attention",
           "registers, mean pooling": "class token", "norm before blocks": "norm", "attention pooling": "class token",
           "scaled norms": "attention"}  # fmt: skip
OTHERS = {"mlp": {"scale_mlp_norm": True}, "pooling": {"global_pool": "avg"}, "bias": {"qkv_bias": False},
          "squares": {"img_size": (64, 32)}, "position": {"no_embed_class": True}}  # fmt: skip


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small(vit):
    """A model with random weights as `fit` begins with, and its tokenizer."""
    config = {"embed_dim": 8, "vision_cfg": captions.vision_config(vit), "text_cfg": captions.TEXT}
    clip = randomised(open_clip.CLIP(**config).to(next(vit.parameters()).dtype))
    return clip, open_clip.SimpleTokenizer(context_length=captions.TEXT["context_length"])


@pytest.mark.parametrize("name", SUPPORTED)
def test_towers_are_the_vit_and_a_projection(name):
    vit = make(name if name in FAMILIES else "vit", **SUPPORTED[name])
    clip, _ = small(vit)
    missing = clip.visual.load_state_dict(captions.tower_state(vit), strict=False)
    assert missing.missing_keys == ["proj"] and not missing.unexpected_keys
    x = images(vit)
    pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
    torch.testing.assert_close(clip.encode_image(x), pooled @ clip.visual.proj, rtol=0, atol=1e-11)
    torch.testing.assert_close(Tower(clip.visual)(x), pooled @ clip.visual.proj, rtol=0, atol=1e-11)
    assert pooled.std() > 0.1


def test_every_family_is_made_or_refused():
    assert {*REFUSED} | {*SUPPORTED} >= {*FAMILIES}


@pytest.mark.parametrize("name", [*REFUSED, *OTHERS])
def test_other_vits_are_refused_by_name(name):
    vit = make(name) if name in FAMILIES else make("vit", **OTHERS[name])
    fault = f"VisionTransformer has another {REFUSED.get(name, name)} than a tower of open_clip"
    with pytest.raises(blocks.UnsupportedBlock, match=fault):
        captions.vision_config(vit)


def captioned(vit, prompts=captions.GENERAL):
    clip, tokenizer = small(vit)
    texts = torch.stack([tokenizer([prompt.format(name) for name in ("dark", "grey", "bright")]) for prompt in prompts])
    return captions.Captions(clip, texts), clip, tokenizer


def pictures(number=4):
    return torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_loss_is_a_cross_entropy_by_hand(vit):
    model, clip, _ = captioned(vit)
    targets, losses = torch.tensor([2, 0, 1, 1]), []
    found, parts = captions.caption_loss(model.train(), pictures(), targets)
    with torch.no_grad():
        f, scale = clip.encode_image(pictures()), clip.logit_scale.exp().item()
        for texts in model.texts:  # (C, L), a caption of every class
            words = clip.encode_text(texts)
            for image, target in zip(f, targets.tolist(), strict=True):
                logits = [scale * F.cosine_similarity(image, word, dim=0).item() for word in words]
                losses.append(math.log(sum(map(math.exp, logits))) - logits[target])
    assert len(losses) == 5 * 4 and parts == {}
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5) and found.item() > 0.5


def test_evaluated_it_is_zero_shot_classification_by_the_same_captions(vit):
    model, clip, tokenizer = captioned(vit)
    weights = open_clip.build_zero_shot_classifier(clip, tokenizer, ["dark", "grey", "bright"], captions.GENERAL)
    tower = Tower(clip.visual, weights)
    with torch.no_grad():
        found = model.eval()(pictures()) / clip.logit_scale.exp() * 100
        torch.testing.assert_close(found, TokenPruner(tower)(pictures()), rtol=1e-5, atol=1e-4)
        assert found.shape == (4, 3) and model.train()(pictures()).shape == (5, 4, 3)


def trained(make_run, tiny, name, seed=0):
    torch.manual_seed(seed)
    vit, run = models.create("vit_digits", 3, **TINY), make_run(run_name=name)
    return captions.fit(run, vit, tiny, Recipe(3, 4, 1e-3)), run


def same(a, b):
    a, b = (clip.model.state_dict() for clip in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_stopped_ends_in_the_same_bits(make_run, tiny, monkeypatch):
    whole, run = trained(make_run, tiny, "whole")
    rows = [json.loads(row) for row in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert (run.dir / "figures" / "training.png").exists()
    assert {path.name for path in (run.dir / "clip").iterdir()} == {
        *("open_clip_model.safetensors", "open_clip_config.json")
    }
    assert same(zero_shot.load(f"local-dir:{run.dir / 'clip'}"), whole)

    calls, loss = [], captions.caption_loss

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 14:  # the second step of the third epoch
            raise KeyError
        return loss(*arguments)

    monkeypatch.setattr(captions, "caption_loss", stopping)
    with pytest.raises(KeyError):
        trained(make_run, tiny, "stopped")
    monkeypatch.undo()
    again, stopped = trained(make_run, tiny, "stopped")
    assert same(again, whole) and (stopped.dir / "clip").exists()
    assert not same(trained(make_run, tiny, "other", seed=1)[0], whole)


def test_the_tower_starts_as_the_vit(make_run, tiny, monkeypatch):
    monkeypatch.setattr(captions.train, "fit", lambda *_, **__: [])
    monkeypatch.setattr(captions.plots, "training", lambda *_: pytest.importorskip("matplotlib.pyplot").figure())
    clip, _ = trained(make_run, tiny, "untrained")
    torch.manual_seed(0)
    vit, x = models.create("vit_digits", 3, **TINY).eval(), pictures()
    with torch.no_grad():
        pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
        torch.testing.assert_close(clip.model.encode_image(x), pooled @ clip.model.visual.proj, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"templates": ["a {}", "{} {}"]}, "templates hold '{} {}': expected texts with one {} for the class"),
     ({"pretrained": "openai"}, "pretrained is 'openai', but the model is made here: leave it out"),
     ({"model": "captions", "pretrained": "openai"}, "but the model is made here"),
     ({"model": "ViT-B-32", "pretrained": "openai", "epochs": 3}, "epochs is 3, but the model brings its own"),
     ({"model": "ViT-B-32", "arch": "vit_cifar"}, "arch is 'vit_cifar', but the model brings its own")],
)  # fmt: skip
def test_parameters_are_refused_before_anything_is_made(tmp_path, values, fault):
    declaration = params.declared_in(runs.root() / "notebooks" / "clip_zeroshot.ipynb")
    checked = params.check(declaration, {"output_dir": str(tmp_path), **values})
    with pytest.raises(params.ParameterError, match=re.escape(fault)):
        captions.model(runs.Run("clip_zeroshot", declaration, checked))
