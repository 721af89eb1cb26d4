"""Run the methods benchmark: only what is missing, two runs at a time.

    python benchmarks/methods/runner.py [--only TEXT ...] [--list] [--jobs 2] [--rounds 20]
                                     [--output benchmarks/results/methods]

Group by group (`groups` in grid.py): first the runs that choose each method's learning rates on the
validation split (some scales, then the neighbours of the best; a seed that is not reported), then
those that are reported. Each run has one thread and writes one JSON file. It is not done again
while that file is there, unless it had another configuration than it would have now; stop the
program at any time and call it again. A run that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grid
import numpy as np
from grid import Cell
from numpy.typing import NDArray

OUTPUT = Path(__file__).parents[1] / "results" / "methods"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc keeps what a step frees, for the next one: 1.43 ms an image instead of 1.6.
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
CURVES = ("round", "accuracy", "validation_accuracy", "train_loss", "num_prompts")


def overrides_of(cell: Cell, rounds: int, scale: float, output: Path = OUTPUT) -> list[str]:
    """What a user would type after the experiment's name.

    Args:
        cell: the run.
        rounds: of methods that train.
        scale: factor on the learning rates.
        output: where the runs are that chose the rates of FedOpt's clients.

    Raises:
        FileNotFoundError: one of those is missing.
    """
    from fedprompt.config import compose

    changes = [f"seed={cell.seed}", f"method={cell.preset}", *grid.CHANGES.get(cell.method, ())]
    clients = grid.TASKS[cell.setting.split("/")[0]]["clients"]
    if cell.preset in grid.POOLED:
        changes.append(f"rounds={rounds * clients['per_round'] // clients['count']}")
    elif cell.preset not in grid.CLOSED_FORM:
        changes.append(f"rounds={rounds}")
    if cell.preset.endswith("_plus") and not any("prompts.pool" in each for each in changes):
        changes.append(f"prompts.pool={grid.POOL}")
    config = compose(experiment_of(cell.setting), changes)
    if cell.preset in grid.CLOSED_FORM:
        if cell.preset not in grid.WITHOUT_RATES:
            changes.append(f"objective.shrinkage={config.objective.options.shrinkage * scale:g}")
        return changes
    if cell.preset in grid.CLIENT_RATES_OF:
        changes.append(f"aggregator.lr={config.aggregator.options.lr * scale:g}")
        like = Cell(cell.setting, grid.CLIENT_RATES_OF[cell.preset], cell.seed)
        scale = choose(like, output)
    optimizer = "sgd" if config.objective.name == "scaffold" else "adam"
    changes += [
        f"prompts.lr={config.prompts.lr * scale:g}",
        f"head.lr={config.head.lr * grid.head_scale(cell, scale, optimizer):g}",
    ]
    if config.tuning.name != "none":
        changes.append(f"tuning.lr={config.tuning.options.lr * scale:g}")
    return changes


def experiment_of(setting: str) -> dict[str, Any]:
    """A setting as an experiment."""
    task, partition = setting.split("/")
    return {
        "name": setting.replace("/", "-"),
        "runtime": {"name": "serial", "pack": grid.PACK},
        "eval_every": grid.EVAL_EVERY,
        "partition": grid.PARTITIONS[partition],
        **grid.TASKS[task],
    }


def config_of(setting: str, changes: list[str]) -> dict[str, Any]:
    """The whole configuration of a run, with all defaults, as JSON keeps it."""
    from fedprompt.config import compose
    from fedprompt.core.files import json_ready

    tree: dict[str, Any] = json_ready(compose(experiment_of(setting), changes).tree())
    return tree


def run_cell(cell: Cell, changes: list[str], scale: float, output: Path) -> str:
    """Do one run with some overrides and write its file; returns one line about it."""
    # Imported here: in the process that does the work.
    import torch

    import fedprompt
    from fedprompt.core.errors import RoundError
    from fedprompt.runs.checkpoint import load_latest
    from fedprompt.runs.events import RoundFinished
    from fedprompt.runs.manifest import manifest

    torch.set_num_threads(1)
    keeps_prompts = cell.method == "pfpt" and cell.seed == 0 and cell.scale is None
    pools: list[NDArray[np.float16]] = []
    started, worked = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"

        def watch(event: Any) -> None:
            if keeps_prompts and isinstance(event, RoundFinished):
                prompts = load_latest(run_dir / "state").state.prompts
                pools.append(prompts.numpy().astype(np.float16))

        try:
            result = fedprompt.run(
                experiment_of(cell.setting), [*changes, f"run_dir={run_dir}"], on_event=watch
            )
        except RoundError as error:
            if cell.scale is None:
                raise
            diverged = {
                "scale": scale,
                "rounds": 0,
                "overrides": changes,
                "validation_accuracy": None,
            }
            about = {"experiment": experiment_of(cell.setting), "error": str(error)}
            write(output / cell.file, {**diverged, **about})
            return f"{cell.file}: {error}"
    last = result.reports[-1]
    about = manifest()
    content = {
        "setting": cell.setting,
        "method": cell.method,
        "seed": cell.seed,
        "scale": scale,
        "experiment": experiment_of(cell.setting),
        "overrides": changes,
        "config": config_of(cell.setting, changes),
        "rounds": len(result.reports),
        "accuracy": result.summary["accuracy"],
        "best_round": result.summary["best_round"],
        "best_accuracy": result.summary["best_accuracy"],
        "validation_accuracy": validation_of(last),
        "balanced_accuracy": result.summary["balanced_accuracy"],
        "personalised": result.summary["personalised"],
        "prompts": result.summary["prompts"],
        "bytes_up": sum(report["bytes_up"] for report in result.reports),
        "bytes_down": sum(report["bytes_down"] for report in result.reports),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "seconds_of": {
            phase: round(sum(report["seconds"][phase] for report in result.reports), 2)
            for phase in last["seconds"]
        },
        "state_sha256": result.summary["state_sha256"],
        "curves": {name: [report[name] for report in result.reports] for name in CURVES},
        "machine": about,
    }
    path = output / cell.file
    if keeps_prompts:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"round_{number:03d}": pool for number, pool in enumerate(pools, start=1)}
        np.savez_compressed(path.with_suffix(".npz"), **named)  # type: ignore[arg-type]
    write(path, content)
    shown = result.summary["accuracy"]
    own = (result.summary["personalised"] or {}).get("mean")
    return f"{cell.file}: accuracy {shown}, clients {own}, {content['seconds']} s"


def write(path: Path, content: dict[str, Any]) -> None:
    """One run's file."""
    from fedprompt.core.files import atomic_write, json_ready

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(json_ready(content), indent=1) + "\n")


def validation_of(report: dict[str, Any]) -> float | None:
    """Validation accuracy of a round: the global model's, or the clients' where there is none."""
    if report["validation_accuracy"] is not None:
        return float(report["validation_accuracy"])
    mean = report["personalised"].get("validation", {}).get("mean")
    return None if mean is None else float(mean)


def choose(cell: Cell, output: Path) -> float:
    """The scale with the best validation accuracy in the last round; equal ones: the smallest.

    Raises:
        FileNotFoundError: a run of the choice is missing.
    """
    if cell.scale is not None:
        return cell.scale
    if cell.preset in grid.WITHOUT_RATES:
        return 1.0
    setting = grid.rate_setting(cell.setting)
    tried = tried_scales(setting, cell.tuned_as, output)
    for scale in grid.scales_of(setting, cell.tuned_as):
        if scale not in tried:
            wanted = Cell(setting, cell.tuned_as, grid.RATE_SEED, scale).file
            raise FileNotFoundError(2, "no such file", wanted)
    return best_scale(tried)


def best_scale(tried: Mapping[float, float]) -> float:
    """The scale with the best accuracy; equal ones: the smallest."""
    return max(tried, key=lambda scale: (tried[scale], -scale))


def tried_scales(setting: str, method: str, output: Path) -> dict[float, float]:
    """Validation accuracy of every scale that was tried; 0 where training diverged."""
    found = {}
    for scale in grid.ALL_SCALES:
        path = output / Cell(setting, method, grid.RATE_SEED, scale).file
        if path.is_file():
            found[scale] = (
                json.loads(path.read_text(encoding="utf-8"))["validation_accuracy"] or 0.0
            )
    return found


def neighbours(rates: list[Cell], output: Path) -> list[Cell]:
    """The runs with the scales next to the best of each method."""
    cells = []
    for setting, method in dict.fromkeys((cell.setting, cell.method) for cell in rates):
        try:
            best = grid.ALL_SCALES.index(choose(Cell(setting, method, grid.RATE_SEED), output))
        except FileNotFoundError:
            continue
        around = grid.ALL_SCALES[max(0, best - 1) : best + 2]
        cells += [Cell(setting, method, grid.RATE_SEED, scale) for scale in around]
    return cells


def is_there(cell: Cell, rounds: int, output: Path) -> bool:
    """Whether a run was done as it would be now: with the same configuration, defaults and all.

    Of files that were written before they had all of it, what they have is compared: overrides, and
    the experiment if it is there.
    """
    path = output / cell.file
    if not path.is_file():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))
    expected = experiment_of(cell.setting)
    if done.get("experiment", expected) != expected:
        return False
    try:
        scale = choose(cell, output)
    except FileNotFoundError:
        scale = done["scale"]
    try:
        now = overrides_of(cell, rounds, scale, output)
    except FileNotFoundError:  # FedOpt, and FedAvg is yet to be run
        return False
    if sorted(done["overrides"]) != sorted(now):
        return False
    if "config" not in done:
        return True
    had = {name: {**options, **done["config"][name]} for name, options in grid.LATER.items()}
    return {**done["config"], **had} == config_of(cell.setting, done["overrides"])


def missing(cells: list[Cell], rounds: int, output: Path) -> list[Cell]:
    """Those that are yet to be run."""
    return [cell for cell in cells if not is_there(cell, rounds, output)]


def run_all(cells: list[Cell], jobs: int, rounds: int, output: Path) -> int:
    """Do the runs that are missing; returns how many failed."""
    todo = missing(cells, rounds, output)
    print(f"{len(cells)} runs, {len(cells) - len(todo)} there, {len(todo)} to do", flush=True)
    failed = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {}
        for cell in todo:
            try:
                scale = choose(cell, output)
                changes = overrides_of(cell, rounds, scale, output)
            except FileNotFoundError as error:
                failed += 1
                print(f"{cell.file}: no learning rate ({error.filename} is missing)", flush=True)
                continue
            running[pool.submit(run_cell, cell, changes, scale, output)] = cell
        for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
            try:
                print(f"[{number}/{len(running)}] {future.result()}", flush=True)
            except Exception as error:  # named, and the others go on
                failed += 1
                print(
                    f"[{number}/{len(running)}] {running[future].file}: FAILED: {error}", flush=True
                )
    return failed


def named(file: str, texts: list[str]) -> bool:
    """Whether a cell's file contains all of some texts."""
    return all(text in file for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="cells whose file contains each TEXT")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=grid.ROUNDS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():  # inherited by the processes
        os.environ.setdefault(name, value)
    groups = [
        [cell for cell in group if named(cell.file, arguments.only)] for group in grid.groups()
    ]
    failed, where = 0, (arguments.rounds, arguments.output)
    for cells in filter(None, groups):
        rates = grid.rate_cells(cells)
        if arguments.list:
            for cell in dict.fromkeys([*rates, *neighbours(rates, arguments.output), *cells]):
                print("there  " if is_there(cell, *where) else "missing", cell.file)
            continue
        failed += run_all(rates, arguments.jobs, *where)
        while missing(around := neighbours(rates, arguments.output), *where):
            gone_wrong = run_all(around, arguments.jobs, *where)
            failed += gone_wrong
            if gone_wrong:
                break
        failed += run_all(cells, arguments.jobs, *where)
    if failed:
        sys.exit(f"{failed} runs failed; call again to try them again")


if __name__ == "__main__":
    main()
