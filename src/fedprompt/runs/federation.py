"""What all methods of an experiment share, and the state that each starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.attacks import attacks
from fedprompt.client.loop import make_fabric
from fedprompt.client.worker import ClientData, WorkerSetup
from fedprompt.config import ExperimentConfig
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import torch_generator
from fedprompt.core.steps import done
from fedprompt.core.types import SHARED, ClientState, Parts, ServerState, Tensors, fresh
from fedprompt.core.words import counted
from fedprompt.data.partition.base import (
    Indices,
    Partitioner,
    WholePartitioner,
    check_none_empty,
    left_out,
    partitioners,
    split_task,
)
from fedprompt.data.partition.mirror import mirror_partition, owned_shares
from fedprompt.data.prefix.cache import FeatureTable, PrefixCache
from fedprompt.data.prefix.whitening import Whitening, add_whitened, whitenings
from fedprompt.data.task import Split, Task, datasets
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.frozen_head import FrozenHead, fit_frozen_head, kept_head
from fedprompt.models.head import build_head
from fedprompt.runs.events import Stage
from fedprompt.runs.starting_head import starting_head
from fedprompt.server import virtual
from fedprompt.server.spread import begin


@dataclasses.dataclass(frozen=True)
class Federation:
    """What all methods of an experiment share: task, backbone, features and partition."""

    task: Task
    backbone: Backbone
    setup: WorkerSetup
    frozen_head: FrozenHead | None = None
    """With `head.mode=frozen`."""
    notes: tuple[str, ...] = ()
    """What the user should read about the data and the cache."""
    whitening: Mapping[str, Whitening] = dataclasses.field(default_factory=dict)
    """With `prompts.whiten=public`, the maps of the queries that prompts are selected by."""
    by_owner: bool = False
    """Whether clients are owners that the data name."""

    @property
    def data(self) -> ClientData:
        """The clients' data."""
        return self.setup.data

    def own_images(self, split: int) -> list[NDArray[np.int64]]:
        """Each client's own images of a held-out split: its owners', where the data name owners and
        the partition goes by them, else a share in the proportions of its training images.

        Args:
            split: its number among those of the workers.
        """
        parts, table, held = self.data.parts, self.data.table, self.setup.splits[split]
        owners = self.task.train.clients
        held_owners = (self.task.test, self.task.validation)[split].clients
        if self.by_owner and owners is not None and held_owners is not None:
            owned = owned_shares(parts, owners, held_owners)
            if owned is not None:
                return owned
        return mirror_partition(parts, table.labels, table.groups, held.labels, held.groups)


def prepare(config: ExperimentConfig) -> Federation:
    """Read the data, compute the frozen prefix once, and partition.

    Raises:
        ConfigError: the data cannot be read or partitioned as asked.
    """
    return done(preparing(config))


def preparing(config: ExperimentConfig) -> Generator[Stage, None, Federation]:
    """The same as `prepare`, and on the way what it is at."""
    yield Stage("reading the data")
    partition, task, parts = divide(config)
    device = torch.device(config.runtime.torch_device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device=cuda: expected a CUDA device where the driver runs, got a machine "
            "without one; set runtime.device=cpu, or runtime.driver_node to a node that has one"
        )
    yield Stage("loading the backbone")
    backbone = load_backbone(config.model, config.cut).to(device)
    cache = PrefixCache(backbone, device, config.cache)
    # No client trains on public images: one table of theirs, and one head, serves for all cuts.
    whole = backbone.cut_at(0)
    public = PrefixCache(whole, device, config.cache) if backbone.cut else cache
    # The order in which they are computed; without a validation split there are two.
    named = {"training": task.train, "validation": task.validation, "test": task.test}
    splits = {name: split for name, split in named.items() if name != "validation" or len(split)}
    tables = []
    for name, split in splits.items():
        tables.append((yield from table_of(cache, split, name)))
    maps = whitenings_of(config, task, public)
    train, *validation, test = add_whitened(tables, maps) if maps else tables
    data = ClientData(train, tuple(parts), task.class_mask)
    runtime = config.runtime
    setup = WorkerSetup(
        config.model,
        data,
        (test, *validation),
        device.type,
        runtime.threads,
        runtime.precision,
        backbone.cut,
    )
    frozen_head = None
    if config.head.mode == "frozen":
        if task.public is None:
            raise ConfigError(
                f"head.mode=frozen: expected a data set with public images to fit the head on, "
                f"got data={task.name}, which has none; use head.mode=shared"
            )
        if config.cache.enabled:  # so that one sees how far it is
            yield from table_of(public, task.public, "public")
        yield Stage(f"fitting the head on {len(task.public)} public images")
        frozen_head = fit_or_find_head(config, whole, public, task.public, task.num_classes)
    about_cache = dict.fromkeys((*cache.notes, *public.notes))
    notes = (*task.notes, *left_out(partition, parts), *about_cache)
    # From here on; what is cached is exact.
    backbone.autocast = make_fabric(device.type, runtime.precision).autocast
    by_owner = isinstance(partition, WholePartitioner) and partition.by_owner
    return Federation(task, backbone, setup, frozen_head, notes, maps, by_owner)


def check_attack(config: ExperimentConfig, task: Task) -> None:
    """Refuse an attack on classes that the data do not have.

    Raises:
        ConfigError: there is no such class.
    """
    if config.attackers:
        attack = attacks.create(config.attack.name, **dataclasses.asdict(config.attack.options))
        nobody = np.zeros(0, dtype=np.int64)
        attack.labels(nobody, nobody, task.class_mask)


def divide(config: ExperimentConfig) -> tuple[Partitioner, Task, list[Indices]]:
    """The partitioner, the task, and the rows of its training split that each client holds.

    Raises:
        ConfigError: the data cannot be read or partitioned as asked.
    """
    partition = partitioners.create(
        config.partition.name, **dataclasses.asdict(config.partition.options)
    )
    task = datasets.create(config.data.name, **dataclasses.asdict(config.data.options))
    if task.num_classes < 2:
        raise ConfigError(
            f"data={task.name}: expected at least two classes, got "
            f"{', '.join(map(repr, task.class_names)) or 'none'}; give each class a folder or a "
            "label of its own"
        )
    check_attack(config, task)
    parts = split_task(partition, task, config.clients.count, config.seed)
    check_none_empty(parts)
    return partition, task, parts


def table_of(cache: PrefixCache, split: Split, name: str) -> Generator[Stage, None, FeatureTable]:
    """The feature table of a split, and how far it is if it has to be computed.

    Args:
        cache: of the backbone.
        split: of the task.
        name: what its images are called.
    """
    steps = cache.steps(split)
    while True:
        try:
            count = next(steps)
        except StopIteration as end:
            table: FeatureTable = end.value
            return table
        yield Stage(f"computing the frozen prefix of {name} images", count, len(split))


def whitenings_of(config: ExperimentConfig, task: Task, cache: PrefixCache) -> dict[str, Whitening]:
    """The maps of whitened queries that the method or one it is compared with selects by.

    Args:
        config: of the leading method, with the names of its rivals.
        task: whose public images say how queries spread.
        cache: holds the queries of public images.

    Raises:
        ConfigError: one is to select by them, and there are no public images.
    """
    variants = [config, *map(config.with_method, config.compare)]
    options = [each.prompts for each in variants if each.prompts.selects_by_whitened]
    if not options:
        return {}
    if task.public is None:
        raise ConfigError(
            f"prompts.whiten=public: expected a data set with public images to whiten queries by, "
            f"got data={task.name}, which has none; set prompts.whiten=clients or false"
        )
    kinds = {each.query_kind: each.query for each in options}
    return whitenings(cache.table(task.public), kinds)


def fit_or_find_head(
    config: ExperimentConfig,
    backbone: Backbone,
    cache: PrefixCache,
    public: Split,
    num_classes: int,
) -> FrozenHead:
    """The frozen head of a backbone, from public images or from the cache's folder.

    Args:
        config: says how to fit.
        backbone: on whose features the head stands.
        cache: holds the features, and heads of earlier runs.
        public: the images to fit on.
        num_classes: outputs of the head.
    """

    def fit() -> FrozenHead:
        table = cache.table(public)
        return fit_frozen_head(backbone, table, num_classes, cache.device, config.head.fit)

    if not config.cache.enabled:
        return fit()
    recipe = {**cache.recipe(public), "classes": num_classes, "fit": config.head.fit}
    head, note = kept_head(cache.folder, recipe, fit)
    cache.notes += [note] if note else []
    return head


def initial_state(config: ExperimentConfig, federation: Federation) -> ServerState:
    """The state before the first round: drawn prompts, drawn unit keys, an untrained head or the
    frozen one, the untouched backbone.

    What is personal is fixed: clients begin with it, and the server never changes it.
    """
    recipe = config.recipe(federation.task.num_classes)
    objective, maker = recipe.build_objective(), config.build_generator()
    drawn = initial_parts(config, federation)
    fixed = drawn.pick(recipe.personal | ({"head"} if recipe.head.mode == "frozen" else set()))
    shared = drawn.pick(set(SHARED) - {part for part, _, _ in fixed.labelled()})
    values, keys = initial_prompts(config, federation)
    if "prompts" in recipe.personal:
        fixed = dataclasses.replace(fixed, prompts=values)
        values, keys = values[:0], keys[:0]
    keeps_rows = config.keeps_rows and len(values) > 0
    trainable = dataclasses.replace(shared, prompts=values if keeps_rows else None)
    shared = dataclasses.replace(shared, objective=objective.begin(trainable))
    starts = objective.remembered(dataclasses.replace(shared, prompts=values))
    memory: Tensors = {}
    if maker is not None:
        draws = torch_generator(config.seed, "initial generator")
        memory = maker.begin(values, config.clients.count, draws)
        values = maker.consensus(memory)
    spread = begin(keys) if config.prompts.tells_spread else {}
    return ServerState(
        0,
        values,
        keys,
        shared,
        generator=memory,
        spread=spread,
        system=virtual.begin(config.system.enabled),
        fixed=ClientState(fixed, starts),
    )


def initial_parts(config: ExperimentConfig, federation: Federation) -> Parts:
    """All that is trained beside the prompts, and a frozen head.

    The head is drawn apart from the prompts, so that all methods of a seed start from the same one.
    """
    prompts, backbone = config.prompts, federation.backbone
    recipe = config.recipe(federation.task.num_classes)
    generator = torch_generator(config.seed, "initial head")
    head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, generator)
    tensors = {name: fresh(value) for name, value in head.named_parameters()}
    if config.solves_first:
        tensors = dict(
            starting_head(recipe.head.start, federation.data, recipe.num_classes).tensors
        )
    if federation.frozen_head is not None and recipe.head.mode == "frozen":
        tensors = federation.frozen_head.tensors
    projection = None
    if prompts.selection == "l2p" and prompts.count:
        query_dim = federation.data.table.queries(prompts.query_kind).shape[1]
        projection = torch.eye(backbone.embed_dim, query_dim)
    draws = torch_generator(config.seed, "initial tuning")
    return Parts(
        query_projection=projection,
        head=tensors,
        adaptation=recipe.build_tuning().initial(backbone, draws),
    )


def initial_prompts(config: ExperimentConfig, federation: Federation) -> tuple[Tensor, Tensor]:
    """The drawn prompts (n, d) and their unit keys (n, q); q = 0 where keys do not travel."""
    prompts, backbone = config.prompts, federation.backbone
    width = prompts.width(backbone.embed_dim, len(backbone.upper_blocks))
    query_dim = federation.data.table.queries(prompts.query_kind).shape[1]
    generator = torch_generator(config.seed, "initial prompts")
    values = torch.randn(prompts.pool_size, width, generator=generator) * prompts.init_std
    keys = F.normalize(torch.randn(prompts.pool_size, query_dim, generator=generator), dim=1)
    return values, keys if prompts.sends_keys else keys[:, :0]


def describe(federation: Federation, config: ExperimentConfig) -> str:
    """One line about data and clients."""
    sizes = np.array([len(part) for part in federation.data.parts])
    task = federation.task
    cut = federation.backbone.cut
    place = f", prompts before block {cut} of {federation.backbone.depth}" if cut else ""
    return (
        f"{task.name}: {len(task.train)} train / {len(task.validation)} validation / "
        f"{len(task.test)} test images of {task.num_classes} classes; "
        f"{counted(len(sizes), 'client')} ({config.partition.name}) with "
        f"{sizes.min()}-{sizes.max()} images, {config.clients.cohort_size} a round; "
        f"frozen backbone {config.model.backbone}{place}"
    )
