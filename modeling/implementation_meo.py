"""How experts that run one by one are computed: as their family lets one choose."""

from __future__ import annotations

from typing import Any

from .configuration_meo import settings_of


class ImplementationMixin:
    """Overrides of what Transformers asks about `experts_implementation`; both methods are private there."""

    config: Any

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Whether the family lets one choose how its own experts run, which Transformers reads from its source."""
        stock: Any = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return bool(stock._can_set_experts_implementation())

    def _grouped_mm_can_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Check as Transformers does; raises ValueError where experts merge instead."""
        if settings_of(self.config).level != "unmerged":
            raise ValueError("merged experts have no experts_implementation: leave it out")
        return super()._grouped_mm_can_dispatch(*args, **kwargs)  # type: ignore[misc]
