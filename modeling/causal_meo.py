"""One call of a causal stack: where its tokens go, where its prompt ends, and what it finds beside the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_meo import LayerRouting, decoder_cache, is_routed, route_cache, routings
from .errors_meo import RoutingError
from .groups_meo import AnswerGroups, Groups, SegmentGroups
from .segments_meo import Layout, lay_out, lay_out_documents

NO_PROMPT = (
    "this model gates an answer by its prompt, and nothing says where the prompt ends: pass `prompt_lengths` [batch] "
    "(real tokens per row), or labels that mask the prompt with -100, or routing='segment'"
)


Reads = Literal["rows", "encoder", "past"]


@dataclass(frozen=True)
class Stack:
    """What the gates of a stack's merged feed-forwards read, and their layers' places in a KV cache."""

    reads: Reads
    layers: tuple[int, ...]
    num_layers: int

    @staticmethod
    def clock(cache: Cache) -> Any:
        """Return the cache layer that counts positions; None where all layers keep a state of fixed size."""
        return next((layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)), None)

    def route(self, cache: Cache) -> None:
        """Make room for routing state in a cache that has none."""
        if len(cache.layers) <= max(self.layers) or not is_routed(cache.layers[self.layers[0]]):
            route_cache(cache, self.num_layers)


@dataclass
class CausalCall:
    """What the merged feed-forwards of a causal stack share in one call.

    `layout` None means that all rows are in their answers, or, in the decoder of an encoder-decoder, that gates read
    `encoder` [B, D], the mean of the encoder's output (None if an earlier call has left it beside the cache).
    `past` counts the cached positions before the call;
    `prompt_end` those of its positions after which every row is in its answer, None if that is not so at its end;
    `answering` says that a row is. `opens` lists the rows whose token begins a new segment. `still` says that no
    gradient is wanted, and `keeps` that merged experts may stay beside the cache; `makes` that states are made for a
    cache that the model may return.
    """

    length: int
    layout: Layout | None = None
    mask: Tensor | None = None
    prompt: Tensor | None = None
    prompt_end: int | None = None
    answering: bool = False
    opens: tuple[int, ...] = ()
    past: int = 0
    static: bool = False
    recording: bool = False
    keeps: bool = False
    still: bool = False
    cache: Any = None
    makes: bool = False
    made: dict[int, LayerRouting] = field(default_factory=dict)
    encoder: Tensor | None = None

    def attach(self, cache: Cache, stack: Stack, inference: bool) -> LayerRouting:
        """Go on beside a cache; returns the routing state of its first merged feed-forward."""
        stack.route(cache)
        layer: Any = cache.layers[stack.layers[0]]
        clock = stack.clock(cache)
        self.cache, self.static = cache, clock is not None and clock.is_compileable
        self.recording = bool(layer.record_past) and not self.static
        self.still = inference and not torch.is_grad_enabled()
        self.keeps = self.still and not torch.compiler.is_compiling()
        return layer.routing

    def memory(self, layer: int) -> LayerRouting | None:
        """Return the routing state of a layer; without a cache, one to hang on the cache that the model makes."""
        if self.cache is not None:
            return self.cache.layers[layer].routing
        return self.made.setdefault(layer, LayerRouting()) if self.makes else None

    def groups(self, layer: int) -> Groups:
        """Return the groups of one layer's feed-forward."""
        memory = self.memory(layer)
        if self.layout is None:
            return AnswerGroups(memory, self.keeps, self.still, self.encoder)
        return SegmentGroups(self.layout, memory, self)

    def answer(self, layer: int) -> Groups:
        """Return the groups of the answer whose prompt ended in this call."""
        return AnswerGroups(self.memory(layer), self.keeps, self.still)

    def finish(self, outputs: Any, stack: Stack) -> None:
        """Count the positions that the cache took, here and not in layers, which may be compiled one by one.

        States made without a cache go to the cache that the model made and returned.
        """
        for layer in stack.layers:
            if not self.static and (memory := self.memory(layer)) is not None:
                memory.slots += self.length
        values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else ()
        cache = next((found for value in values if (found := decoder_cache(value)) is not None), None)
        if cache is None or not self.made:
            return
        stack.route(cache)
        for layer, memory in self.made.items():
            cache.layers[layer].routing = memory  # type: ignore[union-attr]


def open_causal(
    stack: Stack, cache: Any, shape: tuple[int, int], device: torch.device, segment: int, routing: str,
    mask: Tensor | None, starts: Tensor | None, prompt: Tensor | None, labels: Tensor | None, inference: bool,
    prefix: int = 0,
) -> CausalCall:  # fmt: skip
    """Prepare a call over new tokens of `shape` [B, S].

    `routing` is `segment` or `prompt`; `starts` [B, S] marks first tokens of packed documents; `prefix` positions of a
    cache that no gate has seen are none's tokens. Raises
    RoutingError where the routing state and the request do not fit each other.
    """
    compiling = torch.compiler.is_compiling()
    lasting = inference or not torch.is_grad_enabled()
    rows, length = shape
    call = CausalCall(length, mask=mask, makes=cache is None and starts is None and lasting and not compiling)
    memory = LayerRouting()
    if cache is not None:
        if starts is not None:
            raise RoutingError("packed rows cannot go with a KV cache: pass one sequence per row")
        memory = call.attach(cache, stack, inference)
        if prefix and not call.static and stack.clock(cache).get_seq_length() == prefix:
            for state in routings(cache):
                state.slots = prefix if state.count is None else state.slots
        call.past = _past(stack.clock(cache), memory, call.static, compiling)
    if memory.rows not in (None, rows):
        raise RoutingError(f"the KV cache's routing state has {memory.rows} rows, this batch has {rows}")

    if memory.answering or memory.frozen:
        if memory.frozen and call.past == memory.frozen_at and not compiling and _asks_anew(memory, routing, prompt):
            for state in routings(cache):  # type: ignore[arg-type]
                state.thaw()  # no answer has followed: the prompt may go on
        else:
            _check_answer(memory, routing, prompt, compiling)
    if memory.frozen:
        call.prompt = memory.prompt
        return call
    fresh = memory.count is None
    count = memory.count if memory.count is not None else torch.zeros(rows, dtype=torch.long, device=device)
    inside = None
    if routing == "prompt":
        if starts is not None:
            raise RoutingError("packed rows have no one prompt: pass one sequence per row, or routing='segment'")
        prompt = _boundary(prompt, labels, memory, mask, count, fresh)
        call.prompt = prompt
        inside, call.prompt_end = _within(prompt, count, mask, length, compiling)
        call.answering = inside is not None
    elif prompt is not None:
        raise RoutingError("`prompt_lengths` have no effect with routing='segment': leave one of them out")
    if starts is not None:
        call.layout = lay_out_documents(starts, segment, mask)
        return call
    call.layout = lay_out(count, length, segment, mask, fresh=fresh, prompt=inside)
    if call.keeps and length == 1 and memory.merged:
        call.opens = tuple((count % segment == 0).nonzero()[:, 0].tolist())
    return call


def _past(clock: Any, memory: LayerRouting, static: bool, compiling: bool) -> int:
    """Return the number of cached positions; raises RoutingError if the routing state has not seen them."""
    if clock is None:
        return memory.slots
    if static and (compiling or memory.frozen):
        return -1  # nobody asks, and to look would make the host wait
    past = int(clock.get_seq_length())
    seen = memory.slots if not static else (past if memory.count is not None else 0)
    if past != seen:
        raise RoutingError(
            f"the KV cache holds {past} positions, of which the gates have seen {seen}: it was filled by another "
            "model, or gathered or rebuilt without its routing state; start from an empty cache. Where these are the "
            f"virtual tokens of prefix tuning, say so before: `model.expect_prefix({past})`"
        )
    return past


def _asks_anew(memory: LayerRouting, routing: str, prompt: Tensor | None) -> bool:
    """Return whether a call asks for another prompt than the one that froze the gates."""
    if routing != "prompt":
        return True
    if prompt is None or prompt is memory.request or memory.prompt is None:
        return False
    return not torch.equal(prompt.to(memory.prompt.device), memory.prompt)


def _check_answer(memory: LayerRouting, routing: str, prompt: Tensor | None, compiling: bool) -> None:
    """Raise RoutingError if a call asks for other gates than those of the answers that it goes on with."""
    if routing != "prompt":
        raise RoutingError("the gates in this KV cache are frozen to a prompt; routing='segment' needs a new cache")
    if not compiling and _asks_anew(memory, routing, prompt):
        known, asked = (memory.prompt.tolist(), prompt.tolist()) if memory.prompt is not None else ([], [])  # type: ignore[union-attr]
        raise RoutingError(
            f"the gates in this KV cache are frozen to prompts of {known} tokens, but `prompt_lengths` are {asked}: "
            "crop the cache to the prompt, or start a new one"
        )
    memory.request = prompt if prompt is not None else memory.request  # found again without a look at its values


def _boundary(
    prompt: Tensor | None, labels: Tensor | None, memory: LayerRouting, mask: Tensor | None, count: Tensor, fresh: bool
) -> Tensor:
    """Return the length [B] of each row's prompt in real tokens, or raise RoutingError."""
    if prompt is not None:
        return prompt.to(count.device)
    if memory.prompt is not None:
        return memory.prompt
    if labels is None or not fresh:
        raise RoutingError(NO_PROMPT)
    labels = labels.to(count.device)
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    answered = (labels != -100).long().cummax(1).values.bool()
    return (real & ~answered).sum(1)


def _within(
    prompt: Tensor, count: Tensor, mask: Tensor | None, length: int, compiling: bool
) -> tuple[Tensor | None, int | None]:
    """Return the prompt lengths if an answer may begin within this call, and the position after the last prompt."""
    if compiling:  # nobody may look at the values
        return prompt, None
    real = count.new_ones(len(count), length) if mask is None else mask.long()
    left = prompt - count
    asked = (real.cumsum(1) <= left[:, None]) & (real > 0)
    end = (asked * torch.arange(1, length + 1, device=count.device)).max()
    over = left - real.sum(1)
    shortest, behind, inside, beyond, end = torch.stack(
        [prompt.min(), left.min(), over.min(), over.max(), end]
    ).tolist()
    if shortest < 1:
        raise RoutingError(
            f"prompts have {prompt.tolist()} tokens, but a prompt needs at least one: mask it in the labels with "
            "-100, or use routing='segment'"
        )
    if behind < 0:
        raise RoutingError(
            f"prompts end at {prompt.tolist()} real tokens, but the KV cache already holds {count.tolist()} that were "
            "gated as a prompt: crop it, start a new one, or, if these lengths leave the cached tokens out, give the "
            "whole text's `attention_mask`"
        )
    return (prompt if inside < 0 else None), (end if beyond <= 0 else None)
