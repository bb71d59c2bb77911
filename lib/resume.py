"""What lets a stopped training go on: states on disk, and signals that wait for a step's end."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lib import runs

KEPT = 2


class States:
    """Training states in a folder: state-<number>.pt, the newest two, and best.pt. Read with weights_only."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))

    def write(self, progress: dict[str, Any], modules: dict[str, dict]) -> None:
        """Add a state; older ones than the last two go."""
        files = self._files()
        number = int(files[-1].stem.split("-")[1]) + 1 if files else 0
        state = {"progress": progress, "modules": modules}
        runs.write(self.folder / f"state-{number:08d}.pt", lambda temporary: torch.save(state, temporary))
        for old in self._files()[:-KEPT]:
            old.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest readable state; None where there is none."""
        for file in reversed(self._files()):
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen types for a damaged file; the one before is whole
                print(f"{file} cannot be read ({type(error).__name__}): going back to the state before it", flush=True)
        return None

    def write_best(self, weights: dict[str, Any]) -> None:
        runs.write(self.folder / "best.pt", lambda temporary: torch.save(weights, temporary))

    def best(self) -> dict[str, Any]:
        return torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)


class _Signals:
    """The signals received while they are deferred."""

    def __init__(self):
        self.received: list[int] = []

    def __call__(self, number: int, _frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.received.append(number)

    def leave_after(self, save: Callable[[], None]) -> None:
        """If a signal came: save, then do what it asked for."""
        if not self.received:
            return
        save()
        print("stopped on request: the state is saved, the same command goes on from here", flush=True)
        if self.received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        if "ipykernel" in sys.modules:  # a kernel would answer SystemExit by going on to live
            os._exit(143)
        sys.exit(143)


@contextmanager
def defer_signals() -> Iterator[_Signals]:
    """Hold back SIGINT and SIGTERM, so that training stops between two steps and not within one."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield signals
        return
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interactive() -> bool:
    """Whether somebody watches: papermill and log files get a line now and then instead of a moving bar."""
    return sys.stderr.isatty()
