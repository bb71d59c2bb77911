"""Runs: checked parameters in, artefacts out, each written whole or not at all.

A run is the folder outputs/<notebook>/<run>/ with params.json, metrics.jsonl, metrics.json, model.safetensors and
.json, figures/, provenance.json, last/ (resume state), parts/ (stages that train on their own) and DONE, which is
written last: what has no DONE is not a result.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib import params as parameters

# Where a run is written, whether it continues and how many processes share it does not change what it computes.
NOT_IDENTITY = ("output_dir", "run_name", "resume", "num_processes")
_held: dict[Path, FileLock] = {}  # runs this process writes: a notebook's cell may be run twice


class RunError(RuntimeError):
    """A run that cannot start or end as asked: one line saying why."""


def root() -> Path:
    """The repository's folder: the nearest parent of the working directory that looks like it, else lib's own."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir() and (folder / "lib" / "runs.py").is_file():
            return folder
    return Path(__file__).resolve().parent.parent


def resolve(path: str) -> str:
    """A path from a parameter, absolute if it exists, here or in the project's folder; anything else as it is."""
    for candidate in (Path(path).expanduser(), root() / path) if path else ():
        if candidate.exists():
            return str(candidate.resolve())
    return path


def without_seed(run: str) -> str:
    """The name of a run's folder, without the seed that it may end in."""
    return re.sub(r"-seed\d+$", "", Path(run).name)


def finished(pattern: str) -> list[Path]:
    """The folders of finished runs that a glob from the project's folder matches, sorted; RunError if there is none."""
    full = root() / Path(pattern).expanduser()
    found = sorted(mark.parent for mark in Path(full.anchor).glob(f"{full.relative_to(full.anchor)}/DONE"))
    if not found:
        raise RunError(f"no finished run in {pattern}: expected run folders with DONE in them")
    return found


def portable(value: Any) -> Any:
    """A parameter as it reads from everywhere: existing paths absolute, or from the project's folder if inside it."""
    if not isinstance(value, str) or not Path(found := resolve(value)).is_absolute():
        return value
    return str(Path(found).relative_to(root()) if Path(found).is_relative_to(root()) else found)


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` fill a temporary file beside `path`, then put it in place: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        writer(temporary)
        temporary.chmod(0o644)  # safetensors would leave it to its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; RunError names the first value that is not finite, since JSON has no such numbers."""
    _refuse_nan(content, path.name)
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def _refuse_nan(content: Any, where: str) -> None:
    if isinstance(content, float) and not math.isfinite(content):
        raise RunError(f"{where} is {content}: expected a finite number (None where a metric is undefined)")
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        _refuse_nan(value, f"{where}/{key}")


def run_name(values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A readable name, unique for these parameters: what differs from the defaults, and a hash of everything."""
    kept = identity(values)
    changed = [str(Path(v).stem if isinstance(v, str) else f"{k}{v}") for k, v in kept.items() if v != defaults[k]]
    slug = re.sub(r"[^\w.=-]+", "_", "-".join(changed) or "default").strip("._-")[:60]
    return f"{slug}-{hashlib.sha1(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]}"


def folder(notebook: str, declaration: dict[str, parameters.Parameter], values: dict[str, Any]) -> Path:
    """The folder of the run of `notebook` with these checked parameters."""
    name = values.get("run_name") or run_name(values, {k: p.default for k, p in declaration.items()})
    if not re.fullmatch(r"[\w=-][\w.=-]*", name):
        raise RunError(f"run_name is {name!r}: expected letters, digits and . _ = - only")
    return root() / Path(values.get("output_dir", "outputs")).expanduser() / notebook / name


def start(notebook: str, namespace: dict[str, Any]) -> "Run":
    """Begin the run of a notebook, called with its globals(): checks its parameters, writes back the read values,
    and seeds torch by the parameter `seed`, so that weights which start at random repeat.

    Raises ParameterError (a line per fault) before anything is written, RunError where another process writes the
    same run or run_name stands for other parameters.
    """
    source = root() / "notebooks" / f"{notebook}.ipynb"
    shipped = parameters.declared_in(source) if source.is_file() else {}
    declaration, values = parameters.from_namespace(namespace, shipped)
    for name, parameter in shipped.items():
        if name in declaration:  # a cell edited by hand changes values, not what the shipped notebook would do
            declaration[name].default = parameter.default
    values = parameters.check(declaration, values)
    namespace.update(values)
    keep_memory()
    if "seed" in values:
        import torch

        torch.manual_seed(values["seed"])
    return Run(notebook, declaration, values)


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where its C library is glibc.

    glibc gives large blocks back at once and gets them again, page by page, for the next tensor: of small models that
    train on a CPU it takes a tenth of the time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as malloc.h numbers them
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


class Part:
    """A folder that a training writes to: its rows in metrics.jsonl, its state in last/. A run, or a stage of one."""

    def __init__(self, notebook: str, folder: Path):
        self.notebook, self.dir = notebook, folder

    def log(self, rows: list[dict]) -> None:
        """Rewrite metrics.jsonl, one line per epoch so far."""
        _refuse_nan(rows, "metrics.jsonl")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write(self.dir / "metrics.jsonl", lambda temporary: temporary.write_text(lines))


class Run(Part):
    """One run's folder, locked while open. `dir` is its path, `params` its checked parameters."""

    def __init__(self, notebook: str, declaration: dict[str, parameters.Parameter], values: dict[str, Any]):
        super().__init__(notebook, folder(notebook, declaration, values))
        self.params, self.defaults = values, {name: parameter.default for name, parameter in declaration.items()}
        self.began = time.time()
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise RunError(f"{self.dir} cannot be written ({error.strerror}): choose another output_dir") from error
        for leftover in self.dir.rglob(".*.tmp*"):
            leftover.unlink()
        self._same_parameters()
        if not values.get("resume", True):
            for old in (self.dir / "DONE", *self.dir.glob("last/*")):
                old.unlink(missing_ok=True)
            shutil.rmtree(self.dir / "parts", ignore_errors=True)
        elif "resume" not in values:  # all is made anew: until then what lies there is of two runs
            (self.dir / "DONE").unlink(missing_ok=True)
        self.resumed = self.done or self.begun
        if "resume" in values and not self.resumed:  # what another run of this name left would pass for this one's
            shutil.rmtree(self.dir / "figures", ignore_errors=True)
            (self.dir / "metrics.jsonl").unlink(missing_ok=True)
        write_json(self.dir / "params.json", values)
        state = "done before: what is finished is reused" if self.done else "resumes" if self.begun else "new"
        print(f"{notebook}: writing to {self._shown()} ({state})\n  {self.command}", flush=True)

    def _shown(self) -> str:
        return str(self.dir.relative_to(root()) if self.dir.is_relative_to(root()) else self.dir)

    def _lock(self) -> None:
        if self.dir in _held:
            return
        lock, owner = FileLock(self.dir / "lock"), self.dir / "lock.pid"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            pid = owner.read_text() if owner.exists() else "unknown"
            raise RunError(f"{self._shown()} is being written by process {pid}: wait for it, or end it") from None
        owner.write_text(str(os.getpid()))
        _held[self.dir] = lock

    def _same_parameters(self) -> None:
        path = self.dir / "params.json"
        if not path.exists() or not (self.done or self.begun):
            return  # nothing there that could be mixed up or lost
        saved = json.loads(path.read_text())
        before, now = identity(self.defaults | saved), identity(self.params)  # of parameters newer than it, the default
        other = [
            f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in {**before, **now} if before.get(k) != now.get(k)
        ]
        if other:
            self.close()
            raise RunError(
                f"{self._shown()} holds a run with other parameters ({'; '.join(other)}): choose another run_name"
            )

    @property
    def done(self) -> bool:
        return (self.dir / "DONE").exists()

    @property
    def begun(self) -> bool:
        """Whether there is something that a run of the same parameters goes on from."""
        return any(self.dir.glob("last/*")) or any(self.dir.glob("parts/*"))

    @property
    def command(self) -> str:
        """The command that makes this run again."""
        changed = {k: v for k, v in self.params.items() if v != self.defaults[k]}
        options = [f"-{'r' if isinstance(v, str) else 'p'} {k} {shlex.quote(str(v))}" for k, v in changed.items()]
        return " ".join([f"papermill notebooks/{self.notebook}.ipynb out.ipynb", *options])

    def refuse(self, *names: str, because: str) -> None:
        """Raise ParameterError if any of these was set: a parameter that would do nothing."""
        for name in names:
            if self.params[name] != self.defaults[name]:
                self.close()
                raise parameters.ParameterError(f"{name} is {self.params[name]!r}, but {because}: leave it out")

    def part(self, name: str) -> Part:
        """A stage of this run that trains on its own, in parts/<name>/."""
        return Part(f"{self.notebook} {name}", self.dir / "parts" / name)

    def figure(self, figure: Any, name: str) -> None:
        """Save a matplotlib figure as figures/<name>.png."""
        save = lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight")  # noqa: E731
        write(self.dir / "figures" / f"{name}.png", save)

    def arrays(self, name: str, **arrays: Any) -> None:
        """Save numpy arrays as <name>.npz, compressed. From here on the run is unfinished until `finish`: until then
        some of what lies there is of this time, and some of the last."""
        import numpy as np

        (self.dir / "DONE").unlink(missing_ok=True)

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)

        write(self.dir / f"{name}.npz", save)

    def finish(self, metrics: dict[str, Any], **facts: Any) -> None:
        """Write metrics.json, provenance.json (with `facts`, such as the dataset's digest) and, last, DONE."""
        write_json(self.dir / "metrics.json", metrics)
        seconds = round(time.time() - self.began, 1)
        write_json(
            self.dir / "provenance.json",
            {
                "command": self.command,
                "wall_s": seconds,
                "resumed": self.resumed,
                **{name: portable(fact) for name, fact in facts.items()},
                **provenance(),
            },
        )
        write(self.dir / "DONE", lambda temporary: temporary.write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n")))
        self.close()
        print(f"{self.notebook}: done, {self._shown()}", flush=True)

    def close(self) -> None:
        """Give up the lock, as the end of the process does."""
        if lock := _held.pop(self.dir, None):
            (self.dir / "lock.pid").unlink(missing_ok=True)
            lock.release()


def provenance() -> dict[str, Any]:
    """What this ran on: code (git commit, whether it was changed since), versions, device."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            result = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True)
            return result.stdout.strip() if result.returncode == 0 else None

    import torch

    changes = git("status", "--porcelain")
    packages = ("torch", "timm", "accelerate", "numpy", "torchmetrics")
    cuda = torch.cuda.is_available()
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
    }


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that decide what a run computes."""
    return {name: value for name, value in values.items() if name not in NOT_IDENTITY}


def ensure(notebook: str, output_dir: str = "outputs", **wanted: Any) -> Path:
    """The finished run of a notebook with the wanted parameters, the others at their defaults: found, else made now.

    RunError where it cannot be made, or where a model that the one found was made from was written since.
    """
    source = root() / "notebooks" / f"{notebook}.ipynb"
    declaration = parameters.declared_in(source)
    wanted = _made_by(wanted, declaration) | {"output_dir": output_dir}
    values = parameters.check(declaration, wanted)
    way = _made_by(values, declaration)
    for mark in sorted((root() / Path(output_dir).expanduser() / notebook).glob("*/DONE")):
        if _made_by(json.loads((mark.parent / "params.json").read_text()), declaration) == way:
            for name in way.keys() - {"dataset", "labels_csv"}:  # of images there are digests
                if _written(values[name]) > mark.stat().st_mtime:
                    raise RunError(f"{mark.parent} was made from an older {values[name]} ({name}): remove that run, or "
                                   "choose another output_dir")  # fmt: skip
            print(f"{notebook}: using {mark.parent}", flush=True)
            return mark.parent
    target = folder(notebook, declaration, values)
    target.mkdir(parents=True, exist_ok=True)
    asked = identity(wanted) or "the default parameters"
    print(f"{notebook}: no finished run with {asked}, making it; its progress: {target / 'log.txt'}", flush=True)
    with FileLock(target / "making"):  # of two that need it at once, one makes it
        if not (target / "DONE").exists():
            _make(source, target, wanted)
    return target


def _written(value: Any) -> float:
    """When the file of a model was written, or that of a run, of which a parameter may be the path; 0 for no such."""
    path = Path(resolve(value)) if isinstance(value, str) and value else root()
    file = path / "model.safetensors" if path.is_dir() else path
    return file.stat().st_mtime if file.is_file() else 0.0


def _make(source: Path, target: Path, wanted: dict[str, Any]) -> None:
    log = target / "log.txt"
    command = [sys.executable, "-m", "papermill", str(source), str(target / "notebook.ipynb"), "-k", "python3"]
    command += ["--log-output", "--no-progress-bar", "--cwd", str(root()), "-y", json.dumps(wanted)]
    with open(log, "w") as output:
        failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if failed or not (target / "DONE").exists():
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{source.stem} failed ({last}): see {target / 'notebook.ipynb'}")


def _made_by(values: dict[str, Any], declaration: dict[str, parameters.Parameter]) -> dict[str, Any]:
    """What decides how a run is made, from wherever it is read: one of several choices is no path, though a folder
    beside the notebook may have its name."""
    words = {name for name, parameter in declaration.items() if parameter.choices}
    return {name: value if name in words else portable(value) for name, value in identity(values).items()}
