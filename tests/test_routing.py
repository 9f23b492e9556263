"""What a routing call knows and refuses: inputs in every form, tasks, generation, and the router itself."""

from __future__ import annotations

import inspect
from math import exp
from statistics import NormalDist
from typing import Any

import contracts
import pytest
import torch
import transformers
from contracts import Case, assert_close, cv_squared, logits_of, stock_inputs
from meo_hf.modeling.errors_meo import MeoConfigError, RoutingContextError, RoutingError
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.remote_meo import heads_of
from meo_hf.modeling.router_meo import MeoRouter
from meo_hf.modeling.routing_meo import Call
from tiny import draw_experts, meo_of, merged_of, tiny_dense, tiny_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

DEFAULTS = [Case(family, row.default_level) for family, row in FAMILIES.items()]
TEXT = [case for case in DEFAULTS if case.family != "vit"]
HEADS = sorted((family, name) for family in FAMILIES for name in set(heads_of(family).values()))
CHOICES = [(family, name) for family, name in HEADS if name.endswith("MultipleChoice")]


def every(some: list[Case]) -> pytest.MarkDecorator:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", some, ids=lambda c: f"{c.family}-{c.level}")


@pytest.mark.parametrize(("family", "head"), HEADS, ids=[head for _, head in HEADS])
def test_forward_has_the_signature_of_the_stock_class_and_what_gates_take(family: str, head: str) -> None:
    stock = getattr(transformers, head)
    expected = dict(inspect.signature(stock.forward).parameters)
    found = dict(inspect.signature(meo_model_class(stock).forward).parameters)
    causal = FAMILIES[family].kind != "encoder-decoder" and "past_key_values" in expected
    for name in ("task_ids", "routing_mask", *(("routing", "prompt_lengths") if causal else ())):
        added = found.pop(name)
        assert added.kind is inspect.Parameter.KEYWORD_ONLY
        assert added.default is None
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(("family", "head"), HEADS, ids=[head for _, head in HEADS])
def test_every_head_with_identical_experts_is_the_stock_head(family: str, head: str) -> None:
    dense = tiny_dense(family, getattr(transformers, head))
    alone = head.endswith("ForCausalLM") and FAMILIES[family].kind == "encoder-decoder"  # gates need an encoder
    model = meo_of(dense, level="task" if alone else FAMILIES[family].default_level)
    inputs = {n: v for n, v in tiny_inputs(family).items() if n in inspect.signature(dense.forward).parameters}
    if "MultipleChoice" in head:
        inputs = {name: value[:, None].repeat(1, 2, 1) for name, value in inputs.items()}
    elif "input_ids" in inputs:
        inputs["input_ids"][:, -1] = 3  # the end token that some classifiers look for
        if head.endswith("SequenceClassification"):
            inputs.pop("decoder_input_ids", None)
    with torch.no_grad():
        assert_close(model(**inputs)[0], dense(**inputs)[0], 1e-5)


@every(TEXT)
def test_embedded_tokens_are_tokens(case: Case) -> None:
    model, inputs = case.drawn(), case.inputs()
    expected = logits_of(model, inputs)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")).detach()}
    if case.kind == "encoder-decoder":
        decoder = model.get_decoder().get_input_embeddings()
        embeds["decoder_inputs_embeds"] = decoder(inputs.pop("decoder_input_ids")).detach()
    assert_close(logits_of(model, {**inputs, **embeds}), expected)


@every(TEXT)
def test_no_mask_is_a_mask_of_ones(case: Case) -> None:
    model, inputs = case.drawn(), case.inputs()
    expected = logits_of(model, inputs)
    del inputs["attention_mask"]
    assert_close(logits_of(model, inputs), expected)


@every(TEXT)
def test_positional_arguments_are_found(case: Case) -> None:
    model = case.drawn()
    inputs, _ = contracts.padded(case, "right")
    inputs.pop("position_ids", None)
    expected = logits_of(model, inputs)
    names = list(inspect.signature(model.forward).parameters)
    first = [inputs.pop("input_ids")]
    if names[1] == "attention_mask":
        first.append(inputs.pop("attention_mask"))
    with torch.no_grad():
        assert torch.equal(model(*first, **inputs).logits, expected)


@every(DEFAULTS)
def test_plain_forward_is_a_call(case: Case) -> None:
    model, inputs = case.drawn(), case.inputs()
    with torch.no_grad():
        assert torch.equal(model.forward(**inputs).logits, logits_of(model, inputs))


def test_flattened_tokens_keep_their_rows() -> None:
    """OPT hands over [batch * sequence, hidden]."""
    case = Case("opt", "task")
    module = next(iter(merged_of(case.drawn()).values()))
    tokens = torch.randn(3, 4, 32, dtype=torch.double)
    module._context.current = Call(owner=0, outer=None, rows=3, task_ids=torch.tensor([0, 1, 2]))
    assert torch.equal(module(tokens.flatten(0, 1)), module(tokens).flatten(0, 1))
    with pytest.raises(RoutingError, match=r"\(11, 32\) for a batch of 3"):
        module(tokens.flatten(0, 1)[1:])


def bert(level: str = "sequence", **meo: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    case = Case("bert", level)
    return case.drawn(**meo), case.inputs()


PACKED: dict[str, tuple[dict[str, Tensor], str]] = {
    "4-D mask": ({"attention_mask": torch.ones(3, 1, 8, 8, dtype=torch.bool)}, "2-D mask"),
    "sequence lengths": ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "one sequence per row"),
    "restarting positions": ({"position_ids": torch.arange(8).remainder(5).expand(3, -1)}, "one sequence per row"),
    "restarting positions for all rows": ({"position_ids": torch.arange(8).remainder(5)[None]}, "one sequence per row"),
}


@pytest.mark.parametrize(("changed", "advice"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_inputs_that_hide_the_sequences_are_refused(level: str, changed: dict[str, Tensor], advice: str) -> None:
    model, inputs = bert(level)
    with pytest.raises(RoutingError, match=advice):
        logits_of(model, {**inputs, **changed})


@pytest.mark.parametrize(("changed", "advice"), PACKED.values(), ids=PACKED)
def test_tasks_need_no_sequences(changed: dict[str, Tensor], advice: str) -> None:
    model, inputs = bert("task")
    dense = Case("bert", "task").dense()
    model = meo_of(dense, level="task", tasks=contracts.TASKS)
    inputs = {**inputs, **changed}
    assert_close(logits_of(model, inputs), logits_of(dense, stock_inputs(inputs)))


def test_positions_may_restart_in_the_padding() -> None:
    model, inputs = bert()
    inputs["attention_mask"][:, 6:] = 0
    expected = logits_of(model, inputs)[:, :6]
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0]])
    assert_close(logits_of(model, inputs)[:, :6], expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_decoder_without_its_encoder_is_refused(family: str, level: str) -> None:
    model = Case(family, level).drawn()
    with pytest.raises(RoutingError, match=r"encoder_hidden_states.*missing"):
        model.get_decoder()(torch.tensor([[5, 6]]))
    model = Case(family, "task").drawn()
    model.set_task("a")
    model.get_decoder()(torch.tensor([[5, 6]]))


def test_decoder_alone_reads_the_encoder_it_is_given() -> None:
    stock = transformers.BartForCausalLM
    model = draw_experts(meo_of(tiny_dense("bart", stock, is_decoder=True, add_cross_attention=True))).double()
    ids, states = torch.tensor([[5, 6, 7]]), torch.randn(1, 4, 32, dtype=torch.double)
    with pytest.raises(RoutingError, match=r"encoder_hidden_states.*missing"):
        model(ids)
    mask = torch.tensor([[1, 1, 1, 0]])
    inputs = {"input_ids": ids, "encoder_attention_mask": mask}
    expected = logits_of(model, {**inputs, "encoder_hidden_states": states})
    noise = torch.where(mask[..., None] == 1, states, 99.0)
    assert_close(logits_of(model, {**inputs, "encoder_hidden_states": noise}), expected)
    contracts.assert_differs(logits_of(model, {**inputs, "encoder_hidden_states": -states}), expected)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_feed_forward_outside_its_model_is_refused(family: str) -> None:
    model = Case(family, FAMILIES[family].default_level).drawn()
    module = next(iter(merged_of(model).values()))
    with pytest.raises(RoutingContextError, match="call the model"):
        module(torch.randn(1, 2, 32))


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_exception_leaves_no_call_behind(family: str) -> None:
    case = Case(family, FAMILIES[family].default_level)
    model, inputs = case.drawn(), case.inputs()
    expected = logits_of(model, inputs)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    embeddings = getattr(model, "encoder", model).get_input_embeddings()
    for module in (*merged_of(model).values(), embeddings):
        hook = module.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        with pytest.raises(RoutingContextError):
            next(iter(merged_of(model).values()))(torch.randn(1, 2, 32))
        assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_missing_task_is_refused(family: str) -> None:
    case = Case(family, "task")
    model, inputs = case.drawn(), stock_inputs(case.inputs())
    with pytest.raises(RoutingError, match=r"3 tasks: pass `task_ids`.*set_task"):
        model(**inputs)
    assert logits_of(case.drawn(tasks=["only"]), inputs).isfinite().all()


@pytest.mark.parametrize(
    "task_ids",
    [
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([True, False, True]),
        torch.tensor([[0], [1], [2]]),
        torch.tensor(0),
        torch.tensor([0, 1]),
        [0, 1, 2],
    ],
    ids=["floats", "booleans", "column", "scalar", "short", "list"],
)
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_bad_task_ids_are_refused(family: str, task_ids: Any) -> None:
    case = Case(family, "task")
    with pytest.raises(RoutingError, match="`task_ids`"):
        case.drawn()(**{**case.inputs(), "task_ids": task_ids})


def test_task_ids_out_of_range_or_without_effect_are_refused() -> None:
    case = Case("bert", "task")
    with pytest.raises(RoutingError, match="tasks are 0 to 2"):
        case.drawn()(**{**stock_inputs(case.inputs()), "task_ids": torch.tensor([0, 1, 3])})
    case = Case("bert", "sequence")
    with pytest.raises(RoutingError, match="no effect at level 'sequence'"):
        case.drawn()(**{**case.inputs(), "task_ids": torch.tensor([0, 1, 2])})


def test_set_task_is_checked_and_undone() -> None:
    case = Case("bert", "task")
    model, inputs = case.drawn(default_task="b"), stock_inputs(case.inputs())
    expected = logits_of(model, inputs)
    with pytest.raises(MeoConfigError, match=r"unknown task 'z'.*a, b, c"):
        model.set_task("z")
    model.set_task("a")
    contracts.assert_differs(logits_of(model, inputs), expected)
    model.set_task(None)
    assert torch.equal(logits_of(model, inputs), expected), "set_task(None) did not go back to the config's task"
    with pytest.raises(MeoConfigError, match="level 'sequence'"):
        bert()[0].set_task("a")


@pytest.mark.parametrize(("family", "head"), CHOICES)
def test_every_choice_of_a_row_has_its_task(family: str, head: str) -> None:
    model = draw_experts(meo_of(tiny_dense(family, getattr(transformers, head)), level="task", tasks=contracts.TASKS))
    ids = tiny_inputs(family, rows=6)["input_ids"].reshape(3, 2, -1)
    mixed = logits_of(model, {"input_ids": ids, "task_ids": torch.tensor([2, 0, 2])})
    for row, task in enumerate(["c", "a", "c"]):
        model.set_task(task)
        assert_close(mixed[row], logits_of(model, {"input_ids": ids})[row], 1e-5)
    contracts.assert_differs(logits_of(model, {"input_ids": ids})[1], mixed[1])


GENERATING = [Case(family, level) for family in ("t5", "bart") for level in ("sequence", "token", "task")]
GENERATING += [
    Case(f, level) for f in ("llama", "gpt2", "opt", "gemma2") for level in ("segment", "sequence", "token", "task")
]


@every(GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_without_cache_and_without_batch(case: Case, beams: int) -> None:
    model = case.drawn()
    side = "right" if case.kind == "encoder-decoder" else "left"
    inputs, mask = contracts.padded(case, side)
    inputs = {n: v for n, v in inputs.items() if n not in ("decoder_input_ids", "position_ids")}
    if case.family == "gemma2":
        model.float()  # see contracts.padding_changes_nothing
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
    for row in range(3):
        alone = {n: v[row : row + 1] for n, v in inputs.items()}
        real = mask[row].bool()
        alone |= {n: alone[n][:, real] for n in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**alone, **options)[0, -5:], cached[row, -5:])
    assert len({tuple(row) for row in cached[:, -5:].tolist()}) > 1, "all rows say the same"


def shazeer_loss(clean: Tensor, deviation: Tensor, noise: Tensor, k: int) -> float:
    """Balance loss of noisy top-k gating, number by number (arXiv 1701.06538, section 4 and appendix A)."""
    experts = range(clean.shape[1])
    importance, load = [0.0 for _ in experts], [0.0 for _ in experts]
    for mean, sd, drawn in zip(clean.tolist(), deviation.tolist(), noise.tolist(), strict=True):
        noisy = [mean[i] + sd[i] * drawn[i] for i in experts]
        kept = sorted(experts, key=lambda i: -noisy[i])[:k]
        for i in kept:
            importance[i] += exp(noisy[i]) / sum(exp(noisy[j]) for j in kept)
        for i in experts:
            others = sorted((noisy[j] for j in experts if j != i), reverse=True)
            load[i] += NormalDist().cdf((mean[i] - others[k - 1]) / sd[i]) if k < len(experts) else 1.0
    return cv_squared(importance) + cv_squared(load)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(5))
def test_balance_loss_is_the_published_one(k: int, seed: int) -> None:
    torch.manual_seed(seed)
    router = MeoRouter(4, 6, k, noisy=True).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(7, 4, dtype=torch.double)
    torch.manual_seed(seed)
    _, loss = router(inputs)
    torch.manual_seed(seed)
    noise = torch.randn(7, 6, dtype=torch.double)
    deviation = (inputs @ router.noise_weight.t()).exp().log1p() + 0.01
    assert loss.item() == pytest.approx(shazeer_loss(inputs @ router.weight.t(), deviation, noise, k), rel=1e-7)
    assert torch.autograd.gradcheck(lambda *_: (torch.manual_seed(seed), router(inputs)[1])[1], router.weight)


@pytest.mark.parametrize("noisy", [True, False])
def test_router_with_huge_logits_stays_finite(noisy: bool) -> None:
    router = MeoRouter(2, 4, 2, noisy)
    nn.init.zeros_(router.weight)
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([200.0, -200.0, 0.5, -0.5])
        if noisy:
            nn.init.zeros_(router.noise_weight)
    gates, loss = router(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert gates.top_k_index.tolist() == [[0, 2], [1, 3]]
    assert gates.top_k_weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    (loss + gates.top_k_weights.pow(2).sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())


HEADS_WITH_LOSS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForQuestionAnswering": ("bert", {"start_positions": [1, 2, 3], "end_positions": [2, 3, 4]}),
    "BertForSequenceClassification": ("bert", {"labels": [0, 1, 0]}),
    "BertForNextSentencePrediction": ("bert", {"labels": [0, 1, 0]}),
    "T5ForSequenceClassification": ("t5", {"labels": [0, 1, 0]}),
    "GPT2ForSequenceClassification": ("gpt2", {"labels": [0, 1, 0]}),
    "ElectraForPreTraining": ("electra", {"labels": [[0, 1] * 4] * 3}),
    "ViTForMaskedImageModeling": ("vit", {"bool_masked_pos": [[True, False] * 8] * 3}),
}


@pytest.mark.parametrize("head", HEADS_WITH_LOSS)
def test_every_loss_of_a_head_carries_the_balance_loss(head: str) -> None:
    family, targets = HEADS_WITH_LOSS[head]
    dense = tiny_dense(family, getattr(transformers, head))
    model = meo_of(dense, router="top_k", balance_loss=1.0).train()
    inputs = tiny_inputs(family) | {name: torch.tensor(value) for name, value in targets.items()}
    if head.startswith("T5"):
        del inputs["decoder_input_ids"]
        inputs["input_ids"][:, -1] = 3
    outputs = model(**inputs)
    assert outputs.aux_loss.item() > 1e-3
    assert outputs.loss.item() == pytest.approx(dense(**inputs).loss.item() + outputs.aux_loss.item(), rel=1e-5)
    assert model(**inputs, return_dict=False)[0].item() == pytest.approx(outputs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_labels_without_a_loss_change_nothing(family: str, return_dict: bool) -> None:
    """Two-part pretraining heads compute a loss only where both labels are given."""
    head = {"bert": transformers.BertForPreTraining, "albert": transformers.AlbertForPreTraining}[family]
    dense = tiny_dense(family, head)
    model = meo_of(dense, router="top_k", balance_loss=1.0).train()
    inputs = tiny_inputs(family)
    inputs["labels"] = inputs["input_ids"]
    expected = dense(**inputs, return_dict=return_dict)[0]
    assert_close(model(**inputs, return_dict=return_dict)[0].detach(), expected.detach())
