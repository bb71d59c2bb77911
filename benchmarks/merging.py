"""What makes merging good: each part of Ward merging alone and together, without training, on images never looked at.

    python benchmarks/merging.py --weights vit.safetensors --images imagenet_val_650.h5 --normalise half
    python benchmarks/merging.py --model checkpoints/vit_digits.safetensors --out digits.csv

All at the same multiply-adds by the closed form, without what choosing takes (`--ceilings`: dense divided by those);
"counted" is with that. Per way: top-1 and NLL on the test images, KL from
dense; paired with the first of `--ways`, McNemar's p of top-1 and a bootstrap's 95 % interval of the NLL's difference.
Schedules are
chosen on `--calibrate` images that are not tested on: validation images or, where all images are test, so many of them,
at random (of the ImageNet sample 300: those that Ward merging was made with).
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import data, evaluate, models, runs, starts
from lib.pruners import schedule
from lib.pruners.baselines import EViT, ToMe, TopK, merging
from lib.pruners.dropping import Unreachable, predicted_macs, reaching
from lib.pruners.ward import Ward

WAYS = {  # merging evenly
    "ToMe": ToMe,
    "+ keys of all heads": partial(Ward, gamma=0, linkage="cosine"),
    "+ Ward's cost": partial(Ward, gamma=0, keys="mean"),
    "+ attention in the mean": partial(Ward, linkage="cosine", keys="mean"),
    "Ward without attention": partial(Ward, gamma=0),
    "Ward with mean keys": partial(Ward, keys="mean"),
    "Ward": Ward,
    "ToMe, each 2 blocks": ToMe,
    "Ward, each 2 blocks": Ward,
}
SCHEDULED = {"ToMe, scheduled": ToMe, "Ward, scheduled": Ward}
DROPPING = {"Top-K": TopK, "EViT": EViT}
EVERY = (*WAYS, *SCHEDULED, *DROPPING)


def arms(vit: nn.Module, limit: float, look_at: Tensor, ways: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Name and model of each of `ways` at `limit` GMACs."""
    depth, patches = len(vit.blocks), vit.patch_embed.num_patches
    for name in ways:
        if name in WAYS:
            make, places = WAYS[name], merging(vit.blocks, 2 if name.endswith("each 2 blocks") else 1)
            even = schedule.fitted(
                schedule.spaced([1.0] * depth, places),
                patches,
                lambda r, make=make: predicted_macs(make(vit, r)),
                limit,
            )
            if even is None:
                raise Unreachable(f"{name} cannot come under {limit:.3g} GMACs: expected a lower ceiling")
            yield name, make(vit, even)
        elif name in SCHEDULED:
            best, _ = schedule.choose(vit, SCHEDULED[name], look_at, limit)
            print(f"{name}: r = {best.r}", flush=True)
            yield name, SCHEDULED[name](vit, best.r)
        else:
            make = DROPPING[name]
            yield name, reaching(lambda strength, make=make: make(vit, 1 - strength), limit, 1 - 1e-3)


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """log-probabilities (n, classes), float64."""
    return torch.cat([model.eval()(part).double().log_softmax(1) for part in images.split(32)])


def measured(
    vit: nn.Module,
    look_at: Tensor,
    images: Tensor,
    labels: Tensor,
    ceilings: Sequence[float],
    ways: Sequence[str] = EVERY,
) -> pd.DataFrame:
    """One row per ceiling and way, paired with the first of `ways`."""
    clean, whole, rows = answers(vit, images), predicted_macs(ToMe(vit, 0)), []
    counted = lambda model: evaluate.macs(model, tuple(images.shape[1:]))["macs_g"]  # noqa: E731
    nll = lambda found: -found[torch.arange(len(labels)), labels]  # noqa: E731
    top1 = (clean.argmax(1) == labels).double().mean().item()
    row = {"ceiling": 1.0, "way": "dense", "fewer MACs": 1.0, "top1": top1, "NLL": nll(clean).mean().item(), "KL": 0.0}
    rows.append(row)
    for ceiling in ceilings:
        found = {}
        for name, pruner in arms(vit, whole / ceiling, look_at, ways):
            found[name] = answers(pruner, images)
            right = found[name].argmax(1) == labels
            row = {"ceiling": ceiling, "way": name, "fewer MACs": whole / predicted_macs(pruner)}
            row["counted"] = counted(vit) / counted(pruner)
            row |= {"top1": right.double().mean().item(), "NLL": nll(found[name]).mean().item()}
            row["KL"] = (clean.exp() * (clean - found[name])).sum(1).mean().item()
            if name != ways[0]:
                first = found[ways[0]]
                row["p"] = evaluate.mcnemar(right.numpy(), (first.argmax(1) == labels).numpy())["p_value"]
                apart = (nll(found[name]) - nll(first)).numpy()
                drawn = np.random.default_rng(0).integers(0, len(apart), (2000, len(apart)))
                row["NLL low"], row["NLL high"] = map(float, np.quantile(apart[drawn].mean(axis=1), [0.025, 0.975]))
            rows.append(row)
            print(*(f"{value:.4f}" if isinstance(value, float) else value for value in row.values()), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a run or saved model, with its own data, instead of:")
    parser.add_argument("--arch", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--images", default="imagenette", help="a dataset's name or path, with the classes of the head")
    parser.add_argument("--normalise", default="half", choices=["data", *data.STATISTICS])
    parser.add_argument("--calibrate", type=int, default=128, help="images that choose schedules")
    parser.add_argument("--ceilings", type=float, nargs="+", default=[1.15, 1.5, 1.64, 1.9, 2.5])
    parser.add_argument("--ways", nargs="+", choices=EVERY, default=EVERY, help="others are compared with the first")
    parser.add_argument("--out", default="", help="a CSV file of the table")
    asked = parser.parse_args()
    runs.keep_memory()
    if asked.model:
        about = models.header(asked.model)["metadata"]
        vit, images = models.load(asked.model), starts.load(about)
    else:
        params = {"arch": asked.arch, "dataset": asked.images, "img_size": 224, "normalise": asked.normalise}
        run = SimpleNamespace(params=params, defaults={"normalise": "data"})
        _, vit, images, _ = starts.published(run, asked.weights)
    x, labels = evaluate.batch(images, len(images.test)), torch.as_tensor(np.asarray(images.test.labels))
    if len(images.val):
        look_at = evaluate.batches(images, 1, asked.calibrate, split="val")[0][0]  # a few from every class in all parts
    else:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        look_at, x, labels = x[order[: asked.calibrate]], *(each[order[asked.calibrate :]] for each in (x, labels))
    print(f"{images.name}: {len(look_at)} images choose schedules, {len(x)} are tested on\n", flush=True)
    table = measured(vit.eval(), look_at, x, labels, asked.ceilings, asked.ways)
    if asked.out:
        table.to_csv(asked.out, index=False)
    print("\n" + table.to_markdown(index=False, floatfmt=".4f"))


if __name__ == "__main__":
    main()
