"""Once: the JSON file of each run of the methods benchmark becomes a row; proves that nothing
that is read is lost.

    python -m benchmarks.convert OLD_FOLDER NEW_FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

from benchmarks.harness import Json, Origin
from benchmarks.methods import grid
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import Configuration, Run, Store, flatten, rest_of
from benchmarks.methods.runner import experiment_of

CURVES = {
    "accuracy": "accuracy_curve",
    "validation_accuracy": "validation_curve",
    "train_loss": "loss_curve",
    "num_prompts": "prompts_curve",
}
SAME = (
    *("setting", "method", "seed", "scale", "rounds", "accuracy", "best_round", "best_accuracy"),
    *("validation_accuracy", "balanced_accuracy", "prompts", "bytes_up", "bytes_down", "seconds"),
    *("state_sha256",),
)
OWN = {
    "mean": "own",
    "deviation": "own_deviation",
    "worst_tenth": "own_worst_tenth",
    "jain": "own_jain",
}


def partial(experiment: Json) -> dict[str, object]:
    """What an experiment sets, by the keys that a whole configuration has."""
    places = {"data": "data.name", "model": "model.backbone", "head": "head.name"}
    found = {places.get(key, key): value for key, value in flatten(experiment).items()}
    if found["head.name"] == "frozen":
        del found["head.name"]
        found["head.mode"] = "frozen"
    return found


def configuration_of(done: Json) -> Configuration | None:
    if "config" in done:
        return Configuration.of(rest_of(done["config"], done["overrides"]))
    if "experiment" not in done:
        return None
    rest = rest_of(partial(done["experiment"]), done["overrides"])
    # Presets may say otherwise than the experiment.
    given = {"prompts.count", "clients.per_round", "runtime.pack", "head.name", "head.mode"}
    return Configuration.of({k: v for k, v in rest.items() if k not in given}, complete=False)


def run_of(cell: Cell, done: Json, digest: str) -> Run:
    own, spent = done.get("personalised") or {}, done.get("seconds_of") or {}
    curves = done.get("curves") or {}
    return Run(
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        scale=done["scale"],
        rounds=done["rounds"],
        **{name: done.get(name) for name in SAME[5:-1]},
        **{mine: own.get(theirs) for theirs, mine in OWN.items()},
        cpu_seconds=done.get("cpu_seconds"),
        **{f"{phase}_seconds": spent.get(phase) for phase in ("train", "aggregate", "evaluate")},
        **{mine: tuple(curves.get(theirs, ())) for theirs, mine in CURVES.items()},
        state_sha256=done.get("state_sha256", ""),
        overrides=tuple(done["overrides"]),
        options=digest,
        origin=Origin.of(done["machine"]) if "machine" in done else NOWHERE,
        error=done.get("error", ""),
    )


NOWHERE = Origin("", "", False, "", "", "", "", 0, 0)


def main() -> None:
    old, new = map(Path, sys.argv[1:])
    cells = grid.final_cells()
    known = {}
    for cell in cells:
        known[cell.name + ".json"] = cell
    for setting, method in {(c.setting, c.method) for c in grid.rate_cells(cells)}:
        for scale in grid.ALL_SCALES:
            cell = Cell(setting, method, grid.RATE_SEED, scale)
            known[cell.name + ".json"] = cell
    paths = sorted(old.rglob("*.json"))
    unknown = [str(p.relative_to(old)) for p in paths if str(p.relative_to(old)) not in known]
    print(len(paths), "files", len(unknown), "unknown", unknown[:20])
    store = Store(new)
    runs, rates, options = [], [], {}
    for path in paths:
        name = str(path.relative_to(old))
        if name in unknown:
            continue
        cell, done = known[name], json.loads(path.read_text())
        assert done.get("experiment", experiment_of(cell.setting)) == experiment_of(cell.setting)
        configuration = configuration_of(done)
        if configuration:
            options[configuration.digest] = configuration
        run = run_of(cell, done, configuration.digest if configuration else "")
        (runs if cell.scale is None else rates).append(run)
    store._runs.write(runs)
    store._rates.write(rates)
    store._options.write(list(options.values()))
    for path in old.rglob("*.npz"):
        to = store.pools("/".join(path.relative_to(old).parts[:2]))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    # The way back, from the files.
    fresh, compared = Store(new), 0
    for path in paths:
        name = str(path.relative_to(old))
        if name in unknown:
            continue
        cell, done = known[name], json.loads(path.read_text())
        run = fresh.find(cell)
        assert run is not None, name
        for key in SAME:
            if key in done:
                assert getattr(run, key) == done[key], (name, key)
                compared += 1
        if "setting" in done:
            assert (run.setting, run.method, run.seed) == (done["setting"], done["method"], done["seed"])
        for theirs, mine in OWN.items():
            assert getattr(run, mine) == (done.get("personalised") or {}).get(theirs), name
        assert run.cpu_seconds == done.get("cpu_seconds")
        for phase, value in done.get("seconds_of", {}).items():
            assert getattr(run, f"{phase}_seconds") == value
        for theirs, mine in CURVES.items():
            assert list(getattr(run, mine)) == done.get("curves", {}).get(theirs, []), name
        if "curves" in done:
            assert done["curves"]["round"] == list(range(1, run.rounds + 1))
        assert list(run.overrides) == done["overrides"]
        assert run.error == done.get("error", "")
        if "config" in done:
            rebuilt = dict(fresh.configuration(run).read())
            whole = flatten(done["config"])
            for each in done["overrides"]:
                key, _, text = each.partition("=")
                value = yaml.safe_load(text)
                if key in whole:
                    value = type(whole[key])(value) if whole[key] is not None else value
                    rebuilt[key] = value
            rebuilt |= {"seed": run.seed, "name": run.setting.replace("/", "-")}
            assert rebuilt == whole, (name, {k for k in whole if rebuilt.get(k) != whole[k]}, set(rebuilt) - set(whole))
            compared += len(whole)
        if "machine" in done:
            m = done["machine"]
            o = run.origin
            assert (o.date, o.commit, o.dirty, o.python, o.platform, o.cpu or None, o.cpu_count, o.usable_cpus) == (
                m["date"], m["git"]["commit"], m["git"]["dirty"], m["python"], m["platform"], m.get("cpu"), m["cpu_count"], m["usable_cpus"])
            assert dict(p.split("=") for p in o.packages.split()) == m["packages"]
        compared += 30
    print(len(runs), "runs", len(rates), "rates", len(options), "configurations;", compared, "values equal")


if __name__ == "__main__":
    main()
