"""What a comparison runs: its settings, the models that it loads, and the variants that share their weights."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from meo_hf.benchmark.options import DTYPES, at_least, check_place, option
from meo_hf.conversion.source import first_line, public_name
from meo_hf.errors import CheckpointError, MeoError, SourceError
from meo_hf.modeling.merger_meo import Linear, Merger
from meo_hf.modeling.merging_meo import grouped_linear, merge_experts
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.moe_settings_meo import set_top_k
from meo_hf.modeling.router_meo import Gates

SHORTEST = 4
"""Tokens of the shortest window: two to read, and two to time."""


@dataclass(frozen=True)
class CompareSettings:
    """The options of a run. Raises UsageError for one that makes no sense."""

    window: int = 512
    limit: int = 64
    batch_size: int = 4
    rounds: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, low in {"window": SHORTEST, "limit": 1, "batch_size": 1, "rounds": 1}.items():
            at_least(name, getattr(self, name), low)
        check_place(self.dtype, self.device)

    def command(self, source: str, outs: Sequence[str], text: str, also: Sequence[str] = ()) -> str:
        """Return the command line that repeats the run, every option spelled out, `outs` as they are to be shown."""
        words = ["meo-hf", "compare", public_name(source), *outs, "--text", public_name(text)]
        for name in also:
            words += ["--also", public_name(name)]
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                words += [option(field.name), str(value)]
            elif value:
                words.append(option(field.name))
        return shlex.join(words)


@dataclass(frozen=True)
class Subject:
    """A model as a comparison runs it.

    `arguments` are what its forward takes beside tokens, `nbytes` what its weights take, `parameters` how many values
    they have, 0 if nobody counted. `segment` is the number of tokens per merge, None for a model that merges nothing.
    """

    name: str
    model: Any
    arguments: dict[str, Any]
    nbytes: int
    segment: int | None = None
    parameters: int = 0

    @classmethod
    def of(cls, name: str, model: PreTrainedModel) -> Subject:
        """Run a model as it is; a MEO decoder's gates are refreshed with each segment, whatever its own default."""
        context = getattr(model, "_meo_context", None)
        nbytes, parameters = weight_bytes(model), sum(parameter.numel() for parameter in model.parameters())
        if context is None or not context.reads_past:
            return cls(name, model, {}, nbytes, None, parameters)
        return cls(name, model, {"routing": "segment"}, nbytes, context.settings.segment_length, parameters)

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits [B, S, V] of tokens [B, S]."""
        return self.model(ids, use_cache=False, **self.arguments).logits


def gates_of(model: Any) -> str:
    """Say how the gates of a MEO decoder are formed here."""
    settings = model._meo_context.settings
    read = {
        "hidden": "the router reads the mean state of the segment before",
        "probs": "the gates of the segment before are averaged",
    }[settings.pooling]
    return (
        f"segments of {settings.segment_length} tokens, pooling {settings.pooling}: {read}, in the first segment of "
        "its first token; routing='segment', so no gate reads a token that it helps to predict"
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def load(model_class: Any, name: str | Path, settings: CompareSettings, **options: Any) -> PreTrainedModel:
    """Load a model to run it here.

    Raises SourceError if that fails, CheckpointError if its files leave weights out. Weights are copied into memory of
    their own: some would stay mapped files, whose small pages read slower.
    """
    try:
        model, info = model_class.from_pretrained(
            name, dtype=DTYPES[settings.dtype], device_map=settings.device, output_loading_info=True, **options
        )
    except MeoError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        raise SourceError(f"{name} cannot be loaded ({first_line(error)}): check it") from None
    if lost := sorted(info["missing_keys"]):
        raise CheckpointError(f"{name} leaves out {len(lost)} of its model's weights, e.g. {lost[0]}: check it")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def load_also(name: str, settings: CompareSettings) -> PreTrainedModel:
    """Load any other causal language model."""
    return load(AutoModelForCausalLM, name, settings, trust_remote_code=settings.trust_remote_code)


def with_top_k(model: PreTrainedModel, family: MoeFamily, top_k: int) -> PreTrainedModel:
    """Return a mixture of experts that selects another number of experts, and shares this one's weights.

    Raises MeoConfigError where the family fixes that number.
    """
    config = copy.deepcopy(model.config)
    set_top_k(config, family, top_k)
    return _sharing(model, config)


def _sharing(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model from a config around the parameters and buffers of another: routers copy values when built."""
    with torch.device("meta"):
        twin = type(model)(config)
    for path, module in twin.named_modules():
        owner = model.get_submodule(path)
        module._parameters, module._buffers = owner._parameters, owner._buffers
    return twin.eval()


@contextmanager
def averaged(
    model: PreTrainedModel, totals: Mapping[str, tuple[float, float]], name: str = "uniform average"
) -> Iterator[Subject]:
    """Within this context a MEO model's MoE blocks run the plain average of all their experts.

    `totals` hold for each block's experts what scales their output: the sum of a gate, and in families with experts
    that return their input the share of those.
    """
    mergers = [module for module in model.modules() if isinstance(module, Merger)]
    spared = [_spared(module) for module in mergers]
    for module in mergers:
        module.merged_maps = _AverageMaps(module)  # type: ignore[method-assign]
    for path, module in merged_moe(model):
        module._normalise = partial(_constant, *totals[path], bool(module.zero_expert_num))
    try:
        whole = Subject.of(name, model)
        nbytes, parameters = whole.nbytes - sum(b for b, _ in spared), whole.parameters - sum(n for _, n in spared)
        yield replace(whole, nbytes=nbytes, parameters=parameters, segment=None)
    finally:
        for module in mergers:
            del module.merged_maps
        for _, module in merged_moe(model):
            del module._normalise


def _spared(module: Any) -> tuple[int, int]:
    """Return the bytes and the number of values of all experts but one."""
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    experts = module.count()
    nbytes, values = sum(stack.nbytes for stack in stacks), sum(stack.numel() for stack in stacks)
    return nbytes - nbytes // experts, values - values // experts


class _AverageMaps:
    """What stands in for `Merger.merged_maps`: one dense linear map per name, the average of the module's stack."""

    def __init__(self, module: Merger) -> None:
        self._module, self._known = module, dict[str, Linear]()

    def __call__(self, call: Any, groups: Any, names: tuple[str, ...], gates: Any, **options: Any) -> dict[str, Linear]:
        for name in names:
            if name not in self._known:
                self._known[name] = self._average(name)
        return {name: self._known[name] for name in names}

    def _average(self, name: str) -> Linear:
        """Return the mean of all experts, summed in float32 or wider, as a linear map."""
        weight, bias = self._module.stack(name)
        count = len(weight)
        index = torch.arange(count, device=weight.device)[None]
        shares = torch.full((1, count), 1 / count, device=weight.device)
        means = [None if stack is None else merge_experts(stack, index, shares) for stack in (weight, bias)]
        return partial(_dense, means)


def _dense(means: Any, x: Tensor) -> Tensor:
    """Apply one linear map, weight [1, O, I] and bias [1, O], to tokens [N, W, I] of all groups."""
    return grouped_linear(x.reshape(1, -1, x.shape[-1]), *means).reshape(*x.shape[:-1], -1)


def _constant(
    total: float, identity: float, returns_input: bool, index: Tensor, weights: Tensor
) -> tuple[Gates, Tensor, Tensor | None]:
    """Stand in for `MergedExpertsMixin._normalise`: the same sum for every group, and no gate that anybody reads."""
    sums = torch.full((len(weights),), total, device=weights.device)
    return Gates(index, weights), sums, torch.full_like(sums, identity) if returns_input else None
