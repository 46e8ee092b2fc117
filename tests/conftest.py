"""What every test gets: few threads, no network, a results folder if it asks, and a stated reason to be skipped."""

import atexit
import inspect
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = "test_notebooks.py"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers (-n 2) share two cores
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "UNSLOTH_DISABLE_STATISTICS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in "PRESET RUNS BACKEND OFFLINE NO_INSTALL REPO REF INPUT".split():
    os.environ.pop(f"IRONLOGIC_{name}", None)  # a user's own settings are not under test


def close_network():
    """Let Python's sockets reach this machine only, and write down every attempt to go further.

    Needs nothing around it: its source is also run at the start of every Python that a test starts.
    """
    import ipaddress
    import os
    import socket

    itself = {"", "localhost", "ip6-localhost", socket.gethostname()}

    def refuse(what):
        with open(os.environ["IRONLOGIC_NETWORK_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{what}\n")
        raise ConnectionRefusedError(f"the tests have closed the network: {what}")

    def check(host):
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        try:
            address = ipaddress.ip_address(name.partition("%")[0])
            inside = address.is_loopback or address.is_unspecified
        except ValueError:
            inside = name in itself
        if not inside:
            refuse(name)

    def guard_method(method):
        def guarded(sock, *args):
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                check(args[-1][0])
            return method(sock, *args)

        return guarded

    def guard_lookup(lookup):
        def guarded(host, *args, **options):
            check(host)
            return lookup(host, *args, **options)

        return guarded

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guard_method(getattr(socket.socket, name)))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, guard_lookup(getattr(socket, name)))


def _close_network_everywhere() -> Path:
    """In this process now, by PYTHONPATH in every Python started from here. Returns the log of attempts."""
    folder = Path(tempfile.mkdtemp(prefix="il-closed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = inspect.getsource(close_network)
    (folder / "sitecustomize.py").write_text(f"{source}\n\nclose_network()\n", encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ["IRONLOGIC_NETWORK_LOG"] = str(folder / "attempts.txt")
    (folder / "attempts.txt").touch()
    close_network()
    return folder / "attempts.txt"


ATTEMPTS = _close_network_everywhere()


@pytest.fixture(autouse=True)
def network_attempts():
    """The log of attempts, one a line, empty at the start of a test; a test that leaves any there has failed.

    Libraries catch the refusal and go on, so that it alone would not show.
    """
    ATTEMPTS.write_text("")
    yield ATTEMPTS
    attempts = ATTEMPTS.read_text().split("\n")[:-1]
    assert not attempts, f"the network was touched: {sorted(set(attempts))}"


@pytest.fixture
def tmp_runs(tmp_path, monkeypatch) -> Path:
    """A results folder for this test alone; IRONLOGIC_RUNS names it."""
    runs = tmp_path / "runs"
    runs.mkdir()
    monkeypatch.setenv("IRONLOGIC_RUNS", str(runs))
    return runs


def _why_no_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    if not os.environ.get("IRONLOGIC_CHROMIUM") and not any(map(shutil.which, names)):
        return "no Chromium on this machine (apt-get install chromium, or set IRONLOGIC_CHROMIUM)"
    return "" if find_spec("playwright") else "no playwright (pip install -r tests/requirements.txt)"


def _why_no_card() -> str:
    from ironlogic.session import see_card, torch_is_cpu_build

    notes: list[str] = []
    if see_card(os.environ, notes) is None:
        return "; ".join(notes) or "no CUDA card on this machine"
    return "torch is a CPU build" if torch_is_cpu_build() else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != LONGEST)  # first, so that all workers end together
    for marker, why_not in (("browser", _why_no_browser), ("gpu", _why_no_card)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def make_notebook():
    """make(path, *code, parameters="A = 1"): write a small notebook in normal form, without the set-up cell."""
    from ironlogic.notebooks import normal_form, save_notebook

    import nbformat

    def make(path: Path, *code: str, parameters: str = "A = 1") -> Path:
        cells = [nbformat.v4.new_markdown_cell(f"# {path.stem[:2]} · Sample")]
        cells += [nbformat.v4.new_code_cell(source) for source in (parameters, *code)]
        cells[1].metadata["tags"] = ["parameters"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)), encoding="utf-8")
        save_notebook(normal_form(path), path)
        return path

    return make


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of `trained.train_ft`, its model in memory; nobody writes into its folder."""
    from trained import train_ft

    return train_ft(tmp_path_factory.mktemp("runs") / "ft")


@pytest.fixture(scope="session")
def small_merge(small_run, tmp_path_factory):
    """`small_run` merged into its base."""
    from ironlogic.export import merge_adapter

    return merge_adapter(small_run, tmp_path_factory.mktemp("exports") / "merged")
