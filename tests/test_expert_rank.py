"""Whole experts kept as one weight and truncated parts: exact at full rank, as near as a rank allows below it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import run_cli, saved, tensors
from contracts import assert_close, assert_differs
from meo_hf.modeling.blocks_meo import find_blocks
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.modeling_meo import meo_model_class
from moe_contracts import MoeCase
from moe_tiny import moe_class, tiny_moe
from safetensors.torch import load_file, save_file
from tiny import main_class, tiny_dense, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf import convert, extract, verify_output
from meo_hf.conversion.factorise import Factorised
from meo_hf.errors import CheckFailedError, UnsupportedError, UsageError

pytestmark = pytest.mark.xdist_group("expert rank")


def fine_tunes(family: str, folder: Path, count: int = 3) -> list[Path]:
    """Write checkpoints whose feed-forwards differ a little from a base's."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        model = copy.deepcopy(tiny_dense(family))
        for block in find_blocks(model, FAMILIES[family]):
            for parameter in block.owner.parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
        model.save_pretrained(folder / f"expert-{number}")
        made.append(folder / f"expert-{number}")
    return made


def load(folder: Path, family: str) -> PreTrainedModel:
    return meo_model_class(main_class(family)).from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("family", "center"),
    [("llama", "mean"), ("phi3", "source"), ("gpt2", "mean"), ("bert", "source"), ("t5", "mean"), ("albert", "source")],
)
@torch.no_grad()
def test_at_full_rank_nothing_is_lost(family: str, center: str, tmp_path: Path) -> None:
    base, experts = saved(family, tmp_path / "base"), fine_tunes(family, tmp_path)
    options: dict[str, Any] = {"experts": experts, "level": "task", "tasks": ["a", "b", "c"], "verify": "none"}
    convert(base, tmp_path / "whole", **options)
    report = convert(base, tmp_path / "low", **options, expert_rank=1000, expert_center=center)
    assert {one["kept"] for one in report.factorised} == {1.0}
    inputs = {**tiny_inputs(family), "task_ids": torch.tensor([2, 0, 1])}
    whole, low = load(tmp_path / "whole", family), load(tmp_path / "low", family)
    assert_close(low(**inputs).logits, whole(**inputs).logits, 1e-5)


@torch.no_grad()
def test_a_rank_keeps_the_largest_singular_values(tmp_path: Path) -> None:
    base, experts = saved("llama", tmp_path / "base"), fine_tunes("llama", tmp_path)
    report = convert(base, tmp_path / "out", experts=experts, expert_rank=5)
    assert report.passed
    own, others = tensors(base), [tensors(expert) for expert in experts]
    assert len(report.factorised) == 6
    for one in report.factorised:
        weights = torch.stack([other[f"{one['map']}.weight"] for other in others]).double()
        values = torch.linalg.svdvals(weights - own[f"{one['map']}.weight"]).square()
        assert one["rank"] == 5
        assert one["kept"] == pytest.approx(float(values[:, :5].sum() / values.sum()), rel=1e-5)
        assert one["error"] == pytest.approx(float((values[:, 5:].sum() / weights.square().sum()).sqrt()), rel=1e-4)


def test_an_energy_takes_the_smallest_rank_that_keeps_it(tmp_path: Path) -> None:
    base, experts = saved("llama", tmp_path / "base"), fine_tunes("llama", tmp_path)
    report = convert(base, tmp_path / "out", experts=experts, expert_energy=0.9, verify="none")
    own, others = tensors(base), [tensors(expert) for expert in experts]
    for one in report.factorised:
        values = torch.stack(
            [torch.linalg.svdvals(o[f"{one['map']}.weight"] - own[f"{one['map']}.weight"]) for o in others]
        )
        shares = (values.square().sum(0).cumsum(0) / values.square().sum()).tolist()
        assert shares[one["rank"] - 1] >= 0.9 > shares[one["rank"] - 2]
        assert one["kept"] == pytest.approx(shares[one["rank"] - 1], rel=1e-5)


@torch.no_grad()
def test_a_task_is_extracted_from_truncated_experts(tmp_path: Path) -> None:
    base, experts = saved("gpt2", tmp_path / "base"), fine_tunes("gpt2", tmp_path)
    convert(base, tmp_path / "out", experts=experts, level="task", tasks=["a", "b"], expert_rank=3, verify="none")
    stored, generator = load_file(tmp_path / "out/model.safetensors"), torch.Generator().manual_seed(5)
    for name in sorted(name for name in stored if name.endswith("router.weight")):
        stored[name] = torch.randn(stored[name].shape, generator=generator)
    save_file(stored, tmp_path / "out/model.safetensors", {"format": "pt"})
    extract(tmp_path / "out", tmp_path / "dense", task="b")
    dense = main_class("gpt2").from_pretrained(tmp_path / "dense", dtype=torch.float64).eval()
    inputs = tiny_inputs("gpt2")
    meo = load(tmp_path / "out", "gpt2")
    expected = meo(**inputs, task_ids=torch.ones(3, dtype=torch.long)).logits
    assert_close(dense(**inputs).logits, expected, 1e-5)
    assert_differs(meo(**inputs, task_ids=torch.zeros(3, dtype=torch.long)).logits, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "nllb-moe"])
@torch.no_grad()
def test_a_mixture_at_full_rank_is_the_mixture(family: str, tmp_path: Path) -> None:
    case = MoeCase(family)
    tiny_moe(family).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "whole", verify="none")
    report = convert(tmp_path / "base", tmp_path / "low", expert_rank=1000, verify="none")
    whole, low = (
        meo_model_class(moe_class(family)).from_pretrained(tmp_path / name, dtype=case.dtype).eval()
        for name in ("whole", "low")
    )
    inputs = {**case.inputs(), **({"routing": "segment"} if case.causal else {})}
    assert_close(low(**inputs)[0], whole(**inputs)[0], case.tolerance)
    assert min(one["kept"] for one in report.factorised) > 1 - 1e-9
    assert any("take more memory as parts" in warning for warning in report.warnings)


def test_a_truncated_mixture_is_checked_and_faults_are_found(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "base")
    report = convert(tmp_path / "base", tmp_path / "out", expert_rank=6)
    assert report.verification == "full"
    assert report.parameters_after < report.parameters_before
    assert not any("take more memory" in warning for warning in report.warnings)
    assert report.bytes_to_write == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert "mean and a low-rank part" in (tmp_path / "out/README.md").read_text()
    assert verify_output(tmp_path / "out", "sample").passed
    stored = load_file(tmp_path / "out/model.safetensors")
    name = next(name for name in stored if name.endswith("low_rank.down.A"))
    stored[name][1] *= 1.5
    save_file(stored, tmp_path / "out/model.safetensors", {"format": "pt"})
    edited = json.loads((tmp_path / "out/meo_report.json").read_text())
    edited["files"] = {}
    (tmp_path / "out/meo_report.json").write_text(json.dumps(edited))
    failed = [check for check in verify_output(tmp_path / "out", "sample").checks if not check.passed]
    assert [check.name for check in failed] == ["experts are as near as their ranks allow"]


def test_factors_of_another_expert_fail_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Factorised._solve

    def turned(self: Factorised) -> dict[str, Tensor]:
        return {letter: factor.roll(1, 0) for letter, factor in solve(self).items()}

    monkeypatch.setattr(Factorised, "_solve", turned)
    base, experts = saved("llama", tmp_path / "base"), fine_tunes("llama", tmp_path)
    with pytest.raises(CheckFailedError, match="as near as their ranks allow"):
        convert(base, tmp_path / "out", experts=experts, expert_rank=4)


USAGE: list[tuple[dict[str, Any], str]] = [
    ({"expert_rank": 4, "expert_energy": 0.5}, "both say how much is kept"),
    ({"expert_rank": 0}, "no whole number >= 1"),
    ({"expert_energy": 1.5}, "over 0, up to 1"),
    ({"expert_energy": 0.0}, "over 0, up to 1"),
    ({"expert_center": "mean"}, "has no effect without --expert-rank"),
    ({"expert_rank": 4, "expert_center": "median"}, "'median' is unknown"),
]


@pytest.mark.parametrize(("options", "message"), USAGE, ids=[message for _, message in USAGE])
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, experts = saved("llama", tmp_path / "base"), fine_tunes("llama", tmp_path, 2)
    with pytest.raises(UsageError, match=message):
        convert(base, tmp_path / "out", experts=experts, **options)
    assert not (tmp_path / "out").exists()


def test_what_makes_no_sense_for_a_mixture_is_refused(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "base")
    for options, message in (
        ({"expert_rank": 4, "expert_center": "source"}, "have only their mean"),
        ({"expert_rank": 4, "align": True}, "so --align has no place"),
        ({"expert_rank": 4, "reference": True}, "so --reference has no place"),
        ({"adapters": {"a": "b"}}, "--adapter needs a dense base"),
        ({"outside": "merge"}, "--outside has no effect on a mixture"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(tmp_path / "base", tmp_path / "out", **options)
    tiny_moe("jetmoe").save_pretrained(tmp_path / "jet")
    with pytest.raises(UnsupportedError, match="cannot keep low-rank experts"):
        convert(tmp_path / "jet", tmp_path / "out", expert_rank=4)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_was_lost(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "base")
    ran = run_cli("convert", tmp_path / "base", tmp_path / "out", "--expert-energy", 0.8, "--verify", "none")
    assert ran.code == 0, ran.err
    assert "relative error 0." in ran.out
    assert "one weight and parts of" in ran.out


def test_an_alike_pair_needs_no_rank() -> None:
    weight = torch.randn(8, 6)
    one = Factorised("x", (2, 8, 6), lambda: torch.stack([weight, weight]), None)
    one.rank = one.rank_for(0.99)
    assert one.rank == 1
    assert not (one.factor("B").transpose(1, 2) @ one.factor("A")).any()
    assert one.best().error == 0
