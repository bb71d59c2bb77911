"""Losses: A-ViT's parts against hand calculations, their gradients, and two processes against one."""

import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from families import images, make
from torch import Tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from lib import losses
from lib.pruners.avit import AViT, Halting

CLOSE = {"rtol": 0, "atol": 1e-11}
DIRECTIONS = ("forward", "reverse")


def targets(batch: int) -> Tensor:
    return torch.arange(batch) % 7


def model_of(**arguments) -> AViT:
    """Its tokens halt after one, two and three blocks."""
    return AViT(make("vit"), 2, 1, **arguments).train()


def by_hand(found: Halting) -> Tensor:
    """log H by plain loops: one mean per block over the running patches of all images, then the share of each block.

    In decimal numbers, whose exponents do not end: no need for the logarithms that the library takes all along.
    """
    L, B, N = found.gates.shape
    gates, means = found.gates.detach(), []
    for block in range(L):
        scores = [
            1 / (1 + Decimal(-float(gates[block, image, token])).exp())
            for image in range(B)
            for token in range(found.prefix, N)
            if found.running[block, image, token]
        ]
        means.append(sum(scores) / len(scores) if scores else Decimal(0))
    shares = [mean / sum(means) for mean in means]
    return torch.tensor([float(share.ln()) if share else DEAD for share in shares], dtype=torch.float64)


DEAD = torch.finfo(torch.float64).min


def some_halting(seed: int = 0, prefix: int = 2) -> Halting:
    """Four blocks, three images of unequally many running tokens, in the last block none of the second image. The
    gates of halted tokens stand wide open: of no meaning, but visible where they are read."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randint(1, 5, (3, 9), generator=generator)
    depth[1] = depth[1].clamp(max=3)
    running = torch.arange(4)[:, None, None] < depth
    gates = torch.rand(4, 3, 9, generator=generator, dtype=torch.float64).logit().where(running, 50.0)
    return Halting(depth + 0.5, gates, running, prefix)


# --- the halting distribution and its target ------------------------------------------------------------------------


def test_halting_distribution_equals_a_hand_calculation():
    found = some_halting()
    assert len({int(count) for count in found.running[1].sum(dim=1)}) > 1, "a mean of images' means would differ"
    H = losses.halting_distribution(found)
    torch.testing.assert_close(H, by_hand(found), **CLOSE)
    assert float(H.exp().sum()) == pytest.approx(1)
    tiny = Halting(torch.zeros(1, 3), torch.zeros(2, 1, 3), torch.ones(2, 1, 3, dtype=torch.bool), 1)
    tiny.gates[:] = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.9, 0.7]])[:, None].logit()
    tiny.running[1, 0, 2] = False  # the second block has one running patch, of score 0.9: means 0.3 and 0.9
    torch.testing.assert_close(losses.halting_distribution(tiny), torch.tensor([0.25, 0.75]).log())


@pytest.mark.parametrize("family", ["vit", "registers", "no class token"])
def test_halting_distribution_of_a_model_equals_a_hand_calculation(family):
    vit = make(family)
    found = AViT(vit, 2, 1).train()(images(vit, 5), with_halting=True)[1]
    counts = found.running[:, :, found.prefix :].sum(dim=(1, 2))
    assert counts[0] > counts[1] > counts[2] > 0
    torch.testing.assert_close(losses.halting_distribution(found), by_hand(found), **CLOSE)


def test_prefix_tokens_do_not_count():
    found = some_halting()
    before = losses.halting_distribution(found)
    found.gates[:, :, :2], found.running[:, :, :2] = 2.0, True
    assert torch.equal(losses.halting_distribution(found), before)
    found.prefix = 1
    assert not torch.allclose(losses.halting_distribution(found), before)


def test_halted_tokens_do_not_count():
    """Whatever their gates are, and they are not among those divided by."""
    model = AViT(make("no class token"), 2, 1).train()
    with torch.no_grad():
        found = model(images(model.vit, 5), with_halting=True)[1]
    assert (~found.running).any()
    scores = found.gates.sigmoid()
    picked = [float(block[running].mean()) for block, running in zip(scores, found.running, strict=True)]
    expected = torch.tensor(picked, dtype=torch.float64) / sum(picked)
    before = losses.halting_distribution(found)
    torch.testing.assert_close(before, expected.log(), **CLOSE)
    for anything in (-math.inf, -1e4, 0, 1e4, math.inf):
        found.gates = found.gates.where(found.running, anything).requires_grad_()
        after = losses.halting_distribution(found)
        assert torch.equal(after, before)
        (grad,) = torch.autograd.grad(after[0], found.gates)
        assert (grad[~found.running] == 0).all() and (grad[found.running] != 0).all()
        found.gates = found.gates.detach()


def test_every_image_counts():
    found = some_halting()
    before = losses.halting_distribution(found)
    for image in range(3):
        changed = some_halting()
        changed.gates[0, image, 2:] -= 1
        assert (losses.halting_distribution(changed) - before).abs().max() > 1e-3


def test_a_block_in_which_no_patch_runs_has_nothing():
    found = some_halting()
    found.running[3, :, 2:] = False
    found.gates.requires_grad_()
    H = losses.halting_distribution(found)
    assert H[3] == DEAD
    torch.testing.assert_close(H, by_hand(found), **CLOSE)
    for direction in DIRECTIONS:
        value = losses.divergence(H, losses.target_distribution(4, 2.0), direction)
        (grad,) = torch.autograd.grad(value, found.gates, retain_graph=True)
        assert value.isfinite() and grad.isfinite().all() and (grad[3] == 0).all() and (grad[:3] != 0).any()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("offset", [20, -20, -75, -110, -800])
def test_halting_distribution_does_not_underflow(offset, dtype, close):
    """Blocks and images whose scores lie powers of ten apart, all of them far from the numbers that floats have."""
    found = some_halting()
    found.gates = (found.gates + offset + torch.tensor([0.0, -9.0, 4.0, -2.0])[:, None, None]).to(dtype)
    found.gates[:, 1] -= 7
    found.gates[~found.running] = 50  # wide open, where all that run are nearly shut
    H = losses.halting_distribution(found)
    assert H.dtype == dtype
    torch.testing.assert_close(H.double(), by_hand(found), rtol=0, atol=close)


@pytest.mark.parametrize("depth", [1.0, 2.5, 4.2, 6.0])
def test_target_is_a_normal_distribution_over_the_blocks(depth):
    target = losses.target_distribution(6, depth)
    assert float(target.exp().sum()) == pytest.approx(1, abs=1e-12)
    log_density = scipy.stats.norm.logpdf(np.arange(1, 7), loc=depth)
    np.testing.assert_allclose(target, scipy.special.log_softmax(log_density), rtol=0, atol=1e-11)
    nearest = min(range(1, 7), key=lambda block: abs(block - depth))
    assert int(target.argmax()) + 1 == nearest


@pytest.mark.parametrize("depth", [0.9, 6.1, float("nan"), float("inf")])
def test_a_target_outside_the_blocks_is_refused(depth):
    with pytest.raises(ValueError, match=f"target_depth is {depth}: expected a block from 1 to 6"):
        losses.target_distribution(6, depth)


def test_target_is_symmetrical():
    middle = losses.target_distribution(6, 3.5)
    torch.testing.assert_close(middle, middle.flip(0), **CLOSE)
    torch.testing.assert_close(losses.target_distribution(6, 2.0), losses.target_distribution(6, 5.0).flip(0), **CLOSE)
    assert losses.target_distribution(1, 1.0).tolist() == [0]


def test_divergence_is_the_textbook_one():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    q = losses.target_distribution(4, 2.0).exp()
    forward, reverse = (float(losses.divergence(p.log(), q.log(), direction)) for direction in DIRECTIONS)
    assert forward == pytest.approx(scipy.stats.entropy(p, q), abs=1e-12)
    assert reverse == pytest.approx(scipy.stats.entropy(q, p), abs=1e-12)
    assert abs(forward - reverse) > 1e-3, "the directions differ here"
    assert float(losses.divergence(p.log(), q.log())) == forward
    for direction in DIRECTIONS:
        assert losses.divergence(p.log(), p.log(), direction) == 0
        assert losses.divergence(p.log(), p.flip(0).log(), direction) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_of_a_distribution_with_nothing_in_some_blocks(dtype):
    empty = torch.tensor([0.6, 0.4, 0, 0], dtype=dtype)
    found = empty.log().clamp(min=torch.finfo(dtype).min).requires_grad_()
    target = losses.target_distribution(4, 2.0).to(dtype)
    forward, reverse = (losses.divergence(found, target, direction) for direction in DIRECTIONS)
    assert float(forward.detach()) == pytest.approx(scipy.stats.entropy(empty, target.exp()), rel=1e-6)
    tiny = empty.clamp(min=torch.finfo(dtype).tiny)  # what an empty block counts as where it is divided by
    cost = sum(float(q) * (math.log(q) - math.log(p)) for p, q in zip(tiny, target.exp(), strict=True))
    assert float(reverse.detach()) == pytest.approx(cost, rel=1e-6)
    for value in (forward, reverse):
        (grad,) = torch.autograd.grad(value, found)
        assert grad.isfinite().all() and (grad[2:] == 0).all() and (grad[:2] != 0).all()


def test_an_unknown_direction_is_refused_in_one_line():
    for direction in ("backward", "", None):
        with pytest.raises(ValueError, match=f"distr_kl is {direction!r}: expected forward or reverse") as error:
            losses.halting(0.1, 0.1, 2.0, direction)
        assert "\n" not in str(error.value)


# --- gradients ------------------------------------------------------------------------------------------------------

PARTS = {
    "logits": lambda logits, found: logits,
    "ponder": lambda logits, found: losses.ponder(found),
    **{
        direction: lambda logits, found, direction=direction: losses.divergence(
            losses.halting_distribution(found), losses.target_distribution(3, 2.0), direction
        )
        for direction in DIRECTIONS
    },
}


def tiny_model() -> tuple[AViT, Tensor]:
    """A class token and four patches, a gate to learn, and two images."""
    vit = make("vit", embed_dim=12, num_heads=2, img_size=32)
    return AViT(vit, 0.5, 0.3, learn_gate=True).train(), images(vit, 2)


def test_the_tiny_model_halts_and_is_away_from_thresholds():
    """Depth jumps at the threshold; finite differences are right where no step of theirs crosses it."""
    model, x = tiny_model()
    found = model(x, with_halting=True)[1]
    sums = found.gates.sigmoid().cumsum(dim=0)[:-1][found.running[:-1]]
    assert (sums - (1 - model.eps)).abs().min() > 1e-4
    assert found.running.sum(dim=0).unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("part", PARTS)
def test_gradients_equal_finite_differences(part):
    model, x = tiny_model()
    parameters = dict(model.named_parameters())
    names = ["gate_log_factors", "vit.cls_token", "vit.blocks.0.mlp.fc2.bias", "vit.blocks.1.norm1.weight"]

    def function(*values: Tensor) -> Tensor:
        return PARTS[part](*functional_call(model, dict(zip(names, values, strict=True)), (x, True)))

    values = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(function, values)
    grads = torch.autograd.grad(function(*values).sum(), values)
    assert all(grad.abs().max() > 1e-6 for grad in grads)


@pytest.mark.parametrize("part", PARTS)
def test_gradients_of_the_embedding_equal_finite_differences(part):
    model, x = tiny_model()

    def function(position: Tensor) -> Tensor:
        return PARTS[part](*functional_call(model, {"vit.pos_embed": position}, (x, True)))

    assert torch.autograd.gradcheck(function, model.vit.pos_embed.detach().clone().requires_grad_())


def calm(family: str, shift: float = 0.0) -> torch.nn.Module:
    """A model whose first channel is of order one, as in a trained one. shift: what is added to that channel."""
    vit = make(family)
    with torch.no_grad():
        vit.pos_embed.mul_(0.1)
        vit.pos_embed[..., 0] += shift
        vit.patch_embed.proj.weight.mul_(0.05)
    return vit


def float32_step(family: str, gate: tuple[float, float], direction: str, shift: float = 0.0) -> dict[str, Tensor]:
    """The loss and its parts, after checking that they and all gradients are finite."""
    vit = calm(family, shift).float()
    model = AViT(vit, *gate).train()
    value, parts = losses.halting(0.1, 1.0, 2.0, direction)(model, images(vit, 4).float(), targets(4))
    value.backward()
    assert value.isfinite() and all(part.isfinite() for part in parts.values())
    broken = [name for name, parameter in vit.named_parameters() if not parameter.grad.isfinite().all()]
    assert not broken
    return {name: part.detach() for name, part in parts.items()}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_gradients_are_finite_where_all_images_have_halted(family, direction):
    """Blocks without a key, and blocks of which the distribution has nothing."""
    for gate in ((10, -75), (5, -math.inf)):
        parts = float32_step(family, gate, direction)
        assert parts["depth"] == 1 and float(parts["ponder"]) == pytest.approx(2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", ["vit", "no class token"])
def test_gradients_are_finite_where_gates_hardly_open(family, direction):
    parts = float32_step(family, (10, 75), direction)
    assert parts["depth"] == 3 and float(parts["ponder"]) == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("center", "shift"), [(75, -2), (75, -4), (90, 0), (110, 0), (math.inf, 0)])
def test_gradients_are_finite_where_scores_underflow(center, shift, direction):
    """Where the first channel is -1.4 or less, float32 has no normal number for the score of 10 and 75."""
    parts = float32_step("vit", (10, center), direction, shift)
    assert parts["depth"] == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("center", [75, 110, 900])
def test_no_gate_is_too_far_away_to_learn(center, direction):
    """Where scores underflow in float32 its gradients are those of float64; there only 900 is out of reach."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        vit = calm("vit").to(dtype)
        found = AViT(vit, 10, center).train()(images(vit, 4).to(dtype), with_halting=True)[1]
        shares = losses.halting_distribution(found)
        losses.divergence(shares, losses.target_distribution(3, 2.0).to(dtype), direction).backward()
        grads.append(vit.pos_embed.grad.double())
    scale = float(grads[1].abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_finite_where_one_image_has_halted_and_others_run(direction):
    model = AViT(make("no class token"), 2, 1).train()
    x = images(model.vit, 4)
    with torch.no_grad():
        model.vit.patch_embed.proj.weight[0] = model.vit.patch_embed.proj.weight[0].abs()
    x[0] = 50  # bright: the first channel of all its patches opens the gate
    found = model(x, with_halting=True)[1]
    assert not found.running[1, 0].any() and found.running[1, 1:].any(dim=1).all()
    value, _ = losses.halting(0.1, 1.0, 2.0, direction)(model, x, targets(4))
    value.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- the whole loss -------------------------------------------------------------------------------------------------


def test_value_is_the_weighted_sum_of_its_parts():
    model, x, y = model_of(), images(make("vit"), 5), targets(5)
    logits, found = model(x, with_halting=True)
    H, target = by_hand(found).exp(), losses.target_distribution(3, 1.7).exp()
    expected = {
        "task": F.cross_entropy(logits, y),
        "ponder": found.ponder.sum() / found.ponder.numel(),
        "distr": torch.tensor(scipy.stats.entropy(H, target)),
    }
    value, parts = losses.halting(0.3, 0.7, 1.7)(model, x, y)
    assert set(parts) == {"task", "ponder", "distr", "depth"}
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part, **CLOSE)
    torch.testing.assert_close(value, expected["task"] + 0.3 * expected["ponder"] + 0.7 * expected["distr"], **CLOSE)
    depth = sum(found.running.sum(dim=0).flatten().tolist()) / found.ponder.numel()
    assert float(parts["depth"]) == pytest.approx(depth)

    reverse = losses.halting(0.3, 0.7, 1.7, distr_kl="reverse")(model, x, y)[1]["distr"]
    assert float(reverse.detach()) == pytest.approx(scipy.stats.entropy(target, H), abs=1e-11)
    value, parts = losses.halting(0, 0, 1.7)(model, x, y)
    assert value == parts["task"] == losses.task(model, x, y)[0]


def test_targets_may_be_probabilities():
    model, x = model_of(), images(make("vit"), 5)
    hard, soft = targets(5), F.one_hot(targets(5), 7).double()
    loss = losses.halting(0.1, 0.1, 2.0)
    torch.testing.assert_close(loss(model, x, soft)[0], loss(model, x, hard)[0], **CLOSE)
    mixed = 0.7 * soft + 0.3 * soft.flip(0)
    expected = -(mixed * model(x).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss(model, x, mixed)[1]["task"], expected, **CLOSE)


def test_distillation_is_the_divergence_of_the_teacher_from_the_model():
    generator = torch.Generator().manual_seed(0)
    mine, its = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    expected = np.mean(scipy.stats.entropy(its.softmax(dim=1), mine.softmax(dim=1), axis=1))
    assert float(losses.distillation(mine, its)) == pytest.approx(expected, abs=1e-12)
    assert abs(float(losses.distillation(its, mine)) - expected) > 1e-3
    assert float(losses.distillation(mine, mine + 3)) == pytest.approx(0, abs=1e-12)  # the same predictions


def test_a_teacher_adds_its_part_and_is_left_alone():
    model, x, y = model_of(), images(make("vit"), 5), targets(5)
    teacher = make("deit", proj_drop_rate=0.5, depth=2)
    answer = teacher(x).detach()
    teacher.train()  # as after its own training: its dropout must not teach
    plain, _ = losses.halting(0.3, 0.7, 1.7)(model, x, y)
    value, parts = losses.halting(0.3, 0.7, 1.7, teacher=teacher, distill_weight=2.0)(model, x, y)
    expected = losses.distillation(model(x), answer)
    assert expected > 1e-3
    torch.testing.assert_close(parts["distill"], expected, **CLOSE)
    torch.testing.assert_close(value, plain + 2 * expected, **CLOSE)
    value.backward()
    assert not teacher.training and model.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_never_halts_is_its_own_teacher():
    vit, x = make("vit"), images(make("vit"), 5)
    loss = losses.halting(0, 0, 2.0, teacher=make("vit"), distill_weight=1.0)
    parts = loss(AViT(vit, 5, math.inf).train(), x, targets(5))[1]
    assert float(parts["distill"].detach()) == pytest.approx(0, abs=1e-11)


def test_distilling_without_a_teacher_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"distill_weight is 0\.5: expected a teacher") as error:
        losses.halting(0.1, 0.1, 2.0, distill_weight=0.5)
    assert "\n" not in str(error.value)


def test_without_weight_a_teacher_is_not_asked():
    silent = SimpleNamespace()  # neither .to nor .eval: asking it fails
    parts = losses.halting(0.1, 0.1, 2.0, teacher=silent)(model_of(), images(make("vit")), targets(3))[1]
    assert "distill" not in parts


# --- several processes ----------------------------------------------------------------------------------------------


def apart() -> tuple[Halting, list[slice]]:
    """Three images and how two processes share them: unequally. In every block one has far smaller scores, in block 2
    below what float64 can hold; in block 4 only the first has running patches."""
    found = some_halting()
    found.gates[:, 0] += torch.tensor([-60.0, -900.0, 0.0, -5.0], dtype=torch.float64)[:, None]
    found.gates[:, 1:] += torch.tensor([-58.0, -30.0, -40.0, 0.0], dtype=torch.float64)[:, None, None]
    found.running[3, 1:, found.prefix :] = False
    return found, [slice(0, 1), slice(1, 3)]


def _distribution(found: Halting, part: slice) -> dict[str, Tensor]:
    """log H, and the gradient of a sum of its entries by the gates."""
    gates = found.gates[:, part].clone().requires_grad_()
    H = losses.halting_distribution(Halting(found.ponder[part], gates, found.running[:, part], found.prefix))
    (grad,) = torch.autograd.grad((H * torch.tensor([1.0, -2.0, 0.5, 3.0]).to(H)).sum(), gates)
    return {"H": H.detach(), "grad": grad}


def _step(model: torch.nn.Module, direction: str, part: slice) -> dict[str, Tensor]:
    x = images(make("vit"), 6)
    model.zero_grad()
    value, parts = losses.halting(0.2, 3.0, 2.0, direction)(model, x[part], targets(6)[part])
    value.backward()
    inner = getattr(model, "module", model)
    return {"H": parts["distr"].detach()} | {name: p.grad.clone() for name, p in inner.named_parameters()}


def _step_on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = DistributedDataParallel(model_of(learn_gate=True))
    found = {direction: _step(model, direction, slice(rank, None, world)) for direction in DIRECTIONS}
    halting, shares = apart()
    found["apart"] = _distribution(halting, shares[rank])
    torch.save(found, f"{folder}/grads{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_like_one_with_twice_the_batch(tmp_path):
    """The distribution is one of all images: its divergence is not a mean of those of the processes."""
    model = model_of(learn_gate=True)
    expected = {direction: _step(model, direction, slice(None)) for direction in DIRECTIONS}
    halves = [_step(model, "forward", slice(rank, None, 2))["H"] for rank in range(2)]
    assert abs(sum(halves) / 2 - expected["forward"]["H"]) > 1e-6, "else this proves nothing"

    halting, shares = apart()
    whole = _distribution(halting, slice(None))
    tops = [halting.gates.where(halting.running, -math.inf)[:, part, 2:].amax(dim=(1, 2)) for part in shares]
    assert ((tops[0] - tops[1]).abs() > 1).all() and (tops[0] < tops[1]).any() and (tops[0] > tops[1]).any()
    torch.testing.assert_close(whole["H"], by_hand(halting), **CLOSE)

    mp.spawn(_step_on_rank, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"grads{rank}.pt")
        for direction in DIRECTIONS:
            torch.testing.assert_close(found[direction], expected[direction], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found["apart"]["H"], whole["H"], **CLOSE)
        # each process adds its own loss, hence the two, which DistributedDataParallel's mean takes back
        torch.testing.assert_close(found["apart"]["grad"], 2 * whole["grad"][:, shares[rank]], **CLOSE)
