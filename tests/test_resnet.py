"""ResNet-20: the network of the paper, and hidden channels that are really gone."""

import lib  # noqa: F401  # isort: skip
import pytest
import torch
import torch.nn.functional as F
from test_surgery import same
from torch import Tensor, nn

from lib import evaluate, models
from lib.models import ModelError
from lib.pruners.surgery import Plan, remove

CLOSE = {"rtol": 0, "atol": 1e-12}
WIDTHS = [16] * 3 + [32] * 3 + [64] * 3
STRIDES = [1, 1, 1, 2, 1, 1, 2, 1, 1]


def resnet(num_classes: int = 10, arch: str = "resnet20") -> nn.Module:
    """In float64 and evaluation mode; biases, scales and statistics of the normalisations are random and not zero."""
    torch.manual_seed(0)
    model = models.create(arch, num_classes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.0), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):  # fmt: skip
                tensor.data.uniform_(low, high)
    model.head.bias.data.normal_()
    return model


def photos(batch: int = 3, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def uneven(seed: int = 0, widths: list[int] = WIDTHS) -> Plan:
    """Random channels, another number in every block: one alone, some, and all."""
    generator = torch.Generator().manual_seed(seed)
    counts = [1, widths[1], *(int(torch.randint(1, width, (), generator=generator)) for width in widths[2:])]
    return Plan(neurons=[sorted(torch.randperm(width, generator=generator)[:count].tolist())
                         for width, count in zip(widths, counts, strict=True)])  # fmt: skip


def by_hand(state: dict[str, Tensor], x: Tensor, gates: list[Tensor] | None = None) -> Tensor:
    """The forward pass of the paper, from the weights alone; gates (hidden channels,) multiply what conv2 reads."""

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{each}"][:, None, None] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = normed(F.conv2d(x, state["stem.0.weight"], padding=1), "stem.1").relu()
    for index, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        name = f"blocks.{index}"
        inner = normed(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
        if gates:
            inner = inner * gates[index][:, None, None]
        inner = normed(F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        shortcut = torch.zeros_like(inner)
        before = (width - x.shape[1]) // 2
        shortcut[:, before : before + x.shape[1]] = x[:, :, ::stride, ::stride]
        x = (inner + shortcut).relu()
    return x.mean(dim=(2, 3)) @ state["head.weight"].T + state["head.bias"]


def gates(plan: Plan) -> list[Tensor]:
    return [torch.zeros(width, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1)
            for width, kept in zip(WIDTHS, plan.neurons, strict=True)]  # fmt: skip


# ---- the network ----------------------------------------------------------------------------------------------------


def test_parameters_and_macs_of_the_paper():
    model = models.create("resnet20", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    found = evaluate.macs(model, (3, 32, 32))
    # Stem, three stages of six convolutions (the first of a stage with half as many inputs), linear layer.
    halved, full = 16 * 32 * 9 * 16**2, 16 * 16 * 9 * 32**2
    assert round(found["macs_g"] * 1e9) == 3 * 16 * 9 * 32**2 + 6 * full + 2 * (halved + 5 * full) + 640
    assert found["macs_g"] == pytest.approx(0.0406, abs=5e-5) and found["params_m"] == 0.269722
    assert sum(parameter.numel() for parameter in models.create("resnet20", 100).parameters()) == 269_722 + 90 * 65


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8), (1, 1), (12, 30)])
def test_it_computes_what_the_paper_says_at_any_size(size):
    model, x = resnet(), photos(3, *size)
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), **CLOSE)
    assert model(x).shape == (3, 10)


def test_both_names_make_the_same_network():
    first, second = resnet(7, "resnet20"), resnet(7, "res20s")
    assert same(first, second) and repr(first) == repr(second) and type(first) is type(second)
    assert models.describe(first) | {"arch": ""} == models.describe(second) | {"arch": ""}
    models.match(first, (3, 17, 23))


@pytest.mark.parametrize("arch", ["resnet20", "res20s"])
@pytest.mark.parametrize("options, fault", [
    ({"depth": 3}, "takes no depth"),
    ({"drop_path_rate": 0.1}, "takes no drop_path_rate"),
    ({"weights": "pretrained"}, "takes no weights 'pretrained'"),
])  # fmt: skip
def test_what_it_does_not_have_is_refused_by_name(arch, options, fault):
    with pytest.raises(ModelError, match=f"arch '{arch}' {fault}: expected random weights or a local file"):
        models.create(arch, 10, **options)
    models.create(arch, 10, drop_path_rate=0.0)  # asks for nothing


@pytest.mark.parametrize("pruned", [False, True])
def test_it_comes_back_bit_for_bit(tmp_path, pruned):
    model, x = resnet(), photos()
    if pruned:
        model = remove(model, uneven())
    models.save(model, tmp_path / "model", classes=["a"])
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model) and repr(loaded) == repr(model) and same(loaded, model)
    assert not loaded.training and torch.equal(loaded(x), model(x))
    assert models.describe(loaded) == models.describe(model)


def test_weights_of_a_run_start_another(tmp_path, capsys):
    model = resnet().float()
    models.save(model, tmp_path / "model")
    assert same(models.create("res20s", 10, weights=tmp_path), model)
    other = models.create("res20s", 4, weights=tmp_path)
    assert "head for 4 classes starts at random" in capsys.readouterr().out
    assert torch.equal(other.blocks[8].conv2.weight, model.blocks[8].conv2.weight)
    models.save(remove(model, uneven()), tmp_path / "small")
    with pytest.raises(
        ModelError, match=r"small.safetensors does not fit arch 'resnet20': blocks.0.bn1.bias is \(1,\)"
    ):
        models.create("resnet20", 10, weights=tmp_path / "small.safetensors")


# ---- channels that go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_removed_channels_are_those_multiplied_by_zero(seed):
    model, plan, x = resnet(), uneven(seed), photos(3, 17, 24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = remove(model, plan)
    torch.testing.assert_close(small(x), by_hand(before, x, gates(plan)), **CLOSE)
    assert (small(x) - model(x)).abs().max() > 1e-2, "what went mattered"
    assert same(model, before), "the model given is left untouched"
    assert [block.conv1.out_channels for block in small.blocks] == [len(kept) for kept in plan.neurons]
    assert [block.bn1.num_features for block in small.blocks] == [len(kept) for kept in plan.neurons]


def test_a_smaller_network_trains_as_the_whole_one_does_without_those_channels():
    """In training mode, too: the statistics of a batch are a channel's own."""
    model, plan, x = resnet(), uneven(), photos(6)
    small = remove(model, plan).train()
    model.train()
    for block, kept in zip(model.blocks, gates(plan), strict=True):
        block.conv2.weight.data *= kept[:, None, None]
    torch.testing.assert_close(small(x), model(x), **CLOSE)
    small(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())
    assert small.blocks.training and small.blocks[0].bn1.running_mean.shape == (1,)


def test_costs_drop_by_the_closed_form():
    model, plan = resnet().float(), uneven(1)
    whole, less = (evaluate.macs(each, (3, 32, 32)) for each in (model, remove(model, plan)))
    parameters = macs = 0
    inputs = [16, *WIDTHS[:-1]]
    for width, before, side, kept in zip(WIDTHS, inputs, [32] * 3 + [16] * 3 + [8] * 3, plan.neurons, strict=True):
        gone = width - len(kept)
        parameters += gone * (9 * before + 2 + 9 * width)
        macs += gone * 9 * side**2 * (before + width)
    assert round((whole["params_m"] - less["params_m"]) * 1e6) == parameters
    assert round((whole["macs_g"] - less["macs_g"]) * 1e9) == macs


def test_two_removals_are_one(tmp_path):
    model = resnet()
    first = uneven().explicit(model)
    small = remove(model, first)
    second = Plan(neurons=[kept[::2] for kept in Plan().explicit(small).neurons]).explicit(small)
    twice, both = remove(small, second), second.after(first)
    once = remove(model, both)
    assert same(twice, once) and models.describe(twice) == models.describe(once)
    assert both.neurons == [kept[::2] for kept in first.neurons] and both.within(first) == second
    models.save(twice, tmp_path / "model")
    assert same(models.load(tmp_path), once)


def test_removing_nothing_changes_nothing():
    model, x = resnet(), photos()
    again = remove(model, Plan())
    assert same(again, model) and torch.equal(again(x), model(x))


ALL = [None] * 8


@pytest.mark.parametrize("plan, fault", [
    (Plan(neurons=[[], *ALL]), "a residual block keeps no hidden channel: expected at least one"),
    (Plan(mlp=[True] * 4 + [False] + [True] * 4), "a residual block keeps no hidden channel"),
    (Plan(blocks=[True] * 8 + [False]), "a block of a ResNet is removed: expected hidden channels only"),
    (Plan(neurons=[[16], *ALL]), r"neurons \[16\] of block 0: expected distinct indices below 16"),
    (Plan(heads=[[0], *ALL]), r"heads \[0\] of block 0: expected distinct indices below 0"),
    (Plan(neurons=[[0]]), "neurons has 1 entries, expected one for each of 9 blocks"),
])  # fmt: skip
def test_what_cannot_go_is_one_clear_line(plan, fault):
    with pytest.raises(ValueError, match=f"plan: {fault}") as caught:
        remove(resnet(), plan)
    assert "\n" not in str(caught.value)
