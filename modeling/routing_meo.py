"""Who shares a gate, and what the gate reads: the routing context of a forward pass, and the router.

Legend: B rows of the batch, S positions, G groups that share a gate, T tokens per group, D features,
E experts, K selected experts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors_meo import RoutingContextError, RoutingError

_BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


@dataclass
class Call:
    """One forward pass of one stack: what its feed-forwards may know about its inputs."""

    owner: int
    outer: Call | None
    rows: int | None
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    packed: str | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    task_ids: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)

    def grouped(self, hidden_states: Tensor) -> Tensor:
        """Give tokens their rows back: [B, S, D] or flattened [B * S, D] -> [B, S, D].

        Raises RoutingError where the tokens cannot be the rows of this call.
        """
        rows, tokens = self.rows, hidden_states.shape[:-1].numel()
        if rows is None or tokens % rows or (hidden_states.dim() == 3 and hidden_states.shape[0] != rows):
            raise RoutingError(
                f"the feed-forward got hidden states of shape {tuple(hidden_states.shape)} for a batch of {rows} "
                "rows: rows that were packed or unpadded cannot be told apart; pass padded rows and a 2-D mask"
            )
        return hidden_states.reshape(rows, -1, hidden_states.shape[-1])

    def mean(self, x: Tensor) -> Tensor:
        """Average each row over its real tokens, in float32: [B, S, D] -> [B, D]."""
        return masked_mean(x, self._padding_mask(x))

    def encoder_mean(self) -> Tensor:
        """Average the encoder's output over its real tokens: [B, D]; a decoder's gate reads it."""
        if self.encoder_hidden_states is None:
            raise RoutingError(
                "the gates of this decoder read the encoder's output, but `encoder_hidden_states` is missing: "
                "use the full encoder-decoder model, or level 'task'"
            )
        # not kept: a layer that gradient checkpointing runs again must do what it did the first time
        mask = _two_dimensional(self.encoder_attention_mask, self.encoder_hidden_states, "encoder_attention_mask")
        return masked_mean(self.encoder_hidden_states, mask)

    def _padding_mask(self, x: Tensor) -> Tensor | None:
        if self.packed is not None:
            raise RoutingError(
                f"`{self.packed}` packs several sequences into one row, and this level gates each row by its mean: "
                "pass one sequence per row, or use level 'task'"
            )
        mask = _two_dimensional(self.mask, x, "attention_mask")
        if self.position_ids is not None:
            _refuse_restarts(self.position_ids.expand(x.shape[:2]), mask)
        return mask


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average x [B, S, D] over the positions where mask [B, S] is true, in float32 or wider -> [B, D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.to(wide).mean(1)
    kept = torch.where(mask[..., None], x.to(wide), x.new_zeros((), dtype=wide))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _two_dimensional(mask: Any, x: Tensor, name: str) -> Tensor | None:
    """Return the padding mask [B, S] of tokens x [B, S, D] as booleans, or raise RoutingError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RoutingError(
            f"`{name}` is {shape}; the gates need to know which tokens are padding: pass a 2-D mask "
            "[batch, sequence] of ones and zeros"
        )
    mask = mask[:, -x.shape[1] :]  # a prefix of past keys has no tokens here
    if mask.shape != x.shape[:2]:
        raise RoutingError(f"`{name}` is {tuple(mask.shape)}, but the tokens are {tuple(x.shape[:2])}")
    return mask.to(device=x.device, dtype=torch.bool)


def _refuse_restarts(position_ids: Tensor, mask: Tensor | None) -> None:
    """Raise RoutingError if positions restart among a row's real tokens: several documents share the row."""
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask
    highest = torch.where(real, position_ids, -1).cummax(1).values
    restarts = (real[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~restarts, "position_ids restart within a row: packed sequences cannot share a gate")
    elif bool(restarts):
        raise RoutingError(
            "`position_ids` restart within a row: packed sequences cannot share a gate; pass one sequence per "
            "row, or use level 'task'"
        )


class RoutingContext:
    """The current call, shared by a model and its merged feed-forwards.

    A plain object: a ContextVar would break `torch.compile(fullgraph=True)`. One model, one thread.
    """

    def __init__(self) -> None:
        self.current: Call | None = None
        self.task: int | None = None

    def call(self) -> Call:
        """Return the current call; raises RoutingContextError outside the model's forward pass."""
        if self.current is None:
            raise RoutingContextError(
                "a merged feed-forward ran outside its model's forward pass, so nobody knows which tokens are "
                "padding: call the model, not one of its layers"
            )
        return self.current


def _argument(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None


def open_call(
    context: RoutingContext, owner: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Open the call of a stack's forward pass; `names` are its positional arguments.

    Raises RoutingError for task ids that do not fit the batch.
    """
    outer = context.current
    find = lambda name: _argument(names, args, kwargs, name)  # noqa: E731
    batched = next((v for v in map(find, _BATCHED) if isinstance(v, Tensor)), None)
    rows = None if batched is None else batched.shape[0]
    task_ids = find("task_ids")
    if task_ids is not None:
        task_ids = _checked_task_ids(task_ids, rows)
    elif outer is not None and outer.task_ids is not None:
        task_ids = outer.task_ids
        if rows is not None and outer.rows and rows % outer.rows == 0:  # multiple choice: several rows each
            task_ids = task_ids.repeat_interleave(rows // outer.rows)
    call = Call(
        owner=id(owner),
        outer=outer,
        rows=rows,
        mask=find("attention_mask"),
        position_ids=find("position_ids"),
        packed=next((name for name in _PACKED if find(name) is not None), None),
        encoder_hidden_states=find("encoder_hidden_states"),
        encoder_attention_mask=find("encoder_attention_mask"),
        task_ids=task_ids,
    )
    if outer is not None:
        call.balance = outer.balance
    context.current = call


def close_call(context: RoutingContext, owner: nn.Module) -> None:
    """Close the call that this stack opened, if it did."""
    if context.current is not None and context.current.owner == id(owner):
        context.current = context.current.outer


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    open_call(module._meo_context, module, module._meo_arguments, args, kwargs)  # type: ignore[arg-type]
    return args, {name: value for name, value in kwargs.items() if name != "task_ids"}


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    close_call(module._meo_context, module)  # type: ignore[arg-type]


def install_hooks(module: nn.Module, context: RoutingContext) -> None:
    """Make a nested stock model open a call around its forward pass, and close it after an exception too."""
    module._meo_context = context  # type: ignore[assignment]
    module._meo_arguments = tuple(inspect.signature(module.forward).parameters)  # type: ignore[assignment]
    module.register_forward_pre_hook(_enter, with_kwargs=True)
    module.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def _checked_task_ids(task_ids: Any, rows: int | None) -> Tensor:
    if not isinstance(task_ids, Tensor) or task_ids.dtype not in (torch.int32, torch.int64) or task_ids.dim() != 1:
        found = f"{task_ids.dtype} {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else type(task_ids).__name__
        raise RoutingError(f"`task_ids` is {found}; give a whole-number tensor [batch], one task index per row")
    if rows is not None and task_ids.shape[0] != rows:
        raise RoutingError(f"`task_ids` has {task_ids.shape[0]} entries for {rows} rows; give one per row")
    return task_ids


class Gates(NamedTuple):
    """Selected experts and their weights, per group: both [G, K]; weights are float32 and sum to one."""

    top_k_index: Tensor
    top_k_weights: Tensor


class MeoRouter(nn.Module):
    """Noisy top-k router: keep the K largest logits and take their softmax (Shazeer et al. 2017, arXiv 1701.06538).

    Input is a pooled state [G, D], or task ids [G], for which column t of `weight` holds task t's logits.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, noisy: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, in_features)) if noisy else None

    def forward(self, inputs: Tensor) -> tuple[Gates, Tensor]:
        """Return the gates of each group and the unscaled balance loss of this router."""
        with torch.autocast(inputs.device.type, enabled=False):
            clean = self._project(inputs, self.weight)  # [G, E]
            logits, std = clean, None
            if self.training and self.noise_weight is not None:
                std = F.softplus(self._project(inputs, self.noise_weight)) + 1e-2
                logits = clean + torch.randn_like(clean) * std
            top_logits, index = logits.topk(min(self.top_k + 1, logits.shape[1]), dim=1)
            gates = Gates(index[:, : self.top_k], top_logits[:, : self.top_k].softmax(1))
            return gates, self._balance(gates, clean, logits, top_logits, std)

    @staticmethod
    def _project(inputs: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        if inputs.is_floating_point():
            return F.linear(inputs.to(wide), weight.to(wide))
        return F.embedding(inputs.to(weight.device), weight.t()).to(wide)

    def _balance(self, gates: Gates, clean: Tensor, logits: Tensor, top_logits: Tensor, std: Tensor | None) -> Tensor:
        """CV squared of importance (summed gates) and of load (expected number of selections) per expert."""
        dense = torch.zeros_like(clean).scatter(1, gates.top_k_index, gates.top_k_weights)
        if std is None or self.top_k == clean.shape[1]:
            load = (dense > 0).to(clean.dtype).sum(0)
        else:
            last_in, first_out = top_logits[:, self.top_k - 1, None], top_logits[:, self.top_k, None]
            selected = logits > first_out
            # an expert stays selected while its noisy logit beats the best logit outside of the other K
            threshold = torch.where(selected, first_out, last_in)
            load = torch.special.ndtr((clean - threshold) / std).sum(0)
        return cv_squared(dense.sum(0)) + cv_squared(load)


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation of x [E], unbiased; zero for a single expert."""
    if x.shape[0] == 1:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
