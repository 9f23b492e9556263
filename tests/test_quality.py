"""The quality benchmarks: ledgers resume, arms are what they are called, differences are tested, pages render."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import draw_experts, meo_of, merged_of, tiny_config, tiny_dense
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))

import classification
import multitask
import report
from arms import ADAPTERS, EMBEDDINGS, MAIN, Arm
from data import BERT_TINY, TextSet
from gates import recorded
from ledger import Ledger
from report_tools import compare, holm, verdict
from token_mixture import make_token_mixture
from training import packed, unpacked

WORDS = ("good", "bad", "sport", "film", "very", "not", "the", "a", "it")


def test_a_ledger_measures_once_and_survives_a_line_cut_short(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs.jsonl")
    calls: list[int] = []

    def measure(value: int) -> dict[str, Any]:
        calls.append(value)
        return {"value": value}

    ledger.measure({"arm": "a", "seed": 0}, lambda: measure(1))
    with ledger.path.open("a") as file:
        file.write('{"key": {"arm": "b"}, "result": {"val')
    again = Ledger(ledger.path)
    assert again.measure({"seed": 0, "arm": "a"}, lambda: measure(2)) == {"value": 1}
    assert again.measure({"arm": "b"}, lambda: measure(3)) == {"value": 3}
    assert calls == [1, 3]
    assert [entry["result"]["value"] for entry in again] == [1, 3]
    assert all(entry["versions"]["torch"] == torch.__version__ for entry in again)


def mixture(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return a MEO classifier with experts of its own each, and the same as a mixture with a gate per token."""
    settings = {"level": "sequence", "num_experts": 5, "top_k": 2, "balance_loss": 0.5}
    pair = [draw_experts(meo_of(tiny_dense("bert", BertForSequenceClassification), **settings), seed) for _ in "ab"]
    make_token_mixture(pair[1])
    return pair[0], pair[1]


def padded(extra: int) -> dict[str, Tensor]:
    """Return three rows of 6, 4 and 2 words, with `extra` more columns of padding."""
    ids = torch.randint(5, 99, (3, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(6 + extra)[None] < torch.tensor([6, 4, 2])[:, None]
    return {"input_ids": torch.where(mask, F.pad(ids, (0, extra)), 1), "attention_mask": mask.long()}


@torch.no_grad()
def test_the_mixture_adds_outputs_of_whole_experts_per_token() -> None:
    _, moe = mixture()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args[0], out)}))
        for path, module in merged_of(moe).items()
    ]
    inputs = padded(0)
    moe(**inputs)
    for hook in hooks:
        hook.remove()
    for path, module in merged_of(moe).items():
        states, outputs = seen[path]
        experts, chosen = module.experts, set()
        for row, token in inputs["attention_mask"].nonzero().tolist():
            x = states[row, token]
            logits = module.router.weight @ x
            best = logits.topk(2).indices
            chosen.add(tuple(sorted(best.tolist())))
            expected = torch.zeros_like(x)
            for gate, e in zip(logits[best].softmax(0), best, strict=True):
                h = module.activation(experts.up_proj[e] @ x + experts.up_proj_bias[e])
                expected += gate * (experts.down_proj[e] @ h + experts.down_proj_bias[e])
            torch.testing.assert_close(outputs[row, token], expected, rtol=1e-4, atol=1e-5)
        assert len(chosen) > 1, "tokens that all choose alike would hide a gate per row"


def test_padding_is_neither_balanced_nor_read_by_the_mixture() -> None:
    meo, moe = mixture()
    moe.train()
    losses, gradients = [], []
    for extra in (0, 7):
        torch.manual_seed(0)  # the same noise for the same real tokens
        out = moe(**padded(extra), labels=torch.tensor([0, 1, 0]))
        moe.zero_grad()
        out.loss.backward()
        losses.append(out.loss.item())
        assert out.aux_loss > 1e-3, "there is a balance loss in it"
        gradients.append([m.router.weight.grad.clone() for m in merged_of(moe).values()])
        assert all(m.experts.down_proj.grad.abs().sum() > 0 for m in merged_of(moe).values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    moe.eval()
    with torch.no_grad(), recorded(moe) as record:
        difference = (moe(**padded(3)).logits - meo(**padded(3)).logits).abs().max()
    assert {len(torch.cat(gates)) for gates in record.gates.values()} == {12}, "one gate for each real token"
    assert difference > 1e-3, "MEO and the mixture are different functions"


def test_differences_are_tested_with_rows_and_seeds() -> None:
    draw = np.random.default_rng(0)
    base = [draw.random(800) < 0.7 for _ in range(3)]
    better = [right | (draw.random(800) < 0.3) for right in base]
    same = compare(base, base)
    assert (same.difference, same.p, verdict(same, same.p)) == (0.0, 1.0, "within noise")
    gain = compare(better, base)
    assert gain.p is not None
    assert gain.difference == pytest.approx(np.mean(better) - np.mean(base))
    assert gain.p < 1e-3
    assert verdict(gain, gain.p) == "better"
    assert verdict(compare(base, better), gain.p) == "worse"
    lucky = [base[0] | True, *base[1:]]  # one seed alone carries the difference
    assert compare(lucky, base).p > 0.2  # type: ignore[operator]
    assert compare(better[:1], base[:1]).p is None
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert (unpacked(packed(base[0]), 800) == base[0]).all()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny BERT where the real one's package would be unpacked."""
    folder = tmp_path_factory.mktemp("cache")
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*special, *WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    BertForMaskedLM(tiny_config("bert")).save_pretrained(folder / BERT_TINY.path)
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / BERT_TINY.path)
    return folder


def some_rows(labels: int, count: int, seed: int) -> tuple[tuple[str, int], ...]:
    """Return rows whose first word tells the label."""
    draw = np.random.default_rng(seed)
    return tuple((" ".join([WORDS[i % labels], *draw.choice(WORDS, i % 5 + 1)]), i % labels) for i in range(count))


def tiny_set(name: str, labels: int) -> TextSet:
    parts = {
        part: some_rows(labels, count, i) for i, (part, count) in enumerate((("train", 40), ("dev", 9), ("test", 13)))
    }
    return TextSet(name, ("x",) * labels, 8, **parts)


def repeat(ledger: Ledger, more: Sequence[tuple[float, int]] = ()) -> None:
    """Add the sweeps and seeds that a test has no time for, as repetitions of what it measured."""
    for entry in list(ledger):
        for rate, seed in ((2e-3, 0), (3e-3, 0), (1e-3, 1), (2e-3, 1), (3e-3, 1), *more):
            ledger.measure({**entry["key"], "rate": rate, "seed": seed}, lambda entry=entry: entry["result"])


def test_arms_train_by_the_stock_trainer_and_the_page_renders(cache: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "classification.jsonl")
    text_set = tiny_set("rotten_tomatoes", 2)
    study = classification.Study("bert-tiny", text_set, 1, (1e-3, 2e-3, 3e-3), None, cache, ledger)
    arms = {arm.kind: arm for arm in MAIN if arm.top_k in (None, 2)}
    results = {kind: study.run(arms[kind], 1e-3, 0) for kind in ("dense", "sequence", "moe", "uniform", "frozen")}
    grown = study.run(Arm("sequence", 2, "fine-tunes"), 1e-3, 0)  # sweeps dense, for the rate of its experts
    assert len(list(ledger)) == 8
    assert study.run(arms["moe"], 1e-3, 0) == results["moe"]
    assert len(list(ledger)) == 8
    for kind, result in results.items():
        assert unpacked(result["right"], result["rows"]).mean() == pytest.approx(result["test"], abs=1e-5), kind
        assert (result["steps"], result["rows"]) == (2, 13)
    assert results["dense"]["gates"] == {}
    assert results["uniform"]["gates"]["entropy"] == pytest.approx(np.log(8), abs=1e-3)
    assert results["uniform"]["expert_distance"] < 1e-5, "equal gradients keep copies equal"
    assert results["frozen"]["gates"]["input_share"] > 0.1, "a frozen router still selects by input"
    assert results["sequence"]["expert_distance"] > 1e-4, "noise tells copies apart"
    assert grown["extra_seconds"] > 0
    assert grown["parameters"] == results["sequence"]["parameters"] > results["dense"]["parameters"]

    repeat(ledger)
    page = report.page(tmp_path)
    assert "| MEO sequence k=2 | " in page
    assert "1 of 6 further arms, 4 runs of 30 planned" in page
    assert "MEO sequence k=2 - moe k=2 | 2 |" in page
    assert "## Several tasks" not in page, "no ledger, no section"
    assert (tmp_path / "classification.png").stat().st_size > 1000
    assert "## Adapters" not in page, "nothing of it was measured"


def test_adapters_train_what_they_say_and_are_compared_with_all_weights(cache: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "classification.jsonl")
    study = classification.Study("bert-tiny", tiny_set("rotten_tomatoes", 2), 1, (1e-3,), None, cache, ledger)
    whole = {arm.kind: study.run(arm, 1e-3, 0) for arm in (Arm("dense"), Arm("sequence", 2, "copy"))}
    results = {(arm.kind, arm.adapter): study.run(arm, 1e-3, 0) for arm in ADAPTERS + EMBEDDINGS}
    assert len(list(ledger)) == 2 + len(results), "an adapter is an arm of its own"
    trained = {arm: result["trained"] for arm, result in results.items()}
    head_and_attention = trained["dense", "attention"]
    assert trained["sequence", "attention"] == head_and_attention
    on_experts = trained["sequence", "shared"] - head_and_attention
    assert trained["dense", "feed-forward"] == head_and_attention + on_experts
    assert trained["sequence", "per expert"] == head_and_attention + 8 * on_experts
    embeddings = trained["dense", "attention and embeddings"] - head_and_attention
    assert trained["sequence", "per expert and embeddings"] == trained["sequence", "per expert"] + embeddings
    assert embeddings == tiny_config("bert").vocab_size * tiny_config("bert").hidden_size
    assert trained["sequence", "per expert and routers"] > trained["sequence", "per expert"]
    for (kind, adapter), result in results.items():
        assert result["parameters"] == whole[kind]["parameters"], "adapters are merged"
        assert result["trained"] < result["parameters"]
        if kind == "sequence":
            assert result["gates"]["dead"] < 1
            assert (result["expert_distance"] > 1e-5) == adapter.startswith("per expert")
    repeat(ledger, more=[(4e-3, 0)])
    page = report.page(tmp_path)
    assert f"| MEO sequence k=2, LoRA shared | {100 * results['sequence', 'shared']['test']:.1f} ± 0.0 | " in page
    assert f" | {trained['sequence', 'shared']:,} | " in page
    assert "8 of 8 arms with adapters, 40 runs of 46 planned" in page
    assert "| dense, LoRA feed-forward - dense | 2 |" in page
    assert "2 of 11 arms" in page, "adapters are not counted among arms that train all weights"


def test_tasks_are_extracted_as_dense_models_that_score_the_same(cache: Path, tmp_path: Path) -> None:
    sets = (tiny_set("rotten_tomatoes", 2), tiny_set("bbc", 5))
    tasks = tuple(multitask.Task(i, s, slice(2 * i, 2 * i + len(s.labels))) for i, s in enumerate(sets))
    study = multitask.Study(tasks, 1, 40, cache, Ledger(tmp_path / "multitask.jsonl"))
    for scored in study.meo(multitask.MEO[0], 1e-3, 0)["tasks"].values():
        assert scored["extracted"]["class"] == "BertForSequenceClassification"
        assert scored["extracted"]["differing_predictions"] == 0
        assert scored["extracted"]["max_logit_difference"] < 1e-5
    study.shared(1e-3, 0)
    for task in tasks:
        study.each(task, 1e-3, 0)
    repeat(study.ledger)
    page = report.page(tmp_path)
    assert "| dense each | " in page
    assert "Extracted with `meo_hf.extract`: 4 dense models" in page
    assert "all test predictions are equal" in page


def test_the_first_rows_are_kept_and_held_out_rows_stay() -> None:
    whole = tiny_set("bbc", 5)
    assert whole.limited(7) == replace(whole, train=whole.train[:7])
    assert whole.limited(None) is whole
