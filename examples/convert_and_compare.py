"""Convert a dense checkpoint and compare it with its source on your own text.

python examples/convert_and_compare.py SRC OUT "some text" "more text"
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from meo_hf import convert


def main(source: str, output: str, *texts: str) -> None:
    """Convert `source` to `output` with four experts and print how far their hidden states are apart."""
    report = convert(source, output, num_experts=4)
    print(f"{report.family}: {report.parameters_before:,} -> {report.parameters_after:,} parameters")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        dense = AutoModel.from_pretrained(source).eval()(**tokens).last_hidden_state
        merged = AutoModel.from_pretrained(output).eval()(**tokens).last_hidden_state
    print(f"largest difference: {float((dense - merged).abs().max()):.1e}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(sys.argv[3:] or ["Hello, world."]))
