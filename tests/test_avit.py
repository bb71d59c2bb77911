"""A-ViT: the identities of the method, against a slow reference and between its two modes, on all model families."""

import copy
import functools
import math
import pickle
from typing import NamedTuple

import pytest
import timm
import torch
from families import FAMILIES, images, make
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib import blocks, evaluate, models
from lib.pruners import avit as module
from lib.pruners.avit import AViT, halt
from lib.pruners.tokens import FixedPatches

CLOSE = {"rtol": 0, "atol": 1e-11}
MODES = ("mask", "gather")

# gate_scale, gate_center, and what is added to the class token's first channel, or, with mean pooling, to that of the
# patches and taken from that of the registers. With these, tokens leave after one, two and three blocks and images
# after different numbers of blocks: `test_halting_is_real_in_the_cases_below`.
GATES = {
    "vit": (5, 5, 2.5),
    "deit": (2, 1, 4.5),
    "layerscale": (5, 5, -0.5),
    "registers": (2, 1, 3.5),
    "no class token": (2, 1, 0),
    "registers, mean pooling": (0.5, -4, 6),
    "qk norm": (2, 1, 2.5),
    "norm before blocks": (2, -11, 0),  # the norm takes the first channel down to a size that the others do not have
    "attention pooling": (0.5, 1, 0),
    "scaled norms": (5, 5, 0.5),
}
CLASS_TOKEN = [family for family in FAMILIES if family not in ("no class token", "registers, mean pooling",
                                                               "attention pooling")]  # fmt: skip
LEAVING = [*CLASS_TOKEN, "registers, mean pooling"]  # some of their images leave while tokens that are not read run on


def avit(family: str, mode: str = "mask", **overrides) -> AViT:
    vit = make(family, **overrides)
    scale, center, shift = GATES[family]
    with torch.no_grad():
        if family == "registers, mean pooling":
            vit.patch_embed.proj.bias[0] += shift
            vit.reg_token[..., 0] -= shift
        elif shift:
            vit.cls_token[..., 0] += shift
    return AViT(vit, scale, center, mode=mode).eval()


class Expected(NamedTuple):
    logits: Tensor
    out: Tensor  # (B, N, D), what all tokens' weighted embeddings sum to
    ponder: Tensor  # (B, N)
    gates: Tensor  # (L, B, N), zero where the token does not run
    running: Tensor  # (L, B, N)
    entered: Tensor  # (L, B, N), running while the image runs


@torch.no_grad()
def reference(model: AViT, x: Tensor) -> Expected:
    """The algorithm as it is written down, image by image and token by token: a block is run on running tokens alone.

    Nothing is shared with the model but its blocks and its gate's two numbers.
    """
    vit, scale, center = model.vit, float(model.gate_scale), float(model.gate_center)
    # the tokens that keep an image running: those that the head reads
    first = 0 if vit.global_pool in ("token", "map", "") else vit.num_prefix_tokens
    last = 1 if vit.global_pool == "token" else None
    found = []
    for image in x.split(1):
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))[0]
        N, L = len(tokens), len(vit.blocks)
        running = [True] * N
        cumul, rest, ponder, out = [0.0] * N, [1.0] * N, [0.0] * N, torch.zeros_like(tokens)
        gates, ran, entered = torch.zeros(L, N).double(), torch.zeros(L, N).bool(), torch.zeros(L, N).bool()
        for index, block in enumerate(vit.blocks):
            alive = [token for token in range(N) if running[token]]
            if not alive:
                break
            ran[index, alive] = True
            entered[index, alive] = any(running[first:last])
            tokens = tokens.clone()
            tokens[alive] = block(tokens[None, alive])[0]
            for token in alive:
                t = tokens[token]
                gates[index, token] = scale * float(t[0]) - center
                h = 1 / (1 + math.exp(-gates[index, token]))
                if index == L - 1:
                    h = 1.0
                cumul[token] += h
                ponder[token] += 1
                if cumul[token] >= 1 - model.eps:
                    out[token] += rest[token] * t
                    ponder[token] += rest[token]
                    running[token] = False
                else:
                    out[token] += h * t
                    rest[token] -= h
        assert not any(running)
        logits = vit.forward_head(vit.norm(out[None]))[0]
        found.append((logits, out, torch.tensor(ponder, dtype=torch.float64), gates, ran, entered))
    logits, out, ponder, gates, ran, entered = zip(*found, strict=True)
    per_block = (torch.stack(each, dim=1) for each in (gates, ran, entered))
    return Expected(torch.stack(logits), torch.stack(out), torch.stack(ponder), *per_block)


@functools.cache
def expected(family: str) -> Expected:
    model = avit(family)
    return reference(model, images(model.vit, 6))


def read(model: AViT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and what goes into the norm before the head: the sums of weighted embeddings of the tokens it reads."""
    seen = []
    hook = model.vit.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(x)
    hook.remove()
    return logits, seen[0]


def fed(model: AViT, x: Tensor) -> dict[str, list[int]]:
    """How many tokens, those of padding included, go through norm, qkv and MLP of each block."""
    counts = {name: [0] * len(model.vit.blocks) for name in ("norm1", "attn.qkv", "mlp.fc1")}

    def count(name: str, index: int, inputs: tuple[Tensor]) -> None:
        counts[name][index] += inputs[0].shape[:-1].numel()

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name, index=index: count(name, index, inputs)
        )
        for index, block in enumerate(model.vit.blocks)
        for name in counts
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return counts


# --- the algorithm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_halting_is_real_in_the_cases_below(family):
    found = expected(family)
    depth = found.running.sum(dim=0)
    assert depth.unique().tolist() == [1, 2, 3]
    patches = depth[:, make(family).num_prefix_tokens :]
    assert len(patches.unique()) > 1 and (patches < 3).double().mean() > 0.2
    blocks_of_images = found.entered.any(dim=2).sum(dim=0)
    assert len(blocks_of_images.unique()) == 2 if family in LEAVING else (blocks_of_images == 3).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference(family, mode):
    model, wanted = avit(family, mode), expected(family)
    x = images(model.vit, 6)
    logits, out = read(model, x)
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    assert out.shape[1] == (1 if family in CLASS_TOKEN else wanted.out.shape[1])
    first = model.vit.num_prefix_tokens if family == "registers, mean pooling" else 0  # registers are not read
    torch.testing.assert_close(out[:, first:], wanted.out[:, first : out.shape[1]], **CLOSE)

    logits, found = model(x, with_halting=True)
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    torch.testing.assert_close(found.ponder, wanted.ponder, **CLOSE)
    torch.testing.assert_close(found.gates * wanted.running, wanted.gates, **CLOSE)
    assert torch.equal(found.running, wanted.running) and found.prefix == model.vit.num_prefix_tokens

    trace = model.trace(x)
    entered = wanted.entered[:, :, model.vit.num_prefix_tokens :]
    torch.testing.assert_close(trace.logits, wanted.logits, **CLOSE)
    assert torch.equal(trace.depth, entered.sum(dim=0))
    assert [[ids.tolist() for ids in block] for block in trace.kept] == [
        [[patch for patch, kept in enumerate(image) if kept] for image in block] for block in entered.tolist()
    ]


def test_weights_of_a_token_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(9, 2000, generator=generator, dtype=torch.float64) ** 3
    scores[:, 0], scores[:, 1] = 0, 1
    scores[-1] = 1
    weights, running, total = torch.zeros(2000).double(), torch.ones(2000).bool(), 0
    for h in scores:
        weight, done = halt(h, total, 0.01)
        assert (weight[running] >= 0).all()
        weights += weight * running
        total, running = total + h, running & ~done
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-12)
    assert not running.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_blocks_leave_alone_comes_out_as_it_went_in(family, mode):
    """Blocks that add nothing: the weighted sum is the embedding itself if, and only if, weights sum to one.

    Read before the last norm, which would hide a common factor.
    """
    vit = make(family, depth=6)
    with torch.no_grad():
        for block in vit.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
    x = images(vit, 6)
    model = AViT(vit, mode=mode).eval()
    tokens = model.embed(x)
    model.gate_scale.fill_(2 / tokens[..., 0].std())
    model.gate_center.fill_(0)
    _, out = read(model, x)
    first = model.prefix if family == "registers, mean pooling" else 0  # registers are not read
    torch.testing.assert_close(out[:, first:], tokens[:, first : out.shape[1]], **CLOSE)

    found = model(x, with_halting=True)[1]
    h = (tokens[..., 0] * model.gate_scale).sigmoid()  # the same after every block
    depth = ((1 - model.eps) / h).ceil().clamp(max=6)
    assert len(depth.unique()) >= 4
    assert torch.equal(found.running.sum(dim=0), depth.long())
    torch.testing.assert_close(found.ponder, depth + 1 - (depth - 1) * h, **CLOSE)


def test_a_sum_of_exactly_one_minus_eps_halts():
    quarter = torch.tensor([0.25], dtype=torch.float64)
    assert halt(quarter, 2 * quarter, 0.25)[1].all()
    assert not halt(quarter, 2 * quarter, 0.125)[1].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_a_sum_of_exactly_one_minus_eps_halts_in_the_model(family, mode, monkeypatch):
    model = AViT(make(family, depth=5), eps=0.25, mode=mode).eval()
    quarter = -math.log(3)
    assert torch.full((60,), quarter, dtype=torch.float64).sigmoid().unique().tolist() == [0.25]
    monkeypatch.setattr(model, "gate", lambda x: x.new_full(x.shape[:-1], quarter))
    x = images(model.vit)
    assert (model.trace(x).depth == 3).all()
    assert (model(x, with_halting=True)[1].ponder == 3.5).all()  # three blocks, and 1 - 0.25 - 0.25 left for the last


@pytest.mark.parametrize("family", FAMILIES)
def test_ponder_is_depth_plus_what_was_left(family):
    model = avit(family)
    found = model(images(model.vit, 6), with_halting=True)[1]
    depth = found.running.sum(dim=0)
    last = torch.arange(3)[:, None, None] == depth - 1
    left = 1 - (found.gates.sigmoid() * (found.running & ~last)).sum(
        dim=0
    )  # what its scores before the block in which it halted left of one
    torch.testing.assert_close(found.ponder - depth, left, **CLOSE)
    assert (left > model.eps).all() and (left <= 1).all()
    assert (left[depth == 1] == 1).all() and (left < 1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_who_has_halted_never_returns(family):
    model = avit(family, depth=6)
    running = model(images(model.vit, 6), with_halting=True)[1].running
    assert running[0].all() and (running[1:] <= running[:-1]).all()
    assert running.flatten(1).sum(dim=1).unique().numel() > 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_infinite_centre_is_the_dense_model(family, mode):
    vit = make(family)
    x = images(vit)
    model = AViT(vit, 5, math.inf, mode=mode).eval()
    torch.testing.assert_close(model(x), vit(x), **CLOSE)
    assert (model.trace(x).depth == 3).all()
    assert (model(x, with_halting=True)[1].ponder == 4).all()  # the last block halts all; nothing was used up before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_centre_of_minus_infinity_is_one_block(family, mode):
    vit = make(family)
    x = images(vit)
    model = AViT(vit, 5, -math.inf, mode=mode).eval()
    trace = model.trace(x)
    assert (trace.depth == 1).all()
    assert [[len(ids) for ids in block] for block in trace.kept] == [[16] * 3, [0] * 3, [0] * 3]
    torch.testing.assert_close(model(x), vit.forward_head(vit.norm(vit.blocks[0](model.embed(x)))), **CLOSE)
    assert (model(x, with_halting=True)[1].ponder == 2).all()
    if mode == "gather":
        assert fed(model, x)["mlp.fc1"] == [3 * model.embed(x).shape[1], 0, 0]


@pytest.mark.parametrize("family", CLASS_TOKEN)
def test_an_image_leaves_with_its_class_token(family):
    depth_of_class = expected(family).running[:, :, 0].sum(dim=0)
    alone = expected(family).running.sum(dim=0)[:, make(family).num_prefix_tokens :]
    for mode in MODES:
        model = avit(family, mode)
        depth = model.trace(images(model.vit, 6)).depth
        assert torch.equal(depth, alone.minimum(depth_of_class[:, None]))
    if family != "norm before blocks":  # there class tokens go on the longest
        assert (alone > depth_of_class[:, None]).any(), "some patches would have gone on"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CLASS_TOKEN)))
def test_with_pooling_an_image_runs_until_its_last_patch(family):
    alone = expected(family).running.sum(dim=0)[:, make(family).num_prefix_tokens :]
    for mode in MODES:
        model = avit(family, mode)
        assert torch.equal(model.trace(images(model.vit, 6)).depth, alone)


@pytest.mark.parametrize("vit", [("registers, mean pooling", {}), ("registers, mean pooling", {"global_pool": "max"}),
                                 ("registers, mean pooling", {"pool_include_prefix": True}),
                                 ("vit", {"global_pool": ""}), ("registers", {"global_pool": ""}),
                                 ("attention pooling", {"reg_tokens": 2, "pool_include_prefix": True})])  # fmt: skip
def test_prefix_tokens_keep_an_image_running_where_the_head_reads_them(vit):
    """Patches halt in block 1, prefix tokens never: mean pooling is through then, a head that reads all is not."""
    family, overrides = vit
    vit = make(family, **overrides)
    with torch.no_grad():
        vit.patch_embed.proj.bias[0] += 200
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                token[..., 0] -= 200
    masked, gathered = (AViT(vit, 1, 0, mode=mode).eval() for mode in MODES)
    x, prefix = images(vit, 4), vit.num_prefix_tokens
    wanted = reference(masked, x)
    depth = wanted.running.sum(dim=0)
    assert (depth[:, :prefix] == 3).all() and (depth[:, prefix:] == 1).all()
    later = 4 * prefix if overrides.get("pool_include_prefix") or overrides.get("global_pool") == "" else 0
    assert fed(gathered, x)["mlp.fc1"] == [4 * (prefix + 16), later, later]
    for model in (masked, gathered):
        torch.testing.assert_close(model(x), wanted.logits, **CLOSE)
        trace = model.trace(x)
        torch.testing.assert_close(trace.logits, wanted.logits, **CLOSE)
        assert (trace.depth == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_halted_tokens_are_not_seen(mode):
    """Where a patch that halts in block 1 is changed behind its gate's back, block 2 and the logits do not notice."""
    model = avit("vit", mode)
    x = images(model.vit, 6)
    running = expected("vit").running
    halted = (running[0] & ~running[1] & running[1, :, :1])[0].nonzero()[:, 0]
    assert len(halted)
    before = model(x)

    def spoil(_block, _inputs, output):
        output = output.view(6, -1, 48).clone()  # all tokens of all images run in block 1, in both modes
        output[0, halted, 1:] += 100  # not the channel of the gate
        return output.view(*shape)

    shape = (6, 17, 48) if mode == "mask" else (1, 6 * 17, 48)
    handle = model.vit.blocks[0].drop_path2.register_forward_hook(spoil)  # the last step before the residual sum
    after = model(x)
    handle.remove()
    torch.testing.assert_close(after, before, **CLOSE)


def test_every_query_has_a_key(monkeypatch):
    """Where all of an image has halted too: what a softmax over nothing is depends on kernel and version."""
    attend, masks = blocks.attend, []

    def watched(attn, q, k, v, bias=None):
        masks.append(bias)
        return attend(attn, q, k, v, bias)

    monkeypatch.setattr(blocks, "attend", watched)
    AViT(make("vit"), 5, -math.inf)(images(make("vit")))
    model = avit("no class token")
    model(images(model.vit, 6))
    assert len(masks) == 6 and all(mask.any(dim=-1).all() for mask in masks)


# --- the two modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_gather_equals_mask(family, batch):
    masked, gathered = avit(family), avit(family, "gather")
    x = images(masked.vit, batch, seed=4)
    one, other = masked.trace(x), gathered.trace(x)
    torch.testing.assert_close(other.logits, one.logits, **CLOSE)
    assert torch.equal(other.depth, one.depth)
    assert all(
        torch.equal(mine, theirs)
        for block, twin in zip(one.kept, other.kept, strict=True)
        for mine, theirs in zip(block, twin, strict=True)
    )
    assert batch == 1 or len(one.depth.unique()) > 1
    one, other = masked.float().trace(x.float()), gathered.float().trace(x.float())
    torch.testing.assert_close(other.logits, one.logits, rtol=0, atol=1e-5)
    assert torch.equal(other.depth, one.depth)


@pytest.mark.parametrize("mode", MODES)
def test_distilled_models_halt_as_others_do(mode):
    vit = make("distilled")
    x, model = images(vit, 5), AViT(vit, 2, 1, mode=mode).eval()
    torch.testing.assert_close(AViT(vit, 5, math.inf, mode=mode).eval()(x), vit(x), **CLOSE)
    torch.testing.assert_close(model(x), AViT(vit, 2, 1, mode="mask").eval()(x), **CLOSE)
    assert (model(x) - vit(x)).abs().max() > 1e-4 and len(model.trace(x).depth.unique()) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_does_not_depend_on_its_batch(family, mode):
    model = avit(family, mode)
    x, others = images(model.vit, 6), images(model.vit, 5, seed=9)
    whole, order = model.trace(x), torch.tensor([4, 0, 5, 2, 1, 3])
    alone = [model.trace(image) for image in x.split(1)]
    torch.testing.assert_close(torch.cat([trace.logits for trace in alone]), whole.logits, **CLOSE)
    assert torch.equal(torch.cat([trace.depth for trace in alone]), whole.depth)
    for batch, mine in ((x[order], order.argsort()), (torch.cat([others[:2], x, others[2:]]), slice(2, 8))):
        trace = model.trace(batch)
        torch.testing.assert_close(trace.logits[mine], whole.logits, **CLOSE)
        assert torch.equal(trace.depth[mine], whole.depth)


@pytest.mark.parametrize("family", FAMILIES)
def test_gather_feeds_running_tokens_alone(family):
    """All of the batch in one tensor without padding, nothing of images that have left."""
    model = avit(family, "gather")
    x = images(model.vit, 6)
    assert (expected(family).entered < expected(family).running).any() == (
        family in LEAVING and family != "norm before blocks"  # there class tokens go on the longest
    )
    counts = expected(family).entered.sum(dim=(1, 2)).tolist()
    assert set(map(tuple, fed(model, x).values())) == {tuple(counts)}
    assert counts[2] < counts[1] < counts[0]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "attention pooling"])
def test_macs_of_gather_follow_the_closed_form(family):
    model = avit(family, "gather")
    x = images(model.vit, 6)
    vit, tokens = model.vit, expected(family).entered.sum(dim=2)
    size = vit.patch_embed.patch_size[0]
    per_image = [
        evaluate.vit_macs(
            tokens=counts,
            dim=48,
            attn_dims=[48] * 3,
            hidden_dims=[block.mlp.fc1.out_features for block in vit.blocks],
            embed_patches=16,
            patch_dim=3 * size * size,
            num_classes=7,
        )
        for counts in tokens.T.tolist()
    ]
    assert evaluate.macs(model, x)["macs_g"] * 1e9 == pytest.approx(sum(per_image) / 6, rel=1e-12)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * sum(per_image), "nor does a batch cost more than its images"
    model.mode = "mask"
    dense = evaluate.closed_form_macs(vit)
    assert evaluate.macs(model, x)["macs_g"] * 1e9 == pytest.approx(dense, rel=1e-12) and dense > max(per_image)


@pytest.mark.parametrize("attend", [module._attend_by_count, module._attend_padded, module.attend_packed])
@pytest.mark.parametrize("counts", [[3, 1, 5, 5, 2, 1, 1, 7], [1, 1, 2, 2, 9], [4, 4, 4], [6], [1]])
def test_packed_attention_is_attention_within_each_image(attend, counts):
    attn = make("vit").blocks[0].attn
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 3, sum(counts), 16, generator=generator, dtype=torch.float64)
    parts = zip(*(t.split(counts, dim=2) for t in (q, k, v)), strict=True)
    plain = [(q * 16**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v for q, k, v in parts]
    torch.testing.assert_close(attend(attn, q, k, v, counts), torch.cat(plain, dim=2), **CLOSE)


@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_gather_with_padded_attention_equals_mask(family, monkeypatch):
    """What runs on a GPU, run here."""
    monkeypatch.setattr(module, "attend_packed", module._attend_padded)
    model = avit(family, "gather")
    torch.testing.assert_close(model(images(model.vit, 6)), expected(family).logits, **CLOSE)


@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_gradients_of_both_modes_are_equal(family):
    """In evaluation mode gathering has gradients too, as saliency maps need them."""
    grads = []
    for mode in MODES:
        model = avit(family, mode)
        x = images(model.vit, 6).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)
    assert grads[0].flatten(1).abs().sum(dim=1).min() > 0


# --- training -------------------------------------------------------------------------------------------------------


def test_training_masks_and_ponders_over_all_tokens():
    model = avit("vit", "gather", proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2).train()
    x = images(model.vit, 6)
    assert fed(model, x)["mlp.fc1"] == [6 * 17] * 3
    logits, found = model(x, with_halting=True)
    assert found.ponder.shape == (6, 17) and found.running.shape == found.gates.shape == (3, 6, 17)
    depth = found.running.sum(dim=0)
    assert (found.ponder > depth).all() and (found.ponder <= depth + 1).all() and len(depth.unique()) > 1
    (logits.square().sum() + found.ponder.mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["vit", "registers, mean pooling"])
def test_training_and_evaluation_are_one_function(family):
    model = avit(family, "gather").train()
    torch.testing.assert_close(model(images(model.vit, 6)), expected(family).logits, **CLOSE)


@pytest.mark.parametrize("family", ["vit", "layerscale", "no class token"])
def test_gradient_checkpointing_changes_nothing(family):
    grads = []
    for checkpointing in (False, True):
        model = avit(family).train()
        model.vit.set_grad_checkpointing(checkpointing)
        logits, found = model(images(model.vit, 6), with_halting=True)
        (logits.square().sum() + found.ponder.sum() + found.gates.sigmoid().sum()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-11)


def test_a_learnt_gate_gets_gradients_and_no_weight_decay():
    model = AViT(make("registers"), 2, 1, learn_gate=True).train()
    logits, found = model(images(model.vit), with_halting=True)
    (logits.square().sum() + found.ponder.mean()).backward()
    assert model.gate_log_factors.grad.isfinite().all() and (model.gate_log_factors.grad != 0).all()
    assert model.no_weight_decay() == {f"vit.{name}" for name in model.vit.no_weight_decay()} | {"gate_log_factors"}


def test_a_learnt_gate_starts_as_the_fixed_one_and_multiplies_it():
    x = images(make("vit"))
    learnt = AViT(make("vit"), 2, 1, learn_gate=True).eval()
    assert torch.equal(learnt(x), AViT(make("vit"), 2, 1).eval()(x))
    with torch.no_grad():
        learnt.gate_log_factors.copy_(torch.tensor([3.0, 0.5], dtype=torch.float64).log())
    torch.testing.assert_close(learnt(x), AViT(make("vit"), 6, 0.5).eval()(x), **CLOSE)


def test_halting_looks_in_evaluation_mode_and_by_parts():
    model = AViT(make("registers"), 5, 5).train()
    x = images(model.vit, 5)
    found = model.halting(x, batch_size=2)
    assert model.training and not found.ponder.requires_grad
    whole = model.eval()(x, with_halting=True)[1]
    for name in ("ponder", "gates", "running"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), **CLOSE)
    assert found.prefix == whole.prefix == 5


def test_an_unknown_mode_is_refused_at_any_time():
    model = AViT(make("vit"))
    with pytest.raises(ValueError, match="mode is 'drop': expected 'mask' or 'gather'"):
        model.mode = "drop"
    assert model.mode == "mask"


def test_the_other_mode_shares_the_weights_and_leaves_this_one():
    model = AViT(make("vit"), 5, 5).eval()
    other = model.in_mode("gather")
    assert (model.mode, other.mode) == ("mask", "gather") and other.vit is model.vit


def test_a_fixed_gate_is_saved_but_not_trained():
    model = AViT(make("vit"), 2, 1)
    assert {name for name, _ in model.named_buffers()} == {"gate_scale", "gate_center"}
    assert not any("gate" in name for name, _ in model.named_parameters())
    assert {"gate_scale", "gate_center"} <= set(model.state_dict())
    names = {f"vit.{name}" for name, _ in model.vit.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names, "no new parameters"


# --- trace ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_trace_is_ascending_adds_up_and_restores_the_mode(mode):
    model = avit("registers", mode, proj_drop_rate=0.5)
    x = images(model.vit, 6)
    model.train()
    trace = model.trace(x)
    assert model.training and model.vit.training and model.vit.blocks[0].mlp.drop1.training
    torch.testing.assert_close(trace.logits, expected("registers").logits, **CLOSE)  # nothing was dropped
    assert [len(block) for block in trace.kept] == [6] * 3
    counted = torch.zeros(6, 16, dtype=torch.long)
    for block in trace.kept:
        for image, ids in enumerate(block):
            assert ids.tolist() == sorted(set(ids.tolist()))
            counted[image, ids] += 1
    assert torch.equal(counted, trace.depth) and len(counted.unique()) > 1
    model.eval().trace(x)
    assert not model.training


@pytest.mark.parametrize("mode", MODES)
def test_trace_of_a_frozen_model_is_on_the_full_grid(mode):
    vit = make("vit")
    kept = [0, 2, 3, 5, 8, 9, 11, 14]
    model = AViT(FixedPatches(vit, kept).vit, 2, 1, mode=mode).eval()
    x = images(vit, 6)
    wanted, trace = reference(model, x), model.trace(x)
    torch.testing.assert_close(trace.logits, wanted.logits, **CLOSE)
    depth = torch.zeros(6, 16, dtype=torch.long)
    depth[:, kept] = wanted.entered[:, :, 1:].sum(dim=0)
    assert torch.equal(trace.depth, depth) and len(depth[:, kept].unique()) == 3
    for block in trace.kept:
        assert all(set(ids.tolist()) <= set(kept) for ids in block)
    assert trace.kept[0][0].tolist() == kept


# --- in use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_gate", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_saves_and_loads(vit, mode, learn_gate, tmp_path):
    model = AViT(vit, 8, 2, eps=0.05, learn_gate=learn_gate, mode=mode).eval()
    with torch.no_grad():
        model.gate_scale.fill_(6)
        model.gate_center.fill_(-1)
        if learn_gate:
            model.gate_log_factors.copy_(torch.tensor([0.1, -0.2]))
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    twin = models.load(models.save(model, tmp_path / "model"))
    assert torch.equal(twin(x), model(x)) and torch.equal(twin.trace(x).depth, model.trace(x).depth)
    assert (twin.mode, twin.eps, twin.learn_gate) == (mode, 0.05, learn_gate)
    assert twin.gate_scale == 6 and twin.gate_center == -1
    assert hasattr(twin, "gate_log_factors") == learn_gate
    assert twin.arguments == model.arguments
    unlike = AViT(copy.deepcopy(vit), 8, 2, eps=0.05, mode=mode).eval()
    assert not torch.allclose(unlike(x), model(x)), "the gate matters here"


@pytest.mark.parametrize("mode", MODES)
def test_pickles(mode):
    model = avit("vit", mode)
    x = images(model.vit, 6)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_mask_compiles_and_exports():
    model = avit("vit").float()
    x = images(model.vit, 6).float()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_in_inference_mode_and_bfloat16(family, mode):
    model = avit(family, mode)
    x = images(model.vit, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected(family).logits, **CLOSE)
    classes = expected(family).logits.shape[1]
    model, x = model.float(), x.float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        automatic = model(x)
    model = model.bfloat16()
    half = model(x.bfloat16())
    assert automatic.shape == half.shape == (6, classes)
    assert automatic.isfinite().all() and half.isfinite().all() and half.dtype == torch.bfloat16
    _, found = model(x.bfloat16(), with_halting=True)
    assert found.ponder.dtype == torch.float32, "a sum against 0.99 needs more than eight bits"
    assert found.running[0].all() and found.ponder.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gate_scale": 0}, "gate_scale is 0"), ({"gate_scale": -1}, "gate_scale is -1"),
     ({"gate_scale": math.nan}, "gate_scale is nan"), ({"gate_scale": math.inf}, "gate_scale is inf"),
     ({"gate_center": math.nan}, "gate_center is nan"), ({"eps": 0}, "eps is 0"), ({"eps": 1}, "eps is 1"),
     ({"eps": math.nan}, "eps is nan"), ({"mode": "drop"}, "mode is 'drop': expected 'mask' or 'gather'")],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        AViT(make("vit"), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["swin_tiny_patch4_window7_224", "vit_base_patch16_rpn_224", "resnet18"])
def test_unsupported_models_are_refused_by_name(arch):
    with torch.device("meta"):
        model = timm.create_model(arch)
    with pytest.raises(blocks.UnsupportedBlock, match=r"[\w.]+ .*expected"):
        AViT(model)
