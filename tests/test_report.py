"""The report of a made-up outputs folder: whole, alone, readable, and the same in a browser."""

import base64
import csv
import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chrome", "google-chrome", "chromium-browser"))), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on the PATH")
ARMS = {"dense 1": (0.98, 1.0, 0.05), "ucb 0.5": (0.97, 1.9, 0.02), "random 0.5": (0.7, 1.9, 0.02)}
ACCURACY = ["98.0", "97.0", "70.0"]


def write_run(out: Path, notebook: str, name: str, metrics: dict, picture: str = "", start: str = "", **params) -> Path:
    run = out / notebook / name
    (run / "figures").mkdir(parents=True)
    options = "".join(f" -r {key} {value}" for key, value in params.items())
    command = f"papermill notebooks/{notebook}.ipynb out.ipynb{options} -r run_name {name}"
    facts = {"command": command, "start": start, "wall_s": 1.5, "git_commit": "c" * 40, "git_dirty": False}
    facts |= {"device": "cpu (x86_64, 2 cores)", "dataset_digest": "d" * 64, "versions": {"torch": "2.4"}}
    texts = {"metrics": metrics, "params": params | {"run_name": name}, "provenance": facts}
    for file, content in texts.items():
        (run / f"{file}.json").write_text(json.dumps(content))
    cells = [nbformat.v4.new_markdown_cell(f"# {notebook}\n$a_b$"), nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run / "notebook.ipynb")
    if picture:
        Image.new("RGB", (1900, 250), "grey").save(run / "figures" / f"{picture}.png")
    (run / "DONE").write_text("")
    return run


def tables(runs: dict[str, Path]) -> dict:
    """What compare.ipynb writes."""
    parts = ("summary", "paired", "speed", "elsewhere", "calibration", "foreground", "volumes")
    found = {name: [] for name in parts}
    for arm, (top1, speedup, macs) in ARMS.items():
        method, ratio = arm.split()
        summary = {"arm": arm, "method": method, "keep_ratio": float(ratio), "seeds": 1, "top1": top1, "±": None}
        summary |= {"difference": top1 - 0.98, "p": 1e-9, "macs_g": macs, "params_m": 0.69, "latency_ms": 20 / speedup}
        found["summary"].append(summary | {"speedup": speedup, "n_test": 2000, "pareto": arm != "random 0.5"})
        change = {"difference": top1 - 0.98, "low": top1 - 0.99, "high": top1 - 0.97, "p": 1e-9}
        p_holm = {"dense 1": None, "ucb 0.5": 0.2, "random 0.5": 2e-9}[arm]
        found["paired"].append({"arm": arm, **change, "p_holm": p_holm, "random": None})
        timed = {"model": arm, "speedup": speedup, "speedup_iqr": 0.1, "batch_size": 32, "device": "cpu", "threads": 1}
        found["speed"].append(timed | {"precision": "fp32"})
        found["elsewhere"].append({"arm": arm, "batch 1, fp32": speedup - 0.25})
        found["calibration"].append({"arm": arm, "temperature": 0.6, "ece": 0.086, "ece_scaled": 0.011})
        found["volumes"].append({"method": method, "arms": 1, "cheapest": macs, "best": top1, "volume": 1 - 20 * macs})
    random = {"random": "random 0.5", "p_random": 1e-12}
    found["paired"][1] |= random | {"difference_random": 0.27, "low_random": 0.25, "high_random": 0.29}
    found["foreground"].append({"arm": "ucb 0.5", "precision": 0.3, "precision_random": 0.16, "recall": 0.9})
    found["advice"] = [{"wish": "fastest within one point", "use": "ucb 0.5", "because": "top1 0.970 at 1.90×"}]
    return found | {"runs": 3, "baseline": "dense 1"}


@pytest.fixture
def out(tmp_path) -> Path:
    out = tmp_path / "outputs"
    dense = write_run(out, "dense", "d", {"method": "dense", "dataset": "digits", "top1": 0.98, "macs_g": 0.05})
    stage1 = write_run(out, "ucb_stage1", "s", {"top1": 0.98}, start=str(dense), ckpt="outputs/dense/d")
    runs = {"dense 1": dense}
    for method in ("ucb", "random"):
        metrics = {"method": method, "dataset": "digits", "keep_ratio": 0.5, "top1": 0.9, "macs_g": 0.02}
        params = {"stage1_checkpoint_path": "outputs/ucb_stage1/s", "selection": method}
        runs[f"{method} 0.5"] = write_run(out, "ucb_stage2", method, metrics, "kept", str(stage1), **params)
    comparison = write_run(out, "compare", "c", tables(runs), "kept", runs="outputs/*/*", metric="top1")
    for name in ("accuracy_macs", "accuracy_latency", "evaluation_results", "overlap"):
        Image.new("RGB", (900, 600), "grey").save(comparison / "figures" / f"{name}.png")
    lines = ["run,arm", *(f"/elsewhere/{run.parent.name}/{run.name},{arm}" for arm, run in runs.items())]
    (comparison / "runs.csv").write_text("\n".join(lines))
    return out


def build(out: Path) -> Path:
    result = subprocess.run([sys.executable, ROOT / "report" / "build.py", out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return out / "report" / "index.html"


class Page(HTMLParser):
    """The links, pictures, loaded resources and anchors of a page, and its text."""

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.images, self.resources, self.ids, self.texts = [], [], [], set(), []
        self.feed(page.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "img":
            self.images.append((found["src"], found.get("alt")))
        elif tag in ("script", "link", "iframe", "source", "video") and (found.get("src") or found.get("href")):
            self.resources.append(found)

    def handle_data(self, data):
        self.texts.append(data)


def test_every_page_stands_alone(out):
    pages = sorted(build(out).parent.glob("*.html"))
    assert len(pages) == 6, "five runs and the index"
    for path in pages:
        page = Page(path)
        assert page.resources == [] and not re.search(r"@import|url\(['\"]?http", path.read_text())
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.ids, link
            elif not link.startswith("http"):
                assert (path.parent / link).is_file(), link
        for source, alt in page.images:
            kind, data = source.split(",", 1)
            assert kind.startswith("data:image/") and base64.b64decode(data, validate=True)
            assert alt, "says what it shows"
    index = Page(pages[[path.name for path in pages].index("index.html")])
    assert {path.name for path in pages} - {"index.html"} <= {*index.links}


def test_the_index_says_what_to_use_how_sure_and_how_to_make_it(out):
    text = Page(build(out)).text
    assert "Not told apart from the baseline: −1.0 points, 95 % interval −2.0 to +0.0, p = 0.20." in text
    assert "+27.0 to random choices at the same cost. One training run" in text
    assert "−28.0 [−29.0, −27.0]" in text and "< 0.001" in text
    assert "speed, batch 1, fp32" in text and "1.65×" in text
    for provenance in out.glob("*/*/provenance.json"):
        assert json.loads(provenance.read_text())["command"] in text
    chain = [f"papermill notebooks/{notebook}.ipynb out.ipynb" for notebook in ("dense", "ucb_stage1", "ucb_stage2")]
    own = re.search(r"ucb 0.5 on your images (.*?) random 0.5 on|ucb 0.5 on your images (.*?) Then compare", text)
    own = own.group(1) or own.group(2)
    assert [own.index(command) for command in chain] == sorted(own.index(command) for command in chain)
    assert "dense.ipynb out.ipynb -r dataset PICTURES -r run_name mine-d" in own and own.count("PICTURES") == 1
    assert "-r stage1_checkpoint_path outputs/ucb_stage1/mine-s -r selection ucb -r run_name mine-ucb" in own
    for fact in ("cpu (x86_64, 2 cores)", "cccccccccc", "torch 2.4", "dddddddd"):
        assert fact in text
    assert "Differs:" not in text and "Not in this comparison" not in text
    assert str(out.parent) not in text


@pytest.fixture
def commands():
    spec = importlib.util.spec_from_file_location("commands", ROOT / "report" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_for_other_images_follow_what_a_run_starts_from_and_nothing_else(commands):
    """A file in a run's folder, and a run that is no start, are followed too, but bring no images along."""

    def card(notebook: str, options: str, start: str | None = None, **params: str) -> dict:
        return {
            "command": f"papermill notebooks/{notebook}.ipynb out.ipynb {options}",
            "start": start,
            "params": params,
        }

    runs = {
        "acdc/x": card("acdc", "-r run_name x"),
        "dense/d": card("dense", "-r dataset digits -r run_name d"),
        "merging/a": card("merging", "-r run_name a", "/here/outputs/dense/d", model_path="outputs/dense/d"),
        "eap/y": card("eap", "-r like outputs/acdc/x -r run_name y", like="outputs/acdc/x"),
        "merging/b": card("merging", "-r model_path outputs/dense/d -r schedule_path outputs/merging/a/schedule.json",
                          "/here/outputs/dense/d", model_path="outputs/dense/d",
                          schedule_path="outputs/merging/a/schedule.json"),
    }  # fmt: skip
    assert commands.on_other_images("eap/y", runs) == [
        "papermill notebooks/acdc.ipynb out.ipynb -r dataset PICTURES -r run_name mine-x",
        "papermill notebooks/eap.ipynb out.ipynb -r dataset PICTURES -r like outputs/acdc/mine-x -r run_name mine-y",
    ]
    assert commands.on_other_images("merging/b", runs)[-1] == (
        "papermill notebooks/merging.ipynb out.ipynb -r model_path outputs/dense/mine-d "
        "-r schedule_path outputs/merging/mine-a/schedule.json -r run_name mine-b"
    )


def test_an_arm_is_linked_to_no_run_that_only_has_its_name(out, tmp_path):
    """Runs of another output folder, and models given by path, may go by the name of one that is here."""
    place = out / "compare" / "c" / "runs.csv"
    rows = list(csv.DictReader(place.open()))
    elsewhere = tmp_path / "others" / "ucb_stage2" / "ucb"
    elsewhere.mkdir(parents=True)
    rows[1]["run"], rows[0]["method"] = str(elsewhere), "given"
    with place.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    text = Page(build(out)).text
    for row in rows[:2]:
        assert f"{row['arm']} on your images" not in text


def test_a_new_method_shows_up_by_its_metrics_alone(out):
    write_run(out, "mine", "new", {"method": "brand-new", "dataset": "digits", "setting": "7 knots", "top1": 0.5})
    facts = out / "mine" / "new" / "provenance.json"
    facts.write_text(facts.read_text().replace('"git_dirty": false', '"git_dirty": true'))
    (out / "mine" / "bare").mkdir()
    (out / "mine" / "bare" / "metrics.json").write_text('{"method": "without a notebook"}')
    (out / "mine" / "bare" / "DONE").write_text("")
    (out / "mine" / "begun").mkdir()
    (out / "mine" / "begun" / "params.json").write_text("{}")
    page = Page(build(out))
    assert "mine-new.html" in page.links and "brand-new 7 knots accuracy 50.0%," in page.text
    assert "Finished, but not in this comparison" in page.text and "without a notebook" in page.text
    assert "No executed notebook was kept." in page.text
    assert "Not finished, so not shown: mine/begun" in page.text
    assert "Differs:" in page.text and "with uncommitted changes: mine/new" in page.text


def test_older_comparisons_and_none(out):
    metrics = json.loads((out / "compare" / "c" / "metrics.json").read_text())
    old = {name: metrics[name] for name in ("runs", "baseline", "summary", "advice", "speed")}
    (out / "compare" / "c" / "metrics.json").write_text(json.dumps(old))
    text = Page(build(out)).text
    assert "Not in this comparison," in text and "paired intervals" in text and "calibration" in text
    assert (
        "not corrected for many comparisons" in text
        and "speed, batch" not in text
        and "Which method over all budgets" not in text
    )
    shutil.rmtree(out / "compare")
    assert "no comparison of them yet" in Page(build(out)).text


def open_in(browser: str, page: Path, width: int, script: str) -> tuple[dict, list[str]]:
    """What a script returns in the page, shown `width` pixels wide, and the console's errors.

    In a frame, since the window itself is at least 500 pixels wide.
    """
    report = f"<script>addEventListener('load', () => parent.told((() => {{ {script} }})()))</script>"
    framed = html.escape(page.read_text().replace("</html>", report + "</html>"))
    wrapper = page.parent / f"framed{width}.html"
    wrapper.write_text(
        "<!doctype html><pre></pre><script>function told(found) { document.querySelector('pre').textContent ="
        f" JSON.stringify(found) }}</script><iframe width={width} height=900 srcdoc='{framed}'></iframe>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={page.parent / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    result = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    wrapper.unlink()
    told = re.search(r"<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    assert told and told.group(1), result.stderr[-2000:]
    return json.loads(html.unescape(told.group(1))), re.findall(r".*CONSOLE.*", result.stderr)


MEASURED = """
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  const table = document.querySelector("#cost ~ .scroll table"), heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex(head => head.textContent.startsWith("accuracy"));
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const clicked = () => { heads[column].querySelector("button").click(); return [heads[column].ariaSort, order()]; };
  return {
    inner: innerWidth, wide: document.documentElement.scrollWidth, sorted: [clicked(), clicked()],
    broken: images.filter(image => image.complete && !image.naturalWidth).length,
    copies: document.querySelectorAll("pre + .copy").length, listings: document.querySelectorAll("pre").length,
  };
"""


@in_browser
@pytest.mark.parametrize("width", [1300, 390])
def test_in_a_browser_nothing_fails_tables_sort_and_it_fits(out, width):
    found, console = open_in(BROWSER, build(out), width, MEASURED)
    assert console == []
    assert found["inner"] == width and found["wide"] <= width
    assert found["sorted"] == [["descending", ACCURACY], ["ascending", ACCURACY[::-1]]]
    assert found["broken"] == 0 and found["copies"] == found["listings"] > 0


@in_browser
def test_executed_notebooks_open_without_an_error(out):
    page = build(out).parent / "ucb_stage2-ucb.html"
    found, console = open_in(BROWSER, page, 390, "return {back: document.querySelector('a').textContent}")
    assert console == [] and found["back"] == "← the report"


@in_browser
def test_the_console_is_heard(out, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><script>nothing.there</script></html>")
    assert any("nothing is not defined" in line for line in open_in(BROWSER, page, 390, "return {}")[1])


@pytest.mark.parametrize(
    ("first", "mean", "said"),
    [(0.02, 0.01, "Better than the baseline, by the first seed: +2.0 points"),
     (0.02, -0.01, "Not told apart from the baseline, by the first seed: +2.0 points")],
)  # fmt: skip
def test_what_one_seed_says_is_not_said_of_all(monkeypatch, first, mean, said):
    monkeypatch.syspath_prepend(ROOT / "report")
    import comparison

    arm = {"arm": "ucb 0.5", "method": "ucb", "seeds": 3, "top1": 0.9, "±": 0.01, "difference": mean, "p": 0.01}
    paired = {"arm": "ucb 0.5", "difference": first, "low": 0.01, "high": 0.03, "p_holm": 0.01}
    (row,) = comparison.rows({"summary": [arm], "paired": [paired], "baseline": "dense 1"}, "top1")
    assert comparison.sure(row).startswith(said)
    assert comparison.sure(row).endswith(f"Means over 3 seeds: {'+' if mean > 0 else '−'}1.0.")
