"""Experiments as files: YAML groups in `conf/`, an experiment's differences, `key=value` overrides.

Layers, later ones win: `conf/default.yaml`, the method preset, the experiment file, a method named
on the command line, the other overrides. `group=name` picks `conf/group/name.yaml`;
`group.key=value` sets a value in it. OmegaConf converts and checks types against dataclasses; an
unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedprompt.aggregation import Aggregator, aggregators
from fedprompt.client.recipe import LocalRecipe, TrainingOptions, has_global_model
from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.core.plugins import conf_folders, load_plugins
from fedprompt.core.registry import Registry
from fedprompt.data.partition.base import partitioners
from fedprompt.data.prefix.cache import CacheOptions
from fedprompt.data.task import datasets
from fedprompt.models.adaptation import tunings
from fedprompt.models.head import HeadOptions
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import SELECTIONS, PromptOptions
from fedprompt.objectives import objectives
from fedprompt.prompt_generators import PromptGenerator, generators
from fedprompt.runtime import runtimes
from fedprompt.runtime.base import RuntimeOptions

Tree = dict[str, Any]

REGISTRIES: dict[str, Registry[Any]] = {
    "aggregator": aggregators,
    "objective": objectives,
    "data": datasets,
    "partition": partitioners,
    "runtime": runtimes,
    "generator": generators,
    "tuning": tunings,
}
GROUPS = (*REGISTRIES, "head", "model")
EVAL_CLIENTS = ("last", "every", "never")
FILE_NAME = re.compile(r"\w[\w.+-]*")
"""What can be the name of a file in a group; a path cannot."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An entry of a registry with its options."""

    name: str
    options: Any
    """Instance of the entry's options dataclass."""

    def tree(self) -> Tree:
        """As a plain mapping."""
        return {"name": self.name, **dataclasses.asdict(self.options)}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A checked experiment."""

    name: str
    seed: int
    rounds: int
    eval_every: int
    eval_clients: str
    """When each client's own model is measured on its share of the held-out splits: after the
    `last` round, at `every` evaluation, or `never`. Methods without a global model are measured so
    at every evaluation unless it is `never`."""
    run_dir: str | None
    note: str | None
    """What the reader of the result should know; shown under the summary table."""
    method: str
    compare: tuple[str, ...]
    plugins: tuple[str, ...]
    """Files by their absolute paths, modules by their names; loaded when this is composed."""
    data: Choice
    partition: Choice
    aggregator: Choice
    objective: Choice
    generator: Choice
    tuning: Choice
    runtime: RuntimeOptions
    model: ModelOptions
    head: HeadOptions
    prompts: PromptOptions
    clients: TrainingOptions
    cache: CacheOptions

    def __post_init__(self) -> None:
        check_integer("rounds", self.rounds, 1)
        check_integer("eval_every", self.eval_every, 1)
        check_integer("seed", self.seed, 0)
        check_choice("eval_clients", self.eval_clients, EVAL_CLIENTS)
        self._check_method()
        bound = getattr(self.aggregator.options, "max_prompts", 0)
        if 0 < bound < self.prompts.count:
            raise ConfigError(
                f"aggregator.max_prompts: expected 0 (no bound) or at least prompts.count "
                f"({self.prompts.count}), got {bound}"
            )
        for method in self.compare:
            # Built now, so that a comparison that cannot work is not found out after the main run.
            try:
                self.with_method(method)
            except ConfigError as error:
                raise ConfigError(f"compare: {error}") from error
        if len(set(self.compare)) < len(self.compare):
            raise ConfigError(f"compare: expected each method once, got {', '.join(self.compare)}")

    def _check_method(self) -> None:
        """Refuse plug-ins that do not fit together."""
        objective = objectives.entry(self.objective.name).factory
        preset = _section(load_group("method", self.method).get("prompts"), "prompts")
        if self.prompts.count == 0 and preset.get("count") != 0:
            raise ConfigError(
                f"prompts.count: {self.method} needs at least 1 prompt, got 0; "
                "method=head_only trains the head alone"
            )
        bare = self.prompts.count == 0 and self.tuning.name == "none"
        if bare and self.head.mode == "frozen":
            raise ConfigError(
                "head.mode=frozen: with prompts.count=0 nothing is left to train; "
                "set prompts.count or use head.mode=shared"
            )
        if getattr(objective, "needs_sgd", False) and self.clients.optimizer == "adam":
            raise ConfigError(
                f"objective={self.objective.name}: its arithmetic holds for gradient steps only; "
                "expected clients.optimizer=sgd or auto, got 'adam'"
            )
        head = (self.head.name, self.head.bias, self.head.mode)
        solved = bare and head == ("linear", False, "shared")
        if not getattr(objective, "trains", True) and not solved:
            raise ConfigError(
                f"objective={self.objective.name}: computes a linear head from the frozen features;"
                " expected prompts.count=0, tuning=none, head.name=linear, head.bias=false and "
                "head.mode=shared; method=fedcof sets them"
            )
        self._check_prompts()
        self._check_aggregator()

    def _check_prompts(self) -> None:
        """Refuse prompts that a method or a generator has no use for."""
        if self.method == "head_only" and self.prompts.count > 0:
            raise ConfigError(
                f"prompts.count: head_only trains the head alone, expected 0, got "
                f"{self.prompts.count}; method=fedavg_pt has prompts"
            )
        made = self.generator.name != "none"
        if made and self.prompts.count == 0:
            raise ConfigError(
                f"generator={self.generator.name}: makes prompts; expected prompts.count > 0, got 0"
            )
        if made and (self.prompts.sends_keys or self.prompts.mode != "shared"):
            raise ConfigError(
                f"generator={self.generator.name}: makes prompts and no keys; expected "
                "prompts.selection=all or l2p and prompts.mode=shared, got "
                f"'{self.prompts.selection}' and '{self.prompts.mode}'"
            )

    def _check_aggregator(self) -> None:
        """Refuse a rule for merging prompts where the server merges none."""
        reason = None
        if self.generator.name != "none":
            reason = f"generator={self.generator.name}"
        elif self.prompts.count == 0 or self.prompts.mode == "personal":
            reason = f"prompts.count={self.prompts.count}, prompts.mode={self.prompts.mode}"
        factory = aggregators.entry(self.aggregator.name).factory
        if reason and self.aggregator.name != "mean" and not hasattr(factory, "merge_shared"):
            raise ConfigError(
                f"aggregator={self.aggregator.name}: merges prompts, and with {reason} the server "
                "merges none; expected aggregator=mean or server_opt"
            )

    @property
    def keeps_rows(self) -> bool:
        """Whether row i of the prompts is the same prompt in every round."""
        factory = aggregators.entry(self.aggregator.name).factory
        return self.generator.name == "none" and getattr(factory, "keeps_rows", False)

    @property
    def selects_in_vain(self) -> bool:
        """Whether clients select from a pool that never holds more prompts than they take."""
        if self.prompts.selection == "all" or self.prompts.pool_size != self.prompts.count:
            return False
        if self.keeps_rows or self.generator.name != "none":
            return True
        return not getattr(self.build_aggregator(), "adds_prompts", True)

    def measures_clients(self, round_index: int) -> bool:
        """Whether each client's own model is measured after a round that is evaluated."""
        if self.eval_clients == "never":
            return False
        often = self.eval_clients == "every" or not has_global_model(self.prompts, self.head)
        return often or round_index == self.rounds

    def build_aggregator(self) -> Aggregator:
        """The aggregator of the prompts."""
        options = dataclasses.asdict(self.aggregator.options)
        return aggregators.create(self.aggregator.name, **options)

    def build_generator(self) -> PromptGenerator | None:
        """The generator of prompts, if the experiment has one."""
        options = dataclasses.asdict(self.generator.options)
        return generators.create(self.generator.name, **options)

    @property
    def label(self) -> str:
        """The method, and the aggregator if it is not the method's own."""
        preset = load_group("method", self.method).get("aggregator")
        own = preset if isinstance(preset, str) else _section(preset, "aggregator").get("name")
        other = self.aggregator.name
        return self.method if own in (None, other) else f"{self.method} (aggregator={other})"

    def tree(self) -> Tree:
        """As plain mappings and values; composing this tree again gives an equal config."""
        tree: Tree = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Choice):
                tree[field.name] = value.tree()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                tree[field.name] = dataclasses.asdict(value)
            else:
                tree[field.name] = list(value) if isinstance(value, tuple) else value
        return tree

    def to_yaml(self, plugins: Iterable[str] | None = None) -> str:
        """The whole config as YAML, in the order of the fields.

        Args:
            plugins: names to write in the place of those that the config has.
        """
        tree = self.tree()
        if plugins is not None:
            tree["plugins"] = list(plugins)
        return OmegaConf.to_yaml(OmegaConf.create(tree))

    def recipe(self, num_classes: int) -> LocalRecipe:
        """What clients need to know of the config."""
        return LocalRecipe(
            training=self.clients,
            prompts=self.prompts,
            head=self.head,
            objective=self.objective.name,
            objective_options=dataclasses.asdict(self.objective.options),
            num_classes=num_classes,
            tuning=self.tuning.name,
            tuning_options=dataclasses.asdict(self.tuning.options),
        )

    def with_method(self, method: str) -> ExperimentConfig:
        """The same experiment with another method: same data, partition and seed."""
        tree = self.tree()
        preset = load_group("method", self.method)
        prompts = _section(preset.get("prompts"), "prompts")
        if prompts.get("selection") == "auto":  # what stands in the tree is what it meant
            prompts["selection"] = automatic_selection(tree["prompts"], self.data.options)
        _withdraw(tree, {**preset, "prompts": prompts})
        _merge_layer(tree, load_group("method", method))
        return build({**tree, "method": method, "name": f"{self.name}/{method}", "compare": []})


def conf_root() -> Path:
    """The folder of YAML groups: inside the installed package, or `conf/` of the checkout."""
    packaged = Path(str(resources.files("fedprompt"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def load_group(group: str, name: str) -> Tree:
    """One file of a group.

    Raises:
        ConfigError: no such file, and nothing registered under the name.
    """
    path = _group_file(group, name)
    if path is not None:
        return _read_yaml(path)
    registry = REGISTRIES.get(group)
    if registry is not None:
        registry.entry(name)  # raises for an unknown name, with the names that exist
    path = _group_file(group, name, installed=True)
    if path is not None:
        return _read_yaml(path)
    if registry is not None:
        return {"name": name}
    roots = (conf_root(), *conf_folders())
    names = sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})
    raise ConfigError(
        f"unknown {group} '{name}': expected one of {', '.join(names)}{suggest(name, names)}"
    )


def _group_file(group: str, name: str, installed: bool = False) -> Path | None:
    """The file of a name: the package's own, or that of a plug-in."""
    if not FILE_NAME.fullmatch(name):
        return None
    roots = (conf_root(), *conf_folders(installed))
    found = (root / group / f"{name}.yaml" for root in roots)
    return next((path for path in found if path.is_file()), None)


@dataclasses.dataclass(frozen=True)
class MethodCard:
    """What the first lines of a method's preset say."""

    name: str
    text: str
    source: str


def list_methods() -> list[MethodCard]:
    """All presets of `conf/method` in alphabetical order."""
    cards = []
    for path in sorted((conf_root() / "method").glob("*.yaml")):
        lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
        cards.append(MethodCard(path.stem, lines[0], lines[1].removeprefix("Source: ")))
    return cards


def compose(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """Compose and check an experiment.

    Args:
        config: name of a file in `conf/experiment/`, such as `quickstart` or
            `paper/cifar100_alpha_0.1`, path of a YAML file, or a mapping.
        overrides: `key=value` strings.

    Raises:
        ConfigError: a file is missing or no YAML, a key is unknown, or a value is wrong.
    """
    if isinstance(config, Mapping):
        experiment = {str(key): value for key, value in config.items()}
    else:
        experiment = _read_experiment(os.fspath(config))
    changes = _parse_overrides(overrides)
    _load_plugins(config, experiment, changes)
    tree: Tree = {}
    _merge_layer(tree, _read_yaml(conf_root() / "default.yaml"))
    # A method named on the command line takes the place of the experiment's own, of which nothing
    # is left.
    if "method" not in changes:
        _merge_layer(tree, load_group("method", _name(experiment.get("method", tree["method"]))))
    _merge_layer(tree, experiment)
    if "method" in changes:
        _merge_layer(tree, load_group("method", _name(changes["method"])))
    _merge_layer(tree, changes)
    return build(tree)


def _load_plugins(
    config: str | os.PathLike[str] | Mapping[str, Any], experiment: Tree, changes: Tree
) -> None:
    """Load the plug-ins, before anything else is looked up, and put their full paths in place."""
    given = changes if "plugins" in changes else experiment
    specs = given.get("plugins") or []
    if not isinstance(specs, (list, tuple)) or not all(isinstance(each, str) for each in specs):
        raise ConfigError(f"plugins: expected a list such as [rule.py], got {_shown(specs)}")
    base = None
    if given is experiment and not isinstance(config, Mapping):
        base = Path(os.fspath(config)).parent
    given["plugins"] = [plugin.key for plugin in load_plugins(specs, base)]


def build(tree: Tree) -> ExperimentConfig:
    """Check a composed tree and turn it into dataclasses.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    parts: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(ExperimentConfig)]
    for key in tree:
        if key not in known:
            hint = _owners(key) or suggest(key, known)
            raise ConfigError(
                f"unknown config key '{key}': expected one of {', '.join(known)}{hint}"
            )
    scalars: Tree = {}
    for field in known:
        value = tree.get(field)
        if field == "prompts":
            continue  # last: what `auto` means depends on the data
        if field in _SECTIONS:
            parts[field] = _typed(_SECTIONS[field], value, field)
        elif field in REGISTRIES:
            section = _section(value, field)
            entry = REGISTRIES[field].entry(_name(section.get("name")))
            options = {key: item for key, item in section.items() if key != "name"}
            parts[field] = Choice(entry.name, _typed(entry.options, options, field))
        else:
            scalars[field] = value
    prompts = _section(tree.get("prompts"), "prompts")
    if prompts.get("selection") is not None:
        check_choice("prompts.selection", prompts["selection"], ("auto", *SELECTIONS))
    if prompts.get("selection") == "auto":
        prompts["selection"] = automatic_selection(prompts, parts["data"].options)
    parts["prompts"] = _typed(PromptOptions, prompts, "prompts")
    root = _typed(_Scalars, scalars, "")
    return ExperimentConfig(
        **{**vars(root), "compare": tuple(root.compare), "plugins": tuple(root.plugins)}, **parts
    )


def automatic_selection(prompts: Mapping[str, Any], data: Any) -> str:
    """What `prompts.selection=auto` means: `keyed` where there are domains to tell apart, or more
    prompts than an image gets, else `all`. The placement and the mode of the prompts may decide.

    Args:
        prompts: the section.
        data: options of the data set; those of sets with several domains say `several_domains`.

    >>> automatic_selection({"count": 5, "pool": 20}, None), automatic_selection({"count": 5}, None)
    ('keyed', 'all')
    """
    placement = prompts.get("placement")
    if placement == "pool":
        return "keyed"
    if placement == "shallow" or prompts.get("mode") == "personal":
        return "all"
    has_choice = prompts.get("pool") not in (None, prompts.get("count"))
    return "keyed" if has_choice or getattr(data, "several_domains", False) else "all"


@dataclasses.dataclass(frozen=True)
class _Scalars:
    """The top-level values that are no sections."""

    name: str = "experiment"
    seed: int = 0
    rounds: int = 10
    eval_every: int = 1
    eval_clients: str = "last"
    run_dir: str | None = None
    note: str | None = None
    method: str = "pfpt"
    compare: list[str] = dataclasses.field(default_factory=list)
    plugins: list[str] = dataclasses.field(default_factory=list)


_SECTIONS: dict[str, type] = {
    "runtime": RuntimeOptions,
    "head": HeadOptions,
    "model": ModelOptions,
    "prompts": PromptOptions,
    "clients": TrainingOptions,
    "cache": CacheOptions,
}


def _merge_layer(tree: Tree, layer: Mapping[str, Any]) -> None:
    """Merge `layer` over `tree` in place; naming another entry of a group replaces the group."""
    for key, value in layer.items():
        if key in GROUPS and isinstance(value, str):
            _pick(tree, key, value)
        elif isinstance(value, Mapping) and key in _SECTIONS | REGISTRIES:
            options = dict(value)
            if key == "partition" and "file" in options:  # the one option that picks its entry
                options.setdefault("name", "file")
            name = options.get("name")
            if key in GROUPS and isinstance(name, str):
                if name != _section(tree.get(key), key).get("name"):
                    _pick(tree, key, name)
                if key == "model":  # its files have names, but the section has no such key
                    del options["name"]
            tree[key] = {**_section(tree.get(key), key), **options}
        elif value is None and key in ("prompts", "clients", "cache"):
            continue  # a section whose lines are all commented out
        else:
            tree[key] = value


def _withdraw(tree: Tree, preset: Mapping[str, Any]) -> None:
    """Put the default in the place of every value that a method's preset set and that still stands,
    in place: another method is not to inherit it.
    """
    defaults: Tree = {}
    _merge_layer(defaults, _read_yaml(conf_root() / "default.yaml"))
    for key, value in preset.items():
        if not isinstance(value, Mapping) or "name" in value or isinstance(tree.get(key), str):
            whole = value.get("name") if isinstance(value, Mapping) else value
            standing = _section(tree[key], key).get("name") if key in GROUPS else tree.get(key)
            if standing == whole and key in defaults:
                tree[key] = defaults[key]
            continue
        section = _section(tree.get(key), key)
        for name, item in value.items():
            if section.get(name) == item:
                section[name] = _section(defaults.get(key), key).get(name)
        tree[key] = section


def _pick(tree: Tree, group: str, name: str) -> None:
    """Put the file of a group in the place of what was there."""
    # All runtimes have the same options, and `threads` changes bits: another runtime keeps them.
    kept = _section(tree.get(group), group) if group == "runtime" else {}
    tree[group] = {**kept, **load_group(group, name)}


def _name(value: Any) -> str:
    """A name as it is looked up and quoted in messages."""
    return value if isinstance(value, str) else _shown(value)


def _section(value: Any, key: str) -> Tree:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        what = "the name of a file in conf, or " if key in GROUPS else ""
        raise ConfigError(
            f"{key}: expected {what}a section of 'key: value' lines, got {_shown(value)}"
        )
    return {str(name): item for name, item in value.items()}


def _typed(options: type, values: Any, prefix: str) -> Any:
    """An instance of a dataclass from a mapping: keys checked, values converted by OmegaConf."""
    section = _section(values, prefix)
    hints = typing.get_type_hints(options)
    for key, value in section.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            raise ConfigError(_unknown_key(options, prefix, key))
        # OmegaConf takes "???" for "no value", and its versions differ in what else they accept.
        missing = isinstance(value, str) and value == "???"
        fraction = isinstance(value, float) and hints[key] in (int, int | None)
        no_list = typing.get_origin(hints[key]) is list and not _is_flat_list(value)
        if missing or fraction or no_list:
            raise ConfigError(f"{dotted}: expected {_kind(hints[key])}, got {_shown(value)}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(options), section))
    except OmegaConfBaseException as error:
        field = re.split(r"\W", str(error.full_key or ""))[0]
        dotted = ".".join(part for part in (prefix, field) if part)
        if field not in hints or isinstance(error, InterpolationResolutionError):
            text = str(error.msg or error).splitlines()[0]
            raise ConfigError(f"{dotted}: {text}" if dotted else text) from error
        raise ConfigError(
            f"{dotted}: expected {_kind(hints[field])}, got {_shown(section.get(field))}"
        ) from error


def _is_flat_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _kind(hint: Any) -> str:
    """A type in words.

    >>> _kind(int | None)
    'an integer or null'
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = ["null" if each is type(None) else _kind(each) for each in typing.get_args(hint)]
        return " or ".join(kinds)
    if typing.get_origin(hint) is list:
        numbers = typing.get_args(hint) == (float,)
        return "a list of numbers" if numbers else "a list of names such as [a, b]"
    return _KINDS.get(hint, str(hint))


def _shown(value: Any) -> str:
    """A value as YAML would write it in one line.

    >>> _shown("abc"), _shown(None), _shown([1])
    ("'abc'", 'null', '[1]')
    """
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _unknown_key(options: type, prefix: str, key: str) -> str:
    known = [field.name for field in dataclasses.fields(options)]
    if not known:
        return f"unknown config key '{prefix}.{key}': this {prefix} takes no options; remove it"
    near = suggest(key, known)
    hint = near.replace("'", f"'{prefix}.", 1) if near else ""
    return f"unknown config key '{prefix}.{key}': expected one of {', '.join(known)}{hint}"


def _option_types(section: str) -> list[type]:
    """The options dataclasses that a section may hold."""
    if section in _SECTIONS:
        return [_SECTIONS[section]]
    registry = REGISTRIES.get(section)
    return [registry.entry(name).options for name in registry.names()] if registry else []


def _owners(key: str) -> str:
    """`"; did you mean 'partition.alpha'?"` for a key that was written without its section."""
    dotted = [
        f"'{section}.{key}'"
        for section in (*_SECTIONS, *(set(REGISTRIES) - set(_SECTIONS)))
        if any(key in typing.get_type_hints(options) for options in _option_types(section))
    ]
    return f"; did you mean {' or '.join(dotted)}?" if dotted else ""


def _read_experiment(name: str) -> Tree:
    folder = conf_root() / "experiment"
    named = folder / f"{name}.yaml"
    if all(map(FILE_NAME.fullmatch, name.split("/"))) and named.is_file():
        return _read_yaml(named)
    if Path(name).is_file():
        return _read_yaml(Path(name))
    files = folder.rglob("*.yaml")
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
    raise ConfigError(
        f"no experiment '{name}': expected the path of a YAML file, or one of {', '.join(names)}"
        f"{suggest(name, names)}"
    )


def _read_yaml(path: Path) -> Tree:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: expected a YAML file of 'key: value' lines, but reading it failed: {cause}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _parse_overrides(overrides: Sequence[str]) -> Tree:
    """`["rounds=3", "partition.alpha=0.1"]` -> {"rounds": 3, "partition": {"alpha": 0.1}}."""
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides: expected a list of key=value, got the text '{overrides}'; "
            f"use ['{overrides}']"
        )
    tree: Tree = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override '{override}': expected key=value, for example rounds=3")
        try:
            value = _read_value(key, text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is no valid YAML") from error
        _assign(tree, key.split("."), value)
    return tree


def _read_value(key: str, text: str) -> Any:
    """The value of an override, read as YAML; text stays as it was typed (`run_dir=007`)."""
    *sections, leaf = key.split(".")
    types_of = [_Scalars] if not sections else _option_types(".".join(sections))
    hints = [typing.get_type_hints(options).get(leaf) for options in types_of]
    is_text = any(hint in (str, str | None) for hint in hints)
    if is_text and text not in ("", "null", "~") and text[0] not in "'\"":
        return text
    value = yaml.safe_load(text) if text else None
    plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
    is_name = not sections and leaf in GROUPS and not isinstance(value, (str, list, dict))
    return text if not plain or (is_name and value is not None) else value


def _assign(tree: Tree, path: Sequence[str], value: Any) -> None:
    """Set a value in nested mappings; `group=name` and `group.key=value` may come in any order."""
    *sections, leaf = path
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            named = section in GROUPS and isinstance(inner, str)
            inner = tree[section] = {"name": inner} if named else {}
        tree = inner
    before = tree.get(leaf)
    if leaf in GROUPS and isinstance(value, str) and isinstance(before, dict):
        value = {"name": value}
    if leaf in GROUPS and isinstance(before, str) and isinstance(value, dict):
        before = {"name": before}
    if isinstance(before, dict) and isinstance(value, dict):
        value = {**before, **value}
    tree[leaf] = value
