"""The prefill and conversion benchmarks: they refuse to time a wrong thing, and write what they saw."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import listing, run_cli, saved
from meo_hf.modeling import merged_linear_meo
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.router_meo import MeoRouter
from rich.console import Console
from test_bench_decode import first_expert
from tiny import draw_experts, meo_config, merged_of, spread, tiny_dense
from torch import Tensor
from transformers import BertModel

from meo_hf import cli_progress, convert
from meo_hf.benchmark import convert_timing, moe, prefill
from meo_hf.benchmark.convert_timing import VARIANTS, Run
from meo_hf.benchmark.decode_variants import Models
from meo_hf.benchmark.machine import Machine
from meo_hf.benchmark.prefill import Prefilled, Timing, steps_of, time_prefill
from meo_hf.benchmark.prefill_checks import check_experts, check_variant
from meo_hf.benchmark.prefill_report import notes
from meo_hf.benchmark.prefill_setup import PRESETS, PrefillSettings, Text, draw_texts, variants_of
from meo_hf.errors import CheckFailedError

SETTINGS = PrefillSettings(num_experts=4, top_k=(2, 3), batch=(2, 1), tokens=(9,), rounds=2)
SMALL = ("--num-experts", "3", "--top-k", "1,3", "--batch", "2", "--tokens", "9", "--rounds", "1")
SEGMENT = 3


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long samples are for a quiet machine, not for tests."""
    monkeypatch.setattr(prefill, "SAMPLE", 1e-9)


def tiny_models(family: str) -> Models:
    """Return a pair of models whose segments are shorter than the texts."""
    encodes = family == "bert"
    dense = tiny_dense(family, head=BertModel if encodes else None)
    options = {"level": "sequence", "num_experts": 4, **({} if encodes else {"segment_length": SEGMENT})}
    meo = meo_model_class(type(dense))(meo_config(dense.config, **options))
    draw_experts(spread(meo), spread_of_gates=0.3).eval().load_state_dict(dense.state_dict(), strict=False)
    return Models(dense, meo)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "opt"])
def test_variants_take_turns_on_every_text(family: str) -> None:
    said: list[str] = []
    models = tiny_models(family)
    done = list(time_prefill(SETTINGS, models, said.append))
    names = [str(variant) for variant in variants_of(SETTINGS, models)]
    assert len(said) == steps_of(SETTINGS, models)
    assert [one.text for one in done] == [Text(2, 9), Text(1, 9)]
    assert said[: len(names)] == [f"batch 2, 9 tokens: checking {name}" for name in names]
    last = [line.rpartition(": ")[2] for line in said if line.startswith("batch 1, 9 tokens: round 2")]
    assert last == names[2:] + names[:2]
    kinds = {"meo"} if family == "bert" else {"meo (prompt)", "meo (segment)"}
    assert {variant.method for variant in variants_of(SETTINGS, models)} == {"dense", "moe", *kinds}
    products = sum(len(m.maps) for m in merged_of(models.meo).values())
    for one in done:
        assert one.checks.keys() == {"experts differ by", *names}
        assert max(value for name, value in one.checks.items() if name in names) < 1e-4
        for timing in one.timings:
            assert len(timing.seconds) == SETTINGS.rounds
            merges = timing.variant.method in kinds
            assert timing.plans.total() == (products if merges else 0)
            assert timing.merged == timing.plans.total() - timing.plans["combine"]


def test_half_precision_passes_its_checks() -> None:
    models = tiny_models("llama")
    models.dense.bfloat16(), models.meo.bfloat16()
    settings = PrefillSettings(num_experts=4, top_k=(2,), batch=(2,), tokens=(9,), rounds=1, dtype="bfloat16")
    assert len(list(time_prefill(settings, models))) == 1


def turned_router(self: MeoRouter, inputs: Tensor, real: Any = MeoRouter.forward) -> Any:
    return real(self, -inputs)


def skewed_product(x: Tensor, *args: Any, real: Any = merged_linear_meo.merge_multiply) -> Any:
    return 1.01 * real(x, *args)


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (MeoRouter, "forward", turned_router, "meo (prompt), top_k 2: outputs of"),
        (merged_linear_meo, "merge_multiply", skewed_product, "meo (prompt), top_k 2: outputs of"),
        (moe, "_expert", first_expert, "moe, top_k 2: one layer's outputs"),
    ],
    ids=["router", "product", "rival"],
)
def test_a_wrong_variant_is_not_timed(
    owner: Any, name: str, broken: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_models("llama")
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(prefill, "_time_round", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(CheckFailedError) as caught:
        list(time_prefill(SETTINGS, models))
    assert str(caught.value).startswith(message)
    assert "nothing was timed" in str(caught.value)


@torch.no_grad()
def test_models_that_hide_faults_are_refused() -> None:
    models = tiny_models("llama")
    text = Text(2, 9)
    ids, dense = draw_texts(SETTINGS, models, text), variants_of(SETTINGS, models)[0]
    assert check_variant(SETTINGS, models, dense, text, ids) == 0
    assert check_experts(models) > 0.1
    next(iter(merged_of(models.meo).values())).experts.down_proj[1:] = 1
    with pytest.raises(CheckFailedError, match="two experts are alike"):
        check_experts(models)
    models.dense.model.embed_tokens.weight[5, 5] += 1
    with pytest.raises(CheckFailedError, match=r"embed_tokens\.weight is not that of the MEO model"):
        check_variant(SETTINGS, models, dense, text, ids)


def test_combining_is_not_called_merging() -> None:
    models = tiny_models("llama")
    variant = variants_of(SETTINGS, models)[1]
    timing = Timing(variant, [1.0], plans=Counter(combine=3, fused=1))
    lines = notes([Prefilled(Text(1, 1), [timing], {})], models, Machine.look("cpu"), "source")
    assert timing.merged == 1
    assert lines[0] == "meo: 1 of 4 linear maps merged weights (25 %)"


def test_command_prints_and_writes_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_progress, "out", Console(width=200, highlight=False))
    source = saved("llama", tmp_path / "tiny[b]llama")
    before = listing(tmp_path)
    done = run_cli("bench", "prefill", source, *SMALL, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert done.code == 0, done.err
    assert listing(tmp_path).keys() - before.keys() == {"r.json", "r.png"}
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    for start in ("dense ", "meo (prompt) 1 ", "meo (segment) 3 ", "moe 3 "):
        assert sum(row.startswith(start) for row in rows) == 1, start
    assert "tiny[b]llama (LlamaForCausalLM)" in done.out
    assert "linear maps merged weights" in done.out
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert results["command"].startswith("meo-hf bench prefill 'tiny[b]llama' --num-experts 3 --top-k 1,3 --batch 2 ")
    (text,) = results["texts"]
    assert [v["top_k"] for v in text["variants"]] == [None, 1, 3, 1, 3, 1, 3]
    assert text["variants"][0]["ratio_to_dense"] == 1
    assert text["variants"][0]["merged_share"] is None
    assert {"meo_hf", "transformers", "torch"} <= results["machine"]["versions"].keys()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_an_encoder_is_drawn_from_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(PRESETS, "bert-tiny", {**sizes, "vocab_size": 50})
    done = run_cli("bench", "prefill", "--config", "bert-tiny", *SMALL, "--json", tmp_path / "r.json")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert results["model"]["class"] == "BertModel"
    assert results["command"].startswith("meo-hf bench prefill --config bert-tiny --num-experts 3")
    assert [v["variant"] for v in results["texts"][0]["variants"]] == ["dense", "meo", "meo", "moe", "moe"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", ("--top-k", "2,9"), "--top-k 9 is more than --num-experts 8"),
        ("llama", ("--batch", "2,two"), "--batch is '2,two'"),
        ("llama", ("--tokens", "2,2"), "--tokens is '2,2': give each value once"),
        ("llama", ("--batch", "0"), "--batch is 0"),
        ("llama", ("--tokens", "65"), "more than the 64 positions"),
        ("llama", ("--config", "bert-base"), "give either DENSE or --config"),
        ("t5", (), "(t5) is an encoder-decoder"),
        ("vit", (), "(vit) reads no tokens"),
        (None, (), "give either DENSE or --config"),
        (None, ("--config", "bert-huge"), "give one of bert-base, bert-tiny"),
        (None, ("--config", "bert-tiny", "--tokens", "513"), "more than the 512 positions of bert-tiny"),
        (None, ("--config", "bert-tiny", "--json", "nowhere/r.json"), "nowhere/r.json cannot be written"),
    ],
)
def test_bad_input(
    family: str | None, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = () if family is None else (saved(family, tmp_path / "dense"),)
    before = listing(tmp_path)
    done = run_cli("bench", "prefill", *source, *options)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert listing(tmp_path) == before


def ran(job: dict[str, Any], options: dict[str, Any] | None, broken: bool = False) -> Run:
    """Do in this process what the benchmark does in one of its own."""
    output = Path(job["output"])
    if options is None:
        output.mkdir()
        for path in job["files"]:
            data = Path(path).read_bytes()
            (output / Path(path).name).write_bytes(data[:-1] if broken else data)
    else:
        convert(job["source"], output, **{**options, "verify": "none"})
    return Run(2.0 if options else 1.0, 0.0, 300, 200, 0 if (options or {}).get("verify") else 100)


def test_conversion_is_compared_with_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_progress, "out", Console(width=200, highlight=False))
    monkeypatch.setattr(convert_timing, "_run", ran)
    source = saved("llama", tmp_path / "dense")
    before = listing(tmp_path)
    options = ("--num-experts", "2", "--rounds", "2", "--work", tmp_path, "--json", tmp_path / "r.json")
    done = run_cli("bench", "convert", source, *options)
    assert done.code == 0, done.err
    assert listing(tmp_path).keys() - before.keys() == {"r.json"}
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert [v["variant"] for v in results["variants"]] == list(VARIANTS)
    assert [v["ratio_to_copy_result"] for v in results["variants"]] == [1, 1, 2, 2]
    assert all(len(v["runs"]) == 2 for v in results["variants"])
    written = [v["bytes_written"] for v in results["variants"]]
    assert written[0] == (source / "model.safetensors").stat().st_size < written[1]
    assert len(set(written[1:])) == 1
    monkeypatch.setattr(convert_timing, "_run", partial(ran, broken=True))
    done = run_cli("bench", "convert", source, *options)
    assert done.code == 1
    assert "wrote different amounts" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds is 0"),
        (("--num-experts", "0"), "--num-experts is 0"),
        (("--work", "nowhere"), "--work nowhere is no folder"),
    ],
)
def test_bad_conversion_timings(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run_cli("bench", "convert", tmp_path, *options)
    assert done.code == 2
    assert message in done.err


def test_a_conversion_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    job = {"source": str(source), "output": str(tmp_path / "out"), "files": [str(source / "model.safetensors")]}
    run = convert_timing._run(job, {"num_experts": 2, "top_k": 1, "verify": "none"})
    assert (tmp_path / "out/config.json").exists()
    assert run.peak_bytes >= run.start_bytes > 1e7
    assert run.checker_bytes == 0
    with pytest.raises(convert_timing.OutputError, match=r"converting failed: .*exists"):
        convert_timing._run(job, {"verify": "none"})
