"""`clip_gradients`: no step follows a gradient longer than one."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from fedprompt.client.callbacks import NoOptions, callbacks

LONGEST = 1.0


@callbacks.register("clip_gradients", NoOptions)
class ClipGradients(pl.Callback):
    """Scales a client's gradients down when their common norm exceeds one.

    Helps against clients whose losses diverge (Pascanu et al., "On the difficulty of training
    recurrent neural networks", ICML 2013, Algorithm 1).
    """

    def __init__(self, options: NoOptions) -> None:
        super().__init__()

    def on_before_optimizer_step(
        self, trainer: object, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """See `ClipGradients`.

        Args:
            trainer: the state of the fit; not used.
            pl_module: the client's module; not used.
            optimizer: whose gradients are clipped.
        """
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), LONGEST)
