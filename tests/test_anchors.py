"""Anchors: the choice and whole models against loops, what always stays, and what is refused."""

import copy
import math
import re
import warnings

import pytest
import timm
import torch
from families import FAMILIES, WITHOUT_CLASS_TOKEN, images, make

from lib import blocks, evaluate
from lib.pruners.anchors import NORMALISE, Anchors, choose
from lib.pruners.dropping import predicted_macs, reaching
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches

CLOSE = {"rtol": 0, "atol": 1e-11}
WITH_CLASS_TOKEN = [name for name in FAMILIES if name not in WITHOUT_CLASS_TOKEN]
FEW = {"k_anchors": 3, "top_m": 4}


def scored(weights, fed, prefix, k, normalise):
    """Of one image: the anchors, best first, and {other patch: (importance, diversity)}, by loops over floats."""
    patches = range(len(weights) - prefix)
    anchors = sorted(patches, key=lambda i: -weights[0, prefix + i].item())[:k]
    others, found = [i for i in patches if i not in anchors], {}
    for i in others:
        importance = sum(weights[prefix + i, prefix + j].item() for j in anchors) / k
        found[i] = importance, 1 - max(torch.cosine_similarity(fed[prefix + i], fed[prefix + j], dim=0).item()
                                       for j in anchors)  # fmt: skip
    if normalise == "minmax":
        for part in (0, 1):
            low, high = (bound(values[part] for values in found.values()) for bound in (min, max))
            for i in others:
                values = list(found[i])
                values[part] = (values[part] - low) / (high - low)
                found[i] = tuple(values)
    return anchors, found


def chosen(weights, fed, prefix, k, m, alpha, normalise):
    """Of one image: the anchors and the others that go on, both best first."""
    anchors, found = scored(weights, fed, prefix, k, normalise)
    score = {i: alpha * importance + (1 - alpha) * diversity for i, (importance, diversity) in found.items()}
    return anchors, sorted(score, key=lambda i: -score[i])[:m]


def reference(pruner, x):
    """Logits of a ViT, and for every image the anchors and all that is kept: token by token, head by head."""
    vit, prefix, rows, kept = pruner.vit, pruner.prefix, [], []
    for tokens in vit.norm_pre(vit._pos_embed(vit.patch_embed(x))):
        for index, block in enumerate(vit.blocks):
            if index != pruner.start_block:
                tokens = block(tokens[None])[0]
                continue
            attn, fed = block.attn, block.norm1(tokens)
            outputs, weights, joint, d = [], [], attn.qkv(fed), attn.head_dim
            for head in range(attn.num_heads):
                q, k, v = (joint[:, (part * attn.num_heads + head) * d :][:, :d] for part in range(3))
                weights.append(torch.softmax(attn.q_norm(q) @ attn.k_norm(k).T / math.sqrt(d), dim=1))
                outputs.append(weights[-1] @ v)
            tokens = tokens + block.ls1(attn.proj(attn.norm(torch.cat(outputs, dim=1))))
            mean = sum(weights) / attn.num_heads
            anchors, others = chosen(mean, fed, prefix, pruner.k, pruner.m, pruner.alpha, pruner.normalise)
            kept.append((anchors, sorted(anchors + others)))
            tokens = tokens[[*range(prefix), *(prefix + patch for patch in kept[-1][1])]]
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        rows.append(tokens)
    return vit.forward_head(vit.norm(torch.stack(rows))), kept


def drawn(patches, prefix, seed=0):
    """Random attention (4, N, N) and features (4, N, 8)."""
    generator, N = torch.Generator().manual_seed(seed), prefix + patches
    attention = torch.randn(4, N, N, generator=generator, dtype=torch.float64).softmax(dim=2)
    return attention, torch.randn(4, N, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("prefix", [1, 5])
def test_choice_is_the_loops(prefix, alpha, normalise):
    attention, fed = drawn(20, prefix)
    for k, m in ((1, 1), (3, 5), (5, 14), (1, 19), (10, 10), (19, 1)):
        anchors, others = choose(attention, fed, prefix, k, m, alpha, normalise)
        for image in range(4):
            if k == 19 and normalise == "minmax":  # one candidate alone has nothing to be stretched between
                expected = scored(attention[image], fed[image], prefix, k, "none")
                assert (anchors[image].tolist(), others[image].tolist()) == (expected[0], [*expected[1]])
                continue
            expected = chosen(attention[image], fed[image], prefix, k, m, alpha, normalise)
            assert (anchors[image].tolist(), others[image].tolist()) == expected
        both = torch.cat([anchors, others], dim=1).sort(dim=1).values
        assert (both.diff(dim=1) > 0).all() and both.shape == (4, k + m), "no duplicates"


@pytest.mark.parametrize("normalise", NORMALISE)
def test_alpha_one_is_importance_and_zero_is_diversity(normalise):
    attention, fed = drawn(20, 1)
    other = drawn(20, 1, seed=1)
    other[0][:, 0] = attention[:, 0]  # the class token's row says which are the anchors
    for k, m in ((2, 18), (5, 6)):
        found = [choose(weights, features, 1, k, m, alpha, normalise)
                 for alpha, weights, features in ((1, attention, fed), (1, attention, other[1]), (0, attention, fed),
                                                  (0, other[0], fed))]  # fmt: skip
        assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[2][1], found[3][1])
        assert not torch.equal(found[0][1], found[2][1])
        for image in range(4):
            _, values = scored(attention[image], fed[image], 1, k, "none")
            for part, (_, others) in enumerate((found[0], found[2])):
                assert others[image].tolist() == sorted(values, key=lambda i: -values[i][part])[:m]  # noqa: B023


def test_half_and_half_is_nearly_diversity_unless_normalised():
    """Why minmax is the default: importance is about 1/N."""
    attention, fed = drawn(200, 1)
    literal, diverse = (choose(attention, fed, 1, 10, 50, alpha, "none")[1] for alpha in (0.5, 0))
    stretched = choose(attention, fed, 1, 10, 50, 0.5, "minmax")[1]
    share = lambda one, two: sum(len({*a} & {*b}) for a, b in zip(one.tolist(), two.tolist(), strict=True)) / 200  # noqa: E731
    assert share(literal, diverse) > 0.95 > 0.9 > share(stretched, diverse)


def test_equal_candidates_are_chosen_in_order_and_stay_finite():
    attention, fed = torch.full((2, 9, 9), 1 / 9, dtype=torch.float64), torch.ones(2, 9, 4, dtype=torch.float64)
    for normalise in NORMALISE:
        anchors, others = choose(attention, fed, 1, 2, 3, 0.5, normalise)
        assert anchors.tolist() == [[0, 1]] * 2 and others.tolist() == [[2, 3, 4]] * 2
    fed[:, 3] = 0  # a token without direction is like none
    assert choose(attention, fed, 1, 2, 1, 0.5)[1].tolist() == [[2]] * 2


@pytest.mark.parametrize("setting", [{}, {"alpha": 0.2, "start_block": 0}, {"alpha": 1.0, "normalise": "none"},
                                     {"alpha": 0.6, "normalise": "none", "start_block": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_logits_and_kept_sets_are_the_references(family, setting):
    pruner = Anchors(make(family), **FEW, **setting)
    x = images(pruner.vit)
    logits, kept = reference(pruner, x)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    trace = pruner.trace(x)
    torch.testing.assert_close(trace.logits, logits.detach(), **CLOSE)
    everything = [[*range(16)]] * 3
    for index, ids in enumerate(trace.kept):
        assert ids.tolist() == (everything if index < pruner.start_block else [patches for _, patches in kept])
    assert pruner.anchors(x).tolist() == [anchors for anchors, _ in kept]
    assert all({*anchors} <= {*patches} and len(patches) == 7 for anchors, patches in kept)
    start = pruner.start_block
    for image, (_, patches) in enumerate(kept):
        assert trace.depth[image].tolist() == [3 if patch in patches else start for patch in range(16)]


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_keeping_everything_is_bare_and_warns(family):
    vit = make(family)
    x = images(vit)
    for k, m in ((10, 50), (8, 8), (1, 15), (20, 1)):
        with pytest.warns(UserWarning, match=f"^k_anchors {k} .* top_m {m} reach the 16 patches there are: nothing is"):
            pruner = Anchors(vit, k, m)
        torch.testing.assert_close(pruner(x), vit(x), **CLOSE)
        assert (pruner.trace(x).depth == 3).all() and pruner.anchors(x).shape == (3, 0)
        assert pruner.counts() == ([pruner.prefix + 16] * 3,) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Anchors(vit, 8, 7).counts()[1][-1] == pruner.prefix + 15


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_what_stays_leaves_the_block_as_from_the_whole_block(family):
    pruner = Anchors(make(family), **FEW)
    x = pruner.embed(images(pruner.vit))
    found, ids, kept, anchors = pruner.block(1, x, torch.arange(16).expand(3, -1))
    whole, prefix = pruner.vit.blocks[1](x), pruner.prefix
    torch.testing.assert_close(found[:, :prefix], whole[:, :prefix], **CLOSE)
    assert torch.equal(ids, kept) and (ids.diff(dim=1) > 0).all(), "in order, no duplicates"
    for image in range(3):
        torch.testing.assert_close(found[image, prefix:], whole[image, prefix:][ids[image]], **CLOSE)
        assert {*anchors[image].tolist()} <= {*ids[image].tolist()}


def test_shares_are_of_all_patches():
    vit = make("vit", img_size=224)
    for arguments, expected in (((0.25, 0.5), (49, 98)), ((10, 0.25), (10, 49)), ((0.1, 7), (19, 7)),
                                ((0.001, 0.3), (1, 58)), ((10.0, 1.0), (10, 1))):  # fmt: skip
        pruner = Anchors(vit, *arguments)
        assert (pruner.k, pruner.m) == expected
        assert pruner.counts() == ([197, 197, sum(expected) + 1], [197, *[sum(expected) + 1] * 2])
    assert pruner.arguments["k_anchors"] == 10.0 and pruner.arguments["top_m"] == 1.0


def test_small_grids_are_warned_of_with_the_numbers():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch32_224", depth=2)
    with pytest.warns(UserWarning, match=r"k_anchors 10 \+ top_m 50 reach the 49 patches there are.*top_m=0\.25"):
        Anchors(vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Anchors(vit, top_m=0.25).counts()[1] == [50, 23]


@pytest.mark.parametrize("family", ["vit", "registers", "layerscale"])
def test_permuted_patches_permute_what_is_kept(family):
    vit = make(family)
    x, order = images(vit), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    size = vit.patch_embed.patch_size[0]
    patches = x.view(3, 3, 4, size, 4, size).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    moved = patches.view(3, 4, 4, 3, size, size).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    first = vit.pos_embed.shape[1] - 16
    other = copy.deepcopy(vit)
    other.pos_embed.data[:, first:] = vit.pos_embed.data[:, first:][:, order]
    pruner, permuted = Anchors(vit, **FEW), Anchors(other, **FEW)
    torch.testing.assert_close(permuted(moved), pruner(x), **CLOSE)
    assert torch.equal(order[permuted.anchors(moved)], pruner.anchors(x))
    found = permuted.trace(moved).kept[1]
    assert torch.equal(order[found].sort(dim=1).values, pruner.trace(x).kept[1])


def test_macs_of_vit_base():
    """From 197 to 61 tokens; the attention of block 1 still has them all: 17.6 to 6.8 GMACs."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224").eval()
    pruner, d = Anchors(vit), 768
    assert pruner.counts() == ([197] * 2 + [61] * 10, [197] + [61] * 11)
    whole, small = (12 * n * d * d + 2 * n * n * d for n in (197, 61))
    expected = whole + (4 * 197 * d * d + 2 * 197 * 197 * d + 8 * 61 * d * d) + 10 * small + 196 * d * d + 1000 * d
    assert predicted_macs(pruner) * 1e9 == pytest.approx(expected, rel=1e-14)
    assert round(evaluate.closed_form_macs(vit) / 1e9, 1) == 17.6 and round(expected / 1e9, 1) == 6.8


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_macs_are_predicted_and_fall_with_m(arch):
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=224).eval()
    for m in (150, 100, 50):
        pruner = Anchors(vit, top_m=m)
        counted, predicted = evaluate.macs(pruner, (3, 224, 224))["macs_g"], predicted_macs(pruner)
        assert predicted == pytest.approx(counted, rel=0.02)
        selecting = pruner.patches * 10 * vit.embed_dim  # cosines to ten anchors, and no second attention
        assert round((counted - predicted) * 1e9) == selecting
    falling = [predicted_macs(Anchors(vit, top_m=m)) for m in range(180, 0, -1)]
    assert all(one > two for one, two in zip(falling, falling[1:], strict=False))


@pytest.mark.filterwarnings("ignore:k_anchors")
def test_reaching_finds_the_mildest_m():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    build, dense = lambda strength: Anchors(vit, top_m=196 - int(strength)), evaluate.closed_form_macs(vit) / 1e9  # noqa: E731
    found = reaching(build, 0.6 * dense, most=195)
    assert predicted_macs(found) <= 0.6 * dense < predicted_macs(Anchors(vit, top_m=found.m + 1))
    with pytest.raises(ValueError, match=r"^macs_g is 0\.1: this method needs at least 0\.\d{3} GMACs$"):
        reaching(build, 0.1, most=195)


def test_runs_on_pruned_models():
    vit = remove(make("vit"), Plan(heads=[[0, 2], [], [1]], neurons=[[0, 1, 5], None, []]))
    with pytest.raises(ValueError, match="start_block is 1: expected a block with heads, below 3"):
        Anchors(vit, **FEW)
    pruner = Anchors(vit, **FEW, start_block=2)
    logits, kept = reference(pruner, images(vit))
    torch.testing.assert_close(pruner(images(vit)), logits, **CLOSE)
    assert pruner.trace(images(vit)).kept[2].tolist() == [patches for _, patches in kept]


def test_runs_where_only_some_patches_are_embedded():
    on = [1, 2, 4, 7, 8, 11, 13, 14]
    pruner = Anchors(FixedPatches(make("vit"), on).vit, 2, 3)
    x = images(make("vit"))
    logits, kept = reference(pruner, x)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    assert pruner.anchors(x).tolist() == [[on[patch] for patch in anchors] for anchors, _ in kept]
    assert pruner.trace(x).kept[1].tolist() == [[on[patch] for patch in patches] for _, patches in kept]


@pytest.mark.parametrize("family", WITHOUT_CLASS_TOKEN)
def test_models_without_a_class_token_are_refused(family):
    with pytest.raises(blocks.UnsupportedBlock, match="VisionTransformer has no class token: anchors are what that"):
        Anchors(make(family), **FEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": -0.1}, "alpha is -0.1: expected a weight in [0, 1]"), ({"alpha": 1.01}, "alpha is 1.01: expected"),
     ({"alpha": float("nan")}, "alpha is nan: expected"), ({"start_block": 3}, "start_block is 3: expected a block"),
     ({"start_block": -1}, "start_block is -1: expected a block with heads, below 3"),
     ({"normalise": "max"}, "normalise is 'max': expected one of minmax, none"),
     ({"k_anchors": 0}, "k_anchors is 0: expected a number of patches from 1, or a share below 1"),
     ({"top_m": -2}, "top_m is -2: expected a number"), ({"top_m": 2.5}, "top_m is 2.5: expected a number"),
     ({"k_anchors": 0.0}, "k_anchors is 0.0: expected a number"),
     ({"top_m": -0.5}, "top_m is -0.5: expected a number"),
     ({"top_m": float("inf")}, "top_m is inf: expected a number"),
     ({"start_block": 1.5}, "start_block is 1.5: expected a block with heads, below 3")],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        Anchors(make("vit"), **{**FEW, **arguments})
    assert "\n" not in str(caught.value)
