"""On a GPU: contracts in every precision, merged linear maps, placement, compilation, CUDA graphs, a real model.

`pytest -m gpu` runs them. `MEO_TEST_DEVICE=cpu` runs all but the graphs on the CPU, to test the tests.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import contracts
import decoding
import moe_contracts
import pytest
import real
import torch
from contracts import Case, assert_close, logits_of
from decoding import CACHES, Setting
from meo_hf.modeling import kernels_meo
from meo_hf.modeling.kernels_meo import usable
from meo_hf.modeling.merged_linear_meo import merged_linear
from meo_hf.modeling.merging_meo import grouped_linear, merge_experts
from meo_hf.modeling.plans_meo import PLANS
from meo_hf.modeling.router_meo import MeoRouter
from moe_contracts import MoeCase
from test_contracts import compare_gradients
from test_routing_state import run, setup
from tiny import inputs_as, labels_for
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StaticCache

from meo_hf import convert

DEVICE = os.environ.get("MEO_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
only_cuda = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs are CUDA's")
BACKEND = "inductor" if ON_GPU else "eager"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
AT_LEAST = {torch.float64: 0.0, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""What the rounding of a whole model, and of gates that two ways pool, may do in a precision."""


class Here(TorchFunctionMode):
    """Within this context tensors are made on the tested device; the CPU draws, so that numbers are the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **{**kwargs, "device": DEVICE})


def forget_models() -> None:
    """Models are shared between tests, but not between devices."""
    for made in (contracts._dense, decoding._model, moe_contracts._stock):
        made.cache_clear()


@pytest.fixture
def here() -> Iterator[None]:
    forget_models()
    with Here():
        yield
    forget_models()


@pytest.fixture(autouse=True)
def whole_precision() -> Iterator[None]:
    """Multiply float32 as float32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends] if ON_GPU else []
    for backend in backends[: len(before)]:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=False):
        backend.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time no tiles: a thousand searches take long, and the kernels' own tests try every size."""

    def search(self: Any) -> Any:
        raise torch.OutOfMemoryError("as if there were no room to search in")

    monkeypatch.setattr(kernels_meo._Tuned, "search", property(search))


@dataclass(frozen=True)
class In(Case):
    """A case in another precision."""

    dtype: torch.dtype = torch.float64

    def drawn(self, **meo: Any) -> PreTrainedModel:
        return super().drawn(**meo).to(self.dtype)

    def inputs(self, **options: Any) -> dict[str, Tensor]:
        return inputs_as(super().inputs(**options), self.dtype)


@dataclass(frozen=True)
class MoeIn(MoeCase):
    """A mixture in another precision."""

    precision: torch.dtype = torch.float64

    @property
    def dtype(self) -> torch.dtype:
        return self.precision

    @property
    def tolerance(self) -> float:
        return max(2e-5, AT_LEAST[self.precision])


CASES = [
    ("bert", "sequence", "ffn"),
    ("bert", "sequence", "projection"),
    ("bert", "task", "ffn"),
    ("llama", "segment", "ffn"),
    ("llama", "sequence", "ffn"),
    ("llama", "token", "projection"),
    ("gpt2", "segment", "projection"),
    ("opt", "segment", "ffn"),
    ("t5", "sequence", "ffn"),
    ("bart", "token", "ffn"),
]
PRECISE: list[Callable[[Any], None]] = [
    contracts.permuted_experts_change_nothing,
    contracts.identical_experts_are_dense,
    contracts.every_layer_is_merged,
    contracts.underflowing_gates_stay_finite,
    lambda case: contracts.padding_changes_nothing(case, "right"),
    lambda case: contracts.later_tokens_change_nothing(case) if case.kind != "encoder" else None,
    lambda case: contracts.task_ids_are_tasks_one_by_one(case) if case.level == "task" else None,
]
ROUGH: list[Callable[[Any], None]] = [
    contracts.weights_combined_are_outputs_combined,
    contracts.rows_do_not_meet,
    contracts.merged_feed_forward_is_reference,  # last: its softmax overflows in float16
]


def in_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Allow comparisons of contracts what a precision needs."""

    def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
        assert_close(actual, expected, max(tolerance, AT_LEAST[dtype]))

    for module in (contracts, moe_contracts):
        monkeypatch.setattr(module, "assert_close", close)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_contracts(case: tuple[str, str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_precision(monkeypatch, dtype)
    doubles = [contracts.gradients_reach_what_was_selected] if dtype == torch.float64 else []  # tiny ones underflow
    for holds in (*PRECISE, *ROUGH, *doubles):
        holds(In(*case, dtype=dtype))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_contracts_in_half_precision(
    case: tuple[str, str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_precision(monkeypatch, dtype)
    for holds in ROUGH if dtype == torch.bfloat16 else ROUGH[:-1]:
        holds(In(*case, dtype=dtype))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_contracts_of_mixtures(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_precision(monkeypatch, dtype)
    case = MoeIn(family, precision=dtype)
    moe_contracts.blocks_equal_the_oracle(case)
    moe_contracts.blocks_equal_the_oracle(case, (5, 3, 2))
    moe_contracts.one_token_groups_with_one_expert_are_stock(case)
    moe_contracts.one_token_groups_with_alike_experts_are_stock(case)
    moe_contracts.pieces_equal_the_whole(case)
    moe_contracts.padding_changes_nothing(case)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_mixtures_in_half_precision(family: str, dtype: torch.dtype) -> None:
    case = MoeIn(family, precision=dtype)
    moe_contracts.one_token_groups_with_one_expert_are_stock(case)


TEXT = Setting("llama", "segment", "ffn", 4, (13, 9), (5, 4), "left", (6, 7, 8), "dynamic", 3)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_decoding(family: str, level: str, cache: str) -> None:
    setting = TEXT._replace(family=family, level=level, cache=cache)
    decoding.one_text_has_one_result(setting)
    decoding.nothing_looks_ahead(setting, False)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoding_of_pairs(family: str) -> None:
    decoding.pair_has_one_result(TEXT._replace(family=family, level="sequence", side="right"))


@lru_cache(maxsize=4)
def moved(family: str, level: str, scope: str) -> PreTrainedModel:
    """Return a copy of a decoder on the tested device."""
    return copy.deepcopy(decoding._model(family, level, scope)).to(DEVICE)


class There(Setting):
    """A setting whose model and batch are on the tested device; what `generate` makes itself is its own business."""

    def model(self) -> PreTrainedModel:
        model = moved(self.family, self.level, self.scope)
        model._meo_context.settings.segment_length = self.segment
        return model.eval()

    def batch(self) -> tuple[Tensor, Tensor]:
        ids, mask = super().batch()
        return ids.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_generation(level: str) -> None:
    for cache in ("dynamic", "static"):
        decoding.cached_generation_is_uncached(There(*TEXT)._replace(level=level, cache=cache))
    decoding.assisted_generation_is_greedy(There(*TEXT)._replace(level=level))


# merged linear maps: groups, tokens, outputs, inputs, experts, selected
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (3, 63, 100, 257, 5, 2),
    (2, 257, 63, 100, 4, 4),
    (7, 1, 257, 63, 6, 3),
    (100, 1, 63, 100, 63, 8),
    (2, 100, 257, 1, 3, 1),
]
FORMS = ("plain", "transposed", "no stride is 1")


def drawn_map(
    size: tuple[int, ...], form: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw x, stack, bias, index, gates and an output gradient; a gate is zero, and an expert selected twice."""
    groups, tokens, outs, ins, experts, selected = size
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x = normal(ins, groups, tokens).permute(1, 2, 0) if form == "no stride is 1" else normal(groups, tokens, ins)
    stack = normal(experts, ins, outs).transpose(1, 2) if form == "transposed" else normal(experts, outs, ins)
    index = torch.rand(groups, experts, generator=generator).topk(selected, 1).indices
    gates = torch.rand(groups, selected, generator=generator) + 0.1
    if selected > 1:
        index[0, 1] = index[0, 0]
        gates[-1, 0] = 0
    dy = normal(groups, tokens, outs)
    return x, stack * ins**-0.5, normal(experts, outs), index.to(DEVICE), gates.to(DEVICE), dy


def as_layout(stack: Tensor, form: str) -> Tensor:
    """Return a stack in the memory order that its form says: arithmetic may have given it another."""
    return stack.transpose(1, 2).contiguous().transpose(1, 2) if form == "transposed" else stack.contiguous()


def plain_linear(x: Tensor, stack: Tensor, bias: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    return grouped_linear(x, merge_experts(stack, index, gates), merge_experts(bias, index, gates))


def gradients_of(
    run: Callable[..., Tensor], given: list[Tensor], index: Tensor, dy: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return output and gradients of x, stack, bias and gates."""
    x, stack, bias, gates = (
        (t if dtype is None else t.to(dtype)).detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in given
    )
    y = run(x, stack, bias, index, gates)
    return y.detach(), *torch.autograd.grad(y, (x, stack, bias, gates), dy.to(y.dtype))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def can(plan: str) -> bool:
    return plan != "fused" or usable(torch.ones(1, device=DEVICE))


@dtypes
@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merged_linear(size: tuple[int, ...], form: str, plan: str | None, dtype: torch.dtype) -> None:
    if plan is not None and not can(plan):
        pytest.skip("plan fused needs Triton and a GPU")
    x, stack, bias, index, gates, dy = drawn_map(size, form, dtype)
    given = [x, as_layout(stack, form), bias, gates]
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    exact = gradients_of(plain_linear, given, index, dy, torch.float64)
    plain = gradients_of(plain_linear, given, index, dy)
    found = gradients_of(lambda *args: merged_linear(*args, plan=plan), given, index, dy)
    with torch.no_grad():
        inferred = merged_linear(x, given[1], bias, index, gates, plan=plan)
    assert inferred.dtype == dtype
    assert relative(inferred, exact[0]) <= allowed
    for name, mine, expected in zip(("y", "x", "stack", "bias"), found, exact, strict=False):
        assert mine.isfinite().all(), name
        assert relative(mine, expected) <= allowed, name
    theirs = relative(plain[4], exact[4])
    assert relative(found[4], exact[4]) <= max(2 * theirs, allowed), "gates"


@dtypes
@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("groups", [2, 40])
def test_experts_that_nobody_selected_are_not_read(groups: int, plan: str | None, dtype: torch.dtype) -> None:
    if plan is not None and not can(plan):
        pytest.skip("plan fused needs Triton and a GPU")
    x, stack, bias, _, _, dy = drawn_map((groups, 3, 63, 100, 7, 2), "plain", dtype)
    index = 2 * torch.randint(0, 3, (groups, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gates = torch.full((groups, 2), 0.5, device=DEVICE)
    exact = gradients_of(plain_linear, [x, stack, bias, gates], index, dy, torch.float64)
    stack[1::2], bias[1::2], stack[6], bias[6] = torch.nan, torch.nan, torch.inf, torch.nan
    found = gradients_of(lambda *args: merged_linear(*args, plan=plan), [x, stack, bias, gates], index, dy)
    for mine, expected in zip(found, exact, strict=True):
        assert mine.isfinite().all()
        assert relative(mine, expected) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("level", ["segment", "sequence", "task"])
@pytest.mark.parametrize("offloaded", [False, True], ids=["auto", "offload"])
def test_device_map(level: str, offloaded: bool, tmp_path: Path) -> None:
    case = Case("llama", level)
    model, inputs = case.drawn().float(), inputs_as(case.inputs(), torch.float)
    model.save_pretrained(tmp_path / "meo")
    size = sum(parameter.nbytes for parameter in model.parameters())
    first: Any = (torch.device(DEVICE).index or 0) if ON_GPU else "cpu"
    memory = {first: int(size * 0.9), **({"cpu": 2 * size} if ON_GPU else {})} if offloaded else None
    placed = type(model).from_pretrained(
        tmp_path / "meo", device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    if offloaded:
        assert len(set(placed.hf_device_map.values())) > 1
    else:
        assert {p.device.type for p in placed.parameters()} == {torch.device(DEVICE).type}
    there = {name: value.to(placed.device) for name, value in inputs.items()}
    assert_close(logits_of(placed, there).cpu(), logits_of(model, inputs), 1e-5)
    given = {"max_new_tokens": 3, "do_sample": False}
    tasks = [{n: v for n, v in some.items() if n == "task_ids"} for some in (inputs, there)]
    said = [
        m.generate(i["input_ids"], **t, **given).cpu()
        for m, i, t in zip((model, placed), (inputs, there), tasks, strict=True)
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize(
    "case",
    [Case("bert", "sequence")] + [Case("llama", level) for level in ("segment", "sequence", "task")],
    ids=lambda case: f"{case.family}-{case.level}",
)
def test_compiled_without_a_break_is_eager(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model = case.drawn(router="top_k").float().to(DEVICE)
    inputs = {name: t.to(DEVICE) for name, t in inputs_as(contracts.padded(case, "right")[0], torch.float).items()}
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    assert_close(logits_of(compiled, inputs), logits_of(model, inputs), 1e-5)
    inputs["labels"] = labels_for(case.family, inputs)
    compiled.train()
    loss = compiled(**inputs).loss
    assert_close(loss.detach(), model(**inputs).loss.detach(), 1e-5)
    monkeypatch.setitem(AT_LEAST, torch.float32, 1e-4)  # gradients of gates are sums over all weights
    in_precision(monkeypatch, torch.float32)
    compare_gradients(model, loss, lambda: model(**inputs).loss)


def compiled_steps(level: str) -> tuple[PreTrainedModel, Tensor, dict[str, Tensor], StaticCache, Any]:
    """Return a model, ids, prompt lengths, a static cache that holds 8 tokens of two rows, and the compiled step."""
    torch.compiler.reset()
    model, ids, prompt = setup(level, rows=2)
    model, ids = copy.deepcopy(model).to(DEVICE), ids.to(DEVICE)
    prompt = {name: t.to(DEVICE) for name, t in prompt.items()}
    cache = StaticCache(config=model.config, max_cache_len=32)
    model.route_cache(cache)
    with Here():
        run(model, ids[:, :8], cache, **prompt)
    return model, ids, prompt, cache, torch.compile(model, fullgraph=True, backend=BACKEND)


@torch.no_grad()
@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_compiled_static_steps_are_the_eager_ones(level: str) -> None:
    model, ids, prompt, cache, step = compiled_steps(level)
    with Here():
        whole = run(model, ids, **prompt)
    for place in range(8, 14):
        where = torch.tensor([[place]], device=DEVICE)
        options = {"past_key_values": cache, "position_ids": where, **prompt}
        assert_close(step(ids[:, place : place + 1], **options).logits, whole[:, place : place + 1], 1e-5)


@only_cuda
@torch.no_grad()
@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_a_decoding_step_is_a_cuda_graph(level: str) -> None:
    """The graph of one compiled step, captured with one token and replayed with another."""
    model, ids, prompt, cache, step = compiled_steps(level)
    token, where = ids[:, 8:9].clone(), torch.tensor([[8]], device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for place in range(8, 11):  # compiles, and finds what it needs
            token.copy_(ids[:, place : place + 1]), where.fill_(place)
            step(token, past_key_values=cache, position_ids=where, **prompt)
    torch.cuda.current_stream().wait_stream(stream)
    where.fill_(11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token, past_key_values=cache, position_ids=where, **prompt).logits
    token.copy_(5 + (token + 7) % 80)
    graph.replay()
    with Here():
        expected = run(model, torch.cat([ids[:, :11], token], 1), **prompt)[:, 11:]
    assert_close(logits, expected, 1e-5)


@only_cuda
@torch.no_grad()
@dtypes
@pytest.mark.parametrize("plan", [None, *PLANS])
def test_merged_linear_is_a_cuda_graph(plan: str | None, dtype: torch.dtype) -> None:
    x, stack, bias, index, gates, _ = drawn_map((3, 63, 100, 257, 5, 2), "plain", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            merged_linear(x, stack, bias, index, gates, plan=plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = merged_linear(x, stack, bias, index, gates, plan=plan)
    x.normal_(), gates.uniform_(0.1, 1), index.copy_((index + 1) % 5)
    graph.replay()
    expected = plain_linear(x.double(), stack.double(), bias.double(), index, gates.double())
    assert relative(y, expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(not (real.ASSETS / real.SMOLLM2.path).exists(), reason="SmolLM2 was not fetched here")
def test_a_real_model_says_the_same(tmp_path: Path) -> None:
    options = {"level": "sequence", "segment_length": 16, "num_experts": 4, "expert_init": "drop-upcycle"}
    convert(real.smollm2(), tmp_path / "meo", dtype="float32", verify="none", **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "meo", trust_remote_code=True)
    prompt = tokenizer("Once upon a time, in a village by the sea, there lived", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "meo", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, MeoRouter):
            module.weight.data.copy_(0.1 * torch.randn(module.weight.shape, generator=generator))
    said = {}
    for device in ("cpu", DEVICE):
        model.to(device)
        inputs = {name: t.to(device) for name, t in prompt.items()}
        for routing in ("prompt", "segment"):
            answer = model.generate(**inputs, max_new_tokens=24, do_sample=False, routing=routing)
            said.setdefault(routing, []).append(tokenizer.decode(answer[0]))
    assert all(len(set(texts)) == 1 for texts in said.values()), said
