"""What merging.ipynb starts from: how it merges, the images that decide, the budget to meet."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from lib import data, evaluate
from lib.params import ParameterError
from lib.pruners import schedule
from lib.pruners.baselines import ToMe
from lib.pruners.dropping import predicted_macs, refuse_met
from lib.pruners.tokens import TokenPruner
from lib.pruners.ward import Ward
from lib.runs import Run, resolve, root, write
from lib.starts import Start


def method(run: Run) -> Callable[[nn.Module, list[int]], ToMe]:
    """What merges r patches per block of a ViT by the method that merging.ipynb was given; ParameterError where a
    parameter would do nothing."""
    if run.params["method"] != "ward":
        run.refuse("gamma", because=f"method is {run.params['method']!r}")
        return ToMe
    return partial(Ward, gamma=run.params["gamma"])


def images_of(run: Run, start: Start) -> Tensor:
    """The images (n, 3, H, W) that decide on a schedule: of the validation images, or of the dataset `calibrate_on`;
    where those have none for validation, of what they train on, or of all of another dataset.

    Every first part of them is spread over the files, too, for rounds look at first parts. ParameterError where there
    are none, or where they are those that are tested on.
    """
    images, count = start.images, run.params["calibration_images"]
    if other := run.params["calibrate_on"]:
        found = data.load(resolve(other), img_size=evaluate.image_shape(images)[1], root=root() / "data")
        if found.digest == images.digest:
            raise ParameterError(f"calibrate_on is {other!r}, the images that are tested on: expected others")
        images = replace(found, mean=images.mean, std=images.std)
    split = next((name for name in ("val", "train", "test" if other else "val") if len(getattr(images, name))), None)
    if split is None:
        raise ParameterError(f"{images.name} has no validation images: expected a dataset as calibrate_on")
    return evaluate.batches(images, 1, count, split=split)[0][0]


def budget(run: Run, start: Start, merge: Callable) -> tuple[float, Callable[[TokenPruner], float], str, list[int]]:
    """What merging.ipynb has to meet, how it is reckoned, its unit, and each how many blocks candidates may merge."""
    every = run.params["merge_every"]
    if wrong := [each for each in every if not isinstance(each, int)]:  # said before anything is timed
        raise ParameterError(f"merge_every holds {wrong[0]!r}: expected whole numbers of blocks")
    if limit := run.params["latency_ms"]:
        run.refuse("macs_g", because="latency_ms is the budget")
        batch, size = evaluate.batch(start.images, run.params["latency_batch"]), run.params["latency_batch"]
        if len(batch) < size:
            raise ParameterError(f"latency_batch is {size}: expected at most the {len(batch)} test images")
        batch = batch.to(evaluate.device())
        return limit, schedule.milliseconds(start.vit, merge, batch), "ms", every or [1, 2]
    half = predicted_macs(merge(start.vit, 0)) / 2
    refuse_met(start.vit, run.params["macs_g"])
    return run.params["macs_g"] or half, predicted_macs, "GMACs", every or [1]


def found(run: Run, start: Start, merge: Callable) -> tuple[schedule.Schedule, list[schedule.Schedule]]:
    """The schedule for merging.ipynb and the candidates it was chosen from: looked for, or read from `schedule_path`.

    It lies in the run's folder as schedule.json, too. ParameterError where a file's is for another depth.
    """
    depth = len(start.vit.blocks)
    if path := run.params["schedule_path"]:
        free = ("macs_g", "latency_ms", "calibration_images", "calibrate_on", "merge_every")
        run.refuse(*free, because="schedule_path is given")
        best = schedule.read(resolve(path))
        if len(best.r) != depth:
            raise ParameterError(f"{path} is for {len(best.r)} blocks: expected one for {depth}")
        cost = predicted_macs(merge(start.vit, best.r))
        best = best._replace(cost=cost, unit="GMACs", kl_nats=None, images=0)  # of this model, which no images saw
        candidates = [best]
    else:
        images, (limit, cost, unit, every) = images_of(run, start), budget(run, start, merge)
        print(f"at most {limit:.4g} {unit}, {len(images)} images decide")
        best, candidates = schedule.choose(start.vit, merge, images.to(evaluate.device()), limit, cost, unit, every)
    write(run.dir / "schedule.json", lambda file: file.write_text(best.to_json() + "\n"))
    return best, candidates
