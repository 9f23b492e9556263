"""What a recovery did, as data and for the model card."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meo_hf.training.recover_quality import Quality

REPORT_NAME = "recovery.json"
_TITLE = re.compile(r"\A(---\n.*?\n---\n)?\s*(# [^\n]*\n)", re.DOTALL)


@dataclass
class RecoveryReport:
    """What was trained, on what, and how far from the teacher the model was before and is after.

    `before` and `after` are None where nothing was held out. `history` has the loss and its parts, as means over the
    steps since the last entry. `gating` says how a MEO decoder's gates were refreshed in training.
    `seconds` are those of training in this process, after `resumed_from` steps.
    """

    model: dict[str, Any]
    gating: str | None
    teacher: dict[str, Any]
    output: str
    settings: dict[str, Any]
    files: list[dict[str, Any]]
    window: int
    training_windows: int
    held_out_windows: int
    steps: int
    tokens: int
    epochs: float
    parameters: int
    trained_parameters: int
    before: Quality | None
    after: Quality | None
    seconds: float
    resumed_from: int | None
    device: str
    versions: dict[str, str]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> tuple[float, float]:
        """The first and the last loss that was logged."""
        logged = [entry["loss"] for entry in self.history if "loss" in entry]
        return (logged[0], logged[-1]) if logged else (float("nan"), float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write `recovery.json`."""
        (folder / REPORT_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")


def write_card(report: RecoveryReport, old: str | None, folder: Path) -> None:
    """Write README.md: the model's card as it was, with a section on the recovery before everything else."""
    text = (
        old if old is not None and _TITLE.match(old) else f"---\nlibrary_name: transformers\n---\n\n# {report.output}\n"
    )
    title = _TITLE.match(text)
    end = title.end() if title is not None else 0
    rest = text[end:].strip("\n")
    earlier = f"\n## Before the recovery\n\n{_EARLIER}\n\n{rest}\n" if rest else ""
    (folder / "README.md").write_text(f"{text[:end]}\n{_section(report)}\n{earlier}", "utf-8")


_EARLIER = (
    "What follows was written of the model that the recovery started from: what it says about weight files, checks and "
    "quality does not hold for these weights."
)
_TRAINED = {
    "all": "all parameters",
    "routers": "the routers, nothing else",
    "adapters": "LoRA adapters on linear maps and experts, merged into the weights, and the routers",
}


def _section(report: RecoveryReport) -> str:
    settings = report.settings
    parts = {
        "KL": "kl_weight",
        "next token": "lm_weight",
        "hidden states": "hidden_weight",
        "feed-forwards": "ffn_weight",
    }
    loss = ", ".join(f"{name} x {settings[key]:g}" for name, key in parts.items() if settings[key])
    first, last = report.losses
    commit = f" at `{report.teacher['commit']}`" if report.teacher["commit"] else ""
    rows = {
        "Teacher": f"{report.teacher['id']}{commit}",
        "Started from": report.model["id"],
        "Trained": f"{_TRAINED[settings['train']]}: {report.trained_parameters:,} parameters",
        **({"Gates in training": f"routing={report.gating!r}"} if report.gating else {}),
        "Loss": f"{loss}; temperature {settings['temperature']:g}; {first:.4f} at the start, {last:.4f} at the end",
        "Text": f"{report.tokens:,} tokens ({report.epochs:.2f} passes over {report.training_windows:,} windows of "
        f"{report.window}), {report.steps:,} steps; {REPORT_NAME} has size and sha256 of the files",
        **_measured(report),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    intro = "Trained after its conversion to predict what its teacher does (distillation)."
    return f"## Recovery\n\n{intro}\n\n| | |\n|---|---|\n{table}"


def _measured(report: RecoveryReport) -> dict[str, str]:
    before, after = report.before, report.after
    if before is None or after is None:
        return {"Measured": "nothing was held out"}
    rows = {
        "KL from the teacher, held out": f"{before.kl:.4f} before, {after.kl:.4f} after, nats per token",
        "Same first choice as the teacher": f"{before.agreement:.1%} before, {after.agreement:.1%} after",
    }
    if after.perplexity is not None:
        found = f"{before.perplexity:.2f} before, {after.perplexity:.2f} after"
        rows["Perplexity, held out"] = f"{found}; the teacher's {after.teacher_perplexity:.2f}"
    return {**rows, "Held-out tokens": f"{after.tokens:,}"}
