"""What does it cost, and what does it give, to have prompts before an inner block?

    python -m benchmarks.depth [--only TEXT ...] [--list] [--output benchmarks/results/depth.json]
                               [--root FOLDER] [--weights FILE]

Three kinds of cases; what is in the JSON already is not measured again.

- `step/NETWORK/DEPTH`: one training step (batch of 16, 5 prompts, forward and backward) in a fresh
  process. `milliseconds`: CPU time of one thread, the least of some steps. `peak_mb`: growth of the
  resident memory over the process that has the network and the batch, and has done a step with one
  image, where freed memory goes back at once; `glibc_mb`: the same with glibc as it is, which does
  not find room again for all that was freed. `kept_mb`: what autograd saves for the backward pass,
  without the weights, counted tensor by tensor; before anything is timed, it must be `kept_bytes`
  here, which is arithmetic.
- `cache/TASK/DEPTH`: bytes of an image in the prefix cache, and what a frozen head does without
  prompts.
- `run/TASK/METHOD/DEPTH/SEED`: a federation, and its accuracy after the last round. All have the
  learning rate of `RATES`. That of `domains` is the one which the methods benchmark chose for both
  methods at the input, so that the comparison favours depth 0 if any.

`domains` has the network `nano_promptable`, `emoji` a DINOv2 ViT-S/14. Its head is fitted on one
style that no client has; `make real` fetches images and weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Json, header, one_thread, read_json, run_once, write_json
from fedprompt.cli.bench import drawn_backbone, step_flops
from fedprompt.config import compose
from fedprompt.data.prefix.listing import cache_entries
from fedprompt.models.backbone import Backbone
from fedprompt.runs.federation import Federation, prepare

RESULT = RESULTS / "depth.json"
MB = 10**6
BATCH, PROMPTS = 16, 5
NETWORKS: dict[str, tuple[str, int, tuple[int, ...], int]] = {
    # timm's name or the embedded one, image size, depths, repeats
    "nano": ("nano", 32, (0, 1, 2, 3, 4), 30),
    "dinov2_s14": ("vit_small_patch14_dinov2", 98, (0, 3, 6, 8, 9, 10, 11), 5),
    "vit_b16": ("vit_base_patch16_224", 224, (0, 3, 6, 9, 11), 3),
}
RATES = {"domains": 0.1, "emoji": 0.01}
"""Of the prompts; a frozen head has none."""
METHODS = ("pfpt", "fedavg_pt")
_CLIENTS = {"count": 40, "per_round": 10, "epochs": 2, "batch_size": 16}
TASKS: dict[str, Json] = {
    "domains": {
        "data": "domains",
        "model": "nano_promptable",
        "head": "frozen",
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "clients": _CLIENTS,
        "prompts": {"count": 5, "whiten": False},
        "rounds": 10,
        "eval_every": 5,
    },
    "emoji": {
        "data": {"name": "emoji", "public": "noto"},
        "model": "dinov2_s14_local",
        "head": "frozen",
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "clients": {"count": 10, "per_round": None, "epochs": 1, "batch_size": 16},
        "prompts": {"count": 5, "whiten": False},
        "rounds": 5,
        "eval_every": 5,
    },
}
DEPTHS = {"domains": (0, 1, 2, 3, 4), "emoji": (6, 9, 11)}
SEEDS = {"domains": (0, 1, 2), "emoji": (0, 1, 2)}


# A step.


def kept_bytes(backbone: Backbone, images: int, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of one step, by arithmetic.

    The weights are frozen, so a linear layer keeps nothing. Of each token of a plain block remain,
    in float32 numbers: the input of either norm (2 d, and 4 numbers of mean and deviation), query,
    key and value (3 d), what attention gives (d, and one number of each head), and the input of the
    activation (the width of the perceptron, mostly 4 d). That is 10 d, or 40 d bytes. Of the last
    block the tokens that nobody reads keep the first norm's input, key and value alone. The final
    norm keeps its input.

    Args:
        backbone: of plain blocks, which reads the prefix alone.
        images: B.
        length: tokens of an image with its prompts.
    """
    width, read = backbone.embed_dim, backbone.num_prefix_tokens
    numbers = read * (width + 2)  # the final norm
    for index, block in backbone.upper_blocks:
        parts: Any = block
        own = 3 * width + 2 + parts.attn.num_heads + parts.mlp.fc1.out_features
        # Query, attention's result, the second norm's input, the activation's.
        computed = read if index == backbone.depth - 1 else length
        numbers += length * (3 * width + 2) + computed * own
    return 4 * images * numbers


def counted_bytes(backbone: Backbone, tokens: Tensor, prompts: Tensor) -> int:
    """The same, counted: the storages that a forward pass hands to autograd, but for weights.

    Args:
        backbone: the frozen network.
        tokens: (B, T, d).
        prompts: (n, d), which get a gradient.
    """
    weights = {value.untyped_storage().data_ptr() for value in backbone.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = backbone.encode(tokens, prompts)
    del features
    return sum(size for place, size in sizes.items() if place not in weights)


def resident(name: str) -> int:
    """Bytes of this process by the kernel's name: `VmRSS` now, `VmHWM` at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure_step(network: str, depth: int, repeats: int) -> Json:
    """One case, in a process that does nothing else.

    Args:
        network: of `NETWORKS`.
        depth: the block before which prompts enter.
        repeats: steps.

    Raises:
        RuntimeError: autograd keeps something else than the arithmetic says.
    """
    one_thread()
    name, size, _, _ = NETWORKS[network]
    backbone = network_of(name, size, depth)
    length = backbone.embed(torch.zeros(1, 3, size, size)).shape[1]
    tokens = torch.randn(BATCH, length, backbone.embed_dim)
    prompts = (torch.randn(PROMPTS, backbone.embed_dim) * 0.02).requires_grad_()
    expected = kept_bytes(backbone, BATCH, length + PROMPTS)
    counted = counted_bytes(backbone, tokens, prompts)
    # Heads are rounded up by no one, and odd sizes by a few bytes: equal to a thousandth.
    if abs(counted - expected) > expected / 1000:
        raise RuntimeError(
            f"{network} at {depth}: expected {expected} bytes, autograd has {counted}"
        )

    def step(images: int) -> float:
        started = time.process_time()
        features: Any = backbone.encode(tokens[:images], prompts)
        features.sum().backward()
        return time.process_time() - started

    step(1)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = resident("VmRSS")
    seconds = [step(BATCH)]
    peak = resident("VmHWM") - before
    seconds += [step(BATCH) for _ in range(repeats - 1)]
    return {
        "tokens": length + PROMPTS,
        "milliseconds": round(min(seconds) * 1e3, 1),
        "gflop": round(step_flops(backbone, BATCH, length + PROMPTS) / 1e9, 2),
        "kept_mb": round(counted / MB, 2),
        "arithmetic_mb": round(expected / MB, 2),
        "peak_mb": round(peak / MB, 1),
    }


def network_of(name: str, size: int, depth: int) -> Backbone:
    """A network with drawn weights, on which neither time nor memory depends."""
    if name == "nano":
        from fedprompt.models.nano import network as nano

        return Backbone(nano.build(), size, cut=depth)
    return drawn_backbone(name, size, depth)


def fresh_step(network: str, depth: int) -> Json:
    """Time and memory of a case, each in a process of its own."""
    timed = in_process(network, depth, NETWORKS[network][3])
    exact = in_process(network, depth, 1, MALLOC_MMAP_THRESHOLD_=str(2**16))
    return {**timed, "peak_mb": exact["peak_mb"], "glibc_mb": timed["peak_mb"]}


def in_process(network: str, depth: int, repeats: int, **environment: str) -> Json:
    """`measure_step` in a new process.

    Args:
        network: of `NETWORKS`.
        depth: the block before which prompts enter.
        repeats: steps.
        environment: variables of the process.
    """
    code = "import sys, json; from benchmarks import depth; name, *numbers = sys.argv[1:]; "
    code += "print(json.dumps(depth.measure_step(name, *map(int, numbers))))"
    done = subprocess.run(
        [sys.executable, "-c", code, network, str(depth), str(repeats)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Json = json.loads(done.stdout)
    return found


# A federation.


def experiment_of(task: str) -> Json:
    """A task as an experiment file would have it."""
    return {"name": f"depth-{task}", "runtime": {"name": "serial", "pack": 10}, **TASKS[task]}


def changes_of(task: str, given: argparse.Namespace) -> list[str]:
    """What the command line adds: where images and weights are."""
    found = {"data.root": given.root, "model.pretrained": given.weights}
    return [f"{key}={value}" for key, value in found.items() if value and task == "emoji"]


def measure_run(case: str, given: argparse.Namespace) -> Json:
    """One federation.

    Args:
        case: `run/TASK/METHOD/DEPTH/SEED`.
        given: where weights and images are.
    """
    _, task, method, depth, seed = case.split("/")
    changes = [
        *changes_of(task, given),
        *(f"method={method}", f"prompts.depth={depth}", f"seed={seed}"),
        f"prompts.lr={RATES[task]}",
    ]
    once = run_once(experiment_of(task), changes)
    reports = once.result.reports
    return {
        "accuracy": round(reports[-1]["accuracy"], 4),
        "validation": round(reports[-1]["validation_accuracy"], 4),
        "train_seconds": round(sum(each["seconds"]["train"] for each in reports), 2),
        "cpu_seconds": round(once.cpu_seconds, 1),
    }


def measure_cache(task: str, depth: int, given: argparse.Namespace) -> Json:
    """Bytes of the cached training split, and the accuracy of a frozen head without prompts."""
    changes = [f"prompts.depth={depth}", *changes_of(task, given)]
    federation = prepare(compose(experiment_of(task), changes))
    table = federation.data.table
    assert table.entry is not None
    path = Path(table.entry.reopen()[1][0])  # type: ignore[arg-type]
    size = next(entry.size for entry in cache_entries(path.parent) if entry.path == path)
    return {
        "images": len(table),
        "bytes_of_an_image": round(size / len(table)),
        "accuracy_without_prompts": bare_accuracy(federation),
    }


def bare_accuracy(federation: Federation) -> float | None:
    """Test accuracy of the frozen head on features without prompts; None without such a head."""
    if federation.frozen_head is None:
        return None
    test, mask = federation.setup.splits[0], torch.from_numpy(federation.data.class_mask.copy())
    weight, bias = (federation.frozen_head.tensors[f"0.{name}"] for name in ("weight", "bias"))
    logits = torch.from_numpy(test.features.copy()) @ weight.T + bias
    logits = logits.masked_fill(~mask[torch.from_numpy(test.groups.copy())], -torch.inf)
    return round(float((logits.argmax(dim=1).numpy() == test.labels).mean()), 4)


# All of it.


def cases(tasks: Iterable[str]) -> Iterator[str]:
    """The names of all cases, in the order in which they are measured."""
    for network, (_, _, depths, _) in NETWORKS.items():
        yield from (f"step/{network}/{depth}" for depth in depths)
    for task in tasks:
        yield from (f"cache/{task}/{depth}" for depth in DEPTHS[task])
        for seed in SEEDS[task]:
            for depth in sorted(DEPTHS[task], reverse=True):
                yield from (f"run/{task}/{method}/{depth}/{seed}" for method in METHODS)


def measure(case: str, given: argparse.Namespace) -> Json:
    """The result of a case.

    Args:
        case: see `cases`.
        given: where weights and images are.
    """
    kind, name, *rest = case.split("/")
    if kind == "step":
        return fresh_step(name, int(rest[0]))
    return measure_cache(name, int(rest[0]), given) if kind == "cache" else measure_run(case, given)


def main() -> None:
    """Measure what is missing, and keep each result at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name begins so")
    parser.add_argument("--list", action="store_true", help="name the cases, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--root", help="data.root of emoji, where it is not the usual folder")
    parser.add_argument("--weights", help="of DINOv2, where they are not in the usual folder")
    given = parser.parse_args()
    one_thread()
    chosen = [c for c in cases(TASKS) if not given.only or c.startswith(tuple(given.only))]
    for case in chosen:
        if given.list:
            print(case)
            continue
        document = read_json(given.output)
        found = document.get("cases", {})
        if case in found:
            continue
        found[case] = measure(case, given)
        print(case, json.dumps(found[case]), flush=True)
        about = header("depth", batch=BATCH, prompts=PROMPTS, tasks=TASKS, rates=RATES)
        write_json(given.output, {**about, "cases": found})


if __name__ == "__main__":
    main()
