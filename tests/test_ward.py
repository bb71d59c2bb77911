"""Ward merging: ToMe where it is told to be; else against an implementation of its cost, token by token."""

import math
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import TINY
from families import FAMILIES, images, make
from test_training_free import RULES

from lib import evaluate, models, training_free
from lib.pruners.baselines import ToMe
from lib.pruners.dropping import Unreachable, predicted_macs
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches
from lib.pruners.ward import Ward

CLOSE = {"rtol": 0, "atol": 1e-10}
RS = {"few": 3, "a list": [5, 0, 4], "all that can": 99, "many": (7, 4, 1)}
SETTINGS = {
    "ward": {},
    "no attention": {"gamma": 0},
    "more attention": {"gamma": 1.5},
    "mean keys": {"keys": "mean"},
    "cosine": {"linkage": "cosine"},
    "cosine of mean keys": {"linkage": "cosine", "keys": "mean"},
}
AS_TOME = {"gamma": 0, "linkage": "cosine", "keys": "mean"}
UNLIKE = ["vit", "no class token", "registers, mean pooling", "qk norm"]  # families that differ in what is merged


def reference(vit, x, r, gamma=0.5, linkage="ward", keys="heads"):
    """Logits, and for every block and image the tokens that are patches: (which patch it goes by, which it stands for).

    Even places of the whole sequence are A, odd ones B; prefix tokens neither go nor take others in, and stay in front.
    """
    prefix, rs = vit.num_prefix_tokens, r if isinstance(r, list | tuple) else [r] * len(vit.blocks)
    rows, found = [], [[] for _ in vit.blocks]
    for tokens in vit.norm_pre(vit._pos_embed(vit.patch_embed(x))):
        groups = [None] * prefix + [[patch] for patch in range(len(tokens) - prefix)]  # the first names the token
        for index, (block, r) in enumerate(zip(vit.blocks, rs, strict=True)):
            attn, sizes = block.attn, [1.0 if group is None else float(len(group)) for group in groups]
            if not attn.num_heads:
                tokens = tokens + block.ls1(attn(block.norm1(tokens)))
            else:
                joint, d, outputs, own, seen = attn.qkv(block.norm1(tokens)), attn.head_dim, [], [], []
                for head in range(attn.num_heads):
                    q, k, v = (joint[:, (part * attn.num_heads + head) * d :][:, :d] for part in range(3))
                    q, k = attn.q_norm(q), attn.k_norm(k)
                    weights = (q @ k.T / math.sqrt(d)).exp() * torch.tensor(sizes, dtype=x.dtype)
                    weights = weights / weights.sum(dim=1, keepdim=True)
                    outputs.append(weights @ v)
                    own.append(k.detach())
                    seen.append(weights.detach()[0] if vit.has_class_token else weights.detach().mean(dim=0))
                tokens = tokens + block.ls1(attn.proj(attn.norm(torch.cat(outputs, dim=1))))
                if r:
                    places = range(prefix, len(tokens))
                    even, odd = ([place for place in places if place % 2 == parity] for parity in (0, 1))
                    per_patch = {i: sum(row[i].item() for row in seen) / len(seen) / sizes[i] for i in places}
                    mean = sum(per_patch.values()) / len(per_patch)
                    w = {i: sizes[i] * max(per_patch[i] / mean, 1e-6) ** gamma for i in places}
                    key = torch.cat(own, dim=1) if keys == "heads" else torch.stack(own).mean(dim=0)

                    def cost(a, b, key=key, w=w):
                        if linkage == "cosine":
                            return -torch.cosine_similarity(key[a], key[b], dim=0).item()
                        return w[a] * w[b] / (w[a] + w[b]) * (key[a] - key[b]).square().sum().item()

                    best = {a: min((cost(a, b), b) for b in odd) for a in even if odd}
                    goes = sorted(best, key=lambda a, best=best: best[a][0])[: min(r, len(places) // 2)]
                    masses, sums = dict(w), {i: tokens[i] * w[i] for i in places}
                    members = {i: [*groups[i]] for i in places}
                    for a in goes:
                        b = best[a][1]
                        masses[b], sums[b] = masses[b] + w[a], sums[b] + tokens[a] * w[a]
                        members[b] += groups[a]
                    after = [a for a in even if a not in goes] + odd
                    groups = [None] * prefix + [members[i] for i in after]
                    tokens = torch.stack([*tokens[:prefix], *(sums[i] / masses[i] for i in after)])
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            found[index].append([(group[0], sorted(group)) for group in groups[prefix:]])
        if vit.global_pool != "token":  # a head that pools sees a token once for every patch that it stands for
            times = torch.tensor([1] * prefix + [len(group) for group in groups[prefix:]])
            tokens = tokens.repeat_interleave(times, dim=0)
        rows.append(tokens)
    return vit.forward_head(vit.norm(torch.stack(rows))), found


def check(pruner, x, names=range(16), **settings):
    """The pruner does with images x what the reference does; names: of patches, on the grid."""
    logits, groups = reference(pruner.vit, x, pruner.r, **settings)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    trace, sources = pruner.trace(x), pruner.sources(x)
    mlp = pruner.counts()[1]
    for index, rows in enumerate(groups):
        for image, tokens in enumerate(rows):
            assert trace.kept[index][image].tolist() == sorted(names[name] for name, _ in tokens)
            expected = {patch: names[name] for name, patches in tokens for patch in patches}
            assert sources[index][image].tolist() == [expected[patch] for patch in range(len(names))]
            assert len(tokens) == mlp[index] - pruner.prefix
    return groups


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_nothing_is_the_dense_model(family, settings):
    vit = make(family)
    x = images(vit)
    for r in (0, [0, 0, 0]):
        torch.testing.assert_close(Ward(vit, r, **settings)(x), vit(x), rtol=0, atol=1e-11)
        assert all(torch.equal(ids, torch.arange(16).expand(3, -1)) for ids in Ward(vit, r, **settings).sources(x))


@pytest.mark.parametrize("r", RS.values(), ids=RS)
@pytest.mark.parametrize("family", FAMILIES)
def test_by_the_angle_of_mean_keys_without_attention_it_is_tome_bit_for_bit(family, r):
    vit = make(family)
    x, tome, ward = images(vit), ToMe(vit, r), Ward(vit, r, **AS_TOME)
    assert torch.equal(ward(x), tome(x))
    for one, other in zip(
        [*ward.sources(x), *ward.trace(x).kept], [*tome.sources(x), *tome.trace(x).kept], strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("r", RS.values(), ids=RS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_and_means_are_those_of_the_formulas(family, r):
    vit = make(family)
    groups = check(Ward(vit, r), images(vit))
    if r in (99, RS["many"]):
        assert any(len(patches) > 2 for rows in groups[1:] for tokens in rows for _, patches in tokens), "merged again"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", UNLIKE)
def test_every_part_is_that_of_the_formulas(family, settings):
    vit = make(family)
    check(Ward(vit, [6, 3, 2], **settings), images(vit), **settings)


def test_every_part_matters():
    """No two settings choose and weigh alike, or a part would go unchecked above."""
    vit = make("vit")
    x = images(vit)
    answers = [Ward(vit, [6, 3, 2], **settings)(x) for settings in [*SETTINGS.values(), AS_TOME]]
    for index, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-4 for other in answers[:index])


def test_deeper_models_merge_on():
    vit = make("vit", depth=6, img_size=96)
    groups = check(Ward(vit, 6), images(vit, 2), range(36))
    assert max(len(patches) for tokens in groups[-1] for _, patches in tokens) > 4


@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_gradients_are_those_of_fixed_pairs_and_weights(family):
    vit = make(family)
    x = images(vit)
    found, expected = (
        torch.autograd.grad((logits * logits.detach().cos()).sum(), [*vit.parameters()])
        for logits in (Ward(vit, 5).train()(x), reference(vit, x, 5)[0])
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert all(each.abs().max() > 0 for each in found)


def likeness(keys, sizes, gamma=0.0, looks_at=(0.0, 0.0), **settings):
    """How alike A (places 0, 2, …) and B are, and the weights, of patches with these keys (n, 2) and sizes, one head.

    looks_at: the query, the same for all; to a patch of key k goes attention in proportion to exp(k · looks_at).
    """
    pruner = Ward(make("no class token"), gamma=gamma, **settings)
    k, size = torch.tensor([[keys]], dtype=torch.float64), torch.tensor([sizes], dtype=torch.float64)
    q = torch.tensor(looks_at, dtype=torch.float64).expand_as(k)
    alike, weight = pruner._likeness(SimpleNamespace(scale=1.0), q, k, size)
    return alike[0], weight[0].tolist()


def test_a_small_token_goes_into_a_large_one_by_hand():
    """The large pair is the closer one, 0.9 apart: it costs 9/6 · 0.81; one patch and three, 1 apart, cost 3/4."""
    keys, sizes = [(0.0, 0.0), (1.0, 0.0), (10.0, 0.0), (10.9, 0.0)], [1.0, 3.0, 3.0, 3.0]
    alike, weight = likeness(keys, sizes)
    assert weight == sizes
    assert alike.flatten().tolist() == pytest.approx([-0.75, -0.75 * 10.9**2, -1.5 * 81, -1.5 * 0.81])
    assert alike.argmax() == 0, "the small one into the large one"
    alike, _ = likeness(keys, [1.0] * 4)
    assert alike.argmax() == 3, "of equal sizes the closest"


def test_an_attended_token_resists_by_hand():
    """Both pairs are 1 apart; the patches at y = 1 get e times the attention of those at y = 0."""
    keys = [(0.0, 1.0), (1.0, 1.0), (10.0, 0.0), (11.0, 0.0)]
    alike, weight = likeness(keys, [1.0] * 4)
    assert weight == [1.0] * 4 and alike.diagonal().tolist() == pytest.approx([-0.5] * 2, rel=1e-15, abs=0)
    alike, weight = likeness(keys, [1.0] * 4, gamma=1.0, looks_at=(0.0, 1.0))
    high, low = 2 * math.e / (math.e + 1), 2 / (math.e + 1)  # of a mean of 1
    assert weight == pytest.approx([high, high, low, low])
    assert alike.diagonal().tolist() == pytest.approx([-high / 2, -low / 2])
    assert likeness(keys, [1.0] * 4, gamma=2.0, looks_at=(0.0, 1.0))[1] == pytest.approx([high**2] * 2 + [low**2] * 2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((16, 1), (16, 2), -0.5), ((16, 1), (16, 3), -2.0), ((16, 1), (16, 1), 0.0), ((17, 1), (17, 2), -0.5),
     ((17, 3), (17, 4), -0.5)],
)  # fmt: skip
def test_close_keys_are_told_apart_in_half_precision(first, second, expected, autocast):
    """Their squares and products are some 300, of which bfloat16 tells only even numbers."""
    k = torch.tensor([[[first, second]]], dtype=torch.bfloat16)
    pruner = Ward(make("no class token"), gamma=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, _ = pruner._likeness(SimpleNamespace(scale=1.0), k, k, torch.ones(1, 2, dtype=k.dtype))
    assert found.item() == expected


def test_attention_counts_per_patch_by_hand():
    """A token of three patches gets three times the attention that each of them would get, and weighs three times."""
    keys, sizes = [(0.0, 0.0), (1.0, 0.0), (10.0, 0.0), (11.0, 0.0)], [1.0, 3.0, 2.0, 1.0]
    assert likeness(keys, sizes, gamma=1.0)[1] == pytest.approx(sizes)


def test_the_class_tokens_row_counts_where_there_is_one():
    vit, x = make("vit"), images(make("vit"))
    q, k = torch.randn(2, 1, 3, 17, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size, attn = torch.ones(1, 17, dtype=torch.float64), SimpleNamespace(scale=1.0)
    _, expected = Ward(vit)._likeness(attn, q, k, size)
    q[:, :, 1:] = 0
    assert torch.equal(Ward(vit)._likeness(attn, q, k, size)[1], expected), "no other is asked"
    q[:, :, :1] = 0
    assert not torch.equal(Ward(vit)._likeness(attn, q, k, size)[1], expected)
    assert Ward(vit, 4)(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_vanish_leave_finite_means(dtype):
    """Attention all on one patch, to a power that no float holds: what merges has next to no weight, but a mean."""
    vit = make("vit").to(dtype)
    with torch.no_grad():
        for block in vit.blocks:
            block.norm1.weight.fill_(3.0)
            block.attn.qkv.weight.mul_(60)
    assert Ward(vit, 5, gamma=10)(images(vit).to(dtype)).isfinite().all()


@pytest.mark.parametrize("kind", [ToMe, Ward])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("family", UNLIKE)
def test_the_order_within_a_and_within_b_does_not_matter(family, block, kind):
    """Of patches that have their position embedding, where one block merges."""
    vit = make(family)
    x, pruner = images(vit), kind(vit, [5 * (index == block) for index in range(3)])
    logits, before = pruner(x), pruner.sources(x)[-1]
    order = torch.arange(16)
    for parity in (0, 1):
        order[parity::2] = order[parity::2][torch.randperm(8, generator=torch.Generator().manual_seed(parity))]
    assert not torch.equal(order, torch.arange(16))
    places = torch.cat([torch.arange(pruner.prefix), order + pruner.prefix])
    vit.norm_pre.register_forward_hook(lambda _, args, tokens: tokens[:, places])
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    after = pruner.sources(x)[-1]  # at place p is now the patch order[p]
    assert torch.equal(order[after], before[:, order])


@pytest.mark.parametrize("r", RS.values(), ids=RS)
@pytest.mark.parametrize("family", UNLIKE)
def test_it_costs_what_tome_costs(family, r):
    vit = make(family)
    assert Ward(vit, r).counts() == ToMe(vit, r).counts() and predicted_macs(Ward(vit, r)) == predicted_macs(
        ToMe(vit, r)
    )


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_predicted_macs_are_those_counted(arch):
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=224).eval()
    pruner = Ward(vit, 12)
    counted = evaluate.macs(pruner, (3, 224, 224))["macs_g"]
    assert predicted_macs(pruner) == pytest.approx(counted, rel=0.03) and predicted_macs(pruner) < counted


@pytest.mark.parametrize("r", RS.values(), ids=RS)
def test_blocks_without_heads_merge_nothing(r):
    vit = remove(make("vit"), Plan(heads=[[0, 2], [], [1]], neurons=[[0, 1, 5], None, []]))
    check(Ward(vit, r), images(vit))


def test_runs_where_only_some_patches_are_embedded():
    on = [1, 2, 4, 7, 8, 11, 13, 14]
    pruner = Ward(FixedPatches(make("vit"), on).vit, [2, 2, 0])
    check(pruner, images(make("vit")), on)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [({"gamma": -0.1}, "gamma is -0.1: expected a finite number from 0"),
     ({"gamma": float("inf")}, "gamma is inf: expected a finite number from 0"),
     ({"gamma": float("nan")}, "gamma is nan: expected a finite number from 0"),
     ({"linkage": "single"}, "linkage is 'single': expected one of ward, cosine"),
     ({"keys": "all"}, "keys is 'all': expected one of heads, mean"),
     ({"r": -1}, "r is -1: expected a number of tokens from 0, or one for each of 3 blocks"),
     ({"r": [1, 2]}, "r is [1, 2]: expected a number of tokens from 0, or one for each of 3 blocks")],
)  # fmt: skip
def test_bad_arguments(arguments, fault):
    with pytest.raises(ValueError, match=f"^{re.escape(fault)}$"):
        Ward(make("vit"), **arguments)


@pytest.mark.parametrize("gamma", [None, 0.0, 2.0])
def test_it_is_built_at_a_strength_and_at_a_price(gamma):
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **TINY | {"img_size": 24, "depth": 4}).eval()
    rules, expected = RULES | ({} if gamma is None else {"gamma": gamma}), 0.5 if gamma is None else gamma
    given = training_free.build(vit, rules, "ward")
    assert type(given) is Ward and given.arguments == {"r": 2, "gamma": expected, "linkage": "ward", "keys": "heads"}
    whole = predicted_macs(Ward(vit, 0))
    for share in (0.9, 0.7, 0.5):
        found = training_free.build(vit, rules, "ward", share * whole)
        milder = Ward.of_total(vit, sum(found.rs) - 1)
        assert predicted_macs(found) <= share * whole < predicted_macs(milder), "nearly that"
        assert type(found) is Ward and found.gamma == expected and max(found.rs) - min(found.rs) <= 1
    with pytest.raises(Unreachable, match="^macs_g is .* this method needs at least"):
        training_free.build(vit, rules, "ward", 0.05 * whole)
