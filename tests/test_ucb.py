"""UCB stage 1: the identities of the method, on several model families in float64."""

import copy
import math
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from families import FAMILIES, by_onnx, images, make

from lib import blocks
from lib.pruners.tokens import FixedPatches, gather, with_prefix
from lib.pruners.ucb import UCB

CLOSE = {"rtol": 0, "atol": 1e-11}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_dense(family, training):
    vit = make(family)
    x = images(vit)
    for mode in ("mask", "gather"):
        ucb = UCB(copy.deepcopy(vit), keep_ratio=1.0, mode=mode).double().train(training)
        torch.testing.assert_close(ucb(x), vit(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_key_columns_equals_gathering(family):
    """With one set in all blocks, hiding its complement's keys is running the set alone."""
    vit = make(family)
    x = images(vit)
    ucb = UCB(vit, keep_ratio=0.4, beta=1e6, mode="mask").double().eval()
    kept = torch.tensor([0, 3, 5, 6, 10, 15])
    counts = torch.full_like(ucb.ucb_count_scores, 1e12)
    counts[:, :, ucb.prefix + kept] = 1.0  # unexplored, so with this beta they win in every block and image
    ucb.ucb_count_scores.copy_(counts)
    ucb.steps.fill_(1000)
    assert all(torch.equal(ids, kept.expand(3, -1)) for ids in ucb.trace(x).kept)
    torch.testing.assert_close(ucb(x), FixedPatches(copy.deepcopy(vit), kept)(x), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_patch_is_not_seen_by_its_block_but_may_return(family):
    ucb = UCB(make(family), 0.5, mode="mask").double().eval()
    x = images(ucb.vit)
    tokens = ucb.vit.norm_pre(ucb.vit._pos_embed(ucb.vit.patch_embed(x)))
    ids = torch.arange(16).expand(3, -1)
    bonus = torch.zeros(3, ucb.prefix + 16, dtype=torch.float64)
    out, running, kept, _ = ucb.block(0, tokens, ids, bonus)
    assert out.shape == tokens.shape and torch.equal(running, ids), "hidden patches stay in the model"
    rows = with_prefix(kept, ucb.prefix)
    alone = ucb.vit.blocks[0](gather(tokens, rows))
    torch.testing.assert_close(gather(out, rows), alone, **CLOSE)


def test_beta_zero_is_attention_top_k():
    vit = make("registers")
    x = images(vit)
    block = vit.blocks[0]
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    q, k, _ = blocks.qkv(block.attn, block.norm1(tokens))
    received = blocks.probabilities(block.attn, q, k).mean(dim=(1, 2))[:, vit.num_prefix_tokens :]
    expected = received.topk(8, dim=1).indices.sort(dim=1).values
    ucb = UCB(vit, 0.5, beta=0.0).double().train()
    ucb.ucb_count_scores.uniform_(1, 50)  # beta 0 does not look at them
    assert torch.equal(ucb.trace(x).kept[0], expected)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_scores_are_importance_and_bonus_by_hand(mode):
    """Mean over heads of P · (mean attention received) + β √(ln t / N), of the patches that are still there."""
    vit, beta = make("vit"), 0.7
    ucb, block = UCB(vit, 0.5, beta=beta, mode=mode).double().train(), vit.blocks[1]
    generator = torch.Generator().manual_seed(3)
    counts = 1 + 30 * torch.rand(ucb.ucb_count_scores.shape, generator=generator, dtype=torch.float64)
    ucb.ucb_count_scores.copy_(counts)
    ucb.steps.fill_(36)
    ids = torch.stack([torch.randperm(16, generator=generator)[:9].sort().values for _ in range(3)])
    x = torch.randn(3, 10, vit.embed_dim, generator=generator, dtype=torch.float64)
    q, k, _ = blocks.qkv(block.attn, block.norm1(x))
    received = blocks.probabilities(block.attn, q, k).mean(dim=2)[..., 1:] * 9  # 1 where all get as much
    bonus = torch.stack([beta * (math.log(37) / counts[1, :, 1 + one]).sqrt() for one in ids])
    best = (received + bonus).mean(dim=1).argsort(dim=1, descending=True)
    assert not torch.equal(best, received.mean(dim=1).argsort(dim=1, descending=True)), "the bonus decides, too"
    assert not torch.equal(best, bonus.mean(dim=1).argsort(dim=1, descending=True)), "and not alone"
    _, _, kept, counted = ucb.block(1, x, ids, ucb.extra()[1][0])
    expected = ids.gather(1, best[:, :4])
    assert torch.equal(kept, expected.sort(dim=1).values) and torch.equal(counted, expected)


def test_beta_infinite_explores_round_robin():
    ucb = UCB(make("vit"), 0.3, beta=1e9).double().train()
    with torch.no_grad():
        for seed in range(23):
            ucb(images(ucb.vit, 1, seed))
            counts = ucb.ucb_count_scores[:, :, 1:]
            assert (counts.amax(dim=-1) - counts.amin(dim=-1)).max() <= 1


@pytest.mark.parametrize("mode", ["mask", "gather"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_counts_add_up(mode, ratio):
    ucb = UCB(make("registers"), ratio, warmup_steps=2, mode=mode).double().train()
    with torch.no_grad():
        for seed in range(5):
            ucb(images(ucb.vit, 4, seed))
    left, expected = 16, []
    for _ in range(3):
        k = max(1, int(ratio * left))
        expected.append(3.0 * k)
        left = k if mode == "gather" else left
    gains = (ucb.ucb_count_scores - 1).sum(dim=-1)
    torch.testing.assert_close(gains, torch.tensor(expected).double()[:, None].expand_as(gains))
    assert (ucb.ucb_count_scores[:, :, : ucb.prefix] == 1).all()
    assert int(ucb.steps) == 5


def test_counts_are_what_was_selected():
    ucb = UCB(make("vit"), 0.5, beta=0.0).double().train()
    x = images(ucb.vit, 4)
    twice = torch.cat([x, x[:1], x[:1]])  # duplicates all count
    kept = ucb.trace(twice).kept
    ucb(twice)
    for counts, ids in zip(ucb.ucb_count_scores, kept, strict=True):
        shares = torch.bincount(ids.flatten(), minlength=16) / 6
        torch.testing.assert_close(counts[:, 1:], 1 + shares.double().expand(3, -1))
    assert len({tuple(counts[0].tolist()) for counts in ucb.ucb_count_scores}) > 1, "every block counts for itself"


def test_keeping_everything_still_ranks():
    """What tied elsewhere: with keep_ratio 1 the better half counts, so that stage 2 has something to go by."""
    ucb = UCB(make("vit"), keep_ratio=1.0).double().train()
    with torch.no_grad():
        for seed in range(6):
            ucb(images(ucb.vit, 4, seed))
    gains = (ucb.ucb_count_scores - 1).sum(dim=-1)
    torch.testing.assert_close(gains, torch.full_like(gains, 6 * 8.0))
    assert ucb.patch_scores().unique().numel() > 4
    assert ucb.ranked(0.5).tolist() != list(range(8)), "not simply the first patches"


def test_exploration_share_is_counted():
    ucb = UCB(make("vit"), keep_ratio=1.0, explore_ratio=0.25).double().train()
    ucb(images(ucb.vit))
    assert torch.allclose((ucb.ucb_count_scores - 1).sum(dim=-1), torch.tensor(4.0).double())


def test_evaluation_and_warmup_leave_counts_bit_identical():
    ucb = UCB(make("vit"), 0.5, warmup_steps=1).double()
    ucb.ucb_count_scores.uniform_(1, 9)
    before, x = ucb.ucb_count_scores.clone(), images(ucb.vit)
    ucb.eval()(x)
    ucb.train().trace(x)
    assert ucb.training and int(ucb.steps) == 0
    torch.testing.assert_close(ucb(x), ucb.vit(x), **CLOSE)  # the warm-up step runs dense
    assert torch.equal(ucb.ucb_count_scores, before) and int(ucb.steps) == 1
    ucb(x)
    assert not torch.equal(ucb.ucb_count_scores, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_keeps_the_highest_counts(family):
    ucb = UCB(make(family), 1.0).double()
    ucb.ucb_count_scores.uniform_(1, 9, generator=torch.Generator().manual_seed(3))
    x = images(ucb.vit)
    torch.testing.assert_close(ucb.freeze(1.0).eval()(x), ucb.vit(x), **CLOSE)
    frozen = ucb.freeze(0.3)
    scores = ucb.ucb_count_scores[:, :, ucb.prefix :].mean(dim=(0, 1))
    assert frozen.kept.tolist() == sorted(scores.topk(4).indices.tolist())
    assert ucb.patches == 16 and ucb.vit.patch_embed.num_patches == 16, "the frozen model is a copy"


def test_three_tenths_of_196_patches_is_58():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(UCB(make("vit", img_size=224)).freeze(0.3).kept) == 58


def test_freezing_without_counts_warns():
    with pytest.warns(UserWarning, match="train stage 1 first"):
        UCB(make("vit")).freeze(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UCB(make("vit")).freeze(1.0)


def test_blocks_may_differ_in_heads():
    vit = make("vit")
    attn = vit.blocks[1].attn
    rows = torch.cat([torch.arange(16) + 48 * part for part in range(3)])  # the first of three heads in Q, K and V
    attn.qkv.weight = torch.nn.Parameter(attn.qkv.weight[rows])
    attn.qkv.bias = torch.nn.Parameter(attn.qkv.bias[rows])
    attn.proj.weight = torch.nn.Parameter(attn.proj.weight[:, :16])
    attn.qkv.out_features, attn.proj.in_features, attn.num_heads, attn.attn_dim = 48, 16, 1, 16
    ucb = UCB(vit, 0.5, beta=0.3).double().train()
    x = images(vit)
    for _ in range(3):
        ucb(x)
    gains = (ucb.ucb_count_scores - 1).sum(dim=-1)
    torch.testing.assert_close(gains, torch.full_like(gains, 3 * 8.0))
    torch.testing.assert_close(UCB(vit, 1.0).double().eval()(x), vit(x), **CLOSE)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_gradient_checkpointing_changes_nothing(mode):
    """A block that runs again for its backward must select what it selected before, though counts have moved."""
    x, results = images(make("vit")), []
    for checkpointing in (False, True):
        ucb = UCB(make("vit"), 0.5, beta=2.0, mode=mode).double().train()
        ucb.vit.set_grad_checkpointing(checkpointing)
        for _ in range(3):
            ucb.zero_grad()
            ucb(x).square().sum().backward()
        results.append([ucb.ucb_count_scores, *(p.grad for p in ucb.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, **CLOSE)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_batch_equals_single(mode):
    ucb = UCB(make("vit"), 0.5, mode=mode).double().eval()
    x = images(ucb.vit, 4)
    torch.testing.assert_close(ucb(x), torch.cat([ucb(each) for each in x.split(1)]), **CLOSE)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_exports(mode, tmp_path):
    ucb = UCB(make("vit").float(), 0.5, mode=mode).eval()
    x, more = images(ucb.vit, 2).float(), images(ucb.vit, 5).float()
    exported = torch.export.export(ucb, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(more), ucb(more))
    torch.testing.assert_close(by_onnx(ucb, x, tmp_path), ucb(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep_ratio": 0}, "share in"), ({"keep_ratio": 1.5}, "share in"), ({"keep_ratio": float("nan")}, "share in"),
     ({"explore_ratio": -1}, "share in"), ({"beta": -1}, "beta is -1"), ({"beta": float("inf")}, "beta is inf"),
     ({"explore_ratio": 1.0, "keep_ratio": 1.0}, "explore_ratio is 1.0: all patches would count alike"),
     ({"mode": "drop"}, "expected 'mask' or 'gather'")],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UCB(make("vit"), **arguments)


def _count_on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ucb = UCB(make("vit"), 0.5, beta=1.0).double().train()
    for seed in range(4):
        ucb(images(ucb.vit, 6, seed)[rank::world])
    torch.save(ucb.ucb_count_scores, f"{folder}/counts{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_count_like_one_with_twice_the_batch(tmp_path):
    ucb = UCB(make("vit"), 0.5, beta=1.0).double().train()
    for seed in range(4):
        ucb(images(ucb.vit, 6, seed))
    mp.spawn(_count_on_rank, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"counts{rank}.pt"), ucb.ucb_count_scores, **CLOSE)
