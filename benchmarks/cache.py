"""What does the prefix cache save, and what does it cost?

    python -m benchmarks.cache [--images 1000] [--large-images 256]
                               [--output benchmarks/results/cache.json]

Two cases: `domains` with `nano_promptable` (32 x 32, 17 tokens of 128), and images of noise with a
ViT-B/32 of random weights (224 x 224, 50 tokens of 768). Before anything is timed, the cached table
must have the bits of the computed one, for all three types of tokens.

- `seconds_per_1000`: `draw` the images (domains alone); `compute` the features in memory; `cold`,
  compute and write them; `warm`, find and open them; `read`, open them and read every token as
  float32, in the order of the split. Each is the least of `--repeats`.
- `bytes`: of an entry on disk, for the three types.
- `memory`: of the ViT's float32 table in 1, 2 and 4 Ray actors of one machine, each of which got it
  as the runtime sends it and has read all tokens. `proportional_mb` (PSS, where a page that k
  processes map counts 1/k for each) and `resident_mb` (RSS) of the mapped cache files, both summed
  over the actors, from /proc/PID/smaps: one copy shows as a sum of PSS that does not grow.
- `start`: seconds from the call of `fedprompt.run`, which starts Ray if need be, until the rounds
  begin, in a fresh process, with an empty and with a warm cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from threadpoolctl import threadpool_limits
from timm.models.vision_transformer import VisionTransformer

from benchmarks.harness import RESULTS, Json, header, one_thread, read_json, write_json
from fedprompt.data.prefix.cache import (
    CacheOptions,
    FeatureTable,
    PrefixCache,
    cache_size,
    compute_table,
)
from fedprompt.data.prefix.tables import ARRAYS, CHUNK, DTYPES
from fedprompt.data.sets.domains import DomainsOptions, domains
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone, load_backbone

if TYPE_CHECKING:
    from ray import ObjectRef

CPU = torch.device("cpu")
MB = 2**20
ACTORS = (1, 2, 4)

START = """
import json, sys, tempfile, time
import fedprompt
name, runtime, cache, wait = sys.argv[1:]
if float(wait):
    from fedprompt.runtime.ray.local import start_ray
    start_ray(2, verbose=False)
    time.sleep(float(wait))
started, times = time.perf_counter(), {}
def note(event):
    times.setdefault(type(event).__name__, round(time.perf_counter() - started, 2))
with tempfile.TemporaryDirectory() as folder:
    overrides = ["rounds=1", "compare=[]", f"runtime={runtime}", f"run_dir={folder}/run"]
    fedprompt.run(name, [*overrides, f"cache.folder={cache}"], on_event=note)
print(json.dumps({"prepared": times["Prepared"], "rounds_begin": times["PhaseStarted"]}))
"""


def small_case(images: int) -> tuple[Backbone, Split]:
    """The training split of `domains`, drawn."""
    split = domains(DomainsOptions(train=images)).train
    return load_backbone("nano_promptable"), drawn(split)


def large_case(images: int) -> tuple[Backbone, Split]:
    """A ViT-B/32 with random weights and images of noise."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch32_224", pretrained=False, num_classes=0)
    assert isinstance(vit, VisionTransformer)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 224, 224, 3), np.uint8)
    labels = generator.integers(0, 10, images)
    return Backbone(vit, 224), Split(pixels, labels, np.zeros(images, np.int64))


def drawn(split: Split) -> Split:
    """The same with its images in memory."""
    return Split(np.asarray(split.images[:]), split.labels, split.groups)


def least(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def read_all(table: FeatureTable) -> float:
    """Every token once, as clients and evaluation read them."""
    rows = np.arange(len(table))
    return sum(float(table.tokens_at(part)[0, 0, 0]) for part in np.split(rows, rows[CHUNK::CHUNK]))


def check_equal(backbone: Backbone, split: Split) -> None:
    """Both sides do the same: the cached bits are the computed ones.

    Raises:
        RuntimeError: they are not.
    """
    for dtype in DTYPES:
        computed = compute_table(backbone, split, CPU, dtype)
        with tempfile.TemporaryDirectory() as folder:
            options = CacheOptions(folder=folder, dtype=dtype)
            cold = PrefixCache(backbone, CPU, options).table(split)
            warm = PrefixCache(backbone, CPU, options).table(split)
            for name in ARRAYS:
                for table in (cold, warm):
                    if not np.array_equal(getattr(table, name), getattr(computed, name)):
                        raise RuntimeError(f"{dtype}: cached {name} differ from the computed")


def measure_case(backbone: Backbone, split: Split, repeats: int) -> Json:
    """Seconds per 1,000 images, and bytes."""
    check_equal(backbone, split)
    per = 1000 / len(split)

    def in_folder(folder: str, dtype: str = "float32") -> FeatureTable:
        options = CacheOptions(folder=folder, dtype=dtype)
        return PrefixCache(backbone, CPU, options).table(split)

    def cold() -> None:
        with tempfile.TemporaryDirectory() as folder:
            in_folder(folder)

    sizes = {}
    with tempfile.TemporaryDirectory() as warm:
        table = in_folder(warm)
        seconds = {
            "compute": least(lambda: compute_table(backbone, split, CPU), repeats),
            "cold": least(cold, repeats),
            "warm": least(lambda: in_folder(warm), repeats),
            "read": least(lambda: read_all(in_folder(warm)), repeats),
        }
        shape = list(table.tokens.shape)
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            in_folder(folder, dtype)
            sizes[dtype] = cache_size(Path(folder))
    return {
        "images": len(split),
        "tokens": shape,
        "seconds_per_1000": {name: round(value * per, 4) for name, value in seconds.items()},
        "bytes": sizes,
    }


class Reader:
    """Holds a table as a client actor does, and reports what of it is in its memory."""

    def load(self, tables: list[ObjectRef[FeatureTable]]) -> float:
        """Open the table and read all tokens."""
        import ray

        self.table = ray.get(tables[0])
        return read_all(self.table)

    def memory(self) -> dict[str, float]:
        """PSS and RSS of the mapped tokens, and PSS of the whole process, in MB."""
        own = {"Pss": 0.0, "Rss": 0.0}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(":")
            if "-" in line.split()[0]:
                inside = line.endswith("tokens.npy")
            elif inside and name in own:
                own[name] += float(rest.split()[0]) / 1024
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        total = next(float(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        return {**own, "process": total / 1024}


def measure_memory(backbone: Backbone, split: Split) -> Json:
    """Memory of the tokens in several actors at once.

    Raises:
        RuntimeError: the actors read other tokens than this process.
    """
    from fedprompt.runtime.ray.local import import_ray, start_ray

    ray = import_ray()
    start_ray(max(ACTORS), verbose=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = CacheOptions(folder=folder)
        table = PrefixCache(backbone, CPU, options).table(split)
        expected, size = read_all(table), table.tokens.nbytes / MB
        sent = [ray.put(table)]
        del table  # this process is to map nothing
        for count in ACTORS:
            readers = [ray.remote(num_cpus=0)(Reader).remote() for _ in range(count)]
            if ray.get([reader.load.remote(sent) for reader in readers]) != [expected] * count:
                raise RuntimeError("an actor read other tokens")
            found = ray.get([reader.memory.remote() for reader in readers])
            rows.append(
                {
                    "actors": count,
                    "proportional_mb": round(sum(each["Pss"] for each in found), 1),
                    "resident_mb": round(sum(each["Rss"] for each in found), 1),
                    "processes_mb": round(sum(each["process"] for each in found), 1),
                }
            )
            for reader in readers:
                ray.kill(reader)
            time.sleep(1)  # until their pages are gone
    ray.shutdown()
    return {"tokens_mb": round(size, 1), "rows": rows}


def measure_start(name: str, runtime: str) -> Json:
    """Seconds until the rounds of an experiment begin, with an empty and with a warm cache.

    Ray is started by the run and its start counted, but for `warm_ray_up`: there it has been up for
    ten seconds, so that its spare workers have imported what they need.
    """
    result = {}
    states = {"empty": 0, "warm": 0, **({"warm_ray_up": 10} if runtime == "ray" else {})}
    with tempfile.TemporaryDirectory() as folder:
        for state, wait in states.items():
            done = subprocess.run(
                [sys.executable, "-c", START, name, runtime, folder, str(wait)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            result[state] = json.loads(done.stdout.splitlines()[-1])
    return {"experiment": name, "runtime": runtime, **result}


def measure_starts() -> list[Json]:
    """`measure_start` of both experiments and runtimes."""
    names = ("digits", "domains")
    return [measure_start(name, runtime) for name in names for runtime in ("serial", "ray")]


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--large-images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-start", action="store_true", help="leave `start` out")
    parser.add_argument("--only-start", action="store_true", help="replace `start` in the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "cache.json")
    arguments = parser.parse_args()
    one_thread()
    load = os.getloadavg()[0]
    if arguments.only_start:
        document = read_json(arguments.output)
        document["start"] = measure_starts()
        document["start_load_before"] = round(load, 1)
        write_json(arguments.output, document)
        print(json.dumps(document["start"], indent=1))
        return
    with threadpool_limits(1):
        started = time.perf_counter()
        small = small_case(arguments.images)
        seconds = (time.perf_counter() - started) * 1000 / arguments.images
        large = large_case(arguments.large_images)
        cases = {
            "domains, nano_promptable": measure_case(*small, arguments.repeats),
            "noise, vit_base_patch32_224": measure_case(*large, arguments.repeats),
        }
        cases["domains, nano_promptable"]["seconds_per_1000"]["draw"] = round(seconds, 4)
        memory = measure_memory(*large)
    starts = [] if arguments.no_start else measure_starts()
    document = header(
        "cache",
        load_before=round(load, 1),
        cases=cases,
        memory=memory,
        start=starts,
    )
    write_json(arguments.output, document)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
