"""The comparison of a mixture of experts with its MEO model: its numbers are the plain formulas', its gates causal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare_tiny import meo_of, silent, windows_of, words, words_tokenizer
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from moe_tiny import tiny_moe
from tokenizers import processors
from torch import Tensor, nn

from meo_hf.benchmark.compare_quality import (
    GateTally,
    Quality,
    check_causal,
    layer_errors,
    measure_quality,
    tallied_gates,
)
from meo_hf.benchmark.compare_speed import Speed, flops_per_token, time_beside
from meo_hf.benchmark.compare_variants import Subject, averaged, weight_bytes, with_top_k
from meo_hf.errors import CheckFailedError
from meo_hf.texts import cut_windows

FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss")
CLOSE = 1e-5


def equalise(model: nn.Module) -> None:
    """Make all experts of each block the first one."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and "shared" not in name:
            parameter.data = parameter[:1].expand_as(parameter).clone()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_quality_is_that_of_the_plain_formulas(family: str) -> None:
    stock = tiny_moe(family)
    meo = meo_of(stock)
    windows = windows_of()
    found = measure_quality(Subject.of("source", stock), Subject.of("MEO", meo), windows, 2, silent)
    nll, kl, same, count = 0.0, 0.0, 0, 0
    for row in windows:
        p = stock(row[None]).logits[0].double().softmax(-1)
        q = meo(row[None], routing="segment").logits[0].double().softmax(-1)
        for place in range(len(row) - 1):
            nll -= math.log(q[place, row[place + 1]])
            kl += sum(a * math.log(a / b) for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True))
            same += int(p[place].argmax() == q[place].argmax())
            count += 1
    assert count == found.tokens == 5 * 15
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=CLOSE)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.agreement == same / count
    assert found.kl > 1e-2, "a variant that predicts the same would hide every fault"
    assert 0 < found.agreement < 1


def test_a_model_predicts_what_it_predicts() -> None:
    stock = tiny_moe("olmoe")
    again = Subject.of("again", tiny_moe("olmoe"))
    found = measure_quality(Subject.of("source", stock), again, windows_of(), 2, silent)
    assert found.kl == 0
    assert found.agreement == 1
    assert found.perplexity > 1


def test_what_the_source_rules_out_weighs_nothing() -> None:
    quality, ids = Quality(), torch.tensor([0, 1])
    quality.add(torch.tensor([[0.0, 0.0, -math.inf]] * 2), torch.tensor([[0.0, 0.0, 0.0]] * 2), ids)
    assert quality.kl == pytest.approx(math.log(3 / 2))
    assert quality.perplexity == pytest.approx(3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("segment_length", [1, 5])
def test_blocks_of_identical_experts_have_no_error(family: str, segment_length: int) -> None:
    """Where gates sum to what the source's do: softmax over the selected, or sigmoids that are normalised."""
    stock = tiny_moe(family, **({"norm_topk_prob": True} if family == "olmoe" else {}))
    source, windows = Subject.of("source", stock), windows_of(2)
    different = Subject.of("MEO", meo_of(stock, segment_length=segment_length))
    errors = layer_errors(source, different, windows, 2, silent)
    assert len(errors) == (2 if family == "deepseek_v3" else 3)
    assert all(error.relative > 0.1 for error in errors.values())
    equalise(stock)
    same = Subject.of("MEO", meo_of(stock, segment_length=segment_length))
    assert all(error.relative < CLOSE for error in layer_errors(source, same, windows, 2, silent).values())
    with tallied_gates(same.model) as tallies:
        assert measure_quality(source, same, windows, 2, silent).kl < CLOSE
    shares = {tally.merged_share for tally in tallies.values()}
    assert shares == {0.0 if segment_length == 1 else 1.0}, "groups of one token merge nothing"


@torch.no_grad()
def test_layer_errors_are_those_of_blocks_fed_alike() -> None:
    """One layer against the plain formula: its input is the source's, whatever the layers before have done."""
    stock, windows = tiny_moe("mixtral"), windows_of(1)
    meo = meo_of(stock, segment_length=16)  # every gate reads the first token
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(stock.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, out, number=number: seen.update({number: (a[0], out)}))
    errors = layer_errors(Subject.of("source", stock), Subject.of("MEO", meo), windows, 1, silent)
    for number, layer in enumerate(stock.model.layers):
        x, expected = seen[number]
        _, gates, index = layer.mlp.gate(x[0, :1])
        experts = layer.mlp.experts
        first = sum(g * experts.gate_up_proj[i] for g, i in zip(gates[0], index[0], strict=True))
        last = sum(g * experts.down_proj[i] for g, i in zip(gates[0], index[0], strict=True))
        gate, up = (x[0] @ first.T).chunk(2, -1)
        y = (nn.functional.silu(gate) * up) @ last.T
        relative = float((y - expected[0]).norm() / expected[0].norm())
        assert errors[f"model.layers.{number}.mlp"].relative == pytest.approx(relative, rel=1e-4)


def test_blocks_are_compared_as_they_were_before_anybody_wrote_to_them() -> None:
    stock, windows = tiny_moe("mixtral"), windows_of(1)
    source, meo = Subject.of("source", stock), Subject.of("MEO", meo_of(stock))
    expected = layer_errors(source, meo, windows, 1, silent)
    seen: list[Tensor] = []
    stock.model.layers[2].mlp.register_forward_hook(lambda m, args, output: seen.extend((args[0], output)))
    stock.model.layers[2].register_forward_hook(lambda *_: [tensor.zero_() for tensor in seen] and None)
    assert layer_errors(source, meo, windows, 1, silent) == expected


def test_gates_are_summed_up_as_defined() -> None:
    tally = GateTally()
    tally.add(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 4, True)
    assert (tally.groups, tally.merged, tally.merged_share) == (2, 1, 0.5)
    assert tally.entropy == pytest.approx(math.log(2) / 2)
    assert tally.relative_entropy == pytest.approx(0.5)
    assert tally.distance == pytest.approx((0 + 0.5) / 2)
    assert tally.label == ""
    tally.add(torch.tensor([[0.4, 0.6]]), 1, True)
    tally.add(torch.tensor([[0.4, 0.6]]), 4, False)
    assert tally.merged_share == 1 / 4, "one token, or outputs that are combined, merge nothing"
    near, far, one = GateTally(), GateTally(), GateTally()
    near.add(torch.tensor([[0.509, 0.491]]), 4, True)
    far.add(torch.tensor([[0.511, 0.489]]), 4, True)
    one.add(torch.tensor([[1.0]]), 4, True)
    assert (near.label, far.label, one.label) == ("near uniform", "", "one expert")
    assert (one.relative_entropy, one.merged_share) == (None, 0)


@torch.no_grad()
def test_gates_are_those_of_the_router() -> None:
    stock, windows = tiny_moe("olmoe"), windows_of(2)
    meo = meo_of(stock, segment_length=16)
    with tallied_gates(meo) as tallies:
        states = meo(windows, routing="segment", output_hidden_states=True).hidden_states
    layer = stock.model.layers[0]
    x = stock.model.embed_tokens(windows)
    assert torch.equal(x, states[0])
    attended = layer.self_attn(
        layer.input_layernorm(x),
        position_embeddings=stock.model.rotary_emb(x, torch.arange(16)[None]),
        attention_mask=torch.full((16, 16), -torch.inf).triu(1)[None, None],
    )[0]
    read = layer.post_attention_layernorm(x + attended)[:, 0]
    kept = layer.mlp.gate.weight.mm(read.T).T.softmax(-1).topk(2).values
    gates = kept / kept.sum(1, keepdim=True)
    tally = tallies["model.layers.0.mlp.experts"]
    assert tally.totals[0] == pytest.approx(float(kept.sum(1).mean()), rel=CLOSE)
    assert tally.entropy == pytest.approx(float(-(gates * gates.log()).sum(1).mean()), rel=1e-4)
    assert "_run" not in vars(meo.model.layers[0].mlp.experts), "the model is not what it was"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_average_is_a_dense_model(family: str) -> None:
    """As the stock model whose only weights are the mean of all experts, times the mean sum of the gates."""
    stock, windows = tiny_moe(family), windows_of(2)
    meo = meo_of(stock)
    before = meo(windows, routing="segment").logits
    with tallied_gates(meo) as tallies:
        meo(windows, routing="segment")
    totals = {path: tally.totals for path, tally in tallies.items()}
    with averaged(meo, totals) as subject:
        found = subject.logits(windows)
    assert torch.equal(meo(windows, routing="segment").logits, before), "the model is not what it was"
    assert subject.nbytes < weight_bytes(meo)
    stacks = {n: p for n, p in stock.named_parameters() if ".experts." in n and "shared" not in n}
    for parameter in stacks.values():
        parameter.data = parameter.mean(0, keepdim=True).expand_as(parameter).clone()
    for path, (total, _) in totals.items():
        router = stock.get_submodule(path.rpartition(".")[0])
        router = getattr(router, "gate", None) or router.router
        router.register_forward_hook(
            lambda m, a, out, t=total: (out[0], out[1] / out[1].sum(-1, keepdim=True) * t, out[2])
        )
    assert (stock(windows).logits - found).abs().max() < CLOSE * found.abs().max()
    assert (before - found).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_text"])
def test_fewer_experts_are_selected_with_the_same_weights(family: str) -> None:
    stock, ids = tiny_moe(family), windows_of(2)
    row = MOE_FAMILIES[family]
    before = stock(ids).logits
    assert torch.equal(with_top_k(stock, row, 2)(ids).logits, before)
    one = with_top_k(stock, row, 1)
    changed = {row.top_k: 1}
    assert torch.equal(one(ids).logits, tiny_moe(family, **changed)(ids).logits)
    assert not torch.equal(one(ids).logits, before)
    assert {id(p) for p in one.parameters()} == {id(p) for p in stock.parameters()}
    assert torch.equal(stock(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("meo", [{}, {"level": "sequence"}, {"routing": "prompt"}, {"pooling": "probs"}])
def test_no_prediction_reads_what_it_predicts(meo: dict[str, Any]) -> None:
    """Windows whose end changes keep every prediction before it, whatever level and routing a model was saved with."""
    stock, windows = tiny_moe("mixtral"), windows_of(3)
    subject = Subject.of("MEO", meo_of(stock, **meo))
    assert subject.arguments == {"routing": "segment"}
    changed = windows.clone()
    changed[:, 10:] = changed[:, 10:].flip(1)
    kept = [subject.logits(text)[:, :10] for text in (windows, changed)]
    assert torch.allclose(*kept, atol=1e-5)
    check_causal(subject, windows[:1], 0, "float32")


def test_nan_is_not_causal() -> None:
    stock = tiny_moe("mixtral")
    stock.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(CheckFailedError, match="by nan"):
        check_causal(Subject.of("source", stock), windows_of(1), 0, "float32")


def test_windows_follow_each_other() -> None:
    text = words(100)
    numbers = [int(word[1:]) for word in text.split()]
    assert cut_windows(words_tokenizer(), text, 30, 9).flatten().tolist() == numbers[:90]
    assert cut_windows(words_tokenizer(), text, 30, 2).flatten().tolist() == numbers[:60]
    begun = words_tokenizer(bos_token="<s>")
    assert cut_windows(begun, text, 30, 9)[0].tolist() == numbers[:30], "this tokenizer begins no text with it"
    begin = begun.bos_token_id
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    windows = cut_windows(begun, text, 30, 9)
    assert windows[:, 0].tolist() == [begin] * 3
    assert windows[:, 1:].flatten().tolist() == numbers[:87]


def test_flops_are_those_of_the_maps_that_run() -> None:
    stock, window = tiny_moe("mixtral"), windows_of(1)
    config = stock.config
    expert = 3 * config.hidden_size * config.intermediate_size
    source = flops_per_token(Subject.of("source", stock), window)
    one = flops_per_token(Subject.of("top-1", with_top_k(stock, MOE_FAMILIES["mixtral"], 1)), window)
    assert source - one == 3 * 2 * expert, "three layers, a multiply-accumulate is two"
    meo = meo_of(stock, segment_length=8)
    merged = flops_per_token(Subject.of("MEO", meo), window)
    router = 2 * config.hidden_size * config.num_local_experts
    assert merged - one == 3 * (3 * expert / 8 - router * (1 - 1 / 8)), "2 m - 1 per merged value, once per segment"
    assert stock.config._experts_implementation == "eager"
    stock.set_experts_implementation("grouped_mm")
    assert flops_per_token(Subject.of("source", stock), window) == source
    assert stock.config._experts_implementation == "grouped_mm"


def test_variants_take_turns_with_the_source() -> None:
    said: list[str] = []
    read: list[str] = []
    stock = tiny_moe("mixtral")
    source, variant = Subject.of("source", stock), Subject.of("MEO", meo_of(stock))
    for subject in (source, variant):
        subject.model.register_forward_pre_hook(lambda m, a, name=subject.name: read.append(name))
    speeds = time_beside(source, variant, windows_of(1), 2, said.append)
    assert said == ["MEO: warm-up", "MEO: round 1", "MEO: round 2"]
    turns = [read[i] for i in range(0, len(read), 9)]  # a prompt of eight tokens and eight steps each
    assert turns == ["source", "MEO", "MEO", "source", "source", "MEO"]
    assert [(len(s.prefill), len(s.token), s.prompt_tokens) for s in speeds] == [(2, 2, 8)] * 2
    assert Speed(1, [2.0, 4.0, 9.0]).ratio("prefill", Speed(1, [1.0, 1.0, 3.0])) == 3
