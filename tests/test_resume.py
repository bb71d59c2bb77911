"""A training that is killed at any moment and started again ends as if nothing had happened, bit for bit.

Every training here is a process of its own. They are forked from a server that has imported torch but never used it.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import DROPOUT, TINY, tiny_run

from lib import data, evaluate, models, runs
from lib.pruners.ucb import UCB
from lib.resume import States, defer_signals
from lib.train import Recipe, fit

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["lib", "lib.train", "lib.data", "lib.pruners.ucb", "torch._dynamo"])

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


# ---- moments to end at: each is called in the training process before it starts ------------------------------------


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name: str, count: int, then, before: bool = False) -> None:
    """When owner.name is called for the count-th time, `then` happens (with its arguments), before or after it."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if before and len(calls) == count:
            then(*args)
        result = original(*args, **kwargs)
        if not before and len(calls) == count:
            then(*args)
        return result

    setattr(owner, name, wrapped)


def half_a_state(number: int) -> None:
    """The process dies when half of state `number` is on disk."""
    save = torch.save

    def halved(content, path):
        buffer = io.BytesIO()
        save(content, buffer)
        half = f"state-{number:08d}" in path.name
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // (1 + half)])
        if half:
            die()

    torch.save = halved


def in_evaluation(then, count: int) -> None:
    """`then` happens in the count-th evaluation, after its forward passes."""
    at_call(evaluate, "classification", count, then, before=True)


# A state is written after every step and every epoch: state 5 is that of five steps and one epoch, 7 of the second.
# name: (how to die, the step that goes on)
MOMENTS = {
    "in a step": (partial(at_call, runs.Run, "log", 1, lambda *_: at_call(torch.optim.Optimizer, "zero_grad", 2, die)), 4),
    "after a save": (partial(at_call, States, "write", 6, die), 5),
    "half of a state written": (partial(half_a_state, 5), 4),
    "before a state is renamed": (partial(at_call, Path, "replace", 9, die, before=True), None),
    "best written, state not": (partial(at_call, States, "write_best", 2, die), 6),
    "evaluating": (partial(in_evaluation, die, 2), 6),
    "logged, state not": (partial(at_call, runs.Run, "log", 3, die), 9),
    "finished": (partial(at_call, States, "write", 12, die), 9),
}


def train(kind: str, folder: Path, tiny_h5: Path, moment=None, **changes) -> None:
    """The training process: result.pt gets steps run, history and weights."""
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
