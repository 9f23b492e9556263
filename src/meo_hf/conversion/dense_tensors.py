"""A dense checkpoint's tensors by their names in the live model."""

from __future__ import annotations

from transformers import PreTrainedModel

from meo_hf.conversion.names import live_names
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.source import Source
from meo_hf.errors import CheckpointError


def tensors_by_live_name(dense: PreTrainedModel, source: Source) -> dict[str, TensorRef]:
    """Return a source's tensors by their names in the live model; raises CheckpointError if two share one."""
    by_live: dict[str, TensorRef] = {}
    for disk, live in live_names(dense, source.tensors).items():
        if live in by_live:
            raise CheckpointError(f"{source.name} holds {live} twice, as {disk} and {by_live[live].spec.name}")
        by_live[live] = source.tensors[disk]
    return by_live


def parts_of(
    source: Source, names: list[str], shapes: list[tuple[int, ...]], refs: dict[str, TensorRef]
) -> tuple[TensorRef, ...]:
    """Return tensors of certain shapes that an expert is made of; raises CheckpointError where one is not there."""
    for name, shape in zip(names, shapes, strict=True):
        if name not in refs:
            raise CheckpointError(f"{source.name} lacks {name}, which its experts would be made of")
        check_shape(source, refs[name], shape)
    return tuple(refs[name] for name in names)


def check_shape(source: Source, ref: TensorRef, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError for a tensor of another shape than the config asks for."""
    if ref.spec.shape != shape:
        raise CheckpointError(
            f"{source.name}: {ref.spec.name} has shape {list(ref.spec.shape)}, the config asks for {list(shape)}"
        )
