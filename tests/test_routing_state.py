"""Routing state beside the KV cache: what is done to the cache is done to it, and what it cannot follow is refused."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import decoding
import pytest
import torch
from contracts import assert_close, assert_differs
from decoding import Setting
from meo_hf.modeling import cache_meo, memory_meo
from meo_hf.modeling.cache_meo import LayerRouting
from meo_hf.modeling.errors_meo import RoutingError
from tiny import draw_experts, labels_for, meo_of, merged_of, tiny_dense, tiny_inputs
from torch import Tensor
from transformers import BertLMHeadModel, Cache, DynamicCache, PreTrainedModel, StaticCache

BASE = Setting("llama", "segment", "ffn", 4, (19,), (7,), "left", (), "dynamic", 3)
LEVELS = pytest.mark.parametrize("level", ["segment", "sequence"])
SCOPES = pytest.mark.parametrize("scope", ["ffn", "projection"])


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, **options: Any) -> Tensor:
    """Return the logits of one call; positions go on where the cache ends."""
    past = 0 if cache is None else int(cache.get_seq_length())
    where = torch.arange(past, past + ids.shape[1])[None]
    return model(ids, past_key_values=cache, use_cache=cache is not None, position_ids=where, **options).logits


def words(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Return random ids."""
    return torch.randint(5, 95, (rows, length), generator=torch.Generator().manual_seed(seed))


def setup(level: str, scope: str = "ffn", rows: int = 1, length: int = 19) -> tuple[PreTrainedModel, Tensor, dict]:
    """Return a model, ids, and the prompt lengths that its level needs."""
    setting = BASE._replace(level=level, scope=scope, lengths=(length,) * rows, prompts=(7,) * rows)
    return setting.model(), words(length, rows), setting.prompt()


@LEVELS
@SCOPES
@pytest.mark.parametrize("calls", [(19,), (11, 8), (7, 12), (6, 1, 1, 1, 10), (1,) * 19], ids=str)
def test_recorded_tokens_can_be_taken_back(level: str, scope: str, calls: tuple[int, ...]) -> None:
    model, ids, prompt = setup(level, scope)
    other = words(9, seed=1)
    for removed in range(1, 20):
        cache = DynamicCache()
        model.route_cache(cache)
        cache.activate_past_recording()
        begin = 0
        for size in calls:
            run(model, ids[:, begin : begin + size], cache, **prompt)
            begin += size
        cache.crop(-removed)
        kept = 19 - removed
        assert cache.get_seq_length() == kept
        text = torch.cat([ids[:, :kept], other], 1)
        lengths = {name: value.clamp(max=text.shape[1]) for name, value in prompt.items()}
        assert_close(run(model, other, cache, **lengths), run(model, text, **lengths)[:, kept:], 1e-5)


def test_tokens_can_be_taken_back_twice_and_accepted() -> None:
    model, ids, _ = setup("segment")
    cache = DynamicCache()
    model.route_cache(cache)
    cache.activate_past_recording()
    run(model, ids[:, :10], cache)
    cache.crop(-3)
    run(model, ids[:, 7:12], cache)
    cache.crop(-1)
    cache.crop(0)
    with pytest.raises(RoutingError, match=r"cannot take back 2 positions.*activate_past_recording"):
        cache.crop(-2)
    assert cache.get_seq_length() == 11, "keys and values were cut although the state could not be"
    assert_close(run(model, ids[:, 11:], cache), run(model, ids)[:, 11:], 1e-5)
    cache.crop(-19)
    assert_close(run(model, ids, cache), run(model, ids), 1e-5)


def test_tokens_of_an_answer_can_be_taken_back_unrecorded() -> None:
    model, ids, prompt = setup("sequence")
    cache = DynamicCache()
    run(model, ids, cache, **prompt)
    cache.crop(-8)
    assert_close(run(model, ids[:, 11:], cache), run(model, ids, **prompt)[:, 11:], 1e-5)
    with pytest.raises(RoutingError, match="cannot take back 13 positions"):
        cache.crop(-13)


REARRANGED: dict[str, tuple[Callable[[Cache], Any], Callable[[Tensor], Tensor]]] = {
    "reordered": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), lambda t: t[[2, 0, 0]]),
    "repeated": (lambda c: c.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, 0)),
    "selected": (lambda c: c.batch_select_indices(torch.tensor([1])), lambda t: t[[1]]),
}


@LEVELS
@SCOPES
@pytest.mark.parametrize("kept", [5, 7, 10], ids=["in the prompt", "at its end", "in the answer"])
@pytest.mark.parametrize("name", REARRANGED)
def test_rows_move_with_their_state(level: str, scope: str, kept: int, name: str) -> None:
    change, expected = REARRANGED[name]
    model, ids, prompt = setup(level, scope, rows=3)
    cache = DynamicCache()
    run(model, ids[:, :kept], cache, **prompt)
    run(model, ids[:, kept : kept + 1], cache, **prompt)  # keeps merged experts
    change(cache)
    moved, lengths = expected(ids), {k: expected(v) for k, v in prompt.items()}
    whole = run(model, moved, **lengths)
    for place in range(kept + 1, 19):
        assert_close(run(model, moved[:, place : place + 1], cache, **lengths)[:, 0], whole[:, place], 1e-5)


def test_forgetting_to_move_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerRouting, "move_rows", lambda self, move: None)
    with pytest.raises(AssertionError):
        test_rows_move_with_their_state("segment", "ffn", 10, "reordered")


def test_beams_need_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = BASE._replace(lengths=(9, 6, 8), prompts=(9, 6, 8))
    options = {"num_beams": 4, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = decoding.generated(setting, use_cache=False, **options)
    assert torch.equal(decoding.generated(setting, **options), expected)
    monkeypatch.setattr(LayerRouting, "move_rows", lambda self, move: None)
    assert not torch.equal(decoding.generated(setting, **options), expected)


@LEVELS
def test_beams_of_a_source_share_one_merged_expert(level: str) -> None:
    seen: list[tuple[int, int]] = []
    setting = BASE._replace(level=level, lengths=(9, 6), prompts=(9, 6))
    original = cache_meo.LayerRouting.move_rows

    def spy(self: LayerRouting, move: Any) -> None:
        original(self, move)
        seen.extend((len(weight), self.repeats) for weight, _ in self.merged.values())

    cache_meo.LayerRouting.move_rows = spy
    try:
        decoding.generated(setting, num_beams=3)
    finally:
        cache_meo.LayerRouting.move_rows = original
    assert set(seen) == ({(2, 3)} if level == "sequence" else set())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_gates_are_merged_once_per_source(family: str) -> None:
    setting = BASE._replace(family=family, level="sequence", lengths=(9, 6), side="right")
    model, merges = setting.model(), []
    for path, module in merged_of(model).items():
        if "decoder" in path.split("."):
            experts = module.experts
            experts._merge, original = lambda *a, o=experts._merge: merges.append(len(a[1].top_k_index)) or o(*a), None
            assert original is None
    try:
        decoding.generated(setting, num_beams=3, max_new_tokens=10, min_new_tokens=10)
    finally:
        for module in merged_of(model).values():
            module.experts.__dict__.pop("_merge", None)
    maps = 2 * 2  # layers, linear maps
    assert merges == [2] * maps


@LEVELS
@SCOPES
def test_copies_of_a_cache_go_separate_ways(level: str, scope: str) -> None:
    model, ids, prompt = setup(level, scope)
    cache = DynamicCache()
    run(model, ids[:, :9], cache, **prompt)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    copies = [copy.deepcopy(cache), torch.load(file, weights_only=False), cache]
    for seed, one in enumerate(copies):
        text = torch.cat([ids[:, :9], words(8, seed=seed + 5)], 1)
        assert_close(run(model, text[:, 9:], one, **prompt), run(model, text, **prompt)[:, 9:], 1e-5)


@LEVELS
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_reset_forgets_everything(level: str, static: bool) -> None:
    model, _, prompt = setup(level)
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache()
    for seed in range(3):
        text = words(19, seed=seed)
        expected = run(model, text, **prompt)
        parts = [run(model, text[:, a:b], cache, **prompt) for a, b in ((0, 8), (8, 9), (9, 10), (10, 19))]
        assert_close(torch.cat(parts, 1), expected, 1e-5)
        cache.reset()
        if int(cache.get_seq_length()):  # Transformers up to 5.17 zeroes the keys of a dynamic cache and keeps them
            with pytest.raises(RoutingError, match="of which the gates have seen 0"):
                run(model, text, cache, **prompt)
            return


def test_class_and_identity_of_a_cache_stay() -> None:
    model, ids, _ = setup("segment")
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=9)):
        kind = type(cache)
        with torch.no_grad():
            assert model(ids[:, :9], past_key_values=cache, use_cache=True).past_key_values is cache
        assert type(cache) is kind
        assert len(cache) == model.config.num_hidden_layers
        assert all(isinstance(layer, type(layer).__mro__[1]) for layer in cache.layers)
    assert DynamicCache(config=model.config).layers[0].__class__.__name__ == "DynamicLayer"


# what does not fit is refused


def test_cache_that_the_gates_have_not_seen_is_refused() -> None:
    model, ids, _ = setup("segment")
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=32)):
        with torch.no_grad():
            tiny_dense("llama", max_position_embeddings=128)(ids[:, :5], past_key_values=cache)
        with pytest.raises(RoutingError, match=r"holds 5 positions, of which the gates have seen 0.*empty cache"):
            run(model, ids[:, 5:], cache)


def test_prompt_must_be_known_and_fit() -> None:
    model, ids, prompt = setup("sequence")
    with pytest.raises(RoutingError, match=r"prompt_lengths.*labels.*routing='segment'"):
        run(model, ids)
    with pytest.raises(RoutingError, match="at least one"):
        run(model, ids, prompt_lengths=torch.tensor([0]))
    with pytest.raises(RoutingError, match="at least one"):
        run(model, ids, labels=ids)
    for bad in (torch.tensor([1.0]), torch.tensor([1, 2]), [3], torch.tensor(3)):
        with pytest.raises(RoutingError, match="`prompt_lengths`"):
            run(model, ids, prompt_lengths=bad)
    with pytest.raises(RoutingError, match="routing is 'frozen'; allowed: segment, prompt"):
        run(model, ids, routing="frozen")
    cache = DynamicCache()
    run(model, ids[:, :9], cache, routing="segment")
    with pytest.raises(RoutingError, match=r"end at \[7\].*already holds \[9\]"):
        run(model, ids[:, 9:], cache, **prompt)
    cache = DynamicCache()
    run(model, ids[:, :9], cache, **prompt)
    with pytest.raises(RoutingError, match=r"frozen to prompts of \[7\].*are \[8\]"):
        run(model, ids[:, 9:], cache, prompt_lengths=torch.tensor([8]))
    with pytest.raises(RoutingError, match="frozen to a prompt; routing='segment' needs a new cache"):
        run(model, ids[:, 9:], cache, routing="segment")
    with pytest.raises(RoutingError, match="has 1 rows, this batch has 2"):
        run(model, ids[:, 9:].repeat(2, 1), cache)


@pytest.mark.parametrize("name", ["routing", "prompt_lengths"])
def test_arguments_without_effect_are_refused(name: str) -> None:
    value = {"routing": "segment", "prompt_lengths": torch.tensor([2, 2, 2])}[name]
    for family, level in (("bert", "sequence"), ("llama", "task")):
        model = meo_of(tiny_dense(family), level=level)
        with pytest.raises((RoutingError, TypeError), match=name):
            model(**tiny_inputs(family), **{name: value})


def test_continuous_batching_is_refused() -> None:
    model, ids, _ = setup("segment")
    with pytest.raises(RoutingError, match="continuous batching"):
        model.generate_batch(inputs=ids.tolist(), max_new_tokens=2)


# prompts


def test_labels_say_where_the_prompt_ends() -> None:
    model, _, _ = setup("sequence")
    ids = words(12, rows=3)
    lengths = torch.tensor([5, 1, 12])
    labels = torch.where(torch.arange(12) < lengths[:, None], -100, ids)
    expected = run(model, ids, prompt_lengths=lengths)
    assert_close(run(model, ids, labels=labels), expected)
    padded = torch.cat([words(3, 3), ids], 1)
    mask = torch.cat([torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)], 1)
    where = (mask.cumsum(1) - 1).clamp(min=0)
    labels = torch.cat([torch.full((3, 3), -100), labels], 1)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=where, labels=labels).logits[:, 3:]
    assert_close(found, expected, 1e-5)


def test_level_is_a_default_for_the_routing() -> None:
    by_level = {level: setup(level)[0] for level in ("segment", "sequence")}
    by_level["segment"].load_state_dict(by_level["sequence"].state_dict())
    ids, prompt = words(19), {"prompt_lengths": torch.tensor([7])}
    segment, frozen = run(by_level["segment"], ids), run(by_level["sequence"], ids, **prompt)
    assert_differs(segment, frozen)
    assert torch.equal(run(by_level["sequence"], ids, routing="segment"), segment)
    assert torch.equal(run(by_level["segment"], ids, routing="prompt", **prompt), frozen)
    configured = meo_of(tiny_dense("llama"), level="sequence", routing="segment", segment_length=4)
    run(configured, ids)


@pytest.mark.parametrize("options", [{"routing": "segment"}, {"routing": "prompt"}, {}], ids=str)
@LEVELS
def test_routing_of_a_generation(level: str, options: dict[str, str]) -> None:
    model, ids, _ = setup(level)
    options = {**options, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    cached, uncached = (model.generate(ids[:, :7], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    frozen = options.get("routing", "segment" if level == "segment" else "prompt") == "prompt"
    extra = {"routing": "prompt", "prompt_lengths": torch.tensor([7])} if frozen else {"routing": "segment"}
    greedy = run(model, cached, **extra)[0, 6:-1].argmax(-1)
    assert torch.equal(greedy, cached[0, 7:])


def test_rows_freeze_one_by_one() -> None:
    model, ids, _ = setup("sequence", rows=3)
    prompt = {"prompt_lengths": torch.tensor([3, 8, 12])}
    whole, cache = run(model, ids, **prompt), DynamicCache()
    for place in range(19):
        assert_close(run(model, ids[:, place : place + 1], cache, **prompt)[:, 0], whole[:, place], 1e-5)


TURNS = pytest.mark.parametrize("routing", ["segment", "prompt"])


@TURNS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_turn_of_a_chat_is_the_uncached_one(routing: str, family: str) -> None:
    setting = BASE._replace(family=family, level="sequence")
    model, cache = setting.model(), DynamicCache()
    text = words(5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "routing": routing}
    for turn in range(3):
        text = torch.cat([text, words(5, seed=turn + 1)], 1)
        expected = model.generate(text, use_cache=False, **options)
        text = model.generate(text, past_key_values=cache, **options)
        assert torch.equal(text, expected)


def test_chat_of_padded_rows_is_the_uncached_one() -> None:
    model, cache = BASE._replace(level="sequence").model(), DynamicCache()
    ids, mask = torch.empty(2, 0, dtype=torch.long), torch.empty(2, 0, dtype=torch.long)
    for turn in range(3):
        ids = torch.cat([ids, words(5, 2, seed=turn)], 1)
        new = torch.ones(2, 5, dtype=torch.long)
        new[1, :2] = 0
        mask = torch.cat([mask, new], 1)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        expected = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(ids, expected)
        mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)


def test_answer_that_cannot_be_read_again_is_refused() -> None:
    model, ids, _ = setup("sequence")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    cache = DynamicCache()
    text = model.generate(ids[:, :6], past_key_values=cache, **options)
    longer = torch.cat([text, ids[:, 6:9]], 1)
    with pytest.raises(RoutingError, match="only the new tokens were passed"):
        model.generate(ids[:, 6:9], past_key_values=cache, attention_mask=torch.ones_like(longer), **options)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model.generate(ids[:, :6], past_key_values=cache, **options)
    with pytest.raises(RoutingError, match=r"cannot give it back.*routing='segment'"):
        model.generate(longer, past_key_values=cache, **options)


@TURNS
def test_prompt_begun_in_a_cache_is_generated_from(routing: str) -> None:
    """A system prompt is read once, and its cache is copied for every question."""
    model, ids, _ = setup("sequence")
    prefix = DynamicCache()
    run(model, ids[:, :6], prefix, routing="segment")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "routing": routing}
    for seed in range(3):
        text = torch.cat([ids[:, :6], words(5, seed=seed)], 1)
        found = model.generate(text, past_key_values=copy.deepcopy(prefix), **options)
        assert torch.equal(found, model.generate(text, use_cache=False, **options))


@LEVELS
def test_generation_from_embeddings(level: str) -> None:
    model, ids, _ = setup(level)
    embeds = model.get_input_embeddings()(ids[:, :7]).detach()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(ids[:, :7], **options)[:, 7:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected)


# what is kept


@LEVELS
@SCOPES
def test_merged_experts_beyond_their_budget_are_combined(
    level: str, scope: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, prompt = setup(level, scope, rows=2)
    expected = run(model, ids, **prompt)
    one = sum(p[0].nbytes for p in next(iter(merged_of(model).values())).experts.parameters())
    for budget, held in ((None, 4), (0, 0), (2 * one, 2), (10**9, 4)):
        monkeypatch.setattr(model._meo_context.settings, "merged_cache_bytes", budget)
        cache = DynamicCache()
        run(model, ids[:, :8], cache, **prompt)
        for place in range(8, 19):
            assert_close(run(model, ids[:, place : place + 1], cache, **prompt)[:, 0], expected[:, place], 1e-5)
        merged = [w for layer in cache.layers for pair in layer.routing.merged.values() for w in pair if w is not None]
        assert sum(w.nbytes for w in merged) == held * one
    kept = [layer.routing.crowded for layer in cache.layers]
    assert not any(kept)


def test_memory_that_is_left_is_known() -> None:
    free = memory_meo.free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50


def test_gradients_flow_through_a_cache() -> None:
    for level in ("segment", "sequence"):
        model, ids, prompt = setup(level)
        found = []
        for cuts in ((0, 19), (0, 6, 9, 10, 19)):
            model.zero_grad()
            cache, logits = DynamicCache(), []
            for a, b in pairwise(cuts):
                where = torch.arange(a, b)[None]
                logits.append(model(ids[:, a:b], past_key_values=cache, position_ids=where, **prompt).logits)
            torch.cat(logits, 1).pow(2).mean().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            assert_close(found[1][name], gradient, 1e-4)


# others who use the model


def test_packed_documents_are_gated_one_by_one() -> None:
    model, _, _ = setup("segment")
    documents = [words(length, seed=length) for length in (9, 4, 1, 6)]
    ids = torch.cat(documents, 1)
    where = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=where, use_cache=False).logits
    expected = torch.cat([run(model, document) for document in documents], 1)
    assert_close(packed, expected, 1e-5)
    assert_differs(run(model, ids), expected)
    with pytest.raises(RoutingError, match="packed rows cannot go with a KV cache"), torch.no_grad():
        model(ids, position_ids=where, past_key_values=DynamicCache())
    with pytest.raises(RoutingError, match="packed rows have no one prompt"), torch.no_grad():
        setup("sequence")[0](ids, position_ids=where, use_cache=False, prompt_lengths=torch.tensor([3]))
    with pytest.raises(RoutingError, match="use_cache=False"), torch.no_grad():
        model(ids, position_ids=where)
    with pytest.raises(RoutingError, match="cu_seq_lens_q"), torch.no_grad():
        model(ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 9, 13, 14, 20]))


@LEVELS
def test_threads_do_not_meet(level: str) -> None:
    model, _, _ = setup(level)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    batches = [decoding.Setting(*BASE._replace(level=level, lengths=(n, 5), seed=n)).batch() for n in (9, 12, 16, 19)]
    expected = [model.generate(ids, attention_mask=mask, **options) for ids, mask in batches]
    found: dict[int, Tensor] = {}
    start = threading.Barrier(len(batches))

    def work(index: int) -> None:
        ids, mask = batches[index]
        start.wait()
        found[index] = model.generate(ids, attention_mask=mask, **options)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all(torch.equal(found[i], expected[i]) for i in range(len(batches)))
    assert not model._meo_context._calls, "a call was left open"


@LEVELS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_kept_logits_change_nothing(level: str, attention: str) -> None:
    model, ids, prompt = setup(level)
    expected = run(model, ids, **prompt)
    model.set_attn_implementation(attention)
    assert_close(run(model, ids, **prompt), expected, 1e-5)
    assert_close(run(model, ids, logits_to_keep=3, **prompt), expected[:, -3:], 1e-5)
    model.set_attn_implementation("sdpa")


def test_own_mask_for_attention_needs_the_padding_beside_it() -> None:
    model, ids, _ = setup("segment", rows=2)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :6] = 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    allowed = torch.ones(19, 19, dtype=torch.bool).tril()[None] & mask[:, None].bool()
    allowed = torch.where(allowed, 0.0, torch.finfo(torch.float).min)[:, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=where).logits
        with pytest.raises(RoutingError, match="routing_mask"):
            model(ids, attention_mask=allowed, position_ids=where)
        found = model(ids, attention_mask=allowed, position_ids=where, routing_mask=mask).logits
    assert_close(found[1, 6:], expected[1, 6:], 1e-5)
    assert_close(found[0], expected[0], 1e-5)


@LEVELS
def test_bert_as_a_decoder(level: str) -> None:
    dense = tiny_dense("bert", BertLMHeadModel, is_decoder=True)
    model = draw_experts(meo_of(dense, level=level, segment_length=4)).eval()
    ids, prompt = words(15), {} if level == "segment" else {"prompt_lengths": torch.tensor([6])}
    expected = run(model, ids, **prompt)
    cache = DynamicCache()
    parts = [run(model, ids[:, a:b], cache, **prompt) for a, b in ((0, 5), (5, 6), (6, 7), (7, 15))]
    assert_close(torch.cat(parts, 1), expected, 1e-5)
    changed = ids.clone()
    changed[:, 9] += 1
    assert_close(run(model, changed, **prompt)[:, :9], expected[:, :9])


@LEVELS
def test_one_converted_layer_of_two(level: str) -> None:
    dense = tiny_dense("llama")
    model = draw_experts(meo_of(dense, level=level, segment_length=4, layers=[1])).eval()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3, "pad_token_id": 1}
    ids = words(7)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


# compiled


@LEVELS
@SCOPES
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_static_steps_are_the_eager_ones(level: str, scope: str, backend: str) -> None:
    torch.compiler.reset()
    model, ids, prompt = setup(level, scope, rows=2)
    whole = run(model, ids, **prompt)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model.route_cache(cache)
    graphs = []
    step = torch.compile(model, fullgraph=True, backend=_counting(graphs, backend))
    outputs = [run(model, ids[:, :8], cache, **prompt)]
    with torch.no_grad():
        for place in range(8, 19):
            where = torch.tensor([[place]])
            options = {"past_key_values": cache, "position_ids": where, **prompt}
            outputs.append(step(ids[:, place : place + 1], **options).logits)
    assert_close(torch.cat(outputs, 1), whole, 1e-5)
    assert len(graphs) == 1


def _counting(graphs: list[Any], backend: str) -> Any:
    from torch._dynamo.backends.registry import lookup_backend

    def compile_with(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs, **options)

    return compile_with


@LEVELS
def test_compiled_layers_of_an_eager_model(level: str) -> None:
    torch.compiler.reset()
    model, ids, prompt = setup(level)
    expected = run(model, ids, **prompt)
    compiled = copy.deepcopy(model)
    compiled.model.layers = torch.nn.ModuleList(
        torch.compile(layer, backend="eager", fullgraph=True) for layer in compiled.model.layers
    )
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False, **prompt).logits, expected, 1e-5)


@LEVELS
def test_two_checkpointed_forwards_before_one_backward(level: str) -> None:
    """As in preference losses: other texts, other masks, one backward."""
    model = draw_experts(meo_of(tiny_dense("llama"), level=level, segment_length=4, router="top_k")).double().train()
    batches = []
    for seed in (1, 2):
        ids = words(13, rows=2, seed=seed)
        mask = torch.ones_like(ids)
        mask[1, : 2 + seed] = 0
        labels = labels_for("llama", {"input_ids": ids}).clone()
        labels[:, : 5 + seed] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        (model(**batches[0]).loss - model(**batches[1]).loss).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        if gradient.abs().max() > 1e-12:
            assert_close(found[1][name], gradient)


# states that must not outlive what they describe


def three_texts(model: PreTrainedModel, ids: Tensor, cache: Cache, **options: Any) -> None:
    """Compare what three rows with texts of their own generate from a cache with what they do without."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, **options}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("combine", ["weights", "outputs"])
def test_copies_of_a_row_may_go_separate_ways(combine: str) -> None:
    model, ids, _ = setup("sequence")
    model = copy.deepcopy(model)
    for module in merged_of(model).values():
        module.experts.combine = combine
    sampled = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1, "top_k": 0}
    cache = DynamicCache()
    torch.manual_seed(0)
    drawn = model.generate(ids[:, :7], past_key_values=cache, do_sample=True, num_return_sequences=3, **sampled)
    three_texts(model, torch.cat([drawn, words(4, 3)], 1), cache)

    cache = DynamicCache()  # a prompt that several questions share
    run(model, ids[:, :7], cache, prompt_lengths=torch.tensor([7]))
    cache.batch_repeat_interleave(3)
    three_texts(model, torch.cat([ids[:, :7].repeat(3, 1), words(4, 3)], 1), cache)

    cache = DynamicCache()  # a call that failed
    with pytest.raises(RoutingError):
        model.generate(
            ids[:, :7],
            past_key_values=cache,
            do_sample=True,
            num_return_sequences=3,
            prompt_lengths=torch.zeros(1, dtype=torch.long),
        )
    three_texts(model, words(9, 3), cache)

    prompt = {"prompt_lengths": torch.tensor([5, 7])}
    texts, cache = words(12, 2), DynamicCache()
    expected = run(model, texts, **prompt)
    run(model, texts[:, :9], cache, **prompt)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 2, 1, 3]))
    found = run(model, texts[[0, 1, 0, 1], 9:], cache)
    assert_close(found, expected[[0, 1, 0, 1], 9:], 1e-5)
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.get_seq_length() == 12


def test_rows_partly_in_their_answers_keep_their_prompts() -> None:
    model, _, _ = setup("sequence", rows=2)
    ids, cache = words(12, 2), DynamicCache()
    run(model, ids[:, :6], cache, prompt_lengths=torch.tensor([3, 10]))
    for other in ({"prompt_lengths": torch.tensor([5, 10])}, {"routing": "segment"}):
        with pytest.raises(RoutingError, match="frozen to"):
            run(model, ids[:, 6:], cache, **other)
    with pytest.raises(RoutingError, match="some rows of the KV cache are in their answers"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_prompt_may_go_on_where_no_answer_has_begun() -> None:
    model, ids, _ = setup("sequence")
    for other in ({"prompt_lengths": torch.tensor([12])}, {"routing": "segment"}):
        cache = DynamicCache()
        run(model, ids[:, :7], cache, prompt_lengths=torch.tensor([7]))
        assert_close(run(model, ids[:, 7:], cache, **other), run(model, ids, **other)[:, 7:], 1e-5)


@LEVELS
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_mask_may_cover_cached_and_later_tokens(level: str, static: bool) -> None:
    model, _, prompt = setup(level, rows=2)
    ids = words(19, 2)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, :2], mask[:, 19:] = 0, 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask[:, :19], position_ids=where[:, :19], **prompt).logits
        cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache()
        for a, b in ((0, 9), (9, 10), (10, 19)):
            found = model(
                ids[:, a:b],
                attention_mask=mask if static else mask[:, :b],
                position_ids=where[:, a:b],
                past_key_values=cache,
                **prompt,
            ).logits
            assert_close(found[0], expected[0, a:b], 1e-5)
            assert_close(found[1, max(2 - a, 0) :], expected[1, max(a, 2) : b], 1e-5)


@LEVELS
def test_inference_mode_and_no_grad_may_alternate(level: str) -> None:
    model, ids, prompt = setup(level)
    expected, cache = run(model, ids, **prompt), DynamicCache()
    for place in range(19):
        with torch.inference_mode(place % 3 == 0):
            found = run(model, ids[:, place : place + 1], cache, **prompt)
        assert_close(found[:, 0], expected[:, place], 1e-5)


def test_refused_crops_leave_everything_as_it_was() -> None:
    """Transformers refuses to crop a sliding window that has moved on; the routing state must not move alone."""
    model = BASE._replace(family="gemma2", level="sequence").model()
    ids = words(30)
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.sliding_window = 8
    model.route_cache(cache)
    run(model, ids[:, :20], cache, prompt_lengths=torch.tensor([5]))
    before = [(layer.routing.slots, layer.routing.count.tolist()) for layer in cache.layers]
    with pytest.raises(RuntimeError):
        cache.crop(-4)
    assert [(layer.routing.slots, layer.routing.count.tolist()) for layer in cache.layers] == before


def test_budget_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    model = copy.deepcopy(setup("sequence")[0])
    model._meo_context.warned = False
    model._meo_context.settings.merged_cache_bytes = 0
    logging.enable_propagation()
    try:
        for rows in (1, 2, 3):
            cache = DynamicCache()
            run(model, words(9, rows), cache, prompt_lengths=torch.full((rows,), 7))
            run(model, words(1, rows), cache)
    finally:
        logging.disable_propagation()
    assert [record.message.count("merged_cache_bytes") for record in caplog.records] == [1]


def test_merged_experts_stay_out_of_copies_and_files() -> None:
    model, ids, prompt = setup("sequence")
    cache = DynamicCache()
    run(model, ids[:, :9], cache, **prompt)
    assert cache.layers[0].routing.merged
    assert not copy.deepcopy(cache).layers[0].routing.merged


def test_prompt_lengths_without_effect_are_refused() -> None:
    model, ids, prompt = setup("sequence")
    with pytest.raises(RoutingError, match="`prompt_lengths` have no effect with routing='segment'"):
        run(model, ids, routing="segment", **prompt)
