"""What makes ACDC fast, as ratios from one process: make bench, or

    python benchmarks/acdc.py [--weights FILE --images DATA] [--count 256] [--threshold 0.01] [--rule increment]

By default the digits' checkpoint and its 72 parts. With --weights (a ViT-Tiny/16 state dict, pixel statistics 0.5) and
--images (a dataset) a ViT-Small with real behaviour: the weights twice, side by side, so that it predicts as ViT-Tiny
does with six heads and 1536 neurons per block. Its parts are sublayers, heads and groups of 64 neurons.

naive: the whole model for every part, on all images. All its trials cost the same: with --trials N about so many are
timed, in turns with the fast search and with what was removed by then, and counted for all; 0 runs the whole loop and
checks that it decides the same.
without …: the fast search with one lever left out. screened: with EAP keeping untried what it is sure of.
"""

import argparse
import time
from collections.abc import Callable
from typing import ClassVar
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn

from lib import data, evaluate, models, runs
from lib.pruners import acdc, components, eap
from lib.pruners.probe import Probe


class Beside(Probe):
    """Runs the naive trial of every `every`-th part in between: both ways meet the same disturbances of the machine."""

    every, batches, model = 1, [], None  # set in a subclass
    trials: ClassVar[list[float]] = []  # seconds

    def __init__(self, vit: nn.Module, *arguments: object):
        super().__init__(vit, *arguments)
        self.taken, self.calls = [], 0

    def effects(self, stage: str, sets: list, limits: list | None = None) -> list[Tensor]:
        if self.calls % self.every == 0:
            with (
                torch.inference_mode(),
                components.gates(self.model, components.without(self.model, [*self.taken, *sets[0]])),
            ):
                self.trials.append(seconds(lambda: [self.model(images) for images in self.batches])[0])
        self.calls += 1
        return super().effects(stage, sets, limits)

    def remove(self, stage: str, part: components.Component, kl: float) -> None:
        self.taken.append(part)
        super().remove(stage, part, kl)


class Unshared(Probe):
    """Recomputes the block's attention and hidden neurons for every part."""

    def _hold(self, what: str, chunk: int, make: Callable[[], Tensor]) -> Tensor:
        return make()


class AllRows(Probe):
    """Computes all tokens of the last block."""

    _reads_one = False


class Patient(Probe):
    """Runs every part on all images."""

    def effects(self, stage: str, sets: list, limits: list | None = None) -> list[Tensor]:
        return super().effects(stage, sets)


class Unsorted(Probe):
    """Takes images in the order in which they came."""

    def _sort(self) -> None:
        pass


def doubled(tiny: nn.Module, small: nn.Module) -> nn.Module:
    """A ViT of twice the width that predicts what `tiny` does: every vector twice, every weight on both diagonals."""
    state, wide = tiny.state_dict(), {}
    for name, value in state.items():
        if name == "head.weight":
            wide[name] = torch.cat([value, value], dim=1) / 2
        elif name == "head.bias":
            wide[name] = value
        elif "qkv" in name:  # the rows of Q, K and V apart: both copies' queries before both copies' keys
            parts = value.chunk(3)
            wide[name] = torch.cat(
                [torch.block_diag(part, part) if part.ndim == 2 else part.repeat(2) for part in parts]
            )
        elif value.ndim == 2:
            wide[name] = torch.block_diag(value, value)
        elif name.startswith("patch_embed"):
            wide[name] = torch.cat([value, value])
        else:  # norms, biases, class token, position embedding: along the last axis
            wide[name] = torch.cat([value, value], dim=-1)
    small.load_state_dict(wide)
    return small


def real_vit_small(weights: str) -> nn.Module:
    tiny = models.create("vit_tiny_patch16_224", 1000, weights=runs.resolve(weights)).eval()
    small = doubled(tiny, models.create("vit_small_patch16_224", 1000)).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(small(images), tiny(images), atol=1e-3, rtol=1e-3)
    return small


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="state dict of a ViT-Tiny/16")
    parser.add_argument("--images", default="digits", help="dataset that lib.data.load reads")
    parser.add_argument("--count", type=int, default=256, help="images that decide")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.01])
    parser.add_argument("--rule", default="increment", choices=acdc.RULES)
    parser.add_argument("--trials", type=int, default=0, help="naive trials to time; 0: all of them")
    parser.add_argument("--levers", action=argparse.BooleanOptionalAction, default=True, help="leave each out in turn")
    arguments = parser.parse_args()
    if arguments.weights:
        images = data.load(runs.resolve(arguments.images), img_size=224, root=runs.root() / "data").normalised("half")
        vit, parts = real_vit_small(arguments.weights), ("attn", "mlp", "head", "neuron")
    else:
        images = data.load(arguments.images, root=runs.root() / "data")
        vit = models.create("vit_digits", 10, weights=runs.root() / "checkpoints" / "vit_digits.safetensors").eval()
        parts = components.KINDS
    split = "val" if len(images.val) else "test"
    batches = [x for x, _ in evaluate.batches(images, arguments.count // 32, 32, split=split)]
    for threshold in arguments.threshold:
        search = {"threshold": threshold, "rule": arguments.rule, "parts": parts}
        print(
            compare(vit, batches, search, arguments.trials, arguments.levers).to_string(index=False), "\n", flush=True
        )


def compare(vit: nn.Module, batches: list[Tensor], search: dict, trials: int, levers: bool) -> pd.DataFrame:
    """One row per way to search: its time over that of the fast search, and what it found."""

    def run(probe: type[Probe] = Probe, **how: object) -> list:
        with mock.patch.object(acdc, "Probe", probe):
            return acdc.decide(vit, batches, **search, **how, progress=False)

    tried = components.of(vit, parts=search["parts"])

    def screened() -> list:
        sure = acdc.screen(eap.scores(vit, [(x, None) for x in batches]), tried, search["threshold"], search["rule"])
        return run(keep=sure)

    vit(batches[0])  # warm up
    ways = {}
    if levers:
        ways |= {
            "without any cache": lambda: run(cache_mb=0),
            "without subtraction": lambda: run(Unshared),
            "without the single row": lambda: run(AllRows),
            "without early exit": lambda: run(Patient),
            "without sorting images": lambda: run(Unsorted),
            "4 parts at once": lambda: run(ahead=4),
            "8 parts at once": lambda: run(ahead=8),
            "screened by EAP": screened,
        }
    beside = type("", (Beside,), {"every": max(1, len(tried) // max(1, trials)), "batches": batches, "model": vit})
    spent, fast = seconds(lambda: run(beside if trials else Probe))
    if trials:
        spent, slow = spent - sum(Beside.trials), sum(Beside.trials) / len(Beside.trials) * len(fast)
        Beside.trials.clear()
    else:
        slow, steps = seconds(lambda: [*acdc.naive(vit, batches, **search)])
        assert [each[:2] for each in steps] == [each[:2] for each in fast], "the naive loop decided otherwise"
    found = [("naive", slow, fast), ("fast", spent, fast), *((name, *seconds(way)) for name, way in ways.items())]
    rows = []
    for name, spent, decisions in found:
        if name == "naive" and trials:  # only timed: what it would have decided is not known
            rows.append({"way": name, "time / fast": spent / found[1][1], "seconds": spent})
            continue
        if name != "screened by EAP":
            assert [each[:2] for each in decisions] == [each[:2] for each in fast], f"{name}: other decisions"
        removed = sum(each.removed for each in decisions)
        rows.append({"way": name, "time / fast": spent / found[1][1], "seconds": spent, "tried": len(decisions),
                     "removed": removed, "kl_nats": decisions[-1].so_far})  # fmt: skip
    print(f"{len(tried)} parts, {sum(map(len, batches))} images, {search['rule']} τ = {search['threshold']:g}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    return pd.DataFrame(rows).round(4)


if __name__ == "__main__":
    main()
