"""One linear map of merged experts, by every plan: outputs and gradients against float64, and what it must not do."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from meo_hf.modeling import merged_linear_meo, tiles_meo
from meo_hf.modeling.merged_linear_meo import merged_linear
from meo_hf.modeling.merging_meo import grouped_linear, merge_experts, owned_linear, ragged_linear
from meo_hf.modeling.plans_meo import executed
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

PLANS = ("accumulate", "product", "combine")
SIZES = ((1, 1, 1), (4, 63, 100), (3, 257, 63), (2, 100, 257))
HALVES = (torch.bfloat16, torch.float16)


class Drawn:
    """Inputs of one linear map: x [N, T, I], stack [E, O, I], bias [E, O], index and gates [G, K], owner [N]."""

    def __init__(
        self, tokens: int = 4, outputs: int = 63, inputs: int = 100, *, experts: int = 6, top_k: int = 3,
        gates: int = 5,
        transposed: bool = False, owned: bool = False, biased: bool = True, dtype: torch.dtype = torch.float64
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.owner = torch.tensor([3, 1, 3, 0])[: max(2, gates)] % gates if owned else None
        groups = gates if self.owner is None else len(self.owner)
        self.x = draw(groups, tokens, inputs).to(dtype)
        stack = (draw(experts, outputs, inputs) / inputs**0.5).to(dtype)
        self.stack = stack.transpose(1, 2).contiguous().transpose(1, 2) if transposed else stack
        self.bias = draw(experts, outputs).to(dtype) if biased else None
        self.index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(gates)])
        wide = torch.promote_types(dtype, torch.float32)
        self.gates = (2 * draw(gates, top_k)).softmax(1).to(wide)
        self.dy = draw(groups, tokens, outputs).to(dtype)

    def inputs(self) -> tuple[Any, ...]:
        return self.x, self.stack, self.bias, self.index, self.gates, self.owner

    def leaves(self) -> list[Tensor]:
        """Return what gradients go to, as leaves of their own: x, stack, gates and, if there is one, bias."""
        for name in ("x", "stack", "gates", "bias"):
            if getattr(self, name) is not None:
                value = getattr(self, name).detach()
                setattr(self, name, value.requires_grad_())
        return [t for t in (self.x, self.stack, self.gates, self.bias) if t is not None]

    def gradients(self, plan: str | None) -> tuple[Tensor, ...]:
        """Return output and gradients, by a plan or, for None, as plain PyTorch derives them."""
        leaves = self.leaves()
        y = plain(*self.inputs()) if plan is None else merged_linear(*self.inputs(), plan)
        return (y.detach(), *torch.autograd.grad(y, leaves, self.dy))


def plain(x: Tensor, stack: Tensor, bias: Any, index: Tensor, gates: Tensor, owner: Any) -> Tensor:
    """Gather, weigh, sum, multiply: the definition."""
    if owner is not None:
        index, gates = index[owner], gates[owner]
    weight = (gates[..., None, None] * stack[index]).sum(1)
    merged = None if bias is None else (gates[..., None] * bias[index]).sum(1).to(x.dtype)
    return grouped_linear(x, weight.to(x.dtype), merged)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative root mean square."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


CASES = [
    pytest.param(*case, id="-".join(("t" if case[0] else "n", "owned" if case[1] else "each", case[2])))
    for case in itertools.product((False, True), (False, True), PLANS)
]


@pytest.mark.parametrize(("transposed", "owned", "plan"), CASES)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SIZES)
def test_float32_is_float64_rounded(
    transposed: bool, owned: bool, plan: str, tokens: int, outputs: int, inputs: int
) -> None:
    shape: dict[str, Any] = {"transposed": transposed, "owned": owned}
    expected = Drawn(tokens, outputs, inputs, **shape).gradients(None)
    found = Drawn(tokens, outputs, inputs, dtype=torch.float32, **shape).gradients(plan)
    reference = Drawn(tokens, outputs, inputs, dtype=torch.float32, **shape).gradients(None)
    names = ("y", "x", "stack", "gates", "bias")
    for name, ours, theirs, exact in zip(names, found, reference, expected, strict=True):
        assert ours.dtype == torch.float32
        allowed = max(1e-6, error(theirs, exact)) if name == "gates" else 1e-6
        assert error(ours, exact) <= allowed, (name, error(ours, exact), error(theirs, exact))


@pytest.mark.parametrize(("transposed", "owned", "plan"), CASES)
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_half_precision(transposed: bool, owned: bool, plan: str, dtype: torch.dtype) -> None:
    drawn = Drawn(dtype=dtype, transposed=transposed, owned=owned)
    exact = Drawn(transposed=transposed, owned=owned)
    for name in ("x", "stack", "bias", "gates", "dy"):  # the same values, so that only arithmetic differs
        setattr(exact, name, getattr(drawn, name).double())
    for ours, expected in zip(drawn.gradients(plan), exact.gradients(None), strict=True):
        assert error(ours, expected) <= 1e-2


@pytest.mark.parametrize(("transposed", "owned", "plan"), CASES)
def test_gradients_are_difference_quotients(transposed: bool, owned: bool, plan: str) -> None:
    drawn = Drawn(2, 3, 4, experts=4, top_k=2, gates=3, transposed=transposed, owned=owned)
    x, stack, gates, bias = drawn.leaves()

    def run(x: Tensor, stack: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
        return merged_linear(x, stack, bias, drawn.index, gates, drawn.owner, plan)

    assert torch.autograd.gradcheck(run, (x, stack, gates, bias))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("needed", ["x", "stack", "gates", "bias"])
def test_each_gradient_alone(plan: str, needed: str) -> None:
    drawn = Drawn()
    expected = dict(zip(("y", "x", "stack", "gates", "bias"), drawn.gradients(None), strict=True))
    for leaf in (drawn.x, drawn.stack, drawn.gates, drawn.bias):
        leaf.requires_grad_(False)  # type: ignore[union-attr]
    leaf = getattr(drawn, needed).requires_grad_()
    (found,) = torch.autograd.grad(merged_linear(*drawn.inputs(), plan), leaf, drawn.dy)
    torch.testing.assert_close(found, expected[needed])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "shape",
    [{"experts": 1, "top_k": 1}, {"experts": 4, "top_k": 4}, {"gates": 70, "tokens": 1}, {"gates": 1}, {"top_k": 1}],
    ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()),
)
def test_extremes(plan: str, shape: dict[str, int]) -> None:
    drawn = Drawn(**shape)
    for ours, expected in zip(drawn.gradients(plan), drawn.gradients(None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_repeated_experts_add_up_and_zero_gates_do_nothing(plan: str) -> None:
    drawn = Drawn()
    drawn.index[0] = drawn.index[0, 0]
    drawn.gates[1] = torch.tensor([0.0, 1.0, 0.0])
    for ours, expected in zip(drawn.gradients(plan), drawn.gradients(None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("plan", PLANS)
def test_strides_do_not_matter(plan: str) -> None:
    drawn, wide = Drawn(), Drawn(outputs=126)
    x = drawn.x.repeat_interleave(2, -1)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    expected = plain(*drawn.inputs())
    torch.testing.assert_close(merged_linear(x, *drawn.inputs()[1:], plan), expected)
    half, biases = wide.stack.chunk(2, 1)[1], wide.bias.chunk(2, 1)[1]  # type: ignore[union-attr]
    given = (drawn.x, half, biases, *drawn.inputs()[3:])
    torch.testing.assert_close(merged_linear(*given, plan), plain(*given))


@pytest.mark.parametrize(("transposed", "owned", "plan"), CASES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_no_gate_selected_does_not_leak(transposed: bool, owned: bool, plan: str, poison: float) -> None:
    """An expert that one gate selected must not reach the groups of another either."""
    drawn = Drawn(transposed=transposed, owned=owned, gates=4)
    drawn.index[:, :] = torch.tensor([0, 1, 2])
    drawn.index[3, 0] = 4
    expected = plain(*drawn.inputs())
    drawn.stack[5], drawn.stack[4, 0] = poison, poison
    found = merged_linear(*drawn.inputs(), plan)
    clean = torch.arange(4) != 3 if drawn.owner is None else drawn.owner != 3
    torch.testing.assert_close(found[clean], expected[clean])
    assert not torch.isfinite(found[~clean]).all()
    x = drawn.x.requires_grad_()
    (dx,) = torch.autograd.grad(merged_linear(x, *drawn.inputs()[1:], plan)[clean].sum(), x)
    assert torch.isfinite(dx[clean]).all()


@pytest.mark.parametrize(("transposed", "owned", "plan"), CASES)
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, transposed: bool, owned: bool, plan: str) -> None:
    originals = tiles_meo.Tokens.new, tiles_meo.Merge._take

    def new(self: Any, features: int, dtype: torch.dtype, *, zeros: bool = False) -> Any:
        made = originals[0](self, features, dtype, zeros=zeros)
        if not zeros:
            made.x.fill_(torch.nan)
        return made

    def take(self: Any, *arguments: Any) -> Tensor:
        return originals[1](self, *arguments).fill_(torch.nan)

    monkeypatch.setattr(tiles_meo.Tokens, "new", new)
    monkeypatch.setattr(tiles_meo.Merge, "_take", take)
    drawn = Drawn(transposed=transposed, owned=owned)
    for ours, expected in zip(drawn.gradients(plan), drawn.gradients(None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identical_experts_are_that_expert(plan: str, dtype: torch.dtype) -> None:
    drawn = Drawn(dtype=dtype, outputs=64, inputs=64)
    stack = drawn.stack[:1].expand(6, -1, -1).contiguous()
    if dtype == torch.float32:  # whose gates sum to one but for their own rounding
        drawn.gates = torch.full_like(drawn.gates, 0.25)
        drawn.gates[:, 0] = 0.5
    found = merged_linear(drawn.x, stack, None, drawn.index, drawn.gates, None, plan)
    expected = torch.bmm(drawn.x, stack[:1].expand(len(drawn.x), -1, -1).transpose(1, 2))
    if plan == "combine":  # which rounds every expert's output
        assert error(found, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert torch.equal(found, expected)


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = [t for t in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in found)])
        return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("plan", ["accumulate", "product"])
def test_merged_weights_of_all_groups_never_exist_at_once(
    monkeypatch: pytest.MonkeyPatch, plan: str, transposed: bool
) -> None:
    monkeypatch.setattr(tiles_meo, "TILE_BYTES", 4 * 64 * 256)
    drawn = Drawn(2, 512, 512, gates=64, experts=4, transposed=transposed, dtype=torch.float32)
    with Largest() as largest:
        merged_linear_meo._compute(*drawn.inputs(), plan)
    assert 0 < largest.numel <= 64 * 64 * 512 < 64 * 512 * 512 / 4


def test_nothing_merged_is_saved_for_backward() -> None:
    drawn, saved = Drawn(biased=False), {}
    x, stack, gates = drawn.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        merged_linear(*drawn.inputs(), "accumulate")
    assert set(saved) <= {t.data_ptr() for t in (x, stack, gates, drawn.index)}


@pytest.mark.parametrize("owned", [False, True])
def test_compiles_as_one_graph(owned: bool) -> None:
    drawn = Drawn(owned=owned)
    expected = drawn.gradients(None)
    compiled = torch.compile(merged_linear, fullgraph=True, backend="aot_eager")
    leaves = drawn.leaves()
    y = compiled(*drawn.inputs())
    for ours, exact in zip((y, *torch.autograd.grad(y, leaves, drawn.dy)), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    torch.library.opcheck(merged_linear_meo._linear, (*drawn.inputs(), ""))


def test_compiled_shapes_may_change() -> None:
    compiled = torch.compile(merged_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 3, 40):
        drawn = Drawn(tokens)
        torch.testing.assert_close(compiled(*drawn.inputs()), plain(*drawn.inputs()))


def test_exported_models_need_no_operation_of_ours() -> None:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Any) -> Tensor:
            return merged_linear(*inputs)

    drawn = Drawn()
    program = torch.export.export(Model(), drawn.inputs())
    assert not [node for node in program.graph.nodes if "meo" in str(node.target)]
    torch.testing.assert_close(program.module()(*drawn.inputs()), plain(*drawn.inputs()))


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_computes_in_its_dtype(plan: str) -> None:
    drawn = Drawn(dtype=torch.float32)
    leaves = drawn.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        y = merged_linear(*drawn.inputs(), plan)
    assert y.dtype == torch.bfloat16
    assert error(y.detach(), plain(*drawn.inputs())) < 1e-2
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y, leaves, drawn.dy.bfloat16()))


@pytest.mark.parametrize("owned", [False, True])
def test_no_tokens_give_no_tokens(owned: bool) -> None:
    drawn = Drawn(owned=owned)
    leaves = drawn.leaves()
    y = merged_linear(drawn.x[:, :0], *drawn.inputs()[1:])
    assert y.shape == (len(drawn.x), 0, 63)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves))
    if owned:
        assert merged_linear(drawn.x[:0], *drawn.inputs()[1:5], drawn.owner[:0]).shape == (0, 4, 63)


def test_gates_without_a_group_do_not_sway_the_choice() -> None:
    """A hundred tasks, all rows of one: as if there were no others."""
    drawn = Drawn(128, 256, 256, gates=100, experts=16, dtype=torch.float32)
    one = (drawn.index[:1], drawn.gates[:1])
    x = drawn.x[:4]
    executed.clear()
    expected = merged_linear(x.reshape(1, -1, 256), drawn.stack, None, *one)
    (plan,) = executed
    found = merged_linear(x, drawn.stack, None, drawn.index, drawn.gates, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found.reshape(1, -1, 256), expected)
    assert executed == {plan: 2}


def test_function_transforms_take_the_plain_way() -> None:
    drawn = Drawn()

    def run(x: Tensor) -> Tensor:
        return merged_linear(x, *drawn.inputs()[1:])

    direction = torch.randn_like(drawn.x)
    _, tangent = torch.func.jvp(run, (drawn.x,), (direction,))
    torch.testing.assert_close(tangent, run(drawn.x + direction) - run(drawn.x))
    torch.testing.assert_close(torch.func.grad(lambda x: (run(x) * drawn.dy).sum())(drawn.x), drawn.gradients(None)[1])


def test_schemas_fit_the_oldest_torch() -> None:
    """PyTorch 2.6 knows no lists of bool in a schema."""
    for operation in (merged_linear_meo._linear, merged_linear_meo._linear_backward):
        assert "bool[]" not in str(operation._opoverload._schema)


def test_special_tensors_take_the_plain_way() -> None:
    """Operations of ours know nothing of tensors that are not what they seem, such as quantised or sharded ones."""

    class Special(Tensor):
        pass

    drawn = Drawn()
    executed.clear()
    special = drawn.stack.as_subclass(Special)
    found = merged_linear(drawn.x, special, *drawn.inputs()[2:])
    assert not executed
    torch.testing.assert_close(found.as_subclass(Tensor), plain(*drawn.inputs()))


def test_unknown_and_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: accumulate, product, fused, combine"):
        merged_linear(*Drawn().inputs(), "fastest")
    with pytest.raises(ValueError, match="needs Triton and a GPU"):
        merged_linear(*Drawn().inputs(), "fused")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kept_experts_serve_their_owners(biased: bool, dtype: torch.dtype) -> None:
    drawn = Drawn(outputs=64, inputs=96, owned=True, biased=biased, dtype=dtype)
    weight = merge_experts(drawn.stack, drawn.index, drawn.gates)
    bias = None if drawn.bias is None else merge_experts(drawn.bias, drawn.index, drawn.gates)
    assert drawn.owner is not None
    expected = torch.stack(
        [F.linear(x, weight[o], None if bias is None else bias[o]) for x, o in zip(drawn.x, drawn.owner, strict=True)]
    )
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(owned_linear(drawn.x, weight, bias, drawn.owner), expected, **tolerance)
    torch.testing.assert_close(ragged_linear(drawn.x, weight, bias, drawn.owner), expected, **tolerance)
