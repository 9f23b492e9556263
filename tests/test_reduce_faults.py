"""Damaged sources, plans edited by hand, other searches' states and changed outputs: each is refused, with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import listing, run_cli
from compare_tiny import words, words_tokenizer
from moe_tiny import tiny_moe
from reduction_tiny import apply, bench_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from meo_hf.errors import CheckpointError, MeoConfigError, UsageError
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.candidates import Candidates, judged
from meo_hf.reduction.evolution import Evolution, Space, evolve
from meo_hf.reduction.methods import LowRank, Prune, Search, Skip
from meo_hf.reduction.observing import BlockView
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.reduction.reduce import reduce
from meo_hf.reduction.statistics import Frequency, TailRatio
from meo_hf.reduction.verify import verify_reduced

torch.set_num_threads(1)
BLOCKS = [f"model.layers.{layer}.mlp" for layer in range(3)]
KEPT = BlockPlan(one_hot([0, 2, 3, 5]), one_hot([0, 2, 3, 5]))
RANDOM = Prune(keep="4", score="random")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEO_HF_STATISTICS", str(tmp_path / "statistics"))
    tiny_moe("mixtral").save_pretrained(tmp_path / "source")
    words_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(words(200), "utf-8")
    return tmp_path / "source"


def text(source: Path) -> Calibration:
    """Return calibration text in rows of 16 tokens."""
    return Calibration((str(source.parent / "text.txt"),), 16, 8)


def damaged(source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change a source's weights."""
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file({name: one.clone() for name, one in weights.items()}, source / "model.safetensors", {"format": "pt"})
    return source


def changed(place: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    place.write_text(json.dumps(json.loads(place.read_text()) | values))


def plan_of(source: Path) -> dict[str, Any]:
    """Return a plan as JSON."""
    made: dict[str, Any] = json.loads(reduce(source, "unused", RANDOM, dry_run=True).plan.to_json())  # type: ignore[union-attr]
    return made


def eight(plan: dict[str, Any]) -> None:
    """Make more experts than there are."""
    for block in plan["blocks"].values():
        block["experts"] = block["router"] = [{str(new % 6): 1.0} for new in range(8)]


def first_row(row: dict[str, float], **more: Any) -> Callable[[dict[str, Any]], None]:
    """Change how a plan makes the first block's first expert."""

    def change(plan: dict[str, Any]) -> None:
        block = plan["blocks"][BLOCKS[0]]
        block["experts"][0] = row
        block.update(more)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (eight, "makes 8 experts of 6"),
        (first_row({"0": float("nan")}), "not finite, or all zero"),
        (first_row({"0": 0.0}), "not finite, or all zero"),
        (first_row({"1": 0.5, "01": 0.5}), "names an expert twice"),
        (first_row({"0": 0.5, "1": 0.5}, how="given"), "lacks down projections"),
        (lambda plan: plan.update(top_k="2"), "top_k is '2'"),
        (lambda plan: plan.update(source=None), "source is None"),
        (lambda plan: plan.update(method={}), "KeyError"),
        (lambda plan: plan.update(calibration={}), "domains"),
        (lambda plan: plan.update(calibration={"domains": [{"name": 4, "tokens": 1}]}), "a text of the calibration"),
        (lambda plan: plan.update(calibration={"domains": [3]}), "no plan of meo-hf reduce"),
    ],
)
def test_plans_edited_by_hand(source: Path, change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    plan = plan_of(source)
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises((UsageError, CheckpointError), match=message):
        reduce(source, tmp_path / "out", plan=tmp_path / "plan.json")
    assert not (tmp_path / "out").exists()


def test_plans_name_an_expert_once() -> None:
    with pytest.raises(CheckpointError, match="twice"):
        ReductionPlan.from_json('{"method": {"name": "x"}, "source": {}, "blocks": {}, "blocks": {}}', "plan")


def test_matrices_that_are_none(tmp_path: Path) -> None:
    ReductionPlan({"name": "x"}, {"id": "x"}, given="abc").save(tmp_path / "plan.json")
    (tmp_path / "plan.matrices").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="missing or not what"):
        ReductionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan", "PLAN", "--keep", "2"), "--keep has no effect without --method"),
        (("--method", "top-k", "--top-k", "1", "--layers", "0"), "--layers has no effect"),
        (("--method", "skip", "--threshold", "0.3", "--top-k", "0"), "--top-k 0 is too small"),
        (("--method", "skip", "--threshold", "0.3", "--top-k", "1", "--verify", "none"), "skip has no effect"),
        (("--method", "prune", "--score", "random", "--keep", "1", "--budget", "global"), "their routers need 6"),
        (("--method", "prune", "--score", "random", "--keep", "4", "--save-plan", "no/p.json"), "a folder that exists"),
    ],
)
def test_options_that_would_do_nothing(source: Path, options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan_of(source)))
    before = listing(tmp_path)
    done = run_cli("reduce", source, tmp_path / "out", *[o.replace("PLAN", f"{tmp_path}/plan.json") for o in options])
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert listing(tmp_path) == before


@pytest.mark.parametrize("part", ["experts", "gate.weight"])
def test_sources_without_a_blocks_tensors(source: Path, part: str, tmp_path: Path) -> None:
    def lose(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "layers.0." in name and part in name]:
            del weights[name]

    with pytest.raises(CheckpointError, match="lacks"):
        reduce(damaged(source, lose), tmp_path / "out", RANDOM, verify="none")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("method", [LowRank(0.5), RANDOM], ids=["low-rank", "prune"])
def test_sources_without_one_expert_s_tensor(source: Path, method: Any, dry_run: bool, tmp_path: Path) -> None:
    def lose(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.1.block_sparse_moe.experts.4.w2.weight"]

    with pytest.raises(CheckpointError, match="of 6 experts in"):
        reduce(damaged(source, lose), tmp_path / "out", method, verify="none", dry_run=dry_run)


def test_sources_whose_router_is_cut(source: Path, tmp_path: Path) -> None:
    def cut(weights: dict[str, Tensor]) -> None:
        name = next(name for name in weights if "layers.0." in name and name.endswith("gate.weight"))
        weights[name] = weights[name][:5]

    with pytest.raises(CheckpointError, match="5 entries for 6 experts"):
        reduce(damaged(source, cut), tmp_path / "out", RANDOM, verify="none")


@pytest.mark.parametrize("score", ["reap", "output-norm"])
def test_scores_that_are_nan(source: Path, score: str, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.2.block_sparse_moe.experts.3.w2.weight"].fill_(float("nan"))

    with pytest.raises(CheckpointError, match=r"\[3\] of model.layers.2.mlp is not finite"):
        reduce(damaged(source, spoil), tmp_path / "out", Prune(keep="4", score=score), calibration=text(source))


def test_tokenizers_of_other_models(source: Path, tmp_path: Path) -> None:
    tiny_moe("mixtral", vocab_size=60).save_pretrained(source)
    with pytest.raises(UsageError, match="the model knows 60"):
        reduce(source, tmp_path / "out", Prune(keep="4"), calibration=text(source))


def test_text_is_read_with_as_many_experts_as_the_result_selects(source: Path, tmp_path: Path) -> None:
    class Widths(Frequency):
        found: set[int] = set()

        def see(self, block: BlockView) -> None:
            self.found.add(block.gates.shape[1])
            super().see(block)

    for top_k in (None, 3):
        bench_of(source, calibration=text(source), top_k=top_k).observe(Widths())
    assert Widths.found == {2, 3}
    three = bench_of(source, calibration=text(source), top_k=3)
    ratios = TailRatio()
    three.observe(ratios)
    found = reduce(source, tmp_path / "out", Skip(), calibration=text(source), top_k=3, dry_run=True).skip
    assert found is not None
    assert found["threshold"] == {path: float(one) for path, one in ratios.result().items()}
    with pytest.raises(UsageError, match="selects one expert"):
        reduce(source, tmp_path / "out", Skip(), calibration=text(source), top_k=1)


@pytest.mark.parametrize(
    ("name", "values"),
    [("config.json", {"num_experts_per_tok": 1}), ("config.json", {"rms_norm_eps": 0.5}), ("plan.json", {"top_k": 1})],
)
def test_outputs_whose_config_was_changed(source: Path, name: str, values: dict[str, Any], tmp_path: Path) -> None:
    report = apply(source, tmp_path / "out", dict.fromkeys(BLOCKS, KEPT), verify="sample")
    assert report.passed
    changed(tmp_path / "out" / "config.json", transformers_version="4.0.0")
    assert verify_reduced(tmp_path / "out", "sample").passed, "another version may write it"
    changed(tmp_path / "out" / name, **values)
    failed = [check.name for check in verify_reduced(tmp_path / "out", "sample").checks if not check.passed]
    assert failed == ["config.json is what the plan makes of the source's"]


def test_rules_and_maps_that_were_changed(source: Path, tmp_path: Path) -> None:
    mapped = BlockPlan(KEPT.experts, stands_for=(0, 0, 1, 2, 2, 3))
    apply(source, tmp_path / "out", {BLOCKS[0]: mapped}, skip={"rule": "ratio", "threshold": 0.5})
    config = tmp_path / "out" / "config.json"
    block = json.loads(config.read_text())["meo"]
    assert verify_reduced(tmp_path / "out", "sample").passed
    for key, value in {"skip": None, "expert_maps": {BLOCKS[0]: [3, 2, 2, 1, 0, 0]}}.items():
        changed(config, meo={**block, key: value})
        assert not verify_reduced(tmp_path / "out", "sample").passed, key
    code = tmp_path / "out" / "unmerged_meo.py"
    code.write_text(code.read_text() + "\nimport os\n")
    assert "changed or missing: unmerged_meo.py" in verify_reduced(tmp_path / "out", "sample").checks[0].detail
    config.unlink()
    assert not verify_reduced(tmp_path / "out", "full").passed


@pytest.mark.parametrize("values", [{"source": {}}, {"options": {}}, {"files": None}])
def test_reports_that_are_damaged(source: Path, values: dict[str, Any], tmp_path: Path) -> None:
    apply(source, tmp_path / "out", dict.fromkeys(BLOCKS, KEPT))
    changed(tmp_path / "out" / "meo_report.json", **values)
    with pytest.raises(CheckpointError, match="no report of meo-hf reduce"):
        verify_reduced(tmp_path / "out", "sample")


def test_searches_of_other_weights_metrics_or_texts_do_not_go_on(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def a(model, tokenizer): return 1.0\ndef b(model, tokenizer): return 2.0\n")
    shutil.copytree(source, tmp_path / "other")

    def search(folder: Path, metric: str | None) -> None:
        how = Search(keep="4", generations="0,0", population=1, state=str(tmp_path / "state"), metric=metric)
        read = None if metric else text(source)
        reduce(folder, tmp_path / "out", how, calibration=read, dry_run=True)

    search(source, f"{tmp_path}/mine.py:a")
    search(tmp_path / "other", f"{tmp_path}/mine.py:a")
    for folder, metric, other in ((source, f"{tmp_path}/mine.py:b", "metric"), (source, None, "metric, text")):
        with pytest.raises(UsageError, match=f"with other {other}:"):
            search(folder, metric)
    damaged(tmp_path / "other", lambda weights: weights["model.norm.weight"].add_(1))
    with pytest.raises(UsageError, match="with other weights:"):
        search(tmp_path / "other", f"{tmp_path}/mine.py:a")


def test_states_have_a_place_before_anything_is_tried(tmp_path: Path) -> None:
    tried: list[object] = []
    for place in (tmp_path, tmp_path / "no" / "state"):
        with pytest.raises(UsageError, match="in a folder that exists"):
            evolve({"block": Space(4, 2)}, lambda one: float(tried.append(one) or 0), Evolution(), place)
    assert tried == []


def test_candidates_are_filled_wherever_a_metric_has_put_the_model(source: Path) -> None:
    work = bench_of(source)
    two, other = (dict.fromkeys(BLOCKS, BlockPlan(one_hot(own), one_hot(own))) for own in ([0, 1], [4, 5]))
    candidates = Candidates(work, work.planned(RANDOM, two))
    name = f"{BLOCKS[1]}.gate.weight"
    before = candidates.fill(two).train().double().state_dict()[name].clone()
    model = candidates.fill(other)
    assert not model.training
    assert model.state_dict()[name].dtype == torch.float64
    assert not torch.equal(model.state_dict()[name], before)


def test_metrics_that_fail_say_where() -> None:
    for wrong in (lambda model, tokenizer: None, lambda: 1.0, lambda model, tokenizer: 1 / 0):
        with pytest.raises(UsageError, match=r"--metric failed .* line \d+"):
            judged(wrong, None, None)  # type: ignore[arg-type]


def test_models_that_cannot_be_made_are_refused_before_writing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MeoConfigError, match="selects one expert"):
        apply(source, tmp_path / "out", {}, top_k=1, skip={"rule": "ratio", "threshold": 0.5})
    assert not (tmp_path / "out").exists()
