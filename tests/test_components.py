"""The parts of a ViT and gates on them: a gate multiplies what removal cuts, per image, and leaves nothing behind."""

import copy

import pytest
import torch
from families import FAMILIES, images, make
from test_surgery import ALL, MIXED, MODELS, built
from torch import Tensor, nn

from lib import blocks
from lib.pruners import components
from lib.pruners.components import KINDS, Component
from lib.pruners.surgery import Plan, remove

CLOSE = {"rtol": 0, "atol": 1e-12}
WHOLE = ("block", "attn", "mlp")


def kinds(model: str) -> tuple[str, ...]:
    return WHOLE if model == "scaled norms" else KINDS


def hooks(vit: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vit.modules())


def drawn(vit: nn.Module, which: tuple[str, ...] = KINDS, count: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random gates in [0, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: 2 * torch.rand(gate.shape, generator=generator, dtype=gate.dtype)
            for kind, gate in components.ones(vit, count).items() if kind in which}  # fmt: skip


def by_hand(vit: nn.Module, gate: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits with columns of proj and fc2 and whole sublayers scaled by the gates, block after block."""
    gate, vit = {**components.ones(vit), **gate}, copy.deepcopy(vit)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for index, block in enumerate(vit.blocks):
        attn, mlp = block.attn, block.mlp
        columns = gate["head"][index].repeat_interleave(16)[: getattr(attn, "attn_dim", 0)]
        for sublayer, last, kind, scale in (
            (attn, "proj", "attn", columns),
            (mlp, "fc2", "mlp", gate["neuron"][index][: getattr(getattr(mlp, "fc2", 0), "in_features", 0)]),
        ):
            linear = getattr(sublayer, last, sublayer)  # what only adds its bias is multiplied as a whole
            if linear is not sublayer:
                linear.weight.data *= scale * gate[kind][index]
            if linear.bias is not None:
                linear.bias.data *= gate[kind][index]
        x = x + gate["block"][index] * (block(x) - x)
    return vit.forward_head(vit.norm(x))


# ---- which parts there are ------------------------------------------------------------------------------------------


def test_parts_come_in_the_order_in_which_they_run_larger_before_smaller():
    vit = make("vit", depth=2)
    names = []
    for index in range(2):
        names += [f"block {index}", f"attn {index}", *(f"head {index}.{head}" for head in range(3)), f"mlp {index}"]
        names += [f"neuron {index}.{first}-{first + 63}" for first in (0, 64, 128)]
    assert [str(part) for part in components.of(vit)] == names


@pytest.mark.parametrize("size, groups", [(1, 192), (64, 3), (100, 2), (191, 2), (192, 1), (1000, 1)])
def test_neurons_are_grouped_to_the_last(size, groups):
    found = [part for part in components.of(make("vit"), size, ["neuron"]) if part.block == 1]
    assert len(found) == groups and [unit for part in found for unit in part.units] == [*range(192)]
    assert {len(part.units) for part in found[:-1]} <= {size} and 0 < len(found[-1].units) <= size


def test_a_part_says_what_it_is():
    assert str(Component("head", 3, (1,))) == "head 3.1" and str(Component("mlp", 0)) == "mlp 0"
    assert str(Component("neuron", 2, (64, 65, 66))) == "neuron 2.64-66"
    assert str(components.of(make("vit"), 100, ["neuron"])[1]) == "neuron 0.100-191"
    assert len({*components.of(make("vit"), 1)}) == 3 * (3 + 3 + 192), "parts can be told apart in sets"


@pytest.mark.parametrize("parts", [["head"], ("mlp", "block"), {"neuron", "attn"}, KINDS])
def test_only_the_kinds_asked_for(parts):
    found = components.of(make("vit"), 64, parts)
    assert found == [part for part in components.of(make("vit")) if part.kind in parts]
    assert {part.kind for part in found} == {*parts}


def test_only_what_is_left_of_a_pruned_model():
    small = remove(make("vit", depth=6), MIXED)
    names = [str(part) for part in components.of(small, 48)]
    assert names == [
        *("block 0", "attn 0", "head 0.0", "head 0.1", "mlp 0", "neuron 0.0-47", "neuron 0.48-95"),
        *("block 1", "mlp 1", "neuron 1.0-2"),
        *("block 2", "mlp 2", *(f"neuron 2.{first}-{first + 47}" for first in range(0, 192, 48))),
        *("block 3", "attn 3", "head 3.0"),
        *("block 4", "attn 4", "head 4.0", "head 4.1", "head 4.2"),
    ]
    ones, there = components.ones(small), components.exist(small)
    assert {kind: tuple(gate.shape) for kind, gate in ones.items()} == {
        "block": (5,), "attn": (5,), "mlp": (5,), "head": (5, 3), "neuron": (5, 192)}  # fmt: skip
    assert there["head"].sum(dim=1).tolist() == [2, 0, 0, 1, 3] and there["head"][0].tolist() == [True, True, False]
    assert there["neuron"].sum(dim=1).tolist() == [96, 3, 192, 0, 0] and there["block"].all()
    assert there["attn"].tolist() == [True, False, False, True, True]
    assert there["mlp"].tolist() == [True, True, True, False, False]


def test_what_cannot_be_removed_does_not_exist():
    vit = make("scaled norms")
    assert {kind: bool(there.any()) for kind, there in components.exist(vit).items()} == {
        kind: kind in WHOLE for kind in KINDS
    }
    assert len(components.of(vit, parts=WHOLE)) == 9
    for kind, norm in (("head", "attention normalises over all heads"), ("neuron", "MLP normalises over all neurons")):
        with pytest.raises(blocks.UnsupportedBlock, match=norm):
            components.of(vit, parts=[kind])


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ({"parts": ["head", "layer"]}, r"parts are \['layer'\]: expected some of block, attn, head, mlp, neuron"),
        ({"parts": []}, r"parts are \(\): expected some of block, attn, head, mlp, neuron"),
        ({"parts": "head"}, r"parts are \['a', 'd', 'e', 'h'\]: expected some of block"),
        ({"group_size": 0}, "group_size is 0: expected a number of neurons from 1"),
        ({"group_size": -64}, "group_size is -64: expected"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        components.of(make("vit"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [components.of, lambda vit: components.gates(vit).__enter__()])
def test_other_models_are_refused_by_name(call):
    with pytest.raises(blocks.UnsupportedBlock, match="Linear is not supported: expected a timm VisionTransformer"):
        call(nn.Linear(2, 2))


# ---- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*FAMILIES, *MODELS[-3:]])
def test_open_gates_are_the_bare_model(model):
    vit = built(model)
    x = images(vit)
    bare = vit(x)
    for count in (None, 3):
        for kind, gate in components.ones(vit, count).items():
            with components.gates(vit, {kind: gate}):
                # x + (y - x) is y but for rounding; 1 · y is y
                assert torch.equal(vit(x), bare) or (kind == "block" and torch.allclose(vit(x), bare, **CLOSE))
    with components.gates(vit) as gate:
        assert {*gate} == {*KINDS} and hooks(vit)
        torch.testing.assert_close(vit(x), bare, **CLOSE)
    assert not hooks(vit) and torch.equal(vit(x), bare)


@pytest.mark.parametrize("kind", [*KINDS, "all"])
@pytest.mark.parametrize("model", [*FAMILIES, *MODELS[-3:], "pruned"])
def test_gates_scale_what_removal_cuts(model, kind):
    vit = remove(make("vit", depth=6), MIXED) if model == "pruned" else built(model)
    x, gate = images(vit), drawn(vit, KINDS if kind == "all" else (kind,))
    bare, expected = vit(x), by_hand(vit, gate, x)
    with components.gates(vit, gate) as used:
        torch.testing.assert_close(vit(x), expected, **CLOSE)
        assert used is gate
    assert (expected - bare).abs().max() > 1e-2, "the gates mattered"


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_every_image_may_have_its_own_gates(kind):
    vit = make("registers")
    x, gate = images(vit), drawn(vit, KINDS if kind == "all" else (kind,), 3)
    with components.gates(vit, gate):
        together = vit(x)
    for image in range(3):
        with components.gates(vit, {kind: value[image] for kind, value in gate.items()}):
            torch.testing.assert_close(together[image], vit(x[image, None])[0], **CLOSE)


@pytest.mark.parametrize("model", ["vit", "layerscale", "no class token"])
def test_gradients_of_shared_gates_are_sums_over_images(model):
    vit = built(model)
    x = images(vit)
    shared = {kind: gate.requires_grad_() for kind, gate in drawn(vit).items()}
    single = {kind: gate.detach().expand(3, *gate.shape).clone().requires_grad_() for kind, gate in shared.items()}
    for gate in (shared, single):
        with components.gates(vit, gate):
            vit(x).square().sum().backward()
    for kind in KINDS:
        assert single[kind].grad.abs().max() > 0 and not torch.allclose(single[kind].grad[0], single[kind].grad[1])
        torch.testing.assert_close(shared[kind].grad, single[kind].grad.sum(dim=0), rtol=1e-10, atol=1e-10)


def test_gradients_are_slopes():
    vit = make("vit")
    x, gate = images(vit), {kind: value.requires_grad_() for kind, value in drawn(vit).items()}

    def loss(*values: Tensor) -> Tensor:
        with components.gates(vit, dict(zip(KINDS, values, strict=True))):
            return vit(x).square().sum()

    assert torch.autograd.gradcheck(loss, [gate[kind] for kind in KINDS], fast_mode=True)


@pytest.mark.parametrize("fault", ["inside", "in the model", "a gate of a wrong shape"])
def test_no_hook_stays_after_an_exception(fault):
    vit = make("vit")
    x, gate = images(vit), drawn(vit)
    bare, own = vit(x), vit.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises((RuntimeError, ValueError, IndexError)), components.gates(vit, gate):
        assert hooks(vit) > 10
        if fault == "inside":
            raise ValueError(fault)
        gate["head"] = gate["head"] if fault == "in the model" else torch.ones(2, 2, 2, 2)
        vit(x[:, :1] if fault == "in the model" else x)
    assert hooks(vit) == 1, "the model's own hooks stay"
    own.remove()
    assert torch.equal(vit(x), bare)


def test_unknown_gates_are_refused_by_name():
    vit = make("vit")
    with (
        pytest.raises(ValueError, match=r"gates are \['layer'\]: expected some of block, attn, head, mlp, neuron"),
        components.gates(vit, {"layer": torch.ones(3)}),
    ):
        pass
    assert not hooks(vit)


# ---- removed parts as gates and as a plan ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*FAMILIES, *MODELS[-3:], "pruned"])
def test_closed_gates_are_removal(model):
    vit = remove(make("vit", depth=6), MIXED) if model == "pruned" else built(model)
    parts, x = components.of(vit, 50, kinds(model)), images(vit)
    for share, seed in ((1, 0), (3, 1), (3, 2), (6, 3), (len(parts), 4)):
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
        removed = [parts[i] for i in order[:: max(1, len(parts) // share)]] if share < len(parts) else parts
        with components.gates(vit, components.without(vit, removed)):
            expected = vit(x)
        torch.testing.assert_close(remove(vit, components.plan(vit, removed))(x), expected, **CLOSE)


def test_the_plan_keeps_what_is_not_removed():
    vit = make("vit")
    removed = [Component("head", 0, (1,)), Component("neuron", 2, (3, 4, 5)), Component("attn", 1)]
    plan = components.plan(vit, removed)
    assert plan == Plan(
        heads=[[0, 2], [0, 1, 2], [0, 1, 2]],
        neurons=[[*range(192)], [*range(192)], [0, 1, 2, *range(6, 192)]],
        blocks=[True] * 3, attn=[True, False, True], mlp=[True] * 3,
    )  # fmt: skip
    closed = components.without(vit, removed)
    assert {kind: int((gate == 0).sum()) for kind, gate in closed.items()} == {
        "block": 0, "attn": 1, "head": 1, "mlp": 0, "neuron": 3}  # fmt: skip
    assert all(((gate == 0) | (gate == 1)).all() for gate in closed.values())
    assert components.plan(vit, []) == Plan(heads=[ALL] * 3).explicit(vit)
    gone = components.plan(vit, [Component("block", 0)])
    assert gone.blocks == [False, True, True] and len(remove(vit, gone).blocks) == 2


def test_a_model_without_blocks_has_no_parts():
    bare = remove(make("vit"), Plan(blocks=[False] * 3))
    assert components.of(bare) == [] and components.plan(bare, []).blocks == []
    with components.gates(bare):
        assert torch.equal(bare(images(bare)), bare(images(bare)))
