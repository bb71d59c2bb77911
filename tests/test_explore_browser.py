"""The explorer in JupyterLab, worked by hand: a slider and a menu change the picture, and nothing complains.

EXPLORER_SCREENSHOT=explorer.png pytest tests/test_explore_browser.py keeps a picture of what the browser showed.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_report import BROWSER

ROOT = Path(__file__).resolve().parents[1]
MISSING = [name for name in ("playwright", "jupyterlab", "jupyterlab_widgets") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on the PATH"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
PATIENCE = 240_000  # milliseconds: a kernel starts, a model runs, and the machine may be busy
OUTPUT = ".jp-OutputArea-output"
READY = """() => {
  const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
  return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
DRAWN = """async () => {  // the bytes of the picture, as the browser has them
  const shown = document.querySelector('.jp-OutputArea-output img.widget-image');
  await shown.decode();
  const bytes = new Uint8Array(await (await fetch(shown.src)).arrayBuffer());
  return [shown.naturalWidth, String.fromCharCode(...bytes.slice(1, 4)), bytes.join()];
}"""
# Outputs that scrolled out of sight are otherwise not in the page; news are asked for in a box over the notebook.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def copied(folder: Path) -> Path:
    """The notebook as it is shipped, but for where its pictures go: nothing is written into the project."""
    content = json.loads((ROOT / "notebooks" / "explore.ipynb").read_text())
    [cell] = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    lines = "".join(cell["source"]).replace('"outputs"', json.dumps(str(folder / "outputs")))
    assert str(folder) in lines
    cell["source"] = lines
    path = folder / "served" / "explore.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


@contextlib.contextmanager
def lab(folder: Path, tmp: Path):
    """A JupyterLab that serves a folder, with settings of its own: the address of the Lab. It ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, log = secrets.token_hex(16), tmp / "lab.log"
    own = {name: str(tmp / name.lower()) for name in (
        *("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"),
        *("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"),
    )}  # fmt: skip
    for name, values in SETTINGS.items():
        file = tmp / "jupyterlab_settings_dir" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    environment = os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        *("--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
        "--LabApp.extension_manager=readonly",
    ]
    address = f"http://127.0.0.1:{port}"
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            time.sleep(0.2)
        yield f"{address}/lab/tree/explore.ipynb?token={token}"
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_slider_and_a_menu_change_the_picture_in_jupyterlab(tmp_path):
    from playwright.sync_api import sync_playwright

    notebook, complaints = copied(tmp_path), []
    with lab(notebook.parent, tmp_path) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1100})
            page.set_default_timeout(PATIENCE)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "console",
                lambda line: line.type == "error" and complaints.append(f"{line.text} ({line.location['url']})"),
            )
            work(page, address, tmp_path)
        finally:
            browser.close()
    assert complaints == []
    assert len(list(tmp_path.glob("outputs/explore/*/DONE"))) == 1


def work(page, address: str, folder: Path) -> None:
    page.goto(address)
    page.wait_for_function(READY)  # what is run before that is lost
    page.evaluate(RUN_ALL)
    page.wait_for_selector(f"{OUTPUT} img.widget-image")
    page.locator(f"{OUTPUT} .widget-vbox").first.evaluate("box => box.scrollIntoView()")
    sliders, tables = page.locator(f"{OUTPUT} .noUi-handle"), page.locator(f"{OUTPUT} .widget-html table")
    assert sliders.count() == 2 and page.locator(f"{OUTPUT} .widget-dropdown").count() == 2
    first, before = page.evaluate(DRAWN), told(tables)
    assert first[0] > 0 and first[1] == "PNG" and [row[0] for row in before] == ["dense", "topk", "tome"]

    sliders.first.press("ArrowRight")
    strength = page.locator(f"{OUTPUT} .widget-readout").first.inner_text()
    assert strength != before[1][1], "the slider itself has moved"
    wait_for(page, lambda: told(tables)[1][1] == strength)
    second = page.evaluate(DRAWN)
    assert second[0] > 0 and second[2] != first[2]
    assert told(tables)[2][:6] == before[2][:6], "the other side stays, but for its time"

    page.locator(f"{OUTPUT} .widget-dropdown select").nth(1).select_option("eap")
    wait_for(page, lambda: told(tables)[2][0] == "eap")
    third = page.evaluate(DRAWN)
    assert third[0] > 0 and third[2] != second[2] and told(tables)[1][:2] == ["topk", strength]
    units = page.locator(f"{OUTPUT} .widget-label").all_inner_texts()
    assert "share of the heads and of the neurons that stay" in units

    page.screenshot(path=folder / "lab.png")
    if wanted := os.environ.get("EXPLORER_SCREENSHOT"):
        shutil.copy(folder / "lab.png", wanted)


def told(table) -> list[list[str]]:
    """The rows of the table below the pictures, as text."""
    rows = table.locator("tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


def wait_for(page, holds) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not holds():
        assert time.monotonic() < deadline, "the explorer did not follow"
        page.wait_for_timeout(100)
