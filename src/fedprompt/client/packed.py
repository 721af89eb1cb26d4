"""Several clients on one frozen backbone: their batches go through it in one forward and backward.

Each client keeps what is its own: selection, prompts, head, dropout stream, mean of the loss,
objective and optimizer state. The losses are summed, so that each client's gradients are those of
its own loss; only the numbers of the matrix products differ in their last bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fedprompt.client.loop import FitTrainer, Hooks, only_optimizer, own_callbacks
from fedprompt.client.module import Batch, ClientModule

PackedBatch = list[tuple[int, Batch]]
"""A batch of each client that still has one in this epoch: its position in the pack, its batch."""


class PackedBatches(IterableDataset[PackedBatch]):
    """The batches of several clients side by side; a client with fewer drops out early.

    Args:
        batches: of each client.
    """

    def __init__(self, batches: Sequence[IterableDataset[Batch]]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[PackedBatch]:
        for row in itertools.zip_longest(*self.batches):
            yield [(position, batch) for position, batch in enumerate(row) if batch is not None]


class PackedClients(pl.LightningModule):
    """Some clients' modules as one.

    The hooks of the clients and of their callbacks are called in Lightning's order; those of a step
    only where the client takes part in it. A client must not override `backward`, `optimizer_step`
    or `optimizer_zero_grad`, which are done for all at once.

    Args:
        clients: modules with one recipe on one backbone.
    """

    def __init__(self, clients: Sequence[ClientModule]) -> None:
        super().__init__()
        self.clients = nn.ModuleList(clients)
        self._hooks = [
            Hooks(client, FitTrainer(client.recipe.training.epochs, [], own_callbacks(client)))
            for client in clients
        ]
        self._active: list[Hooks] = []
        """Those of the clients that take part in the step."""
        self._epochs_started = 0

    def training_step(self, batch: PackedBatch, batch_index: int) -> Tensor:
        """The sum of the clients' losses."""
        members = [self._client(position) for position, _ in batch]
        chosen = [
            client.choose(queries)
            for client, (_, (_, queries, _, _)) in zip(members, batch, strict=True)
        ]
        inputs = [inputs for _, (inputs, _, _, _) in batch]
        features = encode_together(members, inputs, [rows for rows, _ in chosen])
        losses = [
            client.step_loss(own, rows, similarity, client_batch)
            for client, own, (rows, similarity), (_, client_batch) in zip(
                members, features, chosen, batch, strict=True
            )
        ]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The clients' optimizers as one: groups of equal options are joined.

        An optimizer leaves out parameters without a gradient, so that a client which takes no part
        in a step is not touched.
        """
        optimizers = [only_optimizer(self._client(i)) for i in range(len(self.clients))]
        kind: Any = type(optimizers[0])
        groups = []
        for alike in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            options = [_options(group) for group in alike]
            if any(type(each) is not kind for each in optimizers) or options != options[:1] * len(
                options
            ):
                raise TypeError(
                    "packed clients: expected optimizers of one kind with equal options, "
                    f"got {[(type(each).__name__, *options) for each in optimizers]}"
                )
            groups.append({**options[0], "params": [p for group in alike for p in group["params"]]})
        joined: torch.optim.Optimizer = kind(groups)
        for hooks in self._hooks:
            hooks.trainer.optimizers = [joined]
        return joined

    def setup(self, stage: str) -> None:
        """Passed on."""
        for hooks in self._hooks:
            hooks.module.fabric = self.fabric
        self._pass_on("setup", self._hooks, stage)

    def on_fit_start(self) -> None:
        """Passed on."""
        self._pass_on("on_fit_start", self._hooks)

    def on_train_start(self) -> None:
        """Passed on."""
        self._pass_on("on_train_start", self._hooks)

    def on_train_epoch_start(self) -> None:
        """Passed on."""
        for hooks in self._hooks:
            hooks.trainer.current_epoch = self._epochs_started
        self._epochs_started += 1
        self._pass_on("on_train_epoch_start", self._hooks)

    def on_train_batch_start(self, batch: PackedBatch, batch_index: int) -> None:
        """Passed on with each client's own batch."""
        self._active = [self._hooks[position] for position, _ in batch]
        for hooks, (_, own) in zip(self._active, batch, strict=True):
            hooks("on_train_batch_start", own, batch_index)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Passed on to the clients of the step."""
        self._pass_on("on_before_zero_grad", self._active, optimizer)

    def on_before_backward(self, loss: Tensor) -> None:
        """Passed on to the clients of the step."""
        self._pass_on("on_before_backward", self._active, loss)

    def on_after_backward(self) -> None:
        """Passed on to the clients of the step."""
        self._pass_on("on_after_backward", self._active)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Passed on to the clients of the step."""
        self._pass_on("on_before_optimizer_step", self._active, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_index: int) -> None:
        """Passed on with each client's own batch.

        Args:
            outputs: of `training_step`.
            batch: one batch of each client that takes part in the step.
            batch_index: of the step in its epoch.
        """
        for hooks, (_, own) in zip(self._active, batch, strict=True):
            hooks.trainer.global_step += 1
            hooks("on_train_batch_end", outputs, own, batch_index)

    def on_train_epoch_end(self) -> None:
        """Passed on."""
        self._pass_on("on_train_epoch_end", self._hooks)

    def on_train_end(self) -> None:
        """Passed on."""
        for hooks in self._hooks:
            hooks.trainer.current_epoch = self._epochs_started
        self._pass_on("on_train_end", self._hooks)

    def on_fit_end(self) -> None:
        """Passed on."""
        self._pass_on("on_fit_end", self._hooks)

    def teardown(self, stage: str) -> None:
        """Passed on."""
        self._pass_on("teardown", self._hooks, stage)

    def _client(self, position: int) -> ClientModule:
        client = self.clients[position]
        assert isinstance(client, ClientModule)
        return client

    def _pass_on(self, hook: str, clients: Sequence[Hooks], *arguments: object) -> None:
        for hooks in clients:
            hooks(hook, *arguments)


def encode_together(
    clients: Sequence[ClientModule], inputs: Sequence[Tensor], rows: Sequence[Tensor]
) -> list[Tensor]:
    """The features (B_i, d) of each client's batch, computed in one pass of the backbone.

    Args:
        clients: m of them.
        inputs: per client (B_i, T, d) tokens, or features without prompts.
        rows: per client (k_i,) the prompts that it prepends.
    """
    if not clients[0].recipe.needs_tokens:
        return list(inputs)
    if len({len(own) for own in rows}) > 1:
        # Sequences of different lengths: clients with equally many prompts go together.
        features: dict[int, Tensor] = {}
        for length in sorted({len(own) for own in rows}):
            members = [index for index, own in enumerate(rows) if len(own) == length]
            alike = encode_together(
                [clients[index] for index in members],
                [inputs[index] for index in members],
                [rows[index] for index in members],
            )
            features.update(zip(members, alike, strict=True))
        return [features[index] for index in range(len(clients))]
    prompts = [
        client.prompts[own].expand(len(batch), -1, -1)
        for client, batch, own in zip(clients, inputs, rows, strict=True)
    ]
    encoded = clients[0].backbone.encode(torch.cat(list(inputs)), torch.cat(prompts))
    return list(torch.split(encoded, [len(batch) for batch in inputs]))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
