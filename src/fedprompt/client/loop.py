"""The fit loop of the hot path: Lightning's hooks in Lightning's order, without a `Trainer`.

A `Trainer` that is built for each client costs about 1 ms a step, its construction shared out
(docs/performance.md), which is as much as the step itself where the head alone is trained. A
client stays a LightningModule, and a plain `Trainer` fits it to the same bits (a test checks it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


def fit(module: pl.LightningModule, batches: Iterable[Any], epochs: int) -> None:
    """Train a module on the device on which it is.

    What is left out of Lightning's fit: loggers, callbacks, validation, schedulers, gradient
    accumulation, and the hooks that move a batch, as the batches lie on the module's device
    already.

    Args:
        module: with automatic optimisation by one optimizer.
        batches: an epoch's batches; iterated once for each epoch.
        epochs: passes over `batches`.

    Raises:
        TypeError: the module wants something of the `Trainer` that this loop does not do.
    """
    optimizer = only_optimizer(module)
    module.setup("fit")
    module.on_fit_start()
    module.train()
    module.on_train_start()
    for epoch in range(epochs):
        module.on_train_epoch_start()
        for index, batch in enumerate(batches):
            fit_batch(module, optimizer, batch, epoch, index)
        module.on_train_epoch_end()
    module.on_train_end()
    module.on_fit_end()
    module.teardown("fit")


def fit_batch(
    module: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    epoch: int,
    index: int,
) -> None:
    """One step."""
    loss: Any = None

    def closure() -> Tensor:
        nonlocal loss
        loss = module.training_step(batch, index)
        module.on_before_zero_grad(optimizer)
        module.optimizer_zero_grad(epoch, index, optimizer)
        module.on_before_backward(loss)
        loss.backward()
        module.on_after_backward()
        module.on_before_optimizer_step(optimizer)
        return loss  # type: ignore[no-any-return]

    module.on_train_batch_start(batch, index)
    module.optimizer_step(epoch, index, optimizer, closure)
    module.on_train_batch_end(loss, batch, index)


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
