"""A checked experiment, and the same experiment with another method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from fedprompt.aggregation import Aggregator, aggregators
from fedprompt.attacks import attackers_of, attacks
from fedprompt.client.recipe import LocalRecipe, TrainingOptions, has_global_model
from fedprompt.config.groups import (
    LISTS,
    REGISTRIES,
    SECTIONS,
    Choice,
    Scalars,
    choice_of,
    choices_of,
    owners,
)
from fedprompt.config.layers import Sources, difference, flatten, merge, rival
from fedprompt.config.typed import Tree, section, typed
from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.data.prefix.cache import CacheOptions
from fedprompt.defences import Defence, defences
from fedprompt.models.head import HeadOptions
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import SELECTIONS, PromptOptions
from fedprompt.objectives import Objective, objectives
from fedprompt.prompt_generators import PromptGenerator, generators
from fedprompt.runtime.base import RuntimeOptions
from fedprompt.server.privacy import Accountant, PrivacyOptions
from fedprompt.server.virtual import SystemOptions

WHEN = ("last", "every", "never")


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
    eval_alone: str
    """When the global model is measured once more with prompts that each test image selects by
    itself: after the `last` round, at `every` evaluation, or `never`."""
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
    defence: Choice
    attack: Choice
    runtime: RuntimeOptions
    model: ModelOptions
    head: HeadOptions
    prompts: PromptOptions
    clients: TrainingOptions
    cache: CacheOptions
    system: SystemOptions
    privacy: PrivacyOptions
    loggers: tuple[Choice, ...]
    """Who gets the figures of each round, beside `rounds.jsonl`; see `tracking.loggers`."""
    callbacks: tuple[Choice, ...]
    """What is called after each round and may stop the run; see `tracking.callbacks`. Those of
    `clients.callbacks` are Lightning's, and called in each client's fit."""
    sources: Sources = dataclasses.field(default_factory=Sources, compare=False, repr=False)
    """What it was composed of; comparisons are composed of the same."""

    def __post_init__(self) -> None:
        check_integer("rounds", self.rounds, 1)
        check_integer("eval_every", self.eval_every, 1)
        check_integer("seed", self.seed, 0)
        for key in ("eval_clients", "eval_alone"):
            check_choice(key, getattr(self, key), WHEN)
        self._check_method()
        bound = getattr(self.aggregator.options, "max_prompts", 0)
        if 0 < bound < self.prompts.count:
            raise ConfigError(
                f"aggregator.max_prompts: expected 0 (no bound) or at least prompts.count "
                f"({self.prompts.count}), got {bound}"
            )
        names = [choice.name for choice in self.loggers]
        if len(set(names)) < len(names):
            raise ConfigError(f"loggers: expected each logger once, got {', '.join(names)}")
        if len(set(self.compare)) < len(self.compare):
            raise ConfigError(f"compare: expected each method once, got {', '.join(self.compare)}")

    def _check_method(self) -> None:
        """Refuse plug-ins that do not fit together."""
        objective = objectives.entry(self.objective.name).factory
        preset = section(self._preset.get("prompts"), "prompts")
        if self.prompts.count == 0 and preset.get("count") != 0:
            raise ConfigError(
                f"prompts.count: {self.method} needs at least 1 prompt, got 0; "
                "method=head_only trains the head alone"
            )
        bare = not self.needs_tokens
        if bare and self.head.mode == "frozen":
            raise ConfigError(
                "head.mode=frozen: with prompts.count=0 nothing is left to train; "
                "use head.mode=shared, or a method with prompts such as method=fedavg_pt"
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
        if bare and getattr(objective, "compares_features", False):
            raise ConfigError(
                f"objective={self.objective.name}: compares features of two models, and with "
                "prompts.count=0 and tuning=none nothing changes them; use objective=plain, or a "
                "method with prompts such as method=moon_pt"
            )
        self._check_prompts()
        self._check_aggregator()
        self._check_trust(getattr(objective, "trains", True))
        if self.system.asynchronous:
            self._check_asynchronous()
        leaks = self._leaks() if self.privacy.enabled else []
        if leaks:
            raise ConfigError(f"privacy.unit={self.privacy.unit} does not cover {'; '.join(leaks)}")

    def _check_asynchronous(self) -> None:
        """Refuse an asynchronous schedule where a stale update cannot be moved to another model."""
        schedule = f"system.schedule={self.system.schedule}"
        buffer = self.system.buffer or 1
        if buffer > self.clients.cohort_size:
            raise ConfigError(
                f"system.buffer: expected at most clients.per_round ({self.clients.cohort_size}), "
                f"as no more clients are at work, got {buffer}"
            )
        if self.generator.name != "none":
            raise ConfigError(
                f"{schedule}: expected prompts that the server holds, got generator="
                f"{self.generator.name}; use generator=none, or system.schedule=rounds"
            )
        if self.prompts.count > 0 and self.prompts.mode == "shared" and not self.keeps_rows:
            raise ConfigError(
                f"{schedule}: needs prompts of which row i is the same in every round, and with "
                f"aggregator={self.aggregator.name} it is not; use aggregator=mean or server_opt"
            )
        factory = objectives.entry(self.objective.name).factory
        if getattr(factory, "combine", None) is not Objective.combine:
            raise ConfigError(
                f"{schedule}: needs an objective without a server half, got objective="
                f"{self.objective.name}; use objective=plain or prox, or system.schedule=rounds"
            )

    def _leaks(self) -> list[str]:
        """What would say something of clients' images beside their noisy updates, with remedies."""
        objective, leaks = objectives.entry(self.objective.name).factory, []
        server = ("begin", "reply", "combine")
        own = any(getattr(objective, each) is not getattr(Objective, each) for each in server)
        if not getattr(objective, "trains", True):
            leaks.append(
                f"the class sums and counts of objective={self.objective.name}; use a method that "
                "trains, such as method=fedavg_pt"
            )
        elif own:
            leaks.append(
                f"the objective's own tensors of objective={self.objective.name}, such as control "
                "variates; use objective=plain"
            )
        if self.head.start != "drawn":
            leaks.append(f"the class sums of head.start={self.head.start}; set head.start=drawn")
        if self.prompts.count and self.prompts.selection != "all":
            keys = "mean queries (keys), " if self.prompts.sends_keys else ""
            spread = "scatters of queries (prompts.whiten=clients), "
            leaks.append(
                f"{keys}{spread if self.prompts.tells_spread else ''}origins and use counts of "
                f"prompts.selection={self.prompts.selection}; set prompts.selection=all"
            )
        if not has_global_model(self.prompts, self.head):
            leaks.append(
                "the figures of personal models; use a method whose prompts and head are shared"
            )
        if self.eval_clients != "never":
            leaks.append(
                f"the figures of each client of eval_clients={self.eval_clients}, on images in "
                "proportion to its own; set eval_clients=never"
            )
        if self.system.enabled:
            leaks.append("who is late, which depends on numbers of images; leave system as it is")
        return leaks

    def _check_trust(self, trains: bool) -> None:
        """Refuse a defence that is not defined for what travels, and attacks of nobody.

        Args:
            trains: whether clients send trained tensors.
        """
        _ = self.attackers
        defence = self.build_defence()
        if not defence.acts:
            return
        if not trains:
            raise ConfigError(
                f"defence={self.defence.name}: compares trained tensors, and with objective="
                f"{self.objective.name} clients send sums over their images; use defence=none"
            )
        travels = self.prompts.count > 0 and self.prompts.mode == "shared"
        if travels and not self.keeps_rows and not defence.any_prompts:
            maker = self.generator if self.generator.name != "none" else self.aggregator
            group = "generator" if maker is self.generator else "aggregator"
            raise ConfigError(
                f"defence={self.defence.name}: needs prompts of which row i is the same prompt at "
                f"every client, and with {group}={maker.name} it is not; use defence=clip or krum, "
                "or aggregator=mean or server_opt"
            )
        reason = defence.fault_of_cohort(self.clients.cohort_size)
        if reason is not None:
            raise ConfigError(f"defence={self.defence.name}: {reason}")

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

    @property
    def needs_tokens(self) -> bool:
        """Whether images run through the blocks, so that it matters where prompts enter."""
        return self.recipe(0).needs_tokens

    @property
    def solves_first(self) -> bool:
        """Whether all clients send class sums before the first round, for a head that is trained
        from there on.
        """
        trains = getattr(objectives.entry(self.objective.name).factory, "trains", True)
        return self.head.start != "drawn" and trains

    @property
    def cut(self) -> int:
        """The block before which the prompts of all methods of the run enter, from 0."""
        return next(iter(depths_of([self, *map(self.with_method, self.compare)]).values()), 0)

    def measures_clients(self, round_index: int) -> bool:
        """Whether each client's own model is measured after a round that is evaluated."""
        if self.eval_clients == "never":
            return False
        often = self.eval_clients == "every" or not has_global_model(self.prompts, self.head)
        return often or round_index == self.rounds

    def measures_alone(self, round_index: int) -> bool:
        """Whether each image alone is measured after a round that is evaluated."""
        often = self.eval_alone == "every"
        return often or (self.eval_alone == "last" and round_index == self.rounds)

    def build_aggregator(self) -> Aggregator:
        """The aggregator of the prompts."""
        options = dataclasses.asdict(self.aggregator.options)
        return aggregators.create(self.aggregator.name, **options)

    def build_defence(self) -> Defence:
        """What sees the whole updates before they are merged."""
        return defences.create(self.defence.name, **dataclasses.asdict(self.defence.options))

    @property
    def attackers(self) -> frozenset[int]:
        """The clients that attack.

        Raises:
            ConfigError: the share that is to attack is none of the clients, or all.
        """
        if not getattr(attacks.entry(self.attack.name).factory, "acts", True):
            return frozenset()
        share = getattr(self.attack.options, "share", 0.0)
        return attackers_of(self.seed, self.clients.population, share)

    def build_generator(self) -> PromptGenerator | None:
        """The generator of prompts, if the experiment has one."""
        options = dataclasses.asdict(self.generator.options)
        return generators.create(self.generator.name, **options)

    @property
    def _preset(self) -> Tree:
        return self.sources.read("method", self.method)

    @property
    def label(self) -> str:
        """The method, and the aggregator if it is not the method's own."""
        preset = self._preset.get("aggregator")
        own = preset if isinstance(preset, str) else section(preset, "aggregator").get("name")
        other = self.aggregator.name
        return self.method if own in (None, other) else f"{self.method} (aggregator={other})"

    def tree(self) -> Tree:
        """As plain mappings and values; composing this tree again gives an equal config."""
        tree: Tree = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Choice, Sources)):
                tree[field.name] = value.tree()
            elif field.name in LISTS:
                tree[field.name] = [choice.tree() for choice in value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                tree[field.name] = dataclasses.asdict(value)
            else:
                tree[field.name] = list(value) if isinstance(value, tuple) else value
        return tree

    def to_yaml(self, plugins: Iterable[str] | None = None) -> str:
        """The whole config as YAML, in the order of the fields.

        Args:
            plugins: names to write in place of those that the config has.
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
            attack=self.attack.name,
            attack_options=dataclasses.asdict(self.attack.options),
            attackers=self.attackers,
            privacy=None if self.accountant is None else self.accountant.mechanism,
        )

    @cached_property
    def accountant(self) -> Accountant | None:
        """What the rounds use up of the clients' privacy; None without privacy."""
        if not self.privacy.enabled:
            return None
        clients = self.clients
        return Accountant(
            self.privacy, self.seed, self.rounds, clients.population, clients.cohort_size
        )

    def with_method(self, method: str) -> ExperimentConfig:
        """The same experiment with another method: same data, partition and seed, no folder yet.

        Composed from the sources (see `layers`). Whatever was changed since, by hand in a
        `config.yaml` or by a program, counts as said on the command line.
        """
        sources = rival(self.said, method)
        variant = build(flatten(sources), sources, compared=False)
        return dataclasses.replace(variant, name=f"{self.name}/{method}", run_dir=None)

    @cached_property
    def said(self) -> Sources:
        """The sources that this very config is composed of."""
        composed = build(flatten(self.sources), self.sources, compared=False).tree()
        changes = difference(composed, self.tree())
        for key in ("sources", "name", "compare"):
            changes.pop(key, None)
        command = merge(self.sources.command, changes)
        return Sources(self.sources.experiment, command, self.sources.files)


def build(tree: Tree, sources: Sources | None = None, compared: bool = True) -> ExperimentConfig:
    """Check a composed tree and turn it into dataclasses.

    Args:
        tree: all keys.
        sources: what it was composed of; None stands for the tree itself.
        compared: compose the comparisons as well, so that one that cannot work is not found out
            after the main run.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    tree = dict(tree)
    kept = tree.pop("sources", None)
    if sources is None:
        sources = Sources(tree) if kept is None else Sources.from_tree(kept)
    known = [field.name for field in dataclasses.fields(ExperimentConfig)]
    for key in tree:
        if key not in known:
            hint = owners(key) or suggest(key, known)
            raise ConfigError(
                f"unknown config key '{key}': expected one of {', '.join(known)}{hint}"
            )
    parts: dict[str, Any] = {
        key: choice_of(key, tree.get(key)) for key in REGISTRIES if key not in SECTIONS
    }
    # What `auto` means depends on the data.
    tree["prompts"] = _settled(tree.get("prompts"), parts["data"])
    parts.update({key: typed(options, tree.get(key), key) for key, options in SECTIONS.items()})
    parts.update({key: choices_of(key, tree.get(key)) for key in LISTS})
    parts.update(vars(typed(Scalars, {key: tree[key] for key in _SCALARS if key in tree}, "")))
    for key in ("compare", "plugins"):
        parts[key] = tuple(parts[key])
    config = ExperimentConfig(**parts, sources=sources)
    variants = [config]
    for method in config.compare if compared else ():
        try:
            variants.append(config.with_method(method))
        except ConfigError as error:
            raise ConfigError(f"compare: {method}: {error}") from error
    depths = depths_of(variants)
    if len(set(depths.values())) > 1:
        listed = ", ".join(f"{depth} for {method}" for method, depth in depths.items())
        raise ConfigError(
            "prompts.depth: expected the same for all methods of a run, which share the cached "
            f"features, got {listed}; compare them in runs of their own"
        )
    return config


def depths_of(variants: Iterable[ExperimentConfig]) -> dict[str, int]:
    """`prompts.depth` of each method that has a use for it."""
    return {each.method: each.prompts.depth for each in variants if each.needs_tokens}


_SCALARS = [field.name for field in dataclasses.fields(Scalars)]


def _settled(value: object, data: Choice) -> Tree:
    """The prompts' section with the selection and the whitening that `auto` means."""
    prompts = section(value, "prompts")
    if prompts.get("selection") is not None:
        check_choice("prompts.selection", prompts["selection"], ("auto", *SELECTIONS))
    if prompts.get("selection") == "auto":
        prompts["selection"] = automatic_selection(prompts, data.options)
    if prompts.get("whiten") in (None, "auto"):
        prompts["whiten"] = automatic_whitening(data.options)
    return prompts


def automatic_whitening(data: object) -> str | bool:
    """What `prompts.whiten=auto` means: `clients` where there are several domains, else false.

    Where there is one, groups of clients could only be groups of classes, which cost prompts.

    Args:
        data: options of the data set; those of sets with several domains say `several_domains`.

    >>> automatic_whitening(None)
    False
    """
    return "clients" if getattr(data, "several_domains", False) else False


def automatic_selection(prompts: Mapping[str, object], data: object) -> str:
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
