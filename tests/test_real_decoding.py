"""SmolLM2-135M with experts that differ: a batch of left-padded prompts says what each prompt says alone.

`MEO_LONG=1` runs all 8 prompts and 200 new tokens with experts in all layers; otherwise 3 prompts, 12 tokens and the
last 10 layers.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from meo_hf.modeling.router_meo import MeoRouter
from real import smollm2
from tiny import recorded_gates
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextIteratorStreamer, pipeline

from meo_hf import convert

pytestmark = pytest.mark.xdist_group("real_decoding")  # one worker: the model is made once
LONG = bool(os.environ.get("MEO_LONG"))
TOKENS = 200 if LONG else 12
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had never",
    "def fibonacci(n):",
    "Water boils at",
    "List three reasons why the sky looks blue during the day and red in the evening:",
    "My favourite",
    "In 1969, the first people",
    "To bake bread you need flour, water, salt and yeast. First, mix the flour with the water until",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the real model to experts that differ."""
    output = tmp_path_factory.mktemp("smollm2") / "meo"
    options = {"level": "sequence", "segment_length": 16, "num_experts": 4, "expert_init": "drop-upcycle"}
    options |= {} if LONG else {"layers": "last:10"}
    convert(smollm2(), output, dtype="float32", verify="none", **options)
    return output


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    """Load it, and draw routers whose gates differ between texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, MeoRouter):
            module.weight.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(("routing", "beams"), [("prompt", 1), ("segment", 4 if LONG else 2)])
def test_batch_of_prompts_is_each_alone(model: PreTrainedModel, folder: Path, routing: str, beams: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
    prompts = PROMPTS if LONG else PROMPTS[:3]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_beams": beams, "do_sample": False}
    options |= {"routing": routing, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with recorded_gates(model) as gates:
        together = model.generate(**batch, **options)[:, -TOKENS:]
    chosen = {tuple(row) for found in gates.values() for g in found for row in g.top_k_index.sort().values.tolist()}
    assert len(chosen) > 1, "all gates chose alike"
    assert len({tuple(row) for row in together.tolist()}) == len(prompts)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0, -TOKENS:]
        assert torch.equal(alone, together[row]), prompt


def test_chat_template_streamer_and_pipeline(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"max_new_tokens": 8, "do_sample": False}
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = tokenizer.decode(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **options, streamer=streamer)
    assert "".join(streamer) == expected
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(chat, **options)
    said = tokenizer.decode(tokenizer(expected)["input_ids"], skip_special_tokens=True)
    assert answer[0]["generated_text"][-1]["content"] == said
