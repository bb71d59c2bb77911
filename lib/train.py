"""fit: the one training loop. It knows no method: a method hands it a loss and, if it must, a callback per step.

Everything random is drawn from (seed, epoch, step), so a run that was killed at any moment and started again ends in
bit-identical weights on CPU; and one that several processes share ends where one process would, but for rounding.
"""

import difflib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib import evaluate, losses, models, processes, runs
from lib.augment import Augment, Share, mix, model_seed, normalise, places, step_generator
from lib.resume import States, defer_signals, interactive


@dataclass
class Recipe:
    """How to train. Epochs and rates are of the whole training; batch_size counts all processes together."""

    epochs: int
    batch_size: int
    learning_rate: float  # peak
    optimizer: str = "adamw"  # any timm name: adamw, sgd, muon, …
    weight_decay: float = 0.05
    schedule: str = "cosine"  # or "milestones", at which the rate is multiplied by `decay`
    warmup_epochs: float = 0.0  # linear
    milestones: tuple[int, ...] = ()  # epochs
    decay: float = 0.1
    label_smoothing: float = 0.0
    clip_norm: float = 1.0  # of the gradient; 0 is no clipping
    ema_decay: float = 0.0  # average the weights, validate and keep the average; 0 is no averaging
    precision: str = "fp32"  # or "bf16", by autocast
    augment: str | dict = "none"  # see lib.augment
    mixup: float = 0.0
    cutmix: float = 0.0
    keep: str = "best"  # weights to end with: best on the validation images, or "last"
    patience: int = 0  # epochs without a better validation before stopping early; 0 is never
    seed: int = 0
    num_processes: int = 1  # that share every batch, one GPU each, or a part of the CPU's threads
    num_workers: int = 0
    save_minutes: float = 5.0  # how often to save within long epochs

    def __post_init__(self):
        expected = {"schedule": ("cosine", "milestones"), "precision": ("fp32", "bf16"), "keep": ("best", "last")}
        for name, choices in expected.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.optimizer.lower().removeprefix("lookahead_") not in (known := list_optimizers()):
            near = difflib.get_close_matches(self.optimizer, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ValueError(f"optimizer is {self.optimizer!r}: expected one of timm's, such as adamw, sgd, muon{hint}")
        if self.batch_size % self.num_processes:
            raise ValueError(
                f"batch_size is {self.batch_size}: expected a multiple of num_processes, {self.num_processes}"
            )
        if late := [epoch for epoch in self.milestones if epoch >= self.epochs]:
            raise ValueError(f"milestones hold {late[0]}: expected epochs before the last of {self.epochs}")
        if self.epochs and self.warmup_epochs >= self.epochs:  # the rate would never reach its peak
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}: expected less than all of {self.epochs} epochs")

    @classmethod
    def of(cls, params: dict[str, Any], **others: Any) -> "Recipe":
        """The recipe that a notebook's parameters spell out under these names, with `others` on top."""
        return cls(**{field.name: params[field.name] for field in fields(cls) if field.name in params} | others)

    def rate(self, step: int, per_epoch: int) -> float:
        """The learning rate at optimiser step `step`, with `per_epoch` steps in an epoch."""
        warmup, total = round(self.warmup_epochs * per_epoch), self.epochs * per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        return self.learning_rate * self.decay ** sum(step >= epoch * per_epoch for epoch in self.milestones)


def fit(
    model: nn.Module,
    data: Any,
    recipe: Recipe,
    *,
    run: runs.Part,
    loss: losses.Loss = losses.task,
    on_gradient: Callable[[nn.Module, int], None] | None = None,
    on_step: Callable[[nn.Module, int], None] | None = None,
    watch: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> list[dict]:
    """Train `model` in place on data.train; it ends with the weights that were best on data.val (or recipe.keep).

    data: what lib.data.load returns. run: where metrics.jsonl and the resume state (last/) go; a run stopped before
    goes on where it was, and a finished one returns at once. loss(model, images, targets) returns the loss with parts
    to log. on_gradient(model, step) runs between the clipped gradient and the optimiser's step, on_step(model, step)
    after it; watch(model, step) adds to the row of every epoch what it finds after the last step.

    With recipe.num_processes > 1 torchrun starts as many on this machine; all of the arguments must pickle. They end in
    the weights of one process, up to rounding, where nothing in the model depends on the batch or draws at random
    (batch norm, dropout) and the loss is a mean over images, or sums over processes itself. Whatever their number,
    they go on from one another's states.

    Returns one dict per epoch, as in metrics.jsonl. Raises FloatingPointError, with the step, when loss or gradient
    stop being finite (the last good state stays), RunError where run holds a training of another model or on other
    images. After an error `model` has the weights of the last good state, or where there is none those it came with, so
    that the same call goes on from there. Ctrl-C and SIGTERM save first; SIGTERM then exits with 143.
    """
    if not len(data.train.labels) or not len(data.val.labels):
        found = f"{len(data.train.labels)} and {len(data.val.labels)}"
        raise ValueError(f"dataset {data.name}: training needs train and val images, found {found}")
    if recipe.num_processes > 1 and not processes.within():
        hooks = {"loss": loss, "on_gradient": on_gradient, "on_step": on_step, "watch": watch}
        return _shared(model, data, recipe, run, hooks)
    came_with = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    fitting = _Fitting(model, data, recipe, run, loss, on_gradient, on_step, watch)
    try:
        _train(fitting)
    except Exception:
        state = fitting.states.newest()
        model.load_state_dict(state["modules"]["model"] if state else came_with)
        raise
    model.load_state_dict(fitting.states.best() if recipe.keep == "best" and fitting.history else fitting.last())
    return fitting.history


def _train(fitting: "_Fitting") -> None:
    """Every epoch that is left."""
    recipe = fitting.recipe
    with fitting.bar, defer_signals() as signals:
        while fitting.epoch < recipe.epochs and not _stale(fitting.history, recipe.patience):
            began = time.monotonic()
            for batch, (images, targets) in fitting.batches():
                fitting.step(batch, images, targets)
                signals.received = fitting.agreed(signals.received)
                signals.leave_after(fitting.save)
                fitting.save_at_times()
            fitting.end_epoch(began)
            signals.received = fitting.agreed(signals.received)
            signals.leave_after(fitting.save)
    fitting.accelerator.wait_for_everyone()


def _shared(model: nn.Module, data: Any, recipe: Recipe, run: runs.Part, hooks: dict[str, Any]) -> list[dict]:
    """fit, by several processes: they train a copy, whose weights and buffers this model then has."""
    seen = {name: getattr(data, name) for name in ("name", "train", "val", "classes", "mean", "std", "digest")}
    job = {"model": model.cpu(), "data": SimpleNamespace(**seen), "recipe": recipe, **hooks}
    found = processes.launch(job | {"run": runs.Part(run.notebook, run.dir)}, recipe.num_processes, run.dir)
    if "stopped" in found:
        raise RuntimeError("the processes that share this training were stopped: the same command goes on from there")
    model.load_state_dict(found["model"])
    model.to(evaluate.device())
    return found["history"]


def _share(job: dict[str, Any]) -> dict[str, Any]:
    """What each process of `_shared` does."""
    history = fit(**job)
    return {"model": {name: tensor.cpu() for name, tensor in job["model"].state_dict().items()}, "history": history}


def steps_per_epoch(data: Any, recipe: Recipe) -> int:
    """Optimiser steps in an epoch; a last incomplete batch is left out."""
    return len(data.train.labels) // min(recipe.batch_size, len(data.train.labels))


def _rank(row: dict) -> tuple[float, float]:
    """Better is greater: accuracy first, and among equal ones the likelihood."""
    return row["val_top1"], -row["val_nll_nats"]


def _stale(history: list[dict], patience: int) -> bool:
    if not patience or len(history) <= patience:
        return False
    return max(map(_rank, history[-patience:])) <= max(map(_rank, history[:-patience]))


class _Rows(Dataset):
    """Batches of a split by index array; indexing happens in the worker, so HDF5 is opened there."""

    def __init__(self, split: Any):
        self.split = split

    def __getitem__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.split.images[rows]), torch.from_numpy(self.split.labels[rows])


class _Fitting:
    """One training under way: what is saved (epoch, batch, sums, history, model, optimiser, EMA, random state)."""

    def __init__(self, model: nn.Module, data: Any, recipe: Recipe, run: runs.Part, loss: losses.Loss, *hooks: Any):
        self.model, self.data, self.recipe, self.run, self.loss = model, data, recipe, run, loss
        self.on_gradient, self.on_step, self.watch = hooks
        # bf16 is autocast in `step`: accelerate's own would stay patched into the model's forward after training.
        # On the device of evaluation: Apple's mps, which accelerate would take by itself, has no float64.
        # The others wait while one validates: an hour at most, where ten minutes are the default.
        patient = InitProcessGroupKwargs(timeout=timedelta(hours=1))
        where = evaluate.device().type
        self.accelerator = Accelerator(mixed_precision="no", cpu=where == "cpu", kwargs_handlers=[patient])
        world = self.accelerator.num_processes
        self.size = min(recipe.batch_size, len(data.train.labels))
        if self.size % world:
            raise ValueError(f"batches have {self.size} images: expected a multiple of num_processes, {world}")
        self.places = places(self.size, self.accelerator.process_index, world)
        self.per_epoch = steps_per_epoch(data, recipe)
        self.augment = Augment(recipe.augment)

        model.to(self.accelerator.device)
        model.zero_grad()  # what an analysis, or a training that failed, left would be added to the first step's
        optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.ema = None
        if recipe.ema_decay:  # buffers are copied: UCB's counts are sums, their average means nothing
            self.ema = ModelEmaV3(model, decay=recipe.ema_decay, exclude_buffers=True)
        self.trained, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.epoch, self.batch, self.sums, self.history, self.best = 0, 0, {}, [], None
        self.digest, self.start = data.digest, models.sha1(model.state_dict())
        self.states, self.saved_at = States(run.dir / "last"), time.monotonic()
        self._restore()
        self.bar = tqdm(
            total=recipe.epochs * self.per_epoch,
            initial=self.epoch * self.per_epoch + self.batch,
            desc=run.notebook,
            unit="step",
            mininterval=1 if interactive() else 10,  # thousands of lines in a log would fail a notebook run
            disable=not self.accelerator.is_main_process,
        )

    def batches(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """What is left of this epoch, in the order that (seed, epoch) draws; a last incomplete batch is left out."""
        self.trained.train()
        order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(len(self.data.train.labels))
        rows = order[: self.per_epoch * self.size].reshape(self.per_epoch, self.size)[self.batch :, self.places.numpy()]
        loader = DataLoader(
            _Rows(self.data.train),
            sampler=rows,
            batch_size=None,
            num_workers=self.recipe.num_workers,
            generator=torch.Generator(),  # else each start of an epoch would draw from torch's own
        )
        return enumerate(loader, start=self.batch)

    def step(self, batch: int, images: Tensor, targets: Tensor) -> None:
        """One optimiser step on uint8 images (B, H, W, 3) and labels (B,)."""
        recipe, accelerator = self.recipe, self.accelerator
        step = self.epoch * self.per_epoch + batch
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step, self.per_epoch) * group.get("lr_scale", 1.0)
        draw = step_generator(recipe.seed, self.epoch, batch)
        torch.manual_seed(model_seed(recipe.seed, self.epoch, batch) + accelerator.process_index)
        draw = Share(draw, self.size, self.places)
        images, targets = self._prepare(images.to(accelerator.device), targets.to(accelerator.device), draw)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            value, parts = self.loss(self.trained, images, targets)
        accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(self.trained.parameters(), recipe.clip_norm or math.inf)
        if not (torch.isfinite(value) and torch.isfinite(norm)):
            raise FloatingPointError(f"loss or gradient is not finite at step {step}: the last saved state stays good")
        if self.on_gradient:
            self.on_gradient(self.model, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model, step)
        if self.on_step:
            self.on_step(self.model, step)
        for name, part in self._mean({"loss": value, **parts}).items():
            self.sums[name] = self.sums.get(name, 0.0) + part
        self.batch = batch + 1
        self.bar.update()

    def _prepare(self, images: Tensor, targets: Tensor, draw: Share) -> tuple[Tensor, Tensor]:
        """Augmented, mixed and normalised images (B, 3, H, W), and labels or soft targets."""
        recipe, classes = self.recipe, len(self.data.classes)
        images = self.augment(images.permute(0, 3, 1, 2), draw)
        if recipe.mixup or recipe.cutmix or recipe.label_smoothing:
            images, targets = mix(images, targets, classes, recipe.mixup, recipe.cutmix, recipe.label_smoothing, draw)
        return normalise(images, self.data.mean, self.data.std), targets

    def _mean(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The mean over processes of what each logs."""
        stacked = torch.stack([part.detach().double().to(self.accelerator.device) for part in parts.values()])
        return dict(zip(parts, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def agreed(self, received: list[int]) -> list[int]:
        """The signals that any process received: all stop after the same step, else some would wait for the others."""
        if self.accelerator.num_processes == 1:
            return received
        own = received[0] if received else signal.SIGTERM if processes.stopping() else 0
        first = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max().item()
        return [first] if first else []

    def end_epoch(self, began: float) -> None:
        """Validate, keep the weights if they are the best so far, save, log: all processes by what one found."""
        judged = self.ema.module if self.ema else self.model
        row = self._validated(judged, began) if self.accelerator.is_main_process else None
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        self.history = [*self.history, *broadcast_object_list([row])]
        if self.best is None or _rank(self.history[-1]) > _rank(self.history[self.best]):
            self.best = len(self.history) - 1
            if self.accelerator.is_main_process:
                self.states.write_best(judged.state_dict())
        if self.accelerator.is_main_process:
            self.run.log(self.history)  # before the state: killed between the two, no finished run lacks its last row
        self.save()
        row, best = self.history[-1], self.history[self.best]
        self.bar.set_postfix(val_top1=f"{row['val_top1']:.3f}", best=f"{best['val_top1']:.3f}")

    def _validated(self, judged: nn.Module, began: float) -> dict[str, Any]:
        """The row of the epoch that ends."""
        shown = evaluate.predict(
            judged, self.data.val, mean=self.data.mean, std=self.data.std, batch_size=min(256, 4 * len(self.places))
        )
        scores = evaluate.classification(shown.logits, shown.labels)
        row = {"epoch": self.epoch + 1, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": total / self.per_epoch for name, total in self.sums.items()}
        row |= {"val_top1": scores["top1"], "val_nll_nats": scores["nll_nats"], "n_val": scores["n"]}
        row |= self.watch(self.model, (self.epoch + 1) * self.per_epoch - 1) if self.watch else {}
        return row | {"seconds": round(time.monotonic() - began, 2)}

    def last(self) -> dict[str, Tensor]:
        return (self.ema.module if self.ema else self.model).state_dict()

    def save_at_times(self) -> None:
        if time.monotonic() - self.saved_at > 60 * self.recipe.save_minutes:
            self.save()

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        names = ("epoch", "batch", "sums", "history", "best", "digest", "start")
        progress = {name: getattr(self, name) for name in names}
        modules = {"model": self.model, "optimizer": self.optimizer} | ({"ema": self.ema} if self.ema else {})
        self.states.write(progress, {name: module.state_dict() for name, module in modules.items()})

    def _same_model(self, state: dict[str, Any]) -> bool:
        """Whether the training began with this model, or made it: in Jupyter a cell may run again."""
        if state["progress"].get("start", self.start) == self.start:
            return True
        modules = state["modules"]
        made = [modules["model"], {k.removeprefix("module."): v for k, v in modules.get("ema", {}).items()}]
        made += [self.states.best()] if state["progress"]["history"] else []
        return self.start in map(models.sha1, made)

    def _restore(self) -> None:
        if (state := self.states.newest()) is None:
            return
        fault = None
        if state["progress"].get("digest", self.digest) != self.digest:
            # split anew, images that this model has learnt from would be among those it is tested on
            fault = f"on other images of {self.data.name}"
        elif not self._same_model(state):  # one remade since: a notebook would describe it, and have what this became
            fault = "of another model"
        if fault:
            raise runs.RunError(f"{self.run.dir} holds a training {fault} than now: choose another run_name, or start "
                                "anew (resume: False)")  # fmt: skip
        self.model.load_state_dict(state["modules"]["model"])
        self.optimizer.load_state_dict(state["modules"]["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["modules"]["ema"])
        for name, value in state["progress"].items():
            setattr(self, name, value)


if __name__ == "__main__":
    from lib import train  # by the name under which its classes were pickled

    processes.serve(train._share)
