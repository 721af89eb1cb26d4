"""How long does it take to divide 1,000,000 samples among 100,000 clients, and in how much memory?

    python -m benchmarks.partition [--cases iid,shards] [--output benchmarks/results/partition.json]

Every partitioner of `fedprompt.data.partition`, by its public call, on labels of 100 classes drawn
uniformly (seed 0). Each case runs in a process of its own, three times with the seeds 0, 1, 2;
before a time counts, the result is checked: one array per client, and no sample lost or repeated
(`long_tail` leaves out what its profile leaves out). Measured are the median seconds of a call, by
the clock and of processor time, which do not differ where nothing else runs, and the peak resident
memory of the whole process up to the end of the first call, of which `start_mb` was there before:
the interpreter, PyTorch, which the package imports, and the labels.

Options that differ from the defaults: `dirichlet` has min_samples=0, since with 10 samples a client
nearly every draw leaves some client without one, and `long_tail` IF 2, since with 100 there would
be fewer samples than clients. `natural` goes by a column of 200,000 owners. `file` reads from the
disk what `dirichlet` gave and checks it against the labels; its time is that of reading and
checking. Target: 10 s and 1 GB each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.files import Json
from fedprompt.data.partition import base as partition
from fedprompt.data.partition.file import make_recipe, partition_bytes
from fedprompt.data.partition.long_tail import tail_sizes

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "partition.json"
Indices = NDArray[np.int64]
SAMPLES, CLASSES, CLIENTS, OWNERS = 1_000_000, 100, 100_000, 200_000
SEEDS = (0, 1, 2)
CASES: dict[str, tuple[str, Json]] = {
    "iid": ("iid", {}),
    "dirichlet": ("dirichlet", {"alpha": 0.5, "min_samples": 0}),
    "dirichlet, tiny alpha": ("dirichlet", {"alpha": 1e-6, "min_samples": 0}),
    "dirichlet_per_client": ("dirichlet_per_client", {"alpha": 0.5}),
    "dirichlet_per_client, tiny alpha": ("dirichlet_per_client", {"alpha": 1e-6}),
    "imbalance": ("imbalance", {"dominated": 1}),
    "imbalance, 10 classes": ("imbalance", {"dominated": 10}),
    "shards": ("shards", {"classes_per_client": 2}),
    "quantity": ("quantity", {"alpha": 0.5}),
    "natural": ("natural", {}),
    "long_tail": ("long_tail", {"imbalance_factor": 2.0, "then": "iid"}),
    "long_tail, dirichlet": (
        "long_tail",
        {"imbalance_factor": 2.0, "then": "dirichlet", "options": {"min_samples": 0}},
    ),
    "file": ("file", {}),
}


def make_labels() -> Indices:
    return np.random.default_rng(0).integers(0, CLASSES, SAMPLES)


def peak_mb() -> int:
    """Peak resident memory of this process in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says on Linux starts with the parent's peak
        (line,) = (each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6)
    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6)


def check(parts: Sequence[Indices], labels: Indices, options: Json) -> None:
    """Stop the benchmark if the parts are no partition.

    Args:
        parts: what each client holds.
        labels: of all samples.
        options: of the partitioner.
    """
    samples = np.concatenate(parts)
    kept = np.bincount(labels, minlength=CLASSES)
    if "imbalance_factor" in options:
        kept = tail_sizes(kept, options["imbalance_factor"])
    once = len(np.unique(samples)) == len(samples)
    right = np.array_equal(np.bincount(labels[samples], minlength=CLASSES), kept)
    if not (len(parts) == CLIENTS and once and right):
        raise SystemExit("a sample was lost or repeated")


def measure(case: str, path: str) -> Json:
    """The figures of one case, in this process.

    Args:
        case: name in `CASES`.
        path: of the partition that `file` reads.
    """
    name, options = CASES[case]
    options = {**options, "file": path} if name == "file" else options
    labels = make_labels()
    columns = {}
    if name == "natural":
        columns = {"owners": np.random.default_rng(1).integers(0, OWNERS, SAMPLES)}
    partition.partitioners.names()  # the imports are not timed
    start_mb, seconds, cpu_seconds = peak_mb(), [], []
    for seed in SEEDS:
        started, cpu_started = time.perf_counter(), time.process_time()
        partitioner = partition.create(name, **options)
        parts = partitioner(labels, CLIENTS, seed, **columns)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        after_mb = peak_mb()  # before the check, which needs memory itself
        check(parts, labels, options)
        sizes = [len(part) for part in parts]
        del parts
        if seed == SEEDS[0]:
            first_mb = after_mb
    return {
        "case": case,
        "partition": name,
        "options": {key: value for key, value in options.items() if key != "file"},
        "seconds": round(statistics.median(seconds), 2),
        "cpu_seconds": round(statistics.median(cpu_seconds), 2),
        "peak_mb": first_mb,
        "start_mb": start_mb,
        "client_samples": {"min": min(sizes), "max": max(sizes)},
    }


def measure_apart(case: str, path: str) -> Json:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.partition", "--one", case, "--path", path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{case}: {result.stderr.strip()}")
    figures: Json = json.loads(result.stdout)
    print(
        f"{case:34} {figures['seconds']:6.2f} s ({figures['cpu_seconds']:.2f})  "
        f"{figures['peak_mb']:5} MB ({figures['start_mb']} MB before)",
        flush=True,
    )
    return figures


def save_partition(path: Path) -> None:
    """What the case `file` reads."""
    name, options = CASES["dirichlet"]
    labels = make_labels()
    parts = partition.create(name, **options)(labels, CLIENTS, 0)
    path.write_bytes(partition_bytes(parts, make_recipe(name, options, 0, parts, labels)))


def _cases(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    chosen = [case for case in CASES if case.split(",")[0] in names]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CASES)}, got {unknown[0]!r}")
    return chosen


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=_cases, default=list(CASES), help="partitioners, by comma")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.path)))
        return
    from benchmarks.harness import header, write_json  # what they need is not the partitioners'

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "partition.npz"
        save_partition(path)
        rows = [measure_apart(case, str(path)) for case in arguments.cases]
    document = header(
        "partition",
        seconds=round(time.perf_counter() - started, 1),
        request={
            "samples": SAMPLES,
            "classes": CLASSES,
            "clients": CLIENTS,
            "owners": OWNERS,
            "seeds": list(SEEDS),
        },
        target={"seconds": 10, "peak_mb": 1000},
        cases=rows,
    )
    write_json(arguments.output, document)


if __name__ == "__main__":
    main()
