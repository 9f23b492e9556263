"""`meo-hf compare`: what it prints and writes, what it leaves out and why, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import listing, run_cli
from compare_tiny import meo_of, saved_pair, silent, windows_of, words, words_tokenizer
from meo_hf.modeling import segments_meo
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from moe_tiny import tiny_moe
from rich.console import Console
from tiny import tiny_dense
from torch import Tensor
from transformers import MixtralForCausalLM

from meo_hf import cli_progress
from meo_hf.benchmark import compare as compare_module
from meo_hf.benchmark.compare import Comparison, compare
from meo_hf.benchmark.compare_quality import measure_quality
from meo_hf.benchmark.compare_report import mean_layer, notes, row_values
from meo_hf.benchmark.compare_variants import CompareSettings, Subject
from meo_hf.benchmark.machine import Machine

CLOSE = 1e-5
SETTINGS = CompareSettings(window=16, limit=5, batch_size=2, rounds=1)
SMALL = ("--window", "16", "--limit", "3", "--batch-size", "2", "--rounds", "1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return saved_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def result(pair: tuple[Path, Path, Path]) -> Comparison:
    return compare(str(pair[0]), str(pair[1]), pair[2], SETTINGS, [str(pair[0])])


def leaky(pool: Any, layout: Any, cells: Tensor, run: Any = segments_meo.advance) -> Any:
    inputs, after = run(pool, layout, cells)
    return cells.to(inputs.dtype).mean(1), after  # each segment's own mean


def test_a_gate_that_looks_ahead_gets_no_perplexity(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meo_hf.modeling.groups_meo.advance", leaky)
    done = run_cli("compare", *pair[:2], "--text", pair[2], *SMALL, "--json", tmp_path / "r.json")
    assert done.code == 1
    assert done.err.startswith("meo-hf: MEO: logits change by")
    assert "plexity\n" not in done.out
    assert not (tmp_path / "r.json").exists()


def test_rows_of_a_comparison(result: Comparison, pair: tuple[Path, Path, Path]) -> None:
    names = ["source", "MEO", "uniform average", "source, top-1", "source"]
    assert [row.name for row in result.rows] == names
    source, meo, average, one, again = result.rows
    assert source.quality == again.quality
    assert source.quality.kl == 0
    assert source.quality.agreement == 1
    assert row_values(source)["decode_ratio"] == 1
    assert source.flops > meo.flops > one.flops
    assert source.nbytes == meo.nbytes > average.nbytes
    assert len({row.quality.perplexity for row in result.rows}) == 4
    assert result.skipped == {"source, half of top-k": "half of 2 is 1"}
    assert [layer.path for layer in result.layers] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(layer.gates.groups == 5 * 4 for layer in result.layers), "the check before is not counted"
    assert mean_layer(result.layers)["merged_share"] == 1
    model = MixtralForCausalLM.from_pretrained(pair[0]).eval()
    expected = measure_quality(Subject.of("source", model), Subject.of("s", model), windows_of(), 2, silent)
    assert source.quality.perplexity == pytest.approx(expected.perplexity, rel=CLOSE)


def test_every_variant_is_checked(pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(compare_module, "check_causal", lambda subject, *_: checked.append(subject.name))
    found = compare(str(pair[0]), str(pair[1]), pair[2], SETTINGS, [str(pair[0])])
    assert checked == [row.name for row in found.rows]


def test_notes_say_how_gates_were_formed(result: Comparison) -> None:
    lines = "\n".join(notes(result, Machine.look("cpu"), "tiny"))
    assert "segments of 4 tokens, pooling hidden" in lines
    assert "routing='segment'" in lines
    assert "no row 'source, half of top-k': half of 2 is 1" in lines
    assert "has read one token only" not in lines


@pytest.mark.parametrize(
    ("family", "overrides", "reasons"),
    [
        ("phimoe", {}, ["the router of phimoe fixes", "half of 2 is 1"]),
        ("llama4_text", {}, ["selects one expert already"] * 2),
        ("deepseek_v2", {}, ["half of 3 is 1"]),
        ("olmoe", {"num_experts_per_tok": 4}, []),
    ],
)
def test_a_missing_row_has_a_reason(family: str, overrides: dict[str, int], reasons: list[str]) -> None:
    class Opened:
        config = tiny_moe(family, **overrides).config

    chosen, skipped = compare_module._top_ks(Opened(), MOE_FAMILIES[family])  # type: ignore[arg-type]
    assert len(skipped) == len(reasons)
    assert all(reason in found for reason, found in zip(reasons, skipped.values(), strict=True))
    assert chosen == {"olmoe": [1, 2], "deepseek_v2": [1]}.get(family, [])


def test_a_family_that_cannot_run_with_one_expert_is_skipped(tmp_path: Path) -> None:
    source, meo, text = saved_pair(tmp_path, "longcat_flash")
    found = compare(str(source), str(meo), text, SETTINGS)
    assert [row.name for row in found.rows] == ["source", "MEO", "uniform average"]
    assert found.skipped["source, top-1"].startswith("LongcatFlashForCausalLM fails with it (")


def test_command_prints_and_writes_what_it_saw(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_progress, "out", Console(width=80, highlight=False))
    source, meo, text = pair
    options = (*SMALL, "--also", source, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    done = run_cli("compare", source, meo, "--text", text, *options)
    assert "…" not in done.out, "a narrow terminal cuts numbers"
    assert done.code == 0, done.err
    assert listing(tmp_path).keys() == {"r.json", "r.png"}
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    for start in ("source ", "MEO ", "uniform average ", "source, top-1 ", "model.layers.2.mlp ", "mean "):
        numbered = [row for row in rows if row.startswith(start) and row[len(start)].isdigit()]
        assert len(numbered) == (2 if start == "source " else 1), start
    assert any(row.startswith("MEO's gates: segments of 4 tokens") for row in rows)
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert results["command"].startswith("meo-hf compare source meo --text text.txt --also source --window 16 ")
    assert str(tmp_path.parent) not in json.dumps(results), "paths are nobody's business"
    by_name = {row["variant"]: row for row in results["variants"]}
    assert by_name["source"]["kl_nats"] == 0
    assert by_name["MEO"]["perplexity"] > 1
    assert len(by_name["MEO"]["rounds"]["source_token_ms"]) == 1
    assert len(results["layers"]) == 3
    assert results["text"] == {"windows": 3, "window": 16, "predicted_tokens": 45}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_windows_are_no_longer_than_positions(pair: tuple[Path, Path, Path]) -> None:
    source, meo, text = pair
    found = compare(str(source), str(meo), text, CompareSettings(window=100, limit=1, rounds=1))
    assert found.windows.shape == (1, 64)
    assert any(line.startswith("windows have 64 tokens, not 100") for line in notes(found, Machine.look("cpu"), "s"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "3"), "--window is 3"),
        (("--limit", "0"), "--limit is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--dtype", "int8"), "give one of float32, bfloat16, float16"),
        (("--device", "toaster"), "--device 'toaster'"),
        (("--json", "nowhere/r.json"), "nowhere/r.json cannot be written"),
        (("--text", "nowhere.txt"), "--text nowhere.txt cannot be read"),
        (("--text", "latin.txt"), "is no UTF-8 text (byte 8)"),
        (("--text", "short.txt"), "--text holds 15 tokens, too few for a window of 16"),
        (("--also", "nowhere"), "--also nowhere cannot be read"),
        (("--also", "dense"), "has 98 tokens"),
        (("--also", "other"), "has another tokenizer"),
    ],
)
def test_bad_options(
    options: tuple[str, ...],
    message: str,
    pair: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("latin.txt").write_bytes(b"caf\xc3\xa9 ol\xe9")
    Path("short.txt").write_text(words(15), "utf-8")
    if options[1] == "dense":
        tiny_dense("llama", vocab_size=98).save_pretrained("dense")
    if options[1] == "other":
        tiny_moe("mixtral").save_pretrained("other")
        words_tokenizer(bos_token="<s>").save_pretrained("other")
    before = listing(tmp_path)
    done = run_cli("compare", *pair[:2], "--text", pair[2], *SMALL, *options)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("meo-hf: ")
    assert len(done.err.strip().splitlines()) == 1
    assert listing(tmp_path) == before


def test_bad_models(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, meo, text = pair
    dense = tmp_path / "dense"
    tiny_dense("llama").save_pretrained(dense)
    bare = tmp_path / "bare"
    tiny_moe("mixtral").save_pretrained(bare)
    encoder = tmp_path / "encoder"
    tiny_moe("openai_privacy_filter").save_pretrained(encoder)
    other = tmp_path / "other"
    meo_of(tiny_moe("olmoe")).save_pretrained(other)
    for models_, message in (
        ((meo, meo), "is a MEO model already"),
        ((dense, meo), "is no mixture of experts (llama)"),
        ((encoder, meo), "is an encoder (openai_privacy_filter)"),
        ((bare, meo), "has no tokenizer that can be loaded"),
        ((source, source), "is SOURCE itself: give what meo-hf convert or meo-hf reduce made of it"),
        ((source, dense), "is no MEO model (model type 'llama'), nor of"),
        ((source, other), "is of type meo_olmoe"),
        ((source, tmp_path / "nowhere"), "does not exist"),
    ):
        done = run_cli("compare", *models_, "--text", text, *SMALL)
        assert done.code == 2, message
        assert message in done.err
        assert len(done.err.strip().splitlines()) == 1


def test_missing_weights_are_said(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, meo, text = pair
    source, *_ = saved_pair(tmp_path)
    model = MixtralForCausalLM.from_pretrained(source)
    state = {name: value for name, value in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(source, state_dict=state)
    done = run_cli("compare", source, meo, "--text", text, *SMALL)
    assert done.code == 2
    assert "leaves out 1 of its model's weights, e.g. model.norm.weight" in done.err


def test_missing_matplotlib_is_said_at_once(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meo_hf.cli_bench.find_spec", lambda name: importlib.util.find_spec(f"no_{name}"))
    done = run_cli("compare", *pair[:2], "--text", pair[2], "--plot", tmp_path / "r.png")
    assert done.code == 2
    assert "pip install 'meo_hf[plot]'" in done.err
