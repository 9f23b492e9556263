"""The entropy of a mixture's gates in the loss: a plain formula of it, its gradient, and what it is good for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_layouts_meo import router_of
from meo_hf.modeling.moe_settings_meo import num_experts_of
from moe_contracts import KEPT, meo_of_moe, moe_modules
from moe_tiny import tiny_moe, tiny_moe_inputs
from test_trainer import arguments
from torch import Tensor
from training_rows import text_rows, word_tokenizer
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer, TrainerState

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.training import ProgressiveExperts, gate_entropy, routers, sharpen
from meo_hf.training.gate_entropy import GateEntropy, entropy_of
from meo_hf.training.routers import gates_of, logits_of, shares_of

torch.set_num_threads(1)
# NLLB-MoE is refused; PhiMoE's first gate is a softmax over experts that are nearly as good as the best
NO_RATIO = ("nllb-moe", "phimoe")


def trainer_of(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    collator = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)
    return Trainer(model, arguments(folder, **options), train_dataset=text_rows(64), data_collator=collator)


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Return each MoE block and what its router returned."""
    found: dict[str, tuple[Any, Any]] = {}
    handles = [
        router_of(block).register_forward_hook(
            lambda _, args, out, path=path, block=block: found.update({path: (block, out)})
        )
        for path, block in moe_modules(model).items()
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def plain_entropy(scores: Tensor, real: Tensor) -> Tensor:
    """Return the mean over real tokens of -sum p log p, p being scores divided by their sum."""
    shares = scores / scores.sum(-1, keepdim=True)
    return -(shares * shares.log()).sum(-1)[real].mean()


@pytest.mark.parametrize("family", [family for family in KEPT if family not in NO_RATIO])
def test_shares_are_what_the_router_weighs_by(family: str) -> None:
    """A token's gates are in the ratios of its shares, but for what Gemma 4 multiplies each expert's with."""
    model, row = (
        tiny_moe(family, **({"num_experts_per_tok": 2} if family == "llama4_text" else {})),
        MOE_FAMILIES[family],
    )
    experts = num_experts_of(model.config, row)
    with torch.no_grad():
        outputs = outputs_of(model, tiny_moe_inputs(family))
    for block, output in outputs.values():
        gates = gates_of(row.layout, block, output, experts).float()
        if family.startswith("gemma4"):
            gates = gates / block.router.per_expert_scale
        shares = shares_of(row, model.config, logits_of(row.layout, output))
        assert shares.sum(-1).sub(1).abs().max() < 1e-5
        taken = torch.where(gates == 0, 0, shares[:, :experts])
        assert (gates != 0).sum() >= len(gates) * 0.5  # LongCat and Zaya may select what is no expert
        per_gate = gates.sum(-1, keepdim=True) / taken.sum(-1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(gates, taken * per_gate, rtol=1e-3, atol=1e-5)


def test_entropy_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]], requires_grad=True)
    two = torch.tensor(2.0).log()
    torch.testing.assert_close(entropy_of(shares, None), (two + 0 + 1.5 * two) / 3)
    torch.testing.assert_close(entropy_of(shares, torch.tensor([True, True, False])), two / 2)
    assert entropy_of(shares, torch.tensor([False] * 3)) == 0
    entropy_of(shares, None).backward()
    assert shares.grad is not None
    assert shares.grad.isfinite().all()


SCORES = {
    "mixtral": lambda out: out[0].softmax(-1),
    "glm4_moe": lambda out: out[0].sigmoid(),
    "gemma4_text": lambda out: out[0],
    "dbrx": lambda out: out.softmax(-1),
    "jetmoe": lambda out: out[-1].softmax(-1),
}


def check_loss_and_gradient(family: str, folder: Path) -> None:
    """Compare what `sharpen` adds to a batch's loss, and to all gradients, with a plain formula."""
    model = tiny_moe(family).train()
    trainer = trainer_of(model, folder)
    batch = next(iter(trainer.get_train_dataloader()))
    count = batch["labels"][:, 1:].ne(-100).sum() * 4  # of four batches like this one
    real = batch["attention_mask"].flatten().bool()
    assert not real.all()
    plain = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    blocks = outputs_of(model, batch).values()
    entropy = torch.stack([plain_entropy(SCORES[family](out).flatten(0, -2), real) for _, out in blocks]).mean()
    sharpen(trainer, weight=0.7)
    sharp = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    torch.testing.assert_close(sharp - plain, 0.7 * entropy / 4, rtol=1e-4, atol=1e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(plain + 0.7 * entropy / 4, parameters, allow_unused=True, retain_graph=True)
    found = torch.autograd.grad(sharp, parameters, allow_unused=True)
    for name, one, two in zip(names, found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)
    weights = list(router_of(next(iter(moe_modules(model).values()))).parameters())
    own = torch.autograd.grad(0.7 * entropy, weights, retain_graph=True, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 1e-4 for gradient in own)


@pytest.mark.parametrize("family", SCORES)
def test_the_loss_and_its_gradient_are_those_of_a_plain_formula(family: str, tmp_path: Path) -> None:
    check_loss_and_gradient(family, tmp_path)


def softmax_for_all(family: Any, config: Any, logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def detached(shares: Tensor, real: Tensor | None) -> Tensor:
    return entropy_of(shares, real).detach()


def with_padding(shares: Tensor, real: Tensor | None) -> Tensor:
    return entropy_of(shares, None)


@pytest.mark.parametrize(
    ("name", "mutant", "family"),
    [
        ("shares_of", softmax_for_all, "glm4_moe"),
        ("entropy_of", detached, "mixtral"),
        ("entropy_of", with_padding, "mixtral"),
        ("share_of_batch", lambda *_: 1, "mixtral"),
    ],
)
def test_mutants_are_found(
    name: str, mutant: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_entropy, name, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check_loss_and_gradient(family, tmp_path)


def test_what_a_checkpoint_runs_again_is_heard_once(tmp_path: Path) -> None:
    """With and without gradient checkpointing: the same logs and weights; evaluation has the task's loss."""
    runs = []
    for mode in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = tiny_moe("mixtral")
        trainer = trainer_of(model, tmp_path, max_steps=2, gradient_accumulation_steps=2, **mode)
        trainer.eval_dataset = text_rows(8, seed=1)
        sharpen(trainer, weight=0.5)
        trainer.train()
        runs.append((trainer, model))
    (plain, one), (checkpointed, two) = runs
    entries = [[entry for entry in own.state.log_history if "loss" in entry] for own in (plain, checkpointed)]
    for first, second in zip(*entries, strict=True):
        for key in ("loss", "gate_entropy", "gate_entropy_weight"):
            assert second[key] == pytest.approx(first[key], rel=1e-5)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: n + t)
    unsharpened = trainer_of(one, tmp_path)
    unsharpened.eval_dataset = plain.eval_dataset
    assert plain.evaluate()["eval_loss"] == pytest.approx(unsharpened.evaluate()["eval_loss"], abs=1e-6)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    refused = trainer_of(tiny_moe("mixtral"), tmp_path, **reentrant)
    sharpen(refused, weight=0.5)
    with pytest.raises(UsageError, match="use_reentrant"):
        refused.train()


@torch.no_grad()
def loss_with(model: PreTrainedModel, top_k: int) -> float:
    made = copy.deepcopy(model).eval()
    for block in moe_modules(made).values():
        block.gate.top_k = top_k
    batch = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)(list(text_rows(64)))
    return made(**batch).loss.item()


def test_lower_entropy_lets_one_expert_do(tmp_path: Path) -> None:
    """The same seed with and without: what one expert instead of two costs shrinks to less than a half."""
    gaps, ends = [], []
    for weight in (0.0, 1.0):
        model = tiny_moe("mixtral")
        trainer = trainer_of(model, tmp_path, max_steps=25)
        sharpen(trainer, weight)
        trainer.train()
        ends.append([entry["gate_entropy"] for entry in trainer.state.log_history if "gate_entropy" in entry][-1])
        gaps.append(loss_with(model, 1) - loss_with(model, 2))
    assert ends[1] < 0.5 * ends[0]
    assert 0 < gaps[1] < 0.5 * gaps[0]


def test_it_goes_with_experts_that_are_dropped(tmp_path: Path) -> None:
    """Logits of dropped experts are minus infinity; one expert has no entropy."""
    for family in ("gpt_oss", "afmoe", "gemma4_text"):
        trainer = trainer_of(tiny_moe(family), tmp_path, max_steps=4)
        trainer.add_callback(ProgressiveExperts(window=1, threshold=0.9))
        sharpen(trainer, weight=0.5)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(torch.tensor([e["loss"], e["grad_norm"], e["gate_entropy"]]).isfinite().all() for e in entries)
        assert entries[0]["gate_entropy"] > 0.1
        assert entries[-1]["gate_entropy"] == pytest.approx(0, abs=1e-6)


def test_the_weight_rises() -> None:
    callback = GateEntropy(0.8, warmup=0.5)
    assert [callback.weight_at(TrainerState(max_steps=8, global_step=step)) for step in (0, 1, 2, 4, 7)] == (
        pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    )
    assert GateEntropy(0.8, warmup=0.0).weight_at(TrainerState(max_steps=8)) == 0.8


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_moe("mixtral"), tmp_path)
    for weight, warmup in ((-1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(UsageError, match="weight >= 0"):
            sharpen(trainer, weight, warmup)
    sharpen(trainer, 0.1)
    with pytest.raises(UsageError, match="already"):
        sharpen(trainer, 0.1)
    with pytest.raises(UsageError, match="merges its experts"):
        sharpen(trainer_of(meo_of_moe(tiny_moe("mixtral"), segment_length=4), tmp_path), 0.1)
    with pytest.raises(UnsupportedError, match="first two experts"):
        sharpen(trainer_of(tiny_moe("nllb-moe"), tmp_path), 0.1)
    with pytest.raises(UsageError, match="2-D mask"):
        routers.real_tokens({"attention_mask": torch.ones(1, 1, 4, 4)}, False, 4, torch.device("cpu"))
