"""What a sweep costs beside its notebooks: python benchmarks/sweep.py outputs --workers 2

wall:      from the first notebook's start to the last one's end
compute:   time inside of all notebooks, kernels' starts included, as papermill wrote it down
overhead:  wall · workers / compute: 1 where all workers were always busy
start:     a notebook's cell that imports, checks its parameters and loads data and model
"""

import argparse
import json
from datetime import datetime
from pathlib import Path

import pandas as pd


def timings(output: Path) -> pd.DataFrame:
    """A row per notebook of a sweep that came to its end, in its output folder: start, end, seconds and start_s."""
    rows = []
    for file in sorted(file.with_name("notebook.ipynb") for file in output.glob("*/*/DONE")):
        if not file.exists():  # made by papermill itself
            continue
        notebook = json.loads(file.read_text())
        facts = notebook["metadata"]["papermill"]
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        first = next(cell for cell in cells if not {*cell["metadata"]["tags"]} & {"parameters", "injected-parameters"})
        times = {name: datetime.fromisoformat(facts[f"{name}_time"]) for name in ("start", "end")}
        started = first["metadata"]["papermill"]["duration"]
        rows.append(
            {"run": f"{file.parts[-3]}/{file.parts[-2]}", **times, "seconds": facts["duration"], "start_s": started}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="where the sweep's runs are")
    parser.add_argument("--workers", type=int, default=2, help="--cores of the sweep over threads of a run")
    arguments = parser.parse_args()
    found = timings(arguments.output)
    wall, compute = (found.end.max() - found.start.min()).total_seconds(), found.seconds.sum()
    print(f"{len(found)} notebooks: wall {wall:.0f} s, compute {compute:.0f} s, ", end="")
    print(f"overhead {wall * arguments.workers / compute:.2f} with {arguments.workers} workers")
    print(f"start of a notebook: median {found.start_s.median():.1f} s, at most {found.start_s.max():.1f} s")
