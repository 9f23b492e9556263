"""The section on summaries and answers."""

from __future__ import annotations

from pathlib import Path

from ledger import Ledger
from report_text import Chosen
from report_tools import setting_of, table
from seq2seq import ARMS, RATES, SEEDS

INTRODUCTION = """## Summaries and answers

A small T5 ({parameters:.1f} million parameters, 3 + 3 layers, byte-level BPE of 4,096 tokens) is trained from scratch
for {first} steps on both tasks and on filling gaps; every arm goes on from it for {steps} steps of {rows} pairs, half
of each task. Summaries: the synopsis of a Debian package from its long description (of all packages whose descriptions
begin alike, one). Questions: one of the first sentences of a Wikipedia lead with a number or a name masked; the lead,
in which it stands, is given. {test} held-out pairs of each task, greedy answers; ROUGE by rouge-score (with stemming),
exact match and F1 by torchmetrics' SQuAD. The rate is the best of three by mean validation loss at seed 0 (* where it
is the first or last of those tried); mean ± standard deviation over seeds. `meo-sequence`: one gate per source text
and layer; `meo-task`: one gate per task. 8 experts, of which 2 are selected, born as copies. SQuAD was not evaluated:
a model of this size that never saw a question in words has nothing to show there.
"""


def section(folder: Path) -> str | None:
    """Return the section."""
    entries = list(Ledger(folder / "seq2seq.jsonl"))
    runs = [entry for entry in entries if entry["key"]["arm"] in ARMS]
    start = next((entry for entry in entries if entry["key"]["arm"] == "start"), None)
    if not runs or start is None:
        return None
    settings, before = runs[0]["key"]["settings"], start["result"]
    columns = ("summary_loss", "rouge1", "rouge2", "rougeL", "answer_loss", "exact_match", "f1")
    rows, told = [], []
    chosen = {
        name: found
        for name in ARMS
        if (found := Chosen.of(name, [e for e in runs if e["key"]["arm"] == name], RATES, lambda r: r["validation"]))
    }
    for name, arm in chosen.items():
        cells = [name, *(arm.spread(column, digits=3 if "loss" in column else 1) for column in columns)]
        cells += [str(len(arm.runs)), arm.rate_text, f"{arm.values('flops')[0] / 1e6:.0f}"]
        rows.append([*cells, f"{arm.values('parameters')[0] / 1e6:.1f}"])
        if name != "dense" and "dense" in chosen:
            gaps = {c: (arm.mean(c) or 0) - (chosen["dense"].mean(c) or 0) for c in ("rougeL", "f1")}
            told.append(f"- {name} against dense: ROUGE-L {gaps['rougeL']:+.1f}, F1 {gaps['f1']:+.1f} points.")
    cells = ["*before*", *(f"{before[c]:.{3 if 'loss' in c else 1}f}" for c in columns), "-", "-"]
    rows.append([*cells, f"{before['flops'] / 1e6:.0f}", f"{before['parameters'] / 1e6:.1f}"])
    header = ["arm", "loss", "ROUGE-1", "ROUGE-2", "ROUGE-L", "loss of answers", "exact", "F1", "seeds", "rate"]
    planned = len(ARMS) * (len(RATES) + len(SEEDS))
    account = f"{len(runs)} runs of {planned} planned; {setting_of(runs)}. `python benchmarks/quality/seq2seq.py run`\n"
    text = INTRODUCTION.format(
        parameters=before["parameters"] / 1e6, first=settings["first_steps"], steps=settings["steps"],
        rows=settings["rows"], test=settings["test_pairs"],
    )  # fmt: skip
    return "\n".join([text, table([*header, "MFLOPs", "M parameters"], rows), account, *told, ""])
