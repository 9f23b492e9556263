"""Write a small synthetic Llama and fine-tunes of it as bf16 safetensors checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BASE_SCALE = 0.02
# A tenth of the base scale: large enough to survive rounding to bf16 in most of the weights.
DELTA_SCALE = 0.002


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory that receives base, expert-a, expert-b, ...")
    parser.add_argument("--experts", type=int, default=3, help="number of fine-tunes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3712)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--changed",
        choices=("all", "mlp"),
        default="all",
        help="which weights a fine-tune changes (default: %(default)s)",
    )
    return parser.parse_args()


def build_config(args: argparse.Namespace) -> LlamaConfig:
    """Build the configuration that every checkpoint shares."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def layer_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name inside a layer and the shape of each of its weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * (config.num_key_value_heads or 0)
    yield "self_attn.q_proj.weight", (hidden, hidden)
    yield "self_attn.k_proj.weight", (key_value, hidden)
    yield "self_attn.v_proj.weight", (key_value, hidden)
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def weight_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every weight of the model."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        for name, shape in layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def make_base(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Draw the weights of the base: unit norms and normal matrices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(BASE_SCALE).to(torch.bfloat16)
        for name, shape in weight_shapes(config)
    }


def make_fine_tune(base: dict[str, torch.Tensor], seed: int, changed: str) -> dict[str, torch.Tensor]:
    """Add a seeded normal change to the weights of the base that the fine-tune touches."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator).mul_(DELTA_SCALE).add_(weight).to(weight.dtype)
        if changed == "all" or ".mlp." in name
        else weight
        for name, weight in base.items()
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without merges, since no tool reads more than its files."""
    tokens = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, **SPECIAL_TOKENS
    )


def write_checkpoint(
    directory: Path,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
) -> None:
    """Write one checkpoint and print its size."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    print(f"{directory}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Write the base and its fine-tunes."""
    args = parse_arguments()
    config, tokenizer = build_config(args), build_tokenizer()
    base = make_base(config, args.seed)
    write_checkpoint(args.output / "base", config, tokenizer, base)
    for index in range(args.experts):
        weights = make_fine_tune(base, args.seed + 1 + index, args.changed)
        write_checkpoint(args.output / f"expert-{chr(ord('a') + index)}", config, tokenizer, weights)


if __name__ == "__main__":
    main()
