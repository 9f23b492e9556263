"""A mixture's experts as their mean and low-rank parts: what to read of the source, and what to write instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf.conversion.births import Copied
from meo_hf.conversion.expert_bank import Truncation
from meo_hf.conversion.factorise import Factor, Factorised
from meo_hf.conversion.safetensors_files import DTYPES, TensorSpec, raw_bytes
from meo_hf.conversion.source import Source
from meo_hf.conversion.stored import StoredTensor, stored_tensors
from meo_hf.conversion.write import Targets
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.merger_meo import bank_key
from meo_hf.modeling.moe_meo import merged_moe


@dataclass
class Stack:
    """One parameter of a mixture's experts, and the linear map that is a view of it."""

    path: str
    module: Any
    map: str
    name: str
    stored: StoredTensor
    model: PreTrainedModel

    @property
    def map_path(self) -> str:
        """Path of the linear map."""
        return f"{self.path}.{self.map}"

    @property
    def live(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.name}"

    def experts(self) -> Tensor:
        """Read the linear map of all experts [E, O, I]."""
        probe = copy.copy(self.module)
        loaded = nn.Parameter(self.stored.load(self.model), requires_grad=False)
        probe._parameters = {**self.module._parameters, self.name: loaded}
        return probe.stack(self.map)[0][: self.module.count()]

    def mean(self) -> Tensor:
        """Read the parameter as it is with one expert, the mean of all."""
        loaded, count = self.stored.load(self.model).float(), self.module.count()
        rows = len(loaded) // count
        return loaded[: rows * count].unflatten(0, (count, rows)).mean(0)


@dataclass(frozen=True)
class SharedWeight:
    """The mean of all experts, as the family stores one."""

    stack: Stack

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(self.stack.mean().to(DTYPES[target.dtype]))


@dataclass
class MoeBank:
    """A mixture's expert stacks, by the paths of their linear maps, and their decompositions."""

    stacks: dict[str, Stack]
    maps: dict[str, Factorised]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by path of the linear map."""
        return {path: one.rank for path, one in self.maps.items()}

    def targets(self, source: Source) -> Targets:
        """Return what to write: the source's tensors, and low-rank experts in the place of whole ones."""
        gone = {ref.spec.name for one in self.stacks.values() for refs in one.stored.refs.values() for ref in refs}
        made: Targets = {n: (ref.spec, Copied(ref)) for n, ref in source.tensors.items() if n not in gone}
        for path, stack in self.stacks.items():
            one, dtype = self.maps[path], stack.stored.dtype
            whole = stack.module.get_parameter(stack.name).shape
            shape = (whole[0] // stack.module.count(), *whole[1:])
            made[stack.live] = (TensorSpec(stack.live, dtype, shape), SharedWeight(stack))
            count, outputs, inputs = one.shape
            for letter, last in (("A", (one.rank, inputs)), ("B", (one.rank, outputs))):
                name = f"{stack.path}.low_rank.{bank_key(stack.map)}.{letter}"
                made[name] = (TensorSpec(name, dtype, (count, *last)), Factor(one, letter))
        return made


def moe_bank(source: Source, meo: PreTrainedModel, truncation: Truncation) -> MoeBank:
    """Find the experts of a mixture (`meo` on the meta device, with whole experts) and choose their ranks.

    Raises UsageError for another centre than the mean, UnsupportedError for experts that are no one module.
    """
    if truncation.center == "source":
        raise UsageError("--expert-center source needs a dense source: a mixture's experts have only their mean")
    stored = stored_tensors(source, meo)
    stacks, maps = {}, {}
    for path, module in merged_moe(meo):
        if not module.maps:
            raise UnsupportedError(f"{type(module).__name__} cannot keep low-rank experts: convert with whole ones")
        for name in module.maps:
            view = module.stack(name)[0]
            own = next(n for n, p in module.named_parameters(recurse=False) if view is p or view._base is p)
            stack = Stack(path, module, name, own, stored[f"{path}.{own}"], meo)
            shape = (module.count(), view.shape[1], view.shape[2])
            stacks[stack.map_path] = stack
            maps[stack.map_path] = Factorised(stack.map_path, shape, stack.experts, None)
            truncation.choose(maps[stack.map_path])
    return MoeBank(stacks, maps)
