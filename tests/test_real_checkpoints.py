"""Real MiniLM and SmolLM2-135M, converted and used in a process where meo_hf cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from real import minilm, smollm2

from meo_hf import convert, extract

_COMMON = """
import sys
sys.modules["meo_hf"] = None
import json, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

def relative_rms(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())

def spread(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router." in name and not name.endswith("noise_weight"):
            parameter.data.normal_(0, 1)
    return model.eval()

def gates_of(model, run):
    seen = []
    routers = [m for m in model.modules() if type(m).__name__ == "MeoRouter"]
    hooks = [r.register_forward_hook(lambda m, i, o: seen.append(o[0].top_k_weights)) for r in routers]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, torch.cat([s.reshape(-1) for s in seen])
"""


def _fresh(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in `python -I`; it prints a JSON line at the end."""
    command = [sys.executable, "-I", "-c", _COMMON + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


_MINILM = """
from sentence_transformers import SentenceTransformer
source, output = sys.argv[1:]
texts = ["The cat sits on the mat.", "A cat is resting on a rug, as cats like to do in the afternoon.", "Stocks fell."]
tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
tokens = tokenizer(texts, padding=True, return_tensors="pt")
dense = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
meo = spread(AutoModel.from_pretrained(output, trust_remote_code=True, dtype=torch.float32))
with torch.no_grad():
    expected = dense(**tokens).last_hidden_state
    actual, gates = gates_of(meo, lambda: meo(**tokens).last_hidden_state)
plain = SentenceTransformer(source, device="cpu").encode(texts)
merged = SentenceTransformer(output, device="cpu", trust_remote_code=True).encode(texts)
print(json.dumps({
    "class": type(meo).__name__, "rms": relative_rms(actual, expected), "gate_spread": float(gates.std()),
    "tokenizer": type(tokenizer).__name__, "source_tokenizer": type(AutoTokenizer.from_pretrained(source)).__name__,
    "embeddings": float(abs(plain - merged).max()),
}))
"""


def test_minilm(tmp_path: Path) -> None:
    source, output = minilm(), tmp_path / "out"
    assert convert(source, output, verify="none").meo["level"] == "sequence"
    seen = _fresh(_MINILM, source, output)
    assert seen["class"] == "MeoBertModel"
    assert seen["tokenizer"] == seen["source_tokenizer"]
    assert seen["gate_spread"] > 0.1, "gates that are all equal would hide a routing fault"
    assert seen["rms"] <= 1e-5
    assert seen["embeddings"] <= 1e-5


_SMOLLM2 = """
folder, gguf, output, extracted = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
meo = spread(AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, dtype=torch.float32))
plain = AutoModelForCausalLM.from_pretrained(extracted, dtype=torch.float32).eval()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True)
greedy = dict(max_new_tokens=10, do_sample=False)
meo.set_task("law")
with torch.no_grad():
    expected = dense(**prompt).logits
    actual, gates = gates_of(meo, lambda: meo(**prompt).logits)
    texts = [tokenizer.decode(m.generate(**prompt, **greedy)[0]) for m in (dense, meo, plain)]
    texts.append(tokenizer.decode(meo.generate(**prompt, use_cache=False, **greedy)[0]))
print(json.dumps({
    "class": type(meo).__name__, "plain_class": type(plain).__name__, "rms": relative_rms(actual, expected),
    "gate_spread": float(gates.std()), "texts": texts, "extracted": relative_rms(plain(**prompt).logits, actual),
}))
"""


def test_smollm2(tmp_path: Path) -> None:
    source, output = smollm2(), tmp_path / "out"
    report = convert(source, output, num_experts=2, level="task", tasks=("law", "code"), verify="none")
    assert report.meo["level"] == "task"
    extracted = extract(output, tmp_path / "dense", task="code")
    seen = _fresh(_SMOLLM2, source.parent, source.name, output, extracted)
    assert (seen["class"], seen["plain_class"]) == ("MeoLlamaForCausalLM", "LlamaForCausalLM")
    assert seen["gate_spread"] > 0.1
    assert seen["rms"] <= 1e-5
    assert len(set(seen["texts"])) == 1, "dense, MEO, extracted and MEO without a cache write the same"
    assert "Paris" in seen["texts"][0]
    assert seen["extracted"] <= 1e-5


@pytest.mark.parametrize("level", ["token", "task"])
def test_minilm_other_levels(level: str, tmp_path: Path) -> None:
    """The converter's own checks pass, whole models and in a process without meo_hf."""
    report = convert(minilm(), tmp_path / "out", level=level, num_experts=3, gate_scope="projection", verify="full")
    assert report.verification == "full"
    assert report.passed
