"""Which modules of a student and its teacher compute the same thing, and how far apart what they return is.

Legend: T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meo_hf.errors import UsageError
from meo_hf.modeling.blocks_meo import find_blocks
from meo_hf.modeling.families_meo import Family, family_of, has_row
from meo_hf.modeling.feedforward_meo import merged_feed_forwards
from meo_hf.modeling.moe_layouts_meo import moe_blocks


def feed_forward_pairs(student: Any, teacher: Any) -> dict[str, str]:
    """Return path in the student -> path in the teacher of all feed-forwards, or MoE blocks, that correspond.

    Raises UsageError where the models have none in common, or the student lacks one of the teacher's.
    """
    pairs = dict(_sites(student, teacher))
    have = {path for path, _ in student.named_modules()}
    lost = sorted(set(pairs) - have)
    if not pairs or lost:
        what = f"the model has no {lost[0]}" if lost else "it has none that is known here"
        raise UsageError(
            f"feed-forwards cannot be matched with those of {type(teacher).__name__}: {what}. Give the teacher that "
            "the model was made from, or leave the weight of 'ffn' at 0"
        )
    _check_width(student, teacher, "feed-forwards", "ffn")
    return pairs


def _sites(student: Any, teacher: Any) -> Iterator[tuple[str, str]]:
    if not has_row(teacher.config.model_type):
        return
    family = family_of(teacher.config.model_type)
    if not isinstance(family, Family):
        yield from ((path, path) for path, _ in moe_blocks(teacher, family.layout))
        return
    merged = dict(merged_feed_forwards(student))
    for block in find_blocks(teacher, family):
        own = f"{block.path}.{block.down}" if family.hosted else block.path
        yield block.slot if block.slot in merged else own, own


def check_depth(student: Any, teacher: Any) -> None:
    """Raise UsageError unless both models have as many layers, of the same width."""
    depths = [model.config.get_text_config(decoder=True).num_hidden_layers for model in (student, teacher)]
    if depths[0] != depths[1]:
        raise UsageError(
            f"hidden states cannot be matched: the model has {depths[0]} layers, the teacher {depths[1]}. Give a "
            "teacher of the same depth, or leave the weight of 'hidden' at 0"
        )
    _check_width(student, teacher, "hidden states", "hidden")


def _check_width(student: Any, teacher: Any, what: str, name: str) -> None:
    widths = [model.config.get_text_config(decoder=True).hidden_size for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise UsageError(
            f"{what} cannot be matched: the model has {widths[0]} features, the teacher {widths[1]}. Leave the weight "
            f"of {name!r} at 0"
        )


@contextmanager
def recorded(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within this context keep what modules return, the first of several values, by their paths.

    A layer that is run again in backward does not count.
    """
    outputs: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[path] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(partial(keep, path))
            stack.callback(handle.remove)
        yield outputs


def relative_errors(pairs: Iterable[tuple[Tensor, Tensor]], counted: Tensor) -> Tensor:
    """Sum over counted tokens the squared distance relative to the expected norm's square, averaged over the pairs.

    Each pair holds what was found and what is expected, [B, S, D] or [B * S, D]; `counted` is [B, S].
    """
    errors = []
    for found, expected in pairs:
        wide = torch.promote_types(found.dtype, torch.float32)
        found, expected = (x.reshape(-1, x.shape[-1]).to(counted.device, wide) for x in (found, expected))
        norm = expected.square().sum(-1).clamp(min=torch.finfo(wide).tiny)
        error = (found - expected).square().sum(-1) / norm
        errors.append(torch.where(counted.flatten(), error, 0).sum())
    return torch.stack(errors).mean()
