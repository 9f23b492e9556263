"""Routing state beside the KV cache: it hangs on the cache's own layers and follows whatever is done to them.

A cache layer keeps its identity and gets a made subclass of its class, so that every kind of cache works, made by
`generate`, by the model or by its user. Gates and merged experts are derived; the state itself is three vectors
per row and gated input.

Legend: B rows, S new positions, D features.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from .errors_meo import RoutingError
from .low_rank_meo import Mark
from .segments_meo import Layout, Pool, advance, lay_out

Maps = dict[str, tuple[Tensor, Tensor | None]]


class LayerRouting:
    """Routing state of one merged feed-forward: what its rows have left for their next gates.

    `count` [B] are the real tokens seen (of the prompt, once an answer has begun), `pools` what each gated input
    left behind, `slots` the cached positions, padding included (static caches count their own). `answering` says that
    some row is in its answer; `frozen`, that all are, since slot `frozen_at`: one gate then serves the whole answer.
    Their prompts have `prompt` [B] real tokens, last asked for with `request`. `merged` are the experts merged for
    the current gates and the adapters that `mark` tells: one per row, or one per `repeats` rows of one source, such as
    beams; `copies` is the number of equal rows that `generate` made of each source. `shuffled` rows have just moved,
    `crowded` ones have no memory to keep merged experts in.
    """

    def __init__(self) -> None:
        self.segment = 1
        self.clear()

    def clear(self) -> None:
        """Forget everything that was seen."""
        self.count: Tensor | None = None
        self.pools: dict[str, Pool] = {}
        self.slots = 0
        self.prompt: Tensor | None = None
        self.request: Tensor | None = None
        self.answering = self.frozen = False
        self.frozen_at = 0
        self.merged: Maps = {}
        self.mark = Mark()
        self.repeats = self.copies = 1
        self.shuffled = self.crowded = False
        self.seal()

    def seal(self) -> None:
        """Accept what was seen so far: it can no longer be taken back."""
        self.snapshot: tuple[int, Tensor, dict[str, Pool]] | None = None
        self.log: dict[str, Tensor] = {}
        self.log_mask: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the merged experts behind in copies and files: they are derived."""
        return {**self.__dict__, "merged": {}, "mark": Mark()}

    @property
    def rows(self) -> int | None:
        """The number of rows, None before the first call."""
        return next((pool.total.shape[0] for pool in self.pools.values()), None)

    def frozen_input(self, name: str) -> Tensor:
        """Return what the gate of an answer reads: the mean of the prompt [B, D]."""
        total = self.pools[name].total
        return total if self.count is None else total / self.count.to(total.device).clamp(min=1)[:, None]

    def commit(self, layout: Layout, pools: dict[str, Pool], static: bool) -> None:
        """Take over the state after a call; a static cache's buffers keep their addresses."""
        self.segment = layout.segment
        if not static:
            self.count, self.pools = layout.count, pools
        elif self.count is None:
            self.count, self.pools = layout.count.clone(), {name: _map(p, torch.clone) for name, p in pools.items()}
            if not torch.compiler.is_compiling():
                for buffer in self._buffers():
                    torch._dynamo.mark_static_address(buffer)
        else:
            for buffer, value in zip(self._buffers(), _values(layout.count, pools), strict=True):
                buffer.copy_(value.detach())

    def freeze(self, at: int) -> None:
        """Settle the gates: every row is in its answer since slot `at`."""
        self.frozen, self.frozen_at = True, at
        self.repeats, self.copies = self.copies, 1

    def record(self, tokens: dict[str, Tensor], layout: Layout, mask: Tensor | None) -> None:
        """Note gated inputs [B, S, D] before they are committed, so that `crop` can take them back."""
        if mask is None:
            shape = (layout.rows, layout.length)
            mask = torch.ones(shape, dtype=torch.bool, device=layout.count.device)
        if self.snapshot is None or self.log_mask is None:
            count = mask.new_zeros(len(mask), dtype=torch.long) if self.count is None else self.count
            self.snapshot, self.log, self.log_mask = (self.slots, count, dict(self.pools)), dict(tokens), mask
        else:
            self.log = {name: torch.cat([self.log[name], x], 1) for name, x in tokens.items()}
            self.log_mask = torch.cat([self.log_mask, mask], 1)

    def check_crop(self, removed: int) -> None:
        """Raise RoutingError if the last `removed` positions cannot be taken back exactly."""
        if not 0 < removed < self.slots or self._within_answer(removed):
            return
        begin = self.slots if self.snapshot is None else self.snapshot[0]
        if self.slots - removed < begin:
            raise RoutingError(
                f"cannot take back {removed} positions: the routing state has recorded {self.slots - begin}; call "
                "`cache.activate_past_recording()` before the tokens are added, or start a new cache"
            )

    def crop(self, removed: int) -> None:
        """Take back the last `removed` positions, which `check_crop` has allowed."""
        if removed == 0:
            self.seal()
        elif self._within_answer(removed):
            self.slots -= removed  # nothing of it was counted
        elif removed >= self.slots:
            self.clear()
        else:
            self._replay(removed)

    @property
    def settled(self) -> bool:
        """Whether any crop can be followed: nothing was seen, or the gates read an encoder's output, which stays."""
        return self.slots == 0 or (self.frozen and self.count is None)

    def _within_answer(self, removed: int) -> bool:
        return self.frozen and (self.count is None or self.slots - removed >= self.frozen_at)

    def _replay(self, removed: int) -> None:
        begin, count, pools = self.snapshot or (0, None, {})
        keep = self.slots - removed - begin
        if keep and count is not None and self.log_mask is not None:
            layout = lay_out(count, keep, self.segment, self.log_mask[:, :keep], prompt=self.prompt)
            cells = {name: layout.split(x[:, :keep]) for name, x in self.log.items()}
            pools = {n: advance(pools.get(n) or Pool.empty(layout.rows, x), layout, x)[1] for n, x in cells.items()}
            count = layout.count
        self.count, self.pools, self.slots = count, pools, self.slots - removed
        prompt = self.prompt
        self.thaw()
        self.prompt = prompt
        self.answering = prompt is not None and count is not None and bool((count >= prompt).any())
        self.seal()

    def thaw(self) -> None:
        """Let the prompt go on where it ended."""
        self.prompt = self.request = None
        self.answering = self.frozen = False
        self.frozen_at, self.repeats, self.merged = 0, 1, {}

    def move_rows(self, index: Any) -> None:
        """Reorder or select rows; merged experts stay if every row still finds its own."""
        self.copies, self.shuffled = 1, True
        if not (self.frozen and _keeps_sources(index, self.rows or 0, self.repeats)):
            self.merged, self.repeats = {}, 1
        self._map_rows(lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index])

    def repeat_rows(self, repeats: int) -> None:
        """Repeat each row; the copies of a frozen row share its merged expert."""
        self.copies = 1
        if self.frozen:
            self.repeats *= repeats
        else:
            self.merged = {}
        self._map_rows(lambda t: t.repeat_interleave(repeats, 0))

    def _map_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self.count = None if self.count is None else move(self.count)
        self.prompt = None if self.prompt is None else move(self.prompt)
        self.pools = {name: _map(pool, move) for name, pool in self.pools.items()}
        if self.snapshot is not None and self.log_mask is not None:
            begin, count, pools = self.snapshot
            self.snapshot = (begin, move(count), {name: _map(pool, move) for name, pool in pools.items()})
            self.log = {name: move(x) for name, x in self.log.items()}
            self.log_mask = move(self.log_mask)

    def zero(self) -> None:
        """Forget in place: a static cache's buffers keep their addresses."""
        buffers, count, pools = self._buffers(), self.count, self.pools
        self.clear()
        self.count, self.pools = count, pools
        for buffer in buffers:
            buffer.zero_()

    def _buffers(self) -> list[Tensor]:
        return _values(self.count, self.pools)


_checked: tuple[Any, int, int, bool] | None = None


def _keeps_sources(index: Any, rows: int, repeats: int) -> bool:
    """Return whether a reordering leaves each row with its source; all layers ask about the same tensor."""
    global _checked
    version = index._version if isinstance(index, Tensor) and not index.is_inference() else 0
    last = _checked
    if last is not None and last[0]() is index and last[1:3] == (version, repeats):
        return last[3]
    sources = torch.arange(rows) // repeats
    moved = sources[index.cpu() if isinstance(index, Tensor) else index]
    kept = moved.shape == sources.shape and bool((moved == sources).all())
    if isinstance(index, Tensor):
        _checked = (weakref.ref(index), version, repeats, kept)
    return kept


def _values(count: Tensor | None, pools: dict[str, Pool]) -> list[Tensor]:
    counted = [] if count is None else [count]
    return [*counted, *(t for name in sorted(pools) for t in (pools[name].reads, pools[name].sum, pools[name].total))]


def _map(pool: Pool, function: Callable[[Tensor], Tensor]) -> Pool:
    return Pool(function(pool.reads), function(pool.sum), function(pool.total))


@functools.cache
def routed(base: type) -> type:
    """Return the class to give a cache layer of class `base`, so that its routing state follows every operation.

    One base only: with a mixin in front CPython refuses to reassign `__class__`.
    """

    class Routed(base):  # type: ignore[misc]
        _layer_type = None  # else the class registers itself as the layer type of its base
        routing: LayerRouting
        record_past = getattr(base, "record_past", False)

        def activate_past_recording(self) -> None:
            self.record_past = True
            getattr(super(), "activate_past_recording", lambda: None)()

        @property
        def is_croppable(self) -> bool:
            return bool(super().is_croppable) and (self.record_past or self.routing.settled)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.routing.move_rows(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.routing.repeat_rows(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.routing.move_rows(indices)

        def crop(self, tokens_to_remove: int) -> None:
            removed = -int(tokens_to_remove)
            if tokens_to_remove > 0:  # a final length, in Transformers up to 5.17
                removed = max(int(self.get_seq_length() - tokens_to_remove), 0)
            self.routing.check_crop(removed)  # a refusal leaves keys and values as they were, and the other way round
            super().crop(tokens_to_remove)
            self.routing.crop(removed)

        def reset(self) -> None:
            super().reset()
            self.routing.zero() if self.is_compileable else self.routing.clear()

        def __reduce__(self) -> Any:
            return _unpickled, (base,), self.__dict__

    Routed.__name__ = Routed.__qualname__ = f"Routed{base.__name__}"
    return Routed


def _unpickled(base: type) -> Any:
    return object.__new__(routed(base))


def is_routed(layer: Any) -> bool:
    """Return whether a cache layer carries routing state."""
    return isinstance(getattr(layer, "routing", None), LayerRouting)


def decoder_cache(cache: Any) -> Cache | None:
    """Return the cache of a decoder's own tokens, None for anything that is not a cache."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, Cache) else None


def routings(cache: Cache) -> list[LayerRouting]:
    """Return the routing state of each layer of a cache that was routed."""
    return [layer.routing for layer in cache.layers if is_routed(layer)]  # type: ignore[union-attr]


def merged_bytes(cache: Cache) -> int:
    """Return the bytes of the merged experts beside a cache."""
    kept = [tensor for state in routings(cache) for pair in state.merged.values() for tensor in pair]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def can_take_back(layer: Any) -> bool:
    """Return whether a layer still holds what `crop` would leave: grown key by key, no window passed."""
    stock = type(layer).__mro__[1] if is_routed(layer) else type(layer)
    if stock is DynamicSlidingWindowLayer:
        return layer.record_past or layer.get_seq_length() < layer.sliding_window
    return stock is DynamicLayer


def route_cache(cache: Cache, num_layers: int) -> None:
    """Give every layer of a cache room for routing state; in place, repeatable, and the cache keeps its type.

    A cache that makes its layers on demand gets `num_layers` of them now: recording may begin before the first
    token does.
    """
    made = cache.layer_class_to_replicate
    if made is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(made())
    for layer in cache.layers:
        if not is_routed(layer):
            layer.__class__ = routed(type(layer))  # type: ignore[arg-type]
            layer.routing = LayerRouting()  # type: ignore[union-attr]
