"""Recovery: the loss is the one that is stated, runs resume exactly, and the output is a whole model."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from checkpoints import listing, run_cli
from compare_tiny import meo_of, saved_pair, windows_of, words, words_tokenizer
from fresh import Fresh
from meo_hf.modeling.moe_meo import GroupRouter
from meo_hf.modeling.router_meo import MeoRouter
from moe_tiny import VOCAB, tiny_moe
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, TrainerCallback, TrainingArguments

from meo_hf import recover
from meo_hf.errors import MeoError, OutputError, UnsupportedError, UsageError
from meo_hf.training import distillation
from meo_hf.training.distillation import DistillationTrainer, DistillationWeights, targets_of, token_sums
from meo_hf.training.recover import RecoveryStopped
from meo_hf.training.recover_data import Windows, documents, read_corpus
from meo_hf.training.recover_report import RecoveryReport
from meo_hf.training.recover_settings import RecoverySettings
from meo_hf.training.recover_trained import choose_trained, merged

CLOSE = 1e-6
QUICK = {"window": 16, "batch_size": 4, "steps": 6, "learning_rate": 3e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return saved_pair(tmp_path_factory.mktemp("pair"), text=700)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return dense_pair(tmp_path_factory.mktemp("dense"))


def dense_pair(folder: Path, family: str = "llama", **meo: Any) -> tuple[Path, Path, Path]:
    """Write a dense source, a MEO model whose experts differ from it, and a text."""
    stock = tiny.tiny_dense(family, **({} if family == "bert" else {"bos_token_id": None}))
    stock.save_pretrained(folder / "source")
    words_tokenizer(mask_token="w4").save_pretrained(folder / "source")
    level = {} if family == "bert" else {"level": "segment", "segment_length": 4}
    model = tiny.meo_of(stock, top_k=2, **{**level, **meo})
    with torch.no_grad():
        for module in tiny.merged_of(model).values():
            for stack in module.experts.parameters():
                stack += 0.3 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(5))
    model.save_pretrained(folder / "meo")
    (folder / "text.txt").write_text(words(700), "utf-8")
    return folder / "source", folder / "meo", folder / "text.txt"


def run(pair: tuple[Path, Path, Path], out: Path, options: Any = None, **settings: Any) -> RecoveryReport:
    source, meo, text = pair
    return recover(meo, out, source, [text], RecoverySettings(**{**QUICK, **settings}), **(options or {}))


def padded(rows: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    mask = (torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": rows * mask, "attention_mask": mask, "labels": torch.where(mask > 0, rows, -100)}


def trainer_of(student: Any, teacher: Any, folder: Path, dataset: Any = None, **options: Any) -> DistillationTrainer:
    weights = DistillationWeights(**options.pop("weights", {}))
    values = {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True, **options}
    values |= {"remove_unused_columns": False, "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0}
    args = TrainingArguments(str(folder), **values)
    return DistillationTrainer(student, args, teacher=teacher, weights=weights, train_dataset=dataset)


# the loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [2**24, 3 * 11])
def test_loss_is_the_plain_formula(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    teacher[0, 0, 3] = -torch.inf  # what the teacher rules out weighs nothing
    student.requires_grad_(True)
    targets = torch.tensor([[3, -100, 0, 10, -100], [1, 2, -100, 4, 5]])
    divergence, likelihood = token_sums(student, teacher, targets, temperature)
    (grad,) = torch.autograd.grad(divergence + 0.5 * likelihood, student)
    kl, nll = 0.0, 0.0
    for row in range(2):
        for at in range(5):
            if targets[row, at] != -100:
                p = (teacher[row, at] / temperature).softmax(-1)
                q = (student[row, at] / temperature).softmax(-1)
                kl = kl + temperature**2 * sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0)
                nll = nll - student[row, at].softmax(-1)[targets[row, at]].log()
    torch.testing.assert_close(divergence, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(likelihood, nll, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(kl + 0.5 * nll, student)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_targets_are_the_next_tokens() -> None:
    labels = torch.tensor([[-100, 5, 6], [7, 8, -100]])
    assert targets_of(labels, shifts=True).tolist() == [[5, 6, -100], [8, -100, -100]]
    assert targets_of(labels, shifts=False) is labels


def test_parts_of_the_loss_by_hand(tmp_path: Path) -> None:
    """KL, next token, hidden states and blocks of one padded batch, each from its definition."""
    stock = tiny_moe("mixtral")
    student = meo_of(stock)
    weights = {"kl": 0.7, "lm": 0.2, "hidden": 0.3, "ffn": 0.4}
    trainer = trainer_of(student, stock, tmp_path, weights=weights)
    rows, lengths = windows_of(3, 12), [12, 5, 9]
    loss = trainer.compute_loss(student, padded(rows, lengths))
    expected = dict.fromkeys(weights, 0.0)
    blocks: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", stock)):
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, out, name=name: blocks[name].append(out))
    for row, length in zip(rows, lengths, strict=True):
        ids = row[None, :length]
        for found in blocks.values():
            found.clear()
        s = student(ids, routing="segment", output_hidden_states=True)
        t = stock(ids, output_hidden_states=True)
        q, p = (out.logits[0, :-1].double().log_softmax(-1) for out in (s, t))
        expected["kl"] += (p.exp() * (p - q)).sum()
        expected["lm"] -= q.gather(1, ids[0, 1:, None]).sum()
        states = zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
        for key, pairs in (("hidden", states), ("ffn", zip(blocks["student"], blocks["teacher"], strict=True))):
            for a, b in pairs:
                distance, norm = (x[0, :-1].double().square().sum(-1) for x in (a - b, b))
                expected[key] += (distance / norm).sum() / 3
    total = sum(weights[key] * value for key, value in expected.items()) / sum(n - 1 for n in lengths)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_whole_texts_are_gated_segment_by_segment(tmp_path: Path) -> None:
    """Also by a model whose own default is to gate an answer by its prompt: texts have none."""
    stock = tiny_moe("mixtral")
    student = meo_of(stock, level="sequence")
    ids = windows_of(2, 12)
    q, p = (x.logits[:, :-1].log_softmax(-1) for x in (student(ids, routing="segment"), stock(ids)))
    loss = trainer_of(student, stock, tmp_path).compute_loss(student, padded(ids, [12, 12]))
    assert loss.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)


def test_accumulated_batches_are_one_big_batch(tmp_path: Path) -> None:
    """Rows of different lengths: a mean of means would differ. The parts are logged, weighted by tokens."""
    rows = padded(windows_of(4, 12), [12, 3, 7, 10])
    dataset = [{name: values[i] for name, values in rows.items()} for i in range(4)]
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        stock = tiny_moe("mixtral")
        student = meo_of(stock)
        weights = {"lm": 0.5, "hidden": 0.1, "ffn": 0.1}
        counts = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = trainer_of(student, stock, tmp_path, dataset, weights=weights, **counts)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((torch.cat([p.detach().flatten() for p in student.parameters()]), logs))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=CLOSE)
    for one, many in zip(found[0][1], found[1][1], strict=True):
        parts = one["kl"] + 0.5 * one["lm"] + 0.1 * one["hidden"] + 0.1 * one["ffn"]
        assert one["loss"] == pytest.approx(parts, rel=1e-5)
        assert all(one[key] == pytest.approx(many[key], rel=1e-4) for key in ("loss", "kl", "lm", "hidden", "ffn"))


def test_balance_loss_is_added_once(tmp_path: Path) -> None:
    stock = tiny.tiny_dense("llama")
    student = tiny.meo_of(stock, top_k=2, level="segment", segment_length=4, router="top_k", balance_loss=0.5)
    batch = padded(windows_of(3, 12), [12, 12, 12])
    trainer = trainer_of(student, stock, tmp_path)
    balance = student.train()(batch["input_ids"], routing="segment").aux_loss.item()
    assert balance > 0.01
    with_balance = trainer.compute_loss(student, batch).item()
    assert trainer._sums["aux_loss"] / trainer._sums["tokens"] == pytest.approx(balance, rel=1e-5)
    for module in tiny.merged_of(student).values():
        module.balance_loss = 0.0
    assert with_balance - trainer.compute_loss(student, batch).item() == pytest.approx(balance, rel=1e-4)


def test_a_mixtures_own_balance_loss_has_its_coefficient(tmp_path: Path) -> None:
    stock = tiny_moe("mixtral")
    student = meo_of(stock).train()
    student.config.output_router_logits, student.router_aux_loss_coef = True, 0.25
    trainer = trainer_of(student, stock, tmp_path)
    batch = padded(windows_of(2, 12), [12, 12])
    own = student(batch["input_ids"], attention_mask=batch["attention_mask"], routing="segment").aux_loss
    trainer.compute_loss(student, batch)
    assert trainer._sums["aux_loss"] / trainer._sums["tokens"] == pytest.approx(0.25 * float(own), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_feed_forwards_are_matched_where_a_family_keeps_them(family: str, tmp_path: Path) -> None:
    """Before experts differ a MEO model's feed-forwards return what the dense ones do."""
    head = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    stock = tiny.tiny_dense(family)
    assert isinstance(stock, head._model_mapping[type(stock.config)])
    student = tiny.meo_of(stock, top_k=2)
    batch = padded(windows_of(3, 12), [12, 5, 9])
    trainer = trainer_of(student, stock, tmp_path, weights={"kl": 0, "ffn": 1.0, "hidden": 1.0})
    assert len(trainer._pairs) == 2
    assert float(trainer.compute_loss(student, batch)) < 1e-9
    with torch.no_grad():
        for module in tiny.merged_of(student).values():
            module.experts.down_proj *= 2
    loss = float(trainer.compute_loss(student, batch))
    assert loss > 0.5, "a block that returns twice what it should is wrong by 100 %"


def test_checkpointed_layers_change_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    weights = {"hidden_weight": 0.2, "ffn_weight": 0.2, "lm_weight": 0.1, "steps": 3}
    plain, again = (
        run(pair, tmp_path / f"out{flag}", gradient_checkpointing=flag, **weights).history for flag in (False, True)
    )
    for one, other in zip(plain, again, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


# what is trained


def test_a_mixture_is_recovered_and_loads_anywhere(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, meo, text = pair
    before = {path: listing(path) for path in (source, meo)}
    report = run(pair, tmp_path / "out", steps=60, options={"validation": [text]})
    assert report.after is not None
    assert report.before is not None
    assert report.after.kl < 0.7 * report.before.kl
    assert report.after.agreement > report.before.agreement
    assert {path: listing(path) for path in (source, meo)} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "working files are gone"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = windows_of(2)
    logits = model(ids, routing="segment").logits
    fresh = Fresh()
    fresh.add("out", fresh_logits, folder=str(tmp_path / "out"), ids=ids.tolist())
    torch.testing.assert_close(torch.tensor(fresh.run(tmp_path)["out"]), logits, rtol=0, atol=CLOSE)
    teacher = AutoModelForCausalLM.from_pretrained(source).eval()
    measured = trainer_of(model, teacher, tmp_path / "t").compute_loss(model, padded(windows_of(43), [16] * 43))
    assert report.after.kl == pytest.approx(float(measured), rel=1e-5), "what was measured is what was written"
    saved = json.loads((tmp_path / "out" / "recovery.json").read_text("utf-8"))
    assert saved["after"]["kl"] == report.after.kl
    assert saved["tokens"] == 60 * 4 * 16 - 5 * 16, "the last batch of a pass has 3 rows"
    assert str(tmp_path.parent) not in json.dumps(saved), "paths are nobody's business"
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"{report.before.kl:.4f} before, {report.after.kl:.4f} after" in card


def fresh_logits(folder: str, ids: list[list[int]]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()  # type: ignore[name-defined] # noqa: F821
    transformers.AutoTokenizer.from_pretrained(folder)  # type: ignore[name-defined] # noqa: F821
    return model(torch.tensor(ids), routing="segment").logits.tolist()


def test_a_dense_conversion_is_recovered(dense: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = run(dense, tmp_path / "out", steps=60, ffn_weight=0.1)
    assert report.before is not None
    assert report.after is not None
    assert report.after.kl < 0.8 * report.before.kl
    assert {"kl", "ffn", "aux_loss"} <= report.history[0].keys()


def test_a_masked_language_model_is_recovered(tmp_path: Path) -> None:
    report = run(dense_pair(tmp_path, "bert"), tmp_path / "out", steps=60)
    assert report.before is not None
    assert report.after is not None
    assert report.after.kl < 0.8 * report.before.kl
    assert report.after.perplexity is None
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")).__name__ == "MeoBertForMaskedLM"


def test_a_stock_model_can_be_the_student(tmp_path: Path) -> None:
    """As a mixture with fewer experts is."""
    source, _, text = saved_pair(tmp_path, text=700)
    tiny_moe("mixtral", seed=1, num_local_experts=3).save_pretrained(tmp_path / "small")
    report = run((source, tmp_path / "small", text), tmp_path / "out", hidden_weight=0.1, ffn_weight=0.1)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "MixtralForCausalLM"
    with pytest.raises(UsageError, match="MixtralForCausalLM has no routers that merge experts"):
        run((source, tmp_path / "small", text), tmp_path / "routers", train="routers")


@pytest.mark.parametrize("name", ["pair", "dense"])
def test_routers_alone(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _, meo, _ = models = request.getfixturevalue(name)
    report = run(models, tmp_path / "out", train="routers")
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (meo, tmp_path / "out"))
    routers = {
        f"{path}.{name}"
        for path, module in before.named_modules()
        if isinstance(module, (MeoRouter, GroupRouter))
        for name, _ in module.named_parameters()
    }
    assert routers
    for (path, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (path not in routers), path
    assert report.trained_parameters == sum(before.get_parameter(path).numel() for path in routers)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx", "llama", "gpt2"])
def test_adapters_merge_exactly(family: str, tmp_path: Path) -> None:
    mixture = family in ("mixtral", "olmoe", "dbrx")
    student = meo_of(tiny_moe(family)) if mixture else tiny.meo_of(tiny.tiny_dense(family), top_k=2)
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    wrapped = choose_trained(student, "adapters", 4)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {"lora" in name for name in trained} == {True, False}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name in trained:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    ids = windows_of(2)
    expected = wrapped.eval()(ids, routing="segment").logits
    plain = merged(wrapped)
    assert type(plain) is type(student)
    torch.testing.assert_close(plain(ids, routing="segment").logits, expected, rtol=0, atol=1e-5)
    now = dict(plain.named_parameters())
    assert now.keys() == old.keys(), "no trace of the adapters is left"
    changed = {name for name in now if not torch.equal(now[name], old[name])}
    experts = {n for n in old if ".experts." in n and "bias" not in n}
    assert experts
    assert experts <= changed
    assert any("router" in n or "gate.weight" in n for n in changed)
    assert all(now[n].dim() > 1 for n in changed)
    assert not any("embed" in n or "lm_head" in n or "wte" in n or "wpe" in n for n in changed)


def test_types_of_weights_are_kept(tmp_path: Path) -> None:
    source, meo, text = saved_pair(tmp_path, text=300)
    AutoModelForCausalLM.from_pretrained(meo, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    run((source, tmp_path / "half", text), tmp_path / "out", steps=2)
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_references_become_weights(tmp_path: Path) -> None:
    from meo_hf import convert

    source, _, text = saved_pair(tmp_path, text=300)
    convert(str(source), tmp_path / "link", reference=True, verify="none", segment_length=4)
    run((source, tmp_path / "link", text), tmp_path / "out", steps=1)
    assert "weights" not in json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["meo"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("---\n")
    assert card.index("## Recovery") < card.index("## Before the recovery") < card.index("## Load")
    run((source, tmp_path / "out", text), tmp_path / "twice", steps=1)
    assert not (tmp_path / "twice" / "meo_report.json").exists(), "its hashes are those of other weights"


# interruptions


class Signal(TrainerCallback):
    """Sends a signal in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_resumed_run_is_an_uninterrupted_one(train: str, tmp_path: Path) -> None:
    """With noisy gates: the state of the generators counts too."""
    models = dense_pair(tmp_path) if train == "all" else saved_pair(tmp_path, "mixtral", text=700)
    settings = {"train": train, "lm_weight": 0.1, "save_steps": 5}
    handler = signal.getsignal(signal.SIGINT)
    whole = run(models, tmp_path / "whole", **settings)
    with pytest.raises(
        RecoveryStopped, match=r"stopped after step 4 of 6; .*out\.partial keeps a checkpoint.*--resume"
    ):
        run(models, tmp_path / "out", **settings, options={"callbacks": [Signal(4)]})
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    with pytest.raises(OutputError, match="holds an interrupted run: pass --resume"):
        run(models, tmp_path / "out", **settings)
    with pytest.raises(UsageError, match=r"another options lm_weight \(0.1, now 0.2\)"):
        run(models, tmp_path / "out", options={"resume": True}, **{**settings, "lm_weight": 0.2})
    again = run(models, tmp_path / "out", **settings, options={"resume": True})
    assert not (tmp_path / "out.partial").exists()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (again.resumed_from, again.steps, again.tokens) == (4, whole.steps, whole.tokens)
    assert (again.before, again.after) == (whole.before, whole.after)
    assert [entry["loss"] for entry in again.history] == [entry["loss"] for entry in whole.history]


def test_a_run_that_broke_after_its_last_step_trains_no_further(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pair, tmp_path / "whole", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("meo_hf.training.recover.write_card", Mock(side_effect=OSError("full")))
        with pytest.raises(OSError, match="full"):
            run(pair, tmp_path / "out", steps=2)
    assert not (tmp_path / "out").exists()
    again = run(pair, tmp_path / "out", {"resume": True}, steps=2)
    assert (again.steps, again.tokens, again.after) == (2, whole.tokens, whole.after)


class Killed(TrainerCallback):
    """Ends a run without waiting for the step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_what_stops_before_a_checkpoint_leaves_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path / "deep" / "out", options={"callbacks": [Killed()]})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="holds no interrupted run: leave out --resume"):
        run(pair, tmp_path / "out", options={"resume": True})


def test_command(pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, meo, text = pair
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": words(200, i)}) for i in range(3)), "utf-8")
    out = tmp_path / "out"
    base = ("recover", meo, out, "--teacher", source, "--window", 16, "--device", "cpu", "--batch-size", 4)
    data = ("--data", tmp_path / "rows.jsonl", "--text-column", "body", "--validation", text, "--tokens", 256)
    done = run_cli(*base, *data)
    assert done.code == 0, done.err
    assert "held-out perplexity" in done.out
    report = json.loads((out / "recovery.json").read_text("utf-8"))
    assert (report["steps"], report["tokens"], report["held_out_windows"]) == (4, 256, 43)
    done = run_cli(*base, *data)
    assert (done.code, done.err) == (2, f"meo-hf: {out} exists: give another output, or pass --overwrite\n")
    asked = iter([signal.SIGINT])
    step_end = "meo_hf.training.recover._Steps.on_step_end"
    monkeypatch.setattr(step_end, lambda *_, **__: next((signal.raise_signal(number) for number in asked), None))
    done = run_cli(*base, *data, "--overwrite")
    assert done.code == 130
    assert done.err.startswith("interrupted: stopped after step 2 of 4; ")
    assert json.loads((out / "recovery.json").read_text("utf-8")) == report, "the old output stands"


# data


def test_documents_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"one\ntwo",1\nthree,2\n', "utf-8")
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]', "utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', "utf-8")
    (tmp_path / "a.md").write_text("# one\n\ntwo", "utf-8")
    found = {path.suffix: list(documents(path, "--data", "text")) for path in tmp_path.iterdir()}
    assert found == {
        ".csv": ["one\ntwo", "three"],
        ".json": ["one", "two"],
        ".jsonl": ["one", "two"],
        ".md": ["# one\n\ntwo"],
    }


def test_documents_are_not_cut_at_rare_separators(tmp_path: Path) -> None:
    """Which Unicode takes for ends of lines, but JSON lines and CSV don't; nor is a byte order mark text."""
    odd, long = "one\u2028two\x85three\x0cfour", "word " * 40_000
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": odd}, ensure_ascii=False).encode())
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + f'text,n\n"{odd}",1\n{long},2\n'.encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + odd.encode())
    found = {path.suffix: list(documents(path, "--data", "text")) for path in tmp_path.iterdir()}
    assert found == {".jsonl": [odd], ".csv": [odd, long], ".txt": [odd]}
    assert csv.field_size_limit() == 131_072


def test_windows_of_documents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("w5 w6 w7" if name == "a" else "w8 w9 w20 w21", "utf-8")
    tokenizer = words_tokenizer(eos_token="w1", mask_token="w4")
    paths = [tmp_path / "a", tmp_path / "b"]
    corpus = read_corpus(paths, [], "text", tokenizer, 4, False, None)
    assert corpus.training.tolist() == [[5, 6, 7, 1]]
    assert corpus.held_out.tolist() == [[8, 9, 20, 21]]
    assert [file["file"] for file in corpus.files] == ["a", "b"]
    row = Windows(corpus.training, tokenizer, False, 0)[0]
    assert row["labels"].tolist() == [-100, 6, 7, 1], "nothing predicts a window's first token"
    rows = torch.full((400, 10), 7, dtype=torch.int32)
    rows[:, 0] = 1
    masked = Windows(rows, tokenizer, True, 0)
    inputs = torch.stack([masked[i]["input_ids"] for i in range(400)])
    assert masked[0]["labels"].tolist() == rows[0].tolist()
    assert (inputs[:, 0] == 1).all(), "special tokens are not masked"
    assert 0.13 < float((inputs[:, 1:] == 4).double().mean()) < 0.17


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 5}, "--tokens and --steps both say"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"window": 3}, "--window is 3"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"rank": 4}, "--rank has no effect with --train all"),
        ({"train": "some"}, "--train 'some' is unknown"),
        ({"dtype": "float16"}, "--dtype 'float16' is unknown"),
        ({"device": "toaster"}, "--device 'toaster' cannot be used"),
        ({"kl_weight": 0.0}, "all weights of the loss are 0"),
        ({"lm_weight": -1.0}, "the weight of 'lm' is -1.0"),
        ({"temperature": 0.0}, "the temperature is 0.0"),
        ({"temperature": 2.0, "kl_weight": 0.0, "lm_weight": 1.0}, "no effect without the KL divergence"),
    ],
)
def test_options_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecoverySettings(**{**QUICK, **settings})


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write models that fit nothing."""
    folder = tmp_path_factory.mktemp("others")
    tiny_moe("mixtral", vocab_size=VOCAB + 1).save_pretrained(folder / "vocabulary")
    tiny_moe("mixtral", num_hidden_layers=2).save_pretrained(folder / "shallow")
    words_tokenizer().save_pretrained(folder / "shallow")
    tiny_moe("mixtral").save_pretrained(folder / "words")
    words_tokenizer(eos_token="<end>").save_pretrained(folder / "words")
    tiny.tiny_dense("t5").save_pretrained(folder / "t5")
    tiny.tiny_dense("bert").save_pretrained(folder / "bert")
    tiny.tiny_dense("bert").bert.save_pretrained(folder / "headless")
    dense = tiny.tiny_dense("llama", bos_token_id=None)
    tiny.meo_of(dense, top_k=2, level="task", tasks=("a", "b")).save_pretrained(folder / "task")
    tasked = tiny.meo_of(dense, top_k=2, level="task", tasks=("a", "b"))
    tasked.set_task("a")
    tasked.save_pretrained(folder / "tasked")
    tiny.meo_of(dense, top_k=1, level="segment").save_pretrained(folder / "one")
    meo_of(tiny_moe("mixtral", num_experts_per_tok=1)).save_pretrained(folder / "one of a mixture")
    (folder / "short.txt").write_text("w1 w2 w3", "utf-8")
    (folder / "rows.jsonl").write_text('{"body": "w1"}', "utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({"teacher": "vocabulary"}, {}, UsageError, "has 99 tokens, the teacher .* 100"),
        ({"meo": "words"}, {}, UsageError, "different tokenizers"),
        ({"teacher": "bert"}, {}, UsageError, "AutoModelForCausalLM, the teacher .* AutoModelForMaskedLM"),
        ({"meo": "t5"}, {}, UnsupportedError, "is an encoder-decoder"),
        ({"meo": "headless"}, {}, UnsupportedError, "is saved as BertModel, which has no language-model head"),
        ({"teacher": "shallow"}, {"hidden_weight": 1.0}, UsageError, "the model has 3 layers, the teacher 2"),
        ({"meo": "shallow"}, {"ffn_weight": 1.0}, UsageError, r"the model has no model.layers.2.mlp"),
        ({"meo": "task"}, {}, UsageError, "no default task"),
        ({"meo": "tasked"}, {"train": "routers"}, UsageError, "a router is a table of gates"),
        ({"meo": "one"}, {"train": "routers"}, UsageError, "with top_k 1 every gate is 1"),
        ({"meo": "one of a mixture"}, {"train": "routers"}, UsageError, "with top_k 1 every gate is 1"),
        ({"data": "short.txt"}, {}, UsageError, "--data holds 3 tokens, too few for a window of 16"),
        ({"data": "rows.jsonl"}, {}, UsageError, r"row 1 has no text in column 'text' \(it has body\)"),
        ({"data": "none.txt"}, {}, UsageError, "none.txt cannot be read"),
        ({}, {"window": 65}, UsageError, "--window is 65, but .* has 64 positions"),
        ({}, {"held_out": 0.99}, UsageError, "of which 43 would be held out"),
        ({"meo": "nowhere/at/all"}, {}, MeoError, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    change: dict[str, str], settings: dict[str, Any], error: type[MeoError], message: str,
    pair: tuple[Path, Path, Path], others: Path, tmp_path: Path,
) -> None:  # fmt: skip
    names = {"teacher": pair[0], "meo": pair[1], "data": pair[2], **{k: others / v for k, v in change.items()}}
    models = (names["teacher"], names["meo"], names["data"])
    with pytest.raises(error, match=message):
        run(models, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
    if "teacher" in change and not settings:
        done = run_cli(
            "recover", names["meo"], tmp_path / "out", "--teacher", names["teacher"], "--data", names["data"]
        )
        assert done.code == 2
        assert done.err.startswith("meo-hf: ")
