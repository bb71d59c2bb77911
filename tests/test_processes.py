"""A training that several processes share: the weights of one, whatever it trains and wherever it is stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY

from lib import augment, data, losses, models, processes, runs, tickets
from lib.pruners import units
from lib.pruners.avit import AViT
from lib.pruners.lottery import Growing
from lib.pruners.ucb import UCB
from lib.train import Recipe, fit

ROOT = Path(__file__).resolve().parents[1]
# Of 24 images in batches of eight; SGD, since Adam makes much of rounding. No dropout: processes draw it on their own.
RECIPE = Recipe(
    epochs=2, batch_size=8, learning_rate=0.05, optimizer="sgd", augment="strong", mixup=0.3, cutmix=0.3,
    label_smoothing=0.1, ema_decay=0.5, keep="last", seed=3,
)  # fmt: skip


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **TINY)
    if kind == "ucb":
        return UCB(vit, 0.5, beta=0.5, warmup_steps=1)
    return AViT(vit, 3.0, -4.0) if kind == "avit" else vit


def hooks(kind: str, vit: torch.nn.Module, folder: Path) -> dict:
    if kind == "avit":
        return {"loss": losses.halting(0.1, 0.1, 1.5, teacher=make("dense"), distill_weight=0.5)}
    if kind != "growing":
        return {}
    out = {name: torch.arange(weight.numel()).view_as(weight) % 3 == 0 for name, weight in units.prunable(vit).items()}
    growing = Growing(out, 2.0, 6)
    saved = partial(tickets._save_at, 2, folder / "rewind")
    return {"on_gradient": growing, "watch": partial(tickets._watch, growing), "on_step": saved}


def train(kind: str, folder: Path, tiny_h5: Path, **changes) -> tuple[dict, list[dict]]:
    """Weights and history of a training on the CPU."""
    model, images = make(kind), data.load(tiny_h5, root=folder.parent)
    recipe = replace(RECIPE, mixup=0.0, cutmix=0.0) if kind == "avit" else RECIPE
    folder.mkdir(parents=True, exist_ok=True)
    history = fit(model, images, replace(recipe, **changes), run=runs.Part(kind, folder), **hooks(kind, model, folder))
    return model.state_dict(), [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same(found: tuple[dict, list[dict]], expected: tuple[dict, list[dict]]) -> None:
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: name + text)
    assert len(found[1]) == len(expected[1])
    for row, other in zip(found[1], expected[1], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # where the losses of this file are found


@pytest.mark.parametrize("kind", ["dense", "ucb", "avit", "growing"])
def test_two_processes_are_one_with_twice_the_batch(kind, tmp_path, tiny_h5):
    one, two = (train(kind, tmp_path / str(number), tiny_h5, num_processes=number) for number in (1, 2))
    same(two, one)
    start = make(kind).state_dict()
    moved = {name for name, value in one[0].items() if (value.double() - start[name]).abs().max() > 1e-3}
    assert len(moved) > 0.5 * len(start), "rounding is told from learning"
    if kind == "ucb":
        assert one[0]["ucb_count_scores"].max() > 2 and one[0]["steps"] == 6
    if kind == "growing":
        assert (tmp_path / "2" / "rewind.safetensors").exists() and one[1][-1]["lambda"] == 2.0
    assert [path.name for path in (tmp_path / "2").glob(".*")] == [], "job and answer are gone"


def test_a_gate_that_halts_early_is_shared_too(tmp_path, tiny_h5):
    rows = train("avit", tmp_path / "1", tiny_h5)[1]
    assert 1 < rows[-1]["train_depth"] < 2, "else the halting losses would say nothing"


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_any_number_goes_on_from_any_others_state(numbers, tmp_path, tiny_h5):
    whole = train("ucb", tmp_path / "whole", tiny_h5)
    folder = tmp_path / "part"
    train("ucb", folder, tiny_h5, num_processes=numbers[0], epochs=2, patience=0, save_minutes=0.0)
    # back to the state before the last: five of six steps
    states = sorted((folder / "last").glob("state-*.pt"))
    states[-1].unlink()
    before = torch.load(states[-2], weights_only=True)["progress"]
    assert (before["epoch"], before["batch"]) == (1, 3)
    same(train("ucb", folder, tiny_h5, num_processes=numbers[1]), whole)


SCRIPT = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import lib, test_processes
found = test_processes.train("dense", Path({folder!r}), Path({h5!r}), num_processes=2, epochs=400, save_minutes=60.0)
"""


def stopped_after(number: int, folder: Path, tiny_h5: Path) -> subprocess.Popen:
    """A training by two processes that gets a signal in its first epochs, when all of it has ended."""
    code = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), h5=str(tiny_h5))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waited = time.monotonic()
    while not list(folder.glob("last/state-*.pt")):
        assert parent.poll() is None and time.monotonic() - waited < 300, parent.communicate()[0]
        time.sleep(0.1)
    parent.send_signal(number)
    return parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_one_that_waits_all_save_and_end(number, tmp_path, tiny_h5):
    folder = tmp_path / "run"
    parent = stopped_after(number, folder, tiny_h5)
    said = parent.communicate(timeout=300)[0]  # their output is open until the last of them has ended
    assert parent.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], said
    if number != signal.SIGKILL:
        assert "the state is saved" in said
    deadline = time.monotonic() + 120
    while training_in(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not training_in(folder)
    newest = torch.load(sorted((folder / "last").glob("state-*.pt"))[-1], weights_only=True)["progress"]
    assert 0 < newest["epoch"] < 400
    rows = len((folder / "metrics.jsonl").read_text().splitlines())
    assert rows == newest["epoch"]


def training_in(folder: Path) -> list[str]:
    """The processes that share a training in a folder."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if "lib.train" in line and str(folder) in line and str(os.getpid()) not in line]


class Wrong:
    """A loss that is not finite, or not a loss, from its fourth call on."""

    def __init__(self, how: str):
        self.how, self.calls = how, 0

    def __call__(self, model, images, targets):
        self.calls += 1
        if self.calls > 3 and self.how == "raises on one" and os.environ["RANK"] == "1":
            raise LookupError("the second process found nothing")
        value, parts = losses.task(model, images, targets)
        return value * (float("nan") if self.calls > 3 and self.how == "nan" else 1), parts


def test_what_a_process_raises_is_raised_here(tmp_path, tiny_h5, monkeypatch):
    images, recipe = data.load(tiny_h5, root=tmp_path), replace(RECIPE, num_processes=2)

    def go(loss, **changes):
        shutil.rmtree(tmp_path / "last", ignore_errors=True)  # of the epoch before
        fit(make("dense"), images, replace(recipe, **changes), run=runs.Part("t", tmp_path), loss=loss)

    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        go(Wrong("nan"))
    with pytest.raises(LookupError, match="the second process found nothing"):
        go(Wrong("raises on one"))
    with pytest.raises(ValueError, match="batch_size is 9: expected a multiple of num_processes, 2"):
        go(losses.task, batch_size=9)
    with pytest.raises(ValueError, match="cannot be handed this training .*use num_processes=1"):
        go(lambda *_: None)
    # found here under a name that the other processes do not find, as what a notebook defines is
    elsewhere = type("Elsewhere", (Wrong,), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Elsewhere", elsewhere, raising=False)
    with pytest.raises(ValueError, match="cannot be handed this training .*Elsewhere.*use num_processes=1"):
        go(elsewhere("not found"))
    assert [path.name for path in tmp_path.glob(".*")] == []


class Counted(Wrong):
    """A loss that leaves a line in a file for each of its calls by the first process, and is right."""

    def __init__(self, file: Path):
        super().__init__("")
        self.file = file

    def __call__(self, model, images, targets):
        if os.environ["RANK"] == "0":
            self.file.open("a").write("step\n")
        return super().__call__(model, images, targets)


def test_what_processes_saved_they_go_on_from(tmp_path, tiny_h5):
    """Begun anew it would end with the same weights, only later."""
    images, recipe, run = data.load(tiny_h5, root=tmp_path), replace(RECIPE, num_processes=2), runs.Part("t", tmp_path)
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        fit(make("dense"), images, recipe, run=run, loss=Wrong("nan"))
    fit(make("dense"), images, recipe, run=run, loss=Counted(tmp_path / "steps"))
    assert (tmp_path / "steps").read_text() == 3 * "step\n", "the second of two epochs"


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="num_processes is 3: expected at most one for each of 2 GPUs"):
        processes.launch({}, 3, tmp_path)


@pytest.mark.parametrize(("total", "world"), [(8, 1), (8, 2), (8, 4), (12, 3), (9, 1), (9, 3), (6, 2)])
def test_processes_share_a_batch_without_rest(total, world):
    shares = [augment.places(total, rank, world) for rank in range(world)]
    assert torch.cat(shares).sort().values.tolist() == list(range(total))
    assert {len(share) for share in shares} == {total // world}
    if world == 1:
        assert shares[0].tolist() == list(range(total)), "one process sees a batch in its order"


@pytest.mark.parametrize("policy", ["strong", "shift", "crop-flip"])
def test_shares_are_augmented_and_mixed_as_the_whole(policy):
    images, labels = torch.rand(8, 3, 12, 12, dtype=torch.float64), torch.arange(8) % 3
    draw = partial(augment.step_generator, 0, 1, 2)

    def both(images, labels, generator):
        return augment.mix(augment.Augment(policy)(images, generator), labels, 3, 0.5, 0.5, 0.1, generator)

    whole = both(images, labels, draw())
    for rank in range(2):
        places = augment.places(8, rank, 2)
        part = both(images[places], labels[places], augment.Share(draw(), 8, places))
        for one, other in zip(part, whole, strict=True):
            torch.testing.assert_close(one.double(), other[places].double(), rtol=0, atol=1e-12)
