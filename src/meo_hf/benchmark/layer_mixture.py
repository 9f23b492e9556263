"""The rival: the same experts as a mixture of experts, run by Transformers' own implementations.

Legend: N tokens, D hidden features, E experts, K selected.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from meo_hf.benchmark.layer_setup import Layer, Setup, Variant, activate

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sonicmoe", "deepgemm")
_NEEDS = {"sonicmoe": ("kernels", "cutlass"), "deepgemm": ("kernels",)}


def mixtures_of(setup: Setup) -> list[Variant]:
    """List the implementations that are installed, and made for a device and a shape."""
    return [mixture(setup, name) for name in IMPLEMENTATIONS if _there(setup, name)]


def mixture(setup: Setup, implementation: str) -> Variant:
    """Run the same experts as a mixture of experts in which each token has its own gate, by Transformers' code."""
    cell = setup.cell
    experts = Experts(setup.layer)
    forward = experts if implementation == "eager" else partial(ALL_EXPERTS_FUNCTIONS[implementation], experts)

    def run(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        index, weights = setup.token_gates(x)
        return forward(tokens, index, weights).reshape(x.shape)

    largest = max(cell.shape.first_outputs, cell.shape.intermediate) * cell.shape.hidden
    wide = cell.shape.first_outputs + 2 * cell.shape.hidden + cell.shape.intermediate
    room = cell.all_tokens * cell.top_k * (wide + (largest if implementation == "batched_mm" else 0)) * cell.itemsize
    parameters = (*setup.layer.up.parameters(), *setup.layer.down.parameters(), setup.token_router)
    eager = implementation == "eager"
    return Variant(f"moe {implementation}", "moe", run, parameters, room, capturable=not eager, optional=not eager)


class Experts(nn.Module):
    """Experts in the layout that Transformers' implementations read; its own forward is Mixtral's loop."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        shape = self.shape = layer.shape
        self.num_experts, self.hidden_dim, self.intermediate_dim = shape.experts, shape.hidden, shape.intermediate
        self.has_gate, self.has_bias, self.is_transposed = shape.gated, shape.biases, shape.transposed
        self.is_concatenated, self.has_post_expert_norm, self._is_expert_parallel = True, False, False
        self.act_fn = F.silu if shape.gated else F.gelu
        self.config = SimpleNamespace(hidden_act="silu" if shape.gated else "gelu")
        first = "gate_up_proj" if shape.gated else "up_proj"
        for name, of in ((first, layer.up), ("down_proj", layer.down)):
            setattr(self, name, of.weight.transpose(1, 2) if shape.transposed else of.weight)
            setattr(self, f"{name}_bias", of.bias)
        self.up, self.down = layer.up, layer.down

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        return activate(self.shape, hidden)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run each selected expert on the tokens that chose it: [N, D], [N, K], [N, K] -> [N, D]."""
        total = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = F.one_hot(top_k_index, self.num_experts).permute(2, 1, 0)  # [E, K, N]
            hit = mask.sum(dim=(-1, -2)).nonzero()[:, 0]
        for expert in hit:
            place, token = torch.where(mask[expert])
            hidden = F.linear(hidden_states[token], self.up.weight[expert], _of(self.up.bias, expert))
            y = F.linear(activate(self.shape, hidden), self.down.weight[expert], _of(self.down.bias, expert))
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total


def _of(bias: Tensor | None, expert: Tensor) -> Tensor | None:
    return None if bias is None else bias[expert]


def _there(setup: Setup, implementation: str) -> bool:
    if implementation not in _NEEDS:
        return True
    device, cell = setup.layer.router.device, setup.cell
    if device.type != "cuda" or not all(find_spec(name) for name in _NEEDS[implementation]):
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return cell.dtype == "bfloat16" if implementation == "deepgemm" else cell.shape.gated and cell.dtype != "float32"
