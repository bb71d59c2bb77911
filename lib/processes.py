"""One training shared by several processes: torchrun starts them on a job in a file, their output comes through here.

A kernel that has touched a GPU cannot fork, so they are processes of their own: `torchrun -m lib.train job`. They stop,
all after the same step and with their state saved, when the process that waits for them wants it or is gone.
"""

import builtins
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from lib import runs
from lib.resume import defer_signals

ALONE = "put its functions in a module, or use num_processes=1"
STARTED = "VIT_EFFICIENCY_SHARED_TRAINING"  # set in processes that `launch` started


def within() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "LOCAL_RANK" in os.environ


def launch(job: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """What `number` processes of `lib.train` made of a job: what the first of them found (see `serve`).

    job: picklable. folder: where job and answer lie meanwhile. Ctrl-C and SIGTERM are passed on, and obeyed when all
    have saved. Raises what a process raised, if it is a built-in exception, ValueError for more processes than GPUs.
    """
    if 0 < (gpus := torch.cuda.device_count()) < number:
        raise ValueError(f"num_processes is {number}: expected at most one for each of {gpus} GPUs")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".job.{os.getpid()}.tmp"  # runs removes such a file where a process that died has left it
    try:
        _write(file, job)
        threads = os.environ.get("OMP_NUM_THREADS") if gpus else None
        environment = os.environ | {
            STARTED: "1",
            "OMP_NUM_THREADS": threads or str(max(1, torch.get_num_threads() // number)),
            "PYTHONPATH": os.pathsep.join([str(runs.root()), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        command += [f"--nproc-per-node={number}", "-m", "lib.train", str(file)]
        last = _watch(command, environment, file)
        if not _answer(file).exists():
            raise RuntimeError(f"{number} processes that share a training ended without a result: {last}")
        found = torch.load(_answer(file), weights_only=True)
    finally:
        file.unlink(missing_ok=True)
        _answer(file).unlink(missing_ok=True)
    if "error" in found:
        kind = getattr(builtins, found["error"], RuntimeError)
        raise kind(found["message"]) if issubclass(kind, Exception) else RuntimeError(found["message"])
    return found


def _write(file: Path, job: dict[str, Any]) -> None:
    try:
        content = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"several processes cannot be handed this training ({error}): {ALONE}") from error
    file.touch(mode=0o600)
    file.write_bytes(content)


def _watch(command: list[str], environment: dict[str, str], file: Path) -> str:
    """Run the command with its output passed on; its last line. A signal closes its input, which asks it to stop."""
    text = b""
    with (
        defer_signals() as signals,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env=environment, cwd=runs.root(), start_new_session=True) as child,
    ):  # fmt: skip
        while child.poll() is None or select.select([child.stdout], [], [], 0)[0]:
            if signals.received and not child.stdin.closed:
                child.stdin.close()
            if select.select([child.stdout], [], [], 0.2)[0]:
                if not (new := os.read(child.stdout.fileno(), 1 << 16)):
                    break
                print(new.decode(errors="replace"), end="", flush=True)
                text = (text + new)[-4096:]
        child.wait()
        signals.leave_after(lambda: None)
    return (text.decode(errors="replace").strip().splitlines() or ["no output"])[-1]


def _answer(file: Path) -> Path:
    return file.with_name(f"{file.name}.answer")


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In a process that `launch` started: do the job. The first process hands its plain values and tensors to the one
    that waits, and any process what it raised."""
    file = Path(sys.argv[1])
    runs.keep_memory()
    try:
        try:
            job = pickle.loads(file.read_bytes())
        except (AttributeError, ImportError) as error:  # such as a loss that a notebook has defined
            raise ValueError(f"several processes cannot be handed this training ({error}): {ALONE}") from error
        found = work(job)
    except (SystemExit, KeyboardInterrupt):
        found = {"stopped": True}
    except Exception as error:
        if not _answer(file).exists():  # else another was first, and this one merely lost its connection
            _hand_over(file, {"error": type(error).__name__, "message": str(error)})
        raise  # torchrun then ends the others, which would wait for this one
    if os.environ["RANK"] == "0":
        _hand_over(file, found)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _hand_over(file: Path, found: dict[str, Any]) -> None:
    runs.write(_answer(file), lambda temporary: torch.save(found, temporary))


def stopping() -> bool:
    """In a process that `launch` started: whether the one that waits wants it to stop, or is gone."""
    return STARTED in os.environ and bool(select.select([sys.stdin], [], [], 0)[0])
