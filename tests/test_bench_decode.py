"""The decoding benchmark: its rival is a mixture of experts, and it refuses to time a wrong thing."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import listing, run_cli, saved
from meo_hf.modeling.cache_meo import LayerRouting
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.feedforward_meo import MeoFeedForward, MergedExperts
from meo_hf.modeling.modeling_meo import meo_model_class
from rich.console import Console
from tiny import draw_experts, main_class, meo_config, merged_of, spread, tiny_config, tiny_dense, tiny_inputs
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meo_hf import cli_progress
from meo_hf.benchmark import decode, moe
from meo_hf.benchmark.decode_variants import DecodeSettings, Models, answer, selecting, variants_of
from meo_hf.benchmark.machine import Machine
from meo_hf.benchmark.moe import token_experts
from meo_hf.errors import UnsupportedError

EXACT = 1e-9
SMALL = ("--num-experts", "3", "--top-k", "1,3", "--prompt-tokens", "6", "--new-tokens", "4", "--rounds", "1")
SETTINGS = DecodeSettings(num_experts=4, top_k=(2, 3), batch=2, prompt_tokens=5, new_tokens=4, rounds=2)


class Loop(nn.Module):
    """A mixture of dense feed-forwards, token by token and expert by expert."""

    def __init__(self, owner: nn.Module, model_type: str, merged: MeoFeedForward) -> None:
        super().__init__()
        family, count = FAMILIES[model_type], merged.experts.down_proj.shape[0]
        up = next(paths for paths in family.up if hasattr(owner, paths[0]))
        self.weight, self.top_k = merged.router.weight, merged.router.top_k
        self.experts = nn.ModuleList(copy.deepcopy(owner) for _ in range(count))
        for number, expert in enumerate(self.experts):
            for name, paths in ((merged.experts.first, up), ("down_proj", (family.down,))):
                weights = getattr(merged.experts, name)[number].chunk(len(paths))
                for path, weight in zip(paths, weights, strict=True):
                    linear = expert.get_submodule(path)
                    linear.weight.data = weight.t() if isinstance(linear, Conv1D) else weight
                    if linear.bias is not None:
                        assert len(paths) == 1
                        linear.bias.data = getattr(merged.experts, f"{name}_bias")[number]

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            logits = [sum(float(w * t) for w, t in zip(row, token, strict=True)) for row in self.weight]
            best = sorted(range(len(logits)), key=lambda e: -logits[e])[: self.top_k]
            shares = [math.exp(logits[e] - logits[best[0]]) for e in best]
            outputs = [self.experts[e](token[None, None])[0, 0] for e in best]
            rows.append(sum(s / sum(shares) * y for s, y in zip(shares, outputs, strict=True)))
        return torch.stack(rows).reshape(x.shape)


def tiny_meo(model_type: str, top_k: int = 2, **meo: Any) -> PreTrainedModel:
    config = meo_config(tiny_config(model_type), **{"level": "sequence", "num_experts": 4, "top_k": top_k, **meo})
    return draw_experts(spread(meo_model_class(main_class(model_type))(config)), spread_of_gates=0.3).eval()


def looped(meo: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """Return the stock model with the rest of a MEO model's weights and loops in the place of feed-forwards."""
    dense = main_class(model_type)(tiny_config(model_type)).to(meo.dtype).eval()
    dense.load_state_dict(meo.state_dict(), strict=False)
    hosted = FAMILIES[model_type].hosted
    for path, merged in merged_of(meo).items():
        path = path.rpartition(".")[0] if hosted else path
        dense.set_submodule(path, Loop(dense.get_submodule(path), model_type, merged))
    return dense


def tiny_models(settings: DecodeSettings) -> Models:
    return Models(tiny_dense("llama"), tiny_meo("llama", num_experts=settings.num_experts))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rival_is_a_mixture_of_dense_experts(model_type: str, top_k: int) -> None:
    meo = tiny_meo(model_type, top_k).double()
    ids = tiny_inputs(model_type)["input_ids"]
    expected = looped(meo, model_type)(ids).logits
    before = meo(ids, routing="segment").logits
    with token_experts(meo):
        assert (meo(ids).logits - expected).abs().max() <= EXACT
        for rows in (ids, ids[:1]):
            cached = torch.stack(list(answer(meo, {}, rows, 3, DynamicCache(config=meo.config))), 1)
            assert (cached - expected[: len(rows), 2:]).abs().max() <= EXACT
    assert torch.equal(meo(ids, routing="segment").logits, before), "the model is not what it was"
    assert (before - expected).abs().max() > 1e-3, "a merge that is a mixture would hide every fault"


@pytest.mark.parametrize(
    ("meo", "reason"), [({"level": "task"}, "routers that read tokens"), ({"gate_scope": "projection"}, "scope ffn")]
)
def test_rival_needs_gates_that_read_tokens(meo: dict[str, str], reason: str) -> None:
    model = tiny_meo("llama", **meo)
    with pytest.raises(UnsupportedError, match=reason), token_experts(model):
        pass
    with torch.no_grad():
        model(**tiny_inputs("llama"), **({} if "level" in meo else {"routing": "segment"}))


@torch.no_grad()
def test_top_k_is_chosen_for_a_while() -> None:
    chosen, expected = tiny_meo("llama", top_k=4), tiny_meo("llama", top_k=2)
    ids = tiny_inputs("llama")["input_ids"]
    with selecting(chosen, 2):
        assert torch.equal(chosen(ids, routing="segment").logits, expected(ids, routing="segment").logits)
    assert all(module.router.top_k == 4 for module in merged_of(chosen).values())


def test_variants_take_turns_in_every_round() -> None:
    said: list[str] = []
    models = tiny_models(SETTINGS)
    decoded = decode.time_decode(SETTINGS, models, said.append)
    names = [str(variant) for variant in variants_of(SETTINGS)]
    assert len(said) == decode.steps_of(SETTINGS)
    assert said[: len(names)] == [f"checking {name}" for name in names]
    assert [line for line in said if line.startswith("round 2")] == [f"round 2: {n}" for n in names[2:] + names[:2]]
    assert all(len(t.prefill) == len(t.token) == SETTINGS.rounds for t in decoded.timings)
    experts = merged_of(models.meo).values()
    one_per_row = SETTINGS.batch * sum(p[0].nbytes for m in experts for p in m.experts.parameters())
    for timing in decoded.timings:
        is_meo = timing.variant.method.startswith("meo")
        assert timing.merged_bytes == (one_per_row if is_meo else 0)
        assert len(timing.merge) == (SETTINGS.rounds if timing.variant.method == "meo (segment)" else 0)


def test_steps_that_merge_count_by_their_share() -> None:
    steps = [9.0, 1.0, 2.0, 1.0, 7.0, 1.0]  # tokens 6 to 11: the first, and token 10, open a segment of 10
    assert decode.per_token(steps, 6, 10) == (1.0 + 7.0 / 10, 8.0)
    assert decode.per_token(steps, 6, None) == (1.5, None)
    assert decode.merging_steps(6, 3, 4) == [True, True, False, False, False, True]


def test_noise_is_said() -> None:
    machine = Machine.look("cpu")
    assert Machine(**{**vars(machine), "cpus": 4, "load_average": 2.0}).noise == ""
    assert Machine(**{**vars(machine), "cpus": 4, "load_average": 2.1}).noise.startswith("noisy machine")
    assert Machine(**{**vars(machine), "load_average": None}).noise == ""


def test_command_prints_and_writes_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_progress, "out", Console(width=200, highlight=False))
    source = saved("llama", tmp_path / "tiny[b]llama")
    before = listing(tmp_path)
    done = run_cli("bench", "decode", source, *SMALL, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert done.code == 0, done.err
    assert listing(tmp_path).keys() - before.keys() == {"r.json", "r.png"}
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    for start in ("dense ", "meo (prompt) 1 ", "meo (prompt) 3 ", "meo (segment) 1 ", "moe 1 ", "moe 3 "):
        assert sum(row.startswith(start) for row in rows) == 1, start
    assert "tiny[b]llama (LlamaForCausalLM)" in done.out
    results = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert results["command"].startswith("meo-hf bench decode 'tiny[b]llama' --num-experts 3 --top-k 1,3 --batch 1 ")
    assert [v["top_k"] for v in results["variants"]] == [None, 1, 3, 1, 1, 3]
    assert results["variants"][0]["ratio_to_dense"] == 1
    assert all(len(v["rounds"]["token_ms"]) == 1 for v in results["variants"])
    assert results["checks_relative_rms"].keys() == {str(v) for v in variants_of(DecodeSettings(top_k=(1, 3)))}
    assert {"meo_hf", "transformers", "torch"} <= results["machine"]["versions"].keys()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def first_expert(self: MeoFeedForward, expert: int, x: Tensor, run: Any = moe._expert) -> Tensor:
    return run(self, 0, x)


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (LayerRouting, "frozen_input", lambda self, name: -self.pools[name].total, "meo (prompt), top_k 1: cached"),
        (MergedExperts, "_fits", lambda *_: False, "meo (prompt), top_k 1: merged experts were not kept"),
        (moe, "_expert", first_expert, "moe, top_k 1: one layer's outputs"),
    ],
)
def test_a_wrong_variant_is_not_timed(
    owner: Any, name: str, broken: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama", tmp_path / "dense")
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(decode, "_time_round", lambda *_: pytest.fail("it was timed"))
    done = run_cli("bench", "decode", source, *SMALL, "--json", tmp_path / "r.json")
    assert done.code == 1
    assert done.err.startswith(f"meo-hf: {message}")
    assert "nothing was timed" in done.err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", ("--top-k", "2,9"), "--top-k 9 is more than --num-experts 8"),
        ("llama", ("--top-k", "2,two"), "--top-k is '2,two'"),
        ("llama", ("--top-k", "2,2"), "each once"),
        ("llama", ("--rounds", "0"), "--rounds is 0"),
        ("llama", ("--new-tokens", "1"), "--new-tokens is 1"),
        ("llama", ("--prompt-tokens", "61", "--new-tokens", "4"), "more than the 64 positions"),
        ("llama", ("--dtype", "int8"), "give one of float32, bfloat16, float16"),
        ("llama", ("--device", "toaster"), "--device 'toaster'"),
        ("llama", ("--json", "nowhere/r.json"), "nowhere/r.json cannot be written"),
        ("bert", (), "is an encoder (bert)"),
        ("t5", (), "is an encoder-decoder (t5)"),
        (None, (), "does not exist"),
    ],
)
def test_bad_input(
    family: str | None, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "dense" if family is None else saved(family, tmp_path / "dense")
    before = listing(tmp_path)
    done = run_cli("bench", "decode", source, *options)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("meo-hf: ")
    assert len(done.err.strip().splitlines()) == 1
    assert listing(tmp_path) == before


def test_missing_matplotlib_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meo_hf.cli_bench.find_spec", lambda name: importlib.util.find_spec(f"no_{name}"))
    done = run_cli("bench", "decode", tmp_path, "--plot", tmp_path / "r.png")
    assert done.code == 2
    assert "pip install 'meo_hf[plot]'" in done.err
