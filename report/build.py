"""Render every executed notebook of an output folder to HTML, with an index page: python report/build.py outputs

The index shows the newest comparison (what was dropped, what it cost, what it bought) and every run with its
pictures, its numbers and the command that makes it again. It opens from disk and loads nothing from elsewhere.
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from PIL import Image

HERE = Path(__file__).resolve().parent
FIRST = ("kept", "counts", "maps", "depth", "training")  # the figure that stands for a run: the first of these it has
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
COLUMNS = {
    "arm": ("method, setting", "{}"),
    "seeds": ("seeds", "{}"),
    "top1": ("accuracy", "{:.1%}"),
    "±": ("± 95 %", "{:.1%}"),
    "difference": ("to baseline", "{:+.1%}"),
    "p": ("p", "{:.1g}"),
    "f1_macro": ("macro-F1", "{:.3f}"),
    "macs_g": ("GMACs", "{:.3f}"),
    "params_m": ("M parameters", "{:.2f}"),
    "latency_ms": ("ms / batch", "{:.1f}"),
    "speedup": ("speed", "{:.2f}×"),
    "mean_depth": ("blocks / patch", "{:.2f}"),
    "foreground_recall": ("foreground kept", "{:.0%}"),
}


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def embedded(picture: Path, width: int) -> str:
    """A picture as a data URI, at most `width` pixels wide."""
    with Image.open(picture) as image:
        image.thumbnail((width, 10 * width))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(notebook: Path, page: Path) -> None:
    """One executed notebook as an HTML page with its pictures and formulas inside."""
    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    content, formulas = nbformat.read(notebook, as_version=4), {}

    def set_aside(formula: re.Match) -> str:
        """A mark for a LaTeX formula, whose MathML nbconvert would take apart; browsers show that without a script."""
        mark, display = f"formula{len(formulas)}mark", "block" if formula.group(0).startswith("$$") else "inline"
        formulas[mark] = convert(formula.group(1) or formula.group(2), display=display).replace("\\_", "_")
        return mark

    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(set_aside, cell.source)
        if cell.cell_type == "code":  # progress bars and warnings are for whoever watches the run
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.output_type != "error"]
    title = f"{notebook.parent.parent.name}/{notebook.parent.name}"
    text = exporter.from_notebook_node(content, {"metadata": {"name": title}})[0]
    text = re.sub(r"<script[^>]*></script>", "", text)  # what is left of loaders whose addresses are empty
    page.write_text(re.sub(r"formula\d+mark", lambda mark: formulas[mark.group(0)], text))


def run_card(run: Path, pages: Path) -> dict:
    """What the index says of a run."""
    page = pages / f"{run.parent.name}-{run.name}.html"
    if (run / "notebook.ipynb").exists():
        render(run / "notebook.ipynb", page)
    pictures = {picture.stem: picture for picture in sorted((run / "figures").glob("*.png"))}
    shown = next((pictures[name] for name in FIRST if name in pictures), next(iter(pictures.values()), None))
    return {
        "name": run.name,
        "notebook": run.parent.name,
        "page": page.name if page.exists() else None,
        "picture": shown and embedded(shown, 480),
        "metrics": read(run / "metrics.json"),
        **{key: read(run / "provenance.json").get(key) for key in ("command", "wall_s", "device", "git_commit")},
    }


def build(outputs: Path) -> Path:
    """Write outputs/report/ and return its index page."""
    pages = outputs / "report"
    pages.mkdir(parents=True, exist_ok=True)
    finished = sorted(mark.parent for mark in outputs.glob("*/*/DONE"))
    unfinished = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in outputs.glob("*/*/params.json")
                        if not (p.parent / "DONE").exists())  # fmt: skip
    comparisons = [run for run in finished if run.parent.name == "compare"]
    newest = max(comparisons, key=lambda run: (run / "DONE").stat().st_mtime, default=None)
    comparison = read(newest / "metrics.json") if newest else {}
    pictures = sorted((newest / "figures").glob("*.png")) if newest else []
    page = pages / "index.html"
    template = jinja2.Environment(autoescape=True).from_string((HERE / "index.html.j2").read_text())
    page.write_text(
        template.render(
            cards=[run_card(run, pages) for run in finished],
            unfinished=unfinished,
            figures={picture.stem: embedded(picture, 1800) for picture in pictures},
            rows=comparison.get("summary", []),
            columns=COLUMNS,
            advice=comparison.get("advice", []),
            provenance=read(newest / "provenance.json") if newest else {},
            speed=comparison.get("speed", [{}])[0],
            baseline=comparison.get("baseline"),
        )
    )
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python report/build.py FOLDER, a folder of runs such as outputs")
    print(f"report: {build(Path(sys.argv[1])).resolve()}")
