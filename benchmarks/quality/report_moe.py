"""The section on mixtures of experts that become MEO models: what is lost, and what training wins back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ledger import Ledger
from moe import FRACTIONS, RATES, ROWS, planned
from report_text import Chosen, Entry, draw
from report_tools import setting_of, table

INTRODUCTION = """## From a mixture of experts to MEO

The source is the OLMoE of [benchmarks/compare](../benchmarks/compare/README.md): 8.4 million parameters, 4 layers, 8
experts of which each token selects 2, trained on {tokens:.1f} million tokens. Everything is measured on {windows}
held-out windows of 512 tokens. KL and top-1 agreement compare predictions with the source's. The source has 2 experts
per token, so half of its k is 1.

Recovery is `meo_hf.training.recover`: all weights, AdamW with a cosine schedule, windows of 512 tokens in batches of 4,
drawn from what the source was trained on. Rows learn the source's predictions (KL divergence), or the text's next
tokens where a name says so; the source itself can only do the latter, as its divergence from itself is zero. The rate
is the best of three by loss on validation windows, at {small:.0%} and seed 0, and serves for all fractions (* where it
is the first or last of those tried). Mean ± standard deviation over seeds, which draw other text.
"""


def section(folder: Path) -> str | None:
    """Return the section, with a plot of perplexity and FLOPs."""
    entries = list(Ledger(folder / "moe.jsonl"))
    if not entries:
        return None
    plain = {entry["key"]["row"]: entry["result"] for entry in entries if entry["key"]["fraction"] == 0}
    trained = [entry for entry in entries if entry["key"]["fraction"]]
    settings = entries[0]["key"]["settings"]
    text = INTRODUCTION.format(
        tokens=settings["source_tokens"] / 1e6, windows=settings["test_windows"], small=FRACTIONS[0]
    )
    parts = [text, "### Without training\n", _plain(plain)]
    found = _chosen(trained)
    if found:
        best = [chosen for fraction in FRACTIONS for chosen in found.get(fraction, {}).values()]
        draw(best, "perplexity", "flops_per_token", folder / "moe.png", "after recovery", "perplexity", True)
        parts += ["### Recovered\n", "![perplexity after recovery](../benchmarks/quality/moe.png)\n"]
        parts.append(_recovered(found, plain))
    parts += [_account(entries), _reading(found, plain)]
    return "\n".join(parts)


def summary(folder: Path) -> str | None:
    """Return the last line of the reading, of the largest fraction that was recovered."""
    entries = list(Ledger(folder / "moe.jsonl"))
    plain = {entry["key"]["row"]: entry["result"] for entry in entries if entry["key"]["fraction"] == 0}
    lines = _reading(_chosen([entry for entry in entries if entry["key"]["fraction"]]), plain).splitlines()
    return f"- A mixture of experts recovered, perplexity. {lines[-1].removeprefix('- ')}" if lines else None


def _plain(plain: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            name, f"{r['perplexity']:.2f}", f"{r['kl']:.4f}", f"{100 * r['agreement']:.1f}",
            f"{r['flops_per_token'] / 1e6:.2f}", f"{r['megabytes']:.1f}",
            *(f"{r[gate]:.3f}" if gate in r else "-" for gate in ("gate_entropy", "distance")),
        ]
        for name in ROWS if (r := plain.get(name))
    ]  # fmt: skip
    header = ["row", "perplexity", "KL, nats", "top-1 agrees, %", "MFLOPs per token", "MB"]
    return table([*header, "gate entropy", "from equal"], rows)


def _chosen(trained: Sequence[Entry]) -> dict[float, dict[str, Chosen]]:
    """Return the runs of each fraction and row, at the rate chosen at the smaller fraction."""
    found: dict[float, dict[str, Chosen]] = {}
    for name, row in ROWS.items():
        by = "validation_kl" if row.loss == "kl" else "validation_loss"
        own = [entry for entry in trained if entry["key"]["row"] == name]
        small = [entry for entry in own if entry["key"]["fraction"] == FRACTIONS[0]]
        first = Chosen.of(name, small, RATES, lambda result, by=by: result[by])
        if first is None:
            continue
        for fraction in FRACTIONS:
            runs = {
                e["key"]["seed"]: e["result"]
                for e in own
                if e["key"]["fraction"] == fraction and e["key"]["rate"] == first.rate
            }
            if runs:
                chosen = Chosen(f"{name}, {fraction:.0%}", first.rate, first.rates, first.planned, runs)
                found.setdefault(fraction, {})[name] = chosen
    return found


def _recovered(found: dict[float, dict[str, Chosen]], plain: dict[str, dict[str, float]]) -> str:
    rows = []
    for name in ROWS:
        for fraction, chosen in ((f, found[f][name]) for f in FRACTIONS if name in found.get(f, {})):
            before = plain.get(name) or plain.get(name.removesuffix(", by next tokens"))
            rows.append(
                [
                    name, f"{fraction:.0%}", f"{before['perplexity']:.2f}" if before else "-",
                    chosen.spread("perplexity"), chosen.spread("kl", digits=4), chosen.spread("agreement", 100, 1),
                    str(len(chosen.runs)), chosen.rate_text, f"{chosen.values('flops_per_token')[0] / 1e6:.2f}",
                ]
            )  # fmt: skip
    header = ["row", "of its tokens", "perplexity before", "after", "KL, nats", "top-1 agrees, %", "seeds", "rate"]
    return table([*header, "MFLOPs per token"], rows)


def _account(entries: Sequence[Entry]) -> str:
    done = sum(bool(entry["key"]["fraction"]) for entry in entries)
    return f"{done} runs of {planned()} planned; {setting_of(entries)}. `python benchmarks/quality/moe.py run`\n"


def _reading(found: dict[float, dict[str, Chosen]], plain: dict[str, dict[str, float]]) -> str:
    """Say how the best MEO row does beside the source that selects one expert, at the same cost."""
    lines = []
    meo = {name: r["perplexity"] for name, r in plain.items() if name.startswith("MEO")}
    if meo and "source, top-1" in plain:
        best = min(meo, key=lambda name: meo[name])
        own, cheap = meo[best], plain["source, top-1"]["perplexity"]
        shown = "lower" if own < cheap else "higher"
        lines.append(
            f"- Untrained, the best MEO row ({best}) has perplexity {own:.1f}, {shown} than the source's top-1 "
            f"({cheap:.1f}) at the same FLOPs."
        )
        average = plain.get("uniform average, aligned" if "aligned" in best else "uniform average")
        if average:
            lines.append(
                f"- The average of all experts, {'aligned, ' if 'aligned' in best else ''}without any gate, scores "
                f"{average['perplexity']:.1f}: that much of it needs no router."
            )
    for fraction, rows in found.items():
        meo_rows = {n: c.mean("perplexity") or 0 for n, c in rows.items() if n.startswith("MEO")}
        others = {n: rows[n].mean("perplexity") or 0 for n in rows if not n.startswith("MEO")}
        if meo_rows and others:
            best = min(meo_rows, key=lambda name: meo_rows[name])
            beside = "; ".join(f"{name} {value:.1f}" for name, value in others.items())
            lines.append(f"- With {fraction:.0%} of the tokens: {best} {meo_rows[best]:.1f}; {beside}.")
    return "\n".join(lines) + "\n" if lines else ""
