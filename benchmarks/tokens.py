"""Token methods without training, as ratios from one process: make bench, or python benchmarks/tokens.py [--batch 32].

MACs:    of the dense model / of the method, which drops or merges as little as --fewer times fewer MACs allow.
ceiling: the same blocks on the first as many tokens (FirstTokens): what no choice of tokens can beat.
share:   time of the ceiling / time of the method, within rounds; 1 means that choosing or merging costs nothing.
"""

import argparse
from collections.abc import Sequence

import pandas as pd
import torch

from lib import evaluate, models, runs, training_free
from lib.pruners.dropping import FirstTokens, predicted_macs

# As in token_baselines.ipynb; strengths follow from the ceiling of MACs.
RULES = {"blocks": [], "seed": 0, "alpha": 0.5, "start_block": 1, "normalise_scores": "minmax", "k_anchors": 10.0,
         "top_m": 50.0}  # fmt: skip


def against_ceiling(
    arch: str,
    batch: int,
    repeats: int,
    fewer: float,
    methods: Sequence[str] = training_free.METHODS,
    every: int = 1,
    schedule: Sequence[int] = (),
) -> pd.DataFrame:
    """One row per method at `fewer` times fewer MACs than dense: speed-up, that of its ceiling, the share reached.

    every: blocks from one merge to the next. schedule: tokens to merge in each block, in the place of `fewer`.
    """
    dense, rows = models.create(arch, 1000).eval(), []
    images, whole = torch.randn(batch, 3, *dense.patch_embed.img_size), evaluate.closed_form_macs(dense) / 1e9
    for method in methods:
        if schedule:
            pruner = training_free.MERGING[method](dense, schedule).eval()
        else:
            pruner = training_free.build(dense, RULES | {"merge_every": every}, method, whole / fewer).eval()
        arms = {"ceiling": FirstTokens(dense, pruner.counts()[1]).eval(), "method": pruner, "dense": dense}
        times = evaluate.latency(arms, images, repeats=repeats, device=evaluate.device()).set_index("model")
        share, limit = times.speedup["method"], 1 / times.speedup["dense"]
        rows.append({"arch": arch, "method": method, "MACs": whole / predicted_macs(pruner)})
        rows[-1] |= {"speed-up": share * limit, "ceiling": limit}
        rows[-1] |= {"share": share, "share IQR": times.speedup_iqr["method"]}
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--arch", nargs="+", default=["vit_tiny_patch16_224"])
    parser.add_argument("--methods", nargs="+", choices=training_free.METHODS, default=training_free.METHODS)
    parser.add_argument("--merge-every", type=int, default=1, help="blocks from one merge to the next (tome, ward)")
    parser.add_argument("--fewer", type=float, nargs="+", default=[1.5, 2.0], help="times fewer MACs than dense")
    parser.add_argument("--schedule", type=int, nargs="+", default=[], help="tokens to merge per block, not --fewer's")
    arguments = parser.parse_args()
    runs.keep_memory()  # as every run does
    facts = runs.provenance()
    versions = f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    print(f"{versions}, batch {arguments.batch}, fp32\n")
    if arguments.schedule and not {*arguments.methods} <= {*training_free.MERGING}:
        parser.error(f"--schedule is for merging: expected --methods of {', '.join(training_free.MERGING)}")
    asked = (arguments.methods, arguments.merge_every, arguments.schedule)
    tables = [against_ceiling(arch, arguments.batch, arguments.repeats, fewer, *asked)
              for arch in arguments.arch for fewer in arguments.fewer[: 1 if arguments.schedule else None]]  # fmt: skip
    print(pd.concat(tables).to_markdown(index=False, floatfmt=".3f"))
