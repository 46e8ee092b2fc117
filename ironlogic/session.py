"""This machine: where the notebook runs, what is there, what is missing, and where results go.

Runs in the first cell of every notebook, before anything heavy is loaded: it imports the standard library
and `packaging`, no more, until the requirements are in place. Of models it knows a preset's name.
"""

from __future__ import annotations  # an older Python must get as far as being told that it is too old

import importlib
import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from ironlogic import IronLogicError, __version__

from packaging.requirements import Requirement

__all__ = ["Card", "Session", "SessionError", "results_folder", "results_path", "see_card", "see_place", "start"]

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
OLDEST_PYTHON = (3, 11)
TORCH = ("torch", "torchvision", "torchaudio")  # gigabytes, built for the host's driver: never swapped
HOSTED_TORCH = Requirement("torch>=2.8,<2.15")  # Colab and Kaggle bring their own; Unsloth admits this range
FRONT_ENDS = ("jupyterlab",)  # a host is its own front end, and ours would swap the server under it
IF_PRESENT = ("torchao>=0.16",)  # nobody needs it, but peft cannot be imported beside an older one
SHOWN = ("torch", "transformers", "trl", "peft", "unsloth")


class SessionError(IronLogicError, RuntimeError):
    """This machine cannot run the notebooks as it is; the message says where, why and what to do."""


@dataclass(frozen=True)
class Card:
    """The one card that will be used. `gib` is its memory, None where the driver does not tell."""

    name: str
    gib: float | None
    index: str = "0"
    of: int = 1  # cards in the machine


@dataclass(frozen=True)
class Session:
    """What the first cell found and decided. Sizes in GiB; None: no card, or not known."""

    place: str  # "local", "colab" or "kaggle"
    root: Path  # the repository
    runs: Path  # results go here
    card: str | None
    card_gib: float | None
    ram_gib: float
    disk_free_gib: float  # of the disk that holds `runs`
    cores: int
    python: str
    versions: Mapping[str, str]  # of every required package
    installed: tuple[str, ...]  # what was installed just now
    preset: str
    offline: bool  # the Hugging Face hub is switched off
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        card = f"{self.card or 'no card'}{f' {self.card_gib:.1f} GiB' if self.card_gib else ''}"
        versions = [f"{name} {self.versions[name]}" for name in SHOWN if name in self.versions]
        lines = [
            f"Iron Logic {__version__} · {', '.join([f'Python {self.python}', *versions])}",
            f"machine   {self.place} · {card} · {self.cores} cores · {self.ram_gib:.1f} GiB memory",
            f"preset    {self.preset}{' · hub switched off' if self.offline else ''}",
            f"results   {self.runs} · {self.disk_free_gib:.0f} GiB free",
            *[f"installed {one}" for one in self.installed],
            *[f"note      {note}" for note in self.notes],
        ]
        return "\n".join(lines)


def start(
    *,
    everything: bool = False,
    root: Path = ROOT,
    environ: MutableMapping[str, str] | None = None,
    system: Path = Path("/"),
) -> Session:
    """Look at the machine, install what is missing, set the environment, pick a preset; print what came out.

    `everything` installs Unsloth without a card too. `environ` and `system` (where `content/drive` and
    `kaggle/working` are looked for) are this process's and this disk's; other values simulate another host.

    Raises SessionError: old Python, unwritable results folder, packages that cannot be had, unknown preset.
    """
    environ = os.environ if environ is None else environ
    notes: list[str] = []
    check_python(sys.version_info)
    place = see_place(environ, system)
    runs = results_folder(place, root=root, environ=environ, system=system)
    if place == "colab" and runs == root / "runs":
        notes.append("Drive is not mounted: results end with this Colab session")
    card = see_card(environ, notes)
    set_environment(environ, card)
    unsloth = everything or card is not None
    installed = ensure_packages(place, unsloth=unsloth, root=root, environ=environ, notes=notes)
    check_torchvision(environ)
    if card is not None and torch_is_cpu_build():
        notes.append(f"torch {version_of('torch')} is a CPU build: the {card.name} stays unused")
        card = None
    preset = choose_preset(card and card.gib, environ)
    offline = set_offline(environ, preset, notes)
    names = [one.name for one in read_requirements(root / "requirements.txt")]
    session = Session(
        place=place,
        root=root,
        runs=runs,
        card=card and card.name,
        card_gib=card and card.gib,
        ram_gib=see_memory(),
        disk_free_gib=shutil.disk_usage(runs).free / GIB,
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        python=platform.python_version(),
        versions={name: v for name in [*names, "unsloth", "torchvision"] if (v := version_of(name))},
        installed=tuple(installed),
        preset=preset,
        offline=offline,
        notes=tuple(notes),
    )
    print(session)
    return session


def check_python(version: tuple) -> None:
    if tuple(version[:2]) < OLDEST_PYTHON:
        here, least = (".".join(map(str, one[:2])) for one in (version, OLDEST_PYTHON))
        raise SessionError(f"this is Python {here} ({sys.executable}); Iron Logic needs {least} or newer")


def see_place(environ: Mapping[str, str], system: Path = Path("/")) -> str:
    """kaggle, colab or local. Kaggle first: its image is built on Colab's and may carry Colab's variables."""
    if "KAGGLE_KERNEL_RUN_TYPE" in environ or (system / "kaggle/working").is_dir():
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in environ or "google.colab" in sys.modules else "local"


def see_card(environ: Mapping[str, str], notes: list[str], *, timeout: float = 15) -> Card | None:
    """The card that CUDA will call number 0, asked of nvidia-smi in `timeout` seconds; None without one."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return None
    query = [program, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    trouble: object = "names no card"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        try:
            process = subprocess.Popen(query, stdout=answer, stderr=subprocess.DEVNULL, env=dict(environ))
            if code := process.wait(timeout):
                trouble = f"ends with code {code}"
        except subprocess.TimeoutExpired:
            process.kill()  # and no wait for its end: what hangs inside a driver cannot be killed
            trouble = f"gave no answer in {timeout:g} s, its driver hangs"
        except OSError as error:
            trouble = f"does not start: {error.strerror}"
        answer.seek(0)
        rows = [[cell.strip() for cell in line.split(",")] for line in answer if line.count(",") == 3]
    if not rows:
        notes.append(f"{program} {trouble}: going on without a card")
        return None
    return _visible_card(rows, environ.get("CUDA_VISIBLE_DEVICES"), notes)


def _visible_card(rows: list[list[str]], visible: str | None, notes: list[str]) -> Card | None:
    first = "0" if visible is None else visible.split(",")[0].strip()
    for index, uuid, name, mib in rows:
        if first and (index == first or uuid.startswith(first)):
            gib = float(mib) / 1024 if mib.isdigit() else None
            if gib is None:
                notes.append(f"{name} does not tell its memory: choose by IRONLOGIC_PRESET")
            return Card(name, gib, index, len(rows))
    notes.append(f"CUDA_VISIBLE_DEVICES={visible!r} hides every card")
    return None


def see_memory() -> float:
    """Memory of this machine, or of the container around us, in GiB."""
    import psutil  # comes with every Jupyter kernel

    total, limit = psutil.virtual_memory().total, Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return (min(total, int(text)) if text.isdigit() else total) / GIB


def results_path(place: str, *, root: Path = ROOT, environ: Mapping[str, str], system: Path = Path("/")) -> Path:
    """IRONLOGIC_RUNS, else the folder that outlives a session on this host, else `runs/`."""
    if chosen := environ.get("IRONLOGIC_RUNS"):
        return Path(chosen).expanduser().absolute()
    drive = system / "content/drive/MyDrive"
    if place == "colab" and drive.is_dir():
        return drive / "ironlogic-runs"
    return (system / "kaggle/working" if place == "kaggle" else root) / "runs"


def results_folder(
    place: str,
    *,
    root: Path = ROOT,
    environ: Mapping[str, str],
    system: Path = Path("/"),
    need_gib: float = 0.5,
) -> Path:
    """`results_path`, made and tried.

    Raises SessionError where it cannot be written or less than `need_gib` is free.
    """
    folder = results_path(place, root=root, environ=environ, system=system)
    hint = "Set IRONLOGIC_RUNS to another folder and run this again."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**16))
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        raise SessionError(f"results folder {folder}: {error.strerror or error}. {hint}") from None
    if free < need_gib:
        raise SessionError(f"results folder {folder}: {free:.2f} GiB free, {need_gib:g} GiB needed. {hint}")
    return folder


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements in that file that apply to this interpreter."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def core_requirements(place: str, root: Path) -> list[Requirement]:
    """requirements.txt as this place can take it: on Colab and Kaggle torch is theirs, within a range."""
    needs = read_requirements(root / "requirements.txt")
    if place != "local":
        needs = [HOSTED_TORCH if one.name == "torch" else one for one in needs if one.name not in FRONT_ENDS]
    return needs + [one for one in map(Requirement, IF_PRESENT) if version_of(one.name)]


def version_of(name: str) -> str | None:
    """Installed version of a distribution, None without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(needs: Iterable[Requirement]) -> list[Requirement]:
    """Those that are absent or out of range; a build's own suffix (2.13.0+cpu) does not matter."""
    here = [(one, version_of(one.name)) for one in needs]
    return [one for one, v in here if v is None or not one.specifier.contains(v, prereleases=True)]


def ensure_packages(
    place: str, *, unsloth: bool, root: Path, environ: Mapping[str, str], notes: list[str]
) -> list[str]:
    """Install what is absent or out of range, nothing else; returns names and versions of what was installed.

    IRONLOGIC_NO_INSTALL=1 only looks: an absent package is an error then, another version a note.
    """
    core = unmet(core_requirements(place, root))
    extra = unmet(read_requirements(root / "ironlogic/requirements-unsloth.txt")) if unsloth else []
    if environ.get("IRONLOGIC_NO_INSTALL") == "1":
        if absent := [str(one) for one in core if version_of(one.name) is None]:
            by_hand = f"{sys.executable} -m pip install -r {root / 'requirements.txt'}"
            raise SessionError(f"missing: {', '.join(absent)}; IRONLOGIC_NO_INSTALL=1, so run: {by_hand}")
        notes += [f"wanted {one}, here: {version_of(one.name)} (IRONLOGIC_NO_INSTALL=1)" for one in core + extra]
        return []
    install(core, environ=environ)
    try:
        install(extra, "--no-deps", environ=environ)  # with them would come a torchvision for another torch
    except SessionError as error:
        notes.append(f"going on without Unsloth: {error}")  # `models` can
    if still := unmet(core):
        raise SessionError(f"{', '.join(map(str, still))}: installed, but not seen. Restart the kernel.")
    done = [one for one in core + extra if not unmet([one])]
    return [f"{one.name} {version_of(one.name)}" for one in done]


def loaded_pins() -> list[str]:
    """`name==version` of torch and of every distribution that this process has imported something of.

    A process cannot swap a compiled library it has loaded: the old code would go on beside the new files.
    """
    loaded = {name.partition(".")[0] for name in sys.modules}
    owners = metadata.packages_distributions().items()
    names = {name for module, some in owners if module in loaded for name in some} | set(TORCH)
    return [f"{name}=={version}" for name in sorted(names) if (version := version_of(name))]


def install(needs: Iterable[Requirement], *options: str, environ: Mapping[str, str]) -> None:
    """pip, with all that is loaded pinned to what is there; what pip says is shown only when it fails."""
    names = [str(one) for one in needs]
    if not names:
        return
    print("installing", *names, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "loaded.txt")
        pins.write_text("\n".join(loaded_pins()), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--progress-bar=off", f"--constraint={pins}"]
        done = subprocess.run([*command, *options, *names], capture_output=True, text=True, env=dict(environ))
    importlib.invalidate_caches()
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        advice = "beside what is loaded. Restart the kernel and run this cell first, or make a fresh environment"
        if "No space left" in said:
            advice = f"on a full disk ({sys.prefix} or the folder for temporary files). Make room, run this again"
        elif "No module named pip" in said:
            advice = f"without pip. Run: {sys.executable} -m ensurepip, or install requirements.txt with uv"
        raise SessionError(f"pip could not install {', '.join(names)} {advice}. pip says:\n{said}")


def torch_is_cpu_build() -> bool:
    """Whether the installed torch knows no CUDA, ROCm or XPU; read from its version file, not imported."""
    if version_of("torch") is None:
        return False
    path = Path(metadata.distribution("torch").locate_file("torch/version.py"))
    text = path.read_text(encoding="utf-8")
    return not re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", text, re.MULTILINE)


def check_torchvision(environ: Mapping[str, str]) -> None:
    """A CUDA torchvision beside a CPU torch kills `import transformers` by an unknown operator: say so."""
    beside = version_of("torchvision")
    if beside is None or beside.endswith("+cpu") or not torch_is_cpu_build():
        return
    # some CPU builds carry no suffix: try before blaming
    trial = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(trial, capture_output=True, env=dict(environ)).returncode:
        raise SessionError(
            f"torchvision {beside} is for another torch than {version_of('torch')}: beside it, transformers "
            f"cannot be imported. Nothing here needs it. Run: {sys.executable} -m pip uninstall torchvision"
        )


def set_environment(environ: MutableMapping[str, str], card: Card | None) -> None:
    """Variables that libraries read only once, when they are imported."""
    environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    environ["TOKENIZERS_PARALLELISM"] = "false"
    environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # bars are widgets: noise, and state in the file
    if card is not None and card.of > 1 and "CUDA_VISIBLE_DEVICES" not in environ:
        environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order
        environ["CUDA_VISIBLE_DEVICES"] = card.index  # a Trainer that sees two cards splits each batch


def choose_preset(card_gib: float | None, environ: Mapping[str, str]) -> str:
    """The largest preset that the card is meant for; IRONLOGIC_PRESET wins."""
    from ironlogic.presets import PRESETS, pick_preset

    asked = environ.get("IRONLOGIC_PRESET", "").strip()
    if asked in ("", "auto"):
        return pick_preset(card_gib).name
    if asked not in PRESETS:
        raise SessionError(f"IRONLOGIC_PRESET={asked!r} is no preset; expected auto, {', '.join(PRESETS)}")
    return asked


def set_offline(environ: MutableMapping[str, str], preset: str, notes: list[str]) -> bool:
    """Switch the hub off where nothing of it is needed; a user's own HF_HUB_OFFLINE=0 stands beside nano."""
    before = environ.get("HF_HUB_OFFLINE")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if environ.get("IRONLOGIC_OFFLINE") == "1":
            environ[name] = "1"
        elif preset == "nano":
            environ.setdefault(name, environ.get("HF_HUB_OFFLINE", "1"))
    offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline and before is None and "huggingface_hub" in sys.modules:
        notes.append("huggingface_hub was loaded before this cell and stays online: restart the kernel")
    return offline
