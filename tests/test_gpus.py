"""Leases of GPUs: none is shared, two runs that each want several never wait for each other."""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from lib import gpus

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # locks of no one else


@pytest.fixture
def waited(monkeypatch):
    """Set when a lease finds too few GPUs free; the pause that follows is short."""
    waited, pause = threading.Event(), threading.Event()

    def sleep(seconds):
        waited.set()
        pause.wait(0.01)

    monkeypatch.setattr(gpus.time, "sleep", sleep)
    return waited


class Waiting(threading.Thread):
    """A lease in a thread: `has` is set when it has got its GPUs, which are its `devices`, given back at once."""

    def __init__(self, number):
        super().__init__(daemon=True)
        self.number, self.has, self.devices = number, threading.Event(), None
        self.start()

    def run(self):
        with gpus.leased(self.number) as shown:
            self.devices = shown["CUDA_VISIBLE_DEVICES"]
            self.has.set()


def test_leases_show_different_gpus_and_a_third_waits(two_gpus, waited):
    first, second = gpus.leased(1), gpus.leased(1)
    with first as one:
        with second as two:
            assert {one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
            third = Waiting(1)
            assert waited.wait(60) and not third.has.is_set()
        assert third.has.wait(60), "one was given back"
        assert third.devices == two["CUDA_VISIBLE_DEVICES"]


def test_a_lease_of_two_holds_none_while_it_waits(two_gpus, waited):
    with gpus.leased(1) as one:
        both = Waiting(2)
        assert waited.wait(60) and not both.has.is_set()
        with gpus.leased(1) as other:  # left by the one that waits for two
            assert {one["CUDA_VISIBLE_DEVICES"], other["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
    assert both.has.wait(60) and both.devices == "0,1"


def test_what_a_lease_shows_where_there_is_nothing_to_lease(two_gpus, monkeypatch):
    with gpus.leased(0) as shown:
        assert shown == {}
    with pytest.raises(gpus.TooFew) as refused, gpus.leased(3):
        pass
    assert str(refused.value) == "a run wants 3 GPUs: this machine shows 2"
    monkeypatch.setattr(gpus, "here", lambda: ["5", "7"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides them
    with gpus.leased(1) as shown:
        assert shown == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for listed in ([], ["5", "7"]):
        monkeypatch.setattr(gpus, "here", lambda listed=listed: listed)
        with gpus.leased(1) as shown:
            assert shown == ({"CUDA_VISIBLE_DEVICES": "5"} if listed else {})


def test_a_lease_is_of_a_gpu_not_of_its_number(two_gpus, monkeypatch):
    """Slurm may show every job its own GPU as number 0."""
    shown = {"0": "GPU-here"}
    monkeypatch.setattr(gpus, "names", lambda: shown)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with gpus.leased(1) as one:
        shown = {"0": "GPU-there"}
        with gpus.leased(1) as other:
            assert one == other == {"CUDA_VISIBLE_DEVICES": "0"}


def test_gpus_are_read_as_nvidia_smi_lists_them(monkeypatch):
    listed = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a-1)\nGPU 12: Tesla T4 (UUID: GPU-b-2)\n"
    monkeypatch.setattr(gpus, "_listed", lambda: listed)
    assert gpus.here() == ["0", "12"] and gpus.names() == {"0": "GPU-a-1", "12": "GPU-b-2"}


def test_a_run_that_wants_more_gpus_than_there_are_says_so_in_one_line(two_gpus, tmp_path):
    command = [sys.executable, "-m", "lib.sweeps", "dense", str(tmp_path / "run"), "{}", "1", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "a run wants 3 GPUs: this machine shows 2"
