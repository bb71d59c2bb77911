"""open_clip's visual towers seen as ViTs: their own forward to the last digits, and timm's with the same weights."""

import copy

import pytest
import timm
import torch
from families import by_onnx
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from lib import blocks, costs, evaluate
from lib.pruners.anchors import Anchors
from lib.pruners.avit import AViT
from lib.pruners.baselines import DROPPING, ToMe
from lib.pruners.dropping import predicted_macs, reaching
from lib.pruners.tokens import FixedPatches, TokenPruner
from lib.pruners.ucb import UCB
from lib.pruners.ward import Ward
from lib.towers import Tower, is_tower
from lib.training_free import MERGING

transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")

CLOSE = {"rtol": 0, "atol": 1e-12}
TOWERS = {
    "plain": {},
    "quickgelu": {"act_layer": transformer.QuickGELU},
    "layerscale": {"ls_init_value": 0.1},
    "no norm first": {"no_ln_pre": True},
    "mean pooling": {"pool_type": "avg"},
    "norm after pooling": {"final_ln_after_pool": True},
    "attention pooling": {"attentional_pool": True, "attn_pooler_heads": 1, "attn_pooler_queries": 4},
    "all tokens too": {"output_tokens": True, "act_layer": transformer.QuickGELU},
}
METHODS = {
    **{name: lambda tower, make=make: make(tower, 0.6) for name, make in DROPPING.items()},
    "tome": lambda tower: ToMe(tower, [5, 3, 2]),
    "ward": lambda tower: Ward(tower, [5, 3, 2]),
    "anchors": lambda tower: Anchors(tower, 3, 4),
}
MILD = {
    "none": TokenPruner,
    **{name: lambda tower, make=make: make(tower, 1.0) for name, make in DROPPING.items()},
    "tome": lambda tower: ToMe(tower, 0),
    "ward": lambda tower: Ward(tower, 0),
    "anchors": lambda tower: Anchors(tower, 8, 8),
}
both_layouts = pytest.mark.parametrize("batch_first", [True, False], ids=["NLD", "LND"])
every_tower = pytest.mark.parametrize("name", TOWERS)


def make(name="quickgelu", batch_first=True, **overrides):
    """A three-block float64 tower in evaluation mode; biases and scales are random and not zero.

    Heads are even in number: torch takes the fast path of attention, that is not counted, for no others."""
    settings = {"image_size": 64, "patch_size": 16, "width": 48, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    settings |= {"output_dim": 7, **TOWERS[name], **overrides}
    visual = transformer.VisionTransformer(**settings)
    if not batch_first:  # as open_clip's towers were made until 2.24
        own = {key: settings[key] for key in ("ls_init_value", "act_layer") if key in settings}
        visual.transformer = transformer.Transformer(48, 3, 4, 4.0, batch_first=False, **own)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return visual.double().eval()


def images(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 64, 64, generator=generator, dtype=torch.float64)


def features(visual, x):
    found = visual(x)
    return found[0] if isinstance(found, tuple) else found


def own_block(visual, index, x):
    """A block by open_clip's own forward, in the tower's own layout."""
    if visual.transformer.batch_first:
        return visual.transformer.resblocks[index](x)
    return visual.transformer.resblocks[index](x.transpose(0, 1)).transpose(0, 1)


def tokens(batch=2, number=9):
    return torch.randn(batch, number, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@every_tower
def test_tokens_that_are_equal_merge_without_a_trace(name):
    visual = make(name)
    with torch.no_grad():
        visual.positional_embedding[1:] = visual.positional_embedding[1]
    x = torch.full((1, 3, 64, 64), 0.7, dtype=torch.float64)
    pruner = ToMe(visual, [5, 3, 2])
    assert [len(ids.unique()) for ids in pruner.sources(x)] == [11, 8, 6]
    torch.testing.assert_close(pruner(x), features(visual, x), **CLOSE)


@both_layouts
@every_tower
def test_steps_of_a_block_are_the_block(name, batch_first):
    visual = make(name, batch_first)
    for index, view in enumerate(Tower(visual).blocks):
        expected = own_block(visual, index, tokens())
        torch.testing.assert_close(view(tokens()), expected, **CLOSE)
        x, fed, q, k = blocks.attended(view, tokens())
        torch.testing.assert_close(blocks.add_mlp(view, x), expected, **CLOSE)
        attn = visual.transformer.resblocks[index].attn
        fed = visual.transformer.resblocks[index].ln_1(tokens())
        other = fed if batch_first else fed.transpose(0, 1)
        _, weights = attn(other, other, other, need_weights=True, average_attn_weights=False)
        torch.testing.assert_close(blocks.probabilities(view.attn, q, k), weights, **CLOSE)


@both_layouts
@every_tower
def test_wrapped_equals_bare(name, batch_first):
    visual = make(name, batch_first)
    expected = features(visual, images())
    torch.testing.assert_close(Tower(visual)(images()), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(TokenPruner(visual)(images()), expected.detach(), **CLOSE)


@pytest.mark.filterwarnings("ignore:k_anchors")
@pytest.mark.parametrize("method", MILD)
@both_layouts
@every_tower
def test_dropping_nothing_equals_bare(name, batch_first, method):
    visual = make(name, batch_first)
    pruner = MILD[method](visual)
    torch.testing.assert_close(pruner(images()), features(visual, images()), **CLOSE)
    trace = pruner.trace(images())
    assert (trace.depth == 3).all() and all(torch.equal(ids, torch.arange(16).expand(3, -1)) for ids in trace.kept)


@pytest.mark.parametrize("method", METHODS)
@both_layouts
@pytest.mark.parametrize("name", ["plain", "quickgelu"])
def test_methods_do_what_they_do_on_timms_vit(name, batch_first, method):
    visual = make(name, batch_first)
    arch = "vit_base_patch32_clip_quickgelu_224" if name == "quickgelu" else "vit_base_patch32_clip_224"
    vit = timm.create_model(arch, img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4, num_classes=7)
    vit = vit.double().eval()
    vit.load_state_dict(
        checkpoint_filter_fn({f"visual.{key}": value for key, value in visual.state_dict().items()}, vit)
    )
    torch.testing.assert_close(visual(images()), vit(images()), rtol=0, atol=1e-11)
    ours, theirs = METHODS[method](visual), METHODS[method](vit)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=1e-11)
    assert (ours(images()) - visual(images())).abs().max() > 1e-3
    found, expected = ours.trace(images()), theirs.trace(images())
    for one, two in zip(found.kept, expected.kept, strict=True):
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in two]
    assert torch.equal(found.depth, expected.depth) and ours.counts() == theirs.counts()
    if method in MERGING:
        assert all(torch.equal(*pair) for pair in zip(ours.sources(images()), theirs.sources(images()), strict=True))
    if method == "anchors":
        assert torch.equal(ours.anchors(images()), theirs.anchors(images()))


@pytest.mark.parametrize("method", METHODS)
@both_layouts
def test_batch_equals_single(batch_first, method):
    pruner = METHODS[method](make(batch_first=batch_first))
    batch, single = pruner(images(5)), torch.cat([pruner(each) for each in images(5).split(1)])
    first = 1 if method == "random" else 5
    torch.testing.assert_close(batch[:first], single[:first], rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@both_layouts
def test_counts_are_the_tokens_that_run(batch_first, method):
    visual = make(batch_first=batch_first)
    pruner, seen = METHODS[method](visual), {"ln_1": [], "mlp": []}
    for block in visual.transformer.resblocks:
        for part, found in seen.items():
            hook = lambda _, x, found=found: found.append(x[0].numel() // (48 * 3))  # noqa: E731
            getattr(block, part).register_forward_pre_hook(hook)
    pruner(images())
    assert (seen["ln_1"], seen["mlp"]) == pruner.counts()


@pytest.mark.parametrize("method", METHODS)
@both_layouts
def test_the_tower_is_bit_identical_after_use(batch_first, method):
    visual = make(batch_first=batch_first)
    before, attributes, expected = copy.deepcopy(visual.state_dict()), {*vars(visual)}, visual(images())
    names = [name for name, _ in visual.named_modules()]
    pruner = METHODS[method](visual).train()
    pruner(images()).sum().backward()
    pruner.trace(images())
    assert pruner.training and visual.training and all(p.grad is not None for p in visual.parameters())
    visual.zero_grad()
    assert torch.equal(visual.eval()(images()), expected)
    assert {*vars(visual)} == attributes and [name for name, _ in visual.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in visual.modules())


@pytest.mark.parametrize("method", METHODS)
def test_state_holds_the_towers_tensors_once(method):
    visual = make()
    pruner = METHODS[method](visual)
    state, own = pruner.state_dict(), visual.state_dict()
    assert {*state} == {f"vit.visual.{key}" for key in own}
    assert all(state[f"vit.visual.{key}"].data_ptr() == value.data_ptr() for key, value in own.items())
    assert len([*pruner.parameters()]) == len([*visual.parameters()])
    assert pruner.no_weight_decay() == {"vit.visual.positional_embedding", "vit.visual.class_embedding"}
    twin = copy.deepcopy(pruner)
    twin.load_state_dict(state)
    assert torch.equal(twin(images()), pruner(images())) and twin.vit.visual is not visual


@pytest.mark.parametrize("fast", [True, False])
@both_layouts
def test_macs_are_the_closed_form_and_the_switch_stays(batch_first, fast):
    visual, before = make(batch_first=batch_first), torch.backends.mha.get_fastpath_enabled()
    d, n = 48, 17
    expected = 3 * (12 * n * d * d + 2 * n * n * d) + 16 * 3 * 16 * 16 * d + 7 * d
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        assert costs.closed_form_macs(Tower(visual)) == expected
        for model in (visual, Tower(visual), TokenPruner(visual), DROPPING["topk"](visual, 1.0), ToMe(visual, 0)):
            for counted in (evaluate.macs(model, (3, 64, 64)), evaluate.macs(model, images(2))):
                assert round(counted["macs_g"] * 1e9) == expected
        with pytest.raises(ValueError, match="can't be counted from a shape"):
            evaluate.macs(nn.Sequential(visual, Undecided()), (3, 64, 64))
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert not visual.training
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize("method", METHODS)
def test_predicted_macs_are_those_counted(method):
    with torch.device("meta"):
        visual = transformer.VisionTransformer(224, 32, 768, 4, 12, 4.0, act_layer=transformer.QuickGELU).eval()
    pruner = MERGING[method](visual, 6) if method in MERGING else METHODS[method](visual)
    if method == "anchors":
        pruner = Anchors(visual, 5, 0.4)
    assert predicted_macs(pruner) == pytest.approx(evaluate.macs(pruner, (3, 224, 224))["macs_g"], rel=0.02)
    assert predicted_macs(pruner) < evaluate.macs(visual, (3, 224, 224))["macs_g"]


def test_views_are_made_once_and_go_with_a_copy():
    one = Tower(make())
    assert one.blocks is one.blocks and not any("blocks" in name and "visual" not in name for name in one.state_dict())
    other = copy.deepcopy(one)
    for parameter in other.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    assert other.blocks[0].norm1 is other.visual.transformer.resblocks[0].ln_1
    assert one.blocks[0].norm1 is one.visual.transformer.resblocks[0].ln_1 is not other.blocks[0].norm1


def test_reaching_works_on_towers():
    visual = make()
    dense = evaluate.macs(visual, (3, 64, 64))["macs_g"]
    found = reaching(lambda strength: DROPPING["evit"](visual, 1 - strength), 0.7 * dense, most=0.95)
    assert predicted_macs(found) <= 0.7 * dense < dense


def test_other_blocks_and_patch_dropout_are_refused_by_name():
    match = r"resblocks\.0 is a open_clip\.transformer\.CustomResidualAttentionBlock: expected open_clip's Residual"
    for settings in ({"block_type": "custom"}, {"qk_norm": True}, {"scale_fc": True}):
        with pytest.raises(blocks.UnsupportedBlock, match=match):
            TokenPruner(make("plain", **settings))
    with pytest.raises(blocks.UnsupportedBlock, match=r"open_clip\.transformer\.PatchDropout drops patches at random"):
        TokenPruner(make("plain", patch_dropout=0.5))


def test_other_attention_is_refused_by_name():
    class Other(nn.MultiheadAttention):
        pass

    expected = "expected plain nn.MultiheadAttention"
    for attn in (Other(48, 4), nn.MultiheadAttention(48, 4, kdim=24), nn.MultiheadAttention(48, 4, add_bias_kv=True)):
        visual = make("plain")
        visual.transformer.resblocks[1].attn = attn
        with pytest.raises(blocks.UnsupportedBlock, match=rf"resblocks\.1\.attn is a .*Attention: {expected}|Other: "):
            TokenPruner(visual)


def test_other_towers_are_refused_by_name():
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    trunk = TimmModel("vit_tiny_patch16_224", embed_dim=8, pool="", proj="linear")
    assert not is_tower(trunk) and not is_tower(trunk.trunk) and is_tower(make())
    with torch.device("meta"):
        resnet = ModifiedResNet([1, 1, 1, 1], 8, 2)
    for tower, found in ((trunk, "timm_model.TimmModel"), (resnet, "modified_resnet.ModifiedResNet")):
        with pytest.raises(blocks.UnsupportedBlock, match=f"open_clip.{found} is not supported: expected"):
            TokenPruner(tower)
        with pytest.raises(blocks.UnsupportedBlock, match=f"open_clip.{found} is not supported: expected open_clip's"):
            Tower(tower)
    assert TokenPruner(trunk.trunk).patches == 196


def test_attention_dropout_follows_the_towers_mode():
    visual = make()
    for block in visual.transformer.resblocks:
        block.attn.dropout = 0.5
    pruner = DROPPING["topk"](visual, 0.9)
    assert torch.equal(pruner(images()), pruner(images()))
    pruner.train()
    assert not torch.equal(pruner(images()), pruner(images()))


def test_saved_towers_are_refused_in_one_line(tmp_path):
    from lib import models

    with pytest.raises(models.ModelError, match="^cannot describe a Tower: make models by lib.models.create$"):
        models.save(DROPPING["topk"](make()), tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["topk", "tome", "ward", "anchors"])
def test_exports(method):
    pruner = METHODS[method](make()).float()
    x = images(2).float()
    torch.testing.assert_close(torch.export.export(pruner, (x,)).module()(x), pruner(x))


@pytest.mark.parametrize("method", ["topk", "tome", "anchors"])
def test_exports_to_onnx(method, tmp_path):
    pruner = METHODS[method](make()).float().eval()
    x = images(2).float()
    torch.testing.assert_close(by_onnx(pruner, x, tmp_path), pruner(x), rtol=0, atol=1e-5)
    assert (pruner(x) - pruner.vit.visual(x)).abs().max() > 1e-4, "something was pruned"


@pytest.mark.parametrize("method", [lambda tower: UCB(tower, 0.5), AViT, lambda tower: FixedPatches(tower, [0, 1])])
def test_methods_for_timm_models_refuse_towers_by_name(method):
    with pytest.raises(blocks.UnsupportedBlock, match=r"open_clip\.transformer\.VisionTransformer is not supported"):
        method(make("plain"))


def test_zero_attention_and_features_per_token_are_refused():
    tower = make("plain")
    tower.transformer.resblocks[1].attn.add_zero_attn = True
    with pytest.raises(blocks.UnsupportedBlock, match=r"resblocks\.1\.attn .* expected plain nn.MultiheadAttention"):
        Tower(tower)
    tower = make("plain")
    tower.pool_type = "none"
    with pytest.raises(blocks.UnsupportedBlock, match="pools by 'none'"):
        Tower(tower)
