"""A training that is killed at any moment and started again ends as if nothing had happened, bit for bit.

Every training here is a process of its own. They are forked from a server that has imported torch but never used it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import DROPOUT, TINY, tiny_run

from lib import data, evaluate, models, runs
from lib.pruners.ucb import UCB
from lib.resume import States, defer_signals
from lib.train import Recipe, fit

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_resume", "torchmetrics.functional.classification"])

# Three steps an epoch, nine in all; dropout, stochastic depth, augmentation, MixUp and an average are on.
RECIPE = Recipe(
    epochs=3, batch_size=7, learning_rate=5e-3, warmup_epochs=0.5, label_smoothing=0.1, ema_decay=0.7,
    augment="strong", mixup=0.2, save_minutes=0.0,
)  # fmt: skip
RECIPES = {
    "dense": RECIPE,
    "dense muon bf16": replace(RECIPE, optimizer="muon", precision="bf16", keep="last"),
    "dense sgd, no average": replace(RECIPE, optimizer="sgd", learning_rate=0.02, ema_decay=0.0),
    "ucb": replace(RECIPE, keep="last"),
    "ucb gather": RECIPE,
    "frozen": RECIPE,
}


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = models.create("vit_digits", 3, **TINY, **DROPOUT)
    if kind == "ucb":
        return UCB(vit, 0.5, beta=0.5, warmup_steps=2)
    if kind == "ucb gather":
        return UCB(vit, 0.7, mode="gather")
    if kind == "frozen":
        model = UCB(vit, 0.5)
        model.ucb_count_scores += torch.rand_like(model.ucb_count_scores)
        return model.freeze(0.4)
    return vit


# ---- moments to end at: armed in the training process before it starts ---------------------------------------------


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def at_call(owner, name: str, count: int, number: int = signal.SIGKILL) -> None:
    """The process gets signal `number` right after the count-th call of owner.name."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == count:
            kill(number)
        return result

    setattr(owner, name, wrapped)


def half_a_state(number: int) -> None:
    """The process dies when half of state `number` is on disk."""
    save = torch.save

    def halved(content, path):
        save(content, path)
        if f"state-{number:08d}" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            kill(signal.SIGKILL)

    torch.save = halved


in_a_step = partial(at_call, Accelerator, "clip_grad_norm_", 5)  # after the backward pass of step 4


def in_evaluation(number: int = signal.SIGKILL) -> None:
    at_call(evaluate, "predict", 2, number)  # after its forward passes, before the scores


# name: how to die, which steps go on, changes of the recipe. A state is written after every step and every epoch, so
# the sixth (state-00000005) is that after step 4.
MOMENTS = {
    "in a step": (in_a_step, [4, 5, 6, 7, 8], {}),
    "in a step, epochs saved": (in_a_step, [3, 4, 5, 6, 7, 8], {"save_minutes": 60.0}),
    "after a save": (partial(at_call, States, "write", 6), [5, 6, 7, 8], {}),
    "half of a state written": (partial(half_a_state, 5), [4, 5, 6, 7, 8], {}),
    "best written, state not": (partial(at_call, States, "write_best", 1), [3, 4, 5, 6, 7, 8], {}),
    "evaluating": (in_evaluation, [6, 7, 8], {}),
    "logged, state not": (partial(at_call, runs.Run, "log", 3), [], {}),
    "finished": (partial(at_call, States, "write", 12), [], {}),
}


def train(kind: str, folder: Path, tiny_h5: Path, moment=None, **changes) -> None:
    """The training process. Leaves result.pt with the steps it ran, history and weights; exits 130 on Ctrl-C."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stdout.txt", "a") as log, contextlib.redirect_stdout(log):
        images, model, steps = data.load(tiny_h5, root=tiny_h5.parent), make(kind), []
        run = tiny_run(folder)
        if moment:
            moment()
        recipe = replace(RECIPES[kind], **changes)
        try:
            history = fit(model, images, recipe, run=run, on_step=lambda _, step: steps.append(step))
        except KeyboardInterrupt:
            sys.exit(130)
        torch.save({"steps": steps, "history": history, "weights": model.state_dict()}, folder / "result.pt")


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(tiny, tiny_h5):
    """train(kind, folder, …) in a process of its own: its exit code, negative for a signal."""
    with pytest.MonkeyPatch.context() as patch:  # the server finds this module by PYTHONPATH alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()

    def run(kind: str, folder: Path, moment=None, **changes) -> int:
        child = CONTEXT.Process(target=train, args=(kind, folder, tiny_h5, moment), kwargs=changes)
        child.start()
        child.join(120)
        assert child.exitcode is not None
        return child.exitcode

    return run


@pytest.fixture(scope="module")
def whole(process, tmp_path_factory):
    """The results of trainings that nothing interrupted."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole")
            assert process(kind, made[kind]) == 0
        return made[kind]

    return get


def rows(text: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def check_same(folder: Path, whole: Path, steps: list[int]) -> None:
    """The training in `folder` ran these steps last, and ended like the uninterrupted one."""
    found, expected = (torch.load(path / "result.pt", weights_only=True) for path in (folder, whole))
    assert found["steps"] == steps and expected["steps"] == list(range(9))
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in found["weights"].items())
    lines = ["\n".join(map(json.dumps, result["history"])) for result in (found, expected)]
    lines += [(path / "tiny" / "run" / "metrics.jsonl").read_text() for path in (folder, whole)]
    assert all(rows(text) == rows(lines[0]) for text in lines)
    left = {path.name for path in (folder / "tiny" / "run").rglob("*") if path.is_file()}
    assert left == {"lock", "lock.pid", "params.json", "metrics.jsonl", "best.pt", *states(folder)}


def states(folder: Path) -> list[str]:
    names = sorted(path.name for path in (folder / "tiny" / "run" / "last").glob("state-*.pt"))
    assert len(names) == 2
    return names


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["dense", "ucb", "frozen"])
def test_killed_at_any_moment_it_ends_the_same(process, whole, tmp_path, kind, moment):
    arm, steps, changes = MOMENTS[moment]
    assert process(kind, tmp_path, arm, **changes) == -signal.SIGKILL
    assert process(kind, tmp_path, **changes) == 0
    assert "cannot be read" not in (tmp_path / "stdout.txt").read_text()  # no state was half there under its name
    check_same(tmp_path, whole(kind), steps)


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind not in ("dense", "ucb", "frozen")])
def test_other_optimizers_precisions_and_modes_go_on_too(process, whole, tmp_path, kind):
    assert process(kind, tmp_path, in_a_step) == -signal.SIGKILL
    assert process(kind, tmp_path) == 0
    check_same(tmp_path, whole(kind), [4, 5, 6, 7, 8])


def test_killed_again_and_again_it_ends_the_same(process, whole, tmp_path):
    for _ in range(4):  # every process gets as far as one more step, or into the next epoch's evaluation
        assert process("ucb", tmp_path, partial(at_call, States, "write", 2)) == -signal.SIGKILL
    assert process("ucb", tmp_path) == 0
    check_same(tmp_path, whole("ucb"), [6, 7, 8])


@pytest.mark.parametrize(
    "arm, steps", [(in_a_step, [5, 6, 7, 8]), (in_evaluation, [6, 7, 8])], ids=["in a step", "evaluating"]
)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_asked_to_stop_it_saves_first(process, whole, tmp_path, arm, steps, number, code):
    assert process("dense", tmp_path, partial(arm, number=number), save_minutes=60.0) == code
    said = (tmp_path / "stdout.txt").read_text().splitlines()
    assert said[-1] == "stopped on request: the state is saved, the same command goes on from here"
    assert process("dense", tmp_path, save_minutes=60.0) == 0
    check_same(tmp_path, whole("dense"), steps)


@pytest.mark.parametrize("damage", ["empty", "half", "other", "text"])
def test_a_damaged_state_falls_back_to_the_one_before(process, whole, tmp_path, damage):
    assert process("ucb", tmp_path, partial(at_call, States, "write", 6)) == -signal.SIGKILL
    newest = tmp_path / "tiny" / "run" / "last" / states(tmp_path)[-1]
    content = newest.read_bytes()
    newest.write_bytes({"empty": b"", "half": content[: len(content) // 2], "other": b"\0" * 999, "text": b"x"}[damage])
    assert process("ucb", tmp_path) == 0
    said = [line for line in (tmp_path / "stdout.txt").read_text().splitlines() if "cannot be read" in line]
    assert len(said) == 1 and said[0].startswith(f"{newest} cannot be read (")
    check_same(tmp_path, whole("ucb"), [4, 5, 6, 7, 8])


def test_without_a_readable_state_it_starts_anew(process, whole, tmp_path):
    assert process("ucb", tmp_path, partial(at_call, States, "write", 6)) == -signal.SIGKILL
    for name in states(tmp_path):
        (tmp_path / "tiny" / "run" / "last" / name).write_bytes(b"")
    assert process("ucb", tmp_path) == 0
    check_same(tmp_path, whole("ucb"), list(range(9)))


SCRIPT = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_resume
write = test_resume.States.write
def slow(self, *args):
    write(self, *args)
    print("saved", file=sys.stderr, flush=True)
    sys.stdin.readline()  # the test decides how long a save takes
test_resume.States.write = slow
test_resume.train("dense", Path({folder!r}), Path({tiny_h5!r}))
"""


def test_sigterm_from_outside_ends_a_script_with_143(process, whole, tmp_path, tiny_h5):
    code = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), tiny_h5=str(tiny_h5))
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stderr=-1, text=True) as script:
        while not (line := script.stderr.readline()).endswith("saved\n"):
            assert line, "the script ended before its first save"
        script.send_signal(signal.SIGTERM)
        script.communicate("\n" * 20)
    assert script.returncode == 143
    assert process("dense", tmp_path) == 0
    check_same(tmp_path, whole("dense"), [2, 3, 4, 5, 6, 7, 8])


def test_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), defer_signals() as signals:
        kill(signal.SIGINT)
        assert signals.received == [signal.SIGINT]
        kill(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_notebook_sigterm_ends_the_kernel(monkeypatch):
    saved, left = [], []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(SystemExit), defer_signals() as signals:  # where os._exit returns, as it never does
        signals.leave_after(lambda: saved.append("too early"))
        kill(signal.SIGTERM)
        signals.leave_after(lambda: saved.append("state"))
    assert saved == ["state"] and left == [143]
