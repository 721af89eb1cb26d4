"""Clients, packs and evaluation on a simulated GPU: the CPU's bits, and no hidden waits.

What this proves and what it does not is said in `simulated_gpu.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fedprompt.client import worker as train
from fedprompt.client.callbacks import callbacks
from fedprompt.client.module import ClientModule
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ClientError
from fedprompt.core.types import ClientUpdate, ServerState
from fedprompt.models import head as heads
from fedprompt.models import selection
from fedprompt.models.adaptation import tunings
from fedprompt.models.options import PRECISIONS
from fedprompt.objectives import objectives
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.evaluate import Model, Subject, Tally, cut, measure_piece
from fedprompt.server.round import RoundSettings, make_jobs
from simulated_gpu import SimulatedGpu, fused_optimizers, simulated_gpu

Overrides = Callable[..., list[str]]

FEW = "data={name: domains, train: 80, validation: 40, test: 40, public: 80}"
PLAIN = ("method=fedavg_pt", "head=linear")
CASES = {
    "keyed": ("prompts.pool=3", "head=released"),
    "keyed by batch": ("prompts.pool=3", "prompts.choose_by=batch", "prompts.query=cls"),
    "whitened": ("prompts.pool=3", "prompts.whiten=true"),
    "l2p": ("prompts.pool=3", "prompts.selection=l2p"),
    "all": PLAIN,
    "deep": (*PLAIN, "prompts.placement=deep"),
    "inner": ("prompts.pool=3", "prompts.depth=3"),
    "inner, deep": (*PLAIN, "prompts.placement=deep", "prompts.depth=3"),
    "inner lora": (*PLAIN, "tuning=lora", "prompts.depth=3"),
    "no prompts": ("method=head_only", "prompts.count=0"),
    "frozen head": (*PLAIN, "head=frozen"),
    "personal": (*PLAIN, "head.mode=personal", "prompts.mode=personal"),
    "sgd": (*PLAIN, "clients.optimizer=sgd"),
    "clipped": (*PLAIN, "clients.callbacks=[clip_gradients]"),
    "proximal": (*PLAIN, "objective=proximal", "objective.mu=0.1"),
    "scaffold": ("method=scaffold_pt",),
    "logit adjusted": (*PLAIN, "objective=logit_adjusted"),
    "label smoothing": (*PLAIN, "objective=label_smoothing"),
    "moon": (*PLAIN, "objective=moon"),
    "closed form": ("method=fedcof", "prompts.count=0", "objective.rule=ridge"),
    "adapter": (*PLAIN, "tuning=adapter"),
    "lora": (*PLAIN, "tuning=lora"),
    "full": (*PLAIN, "tuning=full"),
    "bf16": ("prompts.pool=3", "runtime.precision=bf16-mixed"),
    "bf16 lora": (*PLAIN, "tuning=lora", "runtime.precision=bf16-mixed"),
}

IN_A_FIT = {
    "models/voting.py:majority_vote": "l2p counts its votes on the CPU, so that ties fall the same",
}
"""Where the host may wait within a fit, and why."""
AROUND_A_FIT = {
    "client/worker.py:_module": "the client's tensors go to the device",
    "client/worker.py:__init__": "and so do its data",
    "client/worker.py:_train_pack": "the fit is over: seconds are counted",
    "client/worker.py:_copy": "what was trained comes back",
    "client/worker.py:collect": "so do the use counts",
    "client/module.py:metrics": "and the sums of the last epoch",
}
"""Where it may wait once for each tensor of a client, before a fit or after it."""
IN_A_PIECE = {
    "server/evaluate.py:network_of": "the model goes to the device",
    "server/evaluate.py:classified": "images go to the device",
    "server/evaluate.py:measure_piece": "loss and predictions come back",
}


@dataclasses.dataclass(frozen=True)
class Laid:
    """A federation that is ready for its first round."""

    settings: RoundSettings
    state: ServerState
    setup: train.WorkerSetup

    def worker(self, device: str) -> ClientWorker:
        return dataclasses.replace(self.setup, device=device).build()

    def shared_worker(self, device: str) -> ClientWorker:
        """One for all tests of a federation: as in a run, it serves every recipe."""
        key = (id(self.setup), device)
        if key not in WORKERS:
            WORKERS[key] = self.worker(device)
        return WORKERS[key]


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with fused_optimizers():
        yield


FEDERATIONS: dict[tuple[object, ...], Federation] = {}
WORKERS: dict[tuple[int, str], ClientWorker] = {}
LAID: dict[tuple[str, ...], Laid] = {}


def composed(tiny: Overrides, *changes: str) -> ExperimentConfig:
    return compose("digits", tiny("clients.batch_size=8", "clients.epochs=2", FEW, *changes))


@pytest.fixture
def lay(tiny: Overrides) -> Callable[..., Laid]:
    def make(*changes: str) -> Laid:
        if changes in LAID:
            return LAID[changes]
        config = composed(tiny, *changes)
        prompts = config.prompts
        frozen = config.head.mode == "frozen"
        key = (config.runtime.precision, frozen, prompts.whiten, prompts.depth)
        if key not in FEDERATIONS:
            FEDERATIONS[key] = prepare(config)
        federation = FEDERATIONS[key]
        settings = settings_of(config, federation)
        LAID[changes] = Laid(settings, initial_state(config, federation), federation.setup)
        return LAID[changes]

    return make


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    """One on which every fit raises where the host waits, but for the places `IN_A_FIT`."""
    with simulated_gpu() as simulated:
        real = train.fit

        def watched(*arguments: Any) -> None:
            with simulated.no_stalls(IN_A_FIT):
                real(*arguments)

        monkeypatch.setattr(train, "fit", watched)
        yield simulated


def everything(
    laid: Laid, worker: ClientWorker, around: Callable[[Collection[str]], Any] | None = None
) -> tuple[list[ClientUpdate], list[Tally]]:
    """Two clients one at a time, the same in a pack, and their models on the test split."""
    within: Callable[[Collection[str]], AbstractContextManager[object]]
    within = around or (lambda _: nullcontext())
    recipe, jobs = laid.settings.recipe, make_jobs(laid.state, laid.settings)[:2]
    with within(AROUND_A_FIT):
        updates = [worker.train(recipe, [job])[0] for job in jobs]
        if recipe.packable:
            updates += worker.train(recipe, jobs)
    table, broadcast = laid.setup.splits[0], jobs[0].broadcast
    images = torch.arange(len(table)).numpy()
    models = [Model(broadcast, update.state.kept) for update in updates[:2]]
    pieces = [piece for model in models for piece in cut(Subject(model, 0, images), recipe, table)]
    with within(IN_A_PIECE):
        return updates, [measure_piece(worker, recipe, piece) for piece in pieces]


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_bits_of_the_cpu(
    case: str, lay: Callable[..., Laid], request: pytest.FixtureRequest
) -> None:
    """No tensor is on the wrong device, and no fit waits for one."""
    laid = lay(*CASES[case])
    expected, figures = everything(laid, laid.shared_worker("cpu"))
    gpu: SimulatedGpu = request.getfixturevalue("gpu")
    updates, tallies = everything(laid, laid.worker("cuda"), gpu.no_stalls)
    assert gpu.operations > 50
    for one, other in zip(updates, expected, strict=True):
        ours, theirs = one.tensors(), other.tensors()
        assert list(ours) == list(theirs)
        for path, tensor in ours.items():
            assert type(tensor) is Tensor, path
            assert torch.equal(tensor, theirs[path]), path
        assert drop_times(one.metrics) == drop_times(other.metrics)
    for tally, figure in zip(tallies, figures, strict=True):
        assert tally.loss == figure.loss
        assert torch.equal(tally.predicted, figure.predicted)


def drop_times(metrics: Any) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def test_the_cases_are_all_there_are(tiny: Overrides) -> None:
    """A new objective, adaptation, selection or callback of the package needs a case."""
    recipes = [composed(tiny, *changes).recipe(10) for changes in CASES.values()]
    called = {name for recipe in recipes for name in recipe.training.callbacks}
    assert {recipe.objective for recipe in recipes} == set(objectives.names())
    assert {recipe.tuning for recipe in recipes} == set(tunings.names())
    assert called == set(callbacks.names())
    assert {recipe.optimizer for recipe in recipes} == {"adam", "sgd"}
    prompts = [recipe.prompts for recipe in recipes]
    assert {each.selection for each in prompts} == set(selection.SELECTIONS)
    assert {each.choose_by for each in prompts} == set(selection.CHOICES)
    assert {each.query for each in prompts} == set(selection.QUERIES)
    assert {each.mode for each in prompts} == set(selection.MODES)
    assert {each.depth > 0 for each in prompts} == {True, False}
    assert {each.placement == "deep" for each in prompts} == {True, False}
    assert {recipe.head.name for recipe in recipes} == set(heads.HEADS)
    assert {recipe.head.mode for recipe in recipes} == set(heads.MODES)
    named = {change for changes in CASES.values() for change in changes}
    assert {f"runtime.precision={name}" for name in PRECISIONS if name != "32-true"} <= named


def stalls_of(gpu: SimulatedGpu, laid: Laid) -> Counter[str]:
    worker = laid.worker("cuda")
    gpu.stalls.clear()
    worker.train(laid.settings.recipe, make_jobs(laid.state, laid.settings)[:1])
    return Counter(stall.place for stall in gpu.stalls)


def test_waits_do_not_grow_with_the_steps(
    lay: Callable[..., Laid], request: pytest.FixtureRequest
) -> None:
    """Only l2p's do: one for each step."""
    short, long = lay("prompts.pool=3"), lay("prompts.pool=3", "clients.epochs=4")
    voting = [
        lay("prompts.pool=3", "prompts.selection=l2p", f"clients.epochs={epochs}")
        for epochs in (2, 4)
    ]
    gpu: SimulatedGpu = request.getfixturevalue("gpu")
    once = stalls_of(gpu, short)
    assert stalls_of(gpu, long) == once
    assert set(once) <= set(AROUND_A_FIT)
    assert once["client/worker.py:_train_pack"] == 1
    two, four = (stalls_of(gpu, each) for each in voting)
    assert four - two == {"models/voting.py:majority_vote": two["models/voting.py:majority_vote"]}


def test_a_client_s_images_do_not_come_back(
    lay: Callable[..., Laid], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objectives get those of the host: a client's tokens may be many times its tensors."""
    laid = lay("prompts.pool=3", "head=linear")
    sizes = []
    real = gpu.download
    monkeypatch.setattr(
        gpu, "download", lambda tensor, *rest: sizes.append(tensor.numel()) or real(tensor, *rest)
    )
    update = laid.worker("cuda").train(
        laid.settings.recipe, make_jobs(laid.state, laid.settings)[:1]
    )[0]
    assert max(sizes) < update.num_examples * laid.setup.data.table.tokens[0].size


def test_a_full_gpu_is_emptied_before_the_smaller_pack(
    lay: Callable[..., Laid], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid = lay("prompts.pool=3")
    steps: list[str] = []
    real = train.fit

    def small_memory(module: Any, *arguments: Any) -> None:
        if not isinstance(module, ClientModule):
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append("fit")
        real(module, *arguments)

    monkeypatch.setattr(train, "fit", small_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: steps.append("empty"))
    worker = laid.worker("cuda")
    worker.train(laid.settings.recipe, make_jobs(laid.state, laid.settings)[:2])
    assert steps == ["empty", "fit", "fit"]
    assert worker.largest_pack == 1


Mistake = Callable[[ClientModule, Tensor], Any]
MISTAKES: dict[str, tuple[Mistake, str]] = {
    "a constant on the CPU": (
        lambda module, loss: (module.prompts * torch.ones(module.prompts.shape[1])).sum(),
        r"Expected all tensors to be on the same device, but aten.mul found \(128,\) on cpu",
    ),
    "labels on the CPU": (
        lambda module, loss: torch.nn.functional.cross_entropy(
            module.prompts, torch.zeros(len(module.prompts), dtype=torch.int64)
        ),
        "Expected all tensors to be on the same device, but aten.nll_loss_forward",
    ),
    "an index on the CPU": (
        lambda module, loss: module.keys[torch.tensor([0])],
        "aten.index with an index on the host",
    ),
    "a device tensor as index of the CPU's": (
        lambda module, loss: torch.ones(3)[module.use_counts],
        "indices should be on the same device as the indexed tensor",
    ),
    "item": (lambda module, loss: loss.item(), "aten._local_scalar_dense"),
    "float": (lambda module, loss: float(loss.detach()), "aten._local_scalar_dense"),
    "a condition": (lambda module, loss: 1 if loss > 3 else 0, "aten._local_scalar_dense"),
    "a text": (lambda module, loss: f"{loss.detach():.3f}", "aten._local_scalar_dense"),
    "cpu": (lambda module, loss: loss.detach().cpu(), "copy to the host"),
    "to": (lambda module, loss: loss.detach().to("cpu"), "copy to the host"),
    "to like": (lambda module, loss: loss.detach().to(torch.ones(1)), "copy to the host"),
    "not waited for": (
        lambda module, loss: loss.detach().to("cpu", non_blocking=True),
        "may be read too early",
    ),
    "numpy": (lambda module, loss: loss.detach().numpy(), "device type tensor to numpy"),
    "tolist": (lambda module, loss: module.sums.tolist(), "copy to the host"),
    "a mask": (lambda module, loss: module.sums[module.sums > 0], "aten.index with a mask"),
    "nonzero": (lambda module, loss: module.sums.nonzero(), "aten.nonzero"),
    "unique": (lambda module, loss: module.use_counts.unique(), "aten._unique2"),
    "equal": (lambda module, loss: torch.equal(module.sums, module.sums), "aten.equal"),
    "numbers to the device": (
        lambda module, loss: torch.tensor([1.0], device=module.device),
        "copy of pageable memory to the device",
    ),
    "a tensor to the device": (
        lambda module, loss: torch.ones(3).to(module.device, non_blocking=True),
        "copy of pageable memory to the device",
    ),
    "copied into": (lambda module, loss: module.sums.copy_(torch.ones(3)), "copy between devices"),
    "a generator on the CPU": (
        lambda module, loss: torch.rand(2, device=module.device, generator=torch.Generator()),
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "the global generator": (
        lambda module, loss: torch.nn.functional.dropout(loss[None]),
        "aten.bernoulli_ at .* draws from the global generator",
    ),
    "synchronize": (lambda module, loss: torch.cuda.synchronize(), "torch.cuda.synchronize"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_step_is_caught(
    mistake: str,
    lay: Callable[..., Laid],
    gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laid = lay("prompts.pool=3")
    make, message = MISTAKES[mistake]
    real = ClientModule.step_loss

    def mistaken(module: ClientModule, *arguments: Any) -> Tensor:
        loss = real(module, *arguments)
        make(module, loss)
        return loss

    monkeypatch.setattr(ClientModule, "step_loss", mistaken)
    worker, jobs = laid.shared_worker("cuda"), make_jobs(laid.state, laid.settings)
    for pack in (jobs[:1], jobs[:2]):
        with pytest.raises(ClientError, match=f"fit.*{message}"):
            worker.train(laid.settings.recipe, pack)


def test_a_mistake_in_an_evaluation_is_caught(
    lay: Callable[..., Laid], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class mask that stays on the CPU."""
    laid = lay("prompts.pool=3")
    monkeypatch.setattr(
        "fedprompt.models.prompted.PromptedNetwork.classify",
        lambda self, features, groups: self.head(features).masked_fill(
            torch.ones(len(features), 1, dtype=torch.bool), 0
        ),
    )
    images = torch.arange(20).numpy()
    subject = Subject(Model(laid.state.broadcast()), 0, images)
    pieces = cut(subject, laid.settings.recipe, laid.setup.splits[0])
    with pytest.raises(RuntimeError, match=r"on the same device, but aten\.masked_fill"):
        measure_piece(laid.worker("cuda"), laid.settings.recipe, pieces[0])
