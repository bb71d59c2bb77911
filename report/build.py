"""Render every executed notebook of an output folder to HTML, with an index page: python report/build.py outputs

The index shows the newest comparison (which method at which budget, how sure that is, what it cost and what it
bought) and every run with its picture, its numbers and the command that makes it again. It opens from disk and loads
nothing from elsewhere.
"""

import base64
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import commands
import comparison
import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from PIL import Image

HERE = Path(__file__).resolve().parent
# the figure that stands for a run: the first of these it has
FIRST = ("accuracy_macs", "blocks", "kept", "counts", "maps", "depth", "parts", "states", "confusion")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
BACK = '<p style="padding: 0 1rem"><a href="index.html">← the report</a></p>'
WIDEST = 2.2  # shape of a thumbnail: what is wider or higher shows its first part


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def embedded(picture: Path, width: int, thumbnail: bool = False) -> str:
    """A picture as a data URI, at most `width` pixels wide; as a thumbnail the first part of what is long."""
    with Image.open(picture) as image:
        if thumbnail:
            image = image.crop((0, 0, min(image.width, int(WIDEST * image.height)), min(image.height, image.width)))
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
        if cell.cell_type == "code":  # progress bars, warnings and controls are for whoever watches the run
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.output_type != "error"]
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    content.metadata.pop("widgets", None)
    title = f"{notebook.parent.parent.name}/{notebook.parent.name}"
    text = exporter.from_notebook_node(content, {"metadata": {"name": title}})[0]
    text = re.sub(r"<script[^>]*></script>", "", text)  # what is left of loaders whose addresses are empty
    text = re.sub(r"<body[^>]*>", lambda body: body.group(0) + BACK, text, count=1)
    page.write_text(re.sub(r"formula\d+mark", lambda mark: formulas[mark.group(0)], text))


def run_card(run: Path, pages: Path) -> dict[str, Any]:
    """What the index says of a run."""
    page, facts = pages / f"{run.parent.name}-{run.name}.html", read(run / "provenance.json")
    if (run / "notebook.ipynb").exists():
        render(run / "notebook.ipynb", page)
    pictures = {picture.stem: picture for picture in sorted((run / "figures").glob("*.png"))}
    shown = next((name for name in FIRST if name in pictures), next(iter(pictures), None))
    return {
        "folder": run,
        "name": run.name,
        "notebook": run.parent.name,
        "page": page.name if page.exists() else None,
        "picture": shown and embedded(pictures[shown], 480, thumbnail=True),
        "shown": (shown or "").replace("_", " "),
        "metrics": read(run / "metrics.json"),
        "params": read(run / "params.json"),
        "facts": facts,
        "start": facts.get("start"),
        "command": facts.get("command"),
    }


def arms(newest: Path, cards: dict[str, dict]) -> dict[str, list[str]]:
    """The runs of each arm, of those here: a comparison's runs.csv names them by their folders.

    One that lies elsewhere goes by its name only where nothing lies there any more: reports are moved.
    """
    found: dict[str, list[str]] = {}
    if (newest / "runs.csv").exists():
        with open(newest / "runs.csv", newline="") as file:
            for row in csv.DictReader(file):
                place, name = Path(row["run"]), "/".join(Path(row["run"]).parts[-2:])
                here = name in cards and (not place.exists() or place.samefile(cards[name]["folder"]))
                found.setdefault(row["arm"], []).extend([name] if here and row.get("method") != "given" else [])
    return found


def environment(cards: dict[str, dict]) -> dict[str, dict[str, list[str]]]:
    """What the runs were made with: per fact its values, and the runs with each."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, card in cards.items():
        facts = card["facts"]
        changed = {True: ", with uncommitted changes", False: "", None: ", unknown whether changed"}
        code = facts.get("git_commit") and facts["git_commit"][:10] + changed[facts.get("git_dirty")]
        about = {"machine": facts.get("device"), "threads": facts.get("threads"), "code": code or "unknown commit"}
        about |= {"dataset digest": (facts.get("dataset_digest") or "")[:16], "Python": facts.get("python")}
        for fact, value in (about | (facts.get("versions") or {})).items():
            if value:
                found.setdefault(fact, {}).setdefault(str(value), []).append(name)
    return found


def compared(newest: Path | None, cards: dict[str, dict]) -> dict[str, Any]:
    """What the index says of the newest comparison."""
    metrics = read(newest / "metrics.json") if newest else {}
    if not metrics.get("summary"):
        return {"rows": []}
    metric = read(newest / "params.json").get("metric", "top1")
    rows, runs = comparison.rows(metrics, metric), arms(newest, cards)
    for row in rows:
        row["runs"] = runs.get(row["arm"], [])
        row["again"] = commands.again(row["runs"], cards)
    by_arm = {row["arm"]: row for row in rows}
    pictures = sorted((newest / "figures").glob("*.png"))
    named = {run for each in runs.values() for run in each}
    known = lambda columns: [c for c in columns if any(row.get(c.key) is not None for row in rows)]  # noqa: E731
    columns = known(comparison.columns(metric, paired="paired" in metrics))
    return {
        "name": f"compare/{newest.name}",
        "rows": rows,
        "columns": columns,
        "score": columns[1].title,
        "brief": [c for c in columns if c.key in comparison.BRIEF],
        "more": known(comparison.more(metrics)),
        "budgets": comparison.budgets(rows),
        "advice": [advice | {"row": by_arm.get(advice["use"])} for advice in metrics.get("advice", [])],
        "volumes": metrics.get("volumes", []),
        "missing": [said for part, said in comparison.PARTS.items() if part not in metrics],
        "others": [name for name, card in cards.items() if "method" in card["metrics"] and name not in named],
        "figures": {picture.stem: embedded(picture, 1800) for picture in pictures},
        "speed": (metrics.get("speed") or [{}])[0],
        "baseline": metrics.get("baseline"),
        "datasets": sorted({cards[run]["metrics"].get("dataset") or "?" for run in named}),
    }


def build(outputs: Path) -> Path:
    """Write outputs/report/ and return its index page."""
    pages = outputs / "report"
    pages.mkdir(parents=True, exist_ok=True)
    finished = sorted(mark.parent for mark in outputs.glob("*/*/DONE"))
    unfinished = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in outputs.glob("*/*/params.json")
                        if not (p.parent / "DONE").exists())  # fmt: skip
    cards = {f"{run.parent.name}/{run.name}": run_card(run, pages) for run in finished}
    comparisons = [run for run in finished if run.parent.name == "compare"]
    newest = max(comparisons, key=lambda run: (run / "DONE").stat().st_mtime, default=None)
    page = pages / "index.html"
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (HERE / "index.html.j2").read_text()
    )
    page.write_text(
        template.render(
            cards=cards,
            unfinished=unfinished,
            environment=environment(cards),
            compared=compared(newest, cards),
            sure=comparison.sure,
            other_images=lambda run: commands.on_other_images(run, cards),
        )
    )
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python report/build.py FOLDER, a folder of runs such as outputs")
    print(f"report: {build(Path(sys.argv[1])).resolve()}")
