"""The fit loop of the hot path: Lightning Fabric and Lightning's hooks, without a `Trainer`.

A `Trainer` that is built for each client costs about 1 ms a step, its construction shared out
(docs/performance.md), which is as much as the step itself where the head alone is trained. A worker
builds one `Fabric` instead. It brings modules to the device, computes the blocks in the run's
precision, and does the backward pass. A client stays a LightningModule, and a plain `Trainer` fits
it to the same bits (a test checks it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NoReturn, cast

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor


def make_fabric(device: str = "cpu", precision: str = "32-true") -> Fabric:
    """Lightning Fabric for one process on one device.

    Args:
        device: `cpu` or `cuda`.
        precision: of what runs under its `autocast`: one of `models.options.PRECISIONS`.
    """
    return Fabric(
        accelerator=device,
        devices=1,
        precision=cast("Literal['32-true', 'bf16-mixed']", precision),
        # A worker may run within a job of SLURM, which is not Lightning's to read.
        plugins=LightningEnvironment(),
    )


@dataclasses.dataclass
class FitTrainer:
    """What callbacks get in place of a `Trainer`: where the fit is, and nothing else."""

    max_epochs: int
    optimizers: Sequence[torch.optim.Optimizer]
    callbacks: Sequence[pl.Callback]
    current_epoch: int = 0
    global_step: int = 0
    """Steps of the optimizer that are done."""

    def __getattr__(self, name: str) -> NoReturn:
        # Called only for what is not there.
        raise AttributeError(self._absent(name))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(self._absent(name))
        super().__setattr__(name, value)

    def _absent(self, name: str) -> str:
        return (
            f"clients.callbacks: expected one of trainer.{', trainer.'.join(_ATTRIBUTES)}, got "
            f"trainer.{name}: clients are fitted without a Trainer; choose another callback"
        )


_ATTRIBUTES = [field.name for field in dataclasses.fields(FitTrainer)]


class Hooks:
    """Calls hooks as Lightning does: those of a module's callbacks, then the module's own.

    Args:
        module: its `configure_callbacks` says which callbacks.
        trainer: what callbacks see of the fit.
    """

    def __init__(self, module: pl.LightningModule, trainer: FitTrainer) -> None:
        self.module, self.trainer = module, trainer

    def __call__(self, hook: str, *arguments: object) -> None:
        """Call the hook of this name everywhere."""
        for callback in self.trainer.callbacks:
            getattr(callback, hook)(self.trainer, self.module, *arguments)
        getattr(self.module, hook)(*arguments)


def fit(
    module: pl.LightningModule, batches: Iterable[object], epochs: int, fabric: Fabric | None = None
) -> None:
    """Train a module on the device on which it is.

    What is left out of Lightning's fit: loggers, validation, schedulers, gradient accumulation, and
    the hooks that move a batch, as the batches lie on the module's device already. Callbacks get a
    `FitTrainer`.

    Args:
        module: with automatic optimisation by one optimizer.
        batches: an epoch's batches; iterated once for each epoch.
        epochs: passes over `batches`.
        fabric: does the backward pass; by default one for the module's device.

    Raises:
        TypeError: the module wants something of the `Trainer` that this loop does not do.
        AttributeError: so does a callback.
    """
    fabric = fabric or make_fabric(module.device.type)
    module.fabric = fabric
    optimizer = only_optimizer(module)
    hooks = Hooks(module, FitTrainer(epochs, [optimizer], own_callbacks(module)))
    hooks("setup", "fit")
    hooks("on_fit_start")
    module.train()
    hooks("on_train_start")
    for epoch in range(epochs):
        hooks.trainer.current_epoch = epoch
        hooks("on_train_epoch_start")
        for index, batch in enumerate(batches):
            fit_batch(hooks, optimizer, batch, epoch, index)
        hooks("on_train_epoch_end")
    hooks.trainer.current_epoch = epochs
    hooks("on_train_end")
    hooks("on_fit_end")
    hooks("teardown", "fit")


def fit_batch(
    hooks: Hooks, optimizer: torch.optim.Optimizer, batch: object, epoch: int, index: int
) -> None:
    """One step.

    Args:
        hooks: of the module, which has its Fabric.
        optimizer: the module's.
        batch: what the module's `training_step` takes.
        epoch: from 0.
        index: of the batch in the epoch, from 0.
    """
    module = hooks.module
    loss: Tensor | None = None

    def closure() -> Tensor:
        nonlocal loss
        loss = cast("Tensor", module.training_step(batch, index))
        hooks("on_before_zero_grad", optimizer)
        module.optimizer_zero_grad(epoch, index, optimizer)
        hooks("on_before_backward", loss)
        module.backward(loss)  # which is Fabric's
        hooks("on_after_backward")
        hooks("on_before_optimizer_step", optimizer)
        return loss

    hooks("on_train_batch_start", batch, index)
    module.optimizer_step(epoch, index, optimizer, closure)
    hooks.trainer.global_step += 1
    hooks("on_train_batch_end", loss, batch, index)


def own_callbacks(module: pl.LightningModule) -> list[pl.Callback]:
    """What `configure_callbacks` returns, as a list."""
    given = module.configure_callbacks()
    return list(given) if isinstance(given, Sequence) else [given]


def only_optimizer(module: pl.LightningModule) -> torch.optim.Optimizer:
    """What `configure_optimizers` returns.

    Raises:
        TypeError: it is not one optimizer, or the module optimises by itself.
    """
    optimizer = module.configure_optimizers()
    if not isinstance(optimizer, torch.optim.Optimizer) or not module.automatic_optimization:
        raise TypeError(
            f"{type(module).__name__}: expected configure_optimizers to return one optimizer and "
            f"automatic_optimization, got {type(optimizer).__name__} and "
            f"automatic_optimization={module.automatic_optimization}"
        )
    return optimizer
