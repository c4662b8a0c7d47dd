"""yolofleet doctor: what this machine offers, and what would stop ``serve`` or ``predict``, each with its mend.

    CHECKS ─→ examine() ─→ Finding(topic, status, fact, mend) … ─→ render()

``problem``: serve or predict will not work. ``note``: worth knowing. ``ok``: as it should be. A check that fails says so
itself and spoils no other. Packages are asked for by their metadata; what must be seen to load, loads in a process of its
own, since a broken native library takes its process with it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from actors.engines import plan
from actors.hardware import available_cpus, cuda_devices
from deploy.weights import DEFAULT_WEIGHTS, EMBEDDED

DEFAULT_PORT = 8000
ENGINES = {
    "torch": ".pt and .torchscript",
    "openvino": "OpenVINO folders",
    "onnxruntime": ".onnx",
    "tensorrt": ".engine",
}
EXTRAS = {"onnxruntime": "onnx", "tensorrt": "gpu"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's own choice for its objects
SOCKET_NAME = "session_2026-11-20_17-39-34_123456_1234567/sockets/plasma_store"  # as long as Ray's longest under its folder
LONGEST_SOCKET_PATH = 107  # bytes, the kernel's limit
MODEL_GB = 1.0  # resident memory of one actor with a small model, about
RAY_FULL = 0.95  # share of memory or disk above which Ray kills workers, or refuses to spill objects

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine.

    Attributes:
        topic: what it is about, one or two words.
        status: whether it matters; only a ``problem`` stops ``serve`` or ``predict``.
        fact: what was found.
        mend: what to do about it, one sentence; None where there is nothing to do.
    """

    topic: str
    status: Status
    fact: str
    mend: str | None = None


def examine() -> list[Finding]:
    """Run every check."""
    findings: list[Finding] = []
    for topic, check in CHECKS.items():
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(Finding(topic, "note", f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table, each mend under its fact."""
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    problems = sum(finding.status == "problem" for finding in findings)
    verdict = f"{problems} would stop serve or predict" if problems else "nothing would stop serve or predict"
    table = Table(caption=verdict, show_lines=False)
    for heading in ("topic", "", "found"):
        table.add_column(heading)
    for finding in findings:
        fact = Text(finding.fact)
        if finding.mend:
            fact.append(f"\n→ {finding.mend}", style="cyan")
        table.add_row(finding.topic, marks[finding.status], fact)
    return table


# -- packages ------------------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The interpreter and the system under it."""
    yield Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")


def check_packages() -> Iterator[Finding]:
    """The declared dependencies: installed, and within their ranges."""
    from packaging.requirements import Requirement

    declared = [Requirement(line) for line in requires("yolofleet") or ()]
    needed = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    unmet = []
    for requirement in needed:
        found = _version(requirement.name)
        if found is None:
            unmet.append(f"{requirement} is not installed")
        elif not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement} is needed, {found} is installed")
    if unmet:
        yield Finding(
            "packages", "problem", "; ".join(unmet), "Run `uv sync`, or `uv pip install yolofleet` in this environment"
        )
    main = ("ray", "torch", "ultralytics-opencv-headless")
    facts = ", ".join(f"{name} {_version(name)}" for name in main if _version(name))
    if not unmet:
        yield Finding("packages", "ok", f"{facts}; all {len(needed)} dependencies are within their ranges")


def check_torch() -> Iterator[Finding]:
    """Whether torch and torchvision load together, and the GPUs that torch can use."""
    failure = import_failure("torchvision")
    if failure:
        yield Finding(
            "torch",
            "problem",
            f"torch {_version('torch')} and torchvision {_version('torchvision')} do not load: {failure}",
            "Install the two as a matching pair with uv: `uv pip install --reinstall torch torchvision`",
        )
        return
    yield Finding("torch", "ok", f"torch {_version('torch')} and torchvision {_version('torchvision')} load")
    gpus = cuda_devices()
    for index, gpu in enumerate(gpus):
        memory = f"{gpu.total_memory / 2**30:.1f} GiB, {gpu.free_memory / 2**30:.1f} free"
        yield Finding("GPU", "ok", f"cuda:{index} {gpu.name}, {memory}")
    if not gpus:
        yield _no_gpu()


def check_opencv() -> Iterator[Finding]:
    """Whether OpenCV loads, and whether two of its distributions overwrite each other."""
    names = {str(found.name).lower().replace("_", "-") for found in distributions()}
    found = sorted(name for name in names if name.startswith("opencv-") and "python" in name)
    facts = ", ".join(f"{name} {_version(name)}" for name in found) or "no distribution of it is installed"
    mend = "Keep opencv-python-headless alone: uninstall all of these with `uv pip uninstall`, then run `uv sync`"
    failure = import_failure("cv2")
    if failure:
        yield Finding("OpenCV", "problem", f"cv2 does not load: {failure} ({facts})", mend)
    elif len(found) > 1:
        yield Finding("OpenCV", "note", f"{facts} are installed over each other in one folder", mend)
    else:
        yield Finding("OpenCV", "ok", facts)


def check_ultralytics() -> Iterator[Finding]:
    """Two distributions of Ultralytics in one folder; packages that it would install by itself."""
    if _version("ultralytics") and _version("ultralytics-opencv-headless"):
        yield Finding(
            "Ultralytics",
            "note",
            f"ultralytics {_version('ultralytics')} and ultralytics-opencv-headless"
            f" {_version('ultralytics-opencv-headless')} are installed over each other in one folder",
            "Run `uv pip uninstall ultralytics ultralytics-opencv-headless`, then `uv sync`",
        )
    if os.environ.get("YOLO_AUTOINSTALL", "").lower() not in ("false", "0", "no"):
        yield Finding(
            "Ultralytics",
            "note",
            "YOLO_AUTOINSTALL is on: it installs packages while it serves",
            "Unset YOLO_AUTOINSTALL: yolofleet then switches it off",
        )


def check_engines() -> Iterator[Finding]:
    """Which kinds of weights can be run."""
    here = [name for name in ENGINES if find_spec(name)]
    missing = [name for name in ENGINES if name not in here]
    chosen = plan(EMBEDDED.model_copy(update={"engine": "auto"}))
    auto = f"; .pt weights are computed by {chosen.engine} {chosen.precision}, {chosen.why}" if chosen else ""
    fact = "runs " + ", ".join(f"{ENGINES[name]} ({name})" for name in here) + auto
    if not missing:
        yield Finding("engines", "ok", fact)
        return
    lacking = ", ".join(f"{ENGINES[name]} ({name})" for name in missing)
    extras = sorted(EXTRAS[name] for name in missing if name in EXTRAS)
    mend = "To run these too: `uv sync" + "".join(f" --extra {extra}" for extra in extras) + "`"
    yield Finding("engines", "note", f"{fact}; not {lacking}", mend)


def check_trackers() -> Iterator[Finding]:
    """The assignment solver of Ultralytics' trackers."""
    if find_spec("lap"):
        yield Finding("trackers", "ok", f"lap {_version('lap')}")
    else:
        yield Finding("trackers", "note", "lap is not installed: tracking will not work", "Run `uv sync`")


# -- the machine ---------------------------------------------------------------------------------------------------------


def check_cores() -> Iterator[Finding]:
    """Cores, and variables that would decide about threads."""
    cores, all_cores = available_cpus(), os.cpu_count() or 1
    limited = "" if cores == all_cores else f" of the machine's {all_cores}"
    yield Finding("cores", "ok", f"{cores}{limited}: as many one-core actors fit")
    for name in THREAD_VARIABLES:
        if name in os.environ:
            yield Finding(
                "threads",
                "note",
                f"{name} is {os.environ[name]}; actors take their engine threads from --cpus-per-replica instead",
                f"Unset {name} unless other software needs it",
            )


def check_memory() -> Iterator[Finding]:
    """Memory, against what one actor takes and what Ray tolerates."""
    sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in Path("/proc/meminfo").read_text().splitlines()}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    fact = f"{free:.1f} of {total:.1f} GiB free"
    if free < max(MODEL_GB, (1 - RAY_FULL) * total):
        mend = "End other programs, or use a machine with more memory: Ray kills its workers where more than 95 % is used"
        yield Finding("memory", "problem", fact, mend)
    else:
        yield Finding("memory", "ok", f"{fact}: about {free / MODEL_GB:.0f} actors with a small model")


def check_disk() -> Iterator[Finding]:
    """The folder that Ray writes to, and its shared memory."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(existing)
    fact = f"{usage.free / 2**30:.1f} GiB free for Ray's logs and spilled objects in {folder}"
    too_long = len(f"{folder}/{SOCKET_NAME}") - LONGEST_SOCKET_PATH
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "disk", "problem", f"{existing} is not writable for this user", "Set RAY_TMPDIR to a short path of your own"
        )
    elif too_long > 0:
        yield Finding(
            "disk", "problem", f"{folder} is {too_long} characters too long for Ray's sockets", "Set RAY_TMPDIR=/tmp"
        )
    elif usage.free < 2**30:
        yield Finding("disk", "problem", fact, "Free some space, or set RAY_TMPDIR to a folder on a larger disk")
    elif usage.free < (1 - RAY_FULL) * usage.total:
        yield Finding("disk", "note", f"{fact}: more than 95 % is used, so Ray will not spill objects", "Free some space")
    else:
        yield Finding("disk", "ok", fact)
    yield from _shared_memory()


# -- what serve and predict find -----------------------------------------------------------------------------------------


def check_weights() -> Iterator[Finding]:
    """The weights that ``serve`` takes without ``--model``."""
    places = [Path(), _ultralytics_weights()]
    found = next((place / DEFAULT_WEIGHTS for place in places if (place / DEFAULT_WEIGHTS).is_file()), None)
    if found:
        yield Finding("weights", "ok", str(found.resolve()))
        return
    yield Finding(
        "weights",
        "note",
        f"no {DEFAULT_WEIGHTS} in {places[0].resolve()} or {places[1]}: Ultralytics will try to download it",
        "Offline, give --model WEIGHTS; without it, serve falls back to the embedded demonstration model",
    )


def check_port() -> Iterator[Finding]:
    """Whether ``serve`` can listen on its default port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError as error:
            owner = _listener(DEFAULT_PORT)
            holder = f" by {owner[1]} (process {owner[0]})" if owner else ""
            end = f"end that process (`kill {owner[0]}`)" if owner else "end who has it"
            left = (
                ": a run that was killed left it behind" if owner and owner[1] == "haproxy" and not _running("raylet") else ""
            )
            fact = f"{DEFAULT_PORT} is taken{holder}{left} ({error.strerror})"
            yield Finding("port", "problem", fact, f"Give serve another --port, or {end}")
        else:
            yield Finding("port", "ok", f"{DEFAULT_PORT} is free")


def check_leftovers() -> Iterator[Finding]:
    """Ray that runs already, and proxies that outlived theirs."""
    for pid in [] if _running("raylet") else _running("haproxy"):
        fact = f"haproxy (process {pid}) runs without a Ray: a run that was killed may have left it, with its ports"
        yield Finding("processes", "note", fact, f"End it with `kill {pid}` unless it is yours")
    for pid in _running("raylet"):
        fact = f"another Ray runs on this machine (raylet, process {pid}) and takes its share of cores and memory"
        yield Finding("processes", "note", fact, "Beware of `ray stop`: it ends every Ray on the machine")


def check_cluster() -> Iterator[Finding]:
    """The cluster that ``RAY_ADDRESS`` names, if any."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("cluster", "ok", "RAY_ADDRESS is not set: serve and predict start Ray on this machine")
        return
    fact = f"RAY_ADDRESS is {address}: serve and predict join that cluster"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            yield Finding(
                "cluster", "problem", f"{fact}, and it does not answer ({error})", "Unset RAY_ADDRESS, or start the cluster"
            )
            return
    yield Finding("cluster", "note", fact, "Unset RAY_ADDRESS to use this machine alone")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "OpenCV": check_opencv,
    "Ultralytics": check_ultralytics,
    "engines": check_engines,
    "trackers": check_trackers,
    "cores": check_cores,
    "memory": check_memory,
    "disk": check_disk,
    "weights": check_weights,
    "port": check_port,
    "processes": check_leftovers,
    "cluster": check_cluster,
}


def import_failure(module: str) -> str | None:
    """Why ``module`` does not load, tried in a process of its own; None if it does."""
    tried = subprocess.run(
        [sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
    )
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if lines else f"its process died with exit status {tried.returncode}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _no_gpu() -> Finding:
    driver = Path("/proc/driver/nvidia/version")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", "note", "CUDA_VISIBLE_DEVICES hides every GPU", "Unset CUDA_VISIBLE_DEVICES to use them")
    if driver.exists():
        fact = f"there is an NVIDIA driver, but torch {_version('torch')} cannot use it: inference runs on the CPU"
        return Finding("GPU", "note", fact, "Update the driver, or install a torch that was built for the CUDA of this one")
    return Finding("GPU", "ok", "none: inference runs on the CPU")


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.exists():
        return
    size = shutil.disk_usage(SHARED_MEMORY).total
    if size < 2**30:
        fact = f"{SHARED_MEMORY} has {size / 2**20:.0f} MiB: Ray keeps its objects on disk instead, which is slower"
        yield Finding("object store", "note", fact, "In a container, give it more: `docker run --shm-size=2g`")
    else:
        yield Finding("object store", "ok", f"{SHARED_MEMORY} has {size / 2**30:.1f} GiB for Ray's objects")


def _ultralytics_weights() -> Path:
    """Ultralytics' weights folder out of its settings file; importing Ultralytics for it would take seconds."""
    config = os.environ.get("YOLO_CONFIG_DIR") or os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    settings = Path(config).expanduser() / "Ultralytics" / "settings.json"
    if not settings.is_file():
        return Path("weights").resolve()
    return Path(json.loads(settings.read_text())["weights_dir"])


def _running(name: str) -> list[int]:
    """Processes of that name; none where there is no /proc."""
    found = []
    for command in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if command.read_text().strip() == name:
                found.append(int(command.parent.name))
    return sorted(found)


def _listener(port: int) -> tuple[int, str] | None:
    """Process id and name of who listens on a TCP port, as far as this user may see it."""
    sockets = {
        f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening_inodes(Path("/proc/net") / table, port)
    }
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()) in sockets:
                process = descriptor.parent.parent
                return int(process.name), (process / "comm").read_text().strip()
    return None


def _listening_inodes(table: Path, port: int) -> Iterator[str]:
    if not table.exists():
        return
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            yield fields[9]
