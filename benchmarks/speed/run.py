"""Speed: every case first asserts that its sides did equal work, then times them.

    python -m benchmarks.speed.run round local workers peak overhead phases loops packs flat growth

Cases are measured one by one and kept in one JSON file, each with its date and the load of the
machine. The comparison with Flower is `flower.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.harness import RESULTS, Json, header, one_thread, read_json, run_once, write_json
from benchmarks.released_loop import released_per_candidate
from benchmarks.speed.naive import EncodedDigits, NaiveModel, train_cohort
from benchmarks.speed.timing import (
    Laid,
    client_batches,
    in_turn,
    lay_open,
    load,
    nano_of_depth,
    ratio,
    summary,
)
from fedprompt import aggregation
from fedprompt.aggregation.base import Aggregator
from fedprompt.aggregation.pfpt.candidates import Fit
from fedprompt.aggregation.pfpt.nets import PromptNets
from fedprompt.aggregation.pfpt.released import released_matching
from fedprompt.cli import bench
from fedprompt.client import worker as train
from fedprompt.client.loop import fit
from fedprompt.client.module import ClientModule
from fedprompt.client.worker import ClientBatches, ClientData, ClientWorker
from fedprompt.core.types import ClientUpdate, RoundReport, ServerState
from fedprompt.data.sets.digits import source_digits
from fedprompt.models.backbone import Backbone
from fedprompt.runs import driver
from fedprompt.runs.events import RoundFinished
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.ray.local import start_ray
from fedprompt.runtime.ray.pool import RayRuntime
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server import evaluate as evaluate_module
from fedprompt.server import round as round_module
from fedprompt.server.figures import Evaluation
from fedprompt.server.merge import merge_shared
from fedprompt.server.round import RoundSettings, aggregate_prompts, run_rounds

OUTPUT = RESULTS / "speed.json"
CPU = torch.device("cpu")
LOOPS = 5

# As in the issue's first row: the shape of the authors' experiments at nano size.
ROUND = (
    *("clients.count=20", "clients.per_round=10", "clients.epochs=5", "clients.batch_size=16"),
    *("prompts.count=10", "prompts.pool=20", "prompts.selection=l2p"),
)


def encoded_digits(laid: Laid) -> EncodedDigits:
    """The training split as PNG files, whose pixels are those of the task."""
    images, labels = source_digits()
    task = laid.federation.task
    # The task does not say the split's order: it is found again by content.
    size = int(task.train.images.shape[1])
    both = EncodedDigits(images, labels, size)
    pixels = np.stack([((both[i][0] + 1) * 127.5).round().byte().numpy() for i in range(len(both))])
    places = {image.transpose(1, 2, 0).tobytes(): i for i, image in enumerate(pixels)}
    order = [places[image.tobytes()] for image in np.asarray(task.train.images)]
    return EncodedDigits(images[order], labels[order], size)


def assert_same_training(models: list[NaiveModel], updates: list[ClientUpdate]) -> float:
    """The largest difference of any tuned tensor (Euclidean), relative to the tensor.

    Adam divides by the size of the gradient, so that entries whose gradient is nearly zero carry
    the rounding of another order of sums on.
    """
    worst = 0.0
    for model, update in zip(models, updates, strict=True):
        assert torch.equal(torch.nonzero(model.used).flatten(), update.origins)
        assert torch.equal(model.used[update.origins], update.use_counts)
        theirs = {"prompts": model.prompts[update.origins], "query_projection": model.projection}
        theirs |= {f"head.{name}": value for name, value in model.head.named_parameters()}
        for name, tensor in {"prompts": update.prompts, **update.shared.tensors()}.items():
            worst = max(worst, float((theirs[name].detach() - tensor).norm() / tensor.norm()))
    assert worst < 1e-3, f"the two sides trained to different results ({worst:.1e})"
    return worst


def case_local(repeats: int, laid: Laid | None = None) -> Json:
    """Local training of a cohort: the naive procedure against the worker, from cached tokens."""
    laid = laid or lay_open(ROUND, nano_of_depth(6))
    data, parts = encoded_digits(laid), laid.worker.data.parts

    def naive() -> list[NaiveModel]:
        return train_cohort(laid.recipe, laid.worker.backbone, data, parts, laid.jobs)

    def ours() -> list[ClientUpdate]:
        return [laid.worker.train(laid.recipe, [job])[0] for job in laid.jobs]

    def packed() -> list[ClientUpdate]:
        return laid.worker.train(laid.recipe, laid.jobs)

    difference = max(assert_same_training(naive(), each()) for each in (ours, packed))
    samples = in_turn({"naive": naive, "fedprompt": ours, "packed": packed}, repeats)
    sides = {name: summary(each) for name, each in samples.items()}
    return {
        "images": laid.images,
        "largest_relative_difference": difference,
        "seconds": sides,
        "images_per_second": {
            name: round(laid.images / side["wall_least"], 1) for name, side in sides.items()
        },
        "ratio": ratio(samples["naive"], samples["fedprompt"]),
        "ratio_packed": ratio(samples["naive"], samples["packed"]),
    }


def case_round(repeats: int) -> Json:
    """A whole PFPT round: naive training and the matching loop over candidates against ours.

    Our round is measured with the aggregator's default (`map`), client by client and with all
    clients in one pack, and with the variant that gives what the loop gives (`released`). Of the
    loop, which takes minutes, `LOOPS` passes of the released 50 are run; each does the same work,
    so that the whole is their multiple.
    """
    laid = lay_open(ROUND, nano_of_depth(6))
    local = case_local(repeats, laid)
    updates = [laid.worker.train(laid.recipe, [job])[0] for job in laid.jobs]
    sets = [update.prompts for update in updates]
    number = sum(len(each) for each in sets)
    generator = torch.Generator().manual_seed(0)
    nets = PromptNets(sets[0].shape[1], 128, generator)
    initial = [torch.randperm(number, generator=generator)[: len(each)] for each in sets]
    short = [matching(sets, initial, nets, 2) for matching in (released_per_candidate, _vectorised)]
    for one, other in zip(short[0].assignment, short[1].assignment, strict=True):
        assert torch.equal(one, other), "loop and vectorised form match differently"
    samples = in_turn({"loop": lambda: released_per_candidate(sets, initial, nets, LOOPS)}, 1)
    passes = summary(samples["loop"])
    weights = [float(update.num_examples) for update in updates]
    merged = {"loop": {key: round(value * 50 / LOOPS, 2) for key, value in passes.items()}}
    for variant in ("map", "released"):
        aggregator = aggregation.create("pfpt", variant=variant)

        def merge(aggregator: Aggregator = aggregator) -> None:
            aggregate_prompts(updates, weights, laid.state, laid.settings, aggregator)
            merge_shared(updates, weights)

        merged[variant] = summary(in_turn({variant: merge}, repeats)[variant])
    parts = {
        "naive": ("naive", "loop"),
        "map": ("fedprompt", "map"),
        "map, packed": ("packed", "map"),
        "released": ("fedprompt", "released"),
    }
    whole = {
        name: {
            key: round(seconds + merged[merger][key], 3)
            for key, seconds in local["seconds"][side].items()
        }
        for name, (side, merger) in parts.items()
    }
    return {
        "local_prompts": number,
        "passes_of_the_loop_measured": f"{LOOPS} of 50",
        "local": local,
        "aggregate_seconds": merged,
        "round_seconds": whole,
        "ratio": {
            name: {key: round(whole["naive"][key] / seconds[key], 2) for key in seconds}
            for name, seconds in whole.items()
        },
    }


def _vectorised(sets: list[Tensor], initial: list[Tensor], nets: PromptNets, loops: int) -> Fit:
    return released_matching(sets, initial, nets, loops)


def bare(laid: Laid) -> list[Tensor]:
    """The cohort's local work without a framework: a plain loop on the cached tokens."""
    tuned = []
    for job in laid.jobs:
        module = ClientModule(
            laid.recipe, laid.worker.backbone, job, laid.worker.data.class_mask
        ).train()
        optimizer = module.configure_optimizers()
        batches = client_batches(laid, job)
        for _ in range(laid.recipe.training.epochs):
            for index, batch in enumerate(batches):
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        tuned.append(module.prompts.detach())
    return tuned


def case_workers(repeats: int) -> Json:
    """The cohort of the quickstart, five epochs: Ray with 2 actors, serial, and the bare loop."""
    laid = lay_open(["clients.epochs=5"])
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name; 15 otherwise
    start_ray(2, verbose=False)
    try:
        runtimes: dict[str, RayRuntime | SerialRuntime] = {
            "ray": RayRuntime(RuntimeOptions("ray", actors=2)),
            "serial": SerialRuntime(RuntimeOptions("serial")),
        }
        for runtime in runtimes.values():
            runtime.warm_up()
            runtime.open(laid.federation.setup)

        def through(name: str) -> list[Tensor]:
            updates = sorted(
                runtimes[name].map(laid.recipe, laid.jobs), key=lambda update: update.client_id
            )
            return [update.prompts for update in updates]

        sides = (bare(laid), through("ray"), through("serial"))
        for own, remote, serial in zip(*sides, strict=True):
            assert torch.equal(remote, serial)
            assert all((own == row).all(dim=1).any() for row in serial)
        samples = in_turn(
            {
                "bare": lambda: bare(laid),
                "serial": lambda: through("serial"),
                "ray": lambda: through("ray"),
            },
            repeats,
        )
        for runtime in runtimes.values():
            runtime.close()
    finally:
        import ray

        ray.shutdown()
    return {
        "seconds": {name: summary(each) for name, each in samples.items()},
        "serial_over_bare": ratio(samples["serial"], samples["bare"]),
        # Of the actors' own CPU time this process knows nothing.
        "serial_over_ray": {
            key: value
            for key, value in ratio(samples["serial"], samples["ray"]).items()
            if key.startswith("wall")
        },
    }


def case_peak(repeats: int) -> Json:
    """Share of the matmul peak in a training step, nano and ViT-B/32, and how cost grows; CPU time
    of one thread on both sides.
    """
    large = bench.drawn_backbone(bench.LARGE, 224)
    small = nano_of_depth(6)
    rows = []
    for name, backbone, prompts, images in [
        (bench.LARGE, large, 10, 16),
        ("nano, 6 blocks", small, 10, 16),
        *(("nano, 6 blocks", small, count, 16) for count in (1, 5, 20, 50)),
        *((f"nano, {depth} blocks", nano_of_depth(depth), 10, 16) for depth in (3, 12)),
        *(("nano, 6 blocks", small, 10, count) for count in (4, 64)),
    ]:
        peak = bench.matmul_peak(CPU, 5, time.process_time)
        tries = repeats if backbone is large else 5 * repeats
        seconds, flops = bench.measure_step(
            backbone, CPU, images, prompts, tries, time.process_time
        )
        rows.append(
            {
                "backbone": name,
                "images": images,
                "prompts": prompts,
                "cpu_milliseconds": round(seconds * 1e3, 2),
                "gflop": round(flops / 1e9, 3),
                "peak_gflops": round(peak / 1e9, 1),
                "share": round(flops / seconds / peak, 3),
            }
        )
    sizes = []
    for size in (64, 128, 224):
        backbone = bench.drawn_backbone("vit_tiny_patch16_224", size, depth=4)
        seconds, flops = bench.measure_step(backbone, CPU, 16, 10, 2 * repeats, time.process_time)
        sizes.append(
            {
                "image_size": size,
                "cpu_milliseconds": round(seconds * 1e3, 1),
                "gflop": round(flops / 1e9, 2),
            }
        )
    return {"steps": rows, "image_size (ViT-Ti/16, 4 blocks)": sizes}


def case_overhead(repeats: int) -> Json:
    """Framework time: around the steps of a client, and of a round outside clients, aggregation
    and evaluation.
    """
    result: Json = {}
    for name, clock in {"wall": time.perf_counter, "cpu": time.process_time}.items():
        outside, inside = [], []
        for _ in range(repeats):
            one, other, _ = bench.measure_clients("cpu", 1, clock)
            outside += one
            inside += other
        result[f"client_milliseconds_{name}"] = {
            "outside_median": round(statistics.median(outside) * 1e3, 2),
            "outside_least": round(min(outside) * 1e3, 2),
            "inside_median": round(statistics.median(inside) * 1e3, 1),
        }
    result["round_milliseconds_cpu_serial"] = round(round_overhead_cpu(4 * repeats) * 1e3, 2)
    for name in ("serial", "ray"):
        seconds = round_overheads(name, 4 * repeats)
        result[f"round_milliseconds_{name}"] = {
            "median": round(statistics.median(seconds) * 1e3, 2),
            "least": round(min(seconds) * 1e3, 2),
        }
    return result


def round_overheads(runtime: str, rounds: int) -> list[float]:
    """Per round the seconds that belong to no client, aggregation or evaluation: one actor."""
    found = []

    def note(event: object, _: Path) -> None:
        if isinstance(event, RoundFinished):
            report = event.report
            clients = sum(client["seconds"] for client in report.clients)
            spent = clients + report.seconds["aggregate"] + report.seconds["evaluate"]
            found.append(report.wall_seconds - spent)

    overrides = [
        *(f"rounds={rounds}", "compare=[]", f"runtime={runtime}", "runtime.actors=1"),
        "clients.epochs=1",
    ]
    run_once("digits", overrides, note)
    return found[1:]  # the first round of an actor takes longer


def round_overhead_cpu(rounds: int) -> float:
    """Mean CPU seconds of a round that belong to no client, aggregation or evaluation (serial).

    What waits for the disk is not in it.
    """
    marks: list[tuple[float, float]] = []
    with Stopwatch() as watch:
        watch.patch(ClientWorker, "train", "clients", ClientWorker.train)
        for module, name in (
            (round_module, "aggregate_prompts"),
            (round_module, "merge_shared"),
            (driver, "evaluate"),
            (evaluate_module, "summarise"),
        ):
            watch.patch(module, name, name, getattr(module, name))

        def note(event: object, _: Path) -> None:
            if isinstance(event, RoundFinished):
                marks.append((time.process_time(), watch.spent()))

        overrides = [f"rounds={rounds}", "compare=[]", "runtime=serial", "clients.epochs=1"]
        run_once("digits", overrides, note)
    (first, first_spent), (last, last_spent) = marks[0], marks[-1]
    return ((last - first) - (last_spent - first_spent)) / (rounds - 1)


class Loop(Protocol):
    """Fits a client's module to its batches."""

    def __call__(self, module: ClientModule, batches: ClientBatches, epochs: int) -> object:
        """Args: as `fedprompt.client.loop.fit` has them."""


def case_loops(repeats: int) -> Json:
    """The same fits by different loops: a new Trainer each, Fabric, ours, and no hooks at all.

    With prompts, and of the head alone, where a step takes about a millisecond.
    """
    methods = {"pfpt": [], "head_only": ["method=head_only", "prompts.count=0"]}
    return {name: compare_loops(lay_open(each), repeats) for name, each in methods.items()}


def compare_loops(laid: Laid, repeats: int) -> Json:
    """Milliseconds of a step by each loop, fit included; all must end in the same bits.

    Args:
        laid: whose first five clients are fitted.
        repeats: how often each loop runs.
    """
    ours = functools.partial(fit, fabric=laid.worker.fabric)
    loops: dict[str, Loop] = {
        "trainer": by_trainer,
        "fabric": ByFabric(),
        "fedprompt": ours,
        "no hooks": by_nothing,
    }
    jobs = laid.jobs[:5]

    def run(loop: Loop) -> list[Tensor]:
        tuned = []
        for job in jobs:
            module = ClientModule(
                laid.recipe, laid.worker.backbone, job, laid.worker.data.class_mask
            )
            loop(module, client_batches(laid, job), laid.recipe.training.epochs)
            weight = dict(module.head.named_parameters())["0.weight"]
            tuned.append(weight.detach())
        return tuned

    first = run(ours)
    for loop in loops.values():
        assert all(map(torch.equal, run(loop), first))
    steps = sum(len(client_batches(laid, job)) for job in jobs) * laid.recipe.training.epochs
    sides = {name: functools.partial(run, loop) for name, loop in loops.items()}
    samples = in_turn(sides, repeats)

    def milliseconds(figure: str) -> dict[str, float]:
        return {
            name: round(summary(each)[figure] / steps * 1e3, 3) for name, each in samples.items()
        }

    return {
        "steps": steps,
        "milliseconds_per_step": milliseconds("wall_least"),
        "cpu_milliseconds_per_step": milliseconds("cpu_least"),
    }


class ByFabric:
    """A plain loop around a module that Fabric has set up; one Fabric for all clients."""

    def __init__(self) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1)

    def __call__(self, module: ClientModule, batches: ClientBatches, epochs: int) -> None:
        """See `Loop`."""
        wrapped, optimizer = self.fabric.setup(module, module.configure_optimizers())
        wrapped.mark_forward_method("training_step")
        module.train()
        for _ in range(epochs):
            module.on_train_epoch_start()
            for index, batch in enumerate(batches):
                loss = wrapped.training_step(batch, index)
                optimizer.zero_grad()
                self.fabric.backward(loss)
                optimizer.step()


def case_phases(repeats: int) -> Json:
    """Where the time of a client goes, in CPU milliseconds for each image: least of all repeats.

    `naive` is the naive procedure, `trainer` the same step as ours in a new Trainer for each
    client, as fedprompt did before it had its own loop. `rest` is whatever is
    in no phase.
    """
    laid = lay_open(ROUND, nano_of_depth(6))
    data, parts = encoded_digits(laid), laid.worker.data.parts
    jobs = laid.jobs[:4]
    images = sum(len(parts[job.client_id]) for job in jobs) * laid.recipe.training.epochs

    def naive(watch: Stopwatch) -> None:
        embed, queries = Backbone.embed, Backbone.queries
        item = EncodedDigits.__getitem__
        watch.patch(EncodedDigits, "__getitem__", "decode and resize", item)
        watch.patch(Backbone, "embed", "embed", embed)
        watch.patch(Backbone, "queries", "query", queries)
        watch.patch(NaiveModel, "forward", "head and loss", NaiveModel.forward)
        train_cohort(laid.recipe, laid.worker.backbone, data, parts, jobs)

    def ours(watch: Stopwatch) -> None:
        step = ClientModule.training_step
        watch.patch(ClientModule, "training_step", "head and loss", step)
        for job in jobs:
            laid.worker.train(laid.recipe, [job])

    def trainer(watch: Stopwatch) -> None:
        watch.patch(train, "fit", "", by_trainer)
        ours(watch)

    result: Json = {}
    for _ in range(repeats):
        for name, side in {"naive": naive, "trainer": trainer, "fedprompt": ours}.items():
            with Stopwatch() as watch:
                watch.patch(Backbone, "encode", "blocks forward", Backbone.encode)
                watch.patch(Tensor, "backward", "backward", Tensor.backward)
                watch.patch(torch.optim.Adam, "step", "optimizer", torch.optim.Adam.step)
                side(watch)
            per_image = {key: seconds / images * 1e3 for key, seconds in watch.phases().items()}
            if name not in result or per_image["whole"] < result[name]["whole"]:
                result[name] = per_image
    return {
        "images": images,
        "cpu_milliseconds_per_image": {
            name: {key: round(value, 4) for key, value in phases.items()}
            for name, phases in result.items()
        },
    }


class Stopwatch:
    """Own CPU seconds of some functions while it is entered; an inner phase is not in its outer."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._undo: list[Callable[[], None]] = []
        self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._whole = time.process_time() - self._started
        for undo in reversed(self._undo):
            undo()

    def patch(self, owner: object, name: str, phase: str, function: Callable[..., object]) -> None:
        """Put a function in its place, timed as `phase` unless that is empty."""
        before = vars(owner)[name]

        @functools.wraps(function)
        def timed(*arguments: object, **options: object) -> object:
            started = time.process_time()
            self._inner.append(0.0)
            result = function(*arguments, **options)
            spent, inner = time.process_time() - started, self._inner.pop()
            self._inner[-1] += spent
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent - inner
            return result

        setattr(owner, name, timed if phase else function)
        self._undo.append(lambda: setattr(owner, name, before))

    def spent(self) -> float:
        """Seconds of all phases until now."""
        return sum(self._seconds.values())

    def phases(self) -> dict[str, float]:
        """Seconds of each phase, of the rest and of the whole."""
        rest = self._whole - self.spent()
        return {**self._seconds, "rest": rest, "whole": self._whole}


def by_trainer(module: pl.LightningModule, batches: ClientBatches, epochs: int) -> None:
    """A new quiet Trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, barebones=True).fit(
            module, loader
        )


def by_nothing(module: ClientModule, batches: ClientBatches, epochs: int) -> None:
    """A plain loop that calls no hook."""
    module.train()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def case_packs(repeats: int) -> Json:
    """The cohort of the quickstart in packs of 1, 2, 5 and 10, on the CPU."""
    result = {}
    for name, overrides in {
        "pfpt": ["clients.epochs=2"],
        "head_only": ["method=head_only", "prompts.count=0"],
    }.items():
        laid = lay_open(overrides)

        def run(size: int, laid: Laid = laid) -> list[ClientUpdate]:
            jobs = laid.jobs
            return [
                update
                for start in range(0, len(jobs), size)
                for update in laid.worker.train(laid.recipe, jobs[start : start + size])
            ]

        alone = run(1)
        worst = 0.0
        for size in (2, 5, 10):
            for one, other in zip(run(size), alone, strict=True):
                for key, tensor in {"prompts": other.prompts, **other.shared.tensors()}.items():
                    mine = one.prompts if key == "prompts" else one.shared.tensors()[key]
                    if tensor.numel():
                        difference = float((mine - tensor).abs().max() / tensor.abs().max())
                        worst = max(worst, difference)
        assert worst < 1e-5, worst
        sides = {str(size): functools.partial(run, size) for size in (1, 2, 5, 10)}
        samples = in_turn(sides, repeats)
        result[name] = {
            "largest_relative_difference": worst,
            "seconds": {key: summary(each) for key, each in samples.items()},
            "gain": {key: ratio(samples["1"], each) for key, each in samples.items()},
        }
    return result


Played = tuple[ServerState, RoundReport]
"""What a round returns."""


def case_flat(repeats: int) -> Json:
    """A round's cost when 100, 10,000 and 100,000 clients are registered: the same ten train.

    Every registered client has the same number of images (the same rows of the table over again),
    so that nothing differs but how many there are.
    """
    laid = lay_open(["clients.count=100", "clients.per_round=10", "partition=iid"])
    table = laid.worker.data.table
    rows = np.arange(11, dtype=np.int64)
    rounds: dict[str, Callable[[], Played]] = {}
    sizes = (100, 10_000, 100_000)
    for clients in sizes:
        parts = tuple(rows + (client % 100) for client in range(clients))
        data = ClientData(table, parts, laid.worker.data.class_mask)
        setup = dataclasses.replace(laid.federation.setup, data=data)
        training = dataclasses.replace(laid.recipe.training, count=clients)
        recipe = dataclasses.replace(laid.recipe, training=training)
        settings = dataclasses.replace(laid.settings, recipe=recipe, rounds=1)
        runtime = SerialRuntime(RuntimeOptions("serial"))
        runtime.open(setup)

        def play(settings: RoundSettings = settings, runtime: SerialRuntime = runtime) -> Played:
            unknown = Evaluation(math.nan, math.nan)
            mean = aggregation.create("mean")
            rounds = run_rounds(
                laid.state, settings, runtime, mean, lambda state: lambda: (unknown, unknown)
            )
            return next(rounds)

        rounds[str(clients)] = play
    steps = {key: sum(c["steps"] for c in play()[1].clients) for key, play in rounds.items()}
    assert len(set(steps.values())) == 1, steps
    samples = in_turn(rounds, 3 * repeats)
    memory = {key: _allocated(play) for key, play in rounds.items()}
    return {
        "seconds": {key: summary(each) for key, each in samples.items()},
        "against_100": {key: ratio(each, samples["100"]) for key, each in samples.items()},
        "peak_new_python_kb": memory,
    }


def _allocated(work: Callable[[], object]) -> float:
    """Peak of the Python memory that a piece of work takes, in kB."""
    import tracemalloc

    gc.collect()
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return round(peak / 1e3, 1)


def case_growth(repeats: int) -> Json:
    """Private memory over many rounds of a tiny experiment: this process under `serial`, driver and
    client actor under Ray.

    Args:
        repeats: how many hundreds of rounds.
    """
    result: Json = {"serial": grow("serial", 100 * repeats)}
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name; 15 otherwise
    start_ray(2, verbose=False)
    try:
        result["ray"] = grow("ray", 100 * repeats)
    finally:
        import ray

        ray.shutdown()
    return result


def grow(runtime: str, rounds: int) -> Json:
    """Megabytes after each hundred rounds, and by how much the most of the later half exceeds the
    most of the earlier; what a process gives back for a while does not count.
    """
    marks: dict[int, dict[str, float]] = {}
    spilled = []

    def note(event: object, _: Path) -> None:
        if isinstance(event, RoundFinished) and event.report.round % 100 == 0:
            if runtime == "ray":
                marks[event.report.round] = dict(_ray_processes())
                spilled.append(_spilled())
            else:
                marks[event.report.round] = {"process": _private_mb(Path("/proc/self"))}

    overrides = [
        *(f"rounds={rounds}", "compare=[]", f"runtime={runtime}", "runtime.actors=1"),
        *("clients.count=100", "partition=iid", "clients.per_round=2", "clients.epochs=1"),
        *("prompts.count=1", "prompts.pool=4", "head=linear", "eval_every=100"),
    ]
    run_once("digits", overrides, note)
    half = rounds // 200 * 100
    growth = {}
    for name in marks[rounds]:
        early, late = (
            max(mark[name] for number, mark in marks.items() if (number > half) is later)
            for later in (False, True)
        )
        growth[name] = round((late - early) / half * 100, 3)
    return {
        "rounds": rounds,
        "private_mb": {str(key): value for key, value in marks.items()},
        "mb_per_100_rounds": growth,
        **({"spilled": any(spilled)} if spilled else {}),
    }


def _private_mb(process: Path) -> float:
    """Resident megabytes that a process shares with no file and no other process."""
    lines = (process / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return round(int(status["RssAnon"].split()[0]) / 1024, 2)


def _ray_processes() -> Iterator[tuple[str, float]]:
    """Private resident megabytes of the driver and client actors of this session."""
    session = os.getsid(0)
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if os.getsid(int(folder.name)) != session:
                continue
            title = (folder / "cmdline").read_bytes()
            for name in ("DriverActor", "ClientActor"):
                if title.startswith(b"ray::" + name.encode()):
                    yield name, _private_mb(folder)
        except (OSError, ValueError):
            continue


def _spilled() -> bool:
    """Whether Ray has spilled any object to disk; its summary has such a line only then."""
    import ray
    from ray._private import internal_api

    text = internal_api.memory_summary(  # type: ignore[no-untyped-call]
        ray.get_runtime_context().gcs_address, stats_only=True
    )
    return "Spilled" in text


CASES: dict[str, tuple[Callable[[int], Json], int]] = {
    "round": (case_round, 2),
    "local": (case_local, 3),
    "workers": (case_workers, 4),
    "peak": (case_peak, 3),
    "overhead": (case_overhead, 2),
    "phases": (case_phases, 3),
    "loops": (case_loops, 4),
    "packs": (case_packs, 3),
    "flat": (case_flat, 3),
    "growth": (case_growth, 10),
}
"""Case -> its function and how often each side runs."""


def main() -> None:
    """Measure the cases, print them, add them to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--repeats", type=int, help="in the place of each case's own number")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {sorted(unknown)[0]}: expected some of {', '.join(CASES)}")
    one_thread()
    for name in arguments.cases or CASES:
        before, started = load(), time.perf_counter()
        function, usual = CASES[name]
        repeats = arguments.repeats or usual
        with threadpool_limits(1):
            result = function(repeats)
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "load": [before, load()],
            "repeats": repeats,
            "took_seconds": round(time.perf_counter() - started, 1),
            **result,
        }
        add(arguments.output, name, result)
        print(json.dumps({name: result}, indent=1), flush=True)


def add(path: Path, name: str, result: Json) -> None:
    """Put one case into the document."""
    cases = read_json(path).get("cases", {})
    write_json(path, {**header("speed"), "cases": {**cases, name: result}})


if __name__ == "__main__":
    main()
