"""Sweeps: a file of stages becomes a checked graph of notebook runs; Snakefile says what to do with it.

    name: digits
    stages:
      - notebook: dense
      - notebook: avit
        needs: {ckpt: dense}                               # takes the run of dense
        parameters: {ponder_weight: [0.01, 0.1], seed: [0, 1, 2]}   # every combination is a run
      - notebook: compare
        needs: {runs: [dense, avit]}                       # only waits for all of them
        parameters: {runs: outputs/*/digits*}

A stage has a `notebook`, and may have a `name` (else the sweep's), `parameters`, `needs`, `threads` and `resources`.
"""

import ast
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib import gpus, params, runs

KEYS = {"notebook": str, "name": str, "parameters": dict, "needs": dict, "threads": int, "resources": dict}
STATES = ("last", "parts")  # where a run keeps what it goes on from
TOP = {"name": str, "stages": list, "output_dir": str, "threads": int, "resources": dict}
RESOURCES = dict.fromkeys(("gpu", "mem_mb", "runtime"), object)  # that the Snakefile asks for, as Snakemake reads them


class SweepError(ValueError):
    """A sweep file that cannot be run as it is: one line saying where and why."""


@dataclass
class Planned:
    """One run of a sweep: what its notebook is given, which of it varies, which runs and files it needs, what it may
    use."""

    stage: str  # notebook/name
    parameters: dict[str, Any]
    varied: dict[str, Any]
    upstream: list[str]
    files: list[str]
    threads: int
    resources: dict[str, Any]


def expand(config: dict[str, Any], notebooks: Path = Path("notebooks")) -> dict[str, Planned]:
    """The runs of a sweep by their folder below the output directory, notebook/run, in the order of its stages.

    Every list among a stage's parameters is varied, every combination is a run. A parameter in `needs` takes the run of
    an earlier stage, named by notebook or notebook/name, that agrees in all parameters both stages vary. SweepError, or
    ParameterError with all faults of a stage, before anything starts.
    """
    _known(config, TOP, "this sweep")
    _known(config.get("resources") or {}, RESOURCES, "the resources of this sweep")
    for needed in ("name", "stages"):
        if not config.get(needed):
            raise SweepError(f"this sweep has no {needed}: expected one (see sweeps/quick.yaml)")
    output, found = output_of(config), {}
    for stage in config["stages"]:
        if not isinstance(stage, dict):
            raise SweepError(f"{stage!r} among the stages: expected one with a notebook, as in notebook: dense")
        _known(stage, KEYS, f"stage {stage.get('notebook', '')!r}")
        _known(stage.get("resources") or {}, RESOURCES, f"the resources of stage {stage.get('notebook', '')!r}")
        notebook, label = stage.get("notebook"), stage.get("name") or config["name"]
        if not (notebooks / f"{notebook}.ipynb").is_file():
            known = ", ".join(sorted(each.stem for each in notebooks.glob("*.ipynb")))
            raise SweepError(f"no notebook {notebook!r}: expected one of {known}")
        if set_here := {"run_name", "output_dir"} & {*(stage.get("parameters") or {})}:
            expected = "a name of the stage and an output_dir of the sweep"
            raise SweepError(f"parameters of stage {notebook!r} set {', '.join(sorted(set_here))}: expected {expected}")
        declared, earlier = params.declared_in(notebooks / f"{notebook}.ipynb"), dict(found)
        for varied in _combinations(stage.get("parameters") or {}, declared):
            values = {**(stage.get("parameters") or {}), **varied}
            name = _name(label, varied)
            run = f"{notebook}/{name}"
            if run in found:
                raise SweepError(f"{run}: two runs of this name, expected another name for one of the stages")
            upstream = []
            for parameter, needed in (stage.get("needs") or {}).items():
                agreeing = _agreeing(run, parameter, needed, earlier, varied)
                upstream += agreeing
                if isinstance(needed, str):
                    values[parameter] = f"{output}/{agreeing[0]}"
            values |= {"run_name": name, "output_dir": output}
            try:
                params.check(declared, values)
            except params.ParameterError as error:
                raise SweepError(f"{notebook} in this sweep: {error}") from None
            resources = {**(config.get("resources") or {}), **(stage.get("resources") or {})}
            threads = stage.get("threads") or config.get("threads") or 1
            files = _files({name: one.default for name, one in declared.items()} | values, output)
            found[run] = Planned(f"{notebook}/{label}", values, varied, upstream, files, threads, resources)
    return found


def output_of(config: dict[str, Any]) -> str:
    """The folder that a sweep writes to."""
    return os.path.expanduser(config.get("output_dir") or "outputs")


def _files(values: dict[str, Any], output: str) -> list[str]:
    """Files that parameters name, as weights or a dataset, besides what the sweep makes: what a change of reruns it."""
    named = [value for value in values.values() if isinstance(value, str) and os.path.isfile(value)]
    return sorted({value for value in named if not Path(value).resolve().is_relative_to(Path(output).resolve())})


def _known(given: dict[str, Any], keys: dict[str, type], where: str) -> None:
    for key, value in given.items():
        if key not in keys:
            raise SweepError(f"{where} has {key!r}: expected {', '.join(keys)}")
        if not isinstance(value, keys[key] | None):
            raise SweepError(f"{key} of {where} is {value!r}: expected {keys[key].__name__}")


def _combinations(given: dict[str, Any], declared: dict[str, params.Parameter]) -> Iterator[dict[str, Any]]:
    """What varies, combination by combination. A parameter that is a list itself varies over a list of lists."""
    whole = {name for name, one in declared.items() if one.type is list and not any(
             isinstance(value, list) for value in (given.get(name) or []))}  # fmt: skip
    lists = {name: values for name, values in given.items() if isinstance(values, list) and name not in whole}
    if empty := [name for name, values in lists.items() if not values]:
        raise SweepError(f"{empty[0]} is an empty list: expected values")
    for combination in itertools.product(*lists.values()):
        yield dict(zip(lists, combination, strict=True))


def _name(label: str, varied: dict[str, Any]) -> str:
    shown = [Path(v).stem if "/" in str(v) else v if isinstance(v, str) else f"{k}{v}" for k, v in varied.items()]
    return re.sub(r"[^\w.=-]+", "_", "-".join([label, *shown]))


def _agreeing(
    run: str, parameter: str, needed: str | list[str], earlier: dict[str, Planned], varied: dict[str, Any]
) -> list[str]:
    """The earlier runs that `needed` names and that agree with a run in what both vary."""
    wanted = {needed} if isinstance(needed, str) else {*needed}
    named = {name: {name.split("/")[0], other.stage} for name, other in earlier.items()}
    if unknown := wanted - {stage for stages in named.values() for stage in stages}:
        raise SweepError(f"{run}: its {parameter} needs {', '.join(sorted(unknown))}, no earlier stage")
    found = [name for name, other in earlier.items()
             if wanted & named[name] and all(varied.get(k, v) == v for k, v in other.varied.items())]  # fmt: skip
    if isinstance(needed, str) and len(found) != 1:
        raise SweepError(f"{run}: {len(found)} runs of {needed} fit its {parameter}, expected one")
    return found


# ---- what a run depends on ----------------------------------------------------------------------------------------


def sources(notebook: str, folder: Path = Path(".")) -> list[str]:
    """The notebook's file and every file of lib/ that it imports, directly or not: what an edit of reruns it."""
    file = folder / "notebooks" / f"{notebook}.ipynb"
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    found, waiting = set(), ["\n".join("".join(cell["source"]) for cell in cells)]
    while waiting:
        for name in _imports(waiting.pop()):
            for module in (Path(*name.split(".")).with_suffix(".py"), Path(*name.split("."), "__init__.py")):
                if name.split(".")[0] == "lib" and module not in found and (folder / module).is_file():
                    found.add(module)
                    waiting.append((folder / module).read_text())
    return [str(file), *sorted(map(str, found))]


@functools.cache
def _imports(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [".".join(parts[:end]) for parts in (name.split(".") for name in found) for end in range(1, len(parts) + 1)]


# ---- one run ------------------------------------------------------------------------------------------------------


def run(
    notebook: str,
    folder: Path,
    values: dict[str, Any],
    threads: int,
    number_of_gpus: int = 0,
    upstream: Sequence[Path] = (),
) -> int:
    """papermill's exit code, after it ran a notebook with its executed copy, log and results in `folder`.

    A run that was finished once is here because its notebook, lib/ or parameters changed: it starts anew. One that was
    stopped goes on from its last state, unless what it starts from (upstream: files) was made again since, or it had
    other parameters. One that another process is writing stays as it is: exit code 1. Threads of torch are `threads`; a
    run that wants GPUs waits for as many.
    """
    began, name = time.monotonic(), f"{notebook}/{folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock").acquire(timeout=0):  # that of lib.runs, which the notebook takes again
            _cleared(notebook, folder, values, upstream)
    except Timeout:
        print(f"{time.strftime('%T')} FAILED {name}: another process is writing it, wait for it or end it", flush=True)
        return 1
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(folder / "notebook.ipynb")]
    command += ["-k", "python3", "--no-progress-bar", "-y", json.dumps(values)]
    with gpus.leased(number_of_gpus) as devices, open(folder / "log.txt", "w") as log:
        print(f"{time.strftime('%T')} start {name}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | devices
        failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if failed or not (folder / "DONE").exists():
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        print(f"{time.strftime('%T')} FAILED {name}, see {folder}/log.txt", *last, sep="\n  ", flush=True)
        return failed or 1
    print(f"{time.strftime('%T')} done  {name} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


def _cleared(notebook: str, folder: Path, values: dict[str, Any], upstream: Sequence[Path]) -> None:
    """Remove from a run's folder the states that it must not go on from."""
    states = [file.stat().st_mtime for old in STATES for file in (folder / old).rglob("*") if file.is_file()]
    outdated = max((Path(file).stat().st_mtime for file in upstream), default=0.0) > max(states, default=math.inf)
    outdated |= _other_parameters(notebook, folder, values)
    if outdated or (folder / "provenance.json").exists():
        for old in STATES:
            shutil.rmtree(folder / old, ignore_errors=True)
        (folder / "provenance.json").unlink(missing_ok=True)


def _other_parameters(notebook: str, folder: Path, values: dict[str, Any]) -> bool:
    """Whether what lies in a run's folder was begun with other parameters than these."""
    file = folder / "params.json"
    if not file.exists():
        return False
    declaration = params.declared_in(Path("notebooks") / f"{notebook}.ipynb")
    before = {name: each.default for name, each in declaration.items()} | json.loads(file.read_text())
    return runs.identity(before) != runs.identity(params.check(declaration, values))


def unfinished(output: Path, runs: dict[str, Planned]) -> list[str]:
    """What a sweep that stopped has not done, a line each: what failed with its log, and what waited for that."""
    left = [name for name in runs if not (output / name / "DONE").exists()]
    tried = [name for name in left if (output / name / "log.txt").exists()]
    return [f"failed: {name}, see {output / name}/log.txt" for name in tried] + [
        f"not begun: {name}, which needs it" if {*runs[name].upstream} & {*left} else f"not begun: {name}"
        for name in left if name not in tried
    ]  # fmt: skip


if __name__ == "__main__":
    notebook, folder, values, threads, wanted, *upstream = sys.argv[1:]
    try:
        sys.exit(run(notebook, Path(folder), json.loads(values), int(threads), int(wanted), [*map(Path, upstream)]))
    except (SweepError, gpus.TooFew) as error:
        sys.exit(str(error))
