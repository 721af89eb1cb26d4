"""One round: what clients train, what the server refuses, and what never shares memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from fedprompt import aggregation
from fedprompt.aggregation import Aggregation, AggregationInput
from fedprompt.aggregation.mean import Mean, MeanOptions
from fedprompt.client.loop import FitTrainer, Hooks, fit_batch, only_optimizer
from fedprompt.client.module import Batch, ClientModule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientBatches, ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ClientError, RoundError
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob, ClientState, ClientUpdate, Parts, ServerState
from fedprompt.data.partition.mirror import mirror_partition
from fedprompt.runs.driver import evaluator, settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.evaluate import (
    Evaluation,
    Model,
    Piece,
    Tally,
    measure_piece,
    predict,
    select_for_split,
)
from fedprompt.server.round import RoundSettings, make_jobs, run_rounds
from fedprompt.server.traffic import download_bytes, upload_bytes

Overrides = Callable[..., list[str]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """An experiment laid open."""

    config: ExperimentConfig
    federation: Federation
    recipe: LocalRecipe
    settings: RoundSettings
    worker: ClientWorker
    state: ServerState


class Direct:
    """A runtime that lets a test tamper with the updates."""

    def __init__(
        self,
        worker: ClientWorker,
        tamper: Callable[[ClientUpdate], ClientUpdate] = lambda update: update,
    ) -> None:
        self.worker, self.tamper = worker, tamper
        self.updates: list[ClientUpdate] = []

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        for job in reversed(jobs):  # any order is allowed
            self.updates.append(self.tamper(self.worker.train(recipe, [job])[0]))
            yield self.updates[-1]

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        return lambda: [measure_piece(self.worker, recipe, piece) for piece in pieces]


FEDERATIONS: dict[tuple[object, ...], Federation] = {}


KEYED = "prompts.selection=keyed"
"""Prompts with keys, where the data set alone asks for none."""


@pytest.fixture
def bench(tiny: Overrides) -> Callable[..., Bench]:
    def make(*overrides: str) -> Bench:
        config = compose("digits", tiny(*overrides))
        # Data and partition do not depend on the method: prepared once for all tests.
        key = (config.data, config.clients.count, config.partition.name)
        if key not in FEDERATIONS:
            FEDERATIONS[key] = prepare(config)
        federation = FEDERATIONS[key]
        recipe = config.recipe(federation.task.num_classes)
        return Bench(
            config,
            federation,
            recipe,
            RoundSettings(config.seed, config.rounds, config.eval_every, recipe),
            ClientWorker(federation.setup),
            initial_state(config, federation),
        )

    return make


def play(
    bench: Bench, runtime: Direct | None = None, name: str = "mean"
) -> tuple[ServerState, object]:
    runtime = runtime or Direct(bench.worker)
    rounds = run_rounds(
        bench.state,
        dataclasses.replace(bench.settings, rounds=bench.state.round_index + 1),
        runtime,
        aggregation.create(name),
        evaluator(runtime, bench.federation, bench.settings),
    )
    return next(rounds)


class FakeClock:
    """Shows the seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds: float) -> Callable[[], None]:
        """Start work that others do meanwhile; the result waits for its end."""
        end = self.now + seconds

        def wait() -> None:
            self.now = max(self.now, end)

        return wait


def test_each_second_of_overlapping_rounds_is_counted_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients train 10 s, aggregation takes 1 s, evaluation 4 s beside the next training, and the
    caller needs half a second for each report:

    round 1: trained at 10, aggregated at 11, evaluated and reported at 15
    round 2: started at 11, trained at 21, aggregated at 22, reported at 26
    round 3: started at 22, trained at 32, aggregated at 33, reported at 37
    """
    clock = FakeClock()
    monkeypatch.setattr("fedprompt.server.round.perf_counter", clock)
    b = bench("rounds=3")

    class Beside(Direct):
        def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
            return self.after(clock.job(10), super().map(recipe, jobs))

        def after(
            self, wait: Callable[[], None], updates: Iterator[ClientUpdate]
        ) -> Iterator[ClientUpdate]:
            wait()
            yield from updates

    class Slow(Mean):
        def merge(self, given: AggregationInput) -> Aggregation:
            clock.now += 1
            return super().merge(given)

    def evaluate(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
        wait = clock.job(4)

        def figures() -> tuple[Evaluation, Evaluation]:
            wait()
            return Evaluation(0.5, 1.0), Evaluation(0.25, 2.0)

        return figures

    slow, reports = Slow(MeanOptions()), []
    for state, report in run_rounds(b.state, b.settings, Beside(b.worker), slow, evaluate):
        assert state.round_index == report.round
        assert sum(each.wall_seconds for each in [*reports, report]) == clock.now
        reports.append(report)
        clock.now += 0.5
    assert [report.wall_seconds for report in reports] == [15, 11, 11]
    assert [report.seconds for report in reports] == [
        {"train": 10, "aggregate": 1, "evaluate": 4}
    ] * 3
    assert {report.accuracy for report in reports} == {0.5}


def storages(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}


@pytest.mark.parametrize("name", ["mean", "pfpt"])
def test_backbone_is_unchanged_and_nothing_shares_memory(
    bench: Callable[..., Bench], name: str
) -> None:
    b = bench(KEYED)
    before = b.worker.backbone.checksum()
    old = {key: value.clone() for key, value in b.state.tensors().items()}
    runtime = Direct(b.worker)
    state, _ = play(b, runtime, name)
    assert b.worker.backbone.checksum() == before
    assert b.federation.backbone.checksum() == before
    assert all(torch.equal(old[key], value) for key, value in b.state.tensors().items())
    assert state.round_index == 1
    assert not storages(state.tensors()) & storages(b.state.tensors())
    for update in runtime.updates:
        sent = update.tensors()
        assert not storages(sent) & (storages(state.tensors()) | storages(b.state.tensors()))
        assert not any(tensor.requires_grad for tensor in sent.values())


@pytest.mark.parametrize("selection", ["keyed", "l2p", "all"])
def test_only_prompts_head_and_declared_tensors_get_gradients(
    bench: Callable[..., Bench], selection: str
) -> None:
    b = bench(f"prompts.selection={selection}", "prompts.pool=2")
    job = make_jobs(b.state, b.settings)[0]
    module = ClientModule(b.recipe, b.worker.backbone, job, b.federation.data.class_mask)
    batches = ClientBatches(
        b.federation.data, job.client_id, 8, b.recipe.prompts, torch_generator(0, "batches")
    )
    module.training_step(next(iter(batches)), 0).backward()
    with_gradient = {
        name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()
    }
    expected = {"prompts", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    if selection == "l2p":
        expected.add("projection")
    assert with_gradient == {f"model.{name}" for name in expected}
    assert set(module.trainable().tensors()) == {
        name.replace("projection", "query_projection") for name in expected
    }
    assert all(p.grad is None for p in b.worker.backbone.parameters())


def test_one_client_with_mean_equals_ordinary_training(bench: Callable[..., Bench]) -> None:
    """The whole stack against a bare PyTorch loop: same data, same order, same bits."""
    b = bench(
        "method=fedavg_pt",
        "clients.count=1",
        "clients.per_round=1",
        "clients.epochs=2",
        "head.dropout=0",
        "partition=iid",
    )
    state, _ = play(b)

    job = make_jobs(b.state, b.settings)[0]
    prompts = b.state.prompts.clone().requires_grad_()
    head = {name: value.clone().requires_grad_() for name, value in b.state.shared.head.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [prompts], "lr": b.recipe.prompts.lr},
            {"params": list(head.values()), "lr": b.recipe.head.lr},
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    table, rows = b.federation.data.table, b.federation.data.parts[0]
    generator = torch_generator(job.seed, "batches")
    for _ in range(2):
        order = torch.randperm(len(rows), generator=generator)
        for batch in order.split(b.config.clients.batch_size):
            index = rows[batch.numpy()]
            features = b.worker.backbone.encode(torch.from_numpy(table.tokens[index]), prompts)
            hidden = F.linear(features, head["0.weight"], head["0.bias"])
            logits = F.linear(hidden, head["2.weight"], head["2.bias"])
            loss = F.cross_entropy(logits, torch.from_numpy(table.labels[index]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(state.prompts, prompts.detach())
    for name, value in head.items():
        assert torch.equal(state.shared.head[name], value.detach()), name


@pytest.mark.parametrize(("chooser", "alike"), [("client", True), ("batch", False)])
def test_keyed_selection_goes_by_the_client_or_by_the_batch(
    bench: Callable[..., Bench], chooser: str, alike: bool
) -> None:
    b = bench(f"prompts.choose_by={chooser}", KEYED)
    batches = ClientBatches(
        b.federation.data, 0, 8, b.recipe.prompts, torch_generator(0, "batches")
    )
    means = [queries.mean(dim=0) for _, queries, _, _ in batches]
    assert len(means) > 1
    assert all(torch.allclose(mean, means[0], atol=1e-6) for mean in means) == alike
    own = torch.from_numpy(b.federation.data.table.style[b.federation.data.parts[0]]).mean(dim=0)
    if alike:
        torch.testing.assert_close(means[0], own)


@pytest.mark.parametrize(
    ("overrides", "used", "unused"),
    [
        ([KEYED], "style", "cls"),
        ([KEYED, "prompts.query=cls"], "cls", "style"),
        (["prompts.selection=l2p"], "cls", "style"),
    ],
)
def test_prompts_are_selected_by_the_queries_of_their_rule(
    bench: Callable[..., Bench], overrides: list[str], used: str, unused: str
) -> None:
    b = bench("prompts.pool=20", *overrides)
    data, test = b.federation.data, b.worker.splits[0]
    batches = ClientBatches(data, 0, 1000, b.recipe.prompts, torch_generator(0, "batches"))
    ((_, seen, _, _),) = batches
    own = torch.from_numpy(data.table.queries(used)[data.parts[0]])
    torch.testing.assert_close(seen.mean(dim=0), own.mean(dim=0))

    def chosen(changed: str) -> torch.Tensor:
        table = dataclasses.replace(test, **{changed: -getattr(test, changed)})
        return select_for_split(b.state, b.recipe, table)[1]

    expected = select_for_split(b.state, b.recipe, test)[1]
    assert torch.equal(chosen(unused), expected)
    assert not torch.equal(chosen(used), expected)


def test_a_plain_trainer_fits_the_module_to_the_same_result(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED)
    job = make_jobs(b.state, b.settings)[0]
    update = b.worker.train(b.recipe, [job])[0]
    module = ClientModule(b.recipe, b.worker.backbone, job, b.federation.data.class_mask)
    batches = ClientBatches(
        b.federation.data,
        job.client_id,
        b.recipe.training.batch_size,
        b.recipe.prompts,
        torch_generator(job.seed, "batches"),
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    pl.Trainer(
        max_epochs=b.recipe.training.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    assert torch.equal(module.prompts.detach()[update.origins], update.prompts)


def test_a_job_depends_on_nothing_but_itself(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED)
    jobs = make_jobs(b.state, b.settings)
    first = b.worker.train(b.recipe, [jobs[0]])[0]
    torch.manual_seed(99)  # neither the global generator
    np.random.seed(99)
    b.worker.train(b.recipe, [jobs[1]])  # nor what the worker did before
    again = b.worker.train(b.recipe, [jobs[0]])[0]
    assert torch.equal(first.prompts, again.prompts)
    twice = again.tensors()
    assert all(torch.equal(value, twice[path]) for path, value in first.tensors().items())


def test_global_generators_are_left_alone(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    play(b)
    assert torch.equal(torch.get_rng_state(), before)


def test_order_of_finishing_does_not_matter(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED)

    class InOrder(Direct):
        def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
            yield from (self.worker.train(recipe, [job])[0] for job in jobs)

    assert play(b)[0].sha256() == play(b, InOrder(b.worker))[0].sha256()


def spoil(field: str, value: object, client: int) -> Callable[[ClientUpdate], ClientUpdate]:
    def tamper(update: ClientUpdate) -> ClientUpdate:
        if update.client_id != client:
            return update
        return dataclasses.replace(update, **{field: value})

    return tamper


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("prompts", torch.full((2, 128), torch.nan), "prompts: 256 of 256 values are not finite"),
        ("shared", {}, "shared: expected a Parts, got dict"),
        ("metrics", {"loss": torch.nan}, "expected the metrics steps, seconds, pack, loss"),
    ],
)
def test_a_bad_update_is_quarantined_and_named(
    bench: Callable[..., Bench], field: str, value: object, reason: str
) -> None:
    b = bench(KEYED)
    cohort = [job.client_id for job in make_jobs(b.state, b.settings)]
    state, report = play(b, Direct(b.worker, spoil(field, value, cohort[1])))
    assert [refused["client"] for refused in report.quarantined] == [cohort[1]]
    import re

    assert re.search(reason, report.quarantined[0]["reason"])
    assert all(torch.isfinite(tensor).all() for tensor in state.tensors().values())
    # What the two good clients alone give: their mean by numbers of samples.
    good = Direct(b.worker)
    list(good.map(b.recipe, make_jobs(b.state, b.settings)))
    rest = [update for update in good.updates if update.client_id != cohort[1]]
    rest = sorted(rest, key=lambda update: update.client_id)
    one, two = (update.shared.tensors() for update in rest)
    share = rest[0].num_examples / (rest[0].num_examples + rest[1].num_examples)
    assert share != 0.5
    merged = state.shared.tensors()
    assert merged.keys() == one.keys()
    for path, value in merged.items():
        torch.testing.assert_close(
            value, share * one[path] + (1 - share) * two[path], atol=1e-7, rtol=1e-6
        )


def test_a_round_without_a_usable_update_ends_the_run(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED, "clients.lr=1e30")
    with pytest.raises(RoundError, match="all 3 updates were refused"):
        play(b)


class NoNumbers(Mean):
    """A faulty aggregator."""

    def merge(self, given: AggregationInput) -> Aggregation:
        merged = super().merge(given)
        return dataclasses.replace(merged, prompts=merged.prompts * math.nan)


def test_a_merge_without_finite_values_ends_the_run_before_it_is_saved(
    bench: Callable[..., Bench],
) -> None:
    b = bench(KEYED)
    runtime = Direct(b.worker)
    evaluate = evaluator(runtime, b.federation, b.settings)
    rounds = run_rounds(b.state, b.settings, runtime, NoNumbers(MeanOptions()), evaluate)
    with pytest.raises(RoundError, match=r"round 1: the server's prompts: (\d+) of \1 values are"):
        next(rounds)


def test_a_run_of_local_clients_that_all_diverge_does_not_end_well(
    bench: Callable[..., Bench],
) -> None:
    """Nothing is sent, and what is kept is checked all the same."""
    b = bench("method=local_only", "clients.lr=1e30")
    with pytest.raises(RoundError, match=r"all 3 updates .*state/prompts: 256 of 256 values"):
        play(b)


def test_a_client_whose_own_state_is_refused_keeps_its_old_one(
    bench: Callable[..., Bench],
) -> None:
    b = bench("method=local_only", "clients.per_round=6")
    first, report = play(b)
    assert report.quarantined == ()
    nan = torch.full((2, 128), torch.nan)
    bad = ClientState(dataclasses.replace(first.clients[4].kept, prompts=nan))
    later = dataclasses.replace(b, state=first)
    second, report = play(later, Direct(b.worker, spoil("state", bad, 4)))
    assert report.quarantined == (
        {"client": 4, "reason": "state/prompts: 256 of 256 values are not finite"},
    )
    for client in range(6):
        same = torch.equal(second.clients[client].kept.prompts, first.clients[client].kept.prompts)
        assert same == (client == 4)


def test_pooled_and_clients_own_models_are_measured_together_by_the_workers(
    bench: Callable[..., Bench],
) -> None:
    """In one call of the runtime; clients that receive the same share one broadcast."""
    b = bench("method=fedavg_pt", "head.mode=shared")
    asked: list[Sequence[Piece]] = []

    class Counting(Direct):
        def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> object:
            asked.append(pieces)
            return super().measure(recipe, pieces)

    evaluate = evaluator(Counting(b.worker), b.federation, b.settings, lambda round_index: True)
    test, validation = evaluate(b.state)()
    (pieces,) = asked
    splits = b.federation.setup.splits
    sizes = [sum(len(x.index) for x in pieces if x.split == split) for split in (0, 1)]
    assert sizes == [2 * len(split) for split in splits]
    assert len({id(piece.broadcast) for piece in pieces}) == 1
    for split, found in zip(splits, (test, validation), strict=True):
        assert found.clients is not None
        data, table = b.federation.data, b.federation.data.table
        shares = mirror_partition(
            data.parts, table.labels, table.groups, split.labels, split.groups
        )
        correct = sum(found.clients.accuracy[c] * len(s) for c, s in enumerate(shares) if len(s))
        assert correct / len(split) == pytest.approx(found.accuracy, abs=1e-6)


def test_a_raising_client_is_named(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(KEYED)
    job = make_jobs(b.state, b.settings)[0]

    def burst(*_: object) -> None:
        raise RuntimeError("the loss burst\nsecond line")

    monkeypatch.setattr(ClientModule, "training_step", burst)
    with pytest.raises(ClientError) as caught:
        b.worker.train(b.recipe, [job])[0]
    assert str(caught.value) == (
        f"client {job.client_id} failed in round 1 while it was in stage 'fit': "
        "RuntimeError: the loss burst"
    )


def test_bytes_are_the_sum_of_tensor_sizes(bench: Callable[..., Bench]) -> None:
    b = bench(KEYED, "head=linear")
    job = make_jobs(b.state, b.settings)[0]
    update = b.worker.train(b.recipe, [job])[0]
    head = 4 * 128 * 10
    prompts_and_keys = 2 * 4 * 2 * 128
    assert download_bytes(job) == head + prompts_and_keys
    assert upload_bytes(update) == head + prompts_and_keys + 2 * (8 + 8)


def test_proximal_with_zero_weight_is_plain_and_pulls_otherwise(
    bench: Callable[..., Bench],
) -> None:
    plain, _ = play(bench("method=fedavg_pt"))
    zero, _ = play(bench("method=fedavg_pt", "objective=proximal", "objective.mu=0"))
    strong = bench("method=fedavg_pt", "objective=proximal", "objective.mu=100")
    pulled, _ = play(strong)
    assert plain.sha256() == zero.sha256()
    start = strong.state.prompts
    assert (pulled.prompts - start).norm() < 0.5 * (plain.prompts - start).norm()


def gradients(module: ClientModule, batch: Batch) -> dict[str, torch.Tensor]:
    """Of one step's loss, by the tensors' names."""
    trainable = module.trainable().tensors()
    found = torch.autograd.grad(module.training_step(batch, 0), list(trainable.values()))
    return dict(zip(trainable, found, strict=True))


def first_batch(b: Bench, job: ClientJob) -> Batch:
    generator = torch_generator(0, "batches")
    data = b.federation.data
    return next(iter(ClientBatches(data, job.client_id, 8, b.recipe.prompts, generator)))


def test_the_sign_of_the_similarity_term_is_an_option(bench: Callable[..., Bench]) -> None:
    """L2P's, which is negative, draws the prompts to their queries; the released one pushes."""
    found = {}
    for weight in (0.0, 0.01, -0.5):
        b = bench(
            *("method=pfpt_plus", "prompts.pool=4", "head.dropout=0"),
            f"prompts.similarity_weight={weight}",
        )
        job = make_jobs(b.state, b.settings)[0]
        module = ClientModule(b.recipe, b.worker.backbone, job, b.federation.data.class_mask)
        batch = first_batch(b, job)
        found[weight] = gradients(module, batch)
        similarity = module.choose(batch[1])[1]
    assert similarity is not None
    for name in ("prompts", "query_projection"):
        tensor = module.trainable().tensors()[name]
        (towards,) = torch.autograd.grad(similarity, tensor, retain_graph=True)
        assert towards.norm() > 0
        for weight in (0.01, -0.5):
            change = found[weight][name] - found[0.0][name]
            torch.testing.assert_close(change, weight * towards, rtol=1e-3, atol=1e-7)


def test_the_proximal_term_s_gradient_is_mu_times_the_way_from_the_broadcast(
    bench: Callable[..., Bench],
) -> None:
    """In prompts and head, and at the server's tensors none."""
    found = {}
    for objective in ("plain", "proximal"):
        more = ["objective.mu=0.3"] if objective == "proximal" else []
        b = bench("method=fedavg_pt", "head.dropout=0", f"objective={objective}", *more)
        job = make_jobs(b.state, b.settings)[0]
        module = ClientModule(b.recipe, b.worker.backbone, job, b.federation.data.class_mask)
        batch = first_batch(b, job)
        at_start = gradients(module, batch)
        with torch.no_grad():
            for number, value in enumerate(module.trainable().tensors().values(), start=1):
                value += 0.01 * number
        found[objective] = at_start, gradients(module, batch)
    assert next(iter(found["plain"][1])) == "prompts"
    assert len(found["plain"][1]) == 5
    for number, (name, plain) in enumerate(found["plain"][1].items(), start=1):
        pull = found["proximal"][1][name] - plain
        torch.testing.assert_close(
            pull, torch.full_like(pull, 0.3 * 0.01 * number), rtol=1e-2, atol=1e-6
        )
        assert torch.equal(found["plain"][0][name], found["proximal"][0][name])


def test_a_client_s_step_of_scaffold_is_equation_3(bench: Callable[..., Bench]) -> None:
    """y - rate (g - c_i + c), for prompts and head."""
    b = bench("method=scaffold_pt", "head.dropout=0")
    plain = bench("method=fedavg_pt", "head.dropout=0")
    job = make_jobs(b.state, b.settings)[0]
    shared = job.broadcast.shared
    controls = {name: torch.randn_like(value) for name, value in shared.objective.items()}
    own = {name: torch.randn_like(value) for name, value in controls.items()}
    shared = dataclasses.replace(shared, objective=controls)
    broadcast = dataclasses.replace(job.broadcast, shared=shared)
    kept = ClientState(Parts(objective=own))
    job = dataclasses.replace(job, broadcast=broadcast, state=kept)
    mask = b.federation.data.class_mask
    batch = first_batch(b, job)
    expected = gradients(ClientModule(plain.recipe, b.worker.backbone, job, mask), batch)
    module = ClientModule(b.recipe, b.worker.backbone, job, mask)
    start = module.trainable().cloned().tensors()
    assert set(start) == set(controls)
    optimizer = only_optimizer(module)
    fit_batch(Hooks(module, FitTrainer(1, [optimizer], [])), optimizer, batch, 0, 0)
    for part, name, value in module.trainable().labelled():
        change = expected[name] - own[name] + controls[name]
        wanted = start[name] - b.recipe.rate(part) * change
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-5, atol=1e-6)


def own_accuracies(b: Bench, state: ServerState, settings: RoundSettings) -> Mapping[int, float]:
    """Of each client's own model on its share of the test split."""
    evaluate = evaluator(Direct(b.worker), b.federation, settings, lambda round_index: True)
    test, _ = evaluate(state)()
    assert test.clients is not None
    return test.clients.accuracy


def test_each_client_s_own_model_is_what_is_measured(bench: Callable[..., Bench]) -> None:
    """Personal heads that always name one class: a client's accuracy is that class's share of its
    test images.
    """
    b = bench("method=local_only", "head=linear", "head.bias=true", "head.mode=personal")
    test = b.federation.setup.splits[0]
    data, table = b.federation.data, b.federation.data.table
    shares = mirror_partition(data.parts, table.labels, table.groups, test.labels, test.groups)
    named = {client: client % 10 for client in range(len(shares))}
    own = {}
    for client, label in named.items():
        bias = 9.0 * F.one_hot(torch.tensor(label), 10).float()
        head = {"0.weight": torch.zeros(10, 128), "0.bias": bias}
        own[client] = ClientState(dataclasses.replace(b.state.fixed.kept, head=head))
    state = dataclasses.replace(b.state, clients=own)
    found = own_accuracies(b, state, b.settings)
    assert found == {
        client: pytest.approx(float((test.labels[share] == named[client]).mean()))
        for client, share in enumerate(shares)
        if len(share)
    }
    assert len(set(found.values())) > 1


def test_clients_of_a_generator_are_measured_with_their_own_prompts(
    bench: Callable[..., Bench],
) -> None:
    b = bench("method=pfedpg", "head=linear")
    draws = torch.Generator().manual_seed(0)
    memory = {
        name: torch.randn(value.shape, generator=draws) for name, value in b.state.generator.items()
    }
    table = b.federation.data.table
    means = [table.features[table.labels == label].mean(axis=0) for label in range(10)]
    weight = torch.from_numpy(np.stack(means) - table.features.mean(axis=0))
    shared = dataclasses.replace(b.state.shared, head={"0.weight": weight})
    state = dataclasses.replace(b.state, generator=memory, shared=shared)
    settings = settings_of(b.config, b.federation)
    test = b.federation.setup.splits[0]
    parts = b.federation.data.parts
    shares = mirror_partition(parts, table.labels, table.groups, test.labels, test.groups)

    def accuracy(prompts: torch.Tensor, share: np.ndarray) -> float:
        with torch.no_grad():
            features = b.worker.backbone.encode(test.tokens_at(share), prompts)
        predicted = (features @ weight.T).argmax(dim=1).numpy()
        return float((predicted == test.labels[share]).mean())

    assert settings.generator is not None
    own, common = {}, {}
    for client, share in enumerate(shares):
        if len(share):
            own[client] = accuracy(settings.generator.prompts_for(client, memory), share)
            common[client] = accuracy(settings.generator.consensus(memory), share)
    assert own != common
    found = own_accuracies(b, state, settings)
    assert found == pytest.approx(own)


def test_adjusted_logits_with_zero_tau_are_plain_and_take_the_classes_share_out(
    bench: Callable[..., Bench],
) -> None:
    plain, _ = play(bench("method=fedavg_pt"))
    zero, _ = play(bench("method=fedavg_pt", "objective=logit_adjusted", "objective.tau=0"))
    assert plain.sha256() == zero.sha256()
    b = bench("method=fedavg_pt", "objective=logit_adjusted", "objective.tau=2")
    job = make_jobs(b.state, b.settings)[0]
    labels = b.federation.data.table.labels[b.federation.data.parts[job.client_id]]
    counts = np.bincount(labels, minlength=b.recipe.num_classes)
    module = ClientModule(
        b.recipe, b.worker.backbone, job, b.federation.data.class_mask, counts
    ).eval()
    features = torch.randn(3, 128)
    wanted = torch.from_numpy(labels[:3])
    nobody = torch.zeros(3, dtype=torch.int64)
    batch = (features, features, wanted, nobody)
    loss = module.step_loss(features, torch.arange(2), None, batch)
    share = torch.from_numpy((counts + 1) / (counts + 1).sum())
    expected = F.cross_entropy(module.head(features) + 2 * share.log(), wanted)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_loss_and_predictions_are_among_the_classes_of_an_images_domain(
    bench: Callable[..., Bench],
) -> None:
    """Digits as two domains, 0-4 and 5-9."""
    b = bench("method=head_only", "prompts.count=0", "head=linear")
    mask = np.repeat(np.eye(2, dtype=bool), 5, axis=1)
    table = b.worker.splits[0]
    table = dataclasses.replace(table, groups=table.labels // 5)
    order = np.arange(0, len(table), 3)
    weight = torch.randn(10, 128)
    job = make_jobs(b.state, b.settings)[0]
    broadcast = dataclasses.replace(job.broadcast, shared=Parts(head={"0.weight": weight}))
    rows = torch.zeros(len(order), 0, dtype=torch.int64)
    ((logits, labels),) = predict(
        Model(broadcast),
        b.recipe,
        b.worker.backbone,
        table,
        order,
        rows,
        mask,
        torch.device("cpu"),
    )
    groups = torch.from_numpy(table.groups[order])
    assert {0, 1} == set(groups.tolist())
    assert torch.equal(torch.isfinite(logits), torch.from_numpy(mask)[groups])
    assert torch.equal(logits.argmax(dim=1) // 5, groups)
    features = torch.from_numpy(table.features[order])
    free = features @ weight.T
    own = torch.stack([row[5 * g : 5 * g + 5] for row, g in zip(free, groups, strict=True)])
    torch.testing.assert_close(logits[torch.isfinite(logits)].view(-1, 5), own)

    job = dataclasses.replace(job, broadcast=broadcast)
    module = ClientModule(b.recipe, b.worker.backbone, job, mask).eval()
    batch = (features, features, labels, groups)
    loss = module.step_loss(features, torch.arange(0), None, batch)
    torch.testing.assert_close(loss, F.cross_entropy(own, labels - 5 * groups))
    assert loss < F.cross_entropy(free, labels)


def test_head_only_uses_cached_features(bench: Callable[..., Bench]) -> None:
    b = bench("method=head_only", "prompts.count=0")
    state, report = play(b)
    assert len(state.prompts) == 0
    assert report.num_prompts == 0
    assert not torch.equal(state.shared.head["0.weight"], b.state.shared.head["0.weight"])
