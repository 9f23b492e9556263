"""The adapter section: LoRA on and around merged experts, against training all weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arms import ADAPTERS, DENSE, EMBEDDINGS, Arm
from ledger import Ledger
from lora_arms import RANK
from report_classification import Costs, Pair, command, compare_pairs, comparison_table, resolution, tally, title
from report_tools import setting_of, spread, table
from runs import ArmRuns, Entry, arm_runs, by_study

SWEEPS = {**dict.fromkeys(ADAPTERS, 4), **dict.fromkeys(EMBEDDINGS, 3)}
MEO = Arm("sequence", 2, "copy")
PER_EXPERT, SHARED, ATTENTION, DENSE_ATTENTION, DENSE_FEED_FORWARD, WITH_ROUTERS = ADAPTERS
AGAINST_FULL = (
    *((arm, MEO) for arm in (PER_EXPERT, WITH_ROUTERS, SHARED, ATTENTION)),
    *((arm, DENSE) for arm in (DENSE_ATTENTION, DENSE_FEED_FORWARD)),
)
CONTROLS = ((EMBEDDINGS[0], MEO), (EMBEDDINGS[1], DENSE))
MEO_AGAINST_DENSE = (
    (PER_EXPERT, DENSE_FEED_FORWARD),
    (SHARED, DENSE_FEED_FORWARD),
    (ATTENTION, DENSE_ATTENTION),
)
AMONG_ADAPTERS = (
    (PER_EXPERT, SHARED),
    (PER_EXPERT, ATTENTION),
    (WITH_ROUTERS, PER_EXPERT),
    *MEO_AGAINST_DENSE,
    (EMBEDDINGS[0], PER_EXPERT),
    (EMBEDDINGS[1], DENSE_ATTENTION),
)
INTRODUCTION = f"""## Adapters against full fine-tuning

The same models, steps, seeds and rows as under Classification, but only adapters and the head (pooler and classifier,
which begin fresh in every arm) are trained. LoRA of rank {RANK}, alpha {2 * RANK}, no dropout; all arms adapt query and
value. The rate is the best of four, from 0.0003 to 0.01, where all weights had three.

- `attention`: nothing else, by stock PEFT. On a MEO model whose experts are born as copies they stay copies, so this
  is the dense model with that LoRA in another form.
- `per expert`: a pair of factors for each expert (`MeoLoraConfig`, both maps), merged by gates that are not trained;
  `and routers`: by gates that are. `shared`: one pair for the merged expert; experts stay copies here too.
- `feed-forward`: stock PEFT on both maps of the dense feed-forward, which `shared` on a MEO model is in another form.
- `and embeddings`: word embeddings are trained too, all of them. A control, added after the other arms were seen: does
  what they lack come from frozen embeddings, which are most of this model? Its rate is the best of the lower three.
- *Trained*: parameters that get updates, the head's among them; *share*: of those that full fine-tuning trains.
  *Distance*: as under Breaking symmetry, after the adapter was merged into the weights. FLOPs ratios hold for adapters
  that are merged so.
"""


def section(folder: Path) -> str | None:
    """Return the section; None before an adapter was measured."""
    parts = []
    for study, own, found, compared in _studies(folder):
        adapters = [runs for runs in found if runs.arm.adapter]
        account = (
            f"{len(adapters)} of {len(SWEEPS)} arms with adapters, {sum(runs.done for runs in adapters)} runs of "
            f"{sum(sweep + 2 for sweep in SWEEPS.values())} planned; {setting_of(own)}. "
            f"`{command(study, 'classification.py', ' --arms adapters')}`, then `--arms embeddings`\n"
        )
        costs = Costs(folder / "costs.jsonl", study[0], study[1])
        parts += [f"### {title(study)}: adapters\n", _table(found), account]
        parts += [comparison_table(compared, costs), _reading(compared)]
    return "\n".join([INTRODUCTION, *parts]) if parts else None


def summary(folder: Path) -> str | None:
    """Return a line per study that counts what adapters show against full fine-tuning."""
    lines = []
    for study, _, _, compared in _studies(folder):
        told = _told(compared)
        if told:
            lines.append(f"- {title(study)}, {'; '.join(told)}.")
    return "\n".join(lines) or None


def _studies(folder: Path) -> Iterator[tuple[tuple[Any, ...], list[Entry], list[ArmRuns], list[Pair]]]:
    for study, own in by_study(list(Ledger(folder / "classification.jsonl"))).items():
        found = [runs for arm in (MEO, DENSE) if (runs := arm_runs(own, arm)) is not None]
        found += [runs for arm, sweep in SWEEPS.items() if (runs := arm_runs(own, arm, sweep)) is not None]
        if any(runs.arm.adapter for runs in found):
            yield study, own, found, compare_pairs(found, [*AGAINST_FULL, *CONTROLS, *AMONG_ADAPTERS])


def _trained(runs: ArmRuns) -> int:
    result = runs.results[0]
    return result.get("trained", result["parameters"])


def _table(found: Sequence[ArmRuns]) -> str:
    whole = {runs.arm.kind: _trained(runs) for runs in found if runs.arm.adapter is None}
    rows = []
    for runs in found:
        results, distance, count = runs.results, runs.mean("expert_distance"), _trained(runs)
        cells = [runs.arm.name + ("" if runs.arm.adapter else ", all weights")]
        cells += [spread([r["test"] for r in results]), spread([r["dev"] for r in results]), str(len(results))]
        cells += [runs.rate_text, f"{count:,}"]
        cells += [f"{100 * count / whole[runs.arm.kind]:.1f}" if runs.arm.kind in whole else "-"]
        rows.append([*cells, "-" if distance is None else f"{distance:.3f}"])
    return table(["arm", "test %", "dev %", "seeds", "rate", "trained", "share, %", "distance"], rows)


def _told(compared: Sequence[Pair]) -> list[str]:
    """Count what adapters show, by what they are held against."""
    groups = {
        "adapters of MEO against all its weights": [pair for pair in AGAINST_FULL if pair[1] == MEO],
        "adapters of dense against all its weights": [pair for pair in AGAINST_FULL if pair[1] == DENSE],
        "either with word embeddings too, against all weights": CONTROLS,
        "adapters of MEO against those of dense": MEO_AGAINST_DENSE,
    }
    told = []
    for name, pairs in groups.items():
        own = [pair for pair in compared if (pair.first, pair.second) in pairs]
        told += [f"{name}: {tally(own)}"] if own else []
    return told


def _reading(compared: Sequence[Pair]) -> str:
    """Say in words what the comparisons show, computed from them."""
    lines = [f"- {told[0].upper()}{told[1:]}." for told in _told(compared)]
    among = [pair for pair in compared if pair.second.adapter]
    lines += [f"- {pair.first.name} against {pair.second.name}: {pair.told}." for pair in among]
    return "\n".join([*lines, resolution(compared)]) + "\n"
