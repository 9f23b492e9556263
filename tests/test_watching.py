"""What a watched training reports: loads, entropies and balance losses as they were, to every tracker."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_contracts import meo_of_moe
from moe_tiny import tiny_moe
from test_trainer import arguments, trainer_of
from tiny import recorded_gates, tiny_dense
from training_rows import classifier, decoder, sentence, text_rows, word_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

from meo_hf.training import watch
from meo_hf.training.load_plot import plot_load

ROUTER = "experts/bert.encoder.layer.0.intermediate.dense"


def test_loads_and_entropies_are_those_of_the_gates(tmp_path: Path) -> None:
    """Two steps between logs, against the gates that the routers returned in them."""
    model = classifier()
    trainer = trainer_of(model, tmp_path, max_steps=4, logging_steps=2)
    watch(trainer)
    kept: list[dict[str, int]] = []

    class Marker(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            kept.append({path: len(gates) for path, gates in recorded.items()})

    trainer.add_callback(Marker())
    with recorded_gates(model) as recorded:
        trainer.train()
    path = "bert.encoder.layer.0.intermediate.dense.router"
    for log, (first, last) in enumerate([(0, kept[1][path]), (kept[1][path], kept[3][path])]):
        sums, entropies = Counter[int](), []
        for gates in recorded[path][first:last]:
            for index, weights in zip(gates.top_k_index.tolist(), gates.top_k_weights.tolist(), strict=True):
                sums.update(dict(zip(index, weights, strict=True)))
                entropies.append(-sum(w * math.log(w) for w in weights if w))
        entry = trainer.state.log_history[log]
        shares = [sums[e] / sum(sums.values()) for e in range(6)]
        assert [entry[f"{ROUTER}/load_{e}"] for e in range(6)] == pytest.approx(shares, abs=1e-6)
        assert entry[f"{ROUTER}/entropy"] == pytest.approx(np.mean(entropies), abs=1e-6)
        assert entry[f"{ROUTER}/dead"] == sum(share == 0 for share in shares)
        assert max(shares) > 0.25  # or equal shares would hide an error


def test_padding_is_no_group_that_counts() -> None:
    """Rows that fill one segment, padded to four: the load and the balance loss are those of the short rows alone."""
    from meo_hf.training.usage import Usage

    rows = torch.randint(5, 99, (4, 4), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([rows, torch.ones(4, 12, dtype=torch.long)], 1)
    mask = (torch.arange(16) < 4).long().expand(4, -1)
    results = []
    for batch in ({"input_ids": rows, "labels": rows}, {"input_ids": padded, "attention_mask": mask}):
        batch.setdefault(
            "labels", batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)
        )
        model = decoder(router="top_k", balance_loss=1.0).train()
        usage = Usage(model)
        usage.start()
        loss = model(**batch).loss
        loads, balance = usage.read()
        results.append((loss.item(), balance, [(load.shares, load.entropy, load.groups) for load in loads]))
    assert results[0][2][0][2] == 4
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-5)
    for alone, among_padding in zip(results[0][2], results[1][2], strict=True):
        assert among_padding[0] == pytest.approx(alone[0], abs=1e-6)
        assert among_padding[1:] == pytest.approx(alone[1:], abs=1e-6)


def test_dead_experts_are_counted_and_drawn(tmp_path: Path) -> None:
    model = classifier(router="top_k")
    for module in model.modules():
        if type(module).__name__ == "MeoRouter":
            with torch.no_grad():
                module.weight.zero_()
                module.weight[[1, 4]] = 0.1 * torch.randn(2, module.weight.shape[1])
    trainer = trainer_of(model, tmp_path, learning_rate=0.0)
    watch(trainer)
    trainer.train()
    selected = trainer.state.log_history[-2]
    assert selected["experts/dead"] >= 2
    loads = json.loads((tmp_path / "expert_load.json").read_text())
    assert set(loads) == {"whole run", "since the last log"}
    assert all(sum(shares) == pytest.approx(1) for part in loads.values() for shares in part.values())
    picture = (tmp_path / "expert_load.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    even = {layer: [1 / 6] * 6 for layer in loads["whole run"]}
    plot_load(even, even, tmp_path / "even.png")
    assert (tmp_path / "even.png").read_bytes() != picture


def test_trackers_get_all_and_the_screen_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(classifier(), tmp_path, report_to=["tensorboard"])
    watch(trainer)
    trainer.train()
    events = next((tmp_path / "runs").rglob("events.out.tfevents.*")) if (tmp_path / "runs").is_dir() else None
    accumulator = EventAccumulator(str(events or next(tmp_path.rglob("events.out.tfevents.*"))))
    accumulator.Reload()
    tracked = [scalar.value for scalar in accumulator.Scalars(f"train/{ROUTER}/load_3")]
    history = [entry[f"{ROUTER}/load_3"] for entry in trainer.state.log_history if "loss" in entry]
    assert tracked == pytest.approx(history)
    assert [s.value for s in accumulator.Scalars("train/aux_loss")] == pytest.approx(
        [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry]
    )
    screen = capsys.readouterr().out
    assert "experts/dead" in screen
    assert "load_3" not in screen


def test_a_reported_balance_loss_is_what_the_loss_carries(tmp_path: Path) -> None:
    runs = {}
    for weight in (0.0, 0.5):
        trainer = trainer_of(classifier(router="top_k", balance_loss=weight), tmp_path, learning_rate=0.0)
        watch(trainer)
        trainer.train()
        runs[weight] = [entry for entry in trainer.state.log_history if "loss" in entry]
    for without, with_it in zip(runs[0.0], runs[0.5], strict=True):
        assert "aux_loss" not in without
        assert with_it["loss"] - without["loss"] == pytest.approx(with_it["aux_loss"], abs=1e-5)
        assert with_it["aux_loss"] > 0.05


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_mixtures_of_experts_are_watched_with_their_own_loss(family: str, tmp_path: Path) -> None:
    stock = tiny_moe(family)
    model = meo_of_moe(stock, segment_length=4)
    model.config.get_text_config().output_router_logits = True
    model.router_aux_loss_coef = 0.3
    collator = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=text_rows(32), data_collator=collator)
    watch(trainer)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["aux_loss"] > 0.1
    assert len([name for name in entry if name.endswith("load_0")]) == model.config.num_hidden_layers
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    count = batch["labels"][:, 1:].ne(-100).sum()
    whole, half = (model(**batch, num_items_in_batch=count * n).loss.item() for n in (1, 2))
    assert half == pytest.approx(whole / 2, rel=1e-5)  # the auxiliary loss too


def test_the_mixture_with_its_own_name_for_the_coefficient_shares_too() -> None:
    model = meo_of_moe(tiny_moe("jetmoe"), segment_length=4).train()
    model.config.output_router_logits = True
    model.aux_loss_coef = 0.3
    ids = torch.randint(5, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    count = torch.tensor(14)
    whole, half = (model(input_ids=ids, labels=ids, num_items_in_batch=count * n) for n in (1, 2))
    assert whole.aux_loss > 0.1
    assert half.loss.item() == pytest.approx(whole.loss.item() / 2, rel=1e-5)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(classifier(), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        watch(trainer)


def test_a_trainer_that_adds_aux_loss_itself_is_not_doubled(tmp_path: Path) -> None:
    from meo_hf.training.distillation import DistillationTrainer, DistillationWeights

    model, teacher = decoder(router="top_k", balance_loss=10.0), tiny_dense("llama")
    batch = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)(list(text_rows(4)))
    count = batch["labels"][:, 1:].ne(-100).sum()
    trainer = DistillationTrainer(
        model.train(), arguments(tmp_path), teacher=teacher, weights=DistillationWeights(), train_dataset=text_rows(4)
    )
    alone = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    watch(trainer)
    watched = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    assert alone.item() > 10
    assert watched.item() == pytest.approx(alone.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (alone, watched)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


class TestSFT:
    """TRL's trainer calls the inside of a model past its forward."""

    @staticmethod
    def trainer(folder: Path, model: Any, **options: Any) -> Any:
        import random

        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        drawn = random.Random(0)
        rows = [{"prompt": sentence(drawn), "completion": " " + sentence(drawn)} for _ in range(16)]
        made = {"loss_type": "nll", "bf16": False, "gradient_checkpointing": False, **options}
        return SFTTrainer(
            model, arguments(folder, SFTConfig, **made), train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(),
        )  # fmt: skip

    @pytest.mark.parametrize("level", ["segment", "sequence"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_the_loss_is_the_model_s_own(self, level: str, accumulation: int, tmp_path: Path) -> None:
        """With the balance loss once, and answers gated by their prompts, which only the labels show."""
        model = decoder(level=level, router="top_k", balance_loss=0.5)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer = self.trainer(tmp_path, model, learning_rate=0.0, **options)
        watch(trainer)
        batches: list[dict[str, Any]] = []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
        trainer.train()
        del model.forward  # TRL's
        batches = batches[:accumulation]
        counts = [batch["labels"][:, 1:].ne(-100).sum() for batch in batches]
        expected = sum(
            model.train()(
                **{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")},
                num_items_in_batch=sum(counts),
            ).loss.item()
            for batch in batches
        )
        entry = trainer.state.log_history[0]
        assert entry["loss"] == pytest.approx(expected, abs=1e-4)
        assert entry["aux_loss"] > 0.1

    def test_a_balance_loss_that_nobody_adds_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        from transformers.utils import logging

        logging.warning_once.cache_clear()
        self.trainer(tmp_path, decoder(), max_steps=1).train()
        assert "meo_hf.training.watch" in caplog.text
