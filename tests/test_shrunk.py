"""A model on shrunken images: the plain model of that size, with the position embeddings that timm resamples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, images, make
from timm.layers import resample_abs_pos_embed

from lib import evaluate, models
from lib.blocks import UnsupportedBlock
from lib.pruners.shrunk import Shrunk

LARGE = [name for name in FAMILIES if make(name).patch_embed.img_size[0] % 4 == 0]


@pytest.mark.parametrize("family", LARGE)
def test_it_is_the_model_for_small_images_on_shrunken_ones(family):
    vit = make(family)
    x, patch = images(vit), vit.patch_embed.patch_size[0]
    small = Shrunk.down(copy.deepcopy(vit), 2 * patch)
    assert small.vit.patch_embed.num_patches == 4
    shrunken = F.interpolate(x, (2 * patch, 2 * patch), mode="bilinear", antialias=True)
    torch.testing.assert_close(small(x), small.vit(shrunken), rtol=0, atol=0)
    torch.testing.assert_close(small(shrunken), small.vit(shrunken), rtol=0, atol=0)
    first = vit.pos_embed.shape[1] - 16
    expected = resample_abs_pos_embed(vit.pos_embed, [2, 2], num_prefix_tokens=first)
    torch.testing.assert_close(small.vit.pos_embed, expected, rtol=0, atol=1e-6)
    for name, value in small.vit.state_dict().items():
        assert name == "pos_embed" or torch.equal(value, vit.state_dict()[name]), name


def test_it_costs_what_the_small_model_costs_and_is_saved(tmp_path):
    vit, x = models.create("vit_digits", 10).eval(), torch.rand(2, 3, 48, 48)
    small = Shrunk.down(vit, 36).eval()
    plain = models.create("vit_digits", 10, img_size=36)
    assert evaluate.macs(small, x[:1].shape)["macs_g"] == evaluate.macs(plain, (1, 3, 36, 36))["macs_g"]
    models.save(small, tmp_path / "model")
    torch.testing.assert_close(models.load(tmp_path).eval()(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, -6, 35, 48, 54])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"shrunk to {size} pixels: expected a multiple of 6 below 48"):
        Shrunk.down(models.create("vit_digits", 10), size)


def test_other_models_are_refused_by_name():
    with pytest.raises(UnsupportedBlock, match="Linear"):
        Shrunk(torch.nn.Linear(2, 2))
