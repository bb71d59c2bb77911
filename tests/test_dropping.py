"""Dropping patches without training: TopK, EViT, RandomDrop and GridDrop against loops over images and heads."""

import copy
import math
from fractions import Fraction

import pytest
import timm
import torch
from families import FAMILIES, by_onnx, images, make

from lib import evaluate
from lib.pruners.baselines import DROPPING, EViT, GridDrop, RandomDrop, TopK, spread_order
from lib.pruners.dropping import FirstTokens, predicted_macs, reaching, rounded_up
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches, highest

CLOSE = {"rtol": 0, "atol": 1e-11}
SETTINGS = {
    "one ratio": {"keep_ratio": 0.6},
    "a list": {"keep_ratio": [0.7, 0.5], "blocks": [0, 1]},
    "in any order": {"keep_ratio": (0.3, 0.9), "blocks": (2, 0)},
}


def bayer(size):
    """The Bayer matrix by its recursion: {(row, column): value}."""
    if size == 1:
        return {(0, 0): 0}
    half = bayer(size // 2)
    corners = {(0, 0): 0, (0, 1): 2, (1, 0): 3, (1, 1): 1}
    return {(row + down * size // 2, column + right * size // 2): 4 * value + corner
            for (row, column), value in half.items() for (down, right), corner in corners.items()}  # fmt: skip


def by_bayer(grid):
    """Patches of a grid, row-major indices, in the order of the smallest Bayer matrix that covers it."""
    size = 2 ** math.ceil(math.log2(max(grid)))
    values = bayer(size)
    return sorted(range(math.prod(grid)), key=lambda index: values[divmod(index, grid[1])])


def attention(block, x):
    """Tokens (N, D) of one image after the attention residual, and the probabilities (H, N, N), head by head."""
    attn, outputs, weights = block.attn, [], []
    d = attn.head_dim
    joint = attn.qkv(block.norm1(x))
    for head in range(attn.num_heads):
        q, k, v = (joint[:, (part * attn.num_heads + head) * d :][:, :d] for part in range(3))
        weights.append(torch.softmax(attn.q_norm(q) @ attn.k_norm(k).T / math.sqrt(d), dim=1))
        outputs.append(weights[-1] @ v)
    return x + block.ls1(attn.proj(attn.norm(torch.cat(outputs, dim=1)))), torch.stack(weights)


def reference(pruner, x):
    """Logits, and for every block and image the patches kept, −1 for a fused token: token by token."""
    vit, name = pruner.vit, type(pruner).__name__
    ratios = dict(zip(pruner.blocks, pruner.keep_ratio, strict=True) if isinstance(pruner.keep_ratio, list | tuple)
                  else ((index, pruner.keep_ratio) for index in pruner.blocks))  # fmt: skip
    prefix, grid_order = vit.num_prefix_tokens, by_bayer(vit.patch_embed.grid_size)
    rows, kept = [], [[] for _ in vit.blocks]
    for image, tokens in enumerate(vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))):
        ids = list(range(len(tokens) - prefix))
        for index, block in enumerate(vit.blocks):
            tokens, weights = attention(block, tokens)
            scores = (weights[:, 0] if vit.has_class_token else weights.mean(dim=1)).mean(dim=0)[prefix:].tolist()
            count = math.ceil(Fraction(str(ratios.get(index, 1))) * len(ids))
            if name in ("TopK", "EViT"):
                order = sorted(range(len(ids)), key=lambda place, scores=scores: -scores[place])
            elif name == "GridDrop":
                order = sorted(range(len(ids)), key=lambda place, ids=ids: grid_order.index(ids[place]))
            else:
                drawn = pruner.priority[image % 64].tolist()
                order = sorted(range(len(ids)), key=lambda place, ids=ids, drawn=drawn: -drawn[ids[place]])
            stay, go = sorted(order[:count]), sorted(order[count:])
            rest = [sum(scores[place] * tokens[prefix + place] for place in go)] if name == "EViT" and go else []
            ids = [ids[place] for place in stay] + [-1] * len(rest)
            tokens = torch.stack([*tokens[:prefix], *(tokens[prefix + place] for place in stay), *rest])
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            kept[index].append(ids)
        rows.append(tokens)
    return vit.forward_head(vit.norm(torch.stack(rows))), kept


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_bare(family, name):
    vit = make(family)
    x = images(vit)
    for pruner in (
        DROPPING[name](vit, 1.0),
        DROPPING[name](vit, 0.5, blocks=[]),
        DROPPING[name](vit, [1.0, 1], [2, 0]),
    ):
        torch.testing.assert_close(pruner(x), vit(x), **CLOSE)
        trace = pruner.trace(x)
        assert all(torch.equal(ids, torch.arange(16).expand(3, -1)) for ids in trace.kept) and (trace.depth == 3).all()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_kept_sets_are_the_references(family, name, setting):
    pruner = DROPPING[name](make(family), **SETTINGS[setting])
    x = images(pruner.vit)
    logits, kept = reference(pruner, x)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    trace = pruner.trace(x)
    torch.testing.assert_close(trace.logits, logits.detach(), **CLOSE)
    expected = [[sorted({*ids} - {-1}) for ids in rows] for rows in kept]
    assert [[ids.tolist() for ids in rows] for rows in trace.kept] == expected
    depth = torch.zeros(3, 16, dtype=torch.long)
    for rows in expected:
        for image, ids in enumerate(rows):
            depth[image, ids] += 1
    assert torch.equal(trace.depth, depth)
    fused = [any(-1 in ids for ids in rows) for rows in kept]
    assert any(fused) == (name == "evit") == isinstance(trace.kept[-1], list)


def test_the_fused_token_takes_part_in_later_selections():
    """Images that keep it keep one patch less; in the others it goes into the next one."""
    pruner = EViT(make("vit"), 0.7, blocks=[0, 1])
    x = images(pruner.vit, 16)
    logits, kept = reference(pruner, x)
    twice = [ids.count(-1) == 2 for ids in kept[1]]
    assert any(twice) and not all(twice)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    found = pruner.trace(x).kept[1]
    assert [len(ids) for ids in found] == [10 - again for again in twice], "of ceil(0.7 · 13) tokens"


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_leaves_a_block_as_from_the_whole_block(family, name):
    """Dropping stands between attention and MLP: no row that stays sees it, and prefix tokens always stay, first."""
    pruner = DROPPING[name](make(family), 0.4)
    x = pruner.embed(images(pruner.vit))
    ids = torch.arange(16).expand(3, -1)
    for index, block in enumerate(pruner.vit.blocks):
        whole, prefix = block(x), pruner.prefix
        found, left = pruner.block(index, x, ids)[:2]
        torch.testing.assert_close(found[:, :prefix], whole[:, :prefix], **CLOSE)
        for image in range(3):
            for place, patch in enumerate(left[image].tolist()):
                came = (ids[image] == patch).nonzero().flatten().tolist()
                if patch != -1:
                    torch.testing.assert_close(found[image, prefix + place], whole[image, prefix + came[0]], **CLOSE)
        x, ids = found, left


def test_random_repeats_by_seed_and_differs_between_images_and_seeds():
    vit = make("vit")
    x = images(vit, 1).expand(6, -1, -1, -1)
    first, again, other = (RandomDrop(vit, 0.5, blocks=[0], seed=seed).trace(x).kept[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(ids) for ids in first.tolist()}) == 6
    assert not (first == other).all(dim=1).any()


def test_random_keeps_every_patch_about_equally_often():
    vit, often = make("vit", depth=1), torch.zeros(16, dtype=torch.long)
    x = images(vit, 1).expand(64, -1, -1, -1)
    for seed in range(10):
        often += RandomDrop(vit, 0.25, blocks=[0], seed=seed).trace(x).depth.sum(dim=0)
    assert often.sum() == 640 * 4
    assert (often - 160).abs().max() < 6 * math.sqrt(640 * 0.25 * 0.75), "6 sigma of a binomial"


def test_random_does_not_look_and_leaves_torchs_generator_alone():
    vit = make("vit")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    pruner = RandomDrop(vit, 0.5, seed=3)
    kept = [pruner.trace(images(vit, seed=seed)).kept for seed in (1, 2)]
    assert all(torch.equal(one, two) for one, two in zip(*kept, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not [key for key in pruner.state_dict() if "priority" in key]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (14, 14), (3, 5), (1, 7), (12, 2)])
def test_spread_order_is_the_bayer_matrix(grid):
    assert spread_order(grid).argsort().tolist() == by_bayer(grid)


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (8, 12)])
def test_spread_order_is_even_at_every_scale(grid):
    """Of any number of first patches, cells of 1, 2, 4 … patches width hold equally many, give or take one."""
    rank = spread_order(grid).view(grid)
    for width in (1, 2, 4, 8):
        cells = rank.unfold(0, width, width).unfold(1, width, width).reshape(-1, width * width)
        for count in range(rank.numel() + 1):
            held = (cells < count).sum(dim=1)
            assert held.max() - held.min() <= 1, (width, count)


def test_grid_is_nested_the_same_for_all_images_and_starts_apart():
    vit, before = make("vit", img_size=128), set()
    for keep in range(1, 65):
        kept = GridDrop(vit, keep / 64, blocks=[0]).trace(images(vit, 2)).kept[0]
        assert torch.equal(kept[0], kept[1]) and before < {*kept[0].tolist()} and kept.shape == (2, keep)
        before = {*kept[0].tolist()}
        if keep == 4:
            assert before == {0, 4, 32, 36}, "one in each quadrant, half the image apart"


@pytest.mark.parametrize("name", ["topk", "evit"])
@pytest.mark.parametrize("family", ["vit", "registers", "no class token", "attention pooling"])
def test_permuted_patches_permute_what_is_kept(family, name):
    vit = make(family)
    x, order = images(vit), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    size = vit.patch_embed.patch_size[0]
    patches = x.view(3, 3, 4, size, 4, size).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    moved = patches.view(3, 4, 4, 3, size, size).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    first = vit.pos_embed.shape[1] - 16
    other = copy.deepcopy(vit)
    other.pos_embed.data[:, first:] = vit.pos_embed.data[:, first:][:, order]
    pruner, permuted = DROPPING[name](vit, 0.6), DROPPING[name](other, 0.6)
    torch.testing.assert_close(permuted(moved), pruner(x), **CLOSE)
    for before, after in zip(pruner.trace(x).kept, permuted.trace(moved).kept, strict=True):
        for kept, found in zip(before, after, strict=True):
            assert order[found].sort().values.tolist() == kept.tolist()


def test_counts_are_rounded_up_of_the_running_patches():
    vit = make("vit", img_size=224)
    assert TopK(vit, 0.7, [0, 1, 2]).counts() == ([197, 139, 98], [139, 98, 69])  # 137.2, 96.6, 67.9
    assert EViT(vit, 0.7, [0, 1, 2]).counts() == ([197, 140, 100], [140, 100, 72])  # 137.2, 97.3, 69.3
    assert GridDrop(vit, [0.5, 0.25], [0, 2]).counts() == ([197, 99, 99], [99, 99, 26])
    assert TopK(vit, [0.25, 0.5], [2, 0]).counts() == ([197, 99, 99], [99, 99, 26])
    assert RandomDrop(make("registers"), 1e-6).counts() == ([21, 6, 6], [6, 6, 6]), "one patch always stays"
    assert EViT(make("vit"), 15 / 16, [0]).counts()[1] == [17, 17, 17], "15 patches and what stands for the other"
    for depth, expected in ((1, [0]), (2, [0, 1]), (4, [1, 2, 3]), (12, [3, 6, 9])):
        assert TopK(make("vit", depth=depth)).blocks == expected


def test_rounded_up_is_not_fooled_by_floats():
    assert rounded_up(0.7, 10) == 7 and rounded_up(0.07, 100) == 7  # 0.07 * 100 = 7.000000000000001
    assert rounded_up(1e-12, 196) == 1 and rounded_up(1.0, 196) == 196
    assert [rounded_up(i / 196, 196) for i in range(1, 197)] == list(range(1, 197))
    assert [rounded_up((i + 0.01) / 196, 196) for i in range(196)] == list(range(1, 197))


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch16_gap_224", "vit_small_patch14_reg4_dinov2"])
def test_predicted_macs_are_those_counted(arch, name):
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=224).eval()
    before = math.inf
    for ratio in (0.8, 0.3):
        pruner = DROPPING[name](vit, ratio)
        counted, predicted = evaluate.macs(pruner, (3, 224, 224))["macs_g"], predicted_macs(pruner)
        assert predicted == pytest.approx(counted, rel=0.02)
        tokens, d, selecting = pruner.counts()[0], vit.embed_dim, 0
        for index in pruner.blocks:
            if pruner.looks:  # one row of queries, or all where there is no class token
                selecting += tokens[index] * (1 if vit.has_class_token else tokens[index]) * d
            selecting += (tokens[index] - pruner.prefix) * d * (name == "evit")
        assert round((counted - predicted) * 1e9) == selecting
        assert counted < before, "each milder setting costs more"
        before = counted
    assert predicted_macs(DROPPING[name](vit, 1.0)) == pytest.approx(evaluate.closed_form_macs(vit) / 1e9, rel=1e-14)


@pytest.mark.parametrize("name", DROPPING)
def test_macs_never_rise_with_strength(name):
    vit = make("vit", img_size=128)
    costs = [predicted_macs(DROPPING[name](vit, 1 - strength / 100)) for strength in range(100)]
    assert costs == sorted(costs, reverse=True) and len({*costs}) > 30


@pytest.mark.parametrize("name", DROPPING)
def test_reaching_finds_the_mildest_below_a_ceiling(name):
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    build = lambda strength: DROPPING[name](vit, 1 - strength)  # noqa: E731
    dense, least = predicted_macs(build(0)), predicted_macs(build(0.99))
    for share in (0.5, 0.7, 0.9, 0.999):
        ceiling = share * dense
        found = reaching(build, ceiling, most=0.99)
        milder = build(1 - found.keep_ratio - 2e-4)
        assert predicted_macs(found) <= ceiling < predicted_macs(milder) and isinstance(found, DROPPING[name])
    exact = predicted_macs(build(0.3))
    assert predicted_macs(reaching(build, exact, most=0.99)) == exact, "a ceiling may be met"
    for ceiling in (dense, 2 * dense):
        assert reaching(build, ceiling, most=0.99).keep_ratio == 1
    assert predicted_macs(reaching(build, least, most=0.99)) == least
    with pytest.raises(ValueError, match=rf"^macs_g is 0\.01: this method needs at least {least:.3f} GMACs$"):
        reaching(build, 0.01, most=0.99)


@pytest.mark.parametrize("name", DROPPING)
def test_runs_on_pruned_models(name):
    vit = remove(make("vit"), Plan(heads=[[0, 2], [], [1]], neurons=[[0, 1, 5], None, []]))
    x = images(vit)
    torch.testing.assert_close(DROPPING[name](vit, 1.0, [0, 2])(x), vit(x), **CLOSE)
    with pytest.raises(ValueError, match=r"^block 1 has no head left: expected blocks that have, found \[0, 1\]$"):
        DROPPING[name](vit, 0.5, [0, 1])
    pruner = DROPPING[name](vit, 0.5)
    assert pruner.blocks == [0, 2]  # by default, where heads are left
    assert [len(rows[0]) for rows in pruner.trace(x).kept] == [8, 8, 5 if name == "evit" else 4]
    assert pruner.counts()[1] == ([10, 10, 7] if name == "evit" else [9, 9, 5])


@pytest.mark.parametrize("name", DROPPING)
def test_runs_where_only_some_patches_are_embedded(name):
    vit, on = make("vit"), [1, 2, 4, 7, 8, 11, 13, 14]
    frozen = FixedPatches(copy.deepcopy(vit), on).vit
    x = images(vit)
    pruner = DROPPING[name](frozen, 0.5, blocks=[1])
    trace = pruner.trace(x)
    for image in range(3):
        assert trace.kept[0][image].tolist() == on
        kept = trace.kept[1][image].tolist()
        assert {*kept} < {*on} and len(kept) == 4 and kept == sorted(kept)
        assert trace.depth[image].nonzero().flatten().tolist() == on and (trace.depth[image][kept] == 3).all()
    if name == "grid":
        assert trace.kept[1][0].tolist() == sorted([patch for patch in by_bayer((4, 4)) if patch in on][:4])


@pytest.mark.parametrize("count", [9, 20])
def test_the_highest_are_the_first_of_equals_in_onnx_too(count, tmp_path):
    class Highest(torch.nn.Module):
        def forward(self, scores):
            return highest(scores, count)

    scores = torch.randint(4, (5, 20), generator=torch.Generator().manual_seed(0)).float()
    expected = [sorted(range(20), key=lambda place: -row[place])[:count] for row in scores.tolist()]
    assert Highest()(scores).tolist() == by_onnx(Highest().eval(), scores, tmp_path).tolist() == expected


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep_ratio": 0}, r"keep ratio is 0: expected a share in \(0, 1\]"),
     ({"keep_ratio": 1.5}, "keep ratio is 1.5: expected a share"),
     ({"keep_ratio": float("nan")}, "keep ratio is nan: expected a share"),
     ({"keep_ratio": [0.5, -0.1, 0.5]}, "keep ratio is -0.1: expected a share"),
     ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 entries: expected one, or one for each of 3 blocks"),
     ({"keep_ratio": [], "blocks": [1]}, "keep_ratio has 0 entries: expected one, or one for each of 1 blocks"),
     ({"blocks": [1, 1]}, r"blocks are \[1, 1\]: expected distinct indices below 3"),
     ({"blocks": [3]}, r"blocks are \[3\]: expected distinct indices below 3"),
     ({"blocks": [-1]}, r"blocks are \[-1\]: expected distinct indices below 3")],
)  # fmt: skip
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        DROPPING[name](make("vit"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ceiling_runs_as_many_tokens_and_chooses_none(family):
    vit = make(family)
    x, pruner = images(vit), DROPPING["grid"](vit, 0.5, [0, 1])
    ceiling, whole = FirstTokens(vit, pruner.counts()[1]), FirstTokens(vit, [pruner.prefix + 16] * 3)
    torch.testing.assert_close(whole(x), vit(x), rtol=0, atol=1e-11)
    assert [ids.shape[1] for ids in ceiling.trace(x).kept] == [8, 4, 4]
    if vit.num_classes:
        assert evaluate.macs(ceiling, x)["macs_g"] == evaluate.macs(pruner, x)["macs_g"], "grid chooses for nothing too"
    kept = ceiling.trace(x).kept
    assert all(torch.equal(ids, torch.arange(ids.shape[1]).expand_as(ids)) for ids in kept)


@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_a_ceiling_of_whole_blocks_lets_tokens_go_before_a_block(family):
    vit = make(family)
    x, seen = images(vit), []
    prefix = vit.num_prefix_tokens
    for block in vit.blocks:
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    ceiling = FirstTokens(vit, [prefix + 16, prefix + 9, prefix + 4], whole_blocks=True)
    assert [ids.shape[1] for ids in ceiling.trace(x).kept] == [16, 9, 4]
    assert seen == [prefix + 16, prefix + 9, prefix + 4]
    with torch.no_grad():
        tokens = vit.blocks[0](ceiling.embed(x))[:, : prefix + 9]
        tokens = vit.blocks[2](vit.blocks[1](tokens)[:, : prefix + 4])
        torch.testing.assert_close(ceiling(x), vit.forward_head(vit.norm(tokens)), rtol=0, atol=1e-11)
