"""EAP: scores are the derivatives they claim to be, against finite steps, weights' gradients and physical removal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, images, make
from test_surgery import ALL, MIXED, built, same
from torch import Tensor, nn

from lib import blocks, costs
from lib.pruners import components, eap
from lib.pruners.components import KINDS, Component
from lib.pruners.eap import OBJECTIVES
from lib.pruners.surgery import Plan, remove

LABELS = torch.tensor([2, 0, 5, 5, 1, 6])


def data(vit: nn.Module, count: int = 3) -> tuple[Tensor, Tensor]:
    x = images(vit, count)
    return x, LABELS[:count] % vit(x[:1]).shape[1]


def found(vit: nn.Module, objective: str, count: int = 3, **how) -> dict[str, Tensor]:
    return eap.scores(vit, [data(vit, count)], objective, **how)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for kind in a:
        scale = b[kind].nan_to_num().abs().max().item()
        torch.testing.assert_close(a[kind], b[kind], rtol=0, atol=tolerance * scale, equal_nan=True, msg=kind)


def some(vit: nn.Module, parts: tuple[str, ...] = KINDS) -> list[Component]:
    """All parts, of single neurons every fortieth."""
    single = components.of(vit, 1, parts)
    return [part for part in single if part.kind != "neuron" or part.units[0] % 40 == 3]


def values(scores: dict[str, Tensor], parts: list[Component]) -> Tensor:
    return torch.stack([scores[part.kind][part.block][list(part.units) or ...].sum() for part in parts])


@torch.no_grad()
def losses_at(vit: nn.Module, parts: list[Component], eps: float, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL from the clean prediction, a mean over images per part whose gate is at 1 − eps."""
    gate = {kind: value.clone() for kind, value in components.ones(vit, len(parts)).items()}
    for row, part in enumerate(parts):
        gate[part.kind][row, part.block, list(part.units) or ...] -= eps
    clean, ce, kl = vit(x).log_softmax(dim=1), 0.0, 0.0
    for image, label, p in zip(x, labels, clean, strict=True):
        with components.gates(vit, gate):
            log_p = vit(image.expand(len(parts), -1, -1, -1)).log_softmax(dim=1)
        ce = ce - log_p[:, label] / len(x)
        kl = kl + (p.exp() * (p - log_p)).sum(dim=1) / len(x)
    return ce, kl


# ---- the scores are derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*FAMILIES, "gated attention"])
def test_ce_is_the_first_order_of_the_loss(model):
    """(CE at 1 − ε minus CE at 1) / ε → −score, with an error that halves with ε."""
    vit = built(model)
    parts = some(vit, ("block", "attn", "mlp") if model == "scaled norms" else KINDS)
    x, labels = data(vit)
    score, clean = values(found(vit, "ce"), parts), F.cross_entropy(vit(x), labels)
    errors = [((losses_at(vit, parts, eps, x, labels)[0] - clean) / eps + score).norm() for eps in (2e-4, 1e-4)]
    assert errors[1] < 1e-3 * score.norm()
    assert 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize("model", [*FAMILIES, "gated attention"])
def test_fisher_is_the_second_order_of_the_kl(model):
    """KL at 1 − ε is ε² · score, with an error that halves with ε."""
    vit = built(model)
    parts = some(vit, ("block", "attn", "mlp") if model == "scaled norms" else KINDS)
    x, labels = data(vit)
    score = values(found(vit, "fisher", samples=0), parts)
    errors = [(losses_at(vit, parts, eps, x, labels)[1] / eps**2 - score).norm() for eps in (2e-3, 1e-3)]
    assert errors[1] < 1e-2 * score.norm()
    assert 1.8 < errors[0] / errors[1] < 2.2


def slopes_of_weights(vit: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """∂loss/∂gate without gates: of a factor on weights W it is Σ W · ∂loss/∂W."""
    lines = [linear for block in vit.blocks for linear in (block.attn.proj, block.mlp.fc2)]
    weights = [each for linear in lines for each in (linear.weight, linear.bias)]
    grads = torch.autograd.grad(loss, weights, retain_graph=True)
    products = [(weight * grad).detach() for weight, grad in zip(weights, grads, strict=True)]
    proj, proj_bias, fc2, fc2_bias = (torch.stack(products[i::4]) for i in range(4))
    return {
        "attn": proj.sum(dim=(1, 2)) + proj_bias.sum(dim=1),
        "head": proj.sum(dim=1).unflatten(1, (-1, 16)).sum(dim=2),
        "mlp": fc2.sum(dim=(1, 2)) + fc2_bias.sum(dim=1),
        "neuron": fc2.sum(dim=1),
    }


@pytest.mark.parametrize("objective", ["ce", "taylor", "fisher"])
@pytest.mark.parametrize("model", ["vit", "layerscale", "registers", "attention pooling"])
def test_scores_by_hand_from_gradients_of_weights(model, objective):
    vit = built(model, num_classes=3) if model != "attention pooling" else built(model)
    if model == "attention pooling":  # its 48 outputs are no classes: a head of three
        vit.head = nn.Linear(48, 3).double().requires_grad_(False)
    x, labels = data(vit)
    expected = {kind: 0.0 for kind in KINDS if kind != "block"}
    for image, label in zip(x, labels, strict=True):
        log_p = vit(image[None]).log_softmax(dim=1)[0]
        slopes = [slopes_of_weights(vit, -each) for each in log_p]
        for kind in expected:
            if objective == "ce":
                score = slopes[label][kind]
            elif objective == "taylor":
                score = 0.5 * slopes[label][kind] ** 2
            else:
                score = sum(0.5 * log_p[y].exp().item() * slopes[y][kind] ** 2 for y in range(3))
            expected[kind] = expected[kind] + score / len(x)
    score = found(vit, objective)
    assert all(value.dtype == torch.float64 for value in score.values())
    close({kind: score[kind] for kind in expected}, expected, 1e-10)


def test_scores_of_parts_add_up_to_that_of_a_common_gate():
    vit = make("vit")
    x, labels = data(vit)
    score = found(vit, "ce")
    for kind, group in (("head", [0, 2]), ("neuron", [*range(5, 70)]), ("head", [0, 1, 2])):
        for index in range(3):
            common = torch.ones((), dtype=torch.float64, requires_grad=True)
            gate = components.ones(vit)[kind]
            gate[index, group] = common
            with components.gates(vit, {kind: gate}):
                F.cross_entropy(vit(x), labels).backward()
            torch.testing.assert_close(score[kind][index, group].sum(), common.grad, rtol=1e-9, atol=1e-12)


# ---- integrated gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_task_loss", [False, True])
@pytest.mark.parametrize("family", ["vit", "registers, mean pooling"])
def test_ig_adds_up_to_what_removing_all_costs(family, use_task_loss):
    """Over the parts of a kind and block: minus the KL, or minus the rise of the loss, to the error of midpoints."""
    vit = make(family, depth=2)
    x, labels = data(vit)
    clean = vit(x).log_softmax(dim=1)
    plans = {"block": "blocks", "attn": "attn", "mlp": "mlp", "head": "heads", "neuron": "neurons"}

    def cost(kind: str, index: int) -> Tensor:
        gone = [] if kind in ("head", "neuron") else False
        rest = ALL if kind in ("head", "neuron") else True
        small = remove(vit, Plan(**{plans[kind]: [gone if i == index else rest for i in range(2)]}))
        log_p = small(x).log_softmax(dim=1)
        if use_task_loss:
            return F.nll_loss(log_p, labels) - F.nll_loss(clean, labels)
        return F.kl_div(log_p, clean, reduction="batchmean", log_target=True)

    expected = torch.stack([cost(kind, index) for kind in KINDS for index in range(2)]).detach()
    errors = []
    for steps in (10, 20):
        score = found(vit, "ig", steps=steps, use_task_loss=use_task_loss)
        sums = torch.stack([score[kind][index].sum() for kind in KINDS for index in range(2)])
        errors.append((sums + expected).abs().max() / expected.abs().max())
    assert errors[1] < 2e-3 and 3 < errors[0] / errors[1] < 5.5, "midpoints: twice the steps, a quarter of the error"


# ---- Fisher by projection -------------------------------------------------------------------------------------------


def test_projected_fisher_is_unbiased():
    """One image many times over, a projection each: the mean goes to the exact score as 1/√(images · samples)."""
    vit = make("vit", depth=2)
    x, _ = data(vit, 1)
    exact, many = found(vit, "fisher", 1), (x.expand(200, -1, -1, -1), LABELS[:1].expand(200))
    for seed, samples in ((0, 1), (1, 12)):
        guess = eap.scores(vit, [many], samples=samples, seed=seed)
        ratio = torch.cat([(guess[kind] / exact[kind]).flatten() for kind in KINDS])
        # A square of a projection has at most twice its mean's square as variance: 4 sigma of the mean over images
        assert (ratio - 1).abs().max() < 4.5 * (2 / (200 * samples)) ** 0.5
        assert (ratio - 1).abs().max() > 0.001, "random after all"


def test_samples_are_seeded_and_differ_from_batch_to_batch():
    vit = make("vit", depth=2)
    batch = data(vit)
    first, again, other = (eap.scores(vit, [batch], samples=2, seed=seed) for seed in (0, 0, 1))
    close(first, again, 0)
    assert not torch.allclose(first["head"], other["head"], rtol=1e-3)
    twice = eap.scores(vit, [batch, batch], samples=2)
    assert not torch.allclose(first["head"], twice["head"], rtol=1e-3)


@pytest.mark.parametrize("classes, samples", [(7, 0), (16, 0), (17, 4)])
def test_samples_left_to_it_are_exact_for_few_classes(classes, samples):
    vit = make("vit", depth=1, num_classes=classes)
    close(found(vit, "fisher"), found(vit, "fisher", samples=samples), 0)
    if samples:
        assert not torch.allclose(found(vit, "fisher")["head"], found(vit, "fisher", samples=0)["head"], rtol=1e-3)


# ---- the trap -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_kl_to_itself_is_zero_and_is_not_offered():
    """KL(p ‖ p_z) is smallest at z = 1: its gradient there is rounding, of which no ranking can be made."""
    vit = make("vit")
    x, _ = data(vit)
    gate = {kind: value.requires_grad_() for kind, value in components.ones(vit).items()}
    with components.gates(vit, gate):
        log_p = vit(x).log_softmax(dim=1)
    F.kl_div(log_p, log_p.detach(), reduction="batchmean", log_target=True).backward()
    fisher = found(vit, "fisher")
    for kind in KINDS:
        assert gate[kind].grad.abs().max() < 1e-14 < 1e-4 < fisher[kind].max()
    assert OBJECTIVES == ("fisher", "ce", "taylor", "ig")
    with pytest.raises(ValueError, match="objective is 'kl': expected one of fisher, ce, taylor, ig"):
        found(vit, "kl")


# ---- what is run ----------------------------------------------------------------------------------------------------


def test_the_task_loss_makes_fisher_ce_and_changes_ig():
    vit = make("vit", depth=2)
    close(found(vit, "fisher", use_task_loss=True), found(vit, "ce"), 0)
    for objective in ("ce", "taylor"):
        close(found(vit, objective, use_task_loss=True), found(vit, objective), 0)
    plain, task = (found(vit, "ig", use_task_loss=each, steps=2) for each in (False, True))
    assert not torch.allclose(plain["head"], task["head"], rtol=0.1)
    x, labels = data(vit)
    for objective, own in (("fisher", True), ("ig", True), ("ce", False), ("taylor", False)):
        score = eap.scores(vit, [(x, (labels + 1) % 7)], objective, steps=2)
        assert torch.equal(score["head"], found(vit, objective, steps=2)["head"]) == own, "who looks at the labels"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_do_not_matter(objective):
    vit = make("registers", depth=2)
    x, labels = data(vit, 6)
    whole = eap.scores(vit, [(x, labels)], objective, steps=2)
    for split in ([1, 5], [2, 2, 2], [1] * 6):
        parts = zip(x.split(split), labels.split(split), strict=True)
        close(eap.scores(vit, parts, objective, steps=2), whole, 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_run_in_evaluation_mode_and_left_as_it_was(objective, training):
    vit = make("vit", depth=2, proj_drop_rate=0.5, drop_path_rate=0.5).train(training)
    vit.blocks[0].attn.proj.requires_grad_(False)
    before = copy.deepcopy(vit)
    with torch.no_grad():
        score = eap.scores(vit, [(images(vit), LABELS[:3])], objective, steps=2)
    assert not any(value.requires_grad for value in score.values())
    assert {module.training for module in vit.modules()} == {training}
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert [p.requires_grad for p in vit.parameters()] == [p.requires_grad for p in before.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    close(score, eap.scores(make("vit", depth=2), [(images(vit), LABELS[:3])], objective, steps=2))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_that_do_not_exist_have_no_score(objective):
    small = remove(make("vit", depth=6), MIXED)
    score = found(small, objective, steps=2)
    for kind, there in components.exist(small).items():
        assert torch.equal(~score[kind].isnan(), there) and score[kind][there].abs().min() > 0
    score = found(make("scaled norms"), objective, steps=2)
    assert score["head"].isnan().all() and score["neuron"].isnan().all() and not score["attn"].isnan().any()


def test_no_images_no_scores():
    with pytest.raises(ValueError, match="batches are empty: expected at least one"):
        eap.scores(make("vit"), [])
    with pytest.raises(blocks.UnsupportedBlock, match="expected a timm VisionTransformer"):
        eap.scores(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1))])


# ---- plans ----------------------------------------------------------------------------------------------------------


def random_scores(vit: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Of both signs; NaN where there is no part."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(there.shape, generator=generator, dtype=torch.float64).where(there, torch.nan)
            for kind, there in components.exist(vit).items()}  # fmt: skip


@pytest.mark.parametrize("parts", [("head", "neuron"), KINDS, ("attn",)])
@pytest.mark.parametrize("group_size", [1, 50])
def test_keeping_everything_removes_nothing(parts, group_size):
    """Not even, where no head or neuron is left, the bias that still is added: what is no part stays."""
    for vit in (make("vit"), remove(make("vit", depth=6), MIXED)):
        plan = eap.plan(random_scores(vit), 1.0, parts=parts, group_size=group_size)
        assert same(remove(vit, plan), vit)


def test_the_largest_magnitudes_stay_whatever_their_sign():
    score = {"head": torch.tensor([[0.1, -5.0], [3.0, torch.nan], [-0.2, 2.0]]), "attn": torch.tensor([-3.0, 1.0, 2.0])}
    assert eap.plan(score, 0.4, parts=["head"]) == Plan(heads=[[1], [0], []])
    assert eap.plan(score, 0.6, parts=["head"]).heads == [[1], [0], [1]]
    assert eap.plan(score, 0.67, parts=["attn"]) == Plan(attn=[True, False, True])
    both = eap.plan(score, {"head": 0.2, "attn": 0.67}, parts=["head", "attn"])
    assert both == Plan(heads=[[1], [], []], attn=[True, False, True])


def test_equal_scores_fall_to_the_earlier():
    score = {"head": torch.ones(3, 3), "neuron": torch.zeros(3, 8)}
    assert eap.plan(score, 0.5) == Plan(heads=[[0, 1, 2], [0], []], neurons=[[*range(8)], [0, 1, 2, 3], []])


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.7, 0.6, 0.5, 0.29, 0.01])
def test_ratios_are_exact_counts(ratio):
    for vit, heads, neurons in ((make("vit"), 9, 576), (remove(make("vit", depth=6), MIXED), 6, 291)):
        plan = eap.plan(random_scores(vit), ratio).explicit(vit)
        for kept, total in ((plan.heads, heads), (plan.neurons, neurons)):
            assert sum(map(len, kept)) == max(1, int(ratio * total + 1e-9))


@pytest.mark.parametrize("family", ["vit", "layerscale", "registers"])
@pytest.mark.parametrize("group_size", [1, 32])
def test_one_ratio_costs_the_same_whatever_ranks(family, group_size):
    vit = make(family).float()
    x, labels = images(vit).float(), LABELS[:3]
    ranked = [random_scores(vit, seed) for seed in range(3)]
    ranked += [eap.scores(vit, [(x, labels)], objective, steps=1) for objective in OBJECTIVES]
    assert {value.dtype for score in ranked for value in score.values()} == {torch.float64}
    plans = [eap.plan(score, {"head": 0.5, "neuron": 0.7}, group_size=group_size) for score in ranked]
    assert len({costs.closed_form_macs(remove(vit, plan)) for plan in plans}) == 1
    assert len({plan.to_json() for plan in plans}) > 3, "and yet they differ"


def test_neurons_go_in_groups_by_the_magnitude_of_their_sum():
    """As `components.score` says of a group: to first order effects add up, 1 and −1 to nothing."""
    neurons = torch.tensor([[1.0, -1.0, 0.9, 0.9, 0.1], [0.0, 0.0, 0.0, -1.7, torch.nan]])
    assert eap.plan({"neuron": neurons}, 0.5, parts=["neuron"], group_size=2) == Plan(neurons=[[2, 3], [2, 3]])
    assert eap.plan({"neuron": neurons}, 0.6, parts=["neuron"], group_size=2) == Plan(neurons=[[2, 3, 4], [2, 3]])
    assert eap.plan({"neuron": neurons}, 0.8, parts=["neuron"], group_size=2).neurons == [[0, 1, 2, 3, 4], [2, 3]]
    assert eap.plan({"neuron": neurons}, 0.5, parts=["neuron"], group_size=9).neurons == [[0, 1, 2, 3, 4], []]


@pytest.mark.parametrize("group_size", [7, 64])
def test_kept_groups_are_those_of_components(group_size):
    vit = remove(make("vit", depth=6), MIXED)
    plan = eap.plan(random_scores(vit), 0.5, parts=["neuron"], group_size=group_size)
    parts = components.of(vit, group_size, ["neuron"])
    kept = [part for part in parts if {*part.units} <= {*plan.neurons[part.block]}]
    assert len(kept) == len(parts) // 2
    assert sum(len(part.units) for part in kept) == sum(map(len, plan.neurons)), "no group stays in part"


def test_scores_plan_and_removal_fit_together():
    small = remove(make("vit", depth=6), MIXED)
    plan = eap.plan(found(small, "fisher"), 0.5)
    x, smaller = images(small), remove(small, plan)
    removed = [part for part in components.of(small, 1, ("head", "neuron"))
               if part.units[0] not in (plan.heads if part.kind == "head" else plan.neurons)[part.block]]  # fmt: skip
    with components.gates(small, components.without(small, removed)):
        torch.testing.assert_close(smaller(x), small(x), rtol=0, atol=1e-12)
    worst = eap.plan({kind: 1 / score for kind, score in found(small, "fisher").items()}, 0.5)
    assert (smaller(x) - small(x)).norm() < 0.5 * (remove(small, worst)(x) - small(x)).norm(), "the right half stays"


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ({"keep_ratio": 0}, r"keep ratio is 0: expected a share in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"keep ratio is 1.5: expected a share"),
        ({"keep_ratio": float("nan")}, "keep ratio is nan: expected a share"),
        ({"keep_ratio": {"head": 0.5, "neuron": -1}}, "keep ratio is -1: expected a share"),
        ({"keep_ratio": {"head": 0.5}}, "neuron"),
        ({"keep_ratio": 0.5, "parts": ["layer"]}, r"parts are \['layer'\]: expected some of .*head"),
        ({"keep_ratio": 0.5, "parts": []}, r"parts are \(\): expected some of"),
        ({"keep_ratio": 0.5, "group_size": 0}, "group_size is 0: expected"),
        ({"keep_ratio": 0.5, "group_size": -2}, "group_size is -2: expected"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        eap.plan(random_scores(make("vit")), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how, fault", [({"samples": -1}, "samples is -1: expected"), ({"steps": 0}, "steps is 0: expected")]
)
def test_bad_numbers_are_one_clear_line(how, fault):
    with pytest.raises(ValueError, match=fault):
        found(make("vit", depth=1), "ig" if "steps" in how else "fisher", **how)


@pytest.mark.parametrize("objective", eap.OBJECTIVES)
def test_a_kind_that_is_gone_from_all_blocks_has_no_scores(objective):
    vit = remove(make("vit"), Plan(neurons=[[], [], []]))
    found = eap.scores(vit, [(images(vit, 4), torch.arange(4))], objective)
    assert found["neuron"].shape == (3, 0) and found["head"].isfinite().all() and (found["head"] != 0).any()
