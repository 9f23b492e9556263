"""What a quantiser left as it was: bitsandbytes and torchao know linear layers, and stacks of experts are none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from .merger_meo import Merger

logger = logging.get_logger(__name__)


def tell_unquantised(model: Any) -> None:
    """Warn about experts that are in full precision in a model that was loaded quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    left = {id(p): p for p in _experts(model) if type(p.data) is Tensor and p.is_floating_point()}
    full = sum(p.nbytes for p in left.values())
    if full:
        total = sum(map(_nbytes, [*model.parameters(), *model.buffers()]))
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in left.values()}))
        method = getattr(quantizer.quantization_config, "quant_method", "this method")
        logger.warning(
            f"Quantisation by {getattr(method, 'value', method)} left the experts as they are: {full / 2**20:,.1f} MiB "
            f"of {dtypes}, {full / total:.0%} of what is in memory. It knows linear layers, and experts are stacks."
        )


def _experts(model: nn.Module) -> list[nn.Parameter]:
    modules = [module for module in model.modules() if isinstance(module, Merger)]
    return [p for module in modules if isinstance(module, nn.Module) for p in module.parameters() if p.dim() > 1]


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of what a quantised one is made of."""
    flatten = getattr(tensor.data, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor.data, name)) for name in flatten()[0])
