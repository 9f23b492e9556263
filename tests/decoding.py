"""What must hold however a text is batched, padded, cut into calls and cached; each raises AssertionError if not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from contracts import POSITION_OFFSET, assert_close, assert_differs
from meo_hf.modeling.families_meo import FAMILIES
from tiny import VOCAB, draw_experts, meo_of, merged_of, tiny_dense
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

CACHES = ("made by the model", "dynamic", "dynamic with config", "static")
TOLERANCE = 1e-5
DECODERS = ("gpt2", "llama", "qwen2", "gemma2")
PAIRS = ("t5", "bart")


class Setting(NamedTuple):
    """A model and a text: `lengths` are the rows' real tokens, `prompts` how many of them are the prompt."""

    family: str
    level: str
    scope: str
    segment: int
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    side: str
    cuts: tuple[int, ...]
    cache: str
    seed: int

    @property
    def pair(self) -> bool:
        """Whether a decoder reads an encoder."""
        return FAMILIES[self.family].kind == "encoder-decoder"

    @property
    def width(self) -> int:
        """Positions of the padded batch."""
        return max(self.lengths)

    def ids(self, row: int) -> Tensor:
        """Return one row's real tokens [1, L]; few different ones, so that means differ between texts."""
        generator = torch.Generator().manual_seed(self.seed * 7 + row)
        words = torch.randint(5, VOCAB, (4,), generator=generator)
        return words[torch.randint(0, 4, (1, self.lengths[row]), generator=generator)]

    def prompt(self, row: int | None = None) -> dict[str, Tensor]:
        """Return the prompt lengths that the level needs, of all rows or one."""
        if self.pair or self.level in ("segment", "task"):
            return {}
        lengths = torch.tensor(self.prompts)
        return {"prompt_lengths": lengths if row is None else lengths[row : row + 1]}

    def model(self) -> PreTrainedModel:
        """Return the model; its experts were drawn one by one."""
        model = _model(self.family, self.level, self.scope)
        model._meo_context.settings.segment_length = self.segment
        return model.eval()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, S], padded with garbage."""
        ids = torch.randint(5, VOCAB, (len(self.lengths), self.width), generator=torch.Generator().manual_seed(1))
        mask = torch.zeros_like(ids)
        for row, length in enumerate(self.lengths):
            real = slice(0, length) if self.side == "right" else slice(self.width - length, None)
            ids[row, real], mask[row, real] = self.ids(row)[0], 1
        return ids, mask


@lru_cache(maxsize=32)
def _model(family: str, level: str, scope: str) -> PreTrainedModel:
    window = {"sliding_window": 6} if family == "gemma2" else {}  # shorter than the texts
    dense = tiny_dense(family, max_position_embeddings=128, **window)
    model = draw_experts(meo_of(dense, level=level, gate_scope=scope))
    for module in merged_of(model).values():
        for parameter in module.adapter.parameters() if module.adapter is not None else ():
            parameter.data.mul_(0.3)  # else it magnifies the rounding of single precision
    return model


def new_cache(setting: Setting, model: PreTrainedModel, length: int) -> Cache | None:
    """Return an empty cache of a kind, None where the model makes its own."""
    config = model.config.get_text_config(decoder=True)
    made = {
        "made by the model": lambda: None,
        "dynamic": lambda: DynamicCache(),
        "dynamic with config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=length),
    }[setting.cache]()
    return EncoderDecoderCache(made, DynamicCache()) if setting.pair and made is not None else made


def positions(family: str, mask: Tensor) -> Tensor:
    """Return position ids that count real tokens."""
    return (mask.cumsum(1) - 1).clamp(min=0) + POSITION_OFFSET.get(family, 0)


@torch.no_grad()
def alone(setting: Setting, row: int) -> Tensor:
    """Return a row's logits [L, V] without padding, cache or company."""
    model = setting.model()
    return model(input_ids=setting.ids(row), use_cache=False, **setting.prompt(row)).logits[0]


@torch.no_grad()
def together(setting: Setting, cached: bool) -> list[Tensor]:
    """Return the rows' logits [L, V] from the padded batch: in one call, or in pieces with a cache."""
    model, (ids, mask) = setting.model(), setting.batch()
    where = positions(setting.family, mask)
    if cached:
        logits = in_pieces(setting, model, ids, mask, where)
    else:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": where}
        logits = model(**inputs, use_cache=False, **setting.prompt()).logits
    return [logits[row][mask[row].bool()] for row in range(len(ids))]


def pieces(setting: Setting, width: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each call."""
    cuts = sorted({cut % width for cut in setting.cuts} - {0})
    yield from zip([0, *cuts], [*cuts, width], strict=True)


def in_pieces(setting: Setting, model: PreTrainedModel, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Return the logits [B, S, V] of calls that continue each other's cache."""
    cache, outputs = new_cache(setting, model, ids.shape[1]), []
    for begin, end in pieces(setting, ids.shape[1]):
        inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        output = model(
            **inputs,
            position_ids=where[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            **setting.prompt(),
        )
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, 1)


def one_text_has_one_result(setting: Setting) -> None:
    """Batched, padded, cut into calls and cached, a row gets what it gets alone."""
    for cached in (False, True):
        for row, logits in enumerate(together(setting, cached)):
            assert_close(logits, alone(setting, row), TOLERANCE)


@torch.no_grad()
def pair_has_one_result(setting: Setting) -> None:
    """A decoder that reads a padded encoder in pieces says what it says alone and whole."""
    model, (ids, mask) = setting.model(), setting.batch()
    words = torch.randint(5, VOCAB, (len(ids), 9), generator=torch.Generator().manual_seed(setting.seed))
    cache, outputs, encoded = new_cache(setting, model, 9), [], None
    for begin, end in pieces(setting, 9):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=words[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        encoded = encoded or model.get_encoder()(input_ids=ids, attention_mask=mask)
        outputs.append(output.logits)
    for row, logits in enumerate(torch.cat(outputs, 1)):
        expected = model(input_ids=setting.ids(row), decoder_input_ids=words[row : row + 1], use_cache=False).logits[0]
        assert_close(logits, expected, TOLERANCE)


@torch.no_grad()
def nothing_looks_ahead(setting: Setting, train: bool) -> None:
    """Another token at any position leaves the logits before it alone: whole and in pieces."""
    model, ids = setting.model().train(train), setting.ids(0)
    mask = torch.ones_like(ids)
    where = positions(setting.family, mask)
    prompt = setting.prompt(0)

    def whole(ids: Tensor) -> Tensor:
        torch.manual_seed(5)  # the routers' noise
        return model(input_ids=ids, use_cache=False, **prompt).logits[0]

    def cut(ids: Tensor) -> Tensor:
        torch.manual_seed(5)
        return in_pieces(setting._replace(prompts=setting.prompts[:1]), model, ids, mask, where)[0]

    ways = (whole, cut) if setting.cache != "made by the model" or not train else (whole,)
    for run in ways:
        before = run(ids)
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, place] = 5 + (int(ids[0, place]) + 1) % 90
            after = run(changed)
            assert_differs(after[place:], before[place:], 1e-5)
            if place:
                assert_close(after[:place], before[:place], TOLERANCE)


def generated(setting: Setting, rows: slice = slice(None), **options: Any) -> Tensor:
    """Return what a model generates from the padded batch."""
    model, (ids, mask) = setting.model(), setting.batch()
    torch.manual_seed(setting.seed)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 1, **options}
    out = model.generate(input_ids=ids[rows], attention_mask=mask[rows], **options)
    return out if setting.pair else out[:, setting.width :]


def cached_generation_is_uncached(setting: Setting) -> None:
    """Greedy, sampling and beams say the same with a cache of any kind, with prefill in chunks, and without."""
    for options in (
        {},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "top_k": 0},
    ):
        expected = generated(setting, use_cache=False, **options)
        assert torch.equal(generated(setting, **options), expected), options
        if setting.cache == "static" and "num_beams" not in options:
            assert torch.equal(generated(setting, **options, cache_implementation="static"), expected), options
        if not setting.pair:
            size = setting.cuts[0] if setting.cuts else 1
            assert torch.equal(generated(setting, **options, prefill_chunk_size=size), expected), options


def assisted_generation_is_greedy(setting: Setting) -> None:
    """Whoever drafts, and however often the cache is cropped, the text is the greedy one."""
    setting = setting._replace(side="left" if not setting.pair else setting.side)
    row = slice(0, 1)
    model = setting.model()
    stock = tiny_dense(setting.family, max_position_embeddings=128)
    expected = generated(setting, row, max_new_tokens=14, min_new_tokens=14, use_cache=False)
    drafts = [{"assistant_model": stock}, {"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}]
    for draft in drafts:
        found = generated(setting, row, max_new_tokens=14, min_new_tokens=14, **draft)
        assert torch.equal(found, expected), list(draft)
