"""What a run is composed of, and which source wins.

There are four sources, the weakest first:

1. the defaults: those of the options' dataclasses, and the names in `conf/default.yaml`;
2. the experiment file;
3. the method's preset, `conf/method/NAME.yaml`;
4. the command line.

A method that the experiment file names is part of that file, whose other lines may change it: then
2 and 3 change places. A method named elsewhere, on the command line or in `compare`, takes the
place of the file's own, of which nothing is left.

**Comparisons.** A rival, a method that `compare` lists, runs as the same experiment and the same
command line would with `method=RIVAL`. So what file and command line say holds for all methods. Two
things are a rival's own:

- What its preset sets stays: `head_only` has no prompts, `fedavg_pt` has no pool, `fedcof` one
  round, and the method's plug-ins are its own. From the command line it takes learning rates
  (`lr` of a section) and options of its plug-ins all the same. An `aggregator=NAME` of the command
  line is thus for the leading method, and for rivals whose preset names none.
- Options of a plug-in hold where that plug-in is in use: `objective.mu=1` is for methods with the
  proximal objective and for no other.

A rival that cannot take what was said, say `clients.optimizer=adam` for SCAFFOLD, is refused before
anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fedprompt.config.files import conf_root, read_yaml
from fedprompt.config.groups import GROUPS, REGISTRIES, SECTIONS, load_group
from fedprompt.config.typed import Tree, as_name, section

RATE = "lr"
"""The key of a section that a rival takes from the command line though its preset sets it."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a config was composed of; `config.yaml` of a run keeps it."""

    experiment: Tree = dataclasses.field(default_factory=dict)
    """The lines of the experiment file."""
    command: Tree = dataclasses.field(default_factory=dict)
    """What the command line said."""
    files: dict[str, Tree] = dataclasses.field(default_factory=dict)
    """The files of `conf/` that were read, by `GROUP/NAME`: read once, so that a comparison that
    is resumed is the one that was started."""

    def tree(self) -> Tree:
        """As a plain mapping."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_tree(cls, tree: object) -> Sources:
        """The sources that a `config.yaml` holds.

        Raises:
            ConfigError: they are no sections.
        """
        given = section(tree, "sources")
        parts = {
            field.name: section(given.get(field.name), f"sources.{field.name}")
            for field in dataclasses.fields(cls)
        }
        for key, lines in parts["files"].items():
            parts["files"][key] = section(lines, f"sources.files.{key}")
        return cls(**parts)

    def read(self, group: str, name: str) -> Tree:
        """A file of a group, as it was when it was first read."""
        key = f"{group}/{name}"
        if key not in self.files:
            self.files[key] = load_group(group, name)
        return dict(self.files[key])

    def defaults(self) -> Tree:
        """`conf/default.yaml`, as it was when it was first read."""
        if "default" not in self.files:
            self.files["default"] = read_yaml(conf_root() / "default.yaml")
        return dict(self.files["default"])


@dataclasses.dataclass(frozen=True)
class Said:
    """What one layer says of a group."""

    pick: str | None
    """The file that it names."""
    entry: str | None
    """Where its options hold: with this file; None with any."""
    options: Tree


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one source says, with its options bound to the plug-ins that they were said for."""

    groups: dict[str, Said]
    others: Tree


def bind(tree: Tree, below: Sequence[Layer] | None) -> Layer:
    """A layer of a source.

    Args:
        tree: what the source says.
        below: the layers that its author had before them, which settle whose option
            `aggregator.lr` is; None for a preset, whose options hold for whatever it runs with.
    """
    groups: dict[str, Said] = {}
    others: Tree = {}
    for key, value in tree.items():
        if key not in GROUPS:
            others[key] = value
        elif value is not None or key in REGISTRIES:
            groups[key] = _said(key, value, None if below is None else picked(key, below))
    return Layer(groups, others)


def _said(group: str, value: object, in_use: str | None) -> Said:
    if isinstance(value, str) or value is None:
        return Said(as_name(value), as_name(value), {})
    options = section(value, group, named=True)
    if group == "partition" and "file" in options:  # the one option that picks its entry
        options.setdefault("name", "file")
    pick = as_name(options.pop("name")) if "name" in options else None
    if group == "runtime":  # `threads` changes bits: another runtime keeps it
        return Said(pick, None, options)
    # All heads have the same options, and so have all models.
    return Said(pick, pick or (None if group in SECTIONS else in_use), options)


def picked(group: str, layers: Sequence[Layer]) -> str | None:
    """The file of a group that the last of the layers to name one names."""
    picks = [layer.groups[group].pick for layer in layers if group in layer.groups]
    return next((pick for pick in reversed(picks) if pick is not None), None)


def stack(sources: Sources) -> list[Layer]:
    """The layers of the leading method, the weakest first; the last is the command line's."""
    defaults = bind(sources.defaults(), [])
    own = preset(sources, sources.experiment.get("method", defaults.others["method"]))
    experiment = bind(sources.experiment, [defaults, own])
    if "method" in sources.command:
        below = [defaults, experiment, preset(sources, sources.command["method"])]
    else:
        below = [defaults, own, experiment]
    return [*below, bind(sources.command, below)]


def preset(sources: Sources, method: object) -> Layer:
    """The layer of a method."""
    return bind(sources.read("method", as_name(method)), None)


def flatten(sources: Sources) -> Tree:
    """The whole tree of the leading method."""
    layers = stack(sources)
    tree: Tree = {}
    for layer in layers:
        for key, value in layer.others.items():
            if isinstance(value, Mapping) and key in SECTIONS:
                tree[key] = {**section(tree.get(key), key), **value}
            elif value is not None or key not in SECTIONS:  # else all its lines are comments
                tree[key] = value
    for group in GROUPS:
        tree[group] = _flatten_group(sources, group, layers)
    return tree


def _flatten_group(sources: Sources, group: str, layers: Sequence[Layer]) -> Tree:
    """The options of a group: those of its file win over what was said before it was picked."""
    pick, in_use = picked(group, layers), None
    lines = {} if pick is None else sources.read(group, pick)
    options: Tree = {}
    for said in (layer.groups[group] for layer in layers if group in layer.groups):
        if said.pick not in (None, in_use):
            in_use = said.pick
            options.update(lines if in_use == pick else {})
        if said.entry in (None, pick):
            options.update(said.options)
    return options


def rival(sources: Sources, method: str) -> Sources:
    """The sources of a rival of the leading method: the same, with its own command line."""
    defaults, *_, command = stack(sources)
    own = preset(sources, method)
    beneath = [defaults, bind(sources.experiment, []), own]
    stated: Tree = {}
    for group, said in command.groups.items():
        named = own.groups.get(group, Said(None, None, {}))
        pick = said.pick if named.pick is None else None
        holds = said.entry in (None, pick or picked(group, beneath))
        options = said.options if holds else {}
        if group in SECTIONS:
            options = _without_own(options, named.options)
        if pick is not None or options:
            stated[group] = {**({} if pick is None else {"name": pick}), **options}
    for key, value in command.others.items():
        if isinstance(value, Mapping):
            stated[key] = _without_own(value, section(own.others.get(key), key))
        elif key not in own.others:
            stated[key] = value
    stated.update(method=method, compare=[])
    return Sources(sources.experiment, stated, sources.files)


def _without_own(said: Mapping[str, object], own: Tree) -> Tree:
    return {key: value for key, value in said.items() if key == RATE or key not in own}


def merge(first: Tree, second: Tree) -> Tree:
    """What two command lines say one after the other."""
    merged = dict(first)
    for key, value in second.items():
        before = first.get(key)
        if key in GROUPS:
            old, new = (_said(key, each, None) for each in (before or {}, value))
            same = new.pick in (None, old.pick) or key == "runtime"
            options = {**(old.options if same else {}), **new.options}
            pick = new.pick or old.pick
            merged[key] = {**({} if pick is None else {"name": pick}), **options}
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = {**before, **value}
        else:
            merged[key] = value
    return merged


def difference(old: Tree, new: Tree) -> Tree:
    """What has to be said on top of the complete tree `old` to have `new`."""
    said: Tree = {}
    for key, value in new.items():
        before = old[key]
        if value == before:
            continue
        entry = key in REGISTRIES and key not in SECTIONS
        if not isinstance(value, dict) or (entry and value["name"] != before["name"]):
            said[key] = value
        else:
            said[key] = {name: item for name, item in value.items() if item != before.get(name)}
    return said
