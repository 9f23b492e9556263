"""Experts that are dropped in training: as if they were not there, by what real tokens need, for a smaller model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_close, assert_differs
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_settings_meo import num_experts_of, set_num_experts, set_top_k, top_k_of
from moe_contracts import KEPT, meo_of_moe, moe_modules
from moe_tiny import tiny_moe, tiny_moe_inputs
from test_trainer import arguments
from tiny import tiny_dense
from torch import Tensor, nn
from training_rows import text_rows, word_tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.reduction.budget import Limits
from meo_hf.reduction.reduce import reduce
from meo_hf.training import narrowing, routers
from meo_hf.training.narrowing import Narrowing
from meo_hf.training.progressive import ProgressiveExperts, stay

torch.set_num_threads(1)
GROUPED = ("axk1", "bailing_hybrid", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v32")
TWO_GROUPS = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
UNABLE = {"nllb-moe": "first two experts", "deepseek_v4": "by the token's number"}
FAMILIES = [family for family in KEPT if family not in UNABLE]


def stock(family: str) -> PreTrainedModel:
    return tiny_moe(family, **(TWO_GROUPS if family in GROUPED else {}))


def without_others(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Return a stock model whose MoE blocks were built with fewer experts, with the same rows."""
    family = MOE_FAMILIES[model.config.model_type]
    experts, config = num_experts_of(model.config, family), copy.deepcopy(model.config)
    set_num_experts(config, family, len(kept))
    if len(kept) < top_k_of(config, family):
        set_top_k(config, family, len(kept))
    small, made = type(model)(config).float(), copy.deepcopy(model)
    for path in moe_modules(model):
        block, own = small.get_submodule(path), model.get_submodule(path)
        values = {**dict(own.named_parameters()), **dict(own.named_buffers())}
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            source = name
            if "expert_" in name and name.split("expert_")[1].split(".")[0].isdigit():
                number, rest = name.split("expert_")[1].split(".", 1)
                source = f"{name.split('expert_')[0]}expert_{kept[int(number)]}.{rest}"
            tensor.data.copy_(rows_of(values[source], tensor, kept, experts))
        made.set_submodule(path, block)
    return made.train(model.training)


def rows_of(value: Tensor, like: Tensor, kept: list[int], experts: int) -> Tensor:
    """Return a tensor's entries of some experts, along the axis where a smaller model has fewer."""
    axis = next((at for at, (one, two) in enumerate(zip(value.shape, like.shape, strict=True)) if one != two), None)
    if axis is None:
        return value
    per = (value.shape[axis] - like.shape[axis]) // (experts - len(kept))
    of_kept = [expert * per + at for expert in kept for at in range(per)]
    return value.index_select(axis, torch.tensor([*of_kept, *range(experts * per, value.shape[axis])]))


def narrowed(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    made = copy.deepcopy(model)
    narrow = Narrowing(made, MOE_FAMILIES[made.config.model_type])
    for path in narrow.mixture.blocks:
        narrow.keep(path, kept)
    return made


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    return model(**tiny_moe_inputs(family)).logits


def trainer_of(model: PreTrainedModel, folder: Path, callback: ProgressiveExperts, **options: Any) -> Trainer:
    tokenizer, rows = word_tokenizer(), text_rows(64)
    collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if model.config.is_encoder_decoder:
        collator = DataCollatorForSeq2Seq(tokenizer)
        rows = rows.map(lambda row: {"labels": row["input_ids"]})
    extra = {"eval_dataset": text_rows(8, seed=1)} if "eval_steps" in options else {}
    made = arguments(folder, **{"max_steps": 4, **options})
    return Trainer(model, made, train_dataset=rows, data_collator=collator, callbacks=[callback], **extra)


@lru_cache(maxsize=1)
def few_steps() -> TrainingArguments:
    return arguments(Path("unwritten"))


def begin(model: nn.Module, **fields: Any) -> ProgressiveExperts:
    """Begin to train, as a Trainer does."""
    callback = ProgressiveExperts(**{"window": 1, **fields})
    callback.on_train_begin(few_steps(), TrainerState(max_steps=4), TrainerControl(), model=model)
    return callback


@pytest.mark.parametrize("family", FAMILIES[::2])  # routers of one kind come in pairs and more
def test_dropped_experts_are_as_if_they_were_not_there(family: str) -> None:
    """With a few experts, and with one: like a stock router built with fewer rows; where that fails, refused."""
    model = stock(family)
    kept = [1, 3, 5, 6] if family in GROUPED else [1, 2, 4]
    out = logits(narrowed(model, kept), family)
    assert_close(out, logits(without_others(model, kept), family), 1e-6)
    assert_differs(out, logits(model, family), 1e-3)
    try:
        alone = logits(without_others(model, [4]), family)
    except (RuntimeError, ValueError, KeyError):
        with pytest.raises(UnsupportedError, match=r"final|keep more"):
            begin(model)
        return
    assert not alone.isnan().any()
    assert_close(logits(narrowed(model, [4]), family), alone, 1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "dbrx", "phimoe"])
def test_dropped_experts_and_their_router_rows_get_no_gradient(family: str) -> None:
    model = stock(family)
    made = narrowed(model, kept := [0, 2, 5, 7] if family in GROUPED else [0, 2]).train()
    made(**tiny_moe_inputs(family)).logits.square().mean().backward()
    experts = num_experts_of(model.config, MOE_FAMILIES[family])
    dropped = [expert for expert in range(experts) if expert not in kept]
    for path, block in moe_modules(made).items():
        seen = 0.0
        for name, parameter in block.named_parameters():
            if "shared" in name:
                continue
            if "expert_" in name:
                gone = int(name.split("expert_")[1].split(".")[0]) in dropped
                assert not gone or parameter.grad is None, name
                continue
            rows = parameter.grad.unflatten(0, (experts, -1))
            assert rows.isfinite().all()
            assert not rows[dropped].any(), f"{path}.{name}"
            seen += rows[kept].abs().sum().item()
        assert seen > 0


def broken_lookup(output: Any, kept: list[int], experts: int, fill: float, lookup: Tensor) -> Any:
    return STACKED(output, kept, experts, fill, torch.arange(len(lookup)))


def logits_of_all(output: Any, kept: list[int], experts: int, fill: float, lookup: Tensor) -> Any:
    logits, _, _ = STACKED(output, kept, experts, 0.0, lookup)
    weights, index = logits.softmax(-1).topk(2)
    return logits, weights / weights.sum(-1, keepdim=True), index


STACKED = narrowing.WIDEN["stacked"]


@pytest.mark.parametrize("mutant", [broken_lookup, logits_of_all])
def test_a_wrong_mask_shows(mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(narrowing.WIDEN, "stacked", mutant)
    model = stock("mixtral")
    with pytest.raises(AssertionError):
        assert_close(logits(narrowed(model, [1, 4]), "mixtral"), logits(without_others(model, [1, 4]), "mixtral"), 1e-6)


def test_blocks_that_scale_by_what_is_selected_are_told() -> None:
    model = stock("openai_privacy_filter")
    narrow = Narrowing(model, MOE_FAMILIES["openai_privacy_filter"])
    before, path = logits(model, "openai_privacy_filter"), next(iter(narrow.mixture.blocks))
    narrow.keep(path, [3])
    assert model.get_submodule(path).num_experts == 1
    narrow.release()
    assert model.get_submodule(path).num_experts == 2
    assert torch.equal(logits(model, "openai_privacy_filter"), before)


def test_who_stays_by_hand() -> None:
    one = Limits(6)
    scores = [0.1, 0.4, 0.05, 0.2, 0.0, 0.25]
    everybody = list(range(6))
    assert stay(scores, everybody, 0.5, "best", one, 1) == [1, 3, 5]  # 0.2 of the best's 0.4 is enough
    assert stay(scores, everybody, 0.5, "uniform", one, 1) == [0, 1, 3, 5]  # half of 1/6
    assert stay(scores, [0, 2, 4], 1.0, "best", one, 1) == [0]
    assert stay(scores, everybody, 1.0, "best", one, 3) == [1, 3, 5]  # three at least
    assert stay([0.5] * 6, everybody, 1.0, "uniform", one, 1) == everybody
    groups = Limits(6, least=4, groups=2)
    assert stay(scores, everybody, 0.5, "best", groups, 4) == [0, 1, 3, 5]  # the worse group keeps as many
    assert stay(scores, [0, 1, 3, 5], 0.9, "best", groups, 2) == [1, 5]


def mixtral_gates(model: PreTrainedModel, batches: list[dict[str, Tensor]], path: str) -> Tensor:
    """Return Mixtral's gates of real tokens for each expert: softmax, the best two, renormalised."""
    gate, found = model.get_submodule(path).gate, []
    for batch in batches:
        inputs: list[Tensor] = []
        handle = gate.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model.eval()(**batch)
        handle.remove()
        hidden = inputs[0].reshape(-1, gate.weight.shape[1])[batch["attention_mask"].flatten().bool()]
        weights, index = (hidden @ gate.weight.T).softmax(-1).topk(2)
        found.append(torch.zeros(len(hidden), 6).scatter(1, index, weights / weights.sum(-1, keepdim=True)))
    return torch.cat(found).double()


class Seen(TrainerCallback):
    """Keep what each step left of another callback's experts."""

    def __init__(self, watched: ProgressiveExperts) -> None:
        self.watched, self.steps = watched, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append((copy.deepcopy(self.watched.scores), copy.deepcopy(self.watched.kept)))


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, evaluated": {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def check_window(folder: Path, mode: str, proficiency: str = "weight") -> None:
    """Train at a learning rate of zero; compare the first window with a plain formula over its batches."""
    model = stock("mixtral")
    fresh, batches = copy.deepcopy(model), []
    model.register_forward_pre_hook(
        lambda own, _, kwargs: batches.append(dict(kwargs)) if own.training else None, with_kwargs=True
    )
    callback = ProgressiveExperts(window=2, threshold=0.7, proficiency=proficiency, force_at=1.0)
    trainer = trainer_of(model, folder, callback, learning_rate=0.0, **MODES[mode])
    trainer.add_callback(seen := Seen(callback))
    trainer.train()
    assert seen.steps[0][0] == {}
    scores, kept = seen.steps[1]
    first = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches[: len(batches) // 2]]
    assert len(first) == 2 * MODES[mode].get("gradient_accumulation_steps", 1)
    assert any((batch["attention_mask"] == 0).any() for batch in first)
    for path in scores:
        gates = mixtral_gates(fresh, first, path)
        expected = ((gates > 0).double() if proficiency == "hits" else gates).mean(0)
        assert scores[path] == pytest.approx(expected.tolist(), abs=1e-6)
        assert kept[path] == [e for e in range(6) if expected[e] >= 0.7 * expected.max()]
    assert 3 < sum(map(len, kept.values())) < 18
    assert [len(own) for own in callback.kept.values()] == [1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_window_counts_the_gates_of_real_tokens_once(mode: str, tmp_path: Path) -> None:
    check_window(tmp_path, mode)


def test_a_window_counts_hits(tmp_path: Path) -> None:
    check_window(tmp_path, "plain", "hits")


def padding_too(arguments: Any, partner: bool, tokens: int, device: Any) -> None:
    return None


def test_counting_padding_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "real_tokens", padding_too)
    with pytest.raises(AssertionError):
        check_window(tmp_path, "plain")


def test_counting_what_runs_again_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tap that listens past the forward pass, a token would count twice."""
    counted: list[int] = []
    count = ProgressiveExperts._count
    monkeypatch.setattr(ProgressiveExperts, "_count", lambda self, *args: counted.append(1) or count(self, *args))
    totals = []
    for leaves in (True, False):
        if not leaves:
            monkeypatch.setattr(routers.RouterTap, "_leave", lambda *_: None)
        counted.clear()
        check_window(tmp_path, "checkpointed")
        totals.append(len(counted))
    assert totals == [12, 24]


@pytest.mark.parametrize(
    ("family", "final"), [("olmoe", 1), ("qwen2_moe", 1), ("switch_transformers", 1), ("deepseek_v3", 4), ("jetmoe", 2)]
)
def test_training_ends_in_a_smaller_checkpoint(family: str, final: int, tmp_path: Path) -> None:
    """The reduced checkpoint computes what the trained model does; the log says how many experts were left."""
    model = stock(family)
    callback = ProgressiveExperts(window=1, threshold=0.6, final=final)
    trainer = trainer_of(model, tmp_path / "run", callback, max_steps=6)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    left, blocks = [entry["experts/left"] for entry in entries], len(moe_modules(model))
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert left == sorted(left, reverse=True)
    assert left[2:] == [final * blocks] * 4
    assert left[0] < num_experts_of(model.config, MOE_FAMILIES[family]) * blocks
    trainer.save_model(tmp_path / "saved")
    report = reduce(tmp_path / "saved", tmp_path / "small", plan=callback.plan(tmp_path / "saved"), verify="none")
    assert {after for _, after in report.blocks.values()} == {final}
    out = logits(model.eval(), family)
    if report.why_own is None:
        small = type(model).from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
        assert_close(logits(small, family), out, 1e-6)
    callback.release()
    assert_differs(logits(model, family), out, 1e-3)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(restore: bool, tmp_path: Path) -> None:
    """From the middle of a window, and from the part with one expert: weights, scores and experts to the last bit."""
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    fields = {"window": 2, "threshold": 0.6, "force_at": 0.6}
    whole = ProgressiveExperts(**fields)
    first = trainer_of(stock("gpt_oss"), tmp_path, whole, **options)
    first.train()
    lengths = {len(kept) for kept in whole.kept.values()}
    for at in (3,) if restore else (3, 6):
        callback = ProgressiveExperts(**fields)
        other = tiny_moe("gpt_oss", seed=7)
        resumed = trainer_of(
            other, tmp_path / f"{at}", callback, restore_callback_states_from_checkpoint=restore, **options
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        found = next(c for c in resumed.callback_handler.callbacks if isinstance(c, ProgressiveExperts))
        assert (found is callback) != restore
        assert (found.kept, found.scores) == (whole.kept, whole.scores)
        for name, value in first.model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        assert torch.equal(logits(other.eval(), "gpt_oss"), logits(first.model.eval(), "gpt_oss"))
    assert lengths == {1}
    another = trainer_of(stock("gpt_oss"), tmp_path / "another", ProgressiveExperts(window=1), **options)
    with pytest.raises(UsageError, match="was trained with"):
        another.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_layers_are_left_as_they_are(tmp_path: Path) -> None:
    callback = ProgressiveExperts(window=1, final=2, force_at=1.0, layers=[1, 2])
    trainer_of(tiny_moe("deepseek_v4"), tmp_path, callback, max_steps=1).train()
    assert {path: len(kept) for path, kept in callback.kept.items()} == {
        f"model.layers.{layer}.mlp": 2 for layer in (1, 2)
    }
    with pytest.raises(UsageError, match="leaves blocks as they are"):
        begin(tiny_moe("mixtral"), layers=[1])
    with pytest.raises(UsageError, match=r"layers \[9\] have no experts"):
        begin(tiny_moe("mixtral"), layers=[9])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"window": 0}, "whole numbers"),
        ({"final": 1.0}, "whole numbers"),
        ({"threshold": 1.5}, "shares up to 1"),
        ({"force_at": 0}, "shares up to 1"),
        ({"relative_to": "worst"}, "best, uniform"),
        ({"proficiency": "loss"}, "weight, hits"),
    ],
)
def test_fields_that_mean_nothing(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ProgressiveExperts(**fields)


@pytest.mark.parametrize(("family", "why"), UNABLE.items())
def test_families_that_cannot(family: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        begin(tiny_moe(family))


def test_what_cannot_end_as_asked_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merges its experts"):
        begin(meo_of_moe(tiny_moe("mixtral"), segment_length=4))
    with pytest.raises(UnsupportedError, match="found no experts"):
        begin(tiny_dense("llama"))
    with pytest.raises(UsageError, match="make it shorter"):
        begin(tiny_moe("mixtral"), window=3)
    with pytest.raises(UnsupportedError, match="2 groups and needs 4 at least"):
        begin(stock("deepseek_v3"), final=2)
    with pytest.raises(UsageError, match="nothing was trained"):
        ProgressiveExperts().plan(tmp_path)
