"""What `generate` must know about prompts, padding and the KV cache, so that a cached answer is the uncached one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .cache_meo import can_take_back, decoder_cache, routings
from .errors_meo import RoutingError
from .routing_meo import ROUTING_ARGUMENTS, RoutingContext


class PromptedGeneration:
    """Overrides of Transformers' generation for models whose gates read what went before.

    Every override calls the method that it extends; all of them but `generate` and `init_continuous_batching` are
    private in Transformers.
    """

    config: Any
    _meo_context: RoutingContext

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as Transformers does; `routing` and `prompt_lengths` may be given as in `forward`."""
        if self._meo_context.reads_past:
            self._reopen_prompt(inputs, generation_config, kwargs)
        try:
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        finally:
            cache = decoder_cache(kwargs.get("past_key_values"))
            for routing in () if cache is None else routings(cache):
                routing.copies = 1  # what comes next in a cache of the user's may be other texts

    @property
    def _gates_read_text(self) -> bool:
        return self._meo_context.settings.pools

    def _reopen_prompt(self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """Take a cached answer back, so that this call's longer prompt is gated as it would be without a cache."""
        cache = decoder_cache(kwargs.get("past_key_values"))
        routing = kwargs.get("routing") or self._meo_context.routing
        if cache is None or getattr(generation_config, "is_assistant", False):
            return
        frozen = [state for state in routings(cache) if state.answering or state.frozen]
        if not frozen or routing != "prompt" or kwargs.get("prompt_lengths") is not None:
            return
        if not frozen[0].frozen:
            raise RoutingError("some rows of the KV cache are in their answers and some are not: start a new one")
        answered = int(cache.get_seq_length()) - frozen[0].frozen_at
        ids = next((x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        mask = kwargs.get("attention_mask")
        whole = ids is not None and (mask is None or mask.shape[1] == ids.shape[1])
        if answered and not (whole and all(map(can_take_back, cache.layers))):
            found = "a cache of this kind cannot give it back" if whole else "only the new tokens were passed"
            raise RoutingError(
                f"the KV cache holds an answer of {answered} positions gated by an earlier prompt, which must be read "
                f"again as part of this one, but {found}: pass the whole text with an empty cache, or use "
                "routing='segment'"
            )
        cache.crop(-answered)
        for state in frozen:
            state.thaw()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Note where each row's prompt ends, while its mask is at hand."""
        routing = model_kwargs.get("routing") or self._meo_context.routing
        wanted = self._meo_context.reads_past and routing == "prompt"
        if wanted and model_kwargs.get("prompt_lengths") is None:
            model_kwargs["prompt_lengths"] = _prompt_lengths(input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Route the cache before anything is recorded in it, and tell it which rows share a source."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = decoder_cache(model_kwargs.get("past_key_values"))
        if cache is None or not self._gates_read_text:
            return
        self.route_cache(cache)  # type: ignore[attr-defined]
        if generation_config.is_assistant:
            cache.activate_past_recording()
            if any(routing.prompt is not None for routing in routings(cache)):
                model_kwargs.pop("prompt_lengths", None)  # its rounds are one answer to one prompt
        elif int(cache.get_seq_length()) == 0:
            for routing in routings(cache):
                routing.copies = max(generation_config.num_beams, generation_config.num_return_sequences)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Keep what is meant for these gates from an assistant, which may be a stock model."""
        others = {name: value for name, value in model_kwargs.items() if name not in ROUTING_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=others, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: requests share a row there, and gates are per row."""
        if self._gates_read_text:
            raise RoutingError(
                "continuous batching packs requests into one row, and gates are per row: use `generate` with a padded "
                "batch, or a model of level 'task'"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def prepared_inputs(base: Any) -> Callable[..., dict[str, Any]]:
    """Return a `prepare_inputs_for_generation` with the signature of the base's, which `generate` looks at.

    A cache that compiles gets 4-D masks for its attention: the gates keep the 2-D one.
    """
    prepare = base.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, input_ids, *args, **kwargs)
        passed, mask = inputs.get("attention_mask"), kwargs.get("attention_mask")
        made = passed is not None and not (isinstance(passed, Tensor) and passed.dim() == 2)
        if made and self._meo_context.reads_past:
            ids = inputs.get("input_ids")
            rows, length = (ids if ids is not None else inputs["inputs_embeds"]).shape[:2]
            if mask is None:  # none was needed: nothing is padding
                inputs["routing_mask"] = torch.ones(rows, length, dtype=torch.long, device=self.device)
            else:
                inputs["routing_mask"] = mask[:, -length:].to(self.device)
        return inputs

    return prepare_inputs_for_generation


def _prompt_lengths(input_ids: Tensor | None, model_kwargs: dict[str, Any]) -> Tensor:
    """Return the number of real tokens [B] in what `generate` was given, cached ones included."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    given = [x for x in (input_ids, model_kwargs.get("inputs_embeds")) if isinstance(x, Tensor)]
    rows, device = given[0].shape[0], given[0].device
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.long().sum(1)
    # the mask was dropped because it holds only ones; positions cover the cached tokens too
    length = positions.shape[-1] if isinstance(positions, Tensor) else max(x.shape[1] for x in given)
    return torch.full((rows,), length, dtype=torch.long, device=device)
