"""What was run: the head of a page, from run directories alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from fedprompt.report.lines import Line, config_of
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import Run

Facts = list[tuple[str, str]]


def facts_of(mains: Sequence[Run], lines: Sequence[Line]) -> Facts:
    """Names and values; where runs differ, all values that occur.

    Args:
        mains: the runs that the page is about, without what they are compared with.
        lines: all lines of the page.
    """
    listed = [_of_run(run) for run in mains]
    facts: dict[str, list[str]] = {}
    for each in listed:
        for name, value in each:
            facts.setdefault(name, [])
            if value and value not in facts[name]:
                facts[name].append(value)
    facts["method"] = list(dict.fromkeys(line.name for line in lines))
    dates = sorted(facts.get("date", []))
    facts["date"] = [" to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    facts["seed"] = [", ".join(dict.fromkeys(str(s) for line in lines for s in line.seeds))]
    return [(name, "; ".join(values)) for name, values in facts.items() if any(values)]


def _of_run(run: Run) -> Facts:
    config = config_of(run.directory)
    if not config:
        return []

    def said(*keys: str) -> list[str]:
        known = [key for key in keys if config.get(key) is not None]
        return [f"{key.split('.')[-1]} {config[key]}" for key in known]

    manifest = run.directory.read_manifest()
    done = max((record["round"] for record in run.records), default=0)
    rounds = config.get("rounds")
    per_round = config.get("clients.per_round")
    trained = said("clients.epochs", "clients.batch_size", "clients.optimizer")
    cohort = "" if per_round is None else f", {per_round} a round"
    head = ", ".join([str(config.get("head.name")), *said("head.mode", "head.lr", "head.start")])
    prompts = said("prompts.count", "prompts.pool", "prompts.selection", "prompts.depth")
    loss = _plug_in("objective", config)
    return [
        ("task", _task(run.directory, config)),
        ("clients", ", ".join([f"{config.get('clients.count')}{cohort}", *trained])),
        ("partition", _plug_in("partition", config)),
        ("seed", ""),
        ("method", ""),
        ("objective", "" if loss == "plain" else loss),
        ("prompts", ", ".join(prompts)),
        ("backbone", _backbone(config, manifest)),
        ("head", head if config.get("head.name") else ""),
        ("rounds", str(rounds) if done == rounds else f"{done} of {rounds}"),
        ("privacy", _privacy(run, config)),
        ("commit", _commit(manifest)),
        ("machine", _machine(config, manifest)),
        ("versions", _versions(manifest)),
        ("date", str(manifest.get("date") or "")),
        ("note", str(config.get("note") or "")),
    ]


def _privacy(run: Run, config: Mapping[str, object]) -> str:
    """Unit, clip, and what the rounds used up."""
    unit, used = config.get("privacy.unit"), run.series("epsilon")[1]
    if unit is None or not used:
        return ""
    delta, clip = config.get("privacy.delta"), config.get("privacy.clip")
    return f"\u03b5 = {used[-1]:.3g} (\u03b4 = {delta}) for each {unit}, clip {clip}"


def _plug_in(group: str, config: Mapping[str, object]) -> str:
    """A plug-in with its options."""
    name, prefix = config.get(f"{group}.name"), f"{group}."
    options = [
        f"{key.removeprefix(prefix)} {value}"
        for key, value in config.items()
        if key.startswith(prefix) and key != f"{group}.name" and value is not None
    ]
    listed = f" ({', '.join(options)})" if options else ""
    return f"{name}{listed}" if name else ""


def _task(directory: RunDirectory, config: Mapping[str, object]) -> str:
    card, held = directory.read_task(), directory.read_partition()
    parts = [str(config.get("data.name") or card.get("name") or "")]
    if card.get("class_names"):
        parts.append(f"{len(card['class_names'])} classes")
    if len(card.get("domains") or ()) > 1:
        parts.append(f"{len(card['domains'])} domains ({', '.join(card['domains'])})")
    if held is not None:
        parts.append(f"{int(held.class_counts.sum()):,} training images")
    return ", ".join(filter(None, parts))


def _backbone(config: Mapping[str, object], manifest: Mapping[str, object]) -> str:
    name = config.get("model.backbone")
    digest = manifest.get("backbone_sha256")
    shown = f" (SHA-256 {digest[:12]})" if isinstance(digest, str) else ""
    return f"{name}{shown}" if name else ""


def _commit(manifest: Mapping[str, object]) -> str:
    git = manifest.get("git")
    if not isinstance(git, Mapping) or not git.get("commit"):
        return ""
    return f"{str(git['commit'])[:12]}{' with changes' if git.get('dirty') else ''}"


def _machine(config: Mapping[str, object], manifest: Mapping[str, object]) -> str:
    where = [manifest.get("cpu"), manifest.get("platform")]
    cores = manifest.get("usable_cpus")
    where += [f"{cores} CPUs" if cores else None, f"runtime {config.get('runtime.name')}"]
    return ", ".join(str(each) for each in where if each)


def _versions(manifest: Mapping[str, object]) -> str:
    packages = manifest.get("packages")
    listed = [f"Python {manifest['python']}"] if manifest.get("python") else []
    for name in ("fedprompt", "torch", "timm", "pytorch-lightning", "ray", "numpy"):
        version = packages.get(name) if isinstance(packages, Mapping) else None
        listed += [f"{name} {version}"] if version else []
    return ", ".join(listed)


def command_of(directory: RunDirectory) -> str:
    """What repeats a run: its whole config, into another folder; empty where there is none."""
    if not config_of(directory):
        return ""
    path = directory.path.resolve()
    again = shlex.quote(f"run_dir=runs/{path.name}-again")
    return f"fedprompt run {shlex.quote(str(path / 'config.yaml'))} {again}"


def said_of(directory: RunDirectory) -> str:
    """What the run's command line was, as far as its config says."""
    sources = config_of(directory).get("sources")
    if not isinstance(sources, Mapping):
        return ""
    name = (sources.get("experiment") or {}).get("name")
    command = sources.get("command") or {}
    words = [f"{key}={value_text(value)}" for key, value in _leaves(command)]
    return " ".join(["fedprompt run", *map(shlex.quote, [str(name), *words])]) if name else ""


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Facts | list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def value_text(value: object) -> str:
    """A value as the right side of an override."""
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
