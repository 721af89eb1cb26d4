"""`fedprompt doctor`: what this machine has, whether the quickstart can run, and what to fix.

A finding is a fact, a warning (something is slower or missing, with its fix) or a problem (the
quickstart cannot run, with its fix). Nothing is written and no cluster is started unless asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fedprompt.core.errors import FedpromptError
from fedprompt.core.files import Json
from fedprompt.core.machine import available_cpus
from fedprompt.core.words import counted

# None of these may import torch, which may be what is broken.
from fedprompt.data.prefix.listing import cache_entries, cache_folder
from fedprompt.data.reading.files import data_home

PACKAGES = (
    *("fedprompt", "torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics", "ray"),
    *("numpy", "scipy", "scikit-learn", "omegaconf", "safetensors", "matplotlib", "rich", "click"),
)
WITHOUT_RAY = "install ray, or run with runtime=serial"
MIN_FREE_DISK = 10**9
MIN_MEMORY = 2 * 10**9
MIN_SHARED_MEMORY = 10**9
STATES = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("problem", "red")}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    state: str = "ok"
    """`ok`, `warning`, or `problem`: the quickstart cannot run."""
    fix: str = ""


def examine(use_ray: bool = False) -> list[Finding]:
    """Look at everything, in the order of the report.

    Args:
        use_ray: start and stop a local Ray cluster to see what it finds.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        devices,
        memory,
        disk,
        imports,
        weights,
        ray_cluster if use_ray else ray_outlook,
        data_sets,
    ]
    return [finding for check in checks for finding in check()]


def can_run(findings: list[Finding]) -> bool:
    """Whether the quickstart can run."""
    return all(finding.state != "problem" for finding in findings)


def versions() -> Iterator[Finding]:
    """Python and the packages that count."""
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("versions", "platform", platform.platform())
    for name in PACKAGES:
        try:
            yield Finding("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield _absent(name)


def _absent(name: str) -> Finding:
    if name == "fedprompt":  # runs from its sources
        return Finding("versions", name, "not installed", "warning", "run 'make setup'")
    state = "warning" if name == "ray" else "problem"
    fix = WITHOUT_RAY if name == "ray" else f"install {name}, or run 'make setup'"
    return Finding("versions", name, "missing", state, fix)


def devices() -> Iterator[Finding]:
    """Processors and accelerators."""
    usable, total = available_cpus(), os.cpu_count() or 1
    yield Finding("devices", "cpu cores", f"{usable} usable of {total}")
    threads = os.environ.get("OMP_NUM_THREADS")
    with contextlib.suppress(Exception):  # `imports` says what is wrong with torch
        import torch

        yield Finding(
            "devices",
            "threads",
            f"{torch.get_num_threads()} of torch here; OMP_NUM_THREADS="
            f"{threads or 'unset'}; runs set their own (runtime.threads)",
        )
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("devices", "cuda", ", ".join(names) or "none: runs use the CPU")


def memory() -> Iterator[Finding]:
    """Main memory, the container's limit included, and the shared memory that Ray uses."""
    total, available = memory_bytes()
    small = available is not None and available < MIN_MEMORY
    yield Finding(
        "memory",
        "main memory",
        f"{_size(available)} available of {_size(total)}",
        "warning" if small else "ok",
        "close other programs, or run with runtime=serial" if small else "",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield Finding(
            "memory",
            "/dev/shm",
            f"{_size(free)} free",
            "ok" if free >= MIN_SHARED_MEMORY else "warning",
            ""
            if free >= MIN_SHARED_MEMORY
            else "Ray's object store falls back to slow files; give the container more "
            "(docker run --shm-size=4g), or run with runtime=serial",
        )


def memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), limits: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, int | None]:
    """Total and available bytes; a control group's limit counts as the total."""
    facts = {}
    with contextlib.suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            facts[name] = int(rest.split()[0]) * 1024
    total, available = facts.get("MemTotal"), facts.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((limits / "memory.max").read_text())
        used = int((limits / "memory.current").read_text())
        total = limit if total is None else min(total, limit)
        available = min(limit - used, limit if available is None else available)
    return total, available


def disk() -> Iterator[Finding]:
    """The cache of features, and room for runs."""
    folder = cache_folder()
    places = {}
    try:
        entries = cache_entries(folder)
        above = _existing(folder)
    except OSError as error:
        yield _bad_cache(f"{folder} cannot be read ({error.strerror})")
    else:
        size = sum(entry.size for entry in entries)
        yield Finding("disk", "feature cache", f"{folder}: {len(entries)} entries, {_size(size)}")
        if not above.is_dir():
            yield _bad_cache(f"{above} is no folder")
        elif not os.access(above, os.W_OK):
            yield _bad_cache(f"{above} cannot be written")
        places["free for the cache"] = above
    runs = Path.cwd()
    if not os.access(runs, os.W_OK):
        yield Finding(
            "disk",
            "run folder",
            f"{runs} cannot be written",
            "problem",
            "go to a folder that can be written, or set run_dir=PATH",
        )
    places["free for runs"] = runs
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        yield Finding(
            "disk",
            name,
            _size(free),
            "ok" if free >= MIN_FREE_DISK else "warning",
            "" if free >= MIN_FREE_DISK else f"free some space below {place}",
        )


def _bad_cache(text: str) -> Finding:
    fix = "set cache.folder or FEDPROMPT_CACHE to a folder that can, or cache.enabled=false"
    return Finding("disk", "feature cache", text, "warning", fix)


def imports() -> Iterator[Finding]:
    """torch, torchvision and timm together, then the rest that a run needs."""
    matching = "torch and torchvision do not match; install a pair that was built together, as "
    for names, fix in (
        (
            ("torch", "torchvision", "timm"),
            f"{matching}'make setup' does from constraints.txt",
        ),
        (("pytorch_lightning", "torchmetrics", "sklearn", "matplotlib"), "run 'make setup'"),
    ):
        text = ", ".join(names)
        try:
            for name in names:
                importlib.import_module(name)
        # A mismatch of compiled parts shows as RuntimeError, OSError or AttributeError.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            yield Finding("quickstart", text, f"import fails: {cause[:160]}", "problem", fix)
        else:
            yield Finding("quickstart", text, "imported together")


def weights() -> Iterator[Finding]:
    """Whether the embedded backbones are there and compute what they should."""
    try:
        from fedprompt.models import load_backbone
        from fedprompt.models.nano import network as nano
    except Exception:  # `imports` says why
        return
    for name in nano.EMBEDDED:
        path = nano.weights_path(name)
        try:
            backbone = load_backbone(name)
            finite = all(bool(value.isfinite().all()) for value in backbone.state_dict().values())
            count = sum(value.numel() for value in backbone.parameters())
        except (FedpromptError, OSError) as error:
            yield _bad_weights(name, str(error))
            continue
        if not finite:
            yield _bad_weights(name, f"{path} holds numbers that are not finite")
            continue
        yield Finding(
            "quickstart",
            f"weights of {name}",
            f"{count:,} parameters, sha256 {backbone.checksum()[:12]}",
        )


def _bad_weights(name: str, text: str) -> Finding:
    fix = "install fedprompt again; in a clone, 'git checkout' the folder models/nano/weights"
    from fedprompt.config import compose

    state = "problem" if name == compose("quickstart").model.backbone else "warning"
    return Finding("quickstart", f"weights of {name}", text, state, fix)


def ray_outlook() -> Iterator[Finding]:
    """What a run would ask Ray for; nothing is started."""
    if not _installed("ray"):
        return  # `versions` says so
    cores = available_cpus()
    address = os.environ.get("RAY_ADDRESS")
    value = f"a run starts its own with {counted(cores, 'CPU')}; 'fedprompt doctor --ray' tries it"
    if address:
        value = f"RAY_ADDRESS={address}: runs join that cluster"
    yield Finding("ray", "cluster", value)


def ray_cluster() -> Iterator[Finding]:
    """Start a local cluster, ask what it sees and stop it."""
    if not _installed("ray"):
        return
    try:
        from fedprompt.runtime.ray import local

        ray = local.import_ray()
        if ray.is_initialized():
            resources = ray.cluster_resources()
        else:
            try:
                local.start_ray(available_cpus(), verbose=False, join=False)
                resources = ray.cluster_resources()
            finally:
                local.stop_ray()
    except Exception as error:  # whatever keeps a cluster from starting is the finding
        cause = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        yield Finding("ray", "cluster", f"does not start: {cause}", "warning", WITHOUT_RAY)
        return
    for name in ("CPU", "GPU"):
        yield Finding("ray", name, f"{resources.get(name, 0):g}")
    for name in ("memory", "object_store_memory"):
        yield Finding("ray", name.replace("_", " "), _size(int(resources.get(name, 0))))


def data_sets() -> Iterator[Finding]:
    """Where published data sets are looked for; the built-in ones need no files."""
    home = data_home()
    source = "FEDPROMPT_DATA" if os.environ.get("FEDPROMPT_DATA") else "default; FEDPROMPT_DATA"
    state, fix = "ok", ""
    try:
        if home.is_dir():
            names = sorted(path.name for path in home.iterdir() if path.is_dir())
            value = f"{home}: {', '.join(names) or 'empty'}"
        else:
            value = f"{home}: not there; only the built-in digits and domains can be used"
    except OSError as error:
        value = f"{home} cannot be read ({error.strerror})"
        state, fix = "warning", "set FEDPROMPT_DATA to a folder that can"
    yield Finding("data", f"data sets ({source})", value, state, fix)


def render(findings: list[Finding]) -> RenderableType:
    """The report for a terminal: what there is, then every warning and problem with its fix."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for column in ("", "what", "found", "state"):
        table.add_column(column, overflow="fold")
    section = ""
    for finding in findings:
        word, colour = STATES[finding.state]
        heading = finding.section if finding.section != section else ""
        section = finding.section
        cells = (Text(heading, "bold"), Text(finding.name), Text(finding.value), Text(word, colour))
        table.add_row(*cells)
    parts: list[RenderableType] = [table]
    for finding in findings:
        if finding.state != "ok":
            word, colour = STATES[finding.state]
            text = f" {finding.name}: {finding.value}; {finding.fix}"
            parts.append(Text.assemble((f"{word}:", f"bold {colour}"), text))
    if can_run(findings):
        parts.append(Text("The quickstart can run: fedprompt run quickstart", "green"))
    else:
        parts.append(Text("The quickstart cannot run until the problems are fixed.", "red"))
    return Group(*parts)


def as_tree(findings: list[Finding]) -> Json:
    """The report for a program."""
    return {
        "quickstart": can_run(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(count: int | None) -> str:
    """Bytes in words.

    >>> _size(2_500_000_000), _size(0), _size(None)
    ('2.5 GB', '0 bytes', 'unknown')
    """
    return "unknown" if count is None else decimal(count)
