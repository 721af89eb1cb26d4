"""Packed clients against the same clients one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import fedprompt
from fedprompt.client import worker as train
from fedprompt.client.module import Batch, ClientModule
from fedprompt.client.packed import PackedBatches, PackedClients, encode_together
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientWorker
from fedprompt.config import compose
from fedprompt.core.errors import ClientError, ConfigError
from fedprompt.core.types import ClientJob, ServerState
from fedprompt.runs.driver import settings_of
from fedprompt.runs.events import Note
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.base import pack_jobs
from fedprompt.server.round import RoundSettings, make_jobs

Overrides = Callable[..., list[str]]
Laid = tuple[ClientWorker, RoundSettings, ServerState]

KEYED = "prompts.selection=keyed"
"""Prompts with keys, where the data set alone asks for none."""
METHODS = {
    "pfpt": ("prompts.pool=3",),
    "pfpt, l2p": ("prompts.pool=3", "prompts.selection=l2p"),
    "fedavg": ("method=fedavg_pt",),
    "fedprox": ("method=fedavg_pt", "objective=proximal", "objective.mu=0.1"),
    "scaffold": ("method=scaffold_pt",),
    "logit_adjusted": ("method=fedavg_pt", "objective=logit_adjusted"),
    "callbacks": ("method=fedavg_pt", "clients.callbacks=[clip_gradients]"),
    "before an inner block": ("prompts.pool=3", "prompts.depth=3"),
    "deep from there on": ("method=fedavg_pt", "prompts.depth=3", "prompts.placement=deep"),
    "head only": ("method=head_only", "prompts.count=0"),
}


FEDERATIONS: dict[tuple[object, ...], Federation] = {}


@pytest.fixture
def laid(tiny: Overrides) -> Callable[..., Laid]:
    def make(*overrides: str) -> Laid:
        config = compose("digits", tiny("clients.epochs=2", *overrides))
        key = (
            config.data,
            config.clients.count,
            config.cut,
        )  # those of a test differ in the method alone
        if key not in FEDERATIONS:
            FEDERATIONS[key] = prepare(config)
        federation = FEDERATIONS[key]
        settings = settings_of(config, federation)
        return federation.setup.build(), settings, initial_state(config, federation)

    return make


def assert_alike(one: torch.Tensor, other: torch.Tensor) -> None:
    """Within 1e-5 of the tensor's size."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))


class Listener(pl.Callback):
    """Writes down the hooks of one client's fit, with what it sees."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.calls.append(("epoch", trainer.current_epoch, trainer.global_step))

    def on_train_batch_end(
        self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        self.calls.append(("batch", len(batch[0]), trainer.global_step))

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, ClientModule)
        assert trainer.optimizers == [optimizer]
        self.calls.append(("step", trainer.max_epochs, trainer.global_step))

    def teardown(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        self.calls.append((stage, trainer.current_epoch, trainer.global_step))


def test_each_client_of_a_pack_has_its_own_callbacks(
    laid: Callable[..., Laid], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hear of the steps of their own client only, and of the same as when it is alone."""
    worker, settings, state = laid("method=head_only", "prompts.count=0", "clients.batch_size=16")
    listeners: list[Listener] = []

    def build(recipe: LocalRecipe) -> list[pl.Callback]:
        listeners.append(Listener())
        return [listeners[-1]]

    monkeypatch.setattr(LocalRecipe, "build_callbacks", build)
    jobs = make_jobs(state, settings)
    worker.train(settings.recipe, jobs)
    packed, listeners = [each.calls for each in listeners], []
    for job in jobs:
        worker.train(settings.recipe, [job])
    assert packed == [each.calls for each in listeners]
    assert len({len(calls) for calls in packed}) > 1  # some have more steps than others


@pytest.mark.parametrize("method", METHODS)
def test_a_pack_gives_what_its_clients_give_alone(laid: Callable[..., Laid], method: str) -> None:
    """All clients of a round; they have different numbers of steps, and dropout is on."""
    worker, settings, state = laid(*METHODS[method], "clients.batch_size=16")
    jobs = make_jobs(state, settings)
    sizes = {len(worker.data.parts[job.client_id]) for job in jobs}
    assert len({-(-size // 16) for size in sizes}) > 1
    alone = [worker.train(settings.recipe, [job])[0] for job in jobs]
    packed = worker.train(settings.recipe, jobs)
    assert [update.metrics["pack"] for update in packed] == [len(jobs)] * len(jobs)
    for one, other in zip(packed, alone, strict=True):
        assert one.client_id == other.client_id
        assert one.num_examples == other.num_examples
        assert torch.equal(one.origins, other.origins)
        assert torch.equal(one.use_counts, other.use_counts)
        assert torch.equal(one.keys, other.keys)
        assert_alike(one.prompts, other.prompts) if len(one.prompts) else None
        shared, alike = one.shared.tensors(), other.shared.tensors()
        assert shared.keys() == alike.keys()
        for path, value in shared.items():
            assert_alike(value, alike[path])
        for metric in ("loss", "accuracy", "steps"):
            assert one.metrics[metric] == pytest.approx(other.metrics[metric], rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        ("rounds=1", "prompts.pool=3"),
        ("rounds=2", "method=scaffold_pt"),  # in the first round its variates are zero
    ],
    ids=["pfpt", "scaffold"],
)
def test_whole_rounds_are_the_same_in_packs(tiny: Overrides, method: tuple[str, ...]) -> None:
    """Of what a round adds to its clients' packs, above; the methods differ in the packs alone."""
    unmeasured = ("eval_every=9", "eval_clients=never")
    more = (*method, *unmeasured, "clients.per_round=5", "clients.batch_size=16")
    one, three = (
        fedprompt.run("digits", tiny(*more, f"runtime.pack={pack}"), overwrite=True).state
        for pack in (1, 3)
    )
    packed, alone = three.tensors(), one.tensors()
    assert packed.keys() == alone.keys()
    for name in (*("prompts", "keys"), *(f"shared/{path}" for path in one.shared.tensors())):
        if alone[name].numel():
            assert_alike(packed[name], alone[name])


def test_a_client_that_has_no_more_batches_is_left_alone(laid: Callable[..., Laid]) -> None:
    """Its last step is the first one; Adam's momentum would move it on if it took part later."""
    worker, settings, state = laid(KEYED, "clients.batch_size=16")
    jobs = make_jobs(state, settings)
    short = min(jobs, key=lambda job: len(worker.data.parts[job.client_id]))
    long = max(jobs, key=lambda job: len(worker.data.parts[job.client_id]))
    clients = [worker._module(settings.recipe, job) for job in (short, long)]
    batches = [worker._batches(settings.recipe, job) for job in (short, long)]
    assert len(batches[0]) < len(batches[1])
    seen: list[torch.Tensor] = []

    class Watched(PackedClients):
        def on_train_batch_end(self, *arguments: object) -> None:
            seen.append(clients[0].prompts.detach().clone())

    train.fit(Watched(clients), PackedBatches(batches), 1)
    last = len(batches[0]) - 1
    assert len(seen) == len(batches[1])
    assert all(torch.equal(seen[last], later) for later in seen[last:])
    assert not torch.equal(seen[last], state.prompts)


def test_a_plain_trainer_fits_a_pack_to_the_same_bits(laid: Callable[..., Laid]) -> None:
    worker, settings, state = laid(KEYED, "clients.batch_size=16")
    jobs = make_jobs(state, settings)
    ours = worker.train(settings.recipe, jobs)
    clients = [worker._module(settings.recipe, job) for job in jobs]
    batches = PackedBatches([worker._batches(settings.recipe, job) for job in jobs])
    pl.Trainer(
        max_epochs=settings.recipe.training.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(PackedClients(clients), torch.utils.data.DataLoader(batches, batch_size=None))
    for client, update in zip(clients, ours, strict=True):
        assert torch.equal(client.prompts.detach()[update.origins], update.prompts)


def test_clients_with_other_numbers_of_prompts_are_encoded_apart(
    laid: Callable[..., Laid],
) -> None:
    worker, settings, state = laid("prompts.pool=3")
    jobs = make_jobs(state, settings)[:3]
    clients = [worker._module(settings.recipe, job) for job in jobs]
    inputs = [worker._batches(settings.recipe, job).inputs[: 2 + i] for i, job in enumerate(jobs)]
    rows = [torch.tensor(own) for own in ([0, 1], [2], [0, 2])]
    together = encode_together(clients, inputs, rows)
    for client, own, chosen, features in zip(clients, inputs, rows, together, strict=True):
        assert_alike(features, worker.backbone.encode(own, client.prompts[chosen]))


def test_a_client_that_bursts_does_not_spoil_the_others(laid: Callable[..., Laid]) -> None:
    worker, settings, state = laid(KEYED)
    jobs = make_jobs(state, settings)
    bad = dataclasses.replace(
        jobs[0].broadcast, prompts=torch.full_like(jobs[0].broadcast.prompts, torch.nan)
    )
    alone = worker.train(settings.recipe, jobs[1:])
    packed = worker.train(settings.recipe, [dataclasses.replace(jobs[0], broadcast=bad), *jobs[1:]])
    assert packed[0].prompts.isnan().all()
    for one, other in zip(packed[1:], alone, strict=True):
        assert_alike(one.prompts, other.prompts)


def test_a_client_that_raises_in_a_pack_is_named(
    laid: Callable[..., Laid], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, settings, state = laid(KEYED)
    jobs = make_jobs(state, settings)
    real = ClientModule.step_loss

    def burst(self: ClientModule, *arguments: torch.Tensor) -> torch.Tensor:
        if self.culprit:
            raise RuntimeError("the loss burst")
        return real(self, *arguments)

    def build(recipe: object, job: ClientJob) -> ClientModule:
        module = ClientModule(settings.recipe, worker.backbone, job, worker.data.class_mask)
        module.culprit = job.client_id == jobs[1].client_id
        return module

    monkeypatch.setattr(worker, "_module", build)
    monkeypatch.setattr(ClientModule, "step_loss", burst)
    with pytest.raises(ClientError, match="RuntimeError: the loss burst") as caught:
        worker.train(settings.recipe, jobs)
    assert (caught.value.client_id, caught.value.stage) == (jobs[1].client_id, "fit")


def test_packs_are_halved_when_memory_runs_out(
    laid: Callable[..., Laid], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """5 do not fit, 2 do: the pack is halved, the size is kept, the results are those of packs."""
    worker, settings, state = laid(KEYED, "clients.per_round=5")
    jobs = make_jobs(state, settings)
    expected = [
        update
        for start in (0, 2, 4)
        for update in worker.train(settings.recipe, jobs[start : start + 2])
    ]
    real, tried = train.fit, []

    def small_memory(module: pl.LightningModule, *arguments: object) -> None:
        tried.append(len(module.clients) if isinstance(module, PackedClients) else 1)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(module, *arguments)

    monkeypatch.setattr(train, "fit", small_memory)
    updates = worker.train(settings.recipe, jobs)
    assert tried == [5, 2, 2, 1]
    assert "5 packed clients do not fit in the memory of cpu: going on with 2" in caplog.text
    assert [update.metrics["pack"] for update in updates] == [2, 2, 2, 2, 1]
    for one, other in zip(updates, expected, strict=True):
        assert torch.equal(one.prompts, other.prompts)
    worker.train(settings.recipe, jobs[:3])
    assert tried[4:] == [2, 1]


def test_a_run_reports_that_packs_were_halved(
    tiny: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.fit

    def small_memory(module: pl.LightningModule, *arguments: object) -> None:
        if isinstance(module, PackedClients) and len(module.clients) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(module, *arguments)

    monkeypatch.setattr(train, "fit", small_memory)
    notes: list[str] = []
    fedprompt.run(
        "digits",
        tiny(KEYED, "runtime.pack=2"),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert notes == ["round 1: 2 clients did not fit in memory together; going on with packs of 1"]


def test_one_client_without_enough_memory_is_an_error(
    laid: Callable[..., Laid], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, settings, state = laid(KEYED)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "fit", full)
    with pytest.raises(ClientError, match="OutOfMemoryError: CUDA out of memory"):
        worker.train(settings.recipe, make_jobs(state, settings))


def test_jobs_are_packed_in_order_and_by_broadcast(laid: Callable[..., Laid]) -> None:
    _, settings, state = laid(KEYED, "clients.per_round=5")
    jobs = make_jobs(state, settings)
    assert pack_jobs(jobs, 2) == [jobs[:2], jobs[2:4], jobs[4:]]
    other = dataclasses.replace(jobs[1], broadcast=state.broadcast())
    mixed = [jobs[0], other, *jobs[2:]]
    assert [len(pack) for pack in pack_jobs(mixed, 3)] == [1, 1, 3]


@pytest.mark.parametrize(("pack", "size"), [("auto", 1), (3, 3)])
def test_the_size_of_a_pack_on_the_cpu(pack: int | str, size: int) -> None:
    options = RuntimeOptions("serial", device="cpu", pack=pack)
    recipe = compose("digits").recipe(10)
    assert options.pack_size(10, recipe) == size
    assert options.pack_size(10, dataclasses.replace(recipe, tuning="full")) == 1
    assert options.settled().pack == size


@pytest.mark.parametrize("pack", ["0", "many", "1.5", "-1"])
def test_a_wrong_pack_is_refused(tiny: Overrides, pack: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.pack: expected"):
        compose("digits", tiny(f"runtime.pack={pack}"))


def test_a_run_goes_on_with_its_pack_only(tiny: Overrides, tmp_path: object) -> None:
    result = fedprompt.run("digits", tiny("rounds=1", "runtime.pack=2"))
    assert "pack: 2" in (result.run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"--resume: only .* can be changed"):
        fedprompt.resume(result.run_dir, ["runtime.pack=1"])
