"""The symmetry section: how experts may differ at birth, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arms import DENSE, MAIN, NUM_EXPERTS, SYMMETRY, Arm
from ledger import Ledger
from report_classification import Costs, Pair, command, compare_pairs, comparison_table, title
from report_tools import setting_of, spread, table
from runs import ArmRuns, arm_runs, by_study

COPY = Arm("sequence", 2, "copy")
BIRTHS = ("noise", "drop-upcycle", "fine-tunes")
SHOWN = (
    DENSE,
    SYMMETRY[-1],
    COPY,
    *SYMMETRY[:3],
    *(arm for arm in MAIN if arm.kind in ("uniform", "moe") and arm.top_k in (None, 2)),
    *SYMMETRY[3:5],
)
INTRODUCTION = f"""## Breaking symmetry

Experts that begin equal learn the same thing unless something tells them apart. `copy`: equal experts, told apart by
the router's noise alone (the published way); `noise`: a hundredth of the weights' spread added; `drop-upcycle`: half
of each expert's neurons drawn anew; `fine-tunes`: {NUM_EXPERTS} dense models, each fine-tuned on its eighth of the
training rows, together as many steps as one dense run. That extra training is counted: compare such arms with dense
trained for twice the steps. Protocol as above. *Distance*: how far the trained experts' second matrices lie from
their mean, relative to the mean's norm.
"""


def section(folder: Path) -> str | None:
    """Return the section; None before a birth other than `copy` was measured."""
    parts = []
    for study, own in by_study(list(Ledger(folder / "classification.jsonl"))).items():
        found = [runs for arm in SHOWN if (runs := arm_runs(own, arm)) is not None]
        births = [runs.arm for runs in found if runs.arm.kind == "sequence" and runs.arm.birth in BIRTHS]
        if not births or COPY not in [runs.arm for runs in found]:
            continue
        pairs: list[tuple[Arm, Arm]] = [(arm, COPY) for arm in births]
        pairs += [
            (Arm("sequence", 2, "fine-tunes"), other) for other in (SYMMETRY[-1], Arm("uniform", None, "fine-tunes"))
        ]
        pairs += [(Arm("moe", 2, "fine-tunes"), Arm("moe", 2, "copy")), (SYMMETRY[-1], DENSE)]
        compared = compare_pairs(found, pairs)
        new = [runs for runs in found if runs.arm in SYMMETRY]
        done = sum(runs.done for runs in new)
        account = (
            f"{len(new)} of {len(SYMMETRY)} further arms, {done} runs of {5 * len(SYMMETRY)} planned; "
            f"{setting_of(own)}. `{command(study, 'classification.py', ' --arms symmetry')}`\n"
        )
        costs = Costs(folder / "costs.jsonl", study[0], study[1])
        parts += [f"### {title(study)}: births\n", _table(found), account]
        parts += [comparison_table(compared, costs), _recommendation(compared, len(births))]
    return "\n".join([INTRODUCTION, *parts]) if parts else None


def _table(found: Sequence[ArmRuns]) -> str:
    rows = []
    for runs in found:
        results = runs.results
        distance, read = runs.mean("expert_distance"), runs.mean("input_share")
        steps = results[0]["steps"] * (2 if runs.arm.birth == "fine-tunes" else 1)
        cells = [runs.arm.name + (", copy" if runs.arm.birth == "copy" else ""), spread([r["test"] for r in results])]
        cells += [spread([r["dev"] for r in results]), str(len(results)), runs.rate_text, f"{steps:,}"]
        rows.append([*cells, *("-" if x is None else f"{x:.3f}" for x in (distance, read))])
    return table(["arm", "test %", "dev %", "seeds", "rate", "steps in all", "distance", "gate: input"], rows)


def _recommendation(pairs: Sequence[Pair], births: int) -> str:
    """Say which birth the measurement speaks for."""
    against = [pair for pair in pairs if pair.second == COPY]
    better = [pair for pair in against if pair.shows == "better"]
    worse = [str(pair.first.birth) for pair in against if pair.shows == "worse"]
    if better:
        best = max(better, key=lambda pair: pair.comparison.difference)
        text = f"Here `{best.first.birth}` is better than `copy`: {best.told}."
    else:
        text = f"Here none of {births} other birth(s) is better than `copy` beyond noise, so `copy` stays the default."
    return text + (f" Worse than `copy`: {', '.join(worse)}." if worse else "") + "\n"
