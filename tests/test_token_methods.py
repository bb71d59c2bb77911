"""What every training-free token method does, whatever it chooses: each image alone, as counted, exported, saved."""

import copy

import pytest
import torch
from conftest import TINY
from families import FAMILIES, WITHOUT_CLASS_TOKEN, by_onnx, images, make

from lib import blocks, models
from lib.pruners.anchors import Anchors
from lib.pruners.baselines import DROPPING, ToMe
from lib.pruners.ward import Ward

CLOSE = {"rtol": 0, "atol": 1e-11}
AS_DEFAULT = {"gamma": 0.5, "linkage": "ward", "keys": "heads"}
METHODS = {  # with all of their arguments
    **{name: (method, {"keep_ratio": 0.6, "blocks": [0, 1]}) for name, method in DROPPING.items()},
    "random": (DROPPING["random"], {"keep_ratio": 0.6, "blocks": [0, 1], "seed": 5}),
    "topk, in any order": (DROPPING["topk"], {"keep_ratio": [0.45, 0.8], "blocks": [1, 0]}),
    "tome": (ToMe, {"r": 4}),
    "tome, all that can": (ToMe, {"r": 99}),
    "tome, per block": (ToMe, {"r": [5, 0, 4]}),
    "ward": (Ward, {"r": 4} | AS_DEFAULT),
    "ward, all that can": (Ward, {"r": 99} | AS_DEFAULT),
    "ward, per block": (Ward, {"r": [7, 4, 1]} | AS_DEFAULT),
    "ward, no attention": (Ward, {"r": 4} | AS_DEFAULT | {"gamma": 0}),
    "ward, mean keys": (Ward, {"r": 4} | AS_DEFAULT | {"keys": "mean"}),
    "ward, cosine": (Ward, {"r": 4} | AS_DEFAULT | {"gamma": 1.25, "linkage": "cosine"}),
    "anchors": (Anchors, {"k_anchors": 3, "top_m": 4, "alpha": 0.5, "start_block": 1, "normalise": "minmax"}),
    "anchors, early": (Anchors, {"k_anchors": 2, "top_m": 0.25, "alpha": 0.75, "start_block": 0, "normalise": "none"}),
}
PLAIN = [name for name in METHODS if "," not in name]


def on(families, names=METHODS):
    """Test cases (family, method, arguments): each of these methods on each of these families; anchors refuse models
    without a class token."""
    return pytest.mark.parametrize(("family", "method", "arguments"), [
        pytest.param(family, *METHODS[name], id=f"{name} on {family}")
        for name in names
        for family in families
        if METHODS[name][0] is not Anchors or family not in WITHOUT_CLASS_TOKEN
    ])  # fmt: skip


@on(["vit", "registers", "no class token"])
def test_batch_equals_single(family, method, arguments):
    pruner = method(make(family), **arguments)
    x = images(pruner.vit, 6)
    kept = lambda x: [[row.tolist() for row in rows] for rows in pruner.trace(x).kept]  # noqa: E731
    logits, together, ones = pruner(x), kept(x), x.split(1)
    single = torch.cat([pruner(one) for one in ones])
    if method is DROPPING["random"]:  # every image of a batch has its own priorities
        assert (logits[1:] - single[1:]).abs().amax(dim=1).min() > 1e-6
        logits, ones, single = logits[:1], ones[:1], single[:1]
    torch.testing.assert_close(logits, single, **CLOSE)
    for index, one in enumerate(ones):
        assert [[rows[index]] for rows in together] == kept(one)
    distinct = {str([rows[index] for rows in together]) for index in range(6)}
    assert len(distinct) == 1 if method is DROPPING["grid"] or arguments.get("r") == 99 else len(distinct) > 3


@on(FAMILIES)
def test_counts_are_the_tokens_that_run(family, method, arguments):
    pruner, seen = method(make(family), **arguments), {"norm1": [], "mlp": []}
    for block in pruner.vit.blocks:
        for part, found in seen.items():
            getattr(block, part).register_forward_pre_hook(lambda _, x, found=found: found.append(x[0].shape[1]))
    pruner(images(pruner.vit))
    assert (seen["norm1"], seen["mlp"]) == pruner.counts() and seen["mlp"][-1] < seen["norm1"][0]


@on(["vit"])
def test_gradient_checkpointing_changes_nothing(family, method, arguments):
    pruner = method(make(family), **arguments).train()
    x = images(pruner.vit)
    pruner(x).square().sum().backward()
    plain = [p.grad.clone() for p in pruner.parameters()]
    pruner.zero_grad()
    pruner.vit.set_grad_checkpointing(True)
    pruner(x).square().sum().backward()
    for before, parameter in zip(plain, pruner.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, before, **CLOSE)


@on(["vit"])
def test_the_model_is_as_it_was_after_use(family, method, arguments):
    vit = make(family)
    before, x = copy.deepcopy(vit.state_dict()), images(vit)
    logits, pruner = vit(x), method(vit, **arguments).train()
    pruner(x)
    for look in ("trace", "sources", "anchors"):
        getattr(pruner, look, lambda x: None)(x)
    assert pruner.training and vit.training and {*pruner.state_dict()} == {f"vit.{key}" for key in before}
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert torch.equal(vit.eval()(x), logits)


@pytest.mark.parametrize(("method", "arguments"), METHODS.values(), ids=METHODS)
def test_saves_and_loads(method, arguments, tmp_path):
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **TINY | {"depth": 3}).eval()
    pruner = method(vit, **arguments).eval()
    x = torch.rand(4, 3, 12, 12)
    loaded = models.load(models.save(pruner, tmp_path / "model"))
    assert type(loaded) is method and loaded.arguments == arguments == pruner.arguments
    assert loaded.counts() == pruner.counts()
    assert torch.equal(loaded(x), pruner(x)) and not torch.equal(loaded(x), vit(x))


@on(["vit", "no class token"])
def test_exports_and_compiles(family, method, arguments):
    torch.compiler.reset()  # it counts what other models of the same class made it compile anew
    pruner = method(make(family), **arguments).float().eval()
    x = images(pruner.vit, 2).float()
    exported = torch.export.export(pruner, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = images(pruner.vit, 5).float()
    torch.testing.assert_close(exported(x), pruner(x))
    torch.testing.assert_close(exported(more), pruner(more))
    torch.testing.assert_close(torch.compile(pruner, backend="eager", fullgraph=True)(x), pruner(x))


@on(["vit", "no class token"])
def test_an_empty_batch_has_no_logits(family, method, arguments):
    pruner = method(make(family), **arguments).eval()
    assert pruner(images(pruner.vit)[:0]).shape == (0, 7)


@on(["vit", "no class token", "registers, mean pooling"], PLAIN)
def test_exports_to_onnx(family, method, arguments, tmp_path):
    pruner = method(make(family), **arguments).float().eval()
    x = images(pruner.vit, 2).float()
    torch.testing.assert_close(by_onnx(pruner, x, tmp_path), pruner(x), rtol=0, atol=1e-5)
    assert (pruner(x) - pruner.vit(x)).abs().max() > 1e-4, "something was pruned"


@on(["vit"])
def test_runs_in_half_precision(family, method, arguments):
    pruner = method(make(family), **arguments).float().eval()
    x = images(pruner.vit, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert pruner(x).isfinite().all()
    assert copy.deepcopy(pruner).bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize(("method", "arguments"), [METHODS[name] for name in PLAIN], ids=PLAIN)
def test_other_models_are_refused_by_name(method, arguments):
    with pytest.raises(blocks.UnsupportedBlock, match="Linear"):
        method(torch.nn.Linear(2, 2), **arguments)
