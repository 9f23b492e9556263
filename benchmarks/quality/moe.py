"""A mixture of experts becomes a MEO model: what is lost, and what training on a little of its text wins back.

    python ../compare/train_moe.py ../../.assets/olmoe-8m ...   # as benchmarks/compare/README.md says
    python moe.py run     # all rows; goes on where it stopped
    python moe.py plain   # only what is not trained

Every row is compared with the source on held-out text. Recovery distils the source (KL divergence of its predictions)
on 1 %, 5 % and 20 % of the tokens that it was trained on. Cheaper variants of the source are recovered in the same
way, and the source itself goes on learning the text, since its divergence from itself leaves nothing to learn.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from lm_arms import quiet
from text_data import ASSETS, corpora
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from meo_hf import convert
from meo_hf.benchmark.compare_quality import check_causal, measure_quality, tallied_gates
from meo_hf.benchmark.compare_speed import flops_per_token
from meo_hf.benchmark.compare_variants import Subject, weight_bytes
from meo_hf.texts import cut_windows, read_text
from meo_hf.training.recover import RecoverySettings, recover

HERE = Path(__file__).parent
SOURCE_TOKENS = 3_600_000
"""Tokens that the source was trained on."""
FRACTIONS = (0.01, 0.05, 0.2)
RATES = (6e-4, 2e-3, 2e-4)
SEEDS = (0, 1, 2)
CHUNK = 8000
"""Characters in a row that a draw of the source's text takes; about 4 windows."""
CHARACTERS = 4.6
"""Characters per token, rounded up, so that a draw never falls short of its tokens."""


@dataclass(frozen=True)
class Row:
    """One way to make something cheaper of the source.

    `kind` is source, uniform (the average of all experts) or meo; `loss` is what it is trained by: kl or lm.
    """

    name: str
    kind: str
    top_k: int = 2
    segment: int = 64
    pooling: str = "probs"
    align: bool = False
    loss: str = "kl"


ROWS = {
    row.name: row
    for row in (
        Row("source", "source", loss="lm"),
        Row("source, top-1", "source", top_k=1),
        Row("uniform average", "uniform"),
        Row("uniform average, aligned", "uniform", align=True),
        Row("MEO, hidden", "meo", pooling="hidden"),
        Row("MEO, probs", "meo"),
        Row("MEO, hidden, aligned", "meo", pooling="hidden", align=True),
        Row("MEO, probs, aligned", "meo", align=True),
        Row("MEO, probs, aligned, by next tokens", "meo", align=True, loss="lm"),
    )
}
MAIN = ("MEO, probs, aligned", "source, top-1", "uniform average, aligned", "source")
OTHERS = ("MEO, probs", "MEO, hidden", "MEO, probs, aligned, by next tokens", "uniform average")
STAGES = (  # rows, fractions, seeds; the most telling first
    (MAIN, (0.05, 0.01), SEEDS),
    (MAIN[:2], (0.2,), SEEDS[:1]),
    (OTHERS, (0.05, 0.01), SEEDS),
)


@dataclass(frozen=True)
class Settings:
    """Sizes of a recovery step and of what is measured."""

    window: int = 512
    rows: int = 4
    test_windows: int = 96
    validation_windows: int = 24
    source_tokens: int = SOURCE_TOKENS


@dataclass
class Study:
    """The source, the text, and the ledger."""

    folder: Path
    source: Any
    text: str
    validation: Tensor
    test: Tensor
    settings: Settings
    ledger: Ledger

    @classmethod
    def open(cls, folder: Path, texts: list[str], settings: Settings, ledger: Ledger) -> Study:
        """Load the source and cut the text; the windows to choose by are never trained on here."""
        tokenizer, text = AutoTokenizer.from_pretrained(folder), "\n\n".join(texts)
        held = len(text) // 50
        with quiet():
            test = cut_windows(tokenizer, read_text(folder / "heldout.txt"), settings.window, 10**6)
            validation = cut_windows(tokenizer, text[-held:], settings.window, 10**6)
        test, validation = (
            windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]
            for windows, count in ((test, settings.test_windows), (validation, settings.validation_windows))
        )
        return cls(folder, _load(folder), text[:-held], validation, test, settings, ledger)

    def write(self, row: Row, folder: Path) -> Path:
        """Write a row's model, untrained, into a folder, and return where it is."""
        out = folder / "meo"
        if row.kind != "source":
            convert(
                self.folder, out, segment_length=row.segment, pooling=row.pooling, align=row.align, copy=not row.align,
                verify="none",
            )  # fmt: skip
        if row.kind == "meo":
            return out
        if row.kind == "source":
            model = with_top_k(self.source, row.top_k)
        else:
            model = uniform(self.source, _load(out), mean_gate_sum(self.source, self.validation))
        model.save_pretrained(folder / "stock")
        AutoTokenizer.from_pretrained(self.folder).save_pretrained(folder / "stock")
        return folder / "stock"

    def draw(self, tokens: int, seed: int) -> str:
        """Draw pieces of the source's text that hold at least so many tokens."""
        count = -(-int(tokens * CHARACTERS) // CHUNK)
        begins = torch.randperm(len(self.text) // CHUNK, generator=torch.Generator().manual_seed(seed))[:count] * CHUNK
        return "\n\n".join(self.text[begin : begin + CHUNK] for begin in begins.tolist())

    def measure(self, row: Row, model: Any) -> dict[str, Any]:
        """Compare a model with the source on held-out windows; refuses one that reads what it predicts."""
        model.eval()
        source, subject = Subject.of("source", self.source), Subject.of(row.name, model)
        check_causal(subject, self.test[:1], 0, "float32")
        own = source if row.kind == "source" and row.top_k == 2 and _same(model, self.source) else subject
        with quiet():
            quality = measure_quality(source, own, self.test, 4, lambda what: None)
            chosen = measure_quality(source, own, self.validation, 4, lambda what: None)
            flops = flops_per_token(subject, self.test[:1])
        result = {
            "perplexity": round(quality.perplexity, 3), "kl": round(quality.kl, 4),
            "agreement": round(quality.agreement, 4), "tokens": quality.tokens,
            "validation_kl": round(chosen.kl, 5), "validation_loss": round(chosen.nll / chosen.tokens, 5),
            "flops_per_token": round(flops), "megabytes": round(weight_bytes(model) / 1e6, 2),
        }  # fmt: skip
        return result | (self._gates(subject) if row.kind == "meo" else {})

    @torch.inference_mode()
    def _gates(self, subject: Subject) -> dict[str, float]:
        with tallied_gates(subject.model) as tallies, quiet():
            subject.logits(self.test[:16])
        values = list(tallies.values())
        return {
            "gate_entropy": round(sum(tally.entropy for tally in values) / len(values), 4),
            "distance": round(sum(tally.distance for tally in values) / len(values), 4),
        }

    def plain(self, row: Row) -> dict[str, Any]:
        """Measure a row without training."""
        key = {"row": row.name, "fraction": 0, "settings": asdict(self.settings)}
        return self.ledger.measure(key, lambda: self._plain(row))

    def _plain(self, row: Row) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            return self.measure(row, _load(self.write(row, Path(scratch))))

    def recovered(self, row: Row, fraction: float, rate: float, seed: int) -> dict[str, Any]:
        """Train a row on a fraction of the source's tokens, and measure it."""
        key = {
            "row": row.name, "fraction": fraction, "rate": rate, "seed": seed, "settings": asdict(self.settings),
        }  # fmt: skip
        return self.ledger.measure(key, lambda: self._recovered(row, fraction, rate, seed))

    def _recovered(self, row: Row, fraction: float, rate: float, seed: int) -> dict[str, Any]:
        own = self.settings
        steps = round(fraction * own.source_tokens / (own.rows * own.window))
        settings = RecoverySettings(
            steps=steps, batch_size=own.rows, window=own.window, learning_rate=rate, held_out=0.0, seed=seed,
            kl_weight=float(row.loss == "kl"), lm_weight=float(row.loss == "lm"), device="cpu", save_steps=steps,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "text.txt").write_text(self.draw(steps * own.rows * own.window, seed), encoding="utf-8")
            report = recover(
                self.write(row, folder), folder / "recovered", self.folder, [folder / "text.txt"], settings
            )
            model = _load(folder / "recovered")
        done = {"steps": report.steps, "epochs": round(report.epochs, 3), "seconds": round(report.seconds, 1)}
        return self.measure(row, model) | done

    def best_rate(self, row: Row) -> float:
        """Return the learning rate with the lowest loss on validation windows, of the kind that the row is trained by.

        It is chosen at the smaller fraction and seed 0, and taken for both.
        """
        by = f"validation_{'kl' if row.loss == 'kl' else 'loss'}"
        return min(RATES, key=lambda rate: self.recovered(row, FRACTIONS[0], rate, 0)[by])

    def plain_rows(self) -> None:
        """Measure all rows as they are."""
        for row in ROWS.values():
            if row.loss == "kl" or row.kind == "source":
                say(row, 0, 0, 0, self.plain(row))

    def grid(self, stages: int | None = None) -> None:
        """Measure all rows as they are, then recover them by stages: learning rates, seeds, the larger fraction."""
        self.plain_rows()
        for names, fractions, seeds in STAGES[:stages]:
            rows = [ROWS[name] for name in names]
            for rate in RATES:
                for row in rows:
                    say(row, FRACTIONS[0], rate, 0, self.recovered(row, FRACTIONS[0], rate, 0))
            for seed in seeds:
                for fraction in fractions:
                    for row in rows:
                        rate = self.best_rate(row)
                        say(row, fraction, rate, seed, self.recovered(row, fraction, rate, seed))


def planned() -> int:
    """Return how many recoveries the grid has."""
    rows = {name for names, _, _ in STAGES for name in names}
    runs = sum(len(names) * len(fractions) * len(seeds) for names, fractions, seeds in STAGES)
    return runs + len(rows) * (len(RATES) - 1)


def _load(folder: Path) -> Any:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else a temporary folder's files would stay mapped
    return model


def _same(model: Any, source: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), source.parameters(), strict=True))


def with_top_k(model: OlmoeForCausalLM, top_k: int) -> OlmoeForCausalLM:
    """Let each token of an OLMoE select another number of experts."""
    config = copy.deepcopy(model.config)
    config.num_experts_per_tok = top_k
    made = type(model)(config)
    made.load_state_dict(model.state_dict())
    return made


def uniform(source: OlmoeForCausalLM, meo: Any, sums: list[float]) -> OlmoeForCausalLM:
    """Return an OLMoE with one expert, the average of all experts of a MEO model, which may be aligned.

    What the source's gates sum to, on average, is in the last weights.
    """
    config = copy.deepcopy(source.config)
    config.num_experts = config.num_experts_per_tok = 1
    made = type(source)(config)
    made.load_state_dict({k: v for k, v in source.state_dict().items() if ".mlp." not in k}, strict=False)
    with torch.no_grad():
        for layer, other, total in zip(made.model.layers, meo.model.layers, sums, strict=True):
            layer.mlp.experts.gate_up_proj.copy_(other.mlp.experts.gate_up_proj.mean(0, keepdim=True))
            layer.mlp.experts.down_proj.copy_(other.mlp.experts.down_proj.mean(0, keepdim=True) * total)
    return made


@torch.inference_mode()
def mean_gate_sum(source: OlmoeForCausalLM, windows: Tensor) -> list[float]:
    """Return for each layer what the gates of a token's selected experts sum to, on average."""
    logits = source(windows, output_router_logits=True, use_cache=False).router_logits
    top_k = source.config.num_experts_per_tok
    return [float(layer.float().softmax(-1).topk(top_k).values.sum(-1).mean()) for layer in logits]


def say(row: Row, fraction: float, rate: float, seed: int, result: dict[str, Any]) -> None:
    """Print one line about a row."""
    names = ("perplexity", "kl", "agreement", "validation_kl", "flops_per_token", "seconds")
    shown = " ".join(f"{name} {result[name]:.4g}" for name in names if name in result)
    print(f"{row.name:28} {fraction:.0%} rate {rate:g} seed {seed}  {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "plain"))
    parser.add_argument("--source", type=Path, default=ASSETS / "olmoe-8m")
    parser.add_argument("--ledger", type=Path, default=HERE / "moe.jsonl")
    parser.add_argument("--stages", type=int, help="only the first so many stages (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits = corpora()
    texts = splits["addresses"].train + splits["plays"].train
    study = Study.open(args.source, texts, Settings(), Ledger(args.ledger))
    if args.what == "run":
        study.grid(args.stages)
    else:
        study.plain_rows()


if __name__ == "__main__":
    main()
