"""Count floating point operations of running models, and repeat the FLOPs figure of the MEO paper.

Two conventions for a merge of m experts into one: `mac` charges m per merged value, as the paper's figure does
(a multiply-accumulate is one); `mul_add` charges 2m - 1 (m multiplications and m - 1 additions), the scale on
which a matrix product is counted here and there: two per multiply-accumulate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.merging_meo import combine_outputs, grouped_linear
from meo_hf.modeling.modeling_meo import meo_model_class

MergeConvention = Literal["mac", "mul_add"]
Method = Literal["moe", "meo"]

SIZES: dict[str, tuple[int, int]] = {"small": (4, 512), "base": (12, 768), "large": (24, 1024)}
"""Layers and hidden size of the paper's BERT models; heads of 64 features, feed-forward four times as wide."""

SEQUENCE_LENGTH = 128
NUM_EXPERTS = 32

PAPER_FIGURE: dict[str, dict[int, tuple[float, float]]] = {
    "small": {
        1: (7.40, 7.40),
        2: (9.59, 7.46),
        4: (13.9, 7.47),
        8: (22.5, 7.49),
        16: (39.7, 7.58),
        32: (73.3, 7.70),
    },
    "base": {
        1: (28.65, 28.65),
        2: (42.9, 28.72),
        4: (71.8, 28.85),
        8: (129.5, 29.13),
        16: (244.8, 29.54),
        32: (472.6, 30.46),
    },
    "large": {
        1: (87.3, 87.3),
        2: (139.3, 87.9),
        4: (241.9, 88.3),
        8: (448.8, 89.1),
        16: (860.4, 90.8),
        32: (1673.0, 93.9),
    },
}
"""GFLOPs of (vanilla MoE, MEO) by number of selected experts: pixels read from the figure that the paper's authors
published with their code (Figures/Results.png of Shwai-He/MEO), so good to about one percent."""

TOLERANCE = 0.015
"""Relative deviation from the figure that the counts must stay within, in convention `mac`."""


def merge_flops(top_k: int, numel: int, convention: MergeConvention = "mac") -> int:
    """Return the FLOPs of merging `top_k` experts into `numel` values."""
    if convention not in ("mac", "mul_add"):
        raise ValueError(f"unknown merge convention {convention!r}; allowed: mac, mul_add")
    return (top_k if convention == "mac" else 2 * top_k - 1) * numel


@dataclass(frozen=True)
class FlopCount:
    """What one forward pass computes.

    `products` are the FLOPs of matrix products and convolutions, two per multiply-accumulate. `merges` holds
    for each merge the number of experts and of merged values, all groups that have a gate of their own together.
    """

    products: int
    merges: tuple[tuple[int, int], ...] = ()

    def total(self, convention: MergeConvention = "mac") -> int:
        """Return products and merges in one number."""
        return self.products + sum(merge_flops(top_k, numel, convention) for top_k, numel in self.merges)


def count_flops(model: nn.Module, inputs: dict[str, Any]) -> FlopCount:
    """Count a forward pass of a model, dense or MEO, on any device including `meta`, in the mode it is in.

    The model's own code runs on tensors without data, so it costs no memory and values of inputs don't matter.
    Elementwise operations (activations, norms, softmax, sums of expert outputs) are not counted.
    """
    merges: list[tuple[int, int]] = []
    counter = _counter()
    with torch.no_grad(), FakeTensorMode(), _record_merges(model, merges), counter:
        state = {name: _shape_only(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        fake = {name: _shape_only(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        torch.func.functional_call(model, state, (), fake)
    return FlopCount(counter.get_total_flops(), tuple(merges))


def count_run(model: nn.Module, inputs: dict[str, Any]) -> FlopCount:
    """Count a forward pass as `count_flops` does, but really run it: a mixture of experts asks its gates' values."""
    merges: list[tuple[int, int]] = []
    counter = _counter()
    with torch.no_grad(), _record_merges(model, merges, compute=True), counter:
        model(**inputs)
    return FlopCount(counter.get_total_flops(), tuple(merges))


def forward_flops(model: nn.Module, inputs: dict[str, Any], merge_convention: MergeConvention = "mac") -> int:
    """Return the FLOPs of one forward pass of a model, its merges included; see `count_flops`."""
    return count_flops(model, inputs).total(merge_convention)


def flops_per_token(model: nn.Module, inputs: dict[str, Any], merge_convention: MergeConvention = "mac") -> float:
    """Return the FLOPs of one forward pass over the number of positions in `input_ids`, padding included."""
    return forward_flops(model, inputs, merge_convention) / inputs["input_ids"].numel()


def _counter() -> FlopCounterMode:
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    return FlopCounterMode(display=False, custom_mapping=attention)


def _shape_only(tensor: Tensor) -> Tensor:
    # on the CPU, not on meta: autocast, which the routers switch off, does not know the meta device
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Count scores and weighted values; PyTorch's counter knows only the GPU kernels of this operation."""
    batch, heads, positions, features = query
    return 2 * batch * heads * positions * key[2] * (features + value[3])


@contextmanager
def _record_merges(model: nn.Module, merges: list[tuple[int, int]], compute: bool = False) -> Iterator[None]:
    """Note number of experts and of merged values of each merge, and `compute` it or let a stand-in give its shape.

    Counted is what a model computes by definition, merge then multiply, whatever plan would be fastest.
    Models loaded with their repository's own code have a copy of the module to patch, so it is looked up by class.
    """
    bases = {base for module in model.modules() for base in type(module).__mro__ if base.__name__ == "Merger"}
    modules: list[Any] = [sys.modules[base.__module__] for base in bases]
    originals = [(module, module.merge_experts, module.merged_linear) for module in modules]

    def recording(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def merge(stack: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            groups, top_k = top_k_index.shape
            merges.append((top_k, groups * stack[0].numel()))
            return original(stack, top_k_index, top_k_weights) if compute else stack.new_empty(groups, *stack.shape[1:])

        return merge

    def defining(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def linear(
            x: Tensor,
            stack: Tensor,
            bias: Tensor | None,
            index: Tensor,
            gates: Tensor,
            owner: Any = None,
            plan: Any = None,
        ) -> Tensor:
            index, gates = (index, gates) if owner is None else (index[owner], gates[owner])
            if plan == "combine":
                return combine_outputs(x, stack, bias, index, gates)
            return grouped_linear(x, merge(stack, index, gates), None if bias is None else merge(bias, index, gates))

        return linear

    for module, merge_experts, _ in originals:
        module.merge_experts = recording(merge_experts)
        module.merged_linear = defining(module.merge_experts)
    try:
        yield
    finally:
        for module, merge_experts, merged_linear in originals:
            module.merge_experts, module.merged_linear = merge_experts, merged_linear


@dataclass(frozen=True)
class PaperPoint:
    """One point of the paper's figure, in FLOPs: a BERT size, a method, and the number of selected experts."""

    size: str
    method: Method
    top_k: int
    figure: float
    count: FlopCount

    def deviation(self, convention: MergeConvention = "mac") -> float:
        """Return how far the count is from the published figure, relative to the figure."""
        return self.count.total(convention) / self.figure - 1


def paper_table() -> list[PaperPoint]:
    """Count all 36 points of the paper's figure; takes a quarter to half a minute, and little memory."""
    return [
        paper_point(size, method, top_k)
        for size, rows in PAPER_FIGURE.items()
        for top_k in rows
        for method in ("moe", "meo")
    ]


def paper_point(size: str, method: Method, top_k: int) -> PaperPoint:
    """Count one point of the paper's figure: one sequence of 128 tokens, masked-LM head included.

    The vanilla MoE runs the selected experts' linear maps on every token and sums their outputs. It shares the
    sequence's gate here; a router that reads every token would add less than 0.3 % to its products.
    """
    moe, meo = PAPER_FIGURE[size][top_k]
    count = count_flops(paper_model(size, method, top_k), paper_inputs())
    return PaperPoint(size, method, top_k, (moe if method == "moe" else meo) * 1e9, count)


def paper_model(size: str, method: Method, top_k: int) -> nn.Module:
    """Build a BERT of the paper's figure on the meta device."""
    layers, hidden = SIZES[size]
    config = meo_config_class(BertConfig)(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        attn_implementation="eager",
        meo={
            "level": "sequence",
            "num_experts": NUM_EXPERTS,
            "top_k": top_k,
            "combine": "weights" if method == "meo" else "outputs",
        },
    )
    with torch.device("meta"):
        return meo_model_class(BertForMaskedLM)(config).eval()


def paper_inputs() -> dict[str, Tensor]:
    """Return the inputs of the paper's figure: one sequence without padding, on the meta device."""
    return {"input_ids": torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.long, device="meta")}


def beyond_tolerance(points: Sequence[PaperPoint]) -> list[PaperPoint]:
    """Return the points whose count in convention `mac` is farther from the figure than the tolerance."""
    return [point for point in points if abs(point.deviation()) > TOLERANCE]


def paper_rich_table(points: Sequence[PaperPoint]) -> Table:
    """Show the counts beside the published figure, in GFLOPs, the merge charged in both conventions."""
    title = f"GFLOPs of BERT with {NUM_EXPERTS} experts, one sequence of {SEQUENCE_LENGTH} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))  # fits 80 columns
    table.add_column("BERT")
    for name in ("m", "MoE\nfigure", "count", "dev.", "MEO\nfigure", "m|W|", "dev.", "(2m-1)|W|", "dev."):
        table.add_column(name, justify="right", no_wrap=True)
    by_key = {(point.size, point.top_k, point.method): point for point in points}
    for size, rows in PAPER_FIGURE.items():
        for top_k in rows:
            moe, meo = by_key[size, top_k, "moe"], by_key[size, top_k, "meo"]
            cells = [_giga(moe.figure), *_counted(moe, "mac"), _giga(meo.figure)]
            cells += [*_counted(meo, "mac"), *_counted(meo, "mul_add")]
            table.add_row(size, str(top_k), *cells, end_section=top_k == max(rows))
    return table


def _counted(point: PaperPoint, convention: MergeConvention) -> tuple[str, str]:
    return _giga(point.count.total(convention)), f"{point.deviation(convention):+.1%}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.{2 if flops < 1e11 else 1}f}"


def write_results(points: Sequence[PaperPoint], path: str | Path) -> None:
    """Write settings, versions and all points as JSON; FLOPs are whole numbers, deviations are fractions."""
    results = {
        "setting": {
            "sizes": {size: {"layers": layers, "hidden_size": hidden} for size, (layers, hidden) in SIZES.items()},
            "sequence_length": SEQUENCE_LENGTH,
            "batch": 1,
            "num_experts": NUM_EXPERTS,
            "masked_lm_head": True,
        },
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "tolerance": TOLERANCE,
        "points": [
            {
                "size": point.size,
                "method": point.method,
                "top_k": point.top_k,
                "figure_flops": round(point.figure),
                "flops_mac": point.count.total("mac"),
                "flops_mul_add": point.count.total("mul_add"),
                "deviation_mac": round(point.deviation("mac"), 5),
                "deviation_mul_add": round(point.deviation("mul_add"), 5),
            }
            for point in points
        ],
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
