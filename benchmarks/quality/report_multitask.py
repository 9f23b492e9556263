"""The multi-task section: one model for three sets, and the dense models that are extracted from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ledger import Ledger
from multitask import EACH, MAX_LENGTH, MEO, RATES, SHARED
from report_classification import NAMES
from report_tools import Comparison, compare, holm, p_text, setting_of, spread, table, verdict
from training import unpacked

Entry = dict[str, Any]
Chosen = dict[str, dict[int, dict[str, Any]]]
"""Results at the chosen rate by set, then by seed."""
RUNS = (len(RATES) + 2) * (1 + len(MEO))
INTRODUCTION = """## Several tasks

Three sets at once, up to {rows:,} training rows of each and {tokens} tokens of a text, in batches drawn at random
(grouped by length, many would hold rows of one set). All arms have one head over the union of labels; a row is scored
among the labels of its own set. `{shared}` is one model for all, `{each}` one model per set, `MEO task` one model with
a gate per set (8 experts, born as copies). All arms see the same rows equally often. The rate is the best of three by
mean dev accuracy on seed 0 (of `{each}`: for each set).
"""


def summary(folder: Path) -> str | None:
    """Return a line that counts what MEO's comparisons show."""
    entries = list(Ledger(folder / "multitask.jsonl"))
    arms, sets = _arms(entries)
    told = []
    for other, name in ((SHARED, "one shared dense model"), (EACH, "a dense model for each set")):
        outcomes = [verdict(one, p) for a, b, _, one, p in _compared(arms, sets) if b == other and a != SHARED]
        if outcomes:
            counts = [f"{word} in {outcomes.count(word)}" for word in dict.fromkeys(("better", "worse", *outcomes))]
            told.append(f"against {name}: {', '.join(counts)} of {len(outcomes)}")
    return f"- {len(sets)} sets in one model. MEO task {'; '.join(told)}." if told else None


def _arms(entries: Sequence[Entry]) -> tuple[dict[str, Chosen], list[str]]:
    """Return the arms whose sweep is complete, and the sets."""
    sets: list[str] = entries[0]["key"]["sets"] if entries else []
    names = (SHARED, EACH, *(arm.name for arm in MEO)) if entries else ()
    return {name: chosen for name in names if (chosen := _chosen(entries, name, sets))}, sets


def section(folder: Path) -> str | None:
    """Return the section; None before an arm's sweep is complete."""
    entries = list(Ledger(folder / "multitask.jsonl"))
    arms, sets = _arms(entries)
    if not arms:
        return None
    planned = RUNS + (len(RATES) + 2) * len(sets)
    parts = [
        INTRODUCTION.format(tokens=MAX_LENGTH, rows=entries[0]["key"]["rows"], shared=SHARED, each=EACH),
        _accuracy(arms, sets),
    ]
    parts.append(
        f"{len(entries)} runs of {planned} planned, {entries[0]['key']['epochs']} epochs; {setting_of(entries)}. "
        "`python benchmarks/quality/multitask.py`\n"
    )
    compared = _comparisons(arms, sets)
    parts += [compared] if compared else []
    parts += [_extracted(arms, sets)]
    return "\n".join(parts)


def _chosen(entries: Sequence[Entry], arm: str, sets: Sequence[str]) -> Chosen | None:
    """Return what an arm scored on each set at its chosen rate, by seed; None before its sweep is complete."""
    own = [entry for entry in entries if entry["key"]["arm"] == arm]
    found: Chosen = {}
    for name in sets:
        runs = [entry for entry in own if entry["key"].get("task", name) == name]
        swept = [entry for entry in runs if entry["key"]["seed"] == 0]
        if len(swept) < len(RATES):
            return None
        best = min(swept, key=_badness)["key"]["rate"]
        found[name] = {
            e["key"]["seed"]: e["result"]["tasks"][name] | {"rate": best, "parameters": e["result"]["parameters"]}
            for e in runs
            if e["key"]["rate"] == best
        }
    return found


def _badness(entry: Entry) -> tuple[float, float]:
    tasks = entry["result"]["tasks"].values()
    return -sum(task["dev"] for task in tasks), sum(task["dev_loss"] for task in tasks)


def _accuracy(arms: dict[str, Chosen], sets: Sequence[str]) -> str:
    rows = []
    for name, by_set in arms.items():
        seeds = sorted(set.intersection(*(set(by_set[s]) for s in sets)))
        means = [float(np.mean([by_set[s][seed]["test"] for s in sets])) for seed in seeds]
        rates = ", ".join(dict.fromkeys(f"{by_set[s][0]['rate']:g}" for s in sets))
        stored = by_set[sets[0]][0]["parameters"] * (len(sets) if name == EACH else 1)
        scores = [spread([by_set[s][seed]["test"] for seed in seeds]) for s in sets]
        rows.append([name, *scores, spread(means), str(len(seeds)), rates, f"{stored / 1e6:.2f}"])
    header = ["arm, test %", *(NAMES[s] for s in sets), "mean", "seeds", "rate", "M parameters stored"]
    return table(header, rows)


def _compared(
    arms: dict[str, Chosen], sets: Sequence[str]
) -> list[tuple[str, str, str, Comparison, float | None]]:  # fmt: skip
    """Return first arm, second arm, set, comparison and corrected p value."""
    pairs = [(arm.name, other) for arm in MEO for other in (SHARED, EACH)] + [(SHARED, EACH)]
    cells = [(a, b, s) for a, b in pairs if a in arms and b in arms for s in sets]
    done = []
    for a, b, name in cells:
        seeds = sorted(set(arms[a][name]) & set(arms[b][name]))
        right = [[unpacked(r["right"], r["rows"]) for r in (arms[x][name][seed] for seed in seeds)] for x in (a, b)]
        done.append(compare(*right))
    return [(*cell, one, p) for cell, one, p in zip(cells, done, holm([one.p for one in done]), strict=True)]


def _comparisons(arms: dict[str, Chosen], sets: Sequence[str]) -> str:
    rows = []
    for a, b, name, one, p in _compared(arms, sets):
        numbers = [str(one.seeds), f"{100 * one.difference:+.1f}", one.interval, p_text(one.p), p_text(p)]
        rows.append([f"{a} - {b}, {NAMES[name]}", *numbers, verdict(one, p)])
    header = ["difference on test, points", "seeds", "mean", "95 % interval", "p", "p (Holm)", "shows"]
    return table(header, rows) if rows else ""


def _extracted(arms: dict[str, Chosen], sets: Sequence[str]) -> str:
    """Say how the extracted dense models compare with the MEO models that they were taken from."""
    taken = [
        run["extracted"] for arm in MEO if arm.name in arms for s in sets for run in arms[arm.name][s].values()
    ]  # fmt: skip
    if not taken:
        return ""
    differing = sum(one["differing_predictions"] for one in taken)
    largest = max(one["max_logit_difference"] for one in taken)
    verb = "all test predictions are equal" if differing == 0 else f"{differing} test predictions differ"
    kinds = ", ".join(sorted({one["class"] for one in taken}))
    return (
        f"Extracted with `meo_hf.extract`: {len(taken)} dense models ({kinds}, {taken[0]['parameters'] / 1e6:.2f} M "
        f"parameters each). Against the MEO model on its task, {verb}; logits differ by up to {largest:.1e}.\n"
    )
