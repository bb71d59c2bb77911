"""lib.augment: identities, known transforms, and randomness per image that the generator alone decides."""

import json

import numpy as np
import pytest
import torch

from lib.augment import LIMITS, PRESETS, Augment, mix, normalise, step_generator, warp


def gen(step=0):
    return step_generator(0, 0, step)


def photos(batch=4, channels=3, height=16, width=16):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def unmoved(batch):
    return torch.eye(2, dtype=torch.float64).repeat(batch, 1, 1), torch.zeros(batch, 2, dtype=torch.float64)


@pytest.mark.parametrize("policy", ["none", {}, dict.fromkeys(LIMITS, 0), dict.fromkeys(LIMITS, 0.0)])
def test_zero_magnitude_is_the_identity_bit_for_bit(policy):
    images = photos()
    out = Augment(policy)(images, gen())
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
    assert Augment(policy).policy == {}


def test_unmoved_warp_is_the_identity():
    images = photos(height=13, width=22)
    assert torch.allclose(warp(images, *unmoved(4)), images, atol=1e-5)


@pytest.mark.parametrize("dx, dy", [(3, 0), (0, -2), (-4, 5)])
def test_a_whole_pixel_shift_is_a_roll_with_zeros_let_in(dx, dy):
    images = photos(height=12, width=20)
    matrix, shift = unmoved(4)
    out = warp(images, matrix, shift + torch.tensor([dx, dy]))
    expected = images.roll((dy, dx), dims=(2, 3))
    expected[:, :, range(dy) if dy > 0 else range(12 + dy, 12)] = 0
    expected[..., range(dx) if dx > 0 else range(20 + dx, 20)] = 0
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_quarter_turn_is_rot90():
    images = photos()
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64).repeat(4, 1, 1)
    assert torch.allclose(warp(images, matrix, unmoved(4)[1]), images.rot90(-1, (2, 3)), atol=1e-5)


def test_a_rotation_stays_a_rotation_on_oblong_images():
    """A dot 4 px right of the centre goes to 4 px below it, whatever the sides are."""
    images = torch.zeros(1, 1, 11, 21)
    images[0, 0, 5, 14] = 1
    matrix = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    out = warp(images, matrix, unmoved(1)[1])
    assert out[0, 0, 9, 10] == pytest.approx(1, abs=1e-4) and out.sum() == pytest.approx(1, abs=1e-3)


def test_flip_alone_is_a_flip_for_about_half_the_images():
    images = photos(batch=200)
    out = Augment({"flip": 0.5})(images, gen())
    flipped = torch.isclose(out, images.flip(3), atol=1e-5).flatten(1).all(1)
    kept = torch.isclose(out, images, atol=1e-5).flatten(1).all(1)
    assert (flipped ^ kept).all() and 70 < flipped.sum() < 130
    assert torch.allclose(Augment({"flip": 1.0})(images, gen()), images.flip(3), atol=1e-5)


def test_crop_shifts_by_whole_pixels_and_reaches_every_one():
    images = torch.zeros(400, 1, 16, 16)
    images[:, :, 8, 8] = 1
    out = Augment({"crop": 0.125})(images, gen())
    brightest, where = out.flatten(1).max(1)
    assert torch.allclose(brightest, torch.ones(400), atol=1e-5)  # no dot smeared over two pixels
    assert set((where // 16).tolist()) == set((where % 16).tolist()) == {6, 7, 8, 9, 10}


@pytest.mark.parametrize("entry, magnitude", [("translate", 0.2), ("rotate", 30), ("scale", 0.3), ("shear", 20)])
def test_geometry_keeps_within_its_magnitude(entry, magnitude):
    """Ten thousand draws of one entry move the point (6, 3) by no more than the entry allows, and nearly so."""
    from lib.augment import _draw_geometry

    matrix, shift = _draw_geometry({entry: magnitude}, torch.Size((10_000, 3, 16, 16)), gen())
    point = torch.tensor([6.0, 3.0], dtype=torch.float64)
    moved = torch.linalg.solve(matrix, point) + shift
    if entry == "translate":
        most = (moved - point).abs().max() / 16
    elif entry == "rotate":
        cosine = moved @ point / moved.norm(dim=1) / point.norm()
        most = torch.rad2deg(cosine.clamp(-1, 1).arccos()).max()
        assert torch.allclose(moved.norm(dim=1), point.norm().expand(10_000))
    elif entry == "scale":
        most = (moved.norm(dim=1) / point.norm()).max() - 1
        assert (moved.norm(dim=1) / point.norm()).min() == pytest.approx(1 / 1.3, rel=0.01)
    else:
        most = torch.rad2deg(((moved - point)[:, 0] / point[1]).abs().arctan()).max()
        assert torch.allclose(moved[:, 1], point[1].expand(10_000))
    assert most == pytest.approx(magnitude, rel=0.01) and most <= magnitude + 1e-6


def test_brightness_scales_and_contrast_keeps_the_mean():
    images = photos() * 0.5
    ratio = Augment({"brightness": 0.5})(images, gen()) / images
    assert torch.allclose(ratio, ratio[:, :1, :1, :1].expand_as(ratio), atol=1e-5)
    assert len(set(ratio[:, 0, 0, 0].tolist())) == 4
    images = 0.4 + 0.2 * photos()
    out = Augment({"contrast": 0.5})(images, gen())
    assert torch.allclose(out.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    assert not torch.allclose(out, images, atol=1e-3)


def test_colour_turns_keep_luma_and_leave_grey_alone():
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    images = 0.4 + 0.1 * photos()
    for policy in ({"hue": 0.5}, {"saturation": 1.0}):
        out = Augment(policy)(images, gen())
        assert torch.allclose((out * weights).sum(1), (images * weights).sum(1), atol=1e-4)
        assert not torch.allclose(out, images, atol=1e-2)
        grey = images[:, :1].expand(-1, 3, -1, -1)
        assert torch.allclose(Augment(policy)(grey, gen()), grey, atol=1e-3)


def test_erase_paints_one_rectangle_of_one_colour():
    images = torch.full((300, 3, 32, 32), 0.123456)
    out = Augment({"erase": 0.5})(images, gen())
    hole = (out != images).any(1)  # (B, H, W)
    erased = hole.flatten(1).any(1)
    assert 110 < erased.sum() < 190
    for image, mask in zip(out[erased], hole[erased], strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == box[:, :1, :1]).all() and mask.sum() == box[0].numel()
        assert 0.012 < mask.float().mean() < 0.4


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "none"])
def test_presets(name):
    augment = Augment(name)
    images = photos(1).repeat(8, 1, 1, 1)
    out = augment(images, gen())
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1 and out.isfinite().all()
    distinct = {tuple(image.flatten().tolist()) for image in out}
    assert len(distinct) > (2 if name == "crop-flip" else 7)  # one draw per image, not per batch
    assert torch.equal(out, augment(images, gen())) and not torch.equal(out, augment(images, gen(1)))
    assert torch.equal(images, photos(1).repeat(8, 1, 1, 1))  # the argument is left untouched
    assert Augment(json.loads(json.dumps(augment.policy))).policy == augment.policy


def test_uint8_and_float_images_come_out_alike():
    images = (photos() * 255).byte()
    for name in PRESETS:
        assert torch.equal(Augment(name)(images, gen()), Augment(name)(images.float() / 255, gen()))
    assert Augment("strong")(photos().double(), gen()).dtype == torch.float64


def test_global_random_state_has_no_say_and_is_left_alone():
    images = photos()
    torch.manual_seed(1)
    first = Augment("strong")(images, gen())
    torch.manual_seed(2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(Augment("strong")(images, gen()), first)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_step_generators_depend_on_each_number():
    numbers = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 10, 1), (0, 1, 10), (2**40, 0, 0)]
    assert len({torch.rand((), generator=step_generator(*n)).item() for n in numbers}) == len(numbers)
    first, again = (torch.rand(5, generator=step_generator(3, 2, 1)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "policy, message",
    [
        ("crop-flop", "did you mean 'crop-flip'"),
        ({"rotat": 3}, "did you mean 'rotate'"),
        ({"qqq": 3}, "unknown augmentation entry 'qqq' .known: flip"),
        ({"flip": 1.5}, "flip: found 1.5, expected 0 to 1"),
        ({"hue": -0.1}, "hue: found -0.1"),
        ({"hue": float("nan")}, "hue: found nan"),
        ({"flip": True}, "flip: found True"),
        ({"crop": "4"}, "crop: found '4'"),
    ],
)
def test_bad_policies_are_refused_in_one_line(policy, message):
    with pytest.raises(ValueError, match=message) as error:
        Augment(policy)
    assert "\n" not in str(error.value)


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="RGB"):
        Augment("strong")(photos(channels=1), gen())
    with pytest.raises(ValueError, match="expected .B, C, H, W."):
        Augment("shift")(photos()[0], gen())


def test_one_channel_images_shift():
    assert Augment("shift")(photos(channels=1), gen()).shape == (4, 1, 16, 16)


def test_normalise():
    out = normalise(torch.ones(2, 3, 4, 4), (0.5, 0.25, 1.0), (0.5, 0.5, 2.0))
    assert out[0, :, 0, 0].tolist() == [1.0, 1.5, 0.0]


def mixed(images, labels, seed=0, mixup=0.8, cutmix=1.0, smoothing=0.1):
    generator = step_generator(seed, 0, 0)
    return mix(images, labels, 10, mixup_alpha=mixup, cutmix_alpha=cutmix, smoothing=smoothing, generator=generator)


@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0), (0, 0)])
def test_mix_gives_targets_that_sum_to_one(batch, mixup, cutmix):
    images, labels = photos(batch), torch.arange(batch)
    before = images.clone()
    out, targets = mixed(images, labels, mixup=mixup, cutmix=cutmix)
    assert out.shape == images.shape and targets.shape == (batch, 10) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(batch), atol=1e-6) and (targets >= 0).all()
    assert torch.equal(images, before)


def test_mixup_mixes_images_as_it_mixes_targets():
    for batch in (4, 5):
        images, labels = photos(batch), torch.arange(batch)
        out, targets = mixed(images, labels, cutmix=0, smoothing=0)
        shares = targets[:, :batch]  # labels are all different: the target row holds the shares
        assert torch.allclose(out, torch.einsum("ij,jchw->ichw", shares, images), atol=1e-6)
        assert not torch.allclose(out, images, atol=1e-3)


def test_cutmix_share_is_the_area():
    images = torch.stack([torch.full((3, 16, 16), float(i)) for i in range(4)])
    out, targets = mixed(images, torch.arange(4), seed=3, mixup=0, smoothing=0)
    own = (out == images).float().mean((1, 2, 3))
    assert torch.allclose(targets[range(4), range(4)], own, atol=1e-6) and (own < 1).all()


def test_no_mix_is_label_smoothing():
    images = photos()
    out, targets = mixed(images, torch.arange(4), mixup=0, cutmix=0)
    assert torch.equal(out, images) and targets[0].tolist() == pytest.approx([0.91] + [0.01] * 9)


def test_mix_is_seeded_and_leaves_numpy_alone():
    images, labels = photos(8), torch.arange(8)
    np.random.seed(5)
    state = np.random.get_state()
    first = mixed(images, labels)
    after = np.random.get_state()
    assert state[2:] == after[2:] and (state[1] == after[1]).all()
    np.random.seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, mixed(images, labels), strict=True))
    assert not torch.equal(first[0], mixed(images, labels, seed=1)[0])


def test_bad_mix_settings_are_refused():
    for bad in ({"mixup": -1}, {"cutmix": float("nan")}, {"smoothing": 1.0}):
        with pytest.raises(ValueError, match="mix: expected"):
            mixed(photos(), torch.arange(4), **bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_what_the_cpu_draws():
    images = photos()
    on_gpu = Augment("strong")(images.cuda(), gen()).cpu()
    assert torch.allclose(on_gpu, Augment("strong")(images, gen()), atol=1e-4)
