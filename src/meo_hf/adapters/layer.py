"""Our LoRA around a stack of experts: PEFT's wrapper and layout, with what PEFT refuses there.

Legend: E experts (1 in scope `shared`), R rank, I input features, O output features.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as StockWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from meo_hf.adapters.config import MeoLoraConfig
from meo_hf.errors import UsageError
from meo_hf.modeling.low_rank_meo import Adapted, LowRank
from meo_hf.modeling.wrapped_meo import factors_of

FAINT = 1e-3
"""DoRA's scale below which a row of weights cannot be told from what was merged: such rows are kept."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Magnitude(nn.Module):
    """DoRA's length of each row of each expert's weight [E, O]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class ParamWrapper(StockWrapper):
    """One stack's adapters; the name is the one by which PEFT finds wrappers of parameters."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_expert_bias")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: MeoLoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._did_swap_in_out_features = False
        self._active_adapter = adapter_name
        self.lora_expert_bias = nn.ParameterDict()
        self.experts_of: dict[str, int] = {}
        self._merged_rows: dict[str, Tensor] = {}
        self._merged_scaling: dict[str, float] = {}
        self._lost: tuple[Tensor, Tensor] | None = None
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def is_transposed(self) -> bool:
        """Whether the stack is [E, I, O]."""
        return bool(getattr(self.get_base_layer(), "is_transposed", False))

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Make an adapter's factors; `r` and `lora_alpha` are those that the patterns say."""
        if r <= 0:
            raise ValueError(f"r is {r}: a rank is at least 1")
        if not isinstance(config, MeoLoraConfig):
            raise UsageError("experts that a MeoLoraConfig adapts take further adapters of that kind alone")
        if not self.is_transposed and not self._did_swap_in_out_features:
            self.in_features, self.out_features = self.out_features, self.in_features
            self._did_swap_in_out_features = True
        inputs, outputs = cast(int, self.in_features), cast(int, self.out_features)
        experts = self.experts_of[adapter_name] = 1 if config.scope == "shared" else self.num_experts
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_dora[adapter_name], self.lora_bias[adapter_name] = config.use_dora, config.lora_bias
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = nn.Linear(inputs, r * experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * experts, outputs, bias=False)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if config.lora_bias:
            self.lora_expert_bias[adapter_name] = nn.Parameter(torch.zeros(experts, outputs))
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(torch.empty(self.num_experts, outputs))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora and not self.factors(adapter_name)[0].is_meta:  # else a file fills it
            self.lora_magnitude_vector[adapter_name] = Magnitude(self._lengths(adapter_name))  # as exact as it was
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A [E, R, I] and B [E, O, R] of an adapter: A by experts, B by ranks, as in PEFT's own layout."""
        return factors_of(self, name, self.experts_of[name])

    def adapted(self) -> Adapted:
        """Return what the active adapters make of the stack; merging blocks ask for it."""
        return self._adapted([name for name in self.active_adapters if name in self.lora_A], drops=True)

    def _adapted(self, names: list[str], drops: bool = False) -> Adapted:
        parts, rows = [], None
        for name in names:
            (down, up), dropout = self.factors(name), None
            scaling = self._merged_scaling.get(name, self.scaling[name])
            if drops and self.training and isinstance(self.lora_dropout[name], nn.Dropout):
                dropout = self.lora_dropout[name]
            if name in self.lora_magnitude_vector:
                scale = self._row_scale(name)
                rows = scale if rows is None else rows + scale - 1
                up = up * scale.to(up.dtype)[..., None]
                down = down.expand(len(up), -1, -1)
            parts.append(LowRank(down, up, scaling, self.lora_expert_bias.get(name), dropout))
        made_of = tuple(p for name in names for p in self._parameters_of(name))
        return Adapted(tuple(parts), rows, tuple((name, self.scaling[name]) for name in names), made_of)

    def _parameters_of(self, name: str) -> list[Tensor]:
        held = [getattr(self, kind) for kind in self.adapter_layer_names]
        found = [each[name] for each in held if isinstance(each, (nn.ModuleDict, nn.ParameterDict)) and name in each]
        return [p for each in found for p in ([each] if isinstance(each, Tensor) else each.parameters())]

    def _row_scale(self, name: str) -> Tensor:
        """Return by what DoRA scales each row [E, O]: its magnitude over its length, which gets no gradient."""
        if name in self._merged_rows:
            return self._merged_rows[name]
        return cast(Magnitude, self.lora_magnitude_vector[name]).weight / self._lengths(name)

    @torch.no_grad()
    def _lengths(self, name: str) -> Tensor:
        """Return the lengths of the rows of W + s B A [E, O], of products of the factors alone."""
        weight = _wide(self._weight())
        down, up = (factor.detach().to(weight) for factor in self.factors(name))
        scale = self.scaling[name]
        crossed = torch.einsum("eor,eor->eo", weight @ down.mT, up.expand(len(weight), -1, -1))
        own = torch.einsum("eor,eor->eo", up @ (down @ down.mT), up)
        squared = weight.square().sum(-1) + 2 * scale * crossed + scale * scale * own
        return squared.clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def _weight(self) -> Tensor:
        """Return the stack as [E, O, I]."""
        stack = self.get_param().detach()
        return stack.mT if self.is_transposed else stack

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return what an adapter adds to the stack, in its shape."""
        changed = self._weight().clone()
        self._change(changed, self._adapted([adapter_name]), 1)
        delta = changed - self._weight()
        return delta.mT if self.is_transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the stack, one expert at a time.

        Raises ValueError for biases where experts have none, for a second adapter with DoRA, and, with `safe_merge`,
        for weights that would not be finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        if self.merged_adapters and (self._merged_rows or any(name in self.lora_magnitude_vector for name in names)):
            raise ValueError("DoRA scales weights: unmerge what is merged, and merge all adapters together")
        adapted = self._adapted(names)
        bias = getattr(self.get_base_layer(), f"{self.parameter_name}_bias", None)
        if bias is None and any(part.bias is not None for part in adapted.parts):
            raise ValueError(f"{self.parameter_name} has no bias that the adapter's could be merged into")
        if safe_merge:
            changed = self._weight().clone()
            self._change(changed, adapted, 1)
            if not torch.isfinite(changed).all():
                raise ValueError(f"{', '.join(names)} would make weights that are not finite: the adapter is broken")
        scales = {name: self._row_scale(name) for name in names if name in self.lora_magnitude_vector}
        if adapted.rows is not None and bool((lost := adapted.rows.abs() < FAINT).any()):
            self._lost = lost, self._weight()[lost].clone()
        self._change(self._weight(), adapted, 1)
        self._change_bias(bias, adapted, 1)
        self._merged_rows |= scales
        self._merged_scaling |= {name: self.scaling[name] for name in names}
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the stack."""
        adapted = self._adapted([name for name in self.merged_adapters if name in self.lora_A])
        self._change(self._weight(), adapted, -1)
        self._change_bias(getattr(self.get_base_layer(), f"{self.parameter_name}_bias", None), adapted, -1)
        if self._lost is not None:
            self._weight()[self._lost[0]] = self._lost[1]
        self._lost = None
        self.merged_adapters.clear()
        self._merged_rows.clear()
        self._merged_scaling.clear()

    @staticmethod
    def _change(weight: Tensor, adapted: Adapted, sign: int) -> None:
        """Apply adapters to the stack [E, O, I] in place, or take them out again."""
        for expert, matrix in enumerate(weight):
            rows = 1 if adapted.rows is None else adapted.rows[expert, :, None]
            changed = _wide(matrix) if sign < 0 else _wide(matrix) * rows
            for part in adapted.parts:
                own = expert if len(part.down) > 1 else 0
                changed = changed + (part.up[own].to(changed) @ part.down[own].to(changed)) * (sign * part.scale)
            matrix.copy_(changed / rows if sign < 0 else changed)

    @staticmethod
    def _change_bias(bias: Tensor | None, adapted: Adapted, sign: int) -> None:
        for part in adapted.parts:
            if part.bias is not None and bias is not None:
                bias += sign * part.bias.to(bias.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        for held in (self.experts_of, self._merged_rows, self._merged_scaling):
            held.pop(adapter_name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts where no adapter is at work.

        Raises UsageError otherwise: the block around merged experts asks for the factors, and does not come here.
        """
        if self.disable_adapters or self.merged or not any(name in self.lora_A for name in self.active_adapters):
            return super().forward(*args, **kwargs)
        if kwargs.get("adapter_names"):
            raise UsageError(
                "adapters of experts are the same for all rows of a batch: `adapter_names` is not possible"
            )
        raise UsageError(
            "this model's code is older than adapters of experts: convert it again, or load it without "
            "`trust_remote_code` after `import meo_hf`"
        )
