"""The explorer's controls, for Jupyter and Colab: a model, an image, and two methods with a slider each."""

import asyncio
import io
from collections.abc import Callable
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib import pyplot as plt

from lib import blocks, explore, plots_explore, runs, strengths

QUIET = 0.05  # seconds without a further change after which one is acted upon
FAULTS = (blocks.UnsupportedBlock, ValueError)  # the project's own are ValueErrors
TIMM = ["vit_tiny_patch16_224", "vit_small_patch16_224", "deit_small_patch16_224"]  # to begin with, any other will do


class Debounced:
    """Acts once a burst of calls is over: while a slider is dragged, only where it rests is computed.

    Without a running event loop, as in a script, it acts at once.
    """

    def __init__(self, act: Callable[[], Any], seconds: float = QUIET):
        self.act, self.seconds, self._waiting = act, seconds, None

    def __call__(self, *_: Any) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        try:
            self._waiting = asyncio.get_running_loop().call_later(self.seconds, self.act)
        except RuntimeError:
            self.act()


class Explorer:
    """`box` is what to show. A fault is said in one line, and what was there before stays.

    subject: of explore.load, as is dataset; image: see Subject.image; chosen: (method, strength) of either side.
    """

    def __init__(self, subject: explore.Subject, image: str, chosen: list[tuple[str, float]], dataset: str = ""):
        wide, label = ipywidgets.Layout(width="100%"), {"description_width": "initial"}
        self.subject, self.dataset, self.upload = subject, dataset, None
        known = [*map(str, _finished()), "checkpoints/vit_digits.safetensors", *TIMM]
        self.model = ipywidgets.Combobox(value=subject.name, options=known, description="model", layout=wide,
                                         ensure_option=False, continuous_update=False)  # fmt: skip
        self.number = ipywidgets.BoundedIntText(description="image", max=len(subject.images.test) - 1)
        self.file = ipywidgets.FileUpload(accept="image/*", description="or a file of yours",
                                          layout=ipywidgets.Layout(width="auto", flex="0 0 auto"))  # fmt: skip
        if image.isdigit():
            self.number.value = int(image)
        else:
            self.upload = image
        self.methods = [ipywidgets.Dropdown(options=strengths.METHODS, value=method) for method, _ in chosen]
        self.strengths = [ipywidgets.SelectionSlider(options=[0.0], layout=wide, style=label) for _ in chosen]
        self.units = [ipywidgets.Label() for _ in chosen]
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.numbers, self.said = ipywidgets.HTML(), ipywidgets.Label()
        for side, (_, strength) in enumerate(chosen):
            self._slide(side, strength)
        self.draw()
        later = Debounced(self.draw)
        self.model.observe(self._load, "value")
        self.number.observe(self._picked, "value")
        self.file.observe(self._uploaded, "value")
        for side, (method, strength) in enumerate(zip(self.methods, self.strengths, strict=True)):
            method.observe(lambda change, side=side: self._slide(side, -1.0), "value")
            method.observe(later, "value")
            strength.observe(later, "value")
        self._later = later
        sides = [ipywidgets.VBox([*controls], layout=ipywidgets.Layout(width="100%", padding="0 1em 0 0"))
                 for controls in zip(self.methods, self.strengths, self.units, strict=True)]  # fmt: skip
        top = ipywidgets.HBox([self.model, self.number, self.file])
        self.box = ipywidgets.VBox([top, ipywidgets.HBox(sides), self.said, self.picture, self.numbers])

    def draw(self) -> None:
        """Compute what the controls say and show it."""
        self.said.value = "computing …"
        try:
            image = self.subject.image(self.upload or str(self.number.value))
            pairs = zip(self.methods, self.strengths, strict=True)
            views = [self.subject.look(image, method.value, strength.value) for method, strength in pairs]
            table = explore.table(self.subject, image, views)
        except FAULTS as fault:
            self.said.value = str(fault)
            return
        figure = plots_explore.strips(image, self.subject.grid, views, table)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        plt.close(figure)
        self.picture.value, self.numbers.value, self.said.value = drawn.getvalue(), shown(table), ""

    def _slide(self, side: int, strength: float) -> None:
        method, slider = self.methods[side].value, self.strengths[side]
        values, begins = self.subject.slider(method), self.subject.strength(method, strength)
        values = sorted({*values, begins}, reverse=values[0] > values[-1])  # the mildest first
        slider.options = [(f"{value:g}", value) for value in values]
        slider.value = begins
        self.units[side].value = strengths.WHAT[method]

    def _load(self, change: dict[str, Any]) -> None:
        if change["new"] == self.subject.name:
            return
        self.said.value = f"loading {change['new']} …"
        try:
            self.subject = explore.load(change["new"], self.dataset)
        except FAULTS as fault:
            self.said.value, self.model.value = str(fault), self.subject.name
            return
        upload = self.upload
        self.number.max = len(self.subject.images.test) - 1  # and the number with it
        self.upload = upload  # one's own picture stays
        if begins := self.subject.begins():
            self.methods[0].value = begins[0]
        for side in range(len(self.methods)):
            self._slide(side, -1.0)
        self._later()

    def _picked(self, change: dict[str, Any]) -> None:
        self.upload = None
        self._later()

    def _uploaded(self, change: dict[str, Any]) -> None:
        new = change["new"]  # ipywidgets 7, as in Colab, has a dict by file name, 8 a tuple
        files = list(new.values() if isinstance(new, dict) else new)
        self.upload = bytes(files[-1]["content"]) if files else None
        self._later()


def shown(table: pd.DataFrame) -> str:
    """explore.table as HTML."""
    form = {"strength": "{:g}", "confidence": "{:.1%}", "dense_answer": "{:.1%}", "macs_g": "{:.3g}",
            "fewer_macs": "{:.2f}×", "latency_ms": "{:.1f}", "speedup": "{:.2f}×"}  # fmt: skip
    plain = {"dense_answer": "in dense's answer", "macs_g": "GMACs", "fewer_macs": "fewer MACs", "latency_ms": "ms"}
    styled = table.style.format(form, na_rep="", escape="html").hide(axis="index")
    styled = styled.set_table_styles([{"selector": "th, td", "props": "padding: 0.2em 1em; text-align: right"}])
    return styled.format_index(lambda name: plain.get(name, name), axis="columns").to_html()


def _finished() -> list[Any]:
    """The models of finished runs, newest first, from the project's folder."""
    marks = sorted(runs.root().glob("outputs/*/*/DONE"), key=lambda mark: -mark.stat().st_mtime)
    return [mark.parent.relative_to(runs.root()) for mark in marks if (mark.parent / "model.json").exists()]
