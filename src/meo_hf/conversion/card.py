"""The model card: what a reader of the repository must know, and nothing that was not checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.report import ConversionReport
from meo_hf.conversion.source import Source, auto_class_of, public_name
from meo_hf.errors import LicenseError
from meo_hf.modeling.families_meo import family_of

PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0"}
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": None,
    "MTModel": "translation",
}


def source_card(source: Source | LoraSource) -> ModelCardData | None:
    """Return the metadata of a source's own card, or None."""
    path = source.folder / "README.md"
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data  # type: ignore[return-value]
    except Exception:  # somebody else's card may be malformed in any way
        return None


def licenses_of(sources: Sequence[Source | LoraSource]) -> dict[str, str | None]:
    """Return each source's licence as its card states it, None where it states none."""
    return {source.name: getattr(source_card(source), "license", None) for source in sources}


def resolve_license(licenses: dict[str, str | None], stated: str | None) -> str | None:
    """Return the licence of the result; raises LicenseError where several sources' licences differ.

    Different permissive licences may stand together (all are listed on the card); anything else must be
    resolved by a person, who then states the result.
    """
    if stated is not None:
        return stated
    known = {license_.lower() for license_ in licenses.values() if license_}
    if len(known) <= 1:
        return next(iter(known), None)
    if known <= PERMISSIVE:
        return "other"
    listed = ", ".join(f"{name}: {license_ or 'none stated'}" for name, license_ in licenses.items())
    raise LicenseError(f"the sources' licences differ ({listed}): settle which applies, then pass --license NAME")


def write_card(report: ConversionReport, source: Source, license_: str | None, folder: Path) -> None:
    """Write README.md with metadata and the facts of the report."""
    ModelCard(f"---\n{_metadata(report, source, license_).to_yaml()}\n---\n\n{_text(report, license_)}").save(
        folder / "README.md"
    )


def _metadata(report: ConversionReport, source: Source, license_: str | None) -> ModelCardData:
    own = source_card(source)
    names = [report.source["id"], *(one["id"] for one in (*report.experts, *report.adapters))]
    bases = [name for name in dict.fromkeys(names) if name.count("/") == 1 and public_name(name) == name]
    return ModelCardData(
        license=license_,
        language=getattr(own, "language", None),
        library_name="transformers",
        pipeline_tag=getattr(own, "pipeline_tag", None) or pipeline_tag(report.model_class),
        base_model=bases or None,
        tags=["meo", "merging-experts", "custom_code"],
        base_model_relation=_relation(report) if bases else None,
    )


def _relation(report: ConversionReport) -> str:
    return "merge" if report.experts or report.adapters or report.is_moe else "finetune"


def pipeline_tag(model_class: str) -> str | None:
    """Return the Hub's task of a model class, by the ending of its name."""
    return next((tag for end, tag in _PIPELINES.items() if model_class.endswith(end)), None)


def _text(report: ConversionReport, license_: str | None) -> str:
    meo = report.meo
    ratio = report.flops_meo / report.flops_dense
    source = f"{public_name(report.source['id'])}" + (
        f" at `{report.source['commit']}`" if report.source["commit"] else ""
    )
    born = "the source's own" if report.is_moe else f"born by `{report.options['expert_init']}`"
    adapters = ", ".join(public_name(adapter["id"]) for adapter in report.adapters)
    given = "; ".join(public_name(expert["id"]) for expert in report.experts)
    experts = (f"LoRA adapters {adapters}" if adapters else "") or given or born
    auto = auto_class_of(report.family, report.model_class.removeprefix("Meo"))
    rows = {
        "Source": source,
        "Level": f"`{meo['level']}` ({_level_text(report)})",
        "Experts": f"{meo['num_experts']}, of which {meo['top_k']} are merged; {experts}",
        "Experts are kept as": _format_text(report),
        "Gates": _gates_text(report),
        "Tasks": ", ".join(meo["tasks"]) if meo["level"] == "task" else "none",
        "Converted layers": ", ".join(map(str, report.layers)),
        "Parameters": f"{report.parameters_after:,} (source: {report.parameters_before:,})",
        "FLOPs per token": f"{report.flops_meo:,} = {ratio:.4f} x the source's, linear maps, {_charged(report)}",
        "Licence": license_ or "none stated by the source",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    licences = "".join(f"\n- {public_name(name)}: {value or 'none stated'}" for name, value in report.licenses.items())
    checks = "\n".join(f"- {'passed' if c.passed else 'FAILED'}: {c.name} ({c.detail})" for c in report.checks)
    warnings = "".join(f"\n- {warning}" for warning in report.warnings)
    return f"""# {public_name(report.source["id"])}, MEO

A [MEO](https://arxiv.org/abs/2310.09832) variant ("Merging Experts into One"): each feed-forward holds several
experts; a router selects some, their *weights* are merged into one, and only that one runs.
{_weights_text(report)}
| | |
|---|---|
{table}

## Load

```python
from transformers import {auto}

model = {auto}.from_pretrained("REPO", revision="COMMIT", trust_remote_code=True)
```

This runs the Python files of this repository: read them, and pin `revision` to the commit that you read.
With `import meo_hf` first, the installed code is used instead and no trust flag is needed.

## Verified

{checks if report.checks else "**Not verified**: the conversion was written without checks (`--verify none`)."}

Quality was **not evaluated**: no benchmark was run on this model. {_BIRTH_TEXT[_birth(report)]}
{"" if not warnings else "Remarks of the conversion:" + warnings}

## Licences of the sources
{licences}

## Cite

```bibtex
@inproceedings{{he2023merging,
  title     = {{Merging Experts into One: Improving Computational Efficiency of Mixture of Experts}},
  author    = {{He, Shwai and Fan, Run-Ze and Ding, Liang and Shen, Li and Zhou, Tianyi and Tao, Dacheng}},
  booktitle = {{Proceedings of EMNLP}},
  year      = {{2023}}
}}
```

Made with meo_hf {report.versions["meo_hf"]}; `meo_report.json` has the {_recorded(report)} of every weight file.
"""


def _charged(report: ConversionReport) -> str:
    if report.meo.get("expert_format") == "lowrank":
        return "low-rank parts of top_k experts for each token"
    return f"{report.tokens_per_merge} tokens per merged expert, a merge charged as top_k * weights"


def _format_text(report: ConversionReport) -> str:
    ranks = report.meo.get("expert_ranks")
    if not ranks:
        return "whole weights"
    listed = ", ".join(f"`{name}`: {rank}" for name, rank in ranks.items()) if len(ranks) <= 12 else "see config.json"
    worst = max((one["error"] for one in report.factorised), default=None)
    lost = "" if worst is None else f"; relative error of the experts at most {worst:.3g} per linear map"
    return f"one shared weight and low-rank parts (ranks: {listed}){lost}"


def _gates_text(report: ConversionReport) -> str:
    if report.routed:
        return (
            f"made of example texts: {report.routed['right']:.1%} of {report.routed['held_out']} held-out pieces reach "
            f"their own adapter (mean of all routers; the worst {report.routed['worst_router']:.1%})"
        )
    if not report.is_moe:
        return f"one per {'linear map' if report.meo['gate_scope'] == 'projection' else 'feed-forward'}"
    read = "the segment before" if report.meo["level"] == "segment" else "what it may know"
    if report.meo["pooling"] == "hidden":
        return f"the source's router, reading the mean state of {read}"
    return f"the source's router, its gates averaged over the tokens of {read}"


def _recorded(report: ConversionReport) -> str:
    return "sha256" if all("sha256" in file for file in report.files.values()) else "size and header's sha256"


def _weights_text(report: ConversionReport) -> str:
    if not report.is_moe:
        return ""
    weights = {
        "link": "The weight files are the source's, untouched.",
        "copy": "The weight files are the source's, untouched.",
        "reference": "The weights are not in this repository: loading fetches them from the source at its commit.",
        "rewrite": "Each expert's hidden neurons were permuted to match the first expert's; the rest is the source's.",
    }
    if report.factorised:
        weights["rewrite"] = "Each expert is kept as the experts' mean and a low-rank part; the rest is the source's."
    return f"""
The source is a mixture of experts, which chooses experts for each token and adds their outputs. This variant chooses
them for a whole group of tokens and adds their *weights*: a different function, with other quality.
{weights[report.weights]}
"""


def _birth(report: ConversionReport) -> str:
    if report.is_moe:
        return "moe"
    if report.adapters:
        return "routed" if report.routed else "adapters" if report.meo["level"] != "task" else "own adapters"
    return "given" if report.experts else report.options["expert_init"]


def _level_text(report: ConversionReport) -> str:
    level, segment = report.meo["level"], f"segment of {report.meo['segment_length']} tokens"
    if level == "task":
        return "one merged expert per task"
    if level == "segment":
        return f"one merged expert per {segment}, gated by the segment before"
    shared = "input sequence"
    if family_of(report.family).kind == "decoder":
        shared = f"answer, gated by its prompt, and one per {segment} within the prompt"
    return f"one merged expert per {shared}" + ("; and a bottleneck per token" if level == "token" else "")


_BIRTH_TEXT = {
    "copy": "All experts start as copies of the dense feed-forward: before training it computes what the source does.",
    "noise": "Experts are noisy copies of the dense feed-forward; fine-tune before use.",
    "drop-upcycle": "Half of each expert's neurons were drawn anew (arXiv 2502.19261); fine-tune before use.",
    "moe": "Compare it with its source before use (`meo-hf compare`); fine-tuning may be needed.",
    "own adapters": "A row computes what the base with its own task's adapter does.",
    "adapters": "Experts are adapters of one base and routers are untrained: train them before use (`meo-hf recover`).",
    "routed": "Experts are adapters of one base; how well routers choose between them was only seen on the examples.",
    "given": "Experts come from different checkpoints and routers are untrained; fine-tune before use.",
}
