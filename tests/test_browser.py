"""A real browser: explorers in JupyterLab answer a drag and a click, and the exported page works without a kernel.

Chromium comes from the system, playwright drives it. Pictures of what was seen are left in build/screenshots/.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import matplotlib
import nbformat
import psutil
import pytest
from conftest import load_tool

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
PATIENCE = 180_000  # milliseconds that a busy machine may take for what a quiet one does in a few seconds
sync_api.expect.set_options(timeout=PATIENCE)
NOTEBOOK_SECONDS = 600  # the longest that all cells of a notebook may take
TOKEN = secrets.token_hex(16)
NOTEBOOK = ROOT / "notebooks" / "07_analysis.ipynb"  # it has all three explorers that are touched here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the notebook that is opened: a copy, so that nothing here can change the course."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copy(NOTEBOOK, folder)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of programs that must not see this user's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    changed = {"HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # matplotlib's list of fonts takes seconds to make again
    return kept | changed | {"MPLCONFIGDIR": matplotlib.get_cachedir()}


def stop(process):
    """End a program with everything that it started: kernels live in sessions of their own and would stay."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    assert psutil.wait_procs(family, 20)[1] == []


@pytest.fixture(scope="module")
def lab(folder, environment, tmp_path_factory):
    """The address of a JupyterLab of our own: loopback only, nothing fetched, nothing saved by itself."""
    settings = tmp_path_factory.mktemp("settings")
    overrides = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
        # cells outside of the window would not be in the page
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    }
    (settings / "overrides.json").write_text(json.dumps(overrides))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True, "ServerApp.open_browser": False, "IdentityProvider.token": TOKEN,
        "LabApp.app_settings_dir": settings, "LabApp.expose_app_in_browser": True, "LabApp.extension_manager": "readonly",
        # should these tests themselves be killed: kernels and server end after a while without a visitor
        "MappingKernelManager.cull_idle_timeout": 600, "MappingKernelManager.cull_connected": True,
        "ServerApp.shutdown_no_activity_timeout": 600,
        "LabApp.news_url": None, "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    log = settings / "lab.log"
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=written, stderr=subprocess.STDOUT)
    try:
        until, address = time.monotonic() + PATIENCE / 1000, f"http://127.0.0.1:{port}"
        while not answers(f"{address}/api/status?token={TOKEN}"):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        stop(process)


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )  # it refuses root otherwise
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A window that reaches this machine only."""
    context = browser.new_context(viewport={"width": 1100, "height": 1000})
    context.set_default_timeout(PATIENCE)
    local = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|(file|data|blob):")
    context.route(lambda url: not local.match(url), lambda route: route.abort())
    yield context.new_page()
    context.close()


RUN_ALL = """async seconds => {
    const notebook = jupyterapp.shell.currentWidget, late = new Promise((_, no) => setTimeout(no, 1000 * seconds, "too slow"));
    await Promise.race([late, (async () => {
        await notebook.sessionContext.ready;
        await jupyterapp.commands.execute("notebook:run-all-cells");
    })()]);
}"""
OPEN = "name => window.jupyterapp?.shell.currentWidget?.context?.path === name && jupyterapp.shell.currentWidget.context.isReady"
BYTES = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"


LAYER, PATCHES = ".widget-hslider:has(.widget-label:text-is('layer'))", ".widget-gridbox"


def keep(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def changed_picture(image, act):
    """Do something that must change a picture; its PNG bytes before and after."""
    sync_api.expect(image).to_be_visible()
    before, source = bytes(image.evaluate(BYTES)), image.get_attribute("src")
    act()
    sync_api.expect(image).not_to_have_attribute("src", source)
    after = bytes(image.evaluate(BYTES))
    assert before.startswith(b"\x89PNG") and after.startswith(b"\x89PNG") and after != before
    return before, after


def explorers_with(page, control):
    """The explorers in which something matches this selector."""
    return page.locator(".widget-vbox", has=page.locator(control))


def drag_the_layer(page):
    """By mouse to the left, then by arrow key: the picture and the number beside the slider follow."""
    explorer = explorers_with(page, LAYER).first
    slider = explorer.locator(LAYER)
    image, handle, number = explorer.locator("img"), slider.locator(".noUi-handle"), slider.locator(".widget-readout")
    handle.scroll_into_view_if_needed()
    last = int(number.inner_text())

    def mouse():
        knob, rail = handle.bounding_box(), slider.locator(".noUi-target").bounding_box()
        page.mouse.move(knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2)
        page.mouse.down()
        page.mouse.move(rail["x"] + 2, knob["y"] + knob["height"] / 2, steps=4)
        page.mouse.up()

    changed_picture(image, mouse)
    sync_api.expect(number).to_have_text("0")

    def key():
        handle.focus()
        for _ in range(last):
            page.keyboard.press("ArrowRight")

    changed_picture(image, key)
    sync_api.expect(number).to_have_text(str(last))


def click_a_patch(page):
    """A click greys the patch and moves the bars; the reset button brings the first picture back."""
    explorer = explorers_with(page, PATCHES).first
    image, patch = explorer.locator("img"), explorer.locator(f"{PATCHES} button").nth(1)
    image.scroll_into_view_if_needed()
    corners = [explorer.locator(f"{PATCHES} button").nth(i).bounding_box() for i in (0, 1)]
    assert corners[1]["x"] >= corners[0]["x"] + corners[0]["width"] >= 40  # side by side, not squeezed
    whole, _ = changed_picture(image, patch.click)
    sync_api.expect(patch).to_have_text("×")
    sync_api.expect(patch).to_have_css("background-color", "rgb(128, 128, 128)")
    _, again = changed_picture(image, explorer.get_by_role("button", name="put all back").click)
    assert again == whole
    sync_api.expect(patch).to_have_text("")
    changed_picture(image, explorer.get_by_role("button", name="drop what the mask drops").click)


def leaf_through(page):
    """Radio buttons by mouse and by key: exactly one page is open, each time another one."""
    book = page.locator("[id^=flipbook-]:has(> fieldset)").first
    book.scroll_into_view_if_needed()
    seen = []

    def look():
        opened = book.locator(".page:visible")
        sync_api.expect(opened).to_have_count(1)
        panels = opened.locator("figure")
        assert [caption.split(":")[0] for caption in panels.all_inner_texts()] == ["input", "mask", "masked input"]
        pictures = panels.locator("img").evaluate_all("all => all.map(image => [image.src, image.naturalWidth])")
        assert len(pictures) == 2 and all(width > 0 for _, width in pictures)
        seen.append((opened.get_attribute("class"), panels.nth(1).inner_text(), pictures[0][0]))

    def gate(number):
        return book.locator("fieldset", has_text="gate").get_by_label(str(number), exact=True)

    look()
    gate(0).check()
    look()
    page.keyboard.press("ArrowRight")
    sync_api.expect(gate(1)).to_be_checked()
    look()
    book.get_by_text("this vote alone").click()
    look()
    book.locator("fieldset", has_text="image").get_by_label("2", exact=True).check()
    look()
    pages, captions, masks = map(set, zip(*seen))
    assert len(pages) == 5 and len(captions) > 1 and len(masks) > 1  # two gates may well say the same


def test_jupyterlab(page, lab):
    page.goto(f"{lab}/lab/tree/{NOTEBOOK.name}?token={TOKEN}")
    page.wait_for_function(OPEN, arg=NOTEBOOK.name)
    page.evaluate(RUN_ALL, NOTEBOOK_SECONDS)
    assert page.locator("[data-mime-type*=error]").all_inner_texts() == []
    for touch, name in ((drag_the_layer, "layer"), (click_a_patch, "patch"), (leaf_through, "flipbook")):
        touch(page)
        keep(page, f"jupyterlab-{name}")
    assert page.locator(".jp-Dialog, .jp-toastContainer *").count() == 0  # nothing asks about news, updates or a build


def test_exported_page_needs_no_kernel_and_no_network(page, tmp_path):
    """The page that tools/pages.py would write, from the outputs that the notebook has."""
    pages, exported = load_tool("pages"), tmp_path / "exported.html"
    notebook = pages.with_mathml(nbformat.read(NOTEBOOK, as_version=4))
    exported.write_text(pages.HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    page.context.set_offline(True)
    page.goto(exported.as_uri(), wait_until="domcontentloaded")
    leaf_through(page)
    keep(page, "exported-flipbook")
