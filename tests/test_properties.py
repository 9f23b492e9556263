"""Properties on generated inputs; `HYPOTHESIS_PROFILE=long` draws many more."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.groups_meo import masked_mean
from meo_hf.modeling.merging_meo import combine_outputs, grouped_linear, merge_experts
from meo_hf.modeling.modeling_meo import meo_model_class
from tiny import draw_experts, main_class, tiny_config, tiny_inputs

from meo_hf.benchmark.moe import whole_experts
from meo_hf.conversion.options import parse_layers
from meo_hf.conversion.safetensors_files import ShardWriter, TensorSpec, raw_bytes, read_header
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError

seeds = st.integers(0, 2**31)


@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.booleans())
def test_merging_weights_equals_combining_outputs(
    seed: int, groups: int, experts: int, top_k: int, bias: bool, grad: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, experts)
    stack = torch.randn(experts, 7, 5, generator=generator, dtype=torch.float64).requires_grad_(grad)
    biases = torch.randn(experts, 7, generator=generator, dtype=torch.float64) if bias else None
    logits, index = torch.randn(groups, experts, generator=generator, dtype=torch.float64).topk(top_k, 1)
    gates = logits.softmax(1)
    x = torch.randn(groups, 3, 5, generator=generator, dtype=torch.float64)
    merged_bias = None if biases is None else merge_experts(biases, index, gates)
    merged = grouped_linear(x, merge_experts(stack, index, gates), merged_bias)
    torch.testing.assert_close(merged, combine_outputs(x, stack, biases, index, gates))
    naive = torch.stack(
        [
            sum(
                g * (x[row] @ stack[e].t() + (0 if biases is None else biases[e]))
                for e, g in zip(index[row], gates[row], strict=True)
            )
            for row in range(groups)
        ]
    )
    torch.testing.assert_close(merged, naive)


@given(seeds, st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_masked_mean_sees_only_real_tokens(seed: int, mask: list[int]) -> None:
    x = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor([mask], dtype=torch.bool)
    poisoned = x.masked_fill(~kept[..., None], float("nan"))
    expected = x[kept].mean(0) if any(mask) else torch.zeros(3)
    torch.testing.assert_close(masked_mean(poisoned, kept)[0], expected)


@given(st.text("allevnodst:0123456789, -", max_size=8), st.integers(1, 40))
def test_layers_are_understood_or_refused(text: str, depth: int) -> None:
    try:
        layers = parse_layers(text, depth)
    except UsageError:
        return
    assert layers
    assert layers == sorted(set(layers))
    assert set(layers) <= set(range(depth))


@given(st.binary(max_size=200))
def test_damaged_headers_are_refused(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            refs = read_header(path)
        except CheckpointError:
            return
        assert all(ref.offset + ref.spec.nbytes <= len(data) for ref in refs.values())


json_values = st.recursive(
    st.none() | st.integers(-5, 99) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=3))
def test_nonsense_headers_are_refused(header: dict) -> None:
    text = json.dumps(header).encode()
    test_damaged_headers_are_refused.hypothesis.inner_test(len(text).to_bytes(8, "little") + text + bytes(64))


@given(seeds, st.integers(0, 70), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_shards_read_back(seed: int, size: int, dtype: torch.dtype) -> None:
    tensor = (torch.randn(size, 2, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        with ShardWriter(path, [TensorSpec("x", code, (size, 2))]) as writer:
            writer.write(raw_bytes(tensor))
            writer.close()
        assert torch.equal(read_header(path)["x"].load(), tensor)


def _meo(scope: str, top_k: int) -> torch.nn.Module:
    config = tiny_config("bert")
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    block = {"num_experts": 4, "top_k": top_k, "gate_scope": scope, "router": "top_k"}
    made = meo_config_class(type(config)).from_dict(values, meo=block)
    return draw_experts(meo_model_class(main_class("bert"))(made)).eval()


def test_whole_experts_are_another_function() -> None:
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        for top_k, same in ((1, True), (2, False)):
            model = _meo("ffn", top_k)
            merged = model(**inputs).logits
            with whole_experts(model):
                whole = model(**inputs).logits
            assert torch.allclose(merged, whole, rtol=1e-4, atol=1e-4) is same
            torch.testing.assert_close(model(**inputs).logits, merged, rtol=0, atol=0)
    with pytest.raises(UnsupportedError), whole_experts(_meo("projection", 2)):
        pass
