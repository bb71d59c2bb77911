"""GPUs of this machine, each for one run of a sweep at a time."""

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class TooFew(ValueError):
    """A run that wants more GPUs than its machine has would wait for ever."""


@contextlib.contextmanager
def leased(number: int) -> Iterator[dict[str, str]]:
    """An environment that shows `number` GPUs of this machine which no other run holds; waits for them.

    GPUs are those of CUDA_VISIBLE_DEVICES, as Slurm sets it, else all that nvidia-smi lists; none there, none leased.
    TooFew: this machine has some, but not as many.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = [device for device in (visible or "").split(",") if device] if visible is not None else here()
    if not (number and there):
        yield {}
        return
    if number > len(there):
        raise TooFew(f"a run wants {number} GPUs: this machine shows {len(there)}")
    known = names()  # Slurm may show each job its own GPU as number 0
    held: list[tuple[str, FileLock]] = []
    try:
        while len(held) < number:
            for device in there:
                name = known.get(device, device)
                lock = FileLock(Path(tempfile.gettempdir()) / f"vit-efficiency-{os.getuid()}-gpu-{name}.lock")
                with contextlib.suppress(Timeout):
                    if len(held) < number and device not in {one for one, _ in held}:
                        lock.acquire(timeout=0)
                        held.append((device, lock))
            if len(held) < number:  # all or none: two that hold one each would wait for ever
                while held:
                    held.pop()[1].release()
                time.sleep(1 + os.getpid() % 7 / 7)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(device for device, _ in held)}
    finally:
        for _, lock in held:
            lock.release()


def here() -> list[str]:
    """The numbers of this machine's GPUs, as nvidia-smi lists them."""
    return re.findall(r"^GPU (\d+):", _listed(), re.MULTILINE)


def names() -> dict[str, str]:
    """By which name a GPU of this number is known to all processes of this machine, as nvidia-smi lists them."""
    return dict(re.findall(r"^GPU (\d+):.*\(UUID: (\S+)\)", _listed(), re.MULTILINE))


def _listed() -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return ""
