"""One GPU: PFPT with the paper's CIFAR-100 schedule, ViT-B/32, images of noise in CIFAR's numbers.

    python -m benchmarks.speed.gpu                      120 rounds: about 3.0 M training samples
    python -m benchmarks.speed.gpu --rounds 3 --rival   and one process for each client, same card

100 clients, 10 in a round, 5 epochs, batches of 16, every round evaluated on 10,000 images. The
`serial` runtime drives it, which needs no Ray; its worker packs the whole cohort into one pass. The
result is a case of speed.json. `--device cpu --dry` with small numbers tries the script out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier

import numpy as np
import torch

from benchmarks.harness import Json, run_once
from benchmarks.speed.run import OUTPUT, add
from benchmarks.speed.timing import load
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import WorkerSetup
from fedprompt.config import compose
from fedprompt.core.types import ClientJob
from fedprompt.data.task import Split, Task, datasets
from fedprompt.runs import driver
from fedprompt.runs.events import RoundFinished
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.server.round import make_jobs

CLASSES = 100


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    """Images of a split."""

    train: int = 50_000
    test: int = 10_000


@datasets.register("noise", NoiseOptions)
def noise(options: NoiseOptions) -> Task:
    """CIFAR-100 in numbers and sizes, without anything to see."""

    def split(count: int, seed: int) -> Split:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)
        return Split(pixels, np.arange(count) % CLASSES, np.zeros(count, np.int64))

    names = tuple(map(str, range(CLASSES)))
    sizes = (options.train, CLASSES, options.test)
    train, validation, test = (split(count, seed) for seed, count in enumerate(sizes))
    return Task("noise", names, ("noise",), train, validation, test)


def experiment(arguments: argparse.Namespace) -> Json:
    """The experiment that a user would write for CIFAR-100."""
    return {
        "name": "gpu",
        "rounds": arguments.rounds,
        "data": {"name": "noise", "train": arguments.train, "test": arguments.test},
        "model": {"backbone": arguments.backbone, "pretrained": False},
        "clients": {
            "count": arguments.clients,
            "per_round": 10,
            "epochs": arguments.epochs,
            "batch_size": 16,
        },
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "prompts": {"count": 10, "pool": 20},
        "head": "linear",
        "runtime": {
            "name": "serial",
            "device": arguments.device,
            "precision": arguments.precision,
        },
    }


def whole_run(arguments: argparse.Namespace) -> Json:
    """Seconds of the run and where they go, and the most memory of the card."""
    reports = []

    def note(event: object, _: Path) -> None:
        if isinstance(event, RoundFinished):
            reports.append(event.report)

    with tempfile.TemporaryDirectory() as folder:
        changes = ["compare=[]", f"cache.folder={folder}/cache"]
        once = run_once(experiment(arguments), changes, note)
    split = {
        phase: round(sum(report.seconds[phase] for report in reports), 2)
        for phase in ("train", "aggregate", "evaluate")
    }
    samples = sum(int(client["num_examples"]) for report in reports for client in report.clients)
    return {
        "rounds": len(reports),
        "training_samples": samples * arguments.epochs,
        "test_samples": arguments.test * len(reports),
        "seconds": round(once.seconds, 1),
        "seconds_of": {"prepare": round(once.phase, 2), **split},
        "packs_of": sorted({int(client["pack"]) for r in reports for client in r.clients}),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu(arguments) else None,
    }


def on_gpu(arguments: argparse.Namespace) -> bool:
    """Whether a card is used."""
    return bool(arguments.device == "cuda")


def one_client(
    number: int,
    setup: WorkerSetup,
    recipe: LocalRecipe,
    jobs: Sequence[ClientJob],
    ready: Barrier,
    done: Barrier,
) -> None:
    """A process of the rival: builds its own network, waits for the others, trains one client."""
    worker = setup.build()
    ready.wait()
    worker.train(recipe, [jobs[number]])
    done.wait()


def rival(arguments: argparse.Namespace) -> Json:
    """A cohort's training in one pack, and by one process for each client at once."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose(experiment(arguments), [f"cache.folder={folder}/cache"])
        federation = prepare(config)
        settings = driver.settings_of(config, federation)
        jobs = make_jobs(initial_state(config, federation), settings)
        worker = federation.setup.build()
        worker.train(settings.recipe, jobs[:1])  # warms the card up
        started = time.perf_counter()
        packed = worker.train(settings.recipe, jobs)
        ours = time.perf_counter() - started
        del worker
        context = multiprocessing.get_context("spawn")
        ready, done = context.Barrier(len(jobs) + 1), context.Barrier(len(jobs) + 1)
        given = (federation.setup, settings.recipe, jobs, ready, done)
        others = [
            context.Process(target=one_client, args=(number, *given)) for number in range(len(jobs))
        ]
        for each in others:
            each.start()
        ready.wait()
        started = time.perf_counter()
        done.wait()
        theirs = time.perf_counter() - started
        for each in others:
            each.join()
    return {
        "clients": len(packed),
        "seconds_packed": round(ours, 2),
        "seconds_processes": round(theirs, 2),
        "ratio": round(theirs / ours, 2),
    }


def main() -> None:
    """Measure and add the case to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--backbone", default="vit_base_patch32_224")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rival", action="store_true", help="one process for each client, too")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    if on_gpu(arguments) and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device was found; try it out with --device cpu --dry")
    before = load()
    result: Json = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "card": torch.cuda.get_device_name() if on_gpu(arguments) else None,
        "precision": arguments.precision,
        **whole_run(arguments),
    }
    if arguments.rival:
        result["rival"] = rival(arguments)
    result["load"] = [before, load()]
    print(json.dumps(result, indent=1))
    if not arguments.dry:
        add(OUTPUT, f"gpu, {arguments.precision}", result)


if __name__ == "__main__":
    main()
