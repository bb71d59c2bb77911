"""Token machinery: wrapped = bare, embedding only what is kept, MACs by the closed form, refusals by name."""

import copy
import pickle

import pytest
import timm
import torch
from families import FAMILIES, by_onnx, images, make
from torch import nn

from lib import blocks, evaluate
from lib.pruners import components, rankings
from lib.pruners.baselines import GridDrop, ToMe
from lib.pruners.shrunk import Shrunk
from lib.pruners.tokens import FixedPatches, TokenPruner, gather, kept_count, with_prefix
from lib.pruners.ucb import UCB

CLOSE = {"rtol": 0, "atol": 1e-11}


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_equals_bare(family):
    vit = make(family)
    x = images(vit)
    torch.testing.assert_close(TokenPruner(vit)(x), vit(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_a_block_are_the_block(family):
    vit = make(family)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    for block in vit.blocks:
        fed = block.norm1(x)
        q, k, v = blocks.qkv(block.attn, fed)
        fused = blocks.attend(block.attn, q, k, v)
        torch.testing.assert_close(fused, blocks.probabilities(block.attn, q, k) @ v, **CLOSE)
        y = blocks.add_mlp(block, blocks.add_attention(block, x, blocks.project(block.attn, fused, fed)))
        torch.testing.assert_close(y, block(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_patches_fixed_is_dense(family):
    vit = make(family)
    x = images(vit)
    frozen = FixedPatches(copy.deepcopy(vit), list(range(vit.patch_embed.num_patches)))
    torch.testing.assert_close(frozen(x), vit(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_set_equals_embedding_all_and_gathering(family):
    vit = make(family)
    x, kept = images(vit), torch.tensor([1, 4, 6, 11])
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    tokens = gather(tokens, with_prefix(kept.expand(len(x), -1), vit.num_prefix_tokens))
    expected = vit.forward_head(vit.norm(vit.blocks(tokens)))
    torch.testing.assert_close(FixedPatches(copy.deepcopy(vit), kept)(x), expected, **CLOSE)


def test_order_of_kept_indices_does_not_matter():
    vit = make("vit")
    x, kept = images(vit), [11, 2, 7, 3]
    shuffled = FixedPatches(copy.deepcopy(vit), kept)
    assert torch.equal(shuffled(x), FixedPatches(copy.deepcopy(vit), sorted(kept))(x))
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))[:, [0, *(1 + i for i in kept)]]  # not sorted
    torch.testing.assert_close(shuffled(x), vit.forward_head(vit.norm(vit.blocks(tokens))), **CLOSE)


def test_patches_left_out_are_not_read():
    vit = make("vit")
    x, frozen = images(vit), FixedPatches(make("vit"), [5])
    changed = x.clone()
    changed[:, :, :16] = torch.nan  # the first row of patches: 0..3
    assert torch.equal(frozen(changed), frozen(x))


def test_non_square_images_and_remainders():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(35, 50), depth=2, embed_dim=24, num_heads=2).double()
    x = torch.randn(2, 3, 35, 50, dtype=torch.float64)
    frozen = FixedPatches(copy.deepcopy(vit), list(range(6)))
    torch.testing.assert_close(frozen.eval()(x), vit.eval()(x), **CLOSE)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_macs_of_a_fixed_set_follow_the_closed_form(family, ratio):
    vit = make(family)
    patches, prefix, d = vit.patch_embed.num_patches, vit.num_prefix_tokens, 48
    kept = rankings.random_set(vit.patch_embed.grid_size, ratio)
    N, k, hidden = prefix + len(kept), len(kept), vit.blocks[0].mlp.fc1.out_features
    per_block = N * (4 * d * d + 2 * d * hidden) + 2 * N * N * d
    size = vit.patch_embed.patch_size[0]
    expected = len(vit.blocks) * per_block + k * 3 * size * size * d + d * 7
    frozen = FixedPatches(vit, kept)
    assert len(kept) == kept_count(ratio, patches)
    assert round(evaluate.macs(frozen, (3, *vit.patch_embed.img_size))["macs_g"] * 1e9) == expected
    assert evaluate.closed_form_macs(frozen.vit) == expected


def test_macs_of_vit_tiny_at_three_tenths():
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    frozen = FixedPatches(vit, rankings.random_set((14, 14), 0.3))
    N, d = 59, 192
    expected = 12 * (N * 12 * d * d + 2 * N * N * d) + 58 * 768 * d + d * 1000
    assert evaluate.closed_form_macs(frozen.vit) == expected


def test_trace_names_patches_on_the_full_grid():
    frozen = FixedPatches(make("vit"), [9, 2, 14])
    trace = frozen.trace(images(frozen.vit))
    assert [ids.tolist() for ids in trace.kept] == [[[2, 9, 14]] * 3] * 3
    expected = torch.zeros(16, dtype=torch.long)
    expected[[2, 9, 14]] = 3
    assert torch.equal(trace.depth, expected.expand(3, -1))
    torch.testing.assert_close(trace.logits, frozen(images(frozen.vit)), **CLOSE)


def test_gradients_reach_the_kept_position_embeddings_and_equal_the_dense_ones():
    vit = make("vit")
    x = images(vit)
    frozen = FixedPatches(copy.deepcopy(vit), list(range(16)))
    vit(x).square().sum().backward()
    frozen(x).square().sum().backward()
    for (name, dense), (_, mine) in zip(vit.named_parameters(), frozen.vit.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, dense.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_wrappers_spare_the_same_parameters_from_weight_decay():
    vit = make("registers")
    assert TokenPruner(vit).no_weight_decay() == {f"vit.{name}" for name in vit.no_weight_decay()}
    assert "vit.pos_embed" in TokenPruner(vit).no_weight_decay() == Shrunk(vit).no_weight_decay()


def test_gradient_checkpointing_changes_nothing():
    vit = make("vit")
    x, pruner = images(vit), TokenPruner(vit).train()
    pruner(x).square().sum().backward()
    plain = [p.grad.clone() for p in vit.parameters()]
    vit.zero_grad()
    vit.set_grad_checkpointing(True)
    pruner(x).square().sum().backward()
    for before, parameter in zip(plain, vit.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before, **CLOSE)


def test_pickles_and_exports(tmp_path):
    frozen = FixedPatches(make("vit").float(), [1, 2, 3, 8]).eval()
    x = images(frozen.vit, 2).float()
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    torch.testing.assert_close(torch.export.export(frozen, (x,)).module()(x), frozen(x))
    torch.testing.assert_close(by_onnx(frozen, x, tmp_path), frozen(x), rtol=1e-4, atol=1e-4)


def test_runs_compiled():
    frozen = FixedPatches(make("vit").float(), [0, 3, 4]).eval()
    x = images(frozen.vit, 2).float()
    torch.testing.assert_close(torch.compile(frozen, backend="eager", fullgraph=True)(x), frozen(x))


@pytest.mark.parametrize(
    "arch", ["vit_base_patch16_rope_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_rpn_224", "resnet18",
             "vit_small_patch16_18x2_224"])  # fmt: skip
def test_unsupported_models_are_refused_by_name(arch):
    if not timm.is_model(arch):
        pytest.skip(f"this timm has no {arch}")
    with torch.device("meta"):
        model = timm.create_model(arch)
    with pytest.raises(blocks.UnsupportedBlock, match=r"[\w.]+ .*expected"):
        TokenPruner(model)


def test_parts_of_parallel_blocks_are_refused_by_name():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_18x2_224", depth=1)
    with pytest.raises(blocks.UnsupportedBlock, match="ParallelThingsBlock"):
        components.exist(model)


def test_what_embeds_no_patch_alone_is_refused_before_its_patches_are_ranked():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_r_s16_p8_224")
    with pytest.raises(blocks.UnsupportedBlock, match="HybridEmbed: expected timm's PatchEmbed"):
        UCB(model)


def test_random_patch_dropout_is_refused():
    with pytest.raises(blocks.UnsupportedBlock, match="PatchDropout"):
        TokenPruner(timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5))


@pytest.mark.parametrize("kept", [[], [1, 1], [-1], [16]])
def test_bad_sets_are_refused(kept):
    with pytest.raises(ValueError, match=r"expected distinct indices in 0\.\.15"):
        FixedPatches(make("vit"), kept)


def test_bad_inputs_are_refused():
    frozen = FixedPatches(make("vit"), [1])
    with pytest.raises(ValueError, match="images are 32x64: .* frozen for 64x64"):
        frozen(torch.zeros(1, 3, 32, 64, dtype=torch.float64))
    with pytest.raises(blocks.UnsupportedBlock, match="freeze the dense model"):
        FixedPatches(frozen.vit, [0])
    with pytest.raises(blocks.UnsupportedBlock, match="Linear"):
        TokenPruner(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "method", [lambda vit: FixedPatches(vit, [1]), lambda vit: UCB(vit, 0.5)], ids=["fixed", "ucb"]
)
@pytest.mark.parametrize("places", [{"dynamic_img_size": True}, {"pos_embed": "none"}], ids=str)
def test_patches_without_fixed_places_are_refused_at_once(places, method):
    with pytest.raises(blocks.UnsupportedBlock, match="expected a fixed image size and position embedding$"):
        method(make("vit", **places))


@pytest.mark.parametrize("method", [TokenPruner, lambda vit: ToMe(vit, 2), GridDrop], ids=["none", "tome", "grid"])
@pytest.mark.parametrize("side", [32, 80])
def test_images_of_another_size_are_refused_by_models_of_dynamic_size_too(side, method):
    pruner = method(make("vit", dynamic_img_size=True))
    assert pruner(images(pruner.vit)).isfinite().all()
    with pytest.raises(ValueError, match=rf"^images give {side**2 // 256} patches: expected 64x64, 16$"):
        pruner(torch.zeros(1, 3, side, side, dtype=torch.float64))


def test_kept_count_is_not_fooled_by_floats():
    assert kept_count(0.3, 196) == 58
    assert kept_count(0.29, 100) == 29  # 0.29 * 100 = 28.999999999999996
    assert kept_count(0.001, 10) == 1
    assert [kept_count(i / 196, 196) for i in range(1, 197)] == list(range(1, 197))
    for ratio in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"expected a share in \(0, 1\]"):
            kept_count(ratio, 10)


def test_centre_and_random_sets():
    assert rankings.centre_set((4, 4), 0.25).tolist() == [5, 6, 9, 10]
    assert rankings.centre_set((3, 5), 1 / 15).tolist() == [7]
    assert rankings.centre_set((4, 4), 1.0).tolist() == list(range(16))
    first, again, other = (rankings.random_set((8, 8), 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 32
    often = torch.zeros(16)
    for seed in range(400):
        often[rankings.random_set((4, 4), 0.5, seed)] += 1
    assert (often - 200).abs().max() < 60  # 6 sigma of a binomial: every patch is drawn as often as the others
