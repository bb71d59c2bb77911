"""Did two sweeps find the same? Every metrics.json of two output folders, number by number, but for timings.

    python benchmarks/same_results.py outputs elsewhere/outputs

Prints a line per difference and ends with exit code 1 if there is one.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What depends on how fast a machine was at that moment, and so differs from run to run.
TIMINGS = re.compile(
    r"seconds|\w+_s|\w*latency\w*|\w*ms_per_image|throughput\w*|\w*speedup\w*|accuracy_per_ms|pareto_latency"
    r"|ceiling|of_ceiling|share_of_ceiling|advice|speed"
)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """A line for each value that is not the same in both; timings are passed over."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if not TIMINGS.fullmatch(key):
                yield from differences(one.get(key, "missing"), other.get(key, "missing"), f"{where}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


def compare(one: Path, other: Path) -> Iterator[str]:
    """A line for each difference between two output folders: runs that one lacks, numbers that differ."""
    found = [{str(path.parent.relative_to(out)) for path in out.glob("*/*/metrics.json")} for out in (one, other)]
    for run in sorted(found[0] ^ found[1]):
        yield f"{run}: only in {one if run in found[0] else other}"
    for run in sorted(found[0] & found[1]):
        yield from differences(*(json.loads((out / run / "metrics.json").read_text()) for out in (one, other)), run)
    if not found[0] | found[1]:
        yield f"no metrics.json in {one} or {other}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs=2, type=Path, help="output folders of the two sweeps")
    outputs = parser.parse_args().outputs
    if lines := list(compare(*outputs)):
        print(*lines, sep="\n")
        raise SystemExit(1)
    print(f"the same in all {len(list(outputs[0].glob('*/*/metrics.json')))} runs")


if __name__ == "__main__":
    main()
