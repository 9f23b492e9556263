"""The model card of a reduced mixture: what was taken from it and how, and nothing that was not checked."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from meo_hf.conversion.card import pipeline_tag, source_card
from meo_hf.conversion.source import Source, auto_class_of, public_name
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.report import ReductionReport


def write_card(
    report: ReductionReport, plan: ReductionPlan, source: Source, license_: str | None, folder: Path
) -> None:
    """Write README.md with metadata and the facts of the report."""
    text = _text(report, plan, license_)
    ModelCard(f"---\n{_metadata(report, source, license_).to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _metadata(report: ReductionReport, source: Source, license_: str | None) -> ModelCardData:
    own, name = source_card(source), report.source["id"]
    on_hub = name.count("/") == 1 and public_name(name) == name
    return ModelCardData(
        license=license_,
        language=getattr(own, "language", None),
        library_name="transformers",
        pipeline_tag=getattr(own, "pipeline_tag", None) or pipeline_tag(report.model_class),
        base_model=[name] if on_hub else None,
        tags=["mixture-of-experts", "meo-hf", *(["custom_code"] if report.why_own else [])],
    )


def method_rows(report: ReductionReport) -> dict[str, str]:
    """Return the method's options as rows of a table: those of the command."""
    hidden = {"name": None, "pretrained": None, "layers": "all", "seed": 0}
    known = {key: value for key, value in report.method.items() if value not in (None, False)}
    options = {key: value for key, value in known.items() if key not in hidden or hidden[key] not in (None, value)}
    rows = {f"--{key.replace('_', '-')}": f"{value}" for key, value in options.items()}
    if report.method.get("pretrained"):
        rows["--pretrained"] = public_name(str(report.method["pretrained"]))
    return rows


def counts_text(report: ReductionReport) -> str:
    """Say how many experts were kept."""
    pairs = {tuple(pair) for pair in report.blocks.values()}
    if len(pairs) == 1:
        had, has = next(iter(pairs))
        return f"{has} of {had} in each of {len(report.blocks)} blocks ({has / had:.0%})"
    had, has = (sum(pair[at] for pair in report.blocks.values()) for at in (0, 1))
    fewest, most = (pick(pair[1] for pair in report.blocks.values()) for pick in (min, max))
    return f"{has} of {had} in {len(report.blocks)} blocks, {fewest} to {most} each ({has / had:.0%})"


def parts_text(report: ReductionReport) -> str | None:
    """Say what experts are kept as, and how near that is to them; None where they are whole."""
    if not report.factorised:
        return None
    errors = [one["error"] for one in report.factorised]
    kind = "low-rank parts and columns" if any(one["columns"] for one in report.factorised) else "low-rank parts"
    return f"{kind}, {min(errors):.3g} to {max(errors):.3g} off (relative error of each linear map's experts)"


def _text(report: ReductionReport, plan: ReductionPlan, license_: str | None) -> str:
    name = public_name(report.source["id"])
    auto = auto_class_of(report.family, report.model_class.removeprefix("Meo"))
    rows = {
        "Source": name + (f" at `{report.source['commit']}`" if report.source["commit"] else ""),
        "Method": f"`{report.method['name']}`",
        **{f"`{key}`": f"`{value}`" for key, value in method_rows(report).items()},
        "Experts": counts_text(report),
        **({"Kept as": found} if (found := parts_text(report)) is not None else {}),
        "Selected per token": f"{report.top_k[1]} (source: {report.top_k[0]})",
        "Rule at run time": "none" if report.skip is None else f"`{report.skip['rule']}`, see config.json",
        "Calibration": _calibration(report),
        "Parameters": f"{report.parameters_after:,} (source: {report.parameters_before:,})",
        "Licence": license_ or "none stated by the source",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    checks = "\n".join(f"- {'passed' if c.passed else 'FAILED'}: {c.name} ({c.detail})" for c in report.checks)
    warnings = "".join(f"\n- {warning}" for warning in report.warnings)
    trust = ", trust_remote_code=True" if report.why_own else ""
    code = (
        f"This runs the Python files of this repository, because {report.why_own}: read them, and pin `revision` to\n"
        "the commit that you read. With `import meo_hf` first, the installed code is used and no trust flag is needed."
        if report.why_own
        else "It is an ordinary checkpoint of its family: no code but that of Transformers is needed."
    )
    return f"""# {name}, with fewer experts

A smaller variant of a mixture of experts, made without training. `plan.json` says what became of every expert.

| | |
|---|---|
{table}

## Load

```python
from transformers import {auto}

model = {auto}.from_pretrained("REPO", revision="COMMIT"{trust})
```

{code}

## Verified

{checks if report.checks else "**Not verified**: it was written without checks (`--verify none`)."}

Quality was **not evaluated**: compare it with its source before use (`meo-hf compare`); training may be needed.
{"" if not warnings else "Remarks:" + warnings}

Made with meo_hf {report.versions["meo_hf"]}; `meo_report.json` has the hash of every weight file.
"""


def _calibration(report: ReductionReport) -> str:
    found = report.calibration
    if found is None:
        judged = report.method.get("metric")
        return "none: the method reads weights alone" if judged is None else f"none: `{judged}` judges candidates"
    domains = "; ".join(f"{public_name(one['name'])} ({one['tokens']:,} tokens)" for one in found["domains"])
    return domains
