"""The language-model section: perplexity beside cost, gates, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ledger import Ledger
from lm import RATES, STAGES
from lm_arms import ARMS
from report_text import Chosen, Difference, Entry, difference_table, differences, draw
from report_tools import setting_of, table

RUNS = 5  # three rates, then two more seeds
KINDS = ("wikipedia", "addresses", "plays")
INTRODUCTION = """## Language models

A small Llama ({parameters:.1f} million parameters, 4 layers, 192 features, byte-level BPE of 4,096 tokens) is trained
from scratch on {first:.1f} million tokens of Wikipedia leads, State of the Union addresses and Shakespeare's plays in
equal shares. Every arm goes on from it over the same new windows of {window} tokens, {rows} per step, for {steps} steps
({more:.2f} million tokens), by the stock `Trainer` (AdamW, cosine schedule, a fresh optimiser). The rate
is the best of three by loss on validation windows at seed 0 (* where it is the first or last of those tried, so that
another might do better). Perplexity is that of {test} held-out windows of whole documents that nobody trained on, mean
± standard deviation over seeds, which also change the windows' order. Expert arms have 8 experts, of which 2 are
selected, born as copies of the dense feed-forward, so all arms begin with the same function.

- `moe`: the same Llama up-cycled into a stock Mixtral, which routes each token, with its own balance loss (0.01).
- `meo-segment-T`: level `segment`, gates that read the T tokens before. `-drop`: born by drop-upcycling.
- `meo-prompt`: level `sequence`; the first half of a window is a prompt, whose mean gates all of the second half. No
  loss is taken in the prompt; `dense-answers` and `moe-answers` are trained in the same way.
- `meo-frozen-random`: as segment 64, with a random router that is not trained, spread so that it tells groups apart.
  `meo-uniform`: all experts with equal weights; copies stay copies, so this is dense training in another form.
- *Averaged*: the trained model, with all experts averaged in the place of what its gates choose. If that is as good,
  the gates do nothing.
- No gate reads what it helps to predict; every model is checked: other tokens in a window's last third leave earlier
  logits as they are.
"""


def section(folder: Path) -> str | None:
    """Return the section, with a plot of perplexity and FLOPs."""
    entries = list(Ledger(folder / "lm.jsonl"))
    runs = [entry for entry in entries if entry["key"]["arm"] in ARMS]
    start = next((entry for entry in entries if entry["key"]["arm"] == "start"), None)
    if not runs or start is None:
        return None
    arms = _arms(runs)
    settings, before = runs[0]["key"]["settings"], start["result"]
    tokens = settings["rows"] * settings["window"] / 1e6
    text = INTRODUCTION.format(
        parameters=before["parameters"] / 1e6, first=settings["first_steps"] * tokens, more=settings["steps"] * tokens,
        test=len(before["windows"]), **{name: settings[name] for name in ("window", "rows", "steps")},
    )  # fmt: skip
    times = next((entry for entry in entries if entry["key"]["arm"] == "times"), None)
    whole = [chosen for name, chosen in arms.items() if not ARMS[name].answers]
    draw(whole, "perplexity", "flops_per_token", folder / "lm.png", "whole windows", "perplexity")
    parts = [
        text,
        "![perplexity and FLOPs](../benchmarks/quality/lm.png)\n",
        "### Whole windows\n",
        _whole(whole, before, times),
        _account(runs),
    ]
    if times is not None:
        parts.append(_times(times))
    compared = differences(_pairs(arms, WHOLE), "windows")
    parts += [_comparison(compared), _reading(compared, arms)]
    if any(ARMS[name].answers for name in arms):
        answers = differences(_pairs(arms, ANSWERS), "answer_windows")
        parts += ["### Answers, gated by their prompts\n", _answers(arms, before), _comparison(answers)]
    gated = [chosen for chosen in arms.values() if chosen.values("told")]
    if gated:
        parts.append(_gates(gated))
    return "\n".join(part for part in parts if part)


def summary(folder: Path) -> str | None:
    """Return a line of perplexities relative to the dense model's, and to a mixture's."""
    arms = _arms([entry for entry in Ledger(folder / "lm.jsonl") if entry["key"]["arm"] in ARMS])
    told = [
        f"{one.first.name} / {one.second.name} {one.ratio:.3f} ({one.verdict})"
        for one in differences(_pairs(arms, (*WHOLE[:5], ANSWERS[0])), "windows")
    ]
    return f"- Language model, perplexity as a ratio: {', '.join(told)}." if told else None


def _arms(runs: Sequence[Entry]) -> dict[str, Chosen]:
    """Return the runs of each arm at the rate that was chosen for it."""
    arms: dict[str, Chosen] = {}
    for name in [name for stage in STAGES for name in stage]:
        own = [entry for entry in runs if entry["key"]["arm"] == name]
        if chosen := Chosen.of(name, own, RATES, lambda result: result["validation"]):
            arms[name] = chosen
    return arms


WHOLE = (
    ("meo-segment-64", "dense"), ("meo-segment-256", "dense"), ("moe", "dense"), ("meo-segment-64", "moe"),
    ("meo-segment-256", "moe"), ("meo-segment-64", "meo-frozen-random"), ("meo-segment-64-drop", "dense"),
    ("meo-segment-64", "meo-uniform"),
)  # fmt: skip
ANSWERS = (
    ("meo-prompt", "dense-answers"), ("moe-answers", "dense-answers"), ("meo-prompt", "moe-answers"),
    ("meo-prompt", "dense"),
)  # fmt: skip


def _pairs(arms: dict[str, Chosen], names: Any) -> list[tuple[Chosen | None, Chosen | None]]:
    return [(arms.get(first), arms.get(second)) for first, second in names]


def _whole(arms: Sequence[Chosen], before: dict[str, Any], times: Entry | None) -> str:
    timed = times["result"]["arms"] if times is not None else {}
    extra = ["step, ratio", "reading, ratio"] if timed else []
    rows = []
    for arm in arms:
        cells = [arm.name, arm.spread("perplexity"), arm.spread("bits_per_byte", digits=3)]
        cells += [arm.spread(kind, digits=1) for kind in KINDS] + [arm.spread("averaged_perplexity")]
        cells += [str(len(arm.runs)), arm.rate_text, f"{arm.values('flops_per_token')[0] / 1e6:.2f}"]
        if timed:
            own = timed.get(arm.name)
            cells += [f"{own[name]:.2f}" if own else "-" for name in ("step_ratio", "read_ratio")]
        rows.append([*cells, f"{arm.values('parameters')[0] / 1e6:.1f}"])
    cells = ["*before*", f"{before['perplexity']:.2f}", f"{before['bits_per_byte']:.3f}"]
    cells += [f"{before[kind]:.1f}" for kind in KINDS] + ["-", "-", "-", f"{before['flops_per_token'] / 1e6:.2f}"]
    rows.append([*cells, *(["-"] * len(extra)), f"{before['parameters'] / 1e6:.1f}"])
    header = ["arm", "perplexity", "bits per byte", *KINDS, "averaged", "seeds", "rate", "MFLOPs per token", *extra]
    return table([*header, "M parameters"], rows)


def _account(runs: Sequence[Entry]) -> str:
    done = len({(e["key"]["arm"], e["key"]["rate"], e["key"]["seed"]) for e in runs})
    planned = RUNS * sum(map(len, STAGES))
    return (
        f"{done} runs of {planned} planned; FLOPs of a window, a multiply-accumulate as two and a merge of k experts "
        f"as 2k - 1 per weight; {setting_of(runs)}. `python benchmarks/quality/lm.py run`\n"
    )


def _times(times: Entry) -> str:
    load = times["result"]["load_before"]
    noise = f" **Measured under load** ({load} before)." if load > 0.5 else ""
    return (
        f"Times: a training step without the optimiser, and reading one window, relative to the dense model; CPU time, "
        f"medians of {times['key']['rounds']} rounds, arms in turns.{noise} `python benchmarks/quality/lm.py time`\n"
    )


def _comparison(found: Sequence[Difference]) -> str:
    return difference_table(found, lambda arm: arm.values("flops_per_token")[0]) if found else ""


def _reading(found: Sequence[Difference], arms: dict[str, Chosen]) -> str:
    """Say what the comparisons show about the two questions."""
    lines = []
    for one in found:
        first, second = one.first.name, one.second.name
        if first.startswith("meo-segment") and second in ("dense", "moe"):
            question = "at about dense cost" if second == "dense" else "at lower cost"
            lines.append(f"- {first} against {second}, {question}: perplexity x {one.ratio:.3f} ({one.verdict}).")
    own = arms.get("meo-segment-64")
    if own is not None and (averaged := own.mean("averaged_perplexity")) is not None:
        change = averaged / (own.mean("perplexity") or 1) - 1
        shown = "so what its gates choose helps" if change > 0 else "so what its gates choose does not help"
        lines.append(
            f"- Averaging all experts of meo-segment-64 in the place of its gates changes its perplexity by "
            f"{change:+.1%}, {shown}."
        )
    return "\n".join(lines) + "\n" if lines else ""


def _answers(arms: dict[str, Chosen], before: dict[str, Any]) -> str:
    rows = []
    for name, arm in arms.items():
        gated = arm.spread("prompt_answers") if ARMS[name].kind == "meo" else "-"
        trained = "second half" if ARMS[name].answers else "all"
        rows.append([name, trained, arm.spread("answers"), gated, str(len(arm.runs)), arm.rate_text])
    rows.append(["*before*", "all", f"{before['answers']:.2f}", "-", "-", "-"])
    note = (
        "Perplexity of the second halves of all held-out windows, whatever an arm was trained on; for MEO with gates "
        "that go on reading, and with gates frozen at the middle. That is how `meo-prompt` was trained.\n"
    )
    header = ["arm", "loss taken on", "perplexity of answers", "gated by the prompt", "seeds", "rate"]
    return table(header, rows) + "\n" + note


def _gates(arms: Sequence[Chosen]) -> str:
    rows = [
        [
            arm.name, *(arm.spread(name, digits=2) for name in ("gate_entropy", "distance", "used_entropy", "told")),
            arm.spread("dead", digits=1), arm.spread("expert_spread", digits=3),
        ]
        for arm in arms
    ]  # fmt: skip
    note = (
        "Means over layers on held-out windows. *Entropy* of a gate's weights in nats (log 2 = 0.69 where two experts "
        "weigh the same), *distance* the total variation from equal weights, *use* the entropy of the mean gate "
        "relative to log 8, *told* the mutual information of groups and experts in nats (0: all groups get the same), "
        "*dead* the experts of a layer that no group selects, *spread* how far experts are from their mean, relative "
        "to it.\n"
    )
    header = ["gates", "entropy", "distance", "use", "told", "dead", "spread"]
    return "### Gates\n\n" + table(header, rows) + "\n" + note
