"""Tensor parallel: each process holds a part of every expert's intermediate features, under Transformers' own plans.

Every process merges its part with the same gates. First projections give it its part of the intermediate features,
and the last one's partial outputs are summed over the processes. Routers stay whole in each process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors_meo import MeoConfigError
from .router_meo import Gates

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
except ImportError:  # a PyTorch without processes, or a Transformers that keeps them elsewhere
    ALL_PARALLEL_STYLES, TensorParallelLayer = None, object  # type: ignore[assignment,misc]

STYLE = "meo_experts"
ROUTER_STYLE = "meo_router"
INSTEAD = "use DDP, FSDP2 or `device_map`"
Linear = Callable[[Tensor], Tensor]


class Shards:
    """A module's part of its experts, in the process group that holds them all."""

    def __init__(self, mesh: Any) -> None:
        self.group, self.size = mesh.get_group(), mesh.size()

    @contextmanager
    def local(self, module: nn.Module) -> Iterator[None]:
        """Let a module read this process's part of its parameters; of a bias that all hold, each adds a share."""
        whole: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        for name, parameter in whole.items():
            if parameter.placements == (Replicate(),):
                part = parameter.to_local(grad_placements=[Partial()]) / self.size
            else:
                part = parameter.to_local()
            module._parameters[name] = part
        try:
            yield
        finally:
            module._parameters.update(whole)

    def enter(self, gates: Mapping[str, Gates]) -> dict[str, Gates]:
        """Return gates whose gradients are summed over all parts; maps that share gates go on sharing them."""
        made = {id(g): Gates(g.top_k_index, self._copy(g.top_k_weights)) for g in gates.values()}
        return {name: made[id(g)] for name, g in gates.items()}

    def around(self, maps: dict[str, Linear]) -> dict[str, Linear]:
        """Return the linear maps of the whole experts: whole inputs come in, whole outputs come out."""
        entry = _Entry(self)
        return {name: self._last(f) if name == "down_proj" else self._first(f, entry) for name, f in maps.items()}

    def _first(self, linear: Linear, entry: _Entry) -> Linear:
        return (lambda x: linear(entry(x))) if torch.is_grad_enabled() else linear

    def _last(self, linear: Linear) -> Linear:
        return lambda h: _SumForward.apply(linear(h), self.group)  # type: ignore[no-any-return]

    def _copy(self, x: Tensor) -> Tensor:
        return _SumBackward.apply(x, self.group) if torch.is_grad_enabled() and x.requires_grad else x


class _Entry:
    """What several first projections read: its gradient is summed over the processes once."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self._seen = shards, (None, None)

    def __call__(self, x: Tensor) -> Tensor:
        if self._seen[0] is not x:
            self._seen = (x, self._shards._copy(x))  # type: ignore[assignment]
        return self._seen[1]  # type: ignore[return-value]


class _SumForward(torch.autograd.Function):
    """Sum over the processes; the gradient is the same in all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _SumBackward(torch.autograd.Function):
    """Pass on; the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def _placement(module: nn.Module, name: str) -> Any:
    """Return how a parameter of merged experts is split, None for one that is not an expert's linear map."""
    linear, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
    if linear not in ("gate_up_proj", "up_proj", "down_proj"):
        return None
    if is_bias and linear == "down_proj":
        return Replicate()
    outputs, inputs = (2, 1) if getattr(module, "is_transposed", False) else (1, 2)
    dim = 1 if is_bias else inputs if linear == "down_proj" else outputs
    if linear == "gate_up_proj" and getattr(module, "is_concatenated", True):
        return _StridedShard(dim=dim, split_factor=2)  # a part of the gate, then the same part of what it multiplies
    return Shard(dim)


class ExpertsParallel(TensorParallelLayer):  # type: ignore[misc,valid-type]
    """The parallel style of merged experts."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Make a parameter a placeholder for this process's part."""
        whole, placement = module._parameters.get(param), _placement(module, param)
        if whole is None or placement is None:
            return
        dim = getattr(placement, "dim", None)
        parts = mesh.size() * (2 if isinstance(placement, _StridedShard) else 1)
        if dim is not None and whole.shape[dim] % parts:
            size = whole.shape[dim] * mesh.size() // parts
            raise MeoConfigError(
                f"tensor parallel over {mesh.size()} processes does not divide the {size} intermediate features of "
                f"an expert: take a tp_size that does, or {INSTEAD}"
            )
        split = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(split, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Let a module merge parts of experts.

        Raises MeoConfigError for experts that are not merged, are stored in another way, or were split by another rule.
        """
        if not hasattr(module, "merged_maps"):
            raise MeoConfigError(
                "some layers of this model keep experts that do not merge (`layers` in its `meo` block), and a "
                f"tensor-parallel plan cannot tell them apart: {INSTEAD}"
            )
        if module._parameters.get("down_proj") is None:
            raise MeoConfigError(
                f"{type(module).__name__} stores its experts in a way that tensor parallel cannot split: {INSTEAD}"
            )
        for name, parameter in module._parameters.items():
            placement = _placement(module, name)
            if parameter is not None and placement is not None and _split(parameter) != (placement,):
                raise MeoConfigError(
                    f"`{name}` of merged experts is split as {_split(parameter)}, not as {placement}: leave the "
                    f"experts to the rule {STYLE!r} of the model's own plan"
                )
        module.shards = Shards(mesh)  # type: ignore[assignment]
        return module


def _split(parameter: Tensor) -> Any:
    return tuple(parameter.placements) if isinstance(parameter, DTensor) else "not at all"


class RouterParallel(TensorParallelLayer):  # type: ignore[misc,valid-type]
    """The parallel style of routers: whole in each process, and their noise is the first process's in all."""

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: Any) -> Iterator[None]:
        """Draw noise from a seed that the processes share."""
        if not (module.training and getattr(module, "noise_weight", None) is not None):
            yield
            return
        device: Any = module.noise_weight.device  # type: ignore[union-attr]
        group, seed = mesh.get_group(), torch.randint(2**62, (1,), device=device)
        torch.distributed.broadcast(seed, torch.distributed.get_global_rank(group, 0), group=group)
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)):
            torch.manual_seed(int(seed))
            yield


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def plan_experts(model: Any, merged: Collection[str], replaced: Collection[str]) -> None:
    """Put rules for merged experts into a model's tensor-parallel plan, in the place of those of what they replaced.

    `merged` are the paths of merged experts, `replaced` those of dense modules that are there no more.
    """
    if ALL_PARALLEL_STYLES is None:
        model._tp_plan = {}
        return
    styles: Any = ALL_PARALLEL_STYLES
    styles.register(STYLE, ExpertsParallel())
    styles.register(ROUTER_STYLE, RouterParallel())
    gone = {_anywhere(path) for path in (*merged, *replaced)}
    inside = tuple(f"{_anywhere(path)}." for path in merged)
    known = {_anywhere(name) for name, _ in (*model.named_modules(), *model.named_parameters())} - gone
    kept = {k: style for k, style in model._tp_plan.items() if k in known and not k.startswith(inside)}
    routers = [path for path, module in model.named_modules() if getattr(module, "noise_weight", None) is not None]
    own = {_anywhere(path): STYLE for path in merged} | {_anywhere(path): ROUTER_STYLE for path in routers}
    model._tp_plan, model._ep_plan, model._pp_plan = kept | own, {}, {}


def _anywhere(path: str) -> str:
    """Return a path with `*` for numbers of layers, as plans name them."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def check_parallel(config: Any) -> None:
    """Raise MeoConfigError for a distributed configuration that merged experts contradict."""
    read = config.get if isinstance(config, dict) else lambda name, default: getattr(config, name, default)
    if read("enable_expert_parallel", False) or (read("ep_size", None) or 1) > 1:
        raise MeoConfigError(
            "expert parallel keeps each expert in one process, but a MEO model adds up experts' weights, so each "
            f"process needs a part of all of them: take tensor parallel (tp_size), or {INSTEAD}"
        )
    if (read("pp_size", None) or 1) > 1:
        raise MeoConfigError(f"pipeline parallel is not supported by MEO models: {INSTEAD}")


def check_gates(config: Any, mesh: Any, blocks: list[Any]) -> None:
    """Raise MeoConfigError if tensor parallel would split what a gate reads."""
    if mesh is None or config.tp_size == 1 or not any("intermediate" in block.sources for block in blocks):
        return
    raise MeoConfigError(
        "with gate_scope 'projection' the last gate reads all intermediate features, which tensor parallel splits: "
        f"convert with gate_scope 'ffn', or {INSTEAD}"
    )


def check_ranks(config: Any, mesh: Any, expert_format: str) -> None:
    """Raise MeoConfigError if tensor parallel would split experts whose low-rank parts it does not know."""
    if mesh is not None and config.tp_size != 1 and expert_format == "lowrank":
        raise MeoConfigError(f"tensor parallel does not know the low-rank parts of experts (`expert_ranks`): {INSTEAD}")


def check_merging(config: Any, mesh: Any, level: str | None) -> None:
    """Raise MeoConfigError if tensor parallel would split experts that do not merge."""
    if mesh is not None and config.tp_size != 1 and level == "unmerged":
        raise MeoConfigError(f"tensor parallel splits merged experts, and at level 'unmerged' none are: {INSTEAD}")


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return what this process holds of a module's parameters."""
    return [getattr(p, "_local_tensor", p) for p in module.parameters()]
