"""The fit loop against Lightning's own Trainer: the same hooks in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedprompt.client.loop import fit
from fedprompt.core.seeding import torch_generator

HOOKS = (
    *("setup", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"),
    *("on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step"),
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
)
"""Every hook that the loop calls."""

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
    assert set(ours.calls) == set(HOOKS)

    def in_order(calls: list[str]) -> list[str]:
        return [call for call in calls if call in HOOKS and call not in NEVER_ORDERED]

    assert in_order(ours.calls) == in_order(theirs.calls)
    assert sorted(ours.calls[:3]) == sorted(NEVER_ORDERED)
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
