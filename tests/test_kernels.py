"""The Triton kernels against plain float64 arithmetic: on a GPU if there is one, else in Triton's interpreter.

Triton decides when it is imported whether it interprets, and other tests need it compiled: the interpreter has
a process of its own, which runs this file again.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if RUNS_HERE:
    from meo_hf.modeling import kernels_meo as kernels

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
if INTERPRETED:  # which computes both short types alike
    DTYPES = DTYPES[:2]
LAYOUTS = ["plain", "transposed", "upper half", "left half", "transposed half", "every second row"]
# a product of two merged projections: the interpreter cuts bfloat16 off where a GPU rounds, and twice 0.4 % add up
GATED_TOLERANCE = {**TOLERANCE, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}
FORMS = [(layout, torch.float32) for layout in LAYOUTS]
FORMS += [(layout, dtype) for layout in LAYOUTS[:2] for dtype in (torch.bfloat16, torch.float16)]
REFERENCE = {
    None: lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.fixture(
    params=[
        pytest.param("cpu" if INTERPRETED else "cuda", marks=pytest.mark.gpu if RUNS_HERE and not INTERPRETED else [])
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new buffers with what may not be left in them, and time no tiles: a hundred searches take long."""
    empty = torch.empty

    def poisoned(*shape, **kwargs) -> Tensor:
        out = empty(*shape, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    torch.manual_seed(0)


def stack_of(layout: str, experts: int, outs: int, ins: int, dtype: torch.dtype, device: str) -> Tensor:
    """Draw experts independently and return them as a view [E, O, I] of the given layout."""
    shape = {
        "plain": (experts, outs, ins),
        "transposed": (experts, ins, outs),
        "upper half": (experts, 2 * outs, ins),
        "left half": (experts, outs, 2 * ins),
        "transposed half": (experts, ins, 2 * outs),
        "every second row": (experts, 2 * outs, ins),
    }[layout]
    stack = torch.randn(shape, device=device).to(dtype)
    if layout.startswith("transposed"):
        stack = stack.transpose(1, 2)
    return stack[:, 1::2] if layout == "every second row" else stack[:, -outs:, :ins]


def gates_of(groups: int, selected: int, experts: int, device: str) -> tuple[Tensor, Tensor]:
    """Select distinct experts, but the first group selects one of them twice, and spread the gates from 0 to 2."""
    index = torch.rand(groups, experts, device=device).topk(selected, dim=1).indices
    gates = torch.rand(groups, selected, device=device).pow(3) * 2
    if selected > 1:
        index[0, 1] = index[0, 0]
        gates[-1, 0] = 0.0
    return index, gates


def merged(stack: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    shape = (*gates.shape, *[1] * (stack.dim() - 1))
    return (gates.double().reshape(shape) * stack.double()[index]).sum(1)


def linear(x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor) -> Tensor:
    y = x.double() @ merged(stack, index, gates).transpose(1, 2)
    return y if bias is None else y + merged(bias, index, gates)[:, None]


def check(got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert got.shape == expected.shape
    assert got.isfinite().all()
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= (tolerance or TOLERANCE[got.dtype])


@pytest.mark.parametrize(("layout", "dtype"), FORMS)
@pytest.mark.parametrize(("groups", "selected", "experts"), [(3, 2, 5), (17, 2, 4), (1, 1, 1)])
def test_merge(device, groups, selected, experts, layout, dtype):
    index, gates = gates_of(groups, selected, experts, device)
    stack = stack_of(layout, experts, 5, 100, dtype, device)
    got = kernels.merge(stack, index, gates)
    assert got.dtype == dtype
    assert (got.stride(1) < got.stride(2)) == layout.startswith("transposed")
    check(got, merged(stack, index, gates))
    check(kernels.merge(stack[..., 0], index, gates), merged(stack[..., 0], index, gates))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_odd_sizes_into_another_dtype(device, dtype):
    for groups, outs, ins in [(130, 1, 1), (2, 63, 1), (2, 1, 257), (130, 5, 257)]:
        index, gates = gates_of(groups, 2, 12, device)
        stack = stack_of("plain", 12, outs, ins, dtype, device)
        got = kernels.merge(stack, index.int(), gates, torch.float32)
        assert got.dtype == torch.float32
        check(got, merged(stack, index, gates), 1e-4)  # gates in half precision would leave 1e-3


@pytest.mark.parametrize(("layout", "dtype"), FORMS)
@pytest.mark.parametrize("tokens", [1, 63])
def test_linear(device, tokens, layout, dtype):
    index, gates = gates_of(3, 3, 5, device)
    stack = stack_of(layout, 5, 63, 100, dtype, device)
    bias = torch.randn(5, 126, device=device).to(dtype)[:, ::2]
    x = torch.randn(100, 3, tokens, device=device).to(dtype).permute(1, 2, 0)  # no stride is 1
    check(kernels.merged_linear(x, stack, bias, index, gates), linear(x, stack, bias, index, gates))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "tokens", "experts", "selected", "outs", "ins"),
    [(1, 1, 1, 1, 1, 1), (2, 257, 2, 2, 100, 63), (1, 2, 18, 18, 257, 100), (7, 1, 4, 1, 1, 257)],
)
def test_linear_of_odd_sizes(device, groups, tokens, experts, selected, outs, ins, dtype):
    index, gates = gates_of(groups, selected, experts, device)
    stack = stack_of("plain", experts, outs, ins, dtype, device)
    x = torch.randn(groups, tokens, ins, device=device).to(dtype)
    y = linear(x, stack, None, index, gates)
    check(kernels.merged_linear(x, stack, None, index, gates), y)
    check(kernels.merged_linear(x, stack, None, index, gates, "gelu"), F.gelu(y))
    back = kernels.merged_linear(y.to(dtype), stack.transpose(1, 2), None, index, gates)
    check(back, linear(y.to(dtype), stack.transpose(1, 2), None, index, gates))
    weight, x = merged(stack, index, gates).to(dtype), x[:, :1]
    check(kernels.grouped_gemv(x, weight, None), x.double() @ weight.double().transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "interleaved"), [("plain", False), ("plain", True), ("transposed", True)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated(device, activation, layout, interleaved, dtype):
    assert activation in kernels.ACTIVATIONS
    index, gates = gates_of(2, 2, 3, device)
    stack = stack_of(layout, 3, 2 * 35, 63, dtype, device)
    bias = torch.randn(3, 70, device=device).to(dtype) if activation != "relu" else None
    x = torch.randn(2, 3 if interleaved else 40, 63, device=device).to(dtype) / 8
    y = linear(x, stack, bias, index, gates)
    gate, up = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, dim=-1)
    got = kernels.merged_gated(x, stack, bias, index, gates, activation, interleaved)
    check(got, REFERENCE[activation](gate) * up, GATED_TOLERANCE[dtype])


def test_unknown_activation_is_refused(device):
    index, gates = gates_of(1, 1, 1, device)
    with pytest.raises(ValueError, match="tanh"):
        kernels.merged_linear(torch.ones(1, 1, 4), torch.ones(1, 4, 4), None, index, gates, "tanh")


@pytest.mark.parametrize(("layout", "dtype"), FORMS)
@pytest.mark.parametrize(("groups", "tokens", "experts", "selected"), [(1, 1, 6, 2), (21, 3, 7, 2)])
def test_combine(device, groups, tokens, experts, selected, layout, dtype):
    index, gates = gates_of(groups, selected, experts, device)
    stack = stack_of(layout, experts, 65, 67, dtype, device)
    bias = torch.randn(experts, 65, device=device).to(dtype) if tokens > 1 else None
    x = torch.randn(tokens, groups, 67, device=device).to(dtype).transpose(0, 1)
    check(kernels.combine_linear(x, stack, bias, index, gates), linear(x, stack, bias, index, gates))


def test_combine_keeps_an_expert_to_the_rows_that_selected_it(device):
    stack = stack_of("plain", 3, 20, 30, torch.float32, device)
    stack[1] = float("inf")
    index, gates = torch.tensor([[0, 1], [0, 2]], device=device), torch.tensor([[1.0, 1.0], [0.5, 0.0]], device=device)
    x = torch.randn(2, 3, 30, device=device)
    got = kernels.combine_linear(x, stack, None, index, gates)
    assert not got[0].isfinite().any()
    check(got[1], 0.5 * x[1].double() @ stack[0].double().T)


@pytest.mark.parametrize(("layout", "dtype"), FORMS)
@pytest.mark.parametrize(("groups", "tokens", "outs", "ins"), [(2, 1, 9, 1100), (1, 13, 17, 1300)])
def test_gemv(device, groups, tokens, outs, ins, layout, dtype):
    weight = stack_of(layout, groups, outs, ins, dtype, device)
    bias = torch.randn(groups, outs, device=device).to(dtype)
    x = torch.randn(ins, groups, tokens, device=device).to(dtype).permute(1, 2, 0)
    y = x.double() @ weight.double().transpose(1, 2) + bias.double()[:, None]
    check(kernels.grouped_gemv(x, weight, bias), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [3, 32])
def test_experts_that_nobody_selected_are_not_read(device, groups, dtype):
    index = torch.randint(0, 3, (groups, 2), device=device) * 2
    gates = torch.rand(groups, 2, device=device)
    stack, bias = stack_of("plain", 7, 20, 30, dtype, device), torch.randn(7, 20, device=device).to(dtype)
    stack[1::2], bias[1::2] = float("nan"), float("inf")
    stack[6], bias[6] = float("inf"), float("nan")
    x = torch.randn(groups, 2, 30, device=device).to(dtype)
    y = linear(x, stack, bias, index, gates)
    check(kernels.merge(stack, index, gates), merged(stack, index, gates))
    check(kernels.merge(bias, index, gates), merged(bias, index, gates))
    check(kernels.merged_linear(x, stack, bias, index, gates), y)
    got = kernels.merged_gated(x, stack, bias, index, gates, "silu")
    check(got, F.silu(y[..., :10]) * y[..., 10:], GATED_TOLERANCE[dtype])
    check(kernels.combine_linear(x, stack, bias, index, gates), y)


def test_no_groups_and_no_tokens(device):
    stack = torch.randn(4, 5, 6, device=device)
    for groups, tokens in [(0, 3), (2, 0)]:
        index, gates = torch.zeros(groups, 2, dtype=torch.long, device=device), torch.zeros(groups, 2, device=device)
        x = torch.randn(groups, tokens, 6, device=device)
        assert kernels.merge(stack, index, gates).shape == (groups, 5, 6)
        for apply in (kernels.merged_linear, kernels.combine_linear):
            assert apply(x, stack, None, index, gates).shape == (groups, tokens, 5)
        assert kernels.grouped_gemv(x, stack[:groups], None).shape == (groups, tokens, 5)


CHOICES = {
    name: len(tuned.choices)
    for name, tuned in (vars(kernels) if RUNS_HERE else {}).items()
    if hasattr(tuned, "choices")
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, count in CHOICES.items() for n in range(count)])
def test_every_tile_size(device, name, number, monkeypatch):
    tuned = getattr(kernels, name)
    monkeypatch.setattr(tuned, "choices", [tuned.choices[number]])
    dtype = torch.float32 if name == "_LINEAR_FULL" else torch.bfloat16
    groups = 17 if name == "_MERGE_MANY" else 2
    tokens = 1 if name == "_GEMV" else 33 if name.startswith("_LINEAR") and name != "_LINEAR_FEW" else 9
    index, gates = gates_of(groups, 3, 4, device)
    stack = stack_of("plain", 4, 70, 300, dtype, device)
    x = torch.randn(groups, tokens, 300, device=device).to(dtype)
    y = linear(x, stack, None, index, gates)
    if name.startswith("_MERGE"):
        check(kernels.merge(stack, index, gates), merged(stack, index, gates))
    elif name.startswith("_LINEAR"):
        got = kernels.merged_gated(x, stack, None, index, gates, "relu")
        check(got, F.relu(y[..., :35]) * y[..., 35:], GATED_TOLERANCE[dtype])
    elif name == "_COMBINE":
        check(kernels.combine_linear(x, stack, None, index, gates), y)
    else:
        weight = merged(stack, index, gates).to(dtype)
        check(kernels.grouped_gemv(x, weight, None), x.double() @ weight.double().transpose(1, 2))


def test_a_captured_launch_searches_nothing_and_keeps_what_a_search_found(device, monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append(arguments["block"])

    class Search(Kernel):
        best_config = type("Config", (), {"all_kwargs": lambda self: {"block": 2}})()

        def __getitem__(self, grid):
            return lambda **arguments: launched.append("search")

    tuned = kernels._Tuned(Kernel(), "size", "block", [(1, 4, 1)])
    tuned.search = Search()
    monkeypatch.setattr(kernels, "_ON_CPU", False)
    given = {"stack": torch.ones(1, device=device), "out": torch.ones(1, device=device)}
    for capturing, size, expected in [(True, 1, 1), (False, 1, "search"), (True, 1, 2), (True, 3, 1), (False, 1, 2)]:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        tuned.launch(lambda meta: (1,), size=size, **given)
        assert launched[-1] == expected


def test_usable(device):
    good = torch.ones(1, device=device)
    assert kernels.usable(good, good.bfloat16(), good.half())
    assert not kernels.usable(good, good.double())
    assert not kernels.usable(good, torch.ones(1, device="meta"))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_search_then_graph(device, monkeypatch):
    monkeypatch.undo()
    index, gates = gates_of(2, 2, 4, device)
    stack = stack_of("plain", 4, 128, 64, torch.bfloat16, device)
    x = torch.randn(2, 3, 64, device=device).bfloat16()
    for apply in (kernels.merged_linear, kernels.combine_linear):
        apply(x, stack, None, index, gates)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = apply(x, stack, None, index, gates)
        x.normal_()
        graph.replay()
        check(y, linear(x, stack, None, index, gates))


def test_import_without_triton_or_a_started_gpu():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from meo_hf.modeling import kernels_meo as k;"
        "assert not k.usable(torch.ones(1)); assert not torch.cuda.is_initialized(); assert 'silu' in k.ACTIVATIONS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if not RUNS_HERE:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
