"""The stock Trainers train MEO models: every option that touches loss, batches, checkpoints or modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import meo_of, tiny_dense
from torch import Tensor
from training_rows import classifier, decoder, labelled_rows, mixture, sentence, text_rows, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from meo_hf.training import watch

MAKERS: dict[str, Callable[..., PreTrainedModel]] = {"classifier": classifier, "decoder": decoder, "mixture": mixture}
KINDS = ("classifier", "decoder")


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> Any:
    defaults = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 8}
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2}
    return kind(str(folder), **{**defaults, **fixed, **options})


def trainer_of(model: PreTrainedModel, folder: Path, rows: int = 64, **options: Any) -> Trainer:
    tokenizer, classifies = word_tokenizer(), model.config.model_type == "meo_bert"
    data = labelled_rows(rows) if classifies else text_rows(rows)
    collator: Any = DataCollatorWithPadding(tokenizer)
    if not classifies:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    extra = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options}
    return Trainer(model, arguments(folder, **options), train_dataset=data, data_collator=collator, **extra)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_every_part_and_lowers_the_loss(kind: str, tmp_path: Path) -> None:
    model = MAKERS[kind]()
    before = weights(model)
    trainer = trainer_of(model, tmp_path, max_steps=30)
    trainer.train()
    assert np.mean(losses(trainer)[-5:]) < np.mean(losses(trainer)[:5]) - 0.1
    after = weights(model)
    still = [n for n in before if torch.equal(before[n], after[n]) and not n.endswith("position_ids")]
    assert not [name for name in still if "expert" in name or "router" in name], still


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [(kind, mode) for kind in ("classifier", "decoder") for mode in (None, False, True)] + [("mixture", None)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, checkpointing: bool | None, tmp_path: Path) -> None:
    """Losses of the steps after it and all weights, with noisy gates and dropout, to the last bit."""
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    meo = {"balance_loss": 0.0} if checkpointing else {}  # which a reentrant checkpoint would lose: refused
    whole = trainer_of(MAKERS[kind](**meo), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer_of(MAKERS[kind](seed=7, **meo), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    assert_same(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_equal_one_batch(kind: str, tmp_path: Path) -> None:
    """Rows of different lengths, so that `num_items_in_batch` matters; plain gates without a balance loss."""
    runs = {}
    for size, steps in ((8, 1), (2, 4)):
        model = MAKERS[kind](router="top_k", balance_loss=0.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = trainer_of(model, tmp_path, learning_rate=0.1, max_grad_norm=0, **options)
        trainer.train()
        runs[size] = (losses(trainer), weights(model))
    assert runs[2][0] == pytest.approx(runs[8][0], abs=2e-6)
    assert_same(runs[2][1], runs[8][1], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_label_smoothing_keeps_the_balance_loss(kind: str, accumulation: int, tmp_path: Path) -> None:
    """Alike experts compute what the dense model does, so the difference of their losses is the balance loss."""
    dense = tiny_dense("llama") if kind == "decoder" else None
    model = MAKERS[kind](router="top_k", balance_loss=0.5)
    options = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    smoothed = {}
    for watched in (False, True):
        trainer = trainer_of(copy.deepcopy(model), tmp_path, **options)
        callback = watch(trainer) if watched else None
        trainer.train()
        smoothed[watched] = losses(trainer)[0]
    balance = trainer.state.log_history[0]["aux_loss"]
    assert callback is not None
    assert balance > 0.05
    if accumulation == 1:  # else each batch counts by its share of the labels
        assert smoothed[True] - smoothed[False] == pytest.approx(balance, abs=1e-5)
    assert 0.9 * balance < smoothed[True] - smoothed[False] < 1.1 * balance
    if dense is not None:  # the labels are shifted as in the stock class
        stock = trainer_of(dense, tmp_path, **options)
        stock.train()
        assert smoothed[False] == pytest.approx(losses(stock)[0], abs=1e-5)


def test_without_a_watcher_a_lost_balance_loss_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    batch = next(iter(trainer_of(model, tmp_path).get_train_dataloader()))
    del batch["labels"]
    logging.warning_once.cache_clear()  # another test may have heard it
    outputs = model.train()(**batch)
    assert outputs.aux_loss.requires_grad
    assert "meo_hf.training.watch" in caplog.text
    assert "aux_loss" not in model.eval()(**batch)


def test_watching_twice_or_a_stock_model_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(classifier(), tmp_path)
    watch(trainer)
    with pytest.raises(ValueError, match="watched already"):
        watch(trainer)
    with pytest.raises(ValueError, match="give a MEO model"):
        watch(trainer_of(tiny_dense("llama"), tmp_path))


def test_metrics_predictions_and_evaluation(tmp_path: Path) -> None:
    """Predictions are logits alone, the evaluation's loss has no balance loss, and padding changes neither."""

    def accuracy(prediction: Any) -> dict[str, float]:
        assert isinstance(prediction.predictions, np.ndarray)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model, rows = classifier(), labelled_rows(24, seed=5)
    trainer = trainer_of(model, tmp_path, eval_dataset=rows, compute_metrics=accuracy, per_device_eval_batch_size=5)
    watch(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    predicted = trainer.predict(rows)
    collate = DataCollatorWithPadding(word_tokenizer())
    with torch.no_grad():
        alone = [model.eval()(**collate([rows[i]])) for i in range(len(rows))]
    logits = torch.cat([output.logits for output in alone])
    assert predicted.predictions.shape == (24, 3)
    np.testing.assert_allclose(predicted.predictions, logits.numpy(), atol=2e-6)
    assert metrics["eval_loss"] == pytest.approx(torch.stack([output.loss for output in alone]).mean().item(), abs=1e-5)
    assert metrics["eval_accuracy"] == np.mean(logits.argmax(1).numpy() == np.array(rows["label"]))
    assert not [name for name in metrics if "experts" in name]


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"train_sampling_strategy": "group_by_length"},
        {"neftune_noise_alpha": 5.0},
        {"optim": "adafactor"},
        {"auto_find_batch_size": True},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_train(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MAKERS[kind]()
    before = weights(model)
    trainer = trainer_of(model, tmp_path, **options)
    watch(trainer)
    trainer.train()
    assert np.isfinite(losses(trainer)).all()
    changed = [n for n, value in weights(model).items() if "experts" in n and not torch.equal(value, before[n])]
    assert changed
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_compiled_training_gives_the_same_losses(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"torch_compile": True, "torch_compile_backend": "eager"}]
    runs = []
    for option in options:
        trainer = trainer_of(classifier(router="top_k"), tmp_path, max_steps=2, **option)
        trainer.data_collator = DataCollatorWithPadding(word_tokenizer(), pad_to_multiple_of=12)
        watch(trainer)
        trainer.train()
        runs.append([(entry["loss"], entry["aux_loss"]) for entry in trainer.state.log_history[:2]])
    np.testing.assert_allclose(runs[1], runs[0], atol=1e-5)


def test_bf16_stays_close(tmp_path: Path) -> None:
    plain, half = (trainer_of(classifier(router="top_k"), tmp_path, bf16=bf16) for bf16 in (False, True))
    for trainer in (plain, half):
        trainer.train()
    assert losses(half)[0] == pytest.approx(losses(plain)[0], rel=2e-2)
    assert losses(half) != losses(plain)


def test_a_mixture_s_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Though its files name tensors otherwise than the live model does."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(mixture(), tmp_path, eval_dataset=text_rows(8, 3), **options)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated.index(max(evaluated)) < 3  # not the last: the worst serves as the best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-6)


def test_part_of_an_expert_stack_is_not_taken_for_the_whole() -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = mixture()
    stored = revert_weight_conversion(model, model.state_dict())
    assert set(stored) - set(model.state_dict())
    other = mixture(seed=5)
    other.load_state_dict(stored)
    assert_same(weights(other), weights(model))
    lost = next(name for name in stored if "experts.4" in name)
    with pytest.raises(RuntimeError):
        mixture(seed=5).load_state_dict({name: value for name, value in stored.items() if name != lost}, strict=False)
    few = {name: value for name, value in stored.items() if "experts" not in name}
    missing = mixture(seed=5).load_state_dict(few, strict=False).missing_keys
    assert missing
    assert all("experts" in name for name in missing)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, rows = classifier(), labelled_rows(24, seed=5)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.2, "max_steps": 6}
    trainer = trainer_of(model, tmp_path, eval_dataset=rows, **options)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-6)
    loaded = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(loaded), weights(trainer.model))


def test_seq2seq_trainer_generates_and_scores(tmp_path: Path) -> None:
    import random

    drawn, tokenizer = random.Random(0), word_tokenizer()
    pairs = [(sentence(drawn), sentence(drawn, 2, 5)) for _ in range(32)]
    rows = [{**tokenizer(source), "labels": tokenizer(target)["input_ids"]} for source, target in pairs]
    torch.manual_seed(0)
    model = meo_of(tiny_dense("bart"), level="sequence", top_k=2)
    model.generation_config.max_length = 8
    options = {"predict_with_generate": True, "generation_num_beams": 2, "max_steps": 8, "label_smoothing_factor": 0.1}
    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, **options),
        train_dataset=rows,
        eval_dataset=rows[:6],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    watch(trainer)
    trainer.train()
    predicted = trainer.predict(rows[:6], max_length=8, num_beams=2)
    batch = {k: v for k, v in tokenizer([pairs[0][0]], return_tensors="pt").items() if k != "token_type_ids"}
    alone = model.generate(**batch, max_length=8, num_beams=2)[0]
    kept = [token for token in predicted.predictions[0] if token not in (-100, 1)]
    assert kept == [token for token in alone.tolist() if token != 1]
    assert np.isfinite(predicted.metrics["test_loss"])
    assert trainer.state.log_history[0]["aux_loss"] > 0
