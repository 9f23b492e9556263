"""The classification section: accuracy beside cost, gates, and paired comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from arms import DENSE, MAIN, SMALL, Arm
from data import SOURCES
from ledger import Ledger
from report_tools import NOT_TESTED, Comparison, compare, holm, p_text, p_words, setting_of, spread, table, verdict
from runs import ArmRuns, Entry, arm_runs, by_study

NAMES = {"rotten_tomatoes": "Rotten Tomatoes", "bbc": "BBC topics", "tweets": "tweets"}
MODELS = {"bert-tiny": "BERT-tiny", "minilm": "MiniLM"}
MEO = ("sequence", "token", "task")
SWEEP = 3
INTRODUCTION = """## Classification

Every arm of a seed begins with the same dense model and head, and is trained by the stock `Trainer` for the same number
of steps (AdamW, linear schedule, batches of 32 of similar length). The rate is the best of three by dev accuracy on
seed 0 (* where it is the first or last of the three, so that a wider sweep might do better); accuracy is that on test
rows, mean ± standard deviation over seeds. All expert arms have 8 experts, born as copies of the dense feed-forward.
Differences are tested in pairs, on the same seeds and rows, with the variance of rows and of seeds; p values are
corrected for all comparisons of a table (Holm).

- `moe`: the router reads each token, selected experts run whole, outputs are added; noise and balance loss as MEO's.
- `MEO sequence`, `token`: one merged expert per sequence. `MEO task`: here there is one task, so the gate is a learned
  constant: one mixture for all inputs.
- `uniform`: all experts, equal weights, no router. Copies that get equal gradients stay copies, so this is dense
  training in another form. `frozen`: as MEO sequence, with a random router that is not trained, spread so that inputs
  differ in what they select.
- FLOPs: products and merges of one test row without padding, a multiply-accumulate as two and a merge of k experts as
  2k - 1 per weight. What level `task` and `uniform` merge, they merge once for all rows.
- Gates: entropy in nats and relative to log k; *load* is half of the sum of |share - 1/8| over experts (0: all used
  alike); *input* is how far a row's gate is from the mean gate by the same measure (0: the input does not matter);
  *dead* are experts that no test row (or token) selects. A constant gate leaves out 8 - k experts by construction.
"""


def section(folder: Path) -> str | None:
    """Return the section, with a plot of accuracy and FLOPs."""
    parts, drawn = [], []
    for study, own, found, costs in _studies(folder):
        parts.append(_study(study, own, found, costs))
        drawn.append((title(study), found, costs))
    if not parts:
        return None
    from report_plots import draw_accuracy

    draw_accuracy(drawn, folder / "classification.png")
    plot = "![accuracy and FLOPs](../benchmarks/quality/classification.png)\n"
    return "\n".join([INTRODUCTION, plot, *parts])


def summary(folder: Path) -> str | None:
    """Return a line per study that counts what MEO's comparisons show."""
    lines = []
    for study, _, found, costs in _studies(folder):
        pairs = [pair for pair in _compared(found) if pair.first.kind in MEO]
        told = [
            f"against {name}{_cost(own, costs)}: {tally(own)}"
            for kind, name in (("dense", "dense"), ("moe", "mixtures of the same k"))
            if (own := [pair for pair in pairs if pair.second.kind == kind])
        ]
        if told:
            lines.append(f"- {title(study)}. MEO {'; '.join(told)}.")
    return "\n".join(lines) or None


def _studies(folder: Path) -> Iterator[tuple[tuple[Any, ...], list[Entry], list[ArmRuns], Costs]]:
    for study, own in by_study(list(Ledger(folder / "classification.jsonl"))).items():
        found = [runs for arm in MAIN if (runs := arm_runs(own, arm)) is not None]
        if len(found) > 1:  # one arm alone says nothing
            yield study, own, found, Costs(folder / "costs.jsonl", study[0], study[1])


def _cost(pairs: Sequence[Pair], costs: Costs) -> str:
    """Say what the first arms cost, as shares of the second."""
    counted = [(costs.flops(pair.first), costs.flops(pair.second)) for pair in pairs]
    shares = [first / second for first, second in counted if first and second]
    return f", at {min(shares):.2f} to {max(shares):.2f} of the FLOPs" if shares else ""


class Costs:
    """FLOPs and times of arms, as far as they are known."""

    def __init__(self, path: Path, text_set: str, model: str) -> None:
        own = [e for e in Ledger(path) if (e["key"]["set"], e["key"]["model"]) == (text_set, model)]
        self.counted = [entry for entry in own if entry["key"]["what"] == "flops"]
        self.timed = next((entry for entry in own if entry["key"]["what"] == "time"), None)

    def flops(self, arm: Arm) -> int | None:
        """FLOPs of one row."""
        for entry in self.counted:
            if (entry["key"]["arm"], entry["key"]["top_k"]) == (arm.kind, arm.top_k):
                return entry["result"]["flops"]
        return None

    def time(self, arm: Arm, job: str) -> str:
        """The median of a time, in milliseconds."""
        found = self.timed and self.timed["result"]["arms"].get(arm.name)
        return f"{found[job][0]:.2f}" if found else "-"


def title(study: tuple[Any, ...]) -> str:
    """Return the heading of a study."""
    name, model, rows, _ = study
    return f"{NAMES[name]}, {MODELS[model]}" + ("" if rows is None else f", {rows:,} training rows")


def command(study: tuple[Any, ...], script: str, extra: str = "") -> str:
    """Return the command that measures a study."""
    name, model, rows, epochs = study
    text = f"python benchmarks/quality/{script} --sets {name}" + (f" --model {model}" if model != "bert-tiny" else "")
    return text + (f" --rows {rows}" if rows else "") + (f" --epochs {epochs}" if epochs != 3 else "") + extra


def _study(study: tuple[Any, ...], entries: Sequence[Entry], found: Sequence[ArmRuns], costs: Costs) -> str:
    small = study[1] != "bert-tiny"
    arms = SMALL if small else MAIN
    runs_of_arm = SWEEP + max(3, *(len(runs.runs) for runs in found)) - 1
    done = sum(runs.done for runs in found)
    source = SOURCES[study[0]]
    account = (
        f"{len(found)} of {len(arms)} arms, {done} runs of {len(arms) * runs_of_arm} planned, {study[3]} epochs; "
        f"{source.dev:,} dev and {source.test:,} test rows; {setting_of(entries)}. "
        f"`{command(study, 'classification.py', ' --arms small' if small else ' --arms main')}`"
    )
    parts = [f"### {title(study)}\n", _accuracy(found, costs), account + "\n"]
    if costs.timed:
        result = costs.timed["result"]
        noise = f" **Measured under load** ({result['noise']})." if result["noise"] else ""
        parts.append(
            f"Times: medians of {result['rounds']} rounds, arms in turns, per row in batches of 32, per row alone, and "
            f"per training step of 32 rows; {result['machine']}.{noise} `{command(study, 'costs.py', ' --timing')}`\n"
        )
    compared = _compared(found)
    parts += [_gates(found), comparison_table(compared, costs), _reading(compared)]
    return "\n".join(parts)


def _accuracy(found: Sequence[ArmRuns], costs: Costs) -> str:
    rows = []
    for runs in found:
        flops = costs.flops(runs.arm)
        results = runs.results
        cells = [runs.arm.name, spread([r["test"] for r in results]), spread([r["dev"] for r in results])]
        cells += [str(len(results)), runs.rate_text, "-" if flops is None else f"{flops / 1e6:.1f}"]
        if costs.timed:
            jobs = ("inference_ms", "inference_alone_ms", "train_step_ms")
            cells += [costs.time(runs.arm, job) for job in jobs]
        rows.append([*cells, f"{results[0]['parameters'] / 1e6:.2f}"])
    times = ["ms/row", "ms alone", "ms/step"] if costs.timed else []
    return table(["arm", "test %", "dev %", "seeds", "rate", "MFLOPs", *times, "M parameters"], rows)


def _gates(found: Sequence[ArmRuns]) -> str:
    names = ("entropy", "entropy_share", "load_distance", "input_share", "dead")
    rows = [
        [runs.arm.name, *(f"{runs.mean(name):.2f}" for name in names)]
        for runs in found
        if runs.mean("entropy") is not None
    ]
    return table(["gates on test rows", "entropy", "/ log k", "load", "input", "dead"], rows) if rows else ""


def _compared(found: Sequence[ArmRuns]) -> list[Pair]:
    """Compare MEO with dense, with the mixture of the same k, and with the controls; p values corrected together."""
    meo = [runs.arm for runs in found if runs.arm.kind in MEO]
    pairs = [(arm, DENSE) for arm in meo]
    pairs += [(arm, Arm("moe", arm.top_k, "copy")) for arm in meo]
    pairs += [(Arm("sequence", 2, "copy"), Arm(kind, k, "copy")) for kind, k in (("uniform", None), ("frozen", 2))]
    pairs += [(Arm("moe", 2, "copy"), DENSE), (Arm("moe", 4, "copy"), DENSE)]
    return compare_pairs(found, pairs)


@dataclass(frozen=True)
class Pair:
    """Two arms, what their difference is, and its p value corrected for all that are shown together."""

    first: Arm
    second: Arm
    comparison: Comparison
    p: float | None

    @property
    def shows(self) -> str:
        """What the comparison shows."""
        return verdict(self.comparison, self.p)

    @property
    def told(self) -> str:
        """The same with its numbers."""
        p = "" if self.p is None else f" (p {p_words(self.p)})"
        return f"{100 * self.comparison.difference:+.1f} points, {self.shows}{p}"


def compare_pairs(found: Sequence[ArmRuns], pairs: Sequence[tuple[Arm, Arm]]) -> list[Pair]:
    """Compare arms on the seeds that both have; pairs with an arm that was not run are left out."""
    by_arm = {runs.arm: runs for runs in found}
    there = [(a, b) for a, b in pairs if a in by_arm and b in by_arm]
    done = []
    for a, b in there:
        seeds = sorted(set(by_arm[a].runs) & set(by_arm[b].runs))
        done.append(compare(by_arm[a].right(seeds), by_arm[b].right(seeds)))
    corrected = holm([one.p for one in done])
    return [Pair(a, b, one, p) for (a, b), one, p in zip(there, done, corrected, strict=True)]


def comparison_table(pairs: Sequence[Pair], costs: Costs) -> str:
    """Return the table of differences on test rows."""
    rows = []
    for pair in pairs:
        first, second = costs.flops(pair.first), costs.flops(pair.second)
        one = pair.comparison
        name = f"{pair.first.name} - {pair.second.name}"
        ratio = "-" if first is None or second is None else f"{first / second:.2f}"
        numbers = [f"{100 * one.difference:+.1f}", one.interval, p_text(one.p), p_text(pair.p), ratio]
        rows.append([name, str(one.seeds), *numbers, pair.shows])
    header = ["difference on test, points", "seeds", "mean", "95 % interval", "p", "p (Holm)", "FLOPs ratio", "shows"]
    return table(header, rows)


def _reading(pairs: Sequence[Pair]) -> str:
    """Say in words what the comparisons show, computed from them."""
    lines = []
    for question, kinds in (
        ("MEO against dense, at nearly the same inference cost", ("dense",)),
        ("MEO against a mixture of experts of the same k, at lower cost", ("moe",)),
        ("MEO sequence against what learns no routing", ("uniform", "frozen")),
    ):
        own = [pair for pair in pairs if pair.second.kind in kinds and pair.first.kind != "moe"]
        if own:
            lines.append(f"- {question}: {'; '.join(_sorted_by_outcome(own, len(kinds) > 1))}.")
    return "\n".join([*lines, resolution(pairs)]) + "\n"


def _sorted_by_outcome(pairs: Sequence[Pair], name_second: bool) -> list[str]:
    told = []
    for outcome in ("better", "worse", "within noise", NOT_TESTED):
        own = [pair for pair in pairs if pair.shows == outcome]
        named = [
            f"{pair.first.name}{f' - {pair.second.name}' if name_second else ''} "
            f"({100 * pair.comparison.difference:+.1f}{f', p {p_words(pair.p)}' if pair.p is not None else ''})"
            for pair in own
        ]
        if named or outcome in ("better", "worse"):
            told.append(f"{outcome}: {', '.join(named) or 'none'}")
    return told


def tally(pairs: Sequence[Pair]) -> str:
    """Count the outcomes of comparisons, and give the range of mean differences."""
    outcomes = [pair.shows for pair in pairs]
    counts = [f"{name} in {outcomes.count(name)}" for name in dict.fromkeys(("better", "worse", *outcomes))]
    differences = [100 * pair.comparison.difference for pair in pairs]
    span = f"{min(differences):+.1f} to {max(differences):+.1f}" if len(pairs) > 1 else f"{differences[0]:+.1f}"
    return f"{', '.join(counts)} of {len(pairs)} ({span} points)"


def resolution(pairs: Sequence[Pair]) -> str:
    """Say how large a difference would have to be to be seen."""
    widths = [100 * pair.comparison.half_width for pair in pairs if pair.comparison.half_width is not None]
    if not widths:
        return ""
    return (
        f"- Within noise does not mean equal: half of a 95 % interval here is {median(widths):.1f} points (median), "
        f"and the corrected p values answer for {len(widths)} comparisons together."
    )
