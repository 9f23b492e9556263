"""Print `results.json` of `run.py` as tables in Markdown.

python report.py results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = (
    "| | experts | MB | perplexity | KL | after recovery | prompt | token | decided in |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def line(name: str, row: dict[str, Any]) -> str:
    """Return one variant as a row of a table."""
    blocks = row.get("blocks") or []
    counts = sorted({has for _, has in blocks})
    experts = "" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    own = "*" if row.get("own_class") else ""
    recovered = row.get("recovered_perplexity")
    after = "" if recovered is None else f"{recovered:.1f}"
    decided = f"{row['decide_seconds']:.1f} s" if "decide_seconds" in row else ""
    return (
        f"| {name}{own} | {experts} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.1f} | {row['kl']:.3f} | "
        f"{after} | {row['prefill_ratio']:.2f} x | {row['token_ratio']:.2f} x | {decided} |"
    )


def averaged(name: str, rows: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the mean of runs that differ by a seed."""
    made = {key: value for key, value in rows[0].items() if all(key in row for row in rows)}
    for key, value in made.items():
        if isinstance(value, float):
            made[key] = sum(row[key] for row in rows) / len(rows)
    return f"{name} (mean of {len(rows)})", made


def table(rows: dict[str, Any], start: str) -> Iterable[str]:
    """Yield a table of the variants whose names begin so, the best first."""
    own = {name: row for name, row in rows.items() if name.startswith(start) and "perplexity" in row}
    random = {name: row for name, row in own.items() if ", random" in name}
    named = [(name, row) for name, row in own.items() if name not in random]
    if random:
        named.append(averaged(next(iter(random)).rpartition(" ")[0], list(random.values())))
    yield from HEAD
    yield from (line(name, row) for name, row in sorted(named, key=lambda pair: pair[1]["perplexity"]))


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    rows = found["rows"]
    print(f"source: perplexity {rows['source']['perplexity']:.1f}, {rows['source']['bytes'] / 1e6:.1f} MB")
    print("settings:", found["settings"], "versions:", found["versions"])
    for title, start in (
        ("6 of 8 experts: prune", "prune 6"), ("6 of 8 experts: merge", "merge 6"), ("4 of 8: prune", "prune 4"),
        ("4 of 8: merge", "merge 4"), ("search", "search"), ("low rank", "low-rank"),
        ("skip", "skip"), ("top-k", "top-k"), ("MEO on top", "MEO"),
    ):  # fmt: skip
        print(f"\n{title}\n")
        print("\n".join(table(rows, start)))


if __name__ == "__main__":
    main()
