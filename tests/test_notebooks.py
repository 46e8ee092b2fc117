"""Every notebook top to bottom in a fresh kernel; then in a real JupyterLab, its widgets used as a person would.

All share one results folder, as a person has it: later notebooks read the runs of earlier ones, and the browser
those of the kernels, so nothing is trained twice. They are trained as briefly as every cell allows: what only holds
at full size is checked by `python -m ironlogic run`. The browser is headless Chromium. Its tests wait for states
that the page itself reports (kernel idle, execution counts, texts shown), never for a time, and know no pixels:
pictures of the pages are kept for people, in the folder that IRONLOGIC_SHOTS names or a temporary one.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ironlogic.notebooks import execute, find_notebooks, read_notebook, set_parameters
from ironlogic.session import ROOT

import nbformat
import pytest
from PIL import Image

with contextlib.suppress(ImportError):  # conftest skips what is marked `browser` then, and says so
    from playwright import sync_api
    from playwright.sync_api import expect

pytestmark = pytest.mark.slow
in_browser = pytest.mark.browser

BRIEF = {
    "02": {"ROWS": 160, "SEEDS": 2, "QUESTIONS": 40},
    "03": {"ROWS": 64, "SEEDS": 1},
    "05": {"ROWS": 160, "SEEDS": 2, "QUESTIONS": 40},
    "06": {"ROWS": 160, "STEPS": 2, "TRAININGS": 2, "PROBLEMS": 16, "QUESTIONS": 17},
    "07": {"PROMPTS": 4},
}

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("IRONLOGIC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # conftest closes Python's sockets, not these
]
HERE = re.compile(r"(http|ws)://127\.0\.0\.1[:/]|(data|blob|about):")
ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+)/lab\?(token=\w+)")
LAB = [
    *("--no-browser", "--allow-root", "--ip=127.0.0.1", "--LabApp.expose_app_in_browser=True"),
    *("--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
    "--LabApp.extension_manager=readonly",
]
SETTINGS = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'  # no pop-up over the page
# Code cells of the notebook in front, [count, outputs] each, while its kernel is idle; null before and while busy.
CELLS = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
    if (kernel?.connectionStatus !== 'connected' || kernel.status !== 'idle') return null;
    const models = panel.content.widgets.map(cell => cell.model).filter(model => model.type === 'code');
    return models.map(model => [model.executionCount, model.outputs.toJSON()]);
}"""
RAN = f"""() => {{
    const cells = ({CELLS})();
    return cells && (cells.every(([count]) => count) || cells.some(([_, outputs]) =>
        outputs.some(output => output.output_type === 'error')));
}}"""
NEXT = ("Alt+ArrowDown", "ArrowDown", "Enter")  # of a drop-down: JupyterLab takes a bare arrow for itself
SCRIPTS = '<img src="data:," onerror="window.caught = 1"><script>window.caught = 1</script>'


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@contextmanager
def one_core() -> Iterator[None]:
    """For processes started here: they train one after the other, as starting others would take longer."""
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


# -- in a kernel


def checkout() -> set[Path]:
    """What lies in the folders that a notebook could write into by mistake."""
    files = [path for name in ("notebooks", "data", "ironlogic") for path in (ROOT / name).rglob("*")]
    return {path for path in (*files, *ROOT.iterdir()) if "__pycache__" not in path.parts and path.name[0] != "."}


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_notebook_top_to_bottom(path, shared_runs, monkeypatch, network_attempts):
    monkeypatch.setenv("IRONLOGIC_RUNS", str(shared_runs))
    monkeypatch.delenv("OMP_NUM_THREADS")  # as a person has it
    before, number, notebook = checkout(), path.stem[:2], read_notebook(path)
    set_parameters(notebook, BRIEF.get(number, {}))
    with contextlib.nullcontext() if number == "03" else one_core():
        execute(notebook, path, timeout=1200)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert checkout() == before
    assert network_attempts.read_text() == ""


# -- the browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, shared_runs: Path) -> Iterator[tuple[str, str]]:
    """A JupyterLab with nobody's settings on a copy of the notebooks (it saves what it runs): address and token."""
    folder = tmp_path_factory.mktemp("lab")
    work, log = folder / "work", folder / "lab.log"
    (work / "notebooks").mkdir(parents=True)
    for path in find_notebooks():
        notebook = read_notebook(path)
        set_parameters(notebook, BRIEF.get(path.stem[:2], {}))
        nbformat.write(notebook, work / "notebooks" / path.name)
    for name in ("data", "ironlogic"):
        (work / name).symlink_to(ROOT / name, target_is_directory=True)
    notices = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notices.parent.mkdir(parents=True)
    notices.write_text(SETTINGS)
    env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
        env[name] = str(folder / name)
    env |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    env |= {"IRONLOGIC_RUNS": str(shared_runs)}
    command = [sys.executable, "-m", "jupyterlab", *LAB, f"--ServerApp.root_dir={work}"]
    with log.open("w") as lines, one_core():
        server = subprocess.Popen(command, stdout=lines, stderr=lines, env=env)
    with server:
        try:
            yield await_address(log, server)
        finally:
            server.terminate()  # it takes its kernels with it
    attempts = Path(os.environ["IRONLOGIC_NETWORK_LOG"]).read_text()  # those at the end: no test has looked at them
    assert attempts == ""


def await_address(log: Path, server: subprocess.Popen) -> tuple[str, str]:
    end = time.monotonic() + 120
    while not (found := ADDRESS.search(text := log.read_text())):
        assert server.poll() is None, f"JupyterLab did not start:\n{text[-3000:]}"
        assert time.monotonic() < end, f"JupyterLab gave no address in 120 s:\n{text[-3000:]}"
        time.sleep(0.1)
    return found[1], found[2]


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def window(browser: "sync_api.Browser") -> Iterator["sync_api.Page"]:
    """A fresh page. In the end it must have asked this machine only, and none of its scripts may have failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 1100}, device_scale_factor=1)
    asked: list[str] = []
    broken: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    try:
        yield page
    finally:
        context.close()
    outside = [url for url in asked if not HERE.match(url)]
    assert outside == [], "requests that left the machine"
    assert broken == [], "scripts of the page that failed"


@pytest.fixture
def opened(lab, browser, tmp_path_factory) -> Callable:
    """opened(number, widget): page of the notebook after all its cells ran; text and picture of the widget."""
    shots = Path(os.environ.get("IRONLOGIC_SHOTS") or tmp_path_factory.mktemp("shots"))
    shots.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open_notebook(number: str, widget: str) -> Iterator[tuple]:
        (path,) = find_notebooks([number])
        with window(browser) as page:
            page.set_default_timeout(60_000)
            page.goto(f"{lab[0]}/lab/workspaces/test{number}/tree/notebooks/{path.name}?reset&{lab[1]}")
            try:
                page.wait_for_function(CELLS)
                page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
                page.wait_for_function(RAN, timeout=600_000)
                outputs = [output for _, outputs in page.evaluate(CELLS) for output in outputs]
                assert [output for output in outputs if output["output_type"] == "error"] == []
                assert [output for output in outputs if output.get("name") == "stderr"] == []
                text = page.locator(f".il-{widget}-text .widget-html-content")
                text.scroll_into_view_if_needed()
                page.screenshot(path=shots / f"{number}-as-it-comes.png")
                yield page, text, page.locator(f".il-{widget}-plot img")
                page.wait_for_function(CELLS)  # a callback sends its text first and its picture a moment later
                page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
            finally:
                page.screenshot(path=shots / f"{number}-in-the-end.png")

    return open_notebook


def press(control: "sync_api.Locator", *keys: str) -> None:
    """Keys typed with the focus where it was put, which they must not take away."""
    control.focus()
    for key in keys:
        control.page.keyboard.press(key)
    expect(control).to_be_focused()


@contextmanager
def redrawn(picture: "sync_api.Locator") -> Iterator[None]:
    source = picture.get_attribute("src")
    yield
    expect(picture).not_to_have_attribute("src", source)


def retype(box: "sync_api.Locator", text: str) -> None:
    """A person's way: into the box, all of it selected, the new text key by key."""
    box.click()
    box.page.keyboard.press("Control+A")
    box.page.keyboard.type(text)
    expect(box).to_have_value(text)


def upload(page: "sync_api.Page", button: str, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        press(page.locator(f".il-{button}"), "Enter")
    chooser.value.set_files(file)


# -- what a person does


@in_browser
def test_burden_widget_by_keyboard_and_hostile_text_is_not_run(opened):
    with opened("01", "burden") as (page, text, picture):
        after, ratio = text.locator("[dir=auto]"), page.locator(".il-burden-ratio [role=slider]")
        box = page.locator(".il-burden-text textarea")
        expect(text).to_contain_text("asked for 70%")
        with redrawn(picture):
            press(ratio, *["ArrowLeft"] * 8)
        expect(text).to_contain_text("asked for 30%")
        expect(picture).to_have_attribute("alt", re.compile(r"ratio 0\.3"))

        mine = "please keep `a b c d e f g h` as it is my dear old friend"
        retype(box, mine)
        press(ratio, "Home")
        expect(text).to_contain_text("asked for 0%")
        expect(after).to_have_text(mine)
        expect(after.locator("span")).to_have_count(0)
        press(ratio, "End")
        expect(text).to_contain_text("asked for 100%")
        expect(after.locator("span")).not_to_have_count(0)
        expect(after).to_contain_text("`a b c d e f g h`")
        assert sorted(after.inner_text().split()) == sorted(mine.split()), "words were added or lost"

        press(page.locator(".il-burden-protect input"), "Space")
        expect(after).not_to_contain_text("`a b c d e f g h`")
        unit = page.locator(".il-burden-unit select")
        press(unit, *NEXT)
        expect(unit.locator("option:checked")).to_have_text("char")
        expect(after).not_to_contain_text("please")
        assert sorted(after.inner_text()) == sorted(mine), "letters were added or lost"
        with redrawn(picture):
            press(page.locator(".il-burden-draw [role=slider]"), "ArrowRight")

        retype(box, f"look {SCRIPTS} <b>here</b> &amp; now")
        press(ratio, "Home")
        expect(after).to_have_text(f"look {SCRIPTS} <b>here</b> &amp; now")
        expect(text.locator("img, script, [dir=auto] b")).to_have_count(0)
        assert page.evaluate("() => window.caught") is None
        # The same text would have run as markup: this test can fail.
        page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", SCRIPTS)
        page.wait_for_function("() => window.caught === 1")


@in_browser
def test_memory_widget_by_keyboard(opened):
    with opened("00", "memory") as (page, text, picture):
        card = page.locator(".il-memory-card_gib [role=slider]")
        press(card, "Home")
        expect(text).to_contain_text("does not fit")
        with redrawn(picture):
            press(card, "End")
        expect(text).not_to_contain_text("does not fit")
        with redrawn(picture):
            press(page.locator(".il-memory-length [role=slider]"), "ArrowLeft")


@in_browser
def test_answers_widget_by_keyboard(opened):
    with opened("02", "answers") as (page, text, _):
        asked, arms = text.locator("td").first, ["base", "SFT", "FT", "FT mixed", "FT as the seed"]
        expect(text.locator("th")).to_have_text(["asked", "answer", *arms])
        scrambled = asked.inner_text()
        press(page.locator(".il-answers-ratio [role=slider]"), "Home")
        expect(asked).not_to_have_text(scrambled)
        clean = asked.inner_text()
        assert sorted(clean.split()) == sorted(scrambled.split())
        press(page.locator(".il-answers-problem select"), *NEXT)
        expect(asked).not_to_have_text(clean)


@in_browser
def test_lens_widget_by_keyboard(opened):
    with opened("04", "lens") as (page, text, picture):
        expect(text).to_contain_text("base, layer 4")
        expect(text).to_contain_text("adapter, layer 4")
        press(page.locator(".il-lens-layer [role=slider]"), "Home")
        expect(text).to_contain_text("adapter, layer 0")
        with redrawn(picture):
            press(page.locator(".il-lens-position [role=slider]"), *["ArrowLeft"] * 3)
        press(page.locator(".il-lens-model select"), "Alt+ArrowDown", "Home", "Enter")
        expect(text).not_to_contain_text("adapter, layer")
        box = page.locator(".il-lens-text textarea")
        retype(box, "What is the color of the fox please? <b>bold</b>")
        box.blur()
        expect(text).to_contain_text("<b>")


@in_browser
def test_picture_widget_by_keyboard(opened, tmp_path):
    with opened("03", "picture") as (page, text, _):
        shown, mine = text.locator("img"), tmp_path / "mine.png"
        with redrawn(shown):
            press(page.locator(".il-picture-picture select"), *NEXT)
        retype(page.locator(".il-picture-question input"), f"what color {SCRIPTS}")
        page.keyboard.press("Enter")
        expect(text).to_contain_text("<script>")
        assert page.evaluate("() => window.caught") is None
        Image.new("RGB", (40, 20), "red").save(mine)
        with redrawn(shown):
            upload(page, "picture-upload", mine)
        mine.write_bytes(b"no picture")
        upload(page, "picture-upload", mine)
        expect(text).to_contain_text("Error")


@in_browser
def test_robustness_widget_by_keyboard(opened):
    with opened("05", "robustness") as (page, text, picture):
        for control in ("sort", "measure"):
            with redrawn(picture):
                press(page.locator(f".il-robustness-{control} select"), *NEXT)
        press(page.locator(".il-robustness-arms select"), "Alt+Home", "Home")
        expect(text).to_contain_text("trainings: base 1")
        expect(text).not_to_contain_text("SFT")
        row = page.locator("details:has(summary)").first  # of the table of claims
        press(row.locator("summary"), "Enter")
        expect(row).to_have_attribute("open", "")


@in_browser
def test_samples_widget_by_keyboard(opened):
    with opened("06", "samples") as (page, text, _):
        expect(text.locator("th")).to_have_count(5)  # the start and four arms
        expect(text.locator("tr")).to_have_count(9)
        before = text.locator("p").first.inner_text()
        press(page.locator(".il-samples-problem select"), *NEXT)
        expect(text.locator("p").first).not_to_have_text(before)


@in_browser
def test_chat_by_keyboard(opened):
    with opened("07", "chat") as (page, _, _):
        talk, button = page.locator(".il-chat-talk .widget-html-content"), page.locator(".il-chat-ask")
        model = page.locator(".il-chat-model select")

        def ask() -> None:
            button.focus()  # which it loses while the answer is written: it can't be pressed then
            page.keyboard.press("Enter")

        expect(talk).to_contain_text("tokens/s")
        press(page.locator(".il-chat-new"), "Enter")
        expect(talk).to_have_text("")
        press(page.locator(".il-chat-ratio [role=slider]"), "Home")
        retype(page.locator(".il-chat-text textarea"), f"What is the color of the fox? {SCRIPTS}")
        press(model, "Alt+ArrowDown", "Home", "Enter")
        ask()
        expect(talk).to_contain_text("tokens/s")
        expect(talk).to_contain_text("<script>")
        expect(talk).to_contain_text("base")
        assert page.evaluate("() => window.caught") is None
        press(model, "Alt+ArrowDown", "End", "Enter")
        ask()
        expect(talk).to_contain_text("merged")
        expect(button).to_be_enabled()


@in_browser
@pytest.mark.parametrize(
    ("leak", "event"),
    [
        ('<img src="http://192.0.2.1/x">', "request"),
        ("<script>new WebSocket('ws://x.test')</script>", "websocket"),
    ],
)
def test_a_request_that_leaves_is_noticed(browser, leak, event):
    with pytest.raises(AssertionError, match="left the machine"), window(browser) as page, page.expect_event(event):
        page.set_content(leak)
