"""Seconds that compare.ipynb takes to read its runs: python benchmarks/compare.py [RUNS], 10,000 unless told.

The runs are folders made for this: ratios and seeds of ucb_stage2, each with all parameters of its notebook, on stage 1
of its seed, on a dense model of its seed.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from lib import finished, params, runs

METRICS = {"dataset": "made", "n": 2000, "macs_g": 0.02, "params_m": 0.7, "f1_macro": 0.9, "nll_nats": 0.2}


def write(folder: Path, start: Path | str, seed: int, metrics: dict, **given: object) -> Path:
    """A finished run of the notebook that `folder` lies in."""
    folder.mkdir(parents=True)
    declared = params.declared_in(runs.root() / "notebooks" / f"{folder.parent.name}.ipynb")
    values = {name: each.default for name, each in declared.items()} | given | {"seed": seed}
    contents = {"params": values, "metrics": METRICS | metrics}
    contents["provenance"] = {"start": str(start), "dataset_digest": "d" * 64, "versions": {"torch": "2.4"}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    (folder / "DONE").touch()
    return folder


def seconds(count: int, folder: Path) -> tuple[float, int]:
    """Seconds to collect `count` runs, and how many arms they are."""
    starts = []
    for seed in range(10):
        dense = write(folder / "dense" / f"d{seed}", "", seed, {"method": "dense", "keep_ratio": 1.0, "top1": 0.98})
        starts.append(write(folder / "ucb_stage1" / f"s{seed}", dense, seed, {}, ckpt=str(dense)))
    for place in range(count):
        ratio, seed = 1e-4 * (1 + place // 10), place % 10
        said = {"method": "ucb", "keep_ratio": ratio, "top1": 0.9}
        given = {"stage1_checkpoint_path": str(starts[seed]), "frozen_keep_ratio": ratio}
        write(folder / "ucb_stage2" / f"r{place}", starts[seed], seed, said, **given)
    begin = time.perf_counter()
    table, left_out = finished.runs(folder / "ucb_stage2" / "*")
    taken = time.perf_counter() - begin
    assert len(table) == count and not left_out, "all are arms and seeds"
    return taken, table.arm.nunique()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        taken, arms = seconds(count, Path(folder))
    print(f"{count} runs, {arms} arms: {taken:.1f} s")
