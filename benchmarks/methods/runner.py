"""Run the methods benchmark: only what is missing, two runs at a time.

    python -m benchmarks.methods.runner [--real] [--only TEXT ...] [--list] [--jobs 2] [--rounds 20]
                                        [--output benchmarks/results/methods]

Group by group (`groups` in grid.py): first the runs that choose each method's learning rates on the
validation split (some scales, then the neighbours of the best; a seed that is not reported), then
those that are reported. Each run has one thread and adds one row to a table (results.py). It is not
done again while that row is there, unless it had another configuration than it would have now; stop
the program at any time and call it again. A run that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Json, Once, Origin, run_once
from benchmarks.methods import grid
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import FOLDER, Configuration, Run, Store, rest_of
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.files import json_ready
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.events import RoundFinished

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc keeps what a step frees, for the next one: 1.43 ms an image instead of 1.6.
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


class MissingRunError(Exception):
    """A run that chooses a learning rate has not been done; the message names it."""


# What a run is.


def overrides_of(cell: Cell, rounds: int, scale: float, store: Store) -> list[str]:
    """What a user would type after the experiment's name.

    Args:
        cell: the run.
        rounds: of methods that train.
        scale: factor on the learning rates.
        store: has the runs that chose the rates of FedOpt's clients.

    Raises:
        MissingRunError: one of those is missing.
    """
    changes = [f"seed={cell.seed}", f"method={cell.preset}", *grid.CHANGES.get(cell.method, ())]
    clients, rounds = grid.task_of(cell.setting)["clients"], grid.rounds_of(cell.setting, rounds)
    if cell.preset in grid.POOLED:
        changes.append(f"rounds={rounds * clients['per_round'] // clients['count']}")
    elif cell.preset not in grid.CLOSED_FORM:
        changes.append(f"rounds={rounds}")
    if cell.preset.endswith("_plus") and not any("prompts.pool" in each for each in changes):
        changes.append(f"prompts.pool={grid.POOL}")
    config = compose(experiment_of(cell.setting), changes)
    return [*changes, *_rates_of(cell, config, scale, store)]


def _rates_of(cell: Cell, config: ExperimentConfig, scale: float, store: Store) -> list[str]:
    """The overrides that set the learning rates, or what a scale is of where nothing is trained."""
    if cell.preset in grid.WITHOUT_RATES:
        return []
    if cell.preset in grid.CLOSED_FORM:
        return [f"objective.shrinkage={config.objective.options.shrinkage * scale:g}"]
    changes = []
    if cell.preset in grid.CLIENT_RATES_OF:
        changes.append(f"aggregator.lr={config.aggregator.options.lr * scale:g}")
        like = Cell(cell.setting, grid.CLIENT_RATES_OF[cell.preset], cell.seed)
        scale = choose(like, store)
    optimizer = "sgd" if config.objective.name == "scaffold" else "adam"
    changes += [
        f"prompts.lr={config.prompts.lr * scale:g}",
        f"head.lr={config.head.lr * grid.head_scale(cell, scale, optimizer):g}",
    ]
    if config.tuning.name != "none":
        changes.append(f"tuning.lr={config.tuning.options.lr * scale:g}")
    return changes


def experiment_of(setting: str) -> dict[str, object]:
    """A setting as an experiment."""
    return {
        "name": setting.replace("/", "-"),
        "runtime": {"name": "serial", "pack": grid.PACK},
        "eval_every": grid.EVAL_EVERY,
        "partition": grid.partition_of(setting),
        **grid.task_of(setting),
    }


def config_of(setting: str, changes: Sequence[str]) -> Json:
    """The whole configuration of a run, with all defaults, as JSON keeps it.

    Without its `sources`: what each value is counts, and not the file that says so.
    """
    tree: Json = json_ready(compose(experiment_of(setting), list(changes)).tree())
    return {name: value for name, value in tree.items() if name != "sources"}


def configuration_of(setting: str, changes: Sequence[str]) -> Configuration:
    """What that says beside the overrides."""
    return Configuration.of(rest_of(config_of(setting, changes), changes))


# Doing one.


def run_cell(cell: Cell, changes: Sequence[str], scale: float, pools: Path) -> Run:
    """Do one run with some overrides.

    Args:
        cell: the run.
        changes: its overrides.
        scale: the factor on the learning rates that is in them.
        pools: where PFPT's prompts of each round go, if this is the run whose prompts are kept.

    Raises:
        RoundError: a run that is reported diverged.
    """
    import torch

    torch.set_num_threads(1)
    keeps_prompts = cell.method == "pfpt" and cell.seed == 0 and cell.scale is None
    kept: list[NDArray[np.float16]] = []

    def watch(event: object, run_dir: Path) -> None:
        if keeps_prompts and isinstance(event, RoundFinished):
            prompts = load_latest(run_dir / "state").state.prompts
            kept.append(prompts.numpy().astype(np.float16))

    try:
        once = run_once(experiment_of(cell.setting), changes, watch)
    except RoundError as error:
        if cell.scale is None:
            raise
        return diverged(cell, changes, scale, str(error))
    if keeps_prompts:
        pools.parent.mkdir(parents=True, exist_ok=True)
        named = {f"round_{number:03d}": pool for number, pool in enumerate(kept, start=1)}
        np.savez_compressed(pools, **named)  # type: ignore[arg-type]
    return run_of(cell, changes, scale, once)


def run_of(cell: Cell, changes: Sequence[str], scale: float, once: Once) -> Run:
    """The row of a run that has ended.

    Args:
        cell: the run.
        changes: its overrides.
        scale: the factor on the learning rates that is in them.
        once: what it left.
    """
    reports, summary = once.result.reports, once.result.summary
    own = summary["personalised"] or {}
    spent = {
        phase: round(sum(report["seconds"][phase] for report in reports), 2)
        for phase in ("train", "aggregate", "evaluate")
    }

    def curve(name: str) -> tuple[float | None, ...]:
        return tuple(report[name] for report in reports)

    return Run(
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        scale=scale,
        rounds=len(reports),
        accuracy=summary["accuracy"],
        best_round=summary["best_round"],
        best_accuracy=summary["best_accuracy"],
        validation_accuracy=validation_of(reports[-1]),
        balanced_accuracy=summary["balanced_accuracy"],
        alone_accuracy=summary["alone_accuracy"],
        alone_validation_accuracy=reports[-1]["alone_validation_accuracy"],
        own=own.get("mean"),
        own_deviation=own.get("deviation"),
        own_worst_tenth=own.get("worst_tenth"),
        own_jain=own.get("jain"),
        prompts=summary["prompts"],
        bytes_up=sum(report["bytes_up"] for report in reports),
        bytes_down=sum(report["bytes_down"] for report in reports),
        seconds=round(once.seconds, 1),
        cpu_seconds=round(once.cpu_seconds, 1),
        train_seconds=spent["train"],
        aggregate_seconds=spent["aggregate"],
        evaluate_seconds=spent["evaluate"],
        accuracy_curve=curve("accuracy"),
        validation_curve=curve("validation_accuracy"),
        loss_curve=curve("train_loss"),
        prompts_curve=tuple(report["num_prompts"] for report in reports),
        state_sha256=summary["state_sha256"],
        overrides=tuple(changes),
        options=configuration_of(cell.setting, changes).digest,
        origin=Origin.here(),
    )


def diverged(cell: Cell, changes: Sequence[str], scale: float, error: str) -> Run:
    """The row of a run whose training did not end.

    Args:
        cell: the run.
        changes: its overrides.
        scale: the factor on the learning rates that is in them.
        error: what it said.
    """
    nothing = {
        field.name: () if field.name.endswith("_curve") else None
        for field in dataclasses.fields(Run)
    }
    known = {
        "setting": cell.setting,
        "method": cell.method,
        "seed": cell.seed,
        "scale": scale,
        "rounds": 0,
        "state_sha256": "",
        "overrides": tuple(changes),
        "options": configuration_of(cell.setting, changes).digest,
        "origin": Origin.here(),
        "error": error,
    }
    return Run(**{**nothing, **known})  # type: ignore[arg-type]


def validation_of(report: Json) -> float | None:
    """Validation accuracy of a round: the global model's, or the clients' where there is none."""
    if report["validation_accuracy"] is not None:
        return float(report["validation_accuracy"])
    mean = report["personalised"].get("validation", {}).get("mean")
    return None if mean is None else float(mean)


# Choosing learning rates.


def choose(cell: Cell, store: Store) -> float:
    """The scale with the best validation accuracy in the last round; equal ones: the smallest.

    Raises:
        MissingRunError: a run of the choice is missing.
    """
    if cell.scale is not None:
        return cell.scale
    if cell.preset in grid.WITHOUT_RATES:
        return 1.0
    setting = grid.rate_setting(cell.setting)
    tried = tried_scales(setting, cell.tuned_as, store)
    for scale in grid.scales_of(setting, cell.tuned_as):
        if scale not in tried:
            raise MissingRunError(Cell(setting, cell.tuned_as, grid.RATE_SEED, scale).name)
    return best_scale(tried)


def best_scale(tried: Mapping[float, float]) -> float:
    """The scale with the best accuracy; equal ones: the smallest."""
    return max(tried, key=lambda scale: (tried[scale], -scale))


def tried_scales(setting: str, method: str, store: Store) -> dict[float, float]:
    """Validation accuracy of every scale that was tried; 0 where training diverged.

    Raises:
        ConfigError: a run has no validation accuracy, though it did not diverge.
    """
    cells = (Cell(setting, method, grid.RATE_SEED, scale) for scale in grid.ALL_SCALES)
    found = [run for run in map(store.find, cells) if run is not None]
    for run in found:
        if run.accuracy is not None and run.validation_accuracy is None:
            raise ConfigError(
                f"{setting}: rates are chosen by validation accuracy, and the run of {method} with "
                f"scale {run.scale} has none; set data.validation to a share above 0"
            )
    return {run.scale: run.validation_accuracy or 0.0 for run in found}


def neighbours(rates: Sequence[Cell], store: Store) -> list[Cell]:
    """The runs with the scales next to the best of each method."""
    cells = []
    for setting, method in dict.fromkeys((cell.setting, cell.method) for cell in rates):
        try:
            best = grid.ALL_SCALES.index(choose(Cell(setting, method, grid.RATE_SEED), store))
        except MissingRunError:
            continue
        around = grid.ALL_SCALES[max(0, best - 1) : best + 2]
        cells += [Cell(setting, method, grid.RATE_SEED, scale) for scale in around]
    return cells


# What is there, and what is not.


def is_there(cell: Cell, rounds: int, store: Store) -> bool:
    """Whether a run was done as it would be now: with the same configuration, defaults and all.

    Of the first runs, which did not keep all of it, what they kept is compared.

    Args:
        cell: the run.
        rounds: of methods that train.
        store: what has been done.
    """
    done = store.find(cell)
    if done is None:
        return False
    try:
        scale = choose(cell, store)
    except MissingRunError:
        scale = done.scale
    try:
        now = overrides_of(cell, rounds, scale, store)
    except MissingRunError:  # FedOpt, and FedAvg is yet to be run
        return False
    if sorted(done.overrides) != sorted(now):
        return False
    known = store.configuration(done)
    had = known.read()
    would_have = rest_of(config_of(cell.setting, now), now)
    if known.complete:
        return {**grid.NEUTRAL, **had} == {**grid.NEUTRAL, **would_have}
    return all(would_have.get(key) == value for key, value in had.items())


def missing(cells: Sequence[Cell], rounds: int, store: Store) -> list[Cell]:
    """Those that are yet to be run."""
    return [cell for cell in cells if not is_there(cell, rounds, store)]


def run_all(cells: Sequence[Cell], jobs: int, rounds: int, store: Store) -> int:
    """Do the runs that are missing; returns how many failed.

    Args:
        cells: all that are wanted.
        jobs: processes at a time.
        rounds: of methods that train.
        store: what has been done; this process alone adds to it.
    """
    todo = missing(cells, rounds, store)
    print(f"{len(cells)} runs, {len(cells) - len(todo)} there, {len(todo)} to do", flush=True)
    failed = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {}
        for cell in todo:
            try:
                scale = choose(cell, store)
                changes = overrides_of(cell, rounds, scale, store)
            except MissingRunError as error:
                failed += 1
                print(f"{cell.name}: no learning rate ({error} is missing)", flush=True)
                continue
            pools = store.pools(cell.setting)
            running[pool.submit(run_cell, cell, changes, scale, pools)] = cell
        for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
            cell = running[future]
            try:
                run = future.result()
                store.add(cell, run, configuration_of(cell.setting, run.overrides))
                said = line(cell, run)
            except Exception as error:  # named, and the others go on
                failed += 1
                said = f"{cell.name}: FAILED: {error}"
            print(f"[{number}/{len(running)}] {said}", flush=True)
    return failed


def line(cell: Cell, run: Run) -> str:
    """What is said about a run that is done."""
    if run.error:
        return f"{cell.name}: {run.error}"
    return f"{cell.name}: accuracy {run.accuracy}, clients {run.own}, {run.seconds} s"


def show(cells: Sequence[Cell], rounds: int, store: Store) -> None:
    """Say what is there and what is missing, the runs that choose rates included."""
    rates = grid.rate_cells(list(cells))
    for cell in dict.fromkeys([*rates, *neighbours(rates, store), *cells]):
        print("there  " if is_there(cell, rounds, store) else "missing", cell.name)


def run_group(cells: Sequence[Cell], jobs: int, rounds: int, store: Store) -> int:
    """Choose the rates, then do the runs that are reported; returns how many failed.

    Args:
        cells: that are reported.
        jobs: processes at a time.
        rounds: of methods that train.
        store: what has been done.
    """
    rates = grid.rate_cells(list(cells))
    failed = run_all(rates, jobs, rounds, store)
    while missing(around := neighbours(rates, store), rounds, store):
        gone_wrong = run_all(around, jobs, rounds, store)
        failed += gone_wrong
        if gone_wrong:
            break
    return failed + run_all(cells, jobs, rounds, store)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="cells whose name contains each TEXT")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--real", action="store_true", help="the runs on real images (real.py)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=grid.ROUNDS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():  # inherited by the processes
        os.environ.setdefault(name, value)
    store, failed = Store(arguments.output), 0
    for group in grid.real_groups() if arguments.real else grid.groups():
        cells = [each for each in group if all(text in each.name for text in arguments.only)]
        if not cells:
            continue
        if arguments.list:
            show(cells, arguments.rounds, store)
        else:
            failed += run_group(cells, arguments.jobs, arguments.rounds, store)
    if failed:
        sys.exit(f"{failed} runs failed; call again to try them again")


if __name__ == "__main__":
    main()
