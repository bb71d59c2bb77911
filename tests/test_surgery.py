"""Physical removal: cut out equals multiplied by zero, whatever goes; what is left trains, saves, exports and wraps."""

import copy
import inspect
import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from families import FAMILIES, by_onnx, images, make
from timm.layers import Attention
from torch import Tensor, nn

from lib import blocks, costs, models
from lib.pruners.avit import AViT
from lib.pruners.surgery import Plan, remove
from lib.pruners.tokens import FixedPatches
from lib.pruners.ucb import UCB

CLOSE = {"rtol": 0, "atol": 1e-12}
SLICEABLE = [family for family in FAMILIES if family != "scaled norms"]  # whose heads and neurons are independent
MODELS = [*SLICEABLE, "gated attention", "unfused attention", "no biases"]
ALL, EVEN = None, [*range(0, 192, 2)]
PLANS = {
    "heads": Plan(heads=[[0, 2], ALL, [1]]),
    "neurons": Plan(neurons=[EVEN, [191], ALL]),
    "no heads": Plan(heads=[[], [1, 2], []]),
    "no neurons": Plan(neurons=[[3], [], []]),
    "no attention": Plan(attn=[False, True, False]),
    "no MLP": Plan(mlp=[True, False, False]),
    "no block": Plan(blocks=[True, False, True]),
    "the last block": Plan(blocks=[True, True, False], heads=[[2], [0], [1]]),
    "no block at all": Plan(blocks=[False] * 3),
    "a bit of all": Plan([[1], [0, 2], []], [[], EVEN, [5, 7]], attn=[True, False, True], mlp=[True, True, False]),
}
WHOLE = ["no attention", "no MLP", "no block", "no block at all"]
# For six blocks: some heads and neurons, no heads, no attention, no neurons, no block, no MLP.
MIXED = Plan(
    heads=[[0, 2], [], ALL, [1], ALL, ALL],
    neurons=[EVEN, [0, 5, 9], ALL, [], ALL, ALL],
    attn=[True, True, False, True, True, True],
    blocks=[True, True, True, True, False, True],
    mlp=[True, True, True, True, True, False],
)


def built(name: str, **overrides) -> nn.Module:
    """A model of a family, or of one of the other MODELS."""
    if name in FAMILIES:
        return make(name, **overrides)
    vit = make("vit", **({"qkv_bias": False, "proj_bias": False} if name == "no biases" else {}), **overrides)
    for block in vit.blocks:
        if name == "gated attention":
            if "gated" not in inspect.signature(Attention).parameters:
                pytest.skip("this timm has no gated attention")
            block.attn = Attention(48, 3, qkv_bias=True, gated=True).double().eval()
            randomised(block.attn)
        block.attn.fused_attn = block.attn.fused_attn and name != "unfused attention"
    return vit


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return module


def zeroed(vit: nn.Module, plan: Plan) -> nn.Module:
    """The same in full size: zeros for columns of proj and fc2, of whole sublayers for the bias as well."""
    plan, vit = plan.explicit(vit), copy.deepcopy(vit)
    for index, block in enumerate(vit.blocks):
        for linear, kept, stays in (
            (block.attn.proj, [h * 16 + i for h in plan.heads[index] for i in range(16)], plan.attn[index]),
            (block.mlp.fc2, plan.neurons[index], plan.mlp[index]),
        ):
            open_ = torch.zeros(linear.in_features, dtype=torch.float64).index_fill(0, torch.tensor(kept).long(), 1)
            linear.weight.data *= open_
            if linear.bias is not None and not (stays and plan.blocks[index]):
                linear.bias.data.zero_()
    return vit


def left(vit: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What remains of a model's tensors (weights, gradients), under their names in the pruned model."""
    plan, found = plan.explicit(vit), {}
    places = {str(old): new for new, old in enumerate(i for i, stays in enumerate(plan.blocks) if stays)}
    for key, tensor in tensors.items():
        if not key.startswith("blocks."):
            found[key] = tensor
            continue
        _, index, part, name = key.split(".", 3)
        if index not in places:
            continue
        start, heads, neurons = f"blocks.{places[index]}.{part}", plan.heads[int(index)], plan.neurons[int(index)]
        units = {"attn": heads, "norm1": heads, "mlp": neurons, "norm2": neurons}.get(part, [...])
        if not units and name in ("proj.bias", "fc2.bias") and getattr(plan, part)[int(index)]:
            found[f"{start}.bias"] = tensor
        if units:
            match name.split("."):
                case ["qkv", _]:
                    tensor = tensor.unflatten(0, (3, 3, 16))[:, heads].flatten(0, 2)
                case ["gate", _]:
                    tensor = tensor.unflatten(0, (3, 16))[heads].flatten(0, 1)
                case ["proj", "weight"]:
                    tensor = tensor.unflatten(1, (3, 16))[:, heads].flatten(1)
                case ["fc1", _]:
                    tensor = tensor[neurons]
                case ["fc2", "weight"]:
                    tensor = tensor[:, neurons]
            found[f"{start}.{name}"] = tensor
    return found


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    """Whether two models or state dicts have the same tensors, bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture
def small():
    """A model of which a bit of everything was removed: see MIXED."""
    return remove(make("vit", depth=6), MIXED)


# ---- removed equals zero-gated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_removed_equals_zeroed(model, plan):
    vit, plan = built(model), PLANS[plan]
    x, small = images(vit), remove(vit, plan)
    expected = zeroed(vit, plan)(x)
    torch.testing.assert_close(small(x), expected, **CLOSE)
    assert (vit(x) - expected).abs().max() > 1e-4, "what went mattered"
    assert same(small, left(vit, plan, vit.state_dict()))


@pytest.mark.parametrize("plan", WHOLE)
def test_whole_parts_go_where_heads_and_neurons_cannot(plan):
    vit, plan = make("scaled norms"), PLANS[plan]
    torch.testing.assert_close(remove(vit, plan)(images(vit)), zeroed(vit, plan)(images(vit)), **CLOSE)


@pytest.mark.parametrize("plan, reason", [("heads", "the attention normalises over all heads"),
                                          ("neurons", "the MLP normalises over all neurons")])  # fmt: skip
def test_norms_over_all_heads_or_neurons_are_refused_by_name(plan, reason):
    with pytest.raises(blocks.UnsupportedBlock, match=reason):
        remove(make("scaled norms"), PLANS[plan])


def test_an_mlp_of_another_kind_is_refused_by_name():
    vit = make("vit")
    vit.blocks[1].mlp = nn.Sequential(nn.Linear(48, 48)).double()
    with pytest.raises(blocks.UnsupportedBlock, match=r"Sequential is not supported: expected timm's Mlp"):
        blocks.check_removable(vit.blocks[1], heads=True, neurons=True)
    assert isinstance(remove(vit, Plan(mlp=[True, False, True])).blocks[1].mlp, blocks.Bias), "as a whole it may go"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_what_is_left_are_as_if_zeroed(model, plan):
    vit, plan = built(model), PLANS[plan]
    small, full = remove(vit, plan).train(), zeroed(vit, plan).train()
    for each in (small, full):
        each(images(vit)).square().sum().backward()
    expected = left(vit, plan, {name: parameter.grad for name, parameter in full.named_parameters()})
    found = {name: parameter.grad for name, parameter in small.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():  # tokens' parameters that nothing reads any more have none
        scale = 0 if grad is None else expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12 * max(1, scale), msg=name)


def test_a_sublayer_that_only_adds_its_bias_keeps_its_dropout():
    vit = make("vit", proj_drop_rate=0.5, drop_path_rate=0.3).train()
    for block in vit.blocks:
        block.mlp.drop1.p = 0.0  # it draws a number per neuron: with fewer neurons it draws others
    plan, found = Plan(heads=[[], ALL, [1]], neurons=[ALL, [], [3]]), []
    for each in (remove(vit, plan), zeroed(vit, plan), copy.deepcopy(vit).eval()):
        torch.manual_seed(0)
        found.append(each(images(vit)))
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert not torch.allclose(found[0], found[2]), "dropout was on"


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_masking_the_weights_of_qkv_or_fc1_is_not_removal(kind):
    """Their biases leak, a value's through the softmax, a neuron's through the GELU. Without them it would be."""
    vit = make("vit", depth=1)
    x, plan = images(vit), Plan(heads=[[0]]) if kind == "head" else Plan(neurons=[EVEN])
    expected = remove(vit, plan)(x)
    linear = vit.blocks[0].attn.qkv if kind == "head" else vit.blocks[0].mlp.fc1
    gone = (torch.arange(144) // 16 % 3 > 0) if kind == "head" else (torch.arange(192) % 2 > 0)
    linear.weight.data[gone] = 0
    assert (vit(x) - expected).abs().max() > 1e-2
    linear.bias.data[gone] = 0
    torch.testing.assert_close(vit(x), expected, **CLOSE)


# ---- a copy, and its plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_given_is_left_untouched(training):
    vit = make("vit", depth=6).train(training)
    vit.blocks[0].attn.qkv.weight.requires_grad_(False)
    vit.blocks[1].mlp.fc1.bias.requires_grad_(False)
    before, attributes = copy.deepcopy(vit), {*vars(vit)}
    small = remove(vit, MIXED)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert same(vit, before) and repr(vit) == repr(before) and {*vars(vit)} == attributes
    assert [block.attn.num_heads for block in vit.blocks] == [3] * 6
    assert {module.training for model in (vit, small) for module in model.modules()} == {training}
    frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
    assert frozen == ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias"]


def test_removing_nothing_or_the_same_again_changes_nothing(small):
    x, vit = images(small), make("vit", depth=6)
    for plan in (Plan(), Plan().explicit(small)):
        again = remove(small, plan)
        assert same(again, small) and torch.equal(again(x), small(x)) and repr(again) == repr(small)
        assert same(remove(vit, Plan(**again.config["plan"])), small)
    assert torch.equal(remove(vit, Plan())(x), vit(x)) and same(remove(vit, MIXED.explicit(vit)), small)


def test_heads_alone_means_all_neurons_and_every_block():
    plan = Plan(heads=[[2], ALL, []]).explicit(make("vit"))
    assert plan == Plan([[2], [0, 1, 2], []], [[*range(192)]] * 3, [True] * 3, [True] * 3, [True] * 3)
    assert Plan(heads=[[2, 0], ALL, []]).explicit(make("vit")).heads[0] == [0, 2], "order does not matter"


def test_what_goes_as_a_whole_has_no_units_left():
    plan = Plan(blocks=[True, False, True], attn=[False, True, True], mlp=[True, True, False]).explicit(make("vit"))
    assert [len(heads) for heads in plan.heads] == [0, 0, 3]
    assert [len(neurons) for neurons in plan.neurons] == [192, 0, 0]


FIRST = MIXED
SECOND = Plan(  # for what FIRST leaves: heads 2, 0, 0, 1, 3 and neurons 96, 3, 192, 0, 0
    heads=[[1], [], [], [0], ALL],
    neurons=[[1, 3, 90], [2], ALL, [], []],
    blocks=[True, True, True, False, True],
    attn=[True, False, True, True, False],
)


def test_two_plans_are_one():
    vit = make("vit", depth=6)
    small = remove(vit, FIRST)
    twice, both = remove(small, SECOND), SECOND.explicit(small).after(FIRST.explicit(vit))
    once = remove(vit, both)
    assert same(twice, once) and repr(twice) == repr(once) and torch.equal(twice(images(vit)), once(images(vit)))
    assert models.describe(twice) == models.describe(once)
    assert both.heads == [[2], [], [], [], [], []] and both.blocks == [True, True, True, False, False, True]
    assert both.neurons[:2] == [[2, 6, 180], [9]] and both.attn == [True, False, False, True, False, False]


@pytest.mark.parametrize("plan", [*PLANS.values(), MIXED, MIXED.explicit(make("vit", depth=6)), Plan()])
def test_a_plan_goes_through_json(plan):
    assert Plan.from_json(plan.to_json()) == plan and "\n" not in plan.to_json()
    assert json.loads(plan.to_json()) == asdict(plan)


@pytest.mark.parametrize("text", ["", "heads", "[1]", '{"colour": [1]}', "3"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(
        ValueError, match="this is not the JSON of a plan .*expected an object of heads, neurons, blocks"
    ):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "plan, fault",
    [
        (Plan(heads=[[0], [1]]), "plan: heads has 2 entries, expected one for each of 3 blocks"),
        (Plan(heads=[]), "plan: heads has 0 entries, expected one for each of 3 blocks"),
        (Plan(neurons=[[0]] * 4), "plan: neurons has 4 entries"),
        (Plan(neurons=[]), "plan: neurons has 0 entries"),
        (Plan(blocks=[]), "plan: blocks has 0 entries"),
        (Plan(attn=[True]), "plan: attn has 1 entries"),
        (Plan(mlp=[True] * 4), "plan: mlp has 4 entries"),
        (Plan(heads=[ALL, [3], ALL]), r"plan: heads \[3\] of block 1: expected distinct indices below 3"),
        (Plan(heads=[ALL, ALL, [-1, 2]]), r"plan: heads \[-1, 2\] of block 2: expected distinct indices below 3"),
        (Plan(heads=[[1, 1], ALL, ALL]), r"plan: heads \[1, 1\] of block 0: expected distinct indices below 3"),
        (Plan(neurons=[ALL, [0, 192], ALL]), r"plan: neurons \[0, 192\] of block 1: .* below 192"),
        (Plan(neurons=[ALL, [7, 5, 7], ALL]), r"plan: neurons \[7, 5, 7\] of block 1: .* below 192"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_clear_line(plan, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        remove(make("vit"), plan)
    assert "\n" not in str(caught.value)


def test_a_head_that_was_removed_cannot_be_kept():
    small = remove(make("vit"), Plan(heads=[ALL, [], [0, 2]]))
    for block, below in ((1, 0), (2, 2)):
        with pytest.raises(ValueError, match=rf"heads \[2\] of block {block}: expected distinct indices below {below}"):
            remove(small, Plan(heads=[[2] if index == block else ALL for index in range(3)]))


# ---- what it costs --------------------------------------------------------------------------------------------------


def counted(vit: nn.Module) -> tuple[int, int]:
    """(parameters, MACs), counted."""
    found = costs.macs(vit, (3, *vit.patch_embed.img_size))
    return round(found["params_m"] * 1e6), round(found["macs_g"] * 1e9)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", ["vit", "registers", "no class token", "qk norm", "no biases"])
def test_macs_and_parameters_drop_by_the_closed_form(model, plan):
    vit, plan = built(model).float(), PLANS[plan]
    small, plan = remove(vit, plan), plan.explicit(vit)
    (_, macs), (fewer, less) = counted(vit), counted(small)
    assert less == costs.closed_form_macs(small) and macs == costs.closed_form_macs(vit)
    N = vit.patch_embed.num_patches + vit.num_prefix_tokens
    heads, neurons = 9 - sum(map(len, plan.heads)), 3 * 192 - sum(map(len, plan.neurons))
    assert macs - less == heads * (4 * N * 48 * 16 + 2 * N * N * 16) + neurons * 2 * N * 48
    assert fewer == sum(t.numel() for t in left(vit, plan, dict(vit.named_parameters())).values())


def test_the_model_of_the_brief_in_numbers():
    with torch.device("meta"):
        vit = models.create("vit_tiny_imagenet", 200)
    assert counted(vit) == (18_885_512, 1_244_060_928) and costs.closed_form_macs(vit) == 1_244_060_928
    assert vit.patch_embed.img_size == (64, 64)
    small = remove(
        vit,
        Plan(heads=[[0, 1, 2, 4, 5], ALL, ALL, ALL, ALL, []],
             neurons=[ALL, [*range(100, 1536)], ALL, ALL, ALL, []],
             attn=[True, True, False, True, True, True], blocks=[True, True, True, False, True, True])
    )  # fmt: skip
    # A head: 4 · 576 · 96 weights and 3 · 96 biases. A neuron: 2 · 576 and 1. A norm: 2 · 576.
    head, neuron, norm = 221_472, 1_153, 1_152
    attention, mlp = 6 * head + 576, 1536 * neuron + 576
    gone = (
        head + 100 * neuron + (attention + norm) + (attention + mlp + 2 * norm) + (6 * head + 1536 * neuron + 2 * norm)
    )
    # A head: 4 · 65 · 576 · 96 + 2 · 65 · 65 · 96. A neuron: 2 · 65 · 576.
    spared = 15_188_160 * (1 + 6 + 6 + 6) + 74_880 * (100 + 1536 + 1536)
    assert counted(small) == (18_885_512 - gone, 1_244_060_928 - spared)
    assert counted(small) == (11_012_740, 717_966_528)


# ---- saved, compiled, exported, wrapped, trained --------------------------------------------------------------------


def created() -> nn.Module:
    """A model of models.create, as large as those of `families`."""
    vit = models.create("vit_digits", 3, **TINY | {"depth": 6, "num_heads": 3, "embed_dim": 48}).double().eval()
    return randomised(vit)


@pytest.mark.parametrize("make_model", [created, lambda: make("vit", depth=6)], ids=["created", "timm's own"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_pruned_model_comes_back_bit_for_bit(tmp_path, make_model, times):
    model = make_model()
    for plan in (FIRST, SECOND)[:times]:
        model = remove(model, plan)
    models.save(model, tmp_path / "model", classes=["a"])
    loaded, x = models.load(tmp_path), images(model)
    assert type(loaded) is type(model) and repr(loaded) == repr(model) and same(loaded, model)
    assert torch.equal(loaded(x), model(x)) and models.describe(loaded) == models.describe(model)
    assert [block.attn.num_heads for block in loaded.blocks] == [block.attn.num_heads for block in model.blocks]
    plan = models.header(tmp_path)["model"]["plan"]
    assert same(remove(make_model(), Plan(**plan)), loaded), "the file says what was removed"
    again = remove(loaded, Plan(heads=[[0], *[ALL] * (len(loaded.blocks) - 1)]))
    models.save(again, tmp_path / "again")
    assert same(models.load(tmp_path / "again.safetensors"), again), "a loaded model can be pruned further"


def test_a_model_made_elsewhere_is_pruned_if_not_saved():
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3).eval()
    small = remove(vit, Plan(heads=[[0], []]))
    assert small(images(vit).float()).shape == (3, 3) and not hasattr(small, "config")


def test_wrapped_pruned_models_save_and_load(tmp_path):
    small = remove(created(), MIXED)
    ucb = UCB(small, 0.5).double()
    ucb.ucb_count_scores.uniform_(1, 9)
    for model in (ucb, ucb.freeze(0.4), AViT(small, 5.0, 2.0)):
        models.save(model.eval(), tmp_path / "model")
        loaded, x = models.load(tmp_path), images(small)
        assert type(loaded) is type(model) and same(loaded, model) and torch.equal(loaded(x), model(x))


def test_runs_compiled():
    small = remove(make("vit", depth=6), MIXED).float()
    x = images(small, 2).float()
    torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_exports_to_onnx(tmp_path):
    small = remove(make("vit", depth=6), MIXED).float()
    x = images(small, 2).float()
    torch.testing.assert_close(by_onnx(small, x, tmp_path), small(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_ucb_on_a_pruned_model(small, mode):
    x, full = images(small), UCB(small, 1.0, mode=mode).double()
    torch.testing.assert_close(full.eval()(x), small(x), **CLOSE)
    torch.testing.assert_close(full.train()(x), small(x), **CLOSE)
    ucb = UCB(small, 0.5, beta=0.3, mode=mode).double().train()
    ucb(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ucb.parameters())
    counted = (ucb.ucb_count_scores - 1).sum(dim=-1)
    heads = [block.attn.num_heads for block in small.blocks]
    assert heads == [2, 0, 0, 1, 3]
    for gain, count in zip(counted, heads, strict=True):
        assert (gain > 0.99).all() == (count > 0), "blocks without heads say nothing about patches"


@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_ucb_on_a_pruned_model_masks_what_freeze_leaves_out(family):
    """One set in all blocks that select: hiding the other patches' keys is running the set alone."""
    small = remove(make(family, depth=6), MIXED)
    ucb, kept, x = UCB(small, 0.4, beta=1e6).double().eval(), torch.tensor([0, 3, 5, 6, 10, 15]), images(small)
    ucb.ucb_count_scores.fill_(1.0)
    ucb.ucb_count_scores[:, :, ucb.prefix + kept] = 5.0
    frozen = ucb.freeze(0.4)
    assert frozen.kept.tolist() == kept.tolist()
    ucb.ucb_count_scores.fill_(1e12)
    ucb.ucb_count_scores[:, :, ucb.prefix + kept] = 1.0  # unexplored, so with this beta they win everywhere
    ucb.steps.fill_(1000)
    torch.testing.assert_close(ucb(x), frozen.eval()(x), **CLOSE)
    torch.testing.assert_close(FixedPatches(copy.deepcopy(small), range(16)).eval()(x), small(x), **CLOSE)


@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_avit_on_a_pruned_model_gathers_what_it_masks(family):
    vit = make(family, depth=6)
    small = remove(vit, MIXED)
    scale, center = (2, 1) if family != "vit" else (5, 5)
    models_ = [AViT(small, scale, center, mode=mode).eval() for mode in ("mask", "gather")]
    x = images(small, 6)
    (masked, gathered), traces = (model(x) for model in models_), [model.trace(x) for model in models_]
    torch.testing.assert_close(gathered, masked, **CLOSE)
    assert torch.equal(traces[0].depth, traces[1].depth) and len(traces[0].depth.unique()) > 2, "halting is real"
    models_[0].train()(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pruned_model_trains(small, checkpointing):
    small.train().set_grad_checkpointing(checkpointing)
    x, labels, losses = images(small, 8), torch.arange(8) % 7, []
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    for _ in range(10):
        loss = F.cross_entropy(small(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    still = [name for name, parameter in small.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, "everything that is left learns"
