"""What ships with `generate`, beyond the properties of test_decoding.py: other caches, compiled steps, moved modes."""

from __future__ import annotations

from typing import Any

import decoding
import pytest
import torch
import transformers
from contracts import assert_close
from decoding import Setting
from test_routing_state import BASE, LEVELS, run, words
from transformers import CompileConfig, DynamicCache, cache_utils

OPTIONS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
ROWS = BASE._replace(lengths=(9, 6), prompts=(5, 4))


@LEVELS
def test_compiled_by_generate(level: str) -> None:
    torch.compiler.reset()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    for seed in range(2):
        setting = ROWS._replace(level=level, seed=seed)
        expected = decoding.generated(setting, use_cache=False)
        found = decoding.generated(setting, cache_implementation="static", compile_config=config)
        assert torch.equal(found, expected)
    assert hasattr(setting.model(), "_compiled_call"), "nothing was compiled"


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a class of quantised cache layers that lose nothing: what is left is how they keep and move rows."""
    layer = getattr(cache_utils, "Fp8QuantizedLayer", None)
    if layer is None:
        pytest.skip(f"transformers {transformers.__version__} has no quantised cache without further packages")

    class Lossless(layer):
        _layer_type = None

        def _quantize(self, tensor: Any, *_: Any, **__: Any) -> Any:
            return tensor, torch.ones(())

        def _dequantize(self, qtensor: Any, *_: Any, **__: Any) -> Any:
            return qtensor[0] if isinstance(qtensor, tuple) else qtensor

    return Lossless


@LEVELS
@pytest.mark.parametrize("beams", [1, 3])
def test_quantised_cache(level: str, beams: int, lossless: Any) -> None:
    setting = ROWS._replace(level=level)
    cache = cache_utils.Cache(layers=[lossless() for _ in range(setting.model().config.num_hidden_layers)])
    expected = decoding.generated(setting, use_cache=False, num_beams=beams)
    assert torch.equal(decoding.generated(setting, past_key_values=cache, num_beams=beams), expected)
    assert all(isinstance(layer, lossless) and layer.routing.slots for layer in cache.layers)


@LEVELS
def test_window_that_has_moved_on(level: str) -> None:
    setting = Setting("gemma2", level, "ffn", 4, (25,), (9,), "left", (), "dynamic with config", 3)
    model, ids, prompt = setting.model(), words(25), setting.prompt()
    assert model.config.sliding_window < 9, "the window never moves"
    expected, cache = run(model, ids, **prompt), DynamicCache(config=model.config)
    assert any(cache.is_sliding)
    parts = [run(model, ids[:, a:b], cache, **prompt) for a, b in ((0, 9), (9, 10), (10, 14), (14, 25))]
    assert_close(torch.cat(parts, 1), expected, 1e-5)


MOVED: dict[str, dict[str, Any]] = {
    "Contrastive Search": {"penalty_alpha": 0.6, "top_k": 4},
    "Dola Generation": {"dola_layers": "high"},
    "Group Beam Search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "Constrained Beam Search": {"num_beams": 2, "force_words_ids": [[5]]},
}


@pytest.mark.parametrize("name", MOVED)
def test_modes_that_moved_to_the_hub_fail_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code=True`"):
        BASE.model().generate(words(5), max_new_tokens=3, **MOVED[name])


@LEVELS
def test_prompt_lengths_given_to_generate(level: str) -> None:
    """An answer that was begun elsewhere goes on under the gate of its prompt."""
    model, ids = BASE._replace(level=level).model(), words(11)
    options = {**OPTIONS, "routing": "prompt", "prompt_lengths": torch.tensor([6])}
    cached, uncached = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    whole = run(model, cached, routing="prompt", prompt_lengths=torch.tensor([6]))
    assert torch.equal(whole[0, 10:-1].argmax(-1), cached[0, 11:])


def test_typos_are_refused_by_generate() -> None:
    with pytest.raises(ValueError, match=r"not used by the model: \['routng'\]"):
        BASE.model().generate(words(5), max_new_tokens=3, routng="segment")
