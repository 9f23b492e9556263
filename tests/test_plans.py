"""Which plan a call takes: from shapes alone, where it should, visible, and as the user says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from contracts import Case, logits_of, merged_of
from meo_hf.modeling import plans_meo
from meo_hf.modeling.cache_meo import merged_bytes
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.plans_meo import (
    RATES,
    Rates,
    Work,
    choose,
    costs_of,
    executed,
    rates_of,
    saved_by_keeping,
    write_rates,
)
from moe_contracts import MoeCase
from transformers import DynamicCache

BERT_BASE = Work(8, 8 * 128, 16, 4, 3072, 768)
MIXTRAL = Work(1, 1, 8, 2, 28672, 4096, "bfloat16", "cuda")
ZERO = json.dumps({"rates": {"cpu/float32": {**asdict(RATES["cpu", "float32"]), "read": 0}}})
OLMOE = Work(1, 1, 64, 8, 2048, 2048, "bfloat16", "cuda")


@pytest.fixture(autouse=True)
def _built_in_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever a user of this machine has measured."""
    monkeypatch.setenv("MEO_HF_RATES", str(tmp_path / "rates.json"))
    plans_meo._calibrated.cache_clear()
    costs_of.cache_clear()
    executed.clear()
    yield
    plans_meo._calibrated.cache_clear()
    costs_of.cache_clear()


@pytest.mark.parametrize(
    ("work", "plan"),
    [
        (BERT_BASE, "accumulate"),
        (replace(BERT_BASE, gates=1, tokens=128), "accumulate"),
        (replace(BERT_BASE, tokens=8), "combine"),
        (replace(BERT_BASE, gates=64, tokens=64 * 128), "product"),
        (replace(BERT_BASE, dtype="bfloat16"), "product"),
        (replace(OLMOE, device="cpu", dtype="float32", tokens=256), "accumulate"),
        (replace(MIXTRAL, gates=32, tokens=32), "combine"),
        (replace(OLMOE, gates=8, tokens=8 * 16), "fused"),
        (replace(OLMOE, gates=8, tokens=8 * 4096), "accumulate"),
        (replace(OLMOE, gates=256, tokens=256 * 4096), "product"),
    ],
)
def test_choices_by_built_in_rates(work: Work, plan: str) -> None:
    assert choose(work) == plan
    assert costs_of(work)[plan] == min(costs_of(work).values())


def test_keeping_pays_until_more_rows_than_experts_decode() -> None:
    """A kept expert is read for every row; outputs are combined from each expert once."""
    assert saved_by_keeping(MIXTRAL) > 0
    assert saved_by_keeping(replace(MIXTRAL, gates=32, tokens=32)) < 0
    assert saved_by_keeping(replace(OLMOE, gates=32, tokens=32)) > 0
    assert saved_by_keeping(replace(BERT_BASE, gates=1, tokens=1)) > 0


def test_without_a_kernel_nothing_is_fused() -> None:
    work = replace(OLMOE, gates=8, tokens=8 * 16)
    assert choose(work) == "fused" != choose(work, fuses=False)


def test_measured_rates_take_over_until_their_file_goes() -> None:
    assert choose(BERT_BASE) == "accumulate"
    path = write_rates({"cpu/float32": replace(RATES["cpu", "float32"], accumulate=1e6)}, {"machine": "slow"})
    assert choose(BERT_BASE) == "product"
    assert json.loads(path.read_text())["about"] == {"machine": "slow"}
    assert rates_of(replace(BERT_BASE, dtype="bfloat16")) == RATES["cpu", "bfloat16"]
    path.unlink()
    plans_meo._calibrated.cache_clear()
    costs_of.cache_clear()
    assert choose(BERT_BASE) == "accumulate"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rates": {"cpu/float32": {"read": 1}}}', '{"rates": {"cpu/float32": 3}}', ZERO]
)
def test_a_spoilt_file_of_rates_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    assert rates_of(BERT_BASE) == RATES["cpu", "float32"]


def test_plans_are_shown_and_taken() -> None:
    case = Case("bert", "sequence")
    model, inputs = case.drawn().float(), case.inputs()
    rows, tokens = inputs["input_ids"].shape
    planned = model.meo_plan(rows, tokens)
    assert [row.path.rpartition(".")[2] for row in planned] == ["up_proj", "down_proj"] * len(merged_of(model))
    logits_of(model, inputs)
    assert executed == {plan: sum(row.plan == plan for row in planned) for plan in {row.plan for row in planned}}
    table = str(planned).splitlines()
    assert table[0].split()[:5] == ["layers", "map", "gates", "tokens", "plan"]
    assert len(table) == 3
    assert repr(planned) == str(planned)


@pytest.mark.parametrize("plan", ["accumulate", "product", "combine"])
@pytest.mark.parametrize("case", [Case("llama", "segment"), MoeCase("gpt_oss")], ids=["llama", "gpt_oss"])
def test_a_plan_can_be_forced(plan: str, case: Case | MoeCase) -> None:
    model = (case.merged(case.stock()) if isinstance(case, MoeCase) else case.drawn()).double().eval()
    inputs = {"input_ids": torch.arange(20).reshape(2, 10) + 5}
    expected = logits_of(model, inputs)
    executed.clear()
    model.set_meo_plan(plan)
    assert {row.plan for row in model.meo_plan(2, 10)} == {plan}
    torch.testing.assert_close(logits_of(model, inputs), expected)
    assert set(executed) == {plan}
    model.set_meo_plan(None)
    assert {row.plan for row in model.meo_plan(2, 10)} != {"fused"}


def test_combined_outputs_stay_what_the_config_says() -> None:
    case = Case("bert", "sequence")
    model = case.drawn(combine="outputs")
    logits_of(model, case.inputs())
    assert set(executed) == {"combine"} == {row.plan for row in model.meo_plan()}


def test_unknown_plans_and_stages_are_refused() -> None:
    model = Case("bert", "sequence").drawn()
    with pytest.raises(MeoConfigError, match="plan is 'fast'; allowed: accumulate, product, fused, combine"):
        model.set_meo_plan("fast")
    with pytest.raises(MeoConfigError, match="stage is 'decode'; this model has: prefill"):
        model.meo_plan(stage="decode")


@pytest.mark.parametrize("level", ["sequence", "segment"])
def test_steps_that_combine_outputs_are_those_with_kept_experts(level: str) -> None:
    """Where more rows than experts decode, nothing is kept, and nothing else changes."""
    case = Case("llama", level)
    model = case.drawn().float()
    ids = torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    prompt = {"prompt_lengths": torch.full((8,), 9)} if level == "sequence" else {}

    def decode() -> tuple[torch.Tensor, int]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            logits = [model(ids[:, :9], past_key_values=cache, **prompt).logits]
            logits += [model(ids[:, at : at + 1], past_key_values=cache, **prompt).logits for at in range(9, 12)]
        return torch.cat(logits, 1), merged_bytes(cache)

    expected, kept = decode()
    assert kept
    assert {row.plan for row in model.meo_plan(8, 1, "decode")} == {"cached"}
    write_rates({"cpu/float32": Rates(1e6, 1e12, 1e5, 1e5, 1e5, 1e9, 1e-12)}, {})
    costs_of.cache_clear()
    found, kept = decode()
    assert {row.plan for row in model.meo_plan(8, 1, "decode")} == {"combine"}
    assert not kept
    torch.testing.assert_close(found, expected)
    assert asdict(rates_of(BERT_BASE))["read"] == 1e6
