"""The commands that make a run: again, with all that it started from, and on somebody else's images."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

IMAGES = ("dataset", "h5_dir", "labels_csv")  # parameters that say which images
PLACES = ("run_name", "output_dir")


def named(value: Any, runs: Mapping[str, Any]) -> str | None:
    """The run, of those known as notebook/name, that a path leads to or into."""
    parts = value.split("/") if isinstance(value, str) else []
    pairs = (f"{notebook}/{name}" for notebook, name in zip(parts, parts[1:], strict=False))
    return next((pair for pair in pairs if pair in runs), None)


def in_order(wanted: Sequence[str], runs: Mapping[str, dict]) -> list[str]:
    """The wanted runs and what they started from, each after what it needs.

    runs: by notebook/name, with `params` and `start` as params.json and provenance.json have them.
    """
    found: list[str] = []

    def add(name: str, waiting: tuple[str, ...]) -> None:
        for value in (runs[name]["start"], *runs[name]["params"].values()):
            needed = named(value, runs)
            if needed and needed not in (*waiting, name):
                add(needed, (*waiting, name))
        if name not in found:
            found.append(name)

    for name in wanted:
        add(name, ())
    return found


def again(wanted: Sequence[str], runs: Mapping[str, dict]) -> list[str]:
    """The commands that make these runs, those that they start from first."""
    return [runs[name]["command"] for name in in_order(wanted, runs) if runs[name]["command"]]


def on_other_images(wanted: str, runs: Mapping[str, dict]) -> list[str]:
    """The same for images of one's own, PICTURES: what starts from no other run reads them, the rest follows."""
    commands = []
    for name in in_order([wanted], runs):
        words = shlex.split(runs[name]["command"] or "")[3:]  # after papermill and the two notebooks: -r key value ...
        options, starts = [], False
        for flag, key, value in zip(words[::3], words[1::3], words[2::3], strict=False):
            if needed := named(value, runs):
                starts |= needed == named(runs[name]["start"], runs)
                value = "outputs/" + needed.replace("/", "/mine-") + value.partition(needed)[2]
            if key not in (*IMAGES, *PLACES):
                options.append(f"{flag} {key} {shlex.quote(value)}")
        if not starts:
            options.insert(0, "-r dataset PICTURES")
        notebook, run_name = name.split("/")
        options.append(f"-r run_name mine-{run_name}")
        commands.append(" ".join([f"papermill notebooks/{notebook}.ipynb out.ipynb", *options]))
    return commands
