"""Write docs/results.md and its plots from the ledgers beside this file.

    python benchmarks/quality/report.py

A section is a module `report_NAME.py` with a function `section(folder)`, which reads ledgers in `folder`, writes plots
there, and returns Markdown that begins with a heading; None where its ledger is not there, which leaves it out. If it
has a function `summary(folder)`, the list items that this returns go to the top of the page.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "docs" / "results.md"
SECTIONS = ("classification", "symmetry", "adapters", "multitask", "lm", "moe", "seq2seq")
INTRODUCTION = """# Results

What MEO models score, beside dense models and mixtures of experts that were trained alike. All numbers come from the
ledgers in [benchmarks/quality](../benchmarks/quality), one JSON line per run;
`python benchmarks/quality/report.py` writes this page from them. The models are small and so are the sets: read it as
evidence about these, not about large models. What to hold it against: the paper reports GLUE averages of 83.3 for
MEO of level `token` and 82.6 for a mixture of experts, at 0.4 of the mixture's FLOPs.
"""


def page(folder: Path) -> str:
    """Return the page of all sections that have something to show."""
    modules = [importlib.import_module(f"report_{name}") for name in SECTIONS if (HERE / f"report_{name}.py").exists()]
    summaries = [module.summary(folder) for module in modules if hasattr(module, "summary")]
    short = [text.rstrip() for text in summaries if text]
    parts = [INTRODUCTION, *(["## In short\n\n" + "\n".join(short)] if short else [])]
    parts += [text for module in modules if (text := module.section(folder)) is not None]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the ledgers are, and plots go")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    text = page(options.folder)
    beside = options.output.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, options.output)
    print(f"{options.output}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()
