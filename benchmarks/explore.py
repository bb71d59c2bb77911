"""Seconds from a slider's move to the new picture: python benchmarks/explore.py [MODEL] [--methods …]

The controls in one process, without a browser, a second method beside the first. Of moves over the middle of a
slider, each strength seen for the first time; what a method needs of the model is known from choosing it.
"""

import argparse
import statistics
import time

from lib import explore, runs, strengths, widgets


def moves(model: str, method: str, count: int) -> list[float]:
    """Seconds of `count` moves of the slider of `method`, beside ToMe."""
    subject = explore.load(model)
    explorer = widgets.Explorer(subject, "1", [(one, subject.strength(one)) for one in (method, "tome")])
    slider, taken = explorer.strengths[0], []
    values = [value for _, value in slider.options if value != slider.value]
    begin = max(0, (len(values) - count) // 2)
    for value in values[begin : begin + count]:
        start = time.perf_counter()
        slider.value = value  # no event loop runs: drawn at once
        taken.append(time.perf_counter() - start)
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="checkpoints/vit_digits.safetensors")
    parser.add_argument("--methods", nargs="+", choices=strengths.METHODS, default=strengths.METHODS)
    parser.add_argument("--count", type=int, default=6, help="moves of each slider")
    arguments = parser.parse_args()
    runs.keep_memory()
    facts = runs.provenance()
    print(f"{facts['device']}, {facts['threads']} threads, seconds per move\n")
    for method in arguments.methods:
        taken = moves(arguments.model, method, arguments.count)
        print(f"{method:8} median {statistics.median(taken):.2f}, longest {max(taken):.2f}")
