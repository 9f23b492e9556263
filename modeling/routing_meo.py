"""The routing context: what the merged feed-forwards of a model may know about the forward pass they run in.

Legend: B rows of the batch, S positions, D features.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .arguments_meo import check_arguments, fixed_task
from .cache_meo import decoder_cache, merged_bytes
from .causal_meo import CausalCall, Stack, open_causal
from .configuration_meo import MeoSettings
from .descriptions_meo import describe
from .errors_meo import RoutingContextError, RoutingError
from .groups_meo import Groups, TaskGroups, masked_mean
from .memory_meo import free_bytes
from .padding_meo import document_starts, of_new_tokens, padding_mask, refusal
from .task_memory_meo import TaskMemory

logger = logging.get_logger(__name__)
_BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


@dataclass
class Call:
    """One forward pass of one stack."""

    owner: int
    outer: Call | None
    rows: int | None
    mask: Any = None
    task: int | None = None
    task_ids: Tensor | None = None
    routing: str | None = None
    prompt_lengths: Tensor | None = None
    labels: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)
    padding: Tensor | None = None
    causal: CausalCall | None = None
    routed: dict[str, Any] = field(default_factory=dict)
    room: int | None = None
    refused: str | None = None
    embed: nn.Module | None = None
    described: list[Tensor] = field(default_factory=list)
    shared: bool = False  # whether the loss was told the number of items

    def balance_loss(self, device: torch.device) -> Tensor:
        """Sum the balance losses of all feed-forwards."""
        return torch.stack([loss.to(device) for loss in self.balance]).sum()

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

    def descriptions(self, texts: list[list[int]], device: torch.device) -> Tensor:
        """Return what gates read of each task's description [tasks, D], embedded once per call."""
        if not self.described and self.embed is not None:
            self.described.append(describe(self.embed, texts, device))
        return self.described[0].to(device)

    def groups(self, level: str, layer: int) -> Groups:
        """Return the groups that the merged feed-forward of a layer forms in this call."""
        if level == "task":
            return TaskGroups(self.task, self.task_ids)
        if self.refused is not None:
            raise RoutingError(self.refused)
        if self.causal is not None:
            return self.causal.groups(layer)
        return Groups(self.padding)


class RoutingContext:
    """The current calls, shared by a model and its merged feed-forwards: one per thread.

    A plain object: a ContextVar would break `torch.compile(fullgraph=True)`.
    """

    def __init__(self, settings: MeoSettings) -> None:
        self.settings = settings
        self.causal = False
        self.task: int | None = None
        self.warned = False
        self.plan: str | None = None
        self.prefix = 0  # positions at the begin of a KV cache that are nobody's tokens
        self.description_size: int | None = None
        self.usage: Any = None  # hears of balance losses, where somebody watches the training
        self.unadded: list[Tensor] | None = None  # takes balance losses that no loss carries, where somebody adds them
        self.labels: Any = None  # of the batch, where a trainer keeps them from the model
        self.task_memories: list[TaskMemory] = []
        self._calls: dict[int, Call] = {}
        self._model: weakref.ref[Any] | None = None

    def belongs_to(self, model: Any) -> None:
        """Note whose context this is."""
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingContext:
        """Go with a copy of the whole model, and stay one where a part is copied, as PEFT does with its routers."""
        model = None if self._model is None else self._model()
        if model is not None and id(model) not in memo:
            return self
        made = memo[id(self)] = RoutingContext.__new__(RoutingContext)
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made

    @property
    def reads_past(self) -> bool:
        """Whether gates read what came before in the same text."""
        return self.causal and self.settings.pools

    @property
    def routing(self) -> str:
        """How a causal stack gates what follows a prompt, where a call does not say."""
        return self.settings.routing or ("segment" if self.settings.level == "segment" else "prompt")

    @property
    def current(self) -> Call | None:
        """The innermost open call of this thread."""
        call = self._calls.get(_thread())
        if call is None and self._calls and torch.compiler.is_compiling():  # a compiled layer of an eager model
            if len(self._calls) > 1:
                raise RoutingContextError("a model with layers compiled one by one serves one thread at a time")
            return next(iter(self._calls.values()))
        return call

    @current.setter
    def current(self, call: Call | None) -> None:
        if call is None:
            self._calls.pop(_thread(), None)
        else:
            self._calls[_thread()] = call

    def call(self) -> Call:
        """Return the current call; raises RoutingContextError outside the model's forward pass."""
        call = self.current
        if call is None:
            raise RoutingContextError(
                "a merged feed-forward ran outside its model's forward pass, so nobody knows which tokens are "
                "padding: call the model, not one of its layers"
            )
        return call

    def hand_over(self, balance: Tensor) -> None:
        """Give a balance loss that could not be added to a loss to whoever adds it; if nobody does, say so."""
        if self.usage is not None:
            self.usage.add_balance(balance)
        if self.unadded is None:
            if not torch.compiler.is_compiling():
                logger.warning_once(UNADDED)
        elif balance.requires_grad:
            self.unadded.append(balance)

    def room(self, call: Call, device: torch.device) -> int:
        """Return the bytes that merged experts may still take beside this call's cache."""
        if call.room is None:
            limit = self.settings.merged_cache_bytes
            if limit is None:
                call.room = free_bytes(device) // 4
            else:
                cache = None if call.causal is None else call.causal.cache
                kept = sum(memory.nbytes for memory in self.task_memories)
                call.room = limit - kept - (0 if cache is None else merged_bytes(cache))
        return call.room


UNADDED = (
    "This model was called in training without labels, or past its own forward, so its balance loss is not part of any "
    "loss. With a Trainer (label smoothing, TRL) call `meo_hf.training.watch(trainer)`, which adds it; in a loop of "
    "your own add `outputs.aux_loss`, if it is there; or set `balance_loss` to 0 in the config's `meo` block."
)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _argument(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None


def open_call(
    context: RoutingContext, owner: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Open the call of a forward pass; `names` are the positional arguments of its module.

    Raises RoutingError for arguments that do not fit the batch, or each other.
    """
    outer = context.current
    find = lambda name: _argument(names, args, kwargs, name)  # noqa: E731
    batched = next((v for v in map(find, _BATCHED) if isinstance(v, Tensor)), None)
    call = Call(owner=id(owner), outer=outer, rows=None if batched is None else batched.shape[0])
    call.task_ids, call.routing, call.prompt_lengths = find("task_ids"), find("routing"), find("prompt_lengths")
    call.mask = find("routing_mask")
    mask = find("attention_mask")
    if call.mask is None and isinstance(mask, Tensor) and mask.dim() == 2:
        call.mask = mask
    if getattr(owner, "loss_type", None) == "ForCausalLM":
        call.labels = find("labels")
    elif outer is None and context.causal and find("labels") is None and _fits(context.labels, batched):
        call.labels = context.labels
    check_arguments(context, call, outer is None, find)
    if outer is not None:
        _inherit(call, outer)
    elif context.description_size is not None:
        call.embed = owner.get_input_embeddings()  # type: ignore[operator]
    if call.mask is None and not (outer is not None and call.rows == outer.rows):  # else the model itself made it
        call.mask = mask
    stack: Stack | None = getattr(owner, "_meo_stack", None)
    if stack is not None and context.settings.level == "task":
        call.task = fixed_task(context, call)
    elif stack is not None and batched is not None and context.settings.pools:
        _open_stack(context, call, stack, find, batched, owner)
    context.current = call


def _fits(labels: Any, batched: Any) -> bool:
    """Whether labels are those of the tokens of a call."""
    return isinstance(labels, Tensor) and isinstance(batched, Tensor) and labels.shape[:2] == batched.shape[:2]


def _inherit(call: Call, outer: Call) -> None:
    """Take over from the enclosing call what a nested stack is not told."""
    call.balance = outer.balance
    call.embed, call.described = outer.embed, outer.described
    call.routing = call.routing or outer.routing
    call.prompt_lengths = outer.prompt_lengths if call.prompt_lengths is None else call.prompt_lengths
    call.labels = outer.labels if call.labels is None else call.labels
    if call.mask is None and call.rows == outer.rows:
        call.mask = outer.mask
    if call.task_ids is None and outer.task_ids is not None:
        call.task_ids = outer.task_ids
        if call.rows is not None and outer.rows and call.rows % outer.rows == 0:  # multiple choice: several rows each
            call.task_ids = call.task_ids.repeat_interleave(call.rows // outer.rows)


def _open_stack(
    context: RoutingContext, call: Call, stack: Stack, find: Any, batched: Tensor, owner: nn.Module
) -> None:
    inference = not owner.training
    cache = decoder_cache(find("past_key_values"))
    if stack.reads == "encoder":
        call.causal = _open_partner(stack, find, cache, batched.shape[1], inference)
        return
    length = batched.shape[1]
    if find("cache") is not None:
        call.refused = "continuous batching packs requests into one row, and gates are per row: use `generate`"
        return
    if stack.reads == "rows":
        call.refused, call.padding = _row_padding(call, find, batched)
        return
    call.padding = padding_mask(of_new_tokens(call.mask, cache, length), (batched.shape[0], length), batched.device)
    position_ids = find("position_ids")
    packed = _packed_by(find)
    starts = document_starts(position_ids, call.padding, (batched.shape[0], length))
    if packed is not None and position_ids is None:
        raise RoutingError(refusal(packed))
    if starts is not None and cache is None and _will_cache(find, owner):
        raise RoutingError("packed rows need use_cache=False: with a KV cache their documents attend to each other")
    call.causal = open_causal(
        stack, cache, (batched.shape[0], length), batched.device,
        context.settings.segment_length, call.routing or context.routing, call.padding, starts,
        call.prompt_lengths, call.labels, inference, context.prefix,
    )  # fmt: skip


def _will_cache(find: Any, owner: nn.Module) -> bool:
    """Return whether a model is about to make a cache, beside which it does not see that rows are packed."""
    use_cache = find("use_cache")
    flash = "flash" in str(getattr(owner.config, "_attn_implementation", ""))  # which reads the positions itself
    return not flash and bool(getattr(owner.config, "use_cache", False) if use_cache is None else use_cache)


def _open_partner(stack: Stack, find: Any, cache: Any, length: int, inference: bool) -> CausalCall:
    """Open the call of a decoder whose gates read the encoder's output, or already did."""
    call = CausalCall(length)
    if cache is not None and call.attach(cache, stack, inference).frozen:
        return call
    states = find("encoder_hidden_states")
    if states is None:
        raise RoutingError(
            "the gates of this decoder read the encoder's output, but `encoder_hidden_states` is missing: "
            "use the full encoder-decoder model, or level 'task'"
        )
    mask = find("encoder_attention_mask")
    call.encoder = masked_mean(
        states, padding_mask(mask, tuple(states.shape[:2]), states.device, "encoder_attention_mask")
    )
    return call


def _packed_by(find: Any) -> str | None:
    """Return the argument, if any, that packs several sequences into one row."""
    return next((name for name in _PACKED if find(name) is not None), None)


def _row_padding(call: Call, find: Any, batched: Tensor) -> tuple[str | None, Tensor | None]:
    """Return why a row cannot be pooled, or its padding mask."""
    packed = _packed_by(find)
    if packed is not None:
        return refusal(packed), None
    if batched.dim() > 3:  # an image
        return None, None
    shape = (batched.shape[0], batched.shape[1])
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, -shape[1] :]  # a prefix of past keys has no tokens here
    mask = padding_mask(mask, shape, batched.device)
    if document_starts(find("position_ids"), mask, shape) is not None:
        return refusal("position_ids"), None
    return None, mask


def close_call(context: RoutingContext, owner: nn.Module, outputs: Any = None) -> None:
    """Close the call that this module opened, if it did; `outputs` are None after an exception.

    Routing state that was made without a cache goes to the cache in the outputs.
    """
    call = context.current
    if call is None or call.owner != id(owner):
        return
    context.current = call.outer
    if call.causal is not None and outputs is not None:
        call.causal.finish(outputs, owner._meo_stack)  # type: ignore[arg-type]


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    open_call(module._meo_context, module, module._meo_arguments, args, kwargs)  # type: ignore[arg-type]
    return args, {name: value for name, value in kwargs.items() if name not in ROUTING_ARGUMENTS}


def _leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    context: RoutingContext = module._meo_context  # type: ignore[assignment]
    call = context.current
    if call is not None and call.owner == id(module) and call.outer is None and call.balance and module.training:
        context.hand_over(call.balance_loss(call.balance[0].device))
    close_call(context, module, output)


ROUTING_ARGUMENTS = {  # name -> annotation
    "task_ids": "Tensor | None",
    "routing": "str | None",
    "prompt_lengths": "Tensor | None",
    "routing_mask": "Tensor | None",
}


def install_hooks(module: nn.Module, context: RoutingContext) -> None:
    """Make a nested stock model open a call around its forward pass, and close it after an exception too."""
    module._meo_context = context  # type: ignore[assignment]
    module._meo_arguments = tuple(inspect.signature(module.forward).parameters)  # type: ignore[assignment]
    module.register_forward_pre_hook(_enter, with_kwargs=True)
    module.register_forward_hook(_leave, with_kwargs=True, always_call=True)
