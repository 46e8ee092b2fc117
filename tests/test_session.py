"""The first cell: what it sees, what it refuses, what it installs; on this machine and on simulated hosts."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from ironlogic import session
from ironlogic.session import ROOT, SessionError, results_folder, see_card, see_place, start
from ironlogic.setup_cell import SETUP_CELL

import pytest
from packaging.requirements import Requirement

T4 = "0, GPU-aaaa, Tesla T4, 15360"
BIG = "1, GPU-bbbb, NVIDIA GeForce RTX 5090, 32607"


def program(folder: Path, name: str, script: str) -> str:
    """An executable shell script; returns the folder, for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


def driver(folder: Path, *rows: str) -> dict[str, str]:
    """An environment in which nvidia-smi prints those rows."""
    lines = "\n".join(f"echo '{row}'" for row in rows)
    return {**os.environ, "PATH": f"{program(folder, 'nvidia-smi', lines)}:/usr/bin:/bin"}


@pytest.fixture
def laptop(tmp_path):
    """An environment without a card and a disk without Colab and Kaggle."""
    return {"PATH": "/usr/bin:/bin", "IRONLOGIC_RUNS": str(tmp_path / "runs")}


# -- start


def test_start_on_this_machine(tmp_path, laptop, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)  # another test may have loaded it
    found = start(environ=laptop, system=tmp_path)
    assert (found.place, found.root, found.runs) == ("local", ROOT, tmp_path / "runs")
    assert (found.card, found.card_gib, found.preset, found.installed) == (None, None, "nano", ())
    assert 0 < found.ram_gib < 10_000
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        assert laptop[name] == "1"
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "torch 2.13.0" in printed
    again = start(environ=laptop, system=tmp_path)  # safe to run again
    assert replace(again, disk_free_gib=found.disk_free_gib) == found  # something else may have written meanwhile


def test_start_on_a_card(tmp_path, laptop):
    laptop |= driver(tmp_path / "bin", BIG) | {"CUDA_VISIBLE_DEVICES": "1", "IRONLOGIC_NO_INSTALL": "1"}
    found = start(environ=laptop, system=tmp_path)
    if session.torch_is_cpu_build():
        assert (found.card, found.preset) == (None, "nano")
        assert any("CPU build" in note for note in found.notes)
    else:
        assert (found.card, found.preset, found.offline) == ("NVIDIA GeForce RTX 5090", "32gb", False)


def test_start_imports_nothing_heavy(tmp_path):
    heavy = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "matplotlib", "huggingface_hub"}
    code = (
        f"import sys; from ironlogic import session; session.start(); print('HEAVY', sys.modules.keys() & {heavy})"
    )
    environ = {**os.environ, "IRONLOGIC_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "HEAVY set()"


def test_colab_takes_drive_and_kaggle_its_working_folder(tmp_path):
    colab = {"COLAB_RELEASE_TAG": "x", "PATH": "/usr/bin"}
    drive = tmp_path / "content/drive/MyDrive"
    here = start(environ=colab, system=tmp_path, root=copy_of_root(tmp_path))
    assert (here.place, here.runs) == ("colab", tmp_path / "root/runs")
    assert any("Drive is not mounted" in note for note in here.notes)
    drive.mkdir(parents=True)
    here = start(environ=colab, system=tmp_path)
    assert here.runs == drive / "ironlogic-runs"
    assert not here.notes
    (tmp_path / "kaggle/working").mkdir(parents=True)
    here = start(environ=colab, system=tmp_path)  # Kaggle's image carries Colab's variables
    assert (here.place, here.runs) == ("kaggle", tmp_path / "kaggle/working/runs")
    assert see_place({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, tmp_path / "none") == "kaggle"


def copy_of_root(tmp_path: Path) -> Path:
    """A repository that holds the two lists of requirements and nothing else."""
    for name in ("requirements.txt", "ironlogic/requirements-unsloth.txt"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / name).read_text())
    return tmp_path / "root"


def test_old_python_is_told(tmp_path):
    with pytest.raises(SessionError, match=r"this is Python 3\.10 .* needs 3\.11 or newer"):
        session.check_python((3, 10, 4))
    for name in ("session.py", "__init__.py", "setup_cell.py"):  # it has to parse there to say so
        ast.parse((ROOT / "ironlogic" / name).read_text(), feature_version=(3, 8))


# -- the card


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "Tesla T4"),
        ("0", "Tesla T4"),
        ("1,0", "NVIDIA GeForce RTX 5090"),
        ("GPU-bb", "NVIDIA GeForce RTX 5090"),
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_card_is_the_first_visible(tmp_path, visible, name):
    environ = driver(tmp_path, T4, BIG) | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    notes = []
    card = see_card(environ, notes)
    if name is None:
        assert card is None
        assert "CUDA_VISIBLE_DEVICES" in notes[0]
    else:
        assert (card.name, card.of, notes) == (name, 2, [])
        assert card.gib == pytest.approx(15 if name == "Tesla T4" else 31.84, abs=0.01)


def test_two_cards_are_made_one(tmp_path):
    environ = driver(tmp_path, T4, BIG)
    session.set_environment(environ, see_card(environ, []))
    assert (environ["CUDA_VISIBLE_DEVICES"], environ["CUDA_DEVICE_ORDER"]) == ("0", "PCI_BUS_ID")
    environ = driver(tmp_path, T4)
    session.set_environment(environ, see_card(environ, []))
    assert "CUDA_VISIBLE_DEVICES" not in environ


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\nexec sleep 30", "gave no answer in 0.3 s"),
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed, it cannot talk to the driver'; exit 9", "ends with code 9"),
        ("#!/bin/sh\nexit 0", "names no card"),
        ("\x7fELF broken", "does not start"),
    ],
)
def test_a_broken_driver_is_no_card(tmp_path, script, said):
    notes = []
    environ = {"PATH": f"{program(tmp_path, 'nvidia-smi', '')}:/usr/bin:/bin"}
    (tmp_path / "nvidia-smi").write_text(script)
    assert see_card(environ, notes, timeout=0.3 if "sleep" in script else 30) is None
    assert said in notes[0]


def test_unknown_memory_is_said(tmp_path):
    notes = []
    card = see_card(driver(tmp_path, "0, GPU-c, NVIDIA GB10, [N/A]"), notes)
    assert (card.name, card.gib) == ("NVIDIA GB10", None)
    assert "IRONLOGIC_PRESET" in notes[0]


# -- the results folder


def test_results_folder_of_this_process(tmp_path):
    assert results_folder("local", root=tmp_path, environ={}) == tmp_path / "runs"
    chosen = results_folder("kaggle", environ={"IRONLOGIC_RUNS": str(tmp_path / "a/b")}, system=tmp_path)
    assert chosen == tmp_path / "a/b"
    assert list(chosen.iterdir()) == []  # the probe is gone


def test_results_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match=r"results folder .*/file/runs: Not a directory. Set IRONLOGIC_RUNS"):
        results_folder("local", environ={"IRONLOGIC_RUNS": str(tmp_path / "file/runs")})


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_results_folder_that_takes_no_more(tmp_path):
    """Like a full disk or a folder of somebody else: it is there, the write itself fails."""
    code = f"""
import os, resource
from ironlogic.session import SessionError, results_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    results_folder("local", environ={{"IRONLOGIC_RUNS": {str(tmp_path)!r}}})
except SessionError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"results folder {tmp_path}: File too large. Set IRONLOGIC_RUNS")


def test_nearly_full_disk(tmp_path):
    with pytest.raises(SessionError, match=r"GiB free, 1e\+09 GiB needed. Set IRONLOGIC_RUNS"):
        results_folder("local", root=tmp_path, environ={}, need_gib=1e9)


# -- presets and the hub


def test_preset_by_hand_and_unknown():
    assert session.choose_preset(None, {"IRONLOGIC_PRESET": "24gb"}) == "24gb"
    assert session.choose_preset(15.0, {"IRONLOGIC_PRESET": "auto"}) == "t4"
    with pytest.raises(SessionError, match="IRONLOGIC_PRESET='huge' is no preset; expected auto, nano"):
        session.choose_preset(None, {"IRONLOGIC_PRESET": "huge"})


@pytest.mark.parametrize(
    ("environ", "preset", "offline"),
    [
        ({}, "nano", True),
        ({}, "24gb", False),
        ({"IRONLOGIC_OFFLINE": "1"}, "24gb", True),
        ({"HF_HUB_OFFLINE": "0"}, "nano", False),
        ({"HF_HUB_OFFLINE": "0", "IRONLOGIC_OFFLINE": "1"}, "nano", True),
    ],
)
def test_hub_switch(environ, preset, offline):
    assert session.set_offline(environ, preset, []) is offline
    assert environ.get("HF_HUB_OFFLINE", "0") == str(int(offline))


# -- packages


def test_requirements_are_read_with_comments_and_markers(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# all\ntorch==2.13.0\n\ntrl==1.14.2  # why\nx>=1 ; python_version < '3'\ny;python_version>'3'#z\n"
    )
    assert [str(one) for one in session.read_requirements(path)] == [
        "torch==2.13.0",
        "trl==1.14.2",
        'y; python_version > "3"',
    ]


def test_hosts_keep_their_torch_and_front_end():
    local = {one.name: str(one.specifier) for one in session.core_requirements("local", ROOT)}
    colab = {one.name: str(one.specifier) for one in session.core_requirements("colab", ROOT)}
    assert local["torch"].startswith("==")
    assert Requirement(f"torch{colab['torch']}") == session.HOSTED_TORCH
    assert local.keys() - colab.keys() == {"jupyterlab"}


# What Colab publishes of its image (googlecolab/backend-info, 19 August 2026). Kaggle's (docker-python, 12 August)
# is built on Colab's of May with its own ipywidgets; August's versions stand for those of May here.
COLAB = {
    "torch": "2.11.0+cu128",
    "torchvision": "0.26.0+cu128",
    "numpy": "2.1.3",
    "pillow": "11.3.0",
    "ipywidgets": "7.7.1",
    "ipython": "7.34.0",
    "ipykernel": "6.17.1",
    "psutil": "5.9.5",  # which ipykernel has loaded before the first cell runs
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "datasets": "4.0.0",
    "torchao": "0.10.0",
}
KAGGLE = COLAB | {"ipywidgets": "8.1.5"}


@pytest.mark.parametrize(("place", "image"), [("colab", COLAB), ("kaggle", KAGGLE)])
def test_published_images_get_what_they_lack_and_keep_their_torch(place, image, monkeypatch, tmp_path):
    """pip is not run; what it would be given is looked at: names, options, and what it must not touch."""
    calls, here = [], dict(image)

    def pip(command, **_):
        pins = Path(next(word for word in command if word.startswith("--constraint=")).partition("=")[2])
        names = [word for word in command if re.match(r"[a-z][a-z0-9_-]*[=<>]", word)]
        calls.append((names, "--no-deps" in command, pins.read_text().split("\n")))
        for need in map(Requirement, names):  # the newest is not known here; the lowest of the range will do
            here[need.name] = next(v for v in re.findall(r"[\d.]+", str(need.specifier)) if v in need.specifier)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(session, "version_of", here.get)
    monkeypatch.setattr(session, "subprocess", SimpleNamespace(run=pip))
    monkeypatch.setattr(session.metadata, "packages_distributions", lambda: {"numpy": ["numpy"], "json": ["json"]})
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace())  # loaded already
    done = session.ensure_packages(place, unsloth=True, root=ROOT, environ={}, notes=(notes := []))
    (core, plain, pins), (unsloth, bare, _) = calls
    asked = {Requirement(name).name for name in core}
    assert {"trl", "bitsandbytes", "transformers", "peft", "datasets", "torchao"} <= asked
    assert not asked & {"torch", "torchvision", "numpy", "pillow", "ipywidgets", "jupyterlab", "ipython", "psutil"}
    assert (plain, bare) == (False, True)
    assert {"torch==2.11.0+cu128", "torchvision==0.26.0+cu128", "numpy==2.1.3"} <= set(pins)
    assert [Requirement(name).name for name in unsloth] == ["unsloth", "unsloth_zoo"]
    assert {one.split()[0] for one in done} == asked | {"unsloth", "unsloth_zoo"}
    assert (here["torch"], here["numpy"], here["ipywidgets"]) == (image["torch"], "2.1.3", image["ipywidgets"])
    assert notes == []
    assert session.ensure_packages(place, unsloth=True, root=ROOT, environ={}, notes=notes) == []  # the second cell
    assert len(calls) == 2


def test_a_build_suffix_is_no_other_version():
    here = session.version_of("pytest")
    assert session.unmet([Requirement(f"pytest=={here}")]) == []
    assert [str(one) for one in session.unmet([Requirement("pytest<1"), Requirement("no-such-thing")])] == [
        "pytest<1",
        "no-such-thing",
    ]
    assert Requirement("torch==2.13.0").specifier.contains("2.13.0+cpu", prereleases=True)


def wheel(folder: Path, name: str, version: str, *needs: str, code: str = "") -> Path:
    """A minimal wheel of one module."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as packed:
        packed.writestr(f"{name}.py", code or f"VERSION = {version!r}\n")
        packed.writestr(f"{info}/METADATA", "\n".join(lines))
        packed.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return folder


@pytest.fixture
def fresh(tmp_path):
    """run(code): in a throw-away environment that sees this one's packages, where pip finds only our own wheels."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    venv.create(tmp_path / "venv", symlinks=os.name == "posix")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = next((tmp_path / "venv").rglob("site-packages"))
    (site / "borrowed.pth").write_text("\n".join(one for one in sys.path if one.endswith("site-packages")))
    environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": os.devnull}
    environ.pop("PIP_EXTRA_INDEX_URL", None)

    def run(code: str) -> str:
        program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom ironlogic.session import *\n{code}"
        done = subprocess.run([python, "-c", program], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.shelf = shelf
    return run


INSTALL = """
from packaging.requirements import Requirement
from ironlogic import session
try:
    session.install([Requirement(NEED)], environ=os.environ)
except session.SessionError as error:
    print("REFUSED", error)
print("NOW", session.version_of("ilprobe"), session.version_of("ilneedy"))
"""


@pytest.mark.slow
def test_install_adds_what_is_missing_and_never_swaps_what_is_loaded(fresh):
    wheel(fresh.shelf, "ilprobe", "1.0")
    assert fresh(INSTALL.replace("NEED", "'ilprobe'")).splitlines() == ["installing ilprobe", "NOW 1.0 None"]
    wheel(fresh.shelf, "ilprobe", "2.0")
    wheel(fresh.shelf, "ilneedy", "1.0", "ilprobe>=2")
    refused = fresh(f"import ilprobe\n{INSTALL.replace('NEED', repr('ilneedy'))}")
    assert "REFUSED pip could not install ilneedy beside what is loaded. Restart the kernel" in refused
    assert "The user requested (constraint) ilprobe==1.0" in refused  # pip's own words
    assert refused.splitlines()[-1] == "NOW 1.0 None"
    assert fresh(INSTALL.replace("NEED", "'ilneedy'")).splitlines()[-1] == "NOW 2.0 1.0"  # not loaded: free to move


@pytest.mark.slow
def test_a_python_without_pip_and_a_full_disk_are_named(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", symlinks=True)  # no pip in it
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(SessionError, match=r"install ilprobe without pip\. Run: .*bare/bin/python -m ensurepip"):
        session.install([Requirement("ilprobe")], environ=os.environ)
    full = tmp_path / "full"
    full.write_text(
        "#!/bin/sh\necho 'ERROR: Could not install packages: [Errno 28] No space left on device'\nexit 1\n"
    )
    full.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(full))
    with pytest.raises(
        SessionError, match=r"install ilprobe on a full disk \(.*Make room, run this again\. pip says:\nERROR"
    ):
        session.install([Requirement("ilprobe")], environ=os.environ)


@pytest.mark.slow
def test_start_installs_what_a_repository_asks_for(fresh, tmp_path):
    wheel(fresh.shelf, "ilprobe", "1.5")
    root = copy_of_root(tmp_path)
    needs = root / "requirements.txt"
    needs.write_text(f"{needs.read_text()}\nilprobe>=1.5\n")
    call = f"""
from pathlib import Path
os.environ["IRONLOGIC_RUNS"] = {str(tmp_path / "runs")!r}
try:
    print(start(root=Path({str(root)!r}), system=Path({str(tmp_path)!r})).installed)
except SessionError as error:
    print("REFUSED", error)
"""
    only_look = fresh(f"os.environ['IRONLOGIC_NO_INSTALL'] = '1'\n{call}")
    assert "REFUSED missing: ilprobe>=1.5; IRONLOGIC_NO_INSTALL=1, so run:" in only_look
    assert fresh(call).splitlines()[-1] == "('ilprobe 1.5',)"
    assert fresh(call).splitlines()[-1] == "()"
    needs.write_text(needs.read_text().replace("ilprobe>=1.5", "ilprobe>=9"))
    only_look = fresh(f"os.environ['IRONLOGIC_NO_INSTALL'] = '1'\n{call}")
    assert "note      wanted ilprobe>=9, here: 1.5 (IRONLOGIC_NO_INSTALL=1)" in only_look
    assert "REFUSED pip could not install ilprobe>=9" in fresh(call)


@pytest.mark.slow
def test_unsloth_that_cannot_be_had_is_no_obstacle(fresh, tmp_path):
    root = copy_of_root(tmp_path)
    (root / "ironlogic/requirements-unsloth.txt").write_text("ilunsloth==1.0\n")
    call = f"""
from pathlib import Path
os.environ["IRONLOGIC_RUNS"] = {str(tmp_path / "runs")!r}
print(start(everything=True, root=Path({str(root)!r}), system=Path({str(tmp_path)!r})).installed)
"""
    missing = fresh(call)
    assert "going on without Unsloth: pip could not install ilunsloth==1.0" in missing
    assert missing.splitlines()[-1] == "()"
    wheel(fresh.shelf, "ilunsloth", "1.0", "no-such-thing>=3")  # --no-deps: not asked for
    assert fresh(call).splitlines()[-1] == "('ilunsloth 1.0',)"
    assert fresh(call.replace("everything=True, ", "")).splitlines()[-1] == "()"


@pytest.mark.slow
def test_torchvision_of_another_torch_is_named(fresh):
    site = fresh("import site; print(site.getsitepackages()[0])").strip()
    for name, version, code in (
        ("torch", "2.13.0", ""),
        ("torchvision", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')"),
    ):
        folder = Path(site, f"{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        Path(site, name).mkdir()
        Path(site, name, "__init__.py").write_text(code)
    call = "try:\n    session.check_torchvision(os.environ)\nexcept SessionError as error:\n    print(error)"
    call = f"from ironlogic import session\n{call}"
    version_file = Path(site, "torch/version.py")
    version_file.write_text("from typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    said = fresh(call)
    assert said.startswith("torchvision 0.28.0 is for another torch than 2.13.0")
    assert said.strip().endswith("-m pip uninstall torchvision")
    version_file.write_text(
        "from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    assert fresh(call) == ""
    version_file.write_text("cuda = None\n")
    Path(site, "torchvision/__init__.py").write_text("")  # a CPU build without a suffix
    assert fresh(call) == ""


# -- the set-up cell


STUB = "def start():\n    print('STARTED', __file__)\n"


def repository(folder: Path) -> Path:
    """A checkout just large enough to be found."""
    (folder / "ironlogic").mkdir(parents=True)
    (folder / "ironlogic/__init__.py").write_text("")
    (folder / "ironlogic/session.py").write_text(STUB)
    return folder


def run_setup(cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    cwd.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "IRONLOGIC_INPUT": str(cwd / "nothing"), **environ}
    return subprocess.run([sys.executable, "-c", SETUP_CELL], cwd=cwd, env=env, capture_output=True, text=True)


def started(done: subprocess.CompletedProcess) -> Path:
    assert done.stdout.startswith("STARTED "), done.stderr
    return Path(done.stdout.split(maxsplit=1)[1].strip()).parents[1]


def test_setup_finds_the_repository_around_the_notebook(tmp_path):
    root = repository(tmp_path / "clone")
    for cwd in (root, root / "notebooks", root / "notebooks/deeper", tmp_path):
        assert started(run_setup(cwd)) == root


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_setup_finds_it_among_kaggle_inputs(tmp_path, depth):
    root = repository(Path(tmp_path, "input", *[f"level{n}" for n in range(depth)]))
    assert started(run_setup(tmp_path / "working", IRONLOGIC_INPUT=str(tmp_path / "input"))) == root


def zipped(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, STUB if name.endswith("session.py") else "")


@pytest.mark.parametrize("prefix", ["", "ironlogic-workbench-main/"])
def test_setup_unpacks_an_uploaded_zip_once(tmp_path, prefix):
    zipped(tmp_path / "a.zip", "photos/1.png")  # somebody's other archive
    (tmp_path / "b.zip").write_bytes(b"PK but broken")
    zipped(tmp_path / "upload.zip", f"{prefix}ironlogic/__init__.py", f"{prefix}ironlogic/session.py")
    root = tmp_path / "upload" / prefix
    assert started(run_setup(tmp_path)) == root
    assert not (tmp_path / "a").exists()
    (tmp_path / "upload.zip").unlink()
    assert started(run_setup(tmp_path)) == root


@pytest.mark.parametrize("evil", ["../evil.py", "x/../../evil.py", "/tmp/il-evil.py"])
def test_setup_never_unpacks_outside(tmp_path, evil):
    here = tmp_path / "content"
    zipped(here / "upload.zip", "ironlogic/__init__.py", "ironlogic/session.py", evil)
    done = run_setup(here)
    assert "would write outside" in done.stderr
    assert "STARTED" not in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["content", "upload.zip"]


def test_setup_clones_by_git_at_a_tag(tmp_path):
    origin = repository(tmp_path / "origin")
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in ("init -q", "add .", "commit -qm one", "tag v1", "rm -rq ironlogic", "commit -qm away"):
        subprocess.run([*git, *command.split()], check=True)
    work = tmp_path / "work"
    assert "no Iron Logic near" in run_setup(work, IRONLOGIC_REPO=str(tmp_path / "nowhere")).stderr
    done = run_setup(work, IRONLOGIC_REPO=origin.as_uri(), IRONLOGIC_REF="v1")
    assert started(done) == work / "ironlogic-clone"


def test_setup_says_what_to_do_when_nothing_is_there(tmp_path):
    done = run_setup(tmp_path / "empty")
    assert done.stderr.strip().splitlines()[-1] == (
        f"AssertionError: no Iron Logic near {tmp_path / 'empty'}: add its zip, or set IRONLOGIC_REPO"
    )
