"""Recover what a conversion or a reduction lost: distil the source into the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments, set_seed

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.output import check_output, check_space, written_beside
from meo_hf.conversion.source import public_name, quiet_transformers
from meo_hf.modeling.reference_meo import fingerprint
from meo_hf.training.distillation import WEIGHTS, DistillationTrainer, gating
from meo_hf.training.recover_data import Corpus, Windows, read_corpus
from meo_hf.training.recover_models import Checkpoint, check_pair, check_window, open_checkpoint
from meo_hf.training.recover_quality import Quality, measure
from meo_hf.training.recover_report import RecoveryReport, write_card
from meo_hf.training.recover_settings import RecoverySettings
from meo_hf.training.recover_trained import choose_trained, merged, narrow, widen
from meo_hf.training.recover_work import Stopping, Work
from meo_hf.version import versions

Advance = Callable[[str, int, int], None]
"""Called with what a run does, how many units of that are done, and how many there are."""
_SAVES = 10
_ADAM_BYTES = 12


class RecoveryStopped(KeyboardInterrupt):
    """A recovery was asked to stop, and left a checkpoint from which it can be resumed."""


def recover(
    meo: str | Path,
    output: str | Path,
    teacher: str | Path,
    data: Sequence[str | Path],
    settings: RecoverySettings | None = None,
    *,
    validation: Sequence[str | Path] = (),
    text_column: str = "text",
    resume: bool = False,
    overwrite: bool = False,
    source_revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    advance: Advance = lambda what, done, total: None,
) -> RecoveryReport:
    """Train a model to predict what its teacher does, and write it with tokenizer, card and `recovery.json`.

    The model is a MEO model or any other decoder-only or masked language model with the teacher's tokens. Checkpoints
    lie in `OUT.partial` until the output is complete; with `resume` a run goes on from there. Seeds the global random
    generators. Raises UsageError, UnsupportedError, SourceError or OutputError for what cannot be done, and
    RecoveryStopped where a signal stopped the training.
    """
    settings, output = settings or RecoverySettings(), Path(output)
    check_output(output, overwrite, [str(meo), str(teacher)])
    with quiet_transformers():
        student = open_checkpoint(str(meo), SourceOptions(token=token))
        source = open_checkpoint(str(teacher), SourceOptions(source_revision, token, trust_remote_code))
        tokenizer = check_pair(student, source)
        window = check_window(settings.window, student, source)
        advance("reading", 0, 1)
        corpus = read_corpus(data, validation, text_column, tokenizer, window, student.masked, settings.held_out)
        run = _Recovery(settings, student, source, tokenizer, corpus, output, advance)
        return run(resume, overwrite, callbacks)


class _Recovery:
    """One run, from its two checkpoints to the output."""

    def __init__(
        self,
        settings: RecoverySettings,
        student: Checkpoint,
        source: Checkpoint,
        tokenizer: Any,
        corpus: Corpus,
        output: Path,
        advance: Advance,
    ) -> None:
        self.settings, self.student, self.source, self.tokenizer = settings, student, source, tokenizer
        self.corpus, self.output, self.advance = corpus, output, advance
        self.work = Work(output)
        masked, seed = student.masked, settings.seed
        self.training = Windows(corpus.training, tokenizer, masked, seed)
        self.held_out = Windows(corpus.held_out, tokenizer, masked, seed + 1)

    def __call__(self, resume: bool, overwrite: bool, callbacks: Sequence[TrainerCallback]) -> RecoveryReport:
        self.work.open(self._description(), resume, overwrite)
        try:
            self.advance("loading", 0, 1)
            set_seed(self.settings.seed)
            model: Any = self.student.load("auto")
            dtypes = widen(model)
            parameters = model.num_parameters()
            model = choose_trained(model, self.settings.train, self.settings.rank)
            trainer = self._trainer(model, callbacks)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            check_space(self.output, 4 * parameters + 2 * _ADAM_BYTES * trained)
            before = self._before(model, trainer)
            resumed, seconds = self._train(trainer)
            model = merged(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
            narrow(model, dtypes)
            model.float()  # so that what is measured is what will be loaded
            after = self._measure(model, trainer, "measuring after")
            narrow(model, dtypes)
            report = self._report(trainer, parameters, trained, before, after, seconds, resumed)
            self._write(model, report, overwrite)
        finally:
            self.work.leave()
        self.work.remove()
        return report

    def _description(self) -> dict[str, Any]:
        """Say what the run is, so that another one does not go on with its checkpoints."""
        return {
            "options": self.settings.as_run(),
            "model": _contents(self.student),
            "teacher": _contents(self.source),
            "data": self.corpus.files,
            "windows": [len(self.training), len(self.held_out), self.corpus.training.shape[1]],
        }

    @property
    def _steps(self) -> int:
        settings, windows = self.settings, len(self.training)
        if settings.steps is not None:
            return settings.steps
        at_once = settings.batch_size * settings.accumulation
        if settings.tokens is not None:
            windows = math.ceil(settings.tokens / self.corpus.training.shape[1])
        return math.ceil(windows / at_once)

    def _trainer(self, model: Any, callbacks: Sequence[TrainerCallback]) -> DistillationTrainer:
        settings, steps = self.settings, self._steps
        args = TrainingArguments(
            output_dir=str(self.work.folder),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(settings.warmup_ratio * steps),
            bf16=settings.bf16,
            use_cpu=settings.place.type == "cpu",
            seed=settings.seed,
            logging_steps=max(1, steps // 100),
            save_steps=settings.save_steps or max(1, math.ceil(steps / _SAVES)),
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            include_num_input_tokens_seen="all",
            dataloader_pin_memory=settings.place.type == "cuda",
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        )
        if args.n_gpu > 1:  # nothing here was written for torch.nn.DataParallel
            args._n_gpu = 1
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        self.stopping = Stopping()
        trainer = DistillationTrainer(
            model,
            args,
            teacher=self.source.load(dtype),
            weights=settings.weights,
            train_dataset=self.training,
            callbacks=[*callbacks, self.stopping, _Steps(self.advance)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _before(self, model: Any, trainer: DistillationTrainer) -> Quality | None:
        known = self.work.read("before")
        if known is not None:
            return Quality(**known)
        before = self._measure(trainer._student, trainer, "measuring before")
        if before is not None:
            self.work.write({"before": asdict(before)})
        return before

    def _measure(self, model: Any, trainer: DistillationTrainer, what: str) -> Quality | None:
        if not len(self.held_out):
            return None
        model.to(trainer.args.device)
        return measure(
            model, trainer.teacher, self.held_out, self.settings.batch_size, self.settings.bf16,
            lambda done, total: self.advance(what, done, total),
        )  # fmt: skip

    def _train(self, trainer: DistillationTrainer) -> tuple[int | None, float]:
        """Train to the end; returns the step that the run went on from, and the seconds that it took."""
        checkpoint = self.work.checkpoint
        resumed = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        began = time.perf_counter()
        if checkpoint is not None and resumed == self._steps:  # the Trainer would train one step more
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer.model.load_state_dict(load_file(checkpoint / WEIGHTS), strict=False)  # type: ignore[union-attr]
            return resumed, 0.0
        say: Callable[[str], None] = lambda what: self.advance(what, trainer.state.global_step, self._steps)  # noqa: E731
        with self.stopping.listening(say):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        done = trainer.state.global_step
        if done < self._steps:
            raise RecoveryStopped(
                f"stopped after step {done} of {self._steps}; {self.work.folder} keeps a checkpoint: repeat the "
                "command with --resume to go on"
            )
        return resumed, round(time.perf_counter() - began, 3)

    def _report(
        self, trainer: DistillationTrainer, parameters: int, trained: int, before: Quality | None,
        after: Quality | None, seconds: float, resumed: int | None,
    ) -> RecoveryReport:  # fmt: skip
        device = trainer.args.device
        return RecoveryReport(
            model=self.student.entry,
            gating=gating(trainer._student).get("routing"),
            teacher=self.source.entry,
            output=public_name(str(self.output)),
            settings=self.settings.as_run(),
            files=self.corpus.files,
            window=self.corpus.training.shape[1],
            training_windows=len(self.training),
            held_out_windows=len(self.held_out),
            steps=trainer.state.global_step,
            tokens=int(trainer.state.num_input_tokens_seen),
            epochs=float(trainer.state.epoch or 0.0),
            parameters=parameters,
            trained_parameters=trained,
            before=before,
            after=after,
            seconds=seconds,
            resumed_from=resumed,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            versions=versions(),
            history=[entry for entry in trainer.state.log_history if "loss" in entry],
        )

    def _write(self, model: Any, report: RecoveryReport, overwrite: bool) -> None:
        self.advance("writing", 0, 1)
        card = self.student.folder / "README.md"
        with written_beside(self.output, overwrite) as folder:
            model.save_pretrained(folder, max_shard_size="5GB")
            self.tokenizer.save_pretrained(folder)
            report.write(folder)
            write_card(report, card.read_text("utf-8") if card.is_file() else None, folder)


class _Steps(TrainerCallback):
    """Says how many steps are done."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say it."""
        self._advance("training", state.global_step, state.max_steps)


def _contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint by what it holds, so that another one is noticed."""
    weights = sorted(checkpoint.folder.glob("*.safetensors"))
    files = {path.name: {**fingerprint(path), "modified": path.stat().st_mtime_ns} for path in weights}
    return {**checkpoint.entry, "files": files}
