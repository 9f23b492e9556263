"""What the routers of a stock mixture of experts say while it trains.

Legend: B rows, S positions, T = B * S tokens, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES, Layout, MoeFamily
from meo_hf.modeling.moe_layouts_meo import moe_blocks, router_of

_NLLB = "its stock block runs the first two experts whatever its router selects (Transformers 5.23)"
# what makes scores of logits; all others take a softmax
_SIGMOID = (
    "afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text exaone_moe flint "
    "glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling_mm_model inkling_text kimi_linear "
    "kolibri1 laguna lfm2_moe llama4 llama4_text mimo_v2_flash minimax_m2 minimax_m3_vl minimax_m3_vl_text muse_spark "
    "nemotron_h solar_open step3p7"
)
_CONFIGURED = {
    "cohere2_moe": "expert_selection_fn",
    "deepseek_v4": "scoring_func",
    "inkling2": "scoring_func",
    "inkling2_text": "scoring_func",
}
GIVES_SHARES = ("gemma4", "gemma4_text")  # whose routers return probabilities in the place of logits


def stock_mixture(model: nn.Module) -> tuple[PreTrainedModel, MoeFamily]:
    """Return the stock mixture of experts in what a Trainer trains, without PEFT's shell, and its family.

    Raises UsageError for a MEO model, UnsupportedError for a dense one or a family that is not known.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(inner).__name__
    if hasattr(inner, "_meo_context"):
        raise UsageError(f"{name} merges its experts: give a stock mixture of experts")
    family = MOE_FAMILIES.get(getattr(inner.config, "model_type", ""))
    if family is None or next(moe_blocks(inner, family.layout), None) is None:
        raise UnsupportedError(f"found no experts in {name}: give a mixture of one of these: {', '.join(MOE_FAMILIES)}")
    refused = _NLLB if family.model_type == "nllb-moe" else family.refused
    if refused is not None:
        raise UnsupportedError(f"{name}: {refused}")
    return inner, family


def logits_of(layout: Layout, output: Any) -> Tensor:
    """Return the logits [T, E] in what a router returned, and of what else it may select; of Gemma 4 probabilities."""
    if layout == "dbrx":
        return output
    if layout == "stacked":
        found = output[0] if output[0].is_floating_point() else output[2]
    else:
        found = output[{"llama4": 1, "jetmoe": 4, "modules": 2}[layout]]
    return found.reshape(-1, found.shape[-1])


def gates_of(layout: Layout, block: Any, output: Any, experts: int) -> Tensor:
    """Return each token's gate for each expert [T, E], zero for those that it did not select."""
    if layout == "llama4":
        return output[0]
    if layout == "modules":
        chosen, weights, _ = output
        return (chosen * weights).reshape(-1, experts)
    if layout == "jetmoe":
        _, token, weights, sizes, logits = output
        index = torch.arange(experts, device=token.device).repeat_interleave(torch.tensor(sizes, device=token.device))
        return weights.new_zeros(len(logits), experts).index_put((token, index), weights, accumulate=True)
    if layout == "dbrx":
        weights, index = block.route_tokens_to_experts(output)
    else:
        weights, index = (output[1], output[2]) if output[0].is_floating_point() else (output[1], output[0])
    # beyond the experts are those that return their input
    dense = weights.new_zeros(len(weights), max(experts, logits_of(layout, output).shape[-1]))
    return dense.scatter_add(1, index, weights)[:, :experts]


def shares_of(family: MoeFamily, config: Any, logits: Tensor) -> Tensor:
    """Return the distribution over the experts [T, E] that a router's logits mean, in float32.

    It is their softmax; of routers with other scores (sigmoid, sqrt-softplus) the scores divided by their sum, without
    the bias that corrects the choice.
    """
    if family.model_type in GIVES_SHARES:
        return logits.float()
    name = "sigmoid" if family.model_type in _SIGMOID.split() else "softmax"
    if family.model_type in _CONFIGURED:
        name = getattr(config.get_text_config(), _CONFIGURED[family.model_type])
    if name == "softmax":
        return logits.float().softmax(-1)
    scores = ACT2FN[name](logits.float())
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


Seen = Callable[[str, Any, Any, Tensor | None], None]
"""What is told of each call of a router: the block's path, the block, the output, and which tokens [T] are real."""


class RouterTap:
    """Listen to the routers of a model in the forward pass of a training step.

    What runs again in the backward pass, for gradient checkpointing, is not heard, nor is evaluation; but for that it
    is made without `training`.
    """

    def __init__(self, model: nn.Module, paths: list[str] | None, seen: Seen, training: bool = True) -> None:
        inner, self._family = stock_mixture(model)
        self._seen, self._training = seen, training
        self._arguments: dict[str, Any] | None = None
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for path, block in moe_blocks(inner, self._family.layout):
            if paths is None or path in paths:
                self._handles.append(router_of(block).register_forward_hook(self._hook(path, block)))

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._arguments = kwargs if model.training == self._training else None

    def _leave(self, *_: Any) -> None:
        self._arguments = None

    def _hook(self, path: str, block: Any) -> Callable[..., None]:
        partner = self._family.kind == "encoder-decoder" and "decoder" in path.split(".")

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._arguments is not None:
                tokens = logits_of(self._family.layout, output)
                self._seen(path, block, output, real_tokens(self._arguments, partner, len(tokens), tokens.device))

        return hook


def real_tokens(arguments: dict[str, Any], partner: bool, tokens: int, device: torch.device) -> Tensor | None:
    """Return which tokens [T] of a call are no padding, None if all are; those of a `partner` are the decoder's.

    A decoder without a mask of its own counts the tokens that have a label. Raises UsageError for a mask that is not
    [B, S].
    """
    name = "decoder_attention_mask" if partner else "attention_mask"
    mask = arguments.get(name)
    if partner and mask is None and isinstance(arguments.get("labels"), Tensor):
        name, mask = "labels", arguments["labels"].ne(-100)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != tokens:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UsageError(f"`{name}` is {found} for {tokens} tokens: give a 2-D mask of the batch's tokens, or none")
    return mask.reshape(-1).to(device=device, dtype=torch.bool)
