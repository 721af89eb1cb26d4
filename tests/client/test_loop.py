"""The fit loop against Lightning's own Trainer: the same hooks in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedprompt.client.callbacks import NoOptions
from fedprompt.client.callbacks.clip_gradients import ClipGradients
from fedprompt.client.loop import FitTrainer, fit, make_fabric
from fedprompt.core.seeding import torch_generator

HOOKS = (
    *("setup", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"),
    *("on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step"),
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
)
"""Every hook that the loop calls."""

CALLBACK_HOOKS = sorted(set(HOOKS) & set(dir(pl.Callback)))
"""Those of them that callbacks have, too."""

NEVER_ORDERED = ("setup", "configure_optimizers", "on_fit_start")
"""Lightning's versions differ in which of these comes first."""


class Recorder(pl.LightningModule):
    """A small model that writes down which hooks were called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.uniform_(-1, 1, generator=torch_generator(0, "weights"))

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        self.calls.append("training_step")
        assert self.training
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        self.calls.append("configure_optimizers")
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def configure_callbacks(self) -> pl.Callback:
        return Listener(self.calls)


class Listener(pl.Callback):
    """Writes its calls down beside the module's own, and what it sees of the trainer."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.seen: list[tuple[int, int, int]] = []


def heard(hook: str) -> Callable[..., Any]:
    def method(self: Listener, trainer: Any, module: Recorder, *args: Any, **named: Any) -> None:
        if hook != "setup":
            seen = f"epoch {trainer.current_epoch} step {trainer.global_step}"
            self.calls.append(f"callback {hook} {seen} of {trainer.max_epochs}")

    return method


for _hook in CALLBACK_HOOKS:
    setattr(Listener, _hook, heard(_hook))


def recorded(hook: str) -> Callable[..., Any]:
    def method(self: Recorder, *args: Any, **options: Any) -> Any:
        self.calls.append(hook)
        return getattr(pl.LightningModule, hook)(self, *args, **options)

    return method


for _hook in set(HOOKS) - set(vars(Recorder)):
    setattr(Recorder, _hook, recorded(_hook))


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(3, 4, 3, generator=torch_generator(1, "batches")))


def fitted_by_trainer(batches: list[Tensor], epochs: int) -> Recorder:
    module = Recorder()
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module


def test_hooks_come_in_lightnings_order_and_give_its_bits(batches: list[Tensor]) -> None:
    theirs = fitted_by_trainer(batches, epochs=2)
    ours = Recorder()
    fit(ours, batches, epochs=2)
    assert {call for call in ours.calls if not call.startswith("callback")} == set(HOOKS)
    assert sum(call.startswith("callback") for call in ours.calls) > len(CALLBACK_HOOKS)

    def in_order(calls: list[str]) -> list[str]:
        return [call for call in calls if call not in NEVER_ORDERED]

    assert in_order(ours.calls) == in_order(theirs.calls)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_module_that_needs_more_than_the_loop_does_is_refused(batches: list[Tensor]) -> None:
    class TwoOptimizers(Recorder):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=1.0) for p in self.parameters()]

    with pytest.raises(TypeError, match=r"TwoOptimizers: expected .* one optimizer .*, got list"):
        fit(TwoOptimizers(), batches, epochs=1)
    manual = Recorder()
    manual.automatic_optimization = False
    with pytest.raises(TypeError, match="automatic_optimization=False"):
        fit(manual, batches, epochs=1)


@pytest.mark.parametrize("use", [lambda t: t.datamodule, lambda t: setattr(t, "should_stop", True)])
def test_a_callback_that_needs_a_trainer_is_refused(
    batches: list[Tensor], use: Callable[[Any], object]
) -> None:
    class Needy(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            use(trainer)

    module = Recorder()
    module.configure_callbacks = Needy  # type: ignore[method-assign, assignment]
    pattern = r"expected one of trainer.max_epochs, .*, got trainer.(datamodule|should_stop): "
    with pytest.raises(AttributeError, match=pattern):
        fit(module, batches, epochs=1)


def test_clip_gradients_takes_a_long_gradient_to_length_one() -> None:
    module = Recorder()
    one, two = module.parameters()
    one.grad, two.grad = torch.full_like(one, 3.0), torch.full_like(two, 4.0)
    length = (6 * 9 + 2 * 16) ** 0.5
    clip, trainer = ClipGradients(NoOptions()), FitTrainer(1, [], [])
    for _ in range(2):  # a gradient of length one stays as it is
        clip.on_before_optimizer_step(trainer, module, torch.optim.SGD([one]))
        torch.testing.assert_close(one.grad, torch.full_like(one, 3 / length))
        torch.testing.assert_close(two.grad, torch.full_like(two, 4 / length))


def test_the_backward_pass_is_fabrics(
    batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric, losses = make_fabric(), []
    real = fabric.strategy.backward

    def backward(loss: Tensor, *arguments: Any) -> None:
        losses.append(float(loss.detach()))
        real(loss, *arguments)

    monkeypatch.setattr(fabric.strategy, "backward", backward)
    fit(Recorder(), batches, 2, fabric)
    assert len(losses) == 2 * len(batches)


def test_slurm_s_variables_do_not_reach_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "fedprompt"}.items():
        monkeypatch.setenv(name, value)
    assert make_fabric().world_size == 1
