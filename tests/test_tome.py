"""ToMe: bipartite soft matching against an implementation of the paper, token by token, of the whole sequence."""

import itertools
import math

import pytest
import timm
import torch
from families import FAMILIES, WITHOUT_CLASS_TOKEN, images, make

from lib import evaluate
from lib.pruners.baselines import ToMe, follow, merge
from lib.pruners.dropping import predicted_macs, reaching
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches

CLOSE = {"rtol": 0, "atol": 1e-10}
RS = {"few": 3, "a list": [5, 0, 4], "all that can": 99, "many": (7, 4, 1)}


def attention(block, x, sizes):
    """Tokens (N, D) of one image after the attention residual, and keys (N, d), mean over heads; a key's probability is
    in proportion to its size."""
    attn = block.attn
    if not attn.num_heads:
        return x + block.ls1(attn(block.norm1(x))), None
    d, outputs, keys = attn.head_dim, [], []
    joint = attn.qkv(block.norm1(x))
    for head in range(attn.num_heads):
        q, k, v = (joint[:, (part * attn.num_heads + head) * d :][:, :d] for part in range(3))
        keys.append(attn.k_norm(k))
        weights = (attn.q_norm(q) @ keys[-1].T / math.sqrt(d)).exp() * torch.tensor(sizes, dtype=x.dtype)
        outputs.append(weights / weights.sum(dim=1, keepdim=True) @ v)
    return x + block.ls1(attn.proj(attn.norm(torch.cat(outputs, dim=1)))), torch.stack(keys).mean(dim=0)


def reference(vit, x, r):
    """Logits, and for every block and image the tokens that are patches: (which patch it goes by, which it stands for).

    Even places of the whole sequence are A, odd ones B; prefix tokens neither go nor take others in, and stay in front.
    """
    prefix, rs = vit.num_prefix_tokens, r if isinstance(r, list | tuple) else [r] * len(vit.blocks)
    rows, found = [], [[] for _ in vit.blocks]
    for tokens in vit.norm_pre(vit._pos_embed(vit.patch_embed(x))):
        groups = [None] * prefix + [[patch] for patch in range(len(tokens) - prefix)]  # the first names the token
        for index, (block, r) in enumerate(zip(vit.blocks, rs, strict=True)):
            tokens, keys = attention(block, tokens, [1.0 if group is None else len(group) for group in groups])
            if keys is not None and r:
                places = range(prefix, len(tokens))
                even, odd = ([place for place in places if place % 2 == parity] for parity in (0, 1))
                best = {}
                for a in even:
                    cosines = {b: torch.cosine_similarity(keys[a], keys[b], dim=0).item() for b in odd}
                    if cosines:
                        best[a] = max((value, b) for b, value in cosines.items())
                goes = sorted(best, key=lambda a, best=best: -best[a][0])[: min(r, len(places) // 2)]
                sums = {place: tokens[place] * len(groups[place]) for place in places}
                for a in goes:
                    b = best[a][1]
                    sums[b] = sums[b] + tokens[a] * len(groups[a])
                members = {
                    b: [*groups[b], *(patch for a in goes if best[a][1] == b for patch in groups[a])] for b in odd
                }
                stays = [a for a in even if a not in goes]
                groups = [None] * prefix + [groups[a] for a in stays] + [members[b] for b in odd]
                means = [sums[place] / len(group) for place, group in zip(stays + odd, groups[prefix:], strict=True)]
                tokens = torch.stack([*tokens[:prefix], *means])
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            found[index].append([(group[0], sorted(group)) for group in groups[prefix:]])
        if vit.global_pool != "token":  # a head that pools sees a token once for every patch that it stands for
            times = torch.tensor([1] * prefix + [len(group) for group in groups[prefix:]])
            tokens = tokens.repeat_interleave(times, dim=0)
        rows.append(tokens)
    return vit.forward_head(vit.norm(torch.stack(rows))), found


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_nothing_is_bare(family):
    vit = make(family)
    x = images(vit)
    for r in (0, [0, 0, 0]):
        torch.testing.assert_close(ToMe(vit, r)(x), vit(x), rtol=0, atol=1e-11)
        assert all(torch.equal(ids, torch.arange(16).expand(3, -1)) for ids in ToMe(vit, r).sources(x))
    torch.testing.assert_close(ToMe.of_total(vit, 0)(x), vit(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("r", RS.values(), ids=RS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_the_papers(family, r):
    vit = make(family)
    x, pruner = images(vit), ToMe(vit, r)
    logits, groups = reference(vit, x, r)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    trace, sources = pruner.trace(x), pruner.sources(x)
    torch.testing.assert_close(trace.logits, logits.detach(), **CLOSE)
    mlp = pruner.counts()[1]
    for index, rows in enumerate(groups):
        for image, tokens in enumerate(rows):
            assert trace.kept[index][image].tolist() == sorted(name for name, _ in tokens)
            expected = {patch: name for name, patches in tokens for patch in patches}
            assert sources[index][image].tolist() == [expected[patch] for patch in range(16)]
            assert len(tokens) == mlp[index] - pruner.prefix
    lived = [
        [sum(patch == name for rows in groups for name, _ in rows[image]) for patch in range(16)] for image in range(3)
    ]
    assert trace.depth.tolist() == lived
    if r in (99, RS["many"]):
        assert any(len(patches) > 2 for rows in groups[1:] for tokens in rows for _, patches in tokens), "merged again"


@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_gradients_are_the_papers(family):
    vit = make(family)
    x = images(vit)
    found, expected = (
        torch.autograd.grad((logits * logits.detach().cos()).sum(), [*vit.parameters()])
        for logits in (ToMe(vit, 5)(x), reference(vit, x, 5)[0])
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", [*FAMILIES, "distilled"])
def test_the_last_block_is_matched_only_where_patches_are_read(family, monkeypatch):
    vit, matched = make(family), []
    x, pruner, likeness = images(vit), ToMe(vit, [3, 2, 2]), ToMe._likeness
    monkeypatch.setattr(ToMe, "_likeness", lambda self, *given: matched.append(0) or likeness(self, *given))
    logits = pruner(x)
    assert len(matched) == (3 if family in WITHOUT_CLASS_TOKEN else 2)
    torch.testing.assert_close(logits, pruner.run(x)[0], **CLOSE)
    assert len(matched) == (6 if family in WITHOUT_CLASS_TOKEN else 5), "who asks for places gets those of all blocks"


def test_deeper_models_merge_on():
    vit = make("vit", depth=6, img_size=96)
    x = images(vit, 2)
    logits, groups = reference(vit, x, 6)
    torch.testing.assert_close(ToMe(vit, 6)(x), logits, **CLOSE)
    assert max(len(patches) for tokens in groups[-1] for _, patches in tokens) > 4
    assert ToMe(vit, 6).counts()[1] == [31, 25, 19, 13, 7, 4]


@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_every_patch_is_in_one_token_and_never_leaves_its_company(family):
    vit = make(family, img_size=112 if family == "registers" else 128)
    pruner = ToMe(vit, [20, 9, 11])
    x = images(vit)
    trace, before = pruner.trace(x), torch.arange(64).expand(3, -1)
    for kept, sources, count in zip(trace.kept, pruner.sources(x), pruner.counts()[1], strict=True):
        assert torch.equal(sources.gather(1, sources), sources), "a token goes by one of its own patches"
        for image in range(3):
            assert sources[image].unique().tolist() == kept[image].tolist()
            assert len(kept[image]) == count - pruner.prefix
        assert torch.equal(sources.gather(1, before), sources), "what was together stays together"
        before = sources


def cosines(keys, prefix):
    """Of tokens' keys (B, N, d): each patch at an even place of the sequence with each at an odd one."""
    unit, even = torch.nn.functional.normalize(keys, dim=2), prefix + prefix % 2
    return unit[:, even::2] @ unit[:, prefix + 1 - prefix % 2 :: 2].transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_merge_adds_sizes_and_keeps_the_mean(prefix):
    generator = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(2, prefix + 21, width, generator=generator, dtype=torch.float64) for width in (5, 4))
    sources = torch.arange(21).expand(2, -1)
    ids = torch.nn.functional.pad(sources, (prefix, 0), value=-1)
    size, total, head = torch.ones_like(ids, dtype=torch.float64), x.sum(dim=1), x[:, :prefix].clone()
    for r in (10, 3, 4):
        number = x.shape[1]
        x, size, *moves = merge(x, cosines(keys[:, :number], prefix), r, size, size, prefix)
        ids, sources = follow(ids, sources, *moves)
        assert x.shape[1] == ids.shape[1] == size.shape[1] == number - r
        assert (size.sum(dim=1) == prefix + 21).all()
        assert torch.equal(x[:, :prefix], head) and (ids[:, :prefix] == -1).all() and (size[:, :prefix] == 1).all()
        torch.testing.assert_close((x * size[..., None]).sum(dim=1), total, rtol=0, atol=1e-12)
        for image in range(2):
            patches = ids[image, prefix:]
            assert torch.equal(torch.bincount(sources[image], minlength=21)[patches].double(), size[image, prefix:])


def test_a_on_b_by_hand():
    """Tokens 0 2 4 are A. 0 is like 1, 4 like 3 and 2 like none: r = 2 leaves 2, 0 + 1, 3 + 4 in this order."""
    keys = torch.tensor([[[1.0, 0], [3, 0.01], [-1, -1], [0, 5], [0.02, 1]]], dtype=torch.float64)
    x = torch.tensor([[[1.0], [2], [4], [8], [16]]], dtype=torch.float64)
    ids, size = torch.tensor([[5, 1, 2, 0, 4]]), torch.tensor([[1.0, 3, 1, 1, 2]], dtype=torch.float64)
    found, sizes, *moves = merge(x.clone(), cosines(keys, 0), 2, size, size, 0)
    assert found.flatten().tolist() == pytest.approx([4, 7 / 4, 40 / 3])
    assert sizes.tolist() == [[1, 4, 3]]
    assert [each.tolist() for each in moves] == [[[2, 1, 3]], [[0, 4]], [[1, 3]]]
    names = follow(ids, torch.tensor([[0, 1, 2, 1, 4, 5, 4, 1]]), *moves)
    assert [each.tolist() for each in names] == [[[2, 1, 0]], [[0, 1, 2, 1, 0, 1, 0, 1]]]
    x, size, *moves = merge(x, cosines(keys, 0), 1, size, size, 0)
    ids, _ = follow(ids, torch.arange(6)[None], *moves)
    assert (ids.tolist(), size.tolist()) == ([[2, 4, 1, 0]], [[1, 2, 4, 1]]), "the most alike pair goes first"


@pytest.mark.parametrize("family", ["vit", "no class token", "registers, mean pooling"])
def test_merging_equal_patches_changes_nothing(family):
    """What proportional attention is for: two tokens that are the same count as much when they have become one."""
    vit = make(family)
    first = vit.pos_embed.shape[1] - 16
    vit.pos_embed.data[:, first:] = vit.pos_embed.data[:, first : first + 1]
    size = vit.patch_embed.patch_size[0]
    x = images(vit)[..., :size].repeat(1, 1, 1, 4)  # the four patches of a row are one another's copies
    pruner = ToMe(vit, [8, 4, 0])
    assert [count - pruner.prefix for count in pruner.counts()[1]] == [8, 4, 4]
    torch.testing.assert_close(pruner(x), vit(x), **CLOSE)
    assert all((ids.view(3, 4, 4) // 4 == torch.arange(4)[:, None]).all() for ids in pruner.sources(x))
    if vit.global_pool == "token":  # nothing reads what the last block merges, equal or not
        torch.testing.assert_close(ToMe(vit, [8, 4, 2])(x), vit(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_leave_a_block_as_from_the_whole_block(family):
    pruner = ToMe(make(family), 5)
    x = pruner.embed(images(pruner.vit))
    block, prefix = pruner.vit.blocks[0], pruner.prefix
    found, size, left, *_ = pruner._step(block, 5, x, None)
    whole = block(x)
    torch.testing.assert_close(found[:, :prefix], whole[:, :prefix], rtol=0, atol=1e-11)
    for image in range(3):
        alone, places = size[image] == 1, left[image] - image * whole.shape[1]
        torch.testing.assert_close(found[image][alone], whole[image][places[alone]], rtol=0, atol=1e-11)


def test_more_than_half_is_capped():
    prefix_and = lambda *patches: [1 + number for number in patches]  # noqa: E731
    assert ToMe(make("vit"), 99).counts() == (prefix_and(16, 8, 4), prefix_and(8, 4, 2))
    assert ToMe(make("vit", depth=6), 8).counts()[1] == prefix_and(8, 4, 2, 1, 1, 1)
    assert ToMe(make("vit", img_size=48), [9, 1, 9]).counts()[1] == prefix_and(5, 4, 2), "4 of 9, 1 of 5, 2 of 4"


def test_of_total_distributes():
    for depth in (3, 7, 12):
        with torch.device("meta"):
            vit = timm.create_model("vit_tiny_patch16_224", depth=depth)
        for total in (0, 1, 2, 5, 11, 12, 13, 50, 99):
            pruner = ToMe.of_total(vit, total)
            assert len(pruner.rs) == depth and sum(pruner.rs) == total and max(pruner.rs) - min(pruner.rs) <= 1
            assert [197 - count for count in pruner.counts()[1]] == list(itertools.accumulate(pruner.rs))
    assert sum(ToMe.of_total(vit, 7.4).rs) == 7
    assert ToMe.of_total(vit, 40, every=5).rs == [13, 0, 0, 0, 0, 14, 0, 0, 0, 0, 13, 0]
    assert ToMe.of_total(vit, 9, every=99).rs == [9, *[0] * 11]
    vit = remove(make("vit"), Plan(heads=[[], None, None]))
    assert ToMe.of_total(vit, 9).rs == [0, 4, 5] and ToMe.of_total(vit, 9, every=2).rs == [0, 9, 0]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch16_gap_224", "vit_small_patch14_reg4_dinov2"])
def test_predicted_macs_are_those_counted_and_fall(arch):
    with torch.device("meta"):
        vit = timm.create_model(arch, img_size=224).eval()
    before = math.inf
    for r in (6, 16):
        counted, predicted = evaluate.macs(ToMe(vit, r), (3, 224, 224))["macs_g"], predicted_macs(ToMe(vit, r))
        assert predicted == pytest.approx(counted, rel=0.02)
        matched = ToMe(vit, r).counts()[0][: -1 if vit.global_pool == "token" else None]
        running = [count - vit.num_prefix_tokens for count in matched]
        selecting = sum((n // 2) * (n - n // 2) * vit.blocks[0].attn.head_dim for n in running if n > 1)
        assert round((counted - predicted) * 1e9) == selecting, "cosines of A and B"
        assert predicted < before
        before = predicted
    assert predicted_macs(ToMe(vit, 0)) == pytest.approx(evaluate.closed_form_macs(vit) / 1e9, rel=1e-14)


def test_reaching_finds_the_mildest_total():
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224")
    build, dense = lambda total: ToMe.of_total(vit, total), predicted_macs(ToMe(vit, 0))  # noqa: E731
    for share in (0.5, 0.75, 0.9):
        found = reaching(build, share * dense, most=300)
        assert predicted_macs(found) <= share * dense < predicted_macs(build(sum(found.rs) - 1))
    assert sum(reaching(build, dense, most=300).rs) == 0
    with pytest.raises(ValueError, match=r"^macs_g is 0\.1: this method needs at least 0\.\d{3} GMACs$"):
        reaching(build, 0.1, most=300)


@pytest.mark.parametrize("r", RS.values(), ids=RS)
def test_blocks_without_heads_merge_nothing(r):
    vit = remove(make("vit"), Plan(heads=[[0, 2], [], [1]], neurons=[[0, 1, 5], None, []]))
    x, pruner = images(vit), ToMe(vit, r)
    torch.testing.assert_close(ToMe(vit, 0)(x), vit(x), **CLOSE)
    logits, groups = reference(vit, x, r)
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    assert [len(rows[0]) + 1 for rows in groups] == pruner.counts()[1]


def test_runs_where_only_some_patches_are_embedded():
    on = [1, 2, 4, 7, 8, 11, 13, 14]
    pruner = ToMe(FixedPatches(make("vit"), on).vit, [2, 2, 0])
    x = images(make("vit"))
    logits, groups = reference(pruner.vit, x, [2, 2, 0])
    torch.testing.assert_close(pruner(x), logits, **CLOSE)
    trace, sources = pruner.trace(x), pruner.sources(x)
    for index, rows in enumerate(groups):
        for image, tokens in enumerate(rows):
            assert trace.kept[index][image].tolist() == sorted(on[name] for name, _ in tokens)
            expected = {patch: on[name] for name, patches in tokens for patch in patches}
            assert sources[index][image].tolist() == [expected[patch] for patch in range(8)]


@pytest.mark.parametrize("r", [-1, [1, 2], [1, -1, 1], [], [1] * 4])
def test_bad_arguments(r):
    with pytest.raises(ValueError, match="expected a number of tokens from 0, or one for each of 3 blocks") as caught:
        ToMe(make("vit"), r)
    assert str(caught.value).startswith(f"r is {r}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("r", [2.7, [1, 2.5, 1]])
def test_whole_numbers_merge(r):
    with pytest.raises(ValueError, match="expected a number of tokens from 0"):
        ToMe(make("vit"), r)
    vit, whole = make("vit"), [round(each) for each in r] if isinstance(r, list) else round(r)
    as_floats = [float(each) for each in whole] if isinstance(r, list) else float(whole)
    assert torch.equal(ToMe(vit, as_floats)(images(vit)), ToMe(vit, whole)(images(vit)))
    assert ToMe.of_total(vit, 4, 2.0).rs == ToMe.of_total(vit, 4, 2).rs
