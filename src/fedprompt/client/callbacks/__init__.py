"""Lightning callbacks that clients are fitted with: `clients.callbacks` names them.

A callback is a registered `pytorch_lightning.Callback`, in a file here or in a plug-in. Every
client gets one of its own in every round. `client.loop.fit` calls its hooks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fedprompt.core.registry import Registry

if TYPE_CHECKING:
    from pytorch_lightning import Callback


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A callback has no options in a config: another setting is another name."""


callbacks: Registry[Callback] = Registry("callback", "fedprompt.client.callbacks")
