"""meo_hf: many experts at the price of one, for Hugging Face models.

`import meo_hf` registers the MEO classes with Transformers' Auto classes, so that they load without a trust flag.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

from meo_hf.version import __version__

if TYPE_CHECKING:
    from meo_hf.adapters import MeoLoraConfig
    from meo_hf.conversion.convert import convert, verify_output
    from meo_hf.conversion.extraction import extract
    from meo_hf.conversion.inspection import inspect
    from meo_hf.conversion.report import ConversionReport
    from meo_hf.reduction.reduce import reduce, reduction_method
    from meo_hf.training.recover import recover

_HOMES = {
    "MeoLoraConfig": "meo_hf.adapters",
    "ConversionReport": "meo_hf.conversion.report",
    "convert": "meo_hf.conversion.convert",
    "extract": "meo_hf.conversion.extraction",
    "inspect": "meo_hf.conversion.inspection",
    "recover": "meo_hf.training.recover",
    "reduce": "meo_hf.reduction.reduce",
    "reduction_method": "meo_hf.reduction.reduce",
    "verify_output": "meo_hf.conversion.convert",
}
__all__ = [
    "ConversionReport",
    "MeoLoraConfig",
    "__version__",
    "convert",
    "extract",
    "inspect",
    "recover",
    "reduce",
    "reduction_method",
    "verify_output",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _register() -> None:
    """Register, without collecting garbage: imports make objects that stay, and searching them is slow."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        from meo_hf.registration import register

        register()
    finally:
        if collecting:
            gc.enable()


_register()
