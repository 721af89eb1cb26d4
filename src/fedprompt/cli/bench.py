"""`fedprompt bench`: how fast clients train on this machine, and how near that is to its ceiling.

The ceiling is the rate of large float32 matrix products, measured here with the same number of
threads. Every row that has a share counts the arithmetic that the training step cannot do without:
the products of the blocks above the prompts, forward and backward to the prompts.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from rich.table import Table
from torch import Tensor

from fedprompt.client import loop
from fedprompt.client.worker import ClientWorker
from fedprompt.config import compose
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.runs import driver
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.runtime.base import limited_threads
from fedprompt.server.round import make_jobs

Clock = Callable[[], float]

LARGE = "vit_base_patch32_224"
"""The paper's backbone; its speed does not depend on its weights."""

_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (960, 768, 3072), (960, 3072, 768))
_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast something was."""

    name: str
    milliseconds: float
    """Of a step the least, as of the ceiling; of clients the median."""
    images_per_second: float | None = None
    gflops: float | None = None
    """10^9 operations a second."""
    share: float | None = None
    """Of the machine's ceiling."""


def matmul_peak(device: torch.device, repeats: int = 10, clock: Clock = time.perf_counter) -> float:
    """The best rate of a float32 matrix product, in operations a second.

    Args:
        device: where the product is computed.
        repeats: how often; the fastest counts.
        clock: what gives the seconds.
    """
    best = 0.0
    for rows, inner, columns in _SIZES:
        a, b = torch.rand(rows, inner, device=device), torch.rand(inner, columns, device=device)
        seconds = min(_seconds(lambda a=a, b=b: a @ b, device, clock) for _ in range(repeats))  # type: ignore[misc]
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def drawn_backbone(name: str, size: int, cut: int = 0, **options: Any) -> Backbone:
    """A Vision Transformer of timm with drawn weights, on which its speed does not depend.

    Args:
        name: timm's.
        size: side of its input in pixels.
        cut: the block before which prompts enter.
        options: of `timm.create_model`.
    """
    with torch.random.fork_rng(devices=[]):
        vit: Any = timm.create_model(name, num_classes=0, img_size=size, **options)
    return Backbone(vit, size, cut=cut)


def step_flops(backbone: Backbone, images: int, length: int) -> int:
    """Operations of the matrix products of one training step without the head.

    A block of width d has weights of about 12 d^2 values, with 2 operations each for every token,
    forward, and as many backward, where the weights get no gradient. Attention takes 4 N d for
    every token forward (scores and values, N the length) and twice that backward. The last block is
    computed for the tokens that are read.

    Args:
        backbone: of plain blocks.
        images: B.
        length: N, tokens of an image with its prompts.
    """
    blocks: Any = backbone.upper_blocks
    width, total = backbone.embed_dim, 0
    for index, block in blocks:
        weights = sum(each.numel() for each in block.parameters() if each.ndim == 2)
        # Of the last block, keys and values for all, the rest for the tokens that are read.
        last = index == backbone.depth - 1 and backbone.reads_prefix_only(block)
        read = backbone.num_prefix_tokens if last else length
        shared = block.attn.qkv.weight.numel() * 2 // 3 if last else 0
        linear = 2 * 2 * (shared * length + (weights - shared) * read)
        total += images * (linear + 3 * 4 * width * length * read)
    return total


def measure_step(
    backbone: Backbone,
    device: torch.device,
    images: int,
    prompts: int,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> tuple[float, int]:
    """Least seconds of the forward and backward pass of one batch of drawn tokens, and the
    operations that it takes.

    Args:
        backbone: the frozen network.
        device: where the step is computed.
        images: images in the batch.
        prompts: prompts before each image; 0 for none.
        repeats: how often; the fastest counts.
        clock: what gives the seconds.
    """
    size = backbone.image_size
    pixels = torch.zeros(1, 3, size, size, device=device)
    length = backbone.embed(pixels).shape[1]
    tokens = torch.randn(images, length, backbone.embed_dim, device=device)
    pool = torch.randn(prompts, backbone.embed_dim, device=device) * 0.02
    pool.requires_grad_()

    def step() -> None:
        pool.grad = None
        backbone.encode(tokens, pool).sum().backward()  # type: ignore[no-untyped-call]

    step()
    seconds = min(_seconds(step, device, clock) for _ in range(repeats))
    return seconds, step_flops(backbone, images, length + prompts)


@contextmanager
def timed_steps(clock: Clock = time.perf_counter) -> Iterator[list[float]]:
    """While entered, the seconds of each training step of this process are written down."""
    real: Any = loop.fit_batch
    seconds: list[float] = []

    def watched(hooks: loop.Hooks, *arguments: object) -> None:
        started = clock()
        real(hooks, *arguments)
        _wait(next(hooks.module.parameters()).device)
        seconds.append(clock() - started)

    loop.fit_batch = watched  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        loop.fit_batch = real


def measure_clients(
    device: str, threads: int, clock: Clock = time.perf_counter
) -> tuple[list[float], list[float], int]:
    """Train the first cohort of `digits` one client at a time.

    Args:
        device: where.
        threads: torch threads.
        clock: `time.process_time` leaves out the time that other programs had the cores.

    Returns:
        Per client the seconds outside its training steps, those inside, and the images of all.
    """
    overrides = ["runtime=serial", "compare=[]", f"runtime.device={device}"]
    config = compose("digits", [*overrides, f"runtime.threads={threads}"])
    federation = prepare(config)
    settings = driver.settings_of(config, federation)
    worker: ClientWorker = federation.setup.build()
    outside, inside, images = [], [], 0
    jobs = make_jobs(initial_state(config, federation), settings)
    worker.train(settings.recipe, jobs[:1])  # the first use of anything takes longer
    for job in jobs:
        with timed_steps(clock) as steps:
            started = clock()
            update = worker.train(settings.recipe, [job])[0]
            whole = clock() - started
        outside.append(whole - sum(steps))
        inside.append(sum(steps))
        images += update.num_examples * config.clients.epochs
    return outside, inside, images


def run_bench(threads: int = 1, device: str = "auto") -> tuple[float, list[Rate]]:
    """Measure the quick cases.

    Args:
        threads: torch threads.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The ceiling in operations a second, and the rows of the table.
    """
    config = compose("digits", [f"runtime.device={device}", f"runtime.threads={threads}"])
    place = torch.device(config.runtime.torch_device)
    rows = []
    with limited_threads(threads):
        peak = matmul_peak(place)
        small = load_backbone(config.model, config.cut).to(place)
        large = drawn_backbone(LARGE, 224).to(place)
        for name, backbone, prompts, repeats in (
            (f"step of the {config.model.backbone} backbone", small, 5, 20),
            (f"step of {LARGE}", large, 10, 3),
        ):
            seconds, flops = measure_step(backbone, place, 16, prompts, repeats)
            rate = flops / seconds
            rows.append(Rate(name, seconds * 1e3, 16 / seconds, rate / _GIGA, rate / peak))
        outside, inside, images = measure_clients(place.type, threads)
        seconds = sum(inside) + sum(outside)
        rows.append(Rate("a client of `digits`", statistics.median(inside) * 1e3, images / seconds))
        rows.append(Rate("framework around it", statistics.median(outside) * 1e3))
    return peak, rows


def render(peak: float, rows: list[Rate], threads: int) -> Table:
    """The rows as a table.

    Args:
        peak: rate of the matrix product, in operations a second.
        rows: one rate for each case.
        threads: torch threads that were used.
    """
    table = Table(
        title=f"ceiling: {peak / _GIGA:.0f} GFLOP/s float32 matrix products, {threads} thread(s)"
    )
    table.add_column("what")
    for heading in ("ms", "images/s", "GFLOP/s", "of the ceiling"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.milliseconds:.1f}",
            "" if row.images_per_second is None else f"{row.images_per_second:.0f}",
            "" if row.gflops is None else f"{row.gflops:.0f}",
            "" if row.share is None else f"{row.share:.0%}",
        )
    return table


def _seconds(work: Callable[[], Tensor | None], device: torch.device, clock: Clock) -> float:
    """How long a piece of work takes, on the device as well."""
    started = clock()
    work()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
