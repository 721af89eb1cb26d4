"""Every preset of conf/method runs, and methods that must agree do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import fedprompt
from fedprompt.aggregation import aggregators
from fedprompt.client.module import ClientModule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose, conf_root, load_group
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import (
    Broadcast,
    ClientJob,
    ClientState,
    ClientUpdate,
    Parts,
    RoundReport,
    ServerState,
)
from fedprompt.models.head import build_head
from fedprompt.objectives.scaffold import Scaffold
from fedprompt.runs.driver import evaluator, settings_of
from fedprompt.runs.events import Note, PhaseStarted
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.evaluate import Piece, Tally, measure_piece
from fedprompt.server.round import RoundSettings, make_jobs, run_rounds
from fedprompt.server.traffic import count_bytes

Overrides = Callable[..., list[str]]
METHODS = sorted(path.stem for path in (conf_root() / "method").glob("*.yaml"))
PLACEMENTS = ("pool", "shallow", "deep")
LISTED = [
    "pfpt",
    "fedavg_pt",
    "fedprox_pt",
    "scaffold_pt",
    "moon_pt",
    "fedopt_pt",
    "gmm_pt",
    "pfedpg",
    "pfpt_plus",
    "fedavg_pt_plus",
    "fedprox_pt_plus",
    "scaffold_pt_plus",
    "fedopt_pt_plus",
    "gmm_pt_plus",
    "pfedpg_plus",
    "head_only",
    "local_only",
    "centralised",
    "centralised_full",
    "full_fedavg",
    "full_fedprox",
    "fedncm",
    "fedcof",
    "adapter_fedavg",
    "adapter_fedprox",
    "lora_fedavg",
    "lora_fedprox",
]


@dataclasses.dataclass(frozen=True)
class Laid:
    """An experiment laid open."""

    config: ExperimentConfig
    federation: Federation
    settings: RoundSettings
    worker: ClientWorker
    state: ServerState
    updates: list[ClientUpdate] = dataclasses.field(default_factory=list)

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        for job in jobs:
            self.updates.extend(self.worker.train(recipe, [job]))
            yield self.updates[-1]

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        return lambda: [measure_piece(self.worker, recipe, piece) for piece in pieces]

    def play(self, rounds: int = 1) -> tuple[ServerState, list[RoundReport]]:
        aggregator = aggregators.create(
            self.config.aggregator.name, **dataclasses.asdict(self.config.aggregator.options)
        )
        measure = evaluator(self, self.federation, self.settings, self.config.measures_clients)
        settings = dataclasses.replace(self.settings, rounds=rounds)
        played = list(run_rounds(self.state, settings, self, aggregator, measure))
        return played[-1][0], [report for _, report in played]


FEDERATIONS: dict[tuple[object, ...], Federation] = {}


@pytest.fixture
def lay(tiny: Overrides) -> Callable[..., Laid]:
    def make(*overrides: str) -> Laid:
        config = compose("digits", tiny("eval_every=9", *overrides))  # the last is evaluated
        key = (config.data, config.clients.count, config.partition.name)
        if key not in FEDERATIONS:
            FEDERATIONS[key] = prepare(config)
        federation = FEDERATIONS[key]
        settings = settings_of(config, federation)
        state = initial_state(config, federation)
        return Laid(config, federation, settings, ClientWorker(federation.setup), state)

    return make


def flat(state: ServerState) -> dict[str, torch.Tensor]:
    """Prompts and shared tensors without what an objective or aggregator adds."""
    return state.received().trained().tensors()


def assert_equal_bits(left: ServerState, right: ServerState) -> None:
    one, two = flat(left), flat(right)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def method(name: str) -> list[str]:
    """Overrides that pick a preset over those of `tiny`, which sets prompts and rounds itself."""
    preset = load_group("method", name)
    overrides = [f"method={name}"]
    if preset["prompts"].get("count") == 0:
        overrides.append("prompts.count=0")
    elif preset["prompts"]["selection"] != "all":
        overrides.append("prompts.pool=4")
    if preset.get("rounds") == 1:
        overrides += ["rounds=1", "clients.per_round=null"]
    return overrides


# Presets


def test_all_listed_methods_are_there() -> None:
    assert sorted(LISTED) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_names_its_source(name: str) -> None:
    lines = (conf_root() / "method" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"# .{20,}\.", lines[0])
    assert re.fullmatch(r"# Source: [A-Z]\w+ .{10,}, [A-Z].* (19|20)\d\d\b.*", lines[1])


@pytest.mark.figures
@pytest.mark.parametrize("name", METHODS)
def test_every_preset_runs(tiny: Overrides, name: str) -> None:
    result = fedprompt.run("digits", tiny("clients.per_round=2", "eval_every=2", *method(name)))
    last = result.reports[-1]
    personal = name == "local_only"
    assert (last["accuracy"] is None) == personal
    assert result.summary["rounds"] == (1 if name in ("fedncm", "fedcof") else 2)
    assert 0 < last["personalised"]["test"]["mean"] <= 1
    assert last["quarantined"] == []
    assert (last["bytes_up"] == 0) == personal
    assert result.summary["method"] == name


def test_a_comparison_does_not_inherit_what_the_main_method_set(tiny: Overrides) -> None:
    main = compose("digits", tiny("method=scaffold_pt"))
    other = main.with_method("fedavg_pt")
    plain = compose("digits", tiny("method=fedavg_pt"))
    assert dataclasses.replace(other, name=plain.name, run_dir=plain.run_dir) == plain


# Every pair of an objective and an aggregator, and every pair of either with a placement.
@pytest.mark.parametrize(
    ("objective", "aggregator", "placement"),
    [
        (objective, aggregator, PLACEMENTS[(row + column) % 3])
        for row, objective in enumerate(("plain", "proximal", "scaffold"))
        for column, aggregator in enumerate(("pfpt", "mean", "server_opt", "gmm"))
    ],
)
def test_aggregator_objective_and_placement_combine(
    lay: Callable[..., Laid], objective: str, aggregator: str, placement: str
) -> None:
    selection = "keyed" if placement == "pool" else "all"
    laid = lay(
        f"objective={objective}",
        f"aggregator={aggregator}",
        f"prompts.placement={placement}",
        f"prompts.selection={selection}",
        "clients.per_round=2",
        "eval_clients=never",
        "eval_every=3",
        "rounds=3",
    )
    state, _ = laid.play()
    assert state.prompts.isfinite().all()
    assert state.prompts.shape[1] == 128 * (5 if placement == "deep" else 1)
    assert ("prompts" in state.shared.objective) == (
        objective == "scaffold" and aggregator in ("mean", "server_opt")
    )


def test_a_server_optimiser_leaves_control_variates_alone(lay: Callable[..., Laid]) -> None:
    common = ("method=scaffold_pt", "clients.per_round=2", "eval_clients=never", "rounds=1")
    plain, _ = lay(*common).play()
    adam, _ = lay(*common, "aggregator=server_opt", "aggregator.rule=adam").play()
    assert not torch.equal(plain.shared.head["0.weight"], adam.shared.head["0.weight"])
    assert plain.shared.objective
    for name, variate in plain.shared.objective.items():
        assert torch.equal(variate, adam.shared.objective[name])
    trained = {"prompts", *(f"shared.{path}" for path in adam.shared.trained().tensors())}
    assert {key.rpartition(".")[0] for key in adam.aggregator} == trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=scaffold", "clients.optimizer=adam"], "expected clients.optimizer=sgd"),
        (["objective=closed_form"], "method=fedcof sets them"),
        (
            ["generator=pfedpg", "prompts.selection=keyed"],
            "generator=pfedpg: makes prompts and no keys",
        ),
        (["prompts.placement=none"], "prompts.placement=none: expected prompts.count=0, got 2"),
        (
            ["prompts.placement=shallow", "prompts.selection=keyed"],
            "expected prompts.selection=all, got 'keyed'",
        ),
        (
            ["prompts.mode=personal", "prompts.selection=keyed"],
            "expected prompts.selection=all, got 'keyed'",
        ),
        (["method=head_only", "prompts.count=2"], "head_only trains the head alone, expected 0"),
        (["method=head_only", "prompts.count=0", "generator=pfedpg"], "expected prompts.count > 0"),
        (["method=pfedpg", "aggregator=gmm"], "with generator=pfedpg the server merges none"),
        (["method=local_only", "aggregator=pfpt"], "prompts.mode=personal the server merges none"),
        (["method=head_only", "prompts.count=0", "aggregator=pfpt"], "expected aggregator=mean or"),
        (["eval_clients=lats"], "did you mean 'last'"),
        (["clients.optimizer=sgdd"], "did you mean 'sgd'"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tiny: Overrides, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose("digits", tiny(*overrides))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=fedavg_pt_plus"], True),
        (["method=fedavg_pt_plus", "prompts.pool=3"], False),
        (["method=fedavg_pt"], False),
        (["method=pfpt", "prompts.selection=keyed"], False),  # its pool grows
        (["method=pfpt_plus"], False),
        (["method=gmm_pt_plus"], True),  # as many components as were broadcast
        (["method=gmm_pt_plus", "aggregator.max_components=9"], False),
    ],
)
def test_a_pool_without_choice_is_known(
    tiny: Overrides, overrides: list[str], expected: bool
) -> None:
    assert compose("digits", tiny(*overrides)).selects_in_vain == expected


class Stop(Exception):
    """Ends a run before its first round."""


def test_a_pool_without_choice_is_said(tiny: Overrides) -> None:
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if isinstance(event, PhaseStarted):
            raise Stop

    with pytest.raises(Stop):
        fedprompt.run("digits", tiny("method=fedavg_pt_plus"), on_event=listen)
    assert any("nothing to select" in note for note in notes)


# Methods that must agree


def test_fedprox_without_weight_is_fedavg(lay: Callable[..., Laid]) -> None:
    plain, _ = lay("method=fedavg_pt").play(2)
    zero, _ = lay("method=fedprox_pt", "objective.mu=0").play(2)
    assert_equal_bits(plain, zero)


@pytest.mark.parametrize(
    "neutral",
    [
        ["method=moon_pt", "objective.mu=0"],
        ["method=fedavg_pt", "objective=label_smoothing", "objective.smoothing=0"],
    ],
)
def test_a_loss_whose_own_term_has_no_weight_is_fedavg(
    lay: Callable[..., Laid], neutral: list[str]
) -> None:
    plain, _ = lay("method=fedavg_pt", "clients.per_round=6").play(2)
    zero, _ = lay(*neutral, "clients.per_round=6").play(2)
    assert plain.sha256() == zero.sha256()


def test_scaffold_with_zero_variates_is_fedavg(lay: Callable[..., Laid]) -> None:
    rates = ["prompts.lr=0.3", "head.lr=0.1"]
    laid = lay("method=scaffold_pt", *rates)
    head = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert set(laid.state.shared.objective) == {"prompts", *(f"head.{name}" for name in head)}
    plain, _ = lay("method=fedavg_pt", "clients.optimizer=sgd", *rates).play()
    scaffold, _ = laid.play()
    assert_equal_bits(plain, scaffold)
    assert all(bool(value.any()) for value in scaffold.shared.objective.values())


def test_released_scaffold_starts_from_what_a_client_last_saw(lay: Callable[..., Laid]) -> None:
    """Against its definition: the published variant's clients, put where they begin."""
    common = ("method=scaffold_pt", "clients.per_round=2", "eval_clients=never")
    released, _ = lay(*common, "objective.variant=released").play(4)
    laid = lay(*common)
    number = laid.config.clients.count
    server = flat(laid.state)
    controls = {name: torch.zeros_like(value) for name, value in server.items()}
    seen, own = dict.fromkeys(range(number), server), dict[int, Any]()
    cohorts: list[list[int]] = []
    for round_index in range(4):
        state = dataclasses.replace(laid.state, round_index=round_index)
        moves, changes = [], []
        for job in make_jobs(state, laid.settings):
            client = job.client_id
            start = Parts.from_tensors(seen[client])
            shared = dataclasses.replace(start, prompts=None, objective=controls)
            begin = dataclasses.replace(job.broadcast, prompts=start.prompts, shared=shared)
            state_of_client = own.get(client, ClientState())
            moved = dataclasses.replace(job, broadcast=begin, state=state_of_client)
            (update,) = laid.worker.train(laid.settings.recipe, [moved])
            end = {"prompts": update.prompts, **update.shared.tensors()}
            moves.append({name: end[name] - value for name, value in seen[client].items()})
            changes.append(update.shared.objective)
            own[client] = update.state
        server = {name: x + sum(move[name] for move in moves) / 2 for name, x in server.items()}
        controls = {
            name: c + sum(change[name] for change in changes) / number
            for name, c in controls.items()
        }
        cohorts.append([job.client_id for job in make_jobs(state, laid.settings)])
        seen.update(dict.fromkeys(cohorts[-1], server))
    # Somebody came back after a round without it.
    assert any(set(cohorts[n]) & set(cohorts[n + 2]) - set(cohorts[n + 1]) for n in range(2))
    for there, here in ((flat(released), server), (released.shared.objective, controls)):
        assert there.keys() == here.keys()
        for name, value in here.items():
            torch.testing.assert_close(there[name], value, atol=1e-5, rtol=1e-4)


def test_released_scaffold_with_all_clients_is_the_published_one_with_equal_weights(
    lay: Callable[..., Laid], monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = ("method=scaffold_pt", "clients.per_round=null", "eval_clients=never")
    released, _ = lay(*everybody, "objective.variant=released").play(2)
    published, _ = lay(*everybody).play(2)
    assert (published.prompts - released.prompts).abs().max() > 1e-4
    monkeypatch.setattr(Scaffold, "weights", lambda self, counts: [1.0] * len(counts))
    equal, _ = lay(*everybody).play(2)
    for name, value in flat(equal).items():
        torch.testing.assert_close(flat(released)[name], value, atol=1e-5, rtol=1e-4)


def test_server_optimiser_without_momentum_is_fedavg(lay: Callable[..., Laid]) -> None:
    plain, _ = lay("method=fedavg_pt").play(2)
    same, _ = lay("method=fedavg_pt", "aggregator=server_opt").play(2)
    assert_equal_bits(plain, same)


def test_first_round_of_pfedpg_is_fedavg(lay: Callable[..., Laid]) -> None:
    """Its output projection starts at zero, and the base prompts' part of the step is the mean."""
    plain, _ = lay("method=fedavg_pt").play()
    generated, _ = lay("method=pfedpg", "generator.lr=1").play()
    torch.testing.assert_close(generated.generator["base"], plain.prompts, atol=1e-6, rtol=1e-5)
    assert bool(generated.generator["output"].any())
    for name, value in plain.shared.tensors().items():
        assert torch.equal(generated.shared.tensors()[name], value)


def test_one_client_with_all_data_is_centralised(lay: Callable[..., Laid]) -> None:
    alone, _ = lay(
        "method=fedavg_pt", "clients.count=1", "clients.per_round=1", "partition=iid"
    ).play()
    pooled_laid = lay("method=centralised")
    pooled, _ = pooled_laid.play()
    assert [update.num_examples for update in pooled_laid.updates] == [
        len(pooled_laid.federation.task.train)
    ]
    assert_equal_bits(alone, pooled)


def test_deep_prompts_of_zero_length_are_plain_and_others_are_not(
    lay: Callable[..., Laid],
) -> None:
    backbone = lay().worker.backbone
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 17, 128, generator=generator)
    rows = torch.randn(2, 5 * 128, generator=generator)
    plain = backbone.encode(tokens)
    assert torch.equal(backbone.encode(tokens, rows[:0]), plain)
    deep = backbone.encode(tokens, rows)
    shallow = backbone.encode(tokens, rows[:, :128])
    assert not torch.allclose(deep, plain)
    assert not torch.allclose(deep, shallow)
    # Every part counts, up to the last block.
    for block in range(5):
        changed = rows.clone()
        changed[:, block * 128 : (block + 1) * 128] *= -1
        assert not torch.allclose(backbone.encode(tokens, changed), deep), block
    one_each = backbone.encode(tokens, rows.expand(3, -1, -1))
    torch.testing.assert_close(one_each, deep)


# What stays with the client


def test_personal_heads_never_leave_the_client(lay: Callable[..., Laid]) -> None:
    laid = lay("method=fedavg_pt", "head.mode=personal", "clients.per_round=6")
    state, reports = laid.play(2)
    assert len(laid.updates) == 12
    for update in laid.updates:
        assert not update.shared.tensors()
        assert set(update.state.tensors()) == {
            f"head.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")
        }
    for job in make_jobs(state, laid.settings):
        assert not job.broadcast.shared.tensors()
    start = laid.state.fixed.kept.head["0.weight"]
    own = [state.clients[client].kept.head["0.weight"] for client in range(6)]
    assert not any(torch.equal(one, start) for one in own)
    assert not torch.equal(own[0], own[1])
    # The second round went on from the first one's head.
    module = ClientModule(
        laid.settings.recipe,
        laid.worker.backbone,
        make_jobs(state, laid.settings)[0],
        laid.federation.data.class_mask,
    )
    assert torch.equal(module.head[0].weight.detach(), own[0])
    # Prompts alone travel: 2 of 128 numbers, 6 clients.
    assert [report.bytes_up for report in reports] == [6 * 2 * 128 * 4] * 2


def test_local_only_sends_nothing_and_goes_on_alone(lay: Callable[..., Laid]) -> None:
    laid = lay("method=local_only", "clients.per_round=6")
    state, reports = laid.play(2)
    assert all(not update.shared.tensors() and not len(update.prompts) for update in laid.updates)
    assert [(report.bytes_up, report.bytes_down) for report in reports] == [(0, 0)] * 2
    first, second = laid.updates[0], laid.updates[6]
    assert first.client_id == second.client_id == 0
    assert not torch.equal(first.state.kept.prompts, second.state.kept.prompts)
    assert torch.equal(state.clients[0].kept.prompts, second.state.kept.prompts)
    assert reports[-1].personalised["test"]["clients"] > 0


# Bytes


def test_bytes_of_fedavg_pt_are_the_published_count(lay: Callable[..., Laid]) -> None:
    """20 prompts of 768 numbers and a linear head of 100 classes, both ways, 10 clients and 120
    rounds: 884,736,000 bytes.
    """
    config = compose(
        "digits", ["method=fedavg_pt", "head=linear", "prompts.count=20", "compare=[]"]
    )
    head = build_head(config.head, 768, 100, torch.Generator())
    shared = Parts(head={name: value.detach() for name, value in head.named_parameters()})
    prompts, rows = torch.zeros(20, 768), torch.arange(20)
    keys = torch.zeros(20, 768 if config.prompts.sends_keys else 0)
    job = ClientJob(0, 1, 0, Broadcast(prompts, keys, shared))
    update = ClientUpdate(0, 1, 1, prompts, keys, rows, rows, shared)
    jobs, updates = [job] * 10, [update] * 10
    assert 120 * sum(count_bytes(config.recipe(100), jobs, updates)) == 884_736_000
    # A run counts by the same formula.
    _, reports = lay("method=fedavg_pt", "head=linear").play(2)
    counted = sum(report.bytes_up + report.bytes_down for report in reports)
    assert counted == 2 * 4 * (2 * 128 + 10 * 128) * 3 * 2


@pytest.mark.parametrize(
    "name", ["scaffold_pt", "lora_fedavg", "fedcof", "pfpt", "pfpt_plus", "pfedpg"]
)
def test_bytes_are_the_sum_of_what_travels(lay: Callable[..., Laid], name: str) -> None:
    laid = lay(*method(name))
    _, [report] = laid.play()
    keyed = name == "pfpt"
    up = 0
    for update in laid.updates:
        tensors = [update.prompts, *update.shared.tensors().values()]
        if keyed:
            tensors += [update.keys]
        if name.startswith("pfpt"):  # selected: which rows, and how often
            tensors += [update.origins, update.use_counts]
        up += sum(tensor.nbytes for tensor in tensors)
    down = 0
    for job in make_jobs(laid.state, laid.settings):
        tensors = [job.broadcast.prompts, *job.broadcast.shared.tensors().values()]
        down += sum(tensor.nbytes for tensor in [*tensors, job.broadcast.keys])
    assert (report.bytes_up, report.bytes_down) == (up, down)
