"""The training loop against closed forms, scripted validations and what it must leave alone."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import DROPOUT, TINY

from lib import evaluate, losses, models, runs
from lib.augment import model_seed, normalise, step_generator
from lib.pruners.ucb import UCB
from lib.resume import States
from lib.train import Recipe, fit

pytestmark = pytest.mark.usefixtures("on_cpu")
RECIPE = Recipe(epochs=3, batch_size=7, learning_rate=1e-2, keep="last")  # three steps an epoch


@pytest.fixture
def on_cpu(monkeypatch):
    """Where training repeats bit for bit; accelerate decides once per process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


def plain(history: list[dict]) -> list[dict]:
    """The rows without what differs between equal runs."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Spy:
    """A loss that keeps what it was given."""

    def __init__(self):
        self.images, self.targets, self.values = [], [], []

    def __call__(self, model, images, targets):
        value, parts = losses.task(model, images, targets)
        self.images.append(images)
        self.targets.append(targets)
        self.values.append(value.item())
        return value, parts


def test_the_learning_rate_follows_its_closed_form():
    cosine = Recipe(epochs=10, batch_size=1, learning_rate=0.5, warmup_epochs=2)
    assert [cosine.rate(step, 2) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
    assert cosine.rate(4, 2) == 0.5 and cosine.rate(12, 2) == pytest.approx(0.25)
    assert cosine.rate(19, 2) == pytest.approx(0.25 * (1 + math.cos(math.pi * 15 / 16)))
    assert Recipe(1, 1, 0.5).rate(0, 7) == 0.5  # no warm-up: the peak at once
    steps = Recipe(6, 1, 1.0, schedule="milestones", milestones=(2, 4), decay=0.1, warmup_epochs=0.5)
    assert [steps.rate(step, 2) for step in (0, 3, 4, 7, 8, 11)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("changes", [{"schedule": "cosin"}, {"precision": "fp16"}, {"keep": "lst"}])
def test_a_recipe_refuses_unknown_choices(changes):
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}': expected one of"):
        replace(RECIPE, **changes)


def test_a_recipe_refuses_a_warm_up_that_never_ends():
    with pytest.raises(ValueError, match="warmup_epochs is 3: expected less than all of 3 epochs"):
        replace(RECIPE, warmup_epochs=3)
    assert replace(RECIPE, epochs=0, warmup_epochs=3).epochs == 0, "of nothing it is no part"


@pytest.mark.parametrize("milestones", [(3,), (1, 80)])
def test_a_recipe_refuses_milestones_that_never_come(milestones):
    with pytest.raises(ValueError, match=f"milestones hold {milestones[-1]}: expected epochs before the last of 3"):
        replace(RECIPE, schedule="milestones", milestones=milestones)


def test_hooks_run_in_their_places(make_run, tiny, vit):
    """Between the clipped gradient and the step, after the step, and once an epoch after its last step."""
    seen = []

    def on_gradient(model, step):
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert norm == pytest.approx(1e-3, rel=1e-3)
        for parameter in model.parameters():
            parameter.grad.zero_()  # what the hook leaves is what the optimiser takes
        seen.append(("gradient", step))

    recipe = replace(RECIPE, epochs=2, optimizer="sgd", weight_decay=0.0, clip_norm=1e-3)
    before = weights(vit)
    history = fit(vit, tiny, recipe, run=make_run(), on_gradient=on_gradient,
                  on_step=lambda model, step: seen.append(("step", step)),
                  watch=lambda model, step: {"watched": float(step)})  # fmt: skip
    assert same(before, weights(vit))
    assert seen == [(what, step) for step in range(6) for what in ("gradient", "step")]
    assert [row["watched"] for row in history] == [2, 5]


def test_history_says_what_happened(make_run, tiny, vit):
    run, spy, steps = make_run(), Spy(), []
    history = fit(vit, tiny, RECIPE, run=run, loss=spy, on_step=lambda model, step: steps.append((model is vit, step)))
    assert steps == [(True, step) for step in range(9)]
    assert [row["epoch"] for row in history] == [1, 2, 3] and {row["n_val"] for row in history} == {9}
    assert [row["learning_rate"] for row in history] == [RECIPE.rate(step, 3) for step in (2, 5, 8)]
    means = np.reshape(spy.values, (3, 3)).mean(axis=1)
    assert [row["train_loss"] for row in history] == pytest.approx(list(means))
    assert [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()] == history
    shown = evaluate.predict(vit, tiny.val, mean=tiny.mean, std=tiny.std)
    assert history[-1]["val_nll_nats"] == pytest.approx(float(F.cross_entropy(*shown)))


def test_an_epoch_shows_every_image_at_most_once_in_a_new_order(make_run, tiny, vit):
    numbered = SimpleNamespace(images=tiny.train.images, labels=np.arange(24) % 3)
    data, spy = replace(tiny, train=numbered), Spy()
    fit(vit, data, replace(RECIPE, epochs=2), run=make_run(), loss=spy)
    sums = torch.cat(spy.images).double().sum(dim=(1, 2, 3)).reshape(2, 21)
    assert all(len(set(epoch.tolist())) == 21 for epoch in sums)
    assert sums[0].tolist() != sums[1].tolist()


def test_equal_seeds_train_equal_models(make_run, tiny):
    def train(seed, workers=0):
        torch.manual_seed(0)
        model = models.create("vit_digits", 3, **TINY, **DROPOUT)
        recipe = replace(RECIPE, epochs=2, seed=seed, augment="strong", num_workers=workers)
        history = fit(model, tiny, recipe, run=make_run(run_name=f"{seed}-{workers}", resume=False))
        return plain(history), model.state_dict()

    (history, ended), (again, same_end), (_, other) = train(0), train(0, workers=2), train(1)
    assert history == again and same(ended, same_end) and not same(ended, other)


def test_targets_are_labels_unless_softened(make_run, tiny, vit):
    spies = {}
    for name, changes in {"plain": {}, "smooth": {"label_smoothing": 0.3}, "mixed": {"mixup": 0.8}}.items():
        spies[name] = Spy()
        history = fit(vit, tiny, replace(RECIPE, epochs=1, **changes), run=make_run(run_name=name), loss=spies[name])
        assert math.isfinite(history[0]["train_loss"])
    hard, smooth, mixed = (torch.cat(spy.targets) for spy in spies.values())
    assert hard.dtype == torch.int64 and hard.shape == (21,)
    assert torch.allclose(smooth, F.one_hot(hard, 3) * 0.7 + 0.1)
    assert torch.allclose(mixed.sum(dim=1), torch.ones(21)) and (mixed.max(dim=1).values < 1).any()


def test_training_images_are_augmented_and_validation_images_never(make_run, tiny, vit, monkeypatch):
    judged, predict = [], evaluate.predict

    def spy_predict(model, split, **options):
        hook = model.register_forward_pre_hook(lambda _, args: judged.append(args[0]))
        with hook:
            return predict(model, split, **options)

    monkeypatch.setattr(evaluate, "predict", spy_predict)
    expected = {
        name: normalise(torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255, tiny.mean, tiny.std)
        for name, split in {"train": tiny.train, "val": tiny.val}.items()
    }
    for augment, kept in {"none": True, "crop-flip": False}.items():
        spy = Spy()
        recipe = replace(RECIPE, epochs=1, augment=augment)
        fit(vit, tiny, recipe, run=make_run(run_name=augment), loss=spy)
        assert torch.equal(judged.pop(), expected["val"]) and not judged
        shown = torch.cat(spy.images)
        assert kept == all((expected["train"] == image).all(dim=(1, 2, 3)).any() for image in shown)


def test_every_step_draws_its_own_augmentation(make_run, tiny, vit):
    data, spy = replace(tiny, train=tiny.train.take(np.zeros(6, int))), Spy()  # one image, six times
    fit(vit, data, replace(RECIPE, epochs=2, batch_size=2, augment="strong"), run=make_run(), loss=spy)
    assert len({image.sum().item() for image in torch.cat(spy.images)}) == 12


@pytest.fixture
def scripted(monkeypatch):
    """Validations that answer (top1, nll) in turn."""

    def script(*scores):
        answers = iter(scores)

        def classification(logits, labels):
            top1, nll = next(answers)
            return {"top1": top1, "nll_nats": nll, "n": len(labels)}

        monkeypatch.setattr(evaluate, "classification", classification)

    return script


@pytest.mark.parametrize(
    "keep, scores, epoch",
    [
        ("best", [(0.2, 1.0), (0.9, 1.0), (0.5, 0.1)], 2),
        ("best", [(0.9, 1.0), (0.9, 0.5), (0.9, 0.6)], 2),  # equal accuracy: the likelihood decides
        ("best", [(0.9, 0.5), (0.9, 0.5), (0.2, 0.1)], 1),  # equal in both: the first
        ("last", [(0.2, 1.0), (0.9, 1.0), (0.5, 0.1)], 3),
    ],
)
def test_it_ends_with_the_weights_it_was_asked_to_keep(make_run, tiny, vit, scripted, keep, scores, epoch):
    scripted(*scores)
    seen = []
    fit(vit, tiny, replace(RECIPE, keep=keep), run=make_run(), on_step=lambda model, _: seen.append(weights(model)))
    assert same(vit.state_dict(), seen[3 * epoch - 1])


def test_it_stops_after_epochs_without_a_better_validation(make_run, tiny, vit, scripted):
    scripted(*[(top1, 1.0) for top1 in (0.5, 0.4, 0.9, 0.9, 0.8, 0.95, 0.97)])
    recipe = replace(RECIPE, epochs=7, patience=2)
    history = fit(vit, tiny, recipe, run=make_run())
    assert fit(vit, tiny, recipe, run=make_run(), on_step=lambda *_: pytest.fail("went on")) == history
    assert [row["val_top1"] for row in history] == [0.5, 0.4, 0.9, 0.9, 0.8]


def test_without_patience_it_never_stops_early(make_run, tiny, vit, scripted):
    scripted((0.5, 1.0), (0.4, 1.0), (0.3, 1.0))
    assert len(fit(vit, tiny, RECIPE, run=make_run())) == 3


def test_averaged_weights_follow_their_recurrence(make_run, tiny, vit):
    seen = []
    recipe = replace(RECIPE, ema_decay=0.8)
    history = fit(vit, tiny, recipe, run=make_run(), on_step=lambda model, _: seen.append(weights(model)))
    average = seen[1]  # timm's average follows the weights themselves for the first two steps
    for now in seen[2:]:
        average = {name: 0.8 * average[name] + 0.2 * now[name] for name in now}
    ended = vit.state_dict()
    assert all(torch.allclose(ended[name], average[name], atol=1e-6) for name in ended)
    assert not torch.allclose(ended["head.weight"], seen[-1]["head.weight"], atol=1e-6)
    shown = evaluate.predict(vit, tiny.val, mean=tiny.mean, std=tiny.std)  # the average is what was validated
    assert history[-1]["val_nll_nats"] == pytest.approx(float(F.cross_entropy(*shown)))


def test_counts_are_not_averaged(make_run, tiny, vit):
    counts = []
    for decay in (0.0, 0.9):
        model = UCB(copy.deepcopy(vit), 0.5)
        fit(model, tiny, replace(RECIPE, ema_decay=decay), run=make_run(run_name=f"ema{decay}"))
        counts.append(model.ucb_count_scores)
        assert int(model.steps) == 9
    assert torch.equal(*counts) and counts[0].max() > 1


def nan_at(step: int):
    calls = iter(range(100))

    def loss(model, images, targets):
        value, parts = losses.task(model, images, targets)
        return (value * math.nan if next(calls) == step else value), parts

    return loss


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_state(make_run, tiny, vit):
    recipe, begun = replace(RECIPE, save_minutes=0), copy.deepcopy(vit)
    history = fit(vit, tiny, recipe, run=make_run(run_name="whole"))
    broken, seen = copy.deepcopy(begun), []
    with pytest.raises(FloatingPointError, match="not finite at step 4"):
        fit(broken, tiny, recipe, run=make_run(), loss=nan_at(4), on_step=lambda m, step: seen.append(weights(m)))
    assert len(seen) == 4 and same(broken.state_dict(), seen[3])
    state = States(make_run().dir / "last").newest()
    assert state["progress"]["batch"] == 1 and same(state["modules"]["model"], seen[3])
    assert plain(fit(broken, tiny, recipe, run=make_run())) == plain(history)
    assert same(broken.state_dict(), vit.state_dict())


def test_a_training_that_failed_before_it_saved_begins_anew_with_the_same_model(make_run, tiny, vit):
    broken, begun = copy.deepcopy(vit), weights(vit)
    fit(vit, tiny, RECIPE, run=make_run(run_name="whole"))
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fit(broken, tiny, RECIPE, run=make_run(), loss=nan_at(2))
    assert same(broken.state_dict(), begun) and not same(vit.state_dict(), begun)
    fit(broken, tiny, RECIPE, run=make_run())
    assert same(broken.state_dict(), vit.state_dict())


def test_a_gradient_that_is_not_finite_stops_too(make_run, tiny, vit):
    before = weights(vit)

    def loss(model, images, targets):
        return (0 * model(images).sum()).sqrt(), {}  # zero, with an infinite slope

    with pytest.raises(FloatingPointError, match="loss or gradient is not finite at step 0"):
        fit(vit, tiny, RECIPE, run=make_run(), loss=loss)
    assert same(vit.state_dict(), before)


def test_clipping_bounds_the_step_and_zero_is_no_clipping(make_run, tiny, vit):
    def moved(clip_norm, scale):
        model = copy.deepcopy(vit)
        recipe = Recipe(1, 24, 0.1, optimizer="sgd", weight_decay=0.0, clip_norm=clip_norm, keep="last")
        task = lambda *args: (scale * losses.task(*args)[0], {})  # noqa: E731
        fit(model, tiny, recipe, run=make_run(run_name=f"{clip_norm}-{scale}"), loss=task)
        change = [(a - b).flatten() for a, b in zip(model.parameters(), vit.parameters(), strict=True)]
        return torch.cat(change).norm().item()

    assert moved(1e-3, 1) == pytest.approx(0.1 * 1e-3 * 1.9, rel=1e-2)  # Nesterov's first step is 1 + momentum
    assert moved(1e-3, 50) == pytest.approx(0.1 * 1e-3 * 1.9, rel=1e-2)
    assert moved(0, 50) == pytest.approx(50 * moved(0, 1), rel=1e-2) and moved(0, 1) > 10 * moved(1e-3, 1)


def test_a_batch_larger_than_the_dataset_is_the_dataset(make_run, tiny, vit):
    spy = Spy()
    fit(vit, tiny, replace(RECIPE, epochs=2, batch_size=1000), run=make_run(), loss=spy)
    assert [len(images) for images in spy.images] == [24, 24]


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.5, "cutmix": 0.5}, {"precision": "bf16"}])
def test_a_batch_of_one_trains(make_run, tiny, vit, changes):
    few = replace(tiny, train=tiny.train.take(np.arange(3)))
    [row] = fit(vit, few, replace(RECIPE, epochs=1, batch_size=1, **changes), run=make_run())
    assert math.isfinite(row["train_loss"])


def test_bf16_trains_in_bf16_and_leaves_the_model_as_it_was(make_run, tiny, vit):
    types = set()

    def loss(model, images, targets):
        logits = model(images)
        types.add(logits.dtype)
        return F.cross_entropy(logits, targets), {}

    history = fit(vit, tiny, replace(RECIPE, precision="bf16"), run=make_run(), loss=loss)
    assert types == {torch.bfloat16} and history[-1]["train_loss"] < history[0]["train_loss"]
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    bare = models.create("vit_digits", 3, **TINY)
    bare.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 12, 12)
    assert "forward" not in vars(vit) and torch.equal(vit.eval()(images), bare.eval()(images))
    fit(bare, tiny, RECIPE, run=make_run(run_name="next"))  # another precision, in the same process


@pytest.mark.parametrize("optimizer, rate", [("adamw", 1e-2), ("sgd", 5e-2), ("muon", 2e-2)])
def test_optimizers_learn(make_run, tiny, vit, optimizer, rate):
    recipe = replace(RECIPE, epochs=6, optimizer=optimizer, learning_rate=rate)
    history = fit(vit, tiny, recipe, run=make_run())
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_without_images_to_train_or_judge_is_named(make_run, tiny, vit, split):
    data = replace(tiny, **{split: getattr(tiny, split).take(np.arange(0))})
    with pytest.raises(ValueError, match="dataset tiny.h5: training needs train and val images"):
        fit(vit, data, RECIPE, run=make_run())


def test_no_epochs_leave_the_weights_alone(make_run, tiny, vit):
    before = weights(vit)
    assert fit(vit, tiny, replace(RECIPE, epochs=0, keep="best"), run=make_run()) == []
    assert same(vit.state_dict(), before)


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_a_finished_training_returns_at_once_with_the_same(make_run, tiny, vit, scripted, keep, ema_decay):
    scripted((0.2, 1.0), (0.9, 1.0), (0.5, 0.1))
    recipe, begun = replace(RECIPE, keep=keep, ema_decay=ema_decay), copy.deepcopy(vit)
    history = fit(vit, tiny, recipe, run=make_run())
    rows = (make_run().dir / "metrics.jsonl").read_text()
    again = fit(begun, tiny, recipe, run=make_run(), on_step=lambda *_: pytest.fail("trained again"))
    assert again == history and same(begun.state_dict(), vit.state_dict())
    assert (make_run().dir / "metrics.jsonl").read_text() == rows


def test_a_training_does_not_go_on_with_other_images(make_run, tiny, vit):
    first = copy.deepcopy(vit)
    fit(vit, tiny, RECIPE, run=make_run())
    other = replace(tiny, train=tiny.test, test=tiny.train, digest="0" * 64)  # as a folder with new images would split
    with pytest.raises(runs.RunError, match=r"a training on other images of tiny.h5 than now: .*start anew") as caught:
        fit(first, other, RECIPE, run=make_run())
    assert "\n" not in str(caught.value)


def test_a_training_does_not_go_on_with_another_model(make_run, tiny, vit):
    """The one it began with may have been remade since: the notebook would describe that one."""
    first = copy.deepcopy(vit)
    fit(vit, tiny, RECIPE, run=make_run())
    with torch.no_grad():
        first.head.bias[0] += 1
    with pytest.raises(runs.RunError, match=r"a training of another model than now: .*start anew") as caught:
        fit(first, tiny, RECIPE, run=make_run())
    assert "\n" not in str(caught.value)


def test_what_a_model_draws_is_independent_of_how_its_images_are_augmented(make_run, tiny, vit):
    """Of two generators seeded alike the k-th numbers are the same: dropped would be what is flipped."""
    drawn = []

    def loss(model, images, targets):
        drawn.append(torch.rand(64).tolist())
        return losses.task(model, images, targets)

    fit(vit, tiny, replace(RECIPE, seed=3), run=make_run(), loss=loss)
    assert len({tuple(each) for each in drawn}) == len(drawn) == 9, "every step draws anew"
    for step, each in enumerate(drawn):
        draw = step_generator(3, step // 3, step % 3)
        assert not {*each} & {*torch.rand(64, generator=draw).tolist()}
        assert each == torch.rand(64, generator=torch.manual_seed(model_seed(3, step // 3, step % 3))).tolist()
