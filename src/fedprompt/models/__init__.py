"""Models: the frozen backbone, heads, prompt selection, and the embedded nano weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Backbone", "from_torchvision", "load_backbone"]

if TYPE_CHECKING:
    from fedprompt.models.backbone import Backbone, from_torchvision, load_backbone


def __getattr__(name: str) -> Any:
    # Loaded on first use: timm takes seconds to import, and options do not need it.
    if name in __all__:
        from fedprompt.models import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module 'fedprompt.models' has no attribute '{name}'")
