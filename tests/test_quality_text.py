"""The language benchmarks: texts and questions, up-cycling that changes no function, runs that resume, pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))

import lm
import moe
import report_lm
import report_moe
import report_seq2seq
import seq2seq
import text_data
import text_pairs
from ledger import Ledger
from lm_arms import ARMS, build, dense_config, uniform_gates, upcycle
from lm_measure import losses
from text_data import END, Lead, Split

WORDS = ("the", "a", "cat", "dog", "house", "river", "of", "in", "sees", "old", "small", "1901", "Rome", "and", "by")


def texts(count: int, seed: int, length: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in draw) for draw in draws]


def test_leads_are_read_and_empty_ones_left_out() -> None:
    entries = {
        "b": {"title": "B", "extract": " Text. ", "description": None, "topic": "Arts"},
        "a": {"title": "A", "extract": "More.", "description": "one line", "topic": "Arts"},
        "c": {"title": "C", "extract": "", "description": "", "topic": ""},
    }
    leads = text_data.parse_leads(json.dumps(entries))
    assert leads == [Lead("A", "More.", "one line", "Arts"), Lead("B", "Text.", "", "Arts")]


def test_a_split_holds_out_whole_documents() -> None:
    split = Split.of([str(i) for i in range(10)], 5)
    assert split.held_out == ["2", "7"]
    assert sorted(split.train + split.held_out) == [str(i) for i in range(10)]


def test_windows_hold_every_token_and_bytes_are_counted() -> None:
    documents = ["A café, naïve.", *texts(4, 0)]
    tokenizer = text_data.train_tokenizer(documents, 300)
    windows = text_data.windows_of(tokenizer, documents, 8)
    joined = tokenizer.decode(windows.flatten())
    assert "".join(document + END for document in documents).startswith(joined)
    assert windows.numel() > 100
    sizes = text_data.bytes_per_token(tokenizer)
    ids = tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    assert int(sizes[torch.tensor(ids)].sum()) == len(documents[0].encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_an_archive_that_is_another_one_is_refused(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "open('x.tgz', 'w').write('no')")
    with pytest.raises(Exception, match="has sha256"):
        text_data.Archive(command, "x.tgz", "0" * 64).fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_clozes_are_filled_by_their_answers() -> None:
    lead = Lead("Tagetes", "Tagetes is a genus of 50 species in the family Asteraceae. It grows in Mexico.", "", "")
    found = text_pairs.cloze(lead)
    assert found is not None
    assert found.answer in ("Tagetes", "50", "Asteraceae", "Mexico")
    assert found.question.replace(text_pairs.MASK, found.answer) in lead.extract
    assert text_pairs.cloze(lead) == found
    answers = {
        pair.answer
        for number in range(40)
        if (pair := text_pairs.cloze(Lead(f"T{number}", lead.extract, "", ""))) is not None
    }
    assert answers == {"50", "Asteraceae", "Mexico"}  # a sentence's first word is a name only where it is the title
    assert text_pairs.cloze(Lead("Zero", "It is nothing at all.", "", "")) is None


def test_of_packages_that_begin_alike_one_is_kept() -> None:
    body = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    entries = [
        f"Package: x\nDescription-en: a tool\n {body}\n .\n This package holds it.",
        f"Package: x-dev\nDescription-en: a tool (headers)\n {body}\n .\n This package holds headers.",
        "Package: z\nDescription-en: short\n too short.",
    ]
    pairs = text_pairs.parse_descriptions("\n\n".join(entries))
    assert pairs == [text_pairs.Pair(f"{body} This package holds it.", "", "a tool")]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lm") / "dense"
    LlamaForCausalLM(dense_config(300, 32, tiny=True)).save_pretrained(folder)
    return folder


def test_every_arm_begins_as_the_dense_model(dense: Path) -> None:
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = LlamaForCausalLM.from_pretrained(dense).eval()(ids).logits
    for name in ("moe", "meo-segment-64", "meo-prompt", "meo-frozen-random", "meo-uniform"):
        arm = ARMS[name]
        model = build(arm, dense, 0, ids).eval()
        own = {"routing": "segment"} if arm.kind == "meo" else {}
        torch.testing.assert_close(model(ids, **own).logits, expected, atol=1e-5, rtol=1e-5)
        trained = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert bool(trained) == (arm.gates != "learned")


def test_the_mixture_is_one(dense: Path) -> None:
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    model = upcycle(LlamaForCausalLM.from_pretrained(dense)).eval()
    before = model(ids).logits
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3] *= 2  # some tokens select it, and not all
    changed = (model(ids).logits - before).abs().amax(-1) > 1e-6
    assert changed.any()
    assert not changed.all()
    assert model.train()(ids, labels=ids).aux_loss is not None


def tiny_study(folder: Path) -> lm.Study:
    settings = lm.Settings(
        vocabulary=300, window=32, rows=2, first_steps=3, steps=2, test_windows=3, validation_windows=2, tiny=True
    )
    splits = {kind: Split.of(texts(40, seed), 4) for seed, kind in enumerate(("wikipedia", "addresses", "plays"))}
    return lm.Study.prepare(settings, splits, folder, Ledger(folder / "lm.jsonl"))


def test_a_language_model_is_trained_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(tmp_path)
    found = {name: study.run(ARMS[name], lm.RATES[1], 0) for name in ("dense", "meo-prompt", "meo-segment-64")}
    assert len(list(study.ledger)) == 4

    def never(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(lm.Study, "_run", never)
    again = tiny_study(tmp_path)
    assert again.run(ARMS["meo-prompt"], lm.RATES[1], 0) == found["meo-prompt"]
    result = found["meo-segment-64"]
    assert result["expert_spread"] > 0
    assert result["flops_per_token"] > found["dense"]["flops_per_token"]
    assert len(result["windows"]) == len(study.texts.test.windows) == 9
    page = report_lm.section(tmp_path)
    assert page is not None
    assert "| meo-segment-64 |" in page
    assert "one seed: not tested" in page
    assert (tmp_path / "lm.png").stat().st_size > 5000


def test_averaged_gates_are_another_model(dense: Path) -> None:
    ids = torch.randint(300, (1, 32), generator=torch.Generator().manual_seed(1))
    model = build(ARMS["meo-segment-64-drop"], dense, 0, ids).eval()
    held = lm.HeldOut(ids, ["wikipedia"], torch.ones(300, dtype=torch.long))
    own = losses(model, held, "segment")
    with uniform_gates(model):
        averaged = losses(model, held, "segment")
    assert (own - averaged).abs().max() > 1e-4
    assert torch.equal(losses(model, held, "segment"), own)


def test_the_average_of_equal_experts_is_the_mixture() -> None:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    source = OlmoeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in source.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(layer.mlp.experts, name)
                stack.copy_(stack[:1].expand_as(stack).clone())
    ids = torch.randint(60, (2, 9))
    average = moe.uniform(source, source, [1.0, 1.0]).eval()
    torch.testing.assert_close(average(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moe.uniform(source, source, [0.5, 1.0]).eval()(ids).logits, source(ids).logits)


def test_summaries_and_answers_are_trained_and_scored(tmp_path: Path) -> None:
    pairs = {
        "summary": [text_pairs.Pair(text, "", text.split(" the ")[0][:20]) for text in texts(240, 3)],
        "answer": [text_pairs.Pair(text, text.replace("Rome", "<mask>"), "Rome") for text in texts(240, 4)],
    }
    settings = seq2seq.Settings(
        vocabulary=300, source_tokens=40, target_tokens=6, rows=2, first_steps=2, steps=2, test_pairs=2,
        validation_pairs=1, tiny=True,
    )  # fmt: skip
    study = seq2seq.Study.prepare(settings, pairs, tmp_path, Ledger(tmp_path / "seq2seq.jsonl"))
    found = study.run("meo-task", seq2seq.RATES[0], 0)
    assert found["summary_loss"] != found["answer_loss"]
    assert study._scores("answer", [pair.answer for pair in study.pairs.test["answer"]]) == {
        "exact_match": 100.0,
        "f1": 100.0,
    }
    page = report_seq2seq.section(tmp_path)
    assert page is not None
    assert "| meo-task |" in page


def test_sections_without_a_ledger_are_left_out(tmp_path: Path) -> None:
    assert [one.section(tmp_path) for one in (report_lm, report_moe, report_seq2seq)] == [None] * 3


def test_recoveries_are_shown_at_the_rate_that_was_chosen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "moe.jsonl")
    own = {"settings": {"source_tokens": 100, "test_windows": 2}}

    def result(perplexity: float) -> dict[str, float]:
        names = ("kl", "agreement", "validation_kl", "validation_loss", "flops_per_token", "megabytes")
        return dict.fromkeys(names, perplexity / 1e3) | {"perplexity": perplexity}

    for row, value in (("source, top-1", 90.0), ("MEO, probs, aligned", 250.0), ("uniform average, aligned", 260.0)):
        ledger.measure({"row": row, "fraction": 0, **own}, lambda value=value: result(value))
    for rate, seed, value in ((6e-4, 0, 150.0), (2e-3, 0, 120.0), (2e-3, 1, 130.0), (6e-4, 1, 10.0)):
        key = {"row": "MEO, probs, aligned", "fraction": 0.01, "rate": rate, "seed": seed, **own}
        ledger.measure(key, lambda value=value: result(value))
    page = report_moe.section(tmp_path)
    assert page is not None
    assert "| MEO, probs, aligned | 1% | 250.00 | 125.00 ± 7.07 |" in page
    assert "(2 of 3 tried)" in page
    assert "higher than the source's top-1" in page
    assert f"4 runs of {moe.planned()} planned" in page
