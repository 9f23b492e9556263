"""One text, one result: properties of causal routing over families, levels, padding, chunks and caches.

`HYPOTHESIS_PROFILE=long` draws many more. The published rule, a mean over all tokens, must fail every one of them.
"""

from __future__ import annotations

import decoding
import pytest
from decoding import CACHES, DECODERS, PAIRS, Setting
from hypothesis import given, settings
from hypothesis import strategies as st
from meo_hf.modeling import modeling_meo

small = settings(max_examples=25) if settings.get_current_profile_name() == "ci" else settings()
costly = settings(max_examples=8) if settings.get_current_profile_name() == "ci" else settings(max_examples=200)


@st.composite
def texts(draw: st.DrawFn, families: tuple[str, ...] = DECODERS, sides: tuple[str, ...] = ("left", "right")) -> Setting:
    """Draw a setting."""
    family = draw(st.sampled_from(families))
    levels = ("sequence", "token", "task") if family in PAIRS else ("segment", "sequence", "token")
    lengths = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    return Setting(
        family,
        draw(st.sampled_from(levels)),
        draw(st.sampled_from(("ffn", "projection"))),
        draw(st.integers(1, 7)),
        lengths,
        tuple(draw(st.integers(1, length)) for length in lengths),
        "right" if family == "bart" else draw(st.sampled_from(sides)),
        tuple(draw(st.lists(st.integers(1, 19), max_size=6))),
        draw(st.sampled_from(CACHES)),
        draw(st.integers(0, 10**6)),
    )


@small
@given(texts())
def test_one_text_has_one_result(setting: Setting) -> None:
    decoding.one_text_has_one_result(setting)


@small
@given(texts(PAIRS))
def test_pair_has_one_result(setting: Setting) -> None:
    decoding.pair_has_one_result(setting)


@small
@given(texts(), st.booleans())
def test_nothing_looks_ahead(setting: Setting, train: bool) -> None:
    decoding.nothing_looks_ahead(setting, train)


@costly
@given(texts((*DECODERS, *PAIRS), sides=("left",)))
def test_cached_generation_is_uncached(setting: Setting) -> None:
    decoding.cached_generation_is_uncached(setting)


@costly
@given(texts((*DECODERS, *PAIRS), sides=("left",)))
def test_assisted_generation_is_greedy(setting: Setting) -> None:
    decoding.assisted_generation_is_greedy(setting)


CONTROL = Setting("llama", "segment", "ffn", 4, (13, 9), (5, 4), "left", (6, 7, 8), "dynamic", 3)


@pytest.mark.parametrize(
    "check",
    [
        decoding.one_text_has_one_result,
        lambda setting: decoding.nothing_looks_ahead(setting, False),
        lambda setting: decoding.nothing_looks_ahead(setting, True),
        decoding.cached_generation_is_uncached,
        decoding.assisted_generation_is_greedy,
    ],
    ids=["one result", "no look-ahead", "no look-ahead in training", "cached", "assisted"],
)
def test_published_rule_fails(check: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate by the mean of all tokens at hand, as the MEO paper's code does: every check must notice."""
    check(CONTROL)
    monkeypatch.setattr(modeling_meo, "is_causal", lambda config: False)
    decoding._model.cache_clear()
    try:
        with pytest.raises(AssertionError):
            check(CONTROL)
    finally:
        decoding._model.cache_clear()
