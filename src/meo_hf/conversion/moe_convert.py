"""Convert a mixture of experts without touching its weights: new config and code, and the files as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meo_hf.conversion.companions import write_companions
from meo_hf.conversion.linking import can_link, place_weights, weight_files
from meo_hf.conversion.moe_plan import build_moe_plan
from meo_hf.conversion.moe_verification import verify_moe
from meo_hf.conversion.options import Options
from meo_hf.conversion.placement import Placement
from meo_hf.conversion.progress import Progress
from meo_hf.conversion.report import ConversionReport, losses_of, size_warnings, source_entry, warnings_of
from meo_hf.conversion.source import Source
from meo_hf.conversion.write import Targets, write_tensors
from meo_hf.errors import UsageError
from meo_hf.modeling.reference_meo import fingerprint
from meo_hf.version import versions

ANOTHER_FUNCTION = (
    "merging experts' weights is another function than adding their outputs: the checks show that it is computed as "
    "defined, not that it is as good; `meo-hf compare SRC OUT --text FILE` measures that"
)


class MoeConversion:
    """The conversion of a mixture of experts, planned from headers alone."""

    def __init__(
        self, sources: Sequence[Source], options: Options, placement: Placement, max_shard_size: str = "5GB"
    ) -> None:
        if len(sources) > 1:
            raise UsageError(f"--expert has no effect on a mixture of experts ({sources[0].name}): leave it out")
        if placement.reference and (placement.align or placement.copy):
            idle = "--align" if placement.align else "--copy"
            raise UsageError(f"--reference leaves the weights where they are, so {idle} has no effect: leave one out")
        if options.truncation and any((placement.reference, placement.align, placement.copy)):
            idle = next(f"--{name}" for name in ("reference", "align", "copy") if getattr(placement, name))
            raise UsageError(f"--expert-rank and --expert-energy write experts anew, so {idle} has no place here")
        self.plan = build_moe_plan(sources[0], options)
        self.plan.aligned = placement.align
        if placement.reference:
            self.plan.config.meo["weights"] = reference_to(sources[0])
        self._placement, self._max_shard_size = placement, max_shard_size

    def report(self, output: Path, options: dict[str, Any]) -> ConversionReport:
        """Describe what was not applied yet."""
        plan, source = self.plan, self.plan.source
        parameters = sum(ref.spec.numel for ref in source.tensors.values())
        weights = self._how(output)
        touched = source.nbytes if weights in ("copy", "rewrite") else 0
        specs = [spec for spec, _ in plan.bank.targets(source).values()] if plan.bank is not None else []
        return ConversionReport(
            source=source_entry(source),
            output=str(output),
            family=plan.family.model_type,
            model_class=plan.model_class.__name__,
            meo=plan.settings,
            options=options,
            layers=plan.layers,
            parameters_before=parameters,
            parameters_after=sum(spec.numel for spec in specs) or parameters,
            flops_dense=plan.source_flops,
            flops_meo=plan.expert_flops + plan.merge_flops // plan.tokens_per_merge,
            tokens_per_merge=plan.tokens_per_merge,
            bytes_read=touched,
            bytes_to_write=sum(spec.nbytes for spec in specs) or touched,
            working_memory=plan.largest_block * 4 if weights == "rewrite" else 0,
            tensors={
                "copied": len(source.tensors),
                "expert_stacks": 0,
                "new": 0,
                "carried_unknown": [],
                "ignored_by_design": plan.ignored,
                "newly_initialised_on_load": plan.missing,
            },
            weights=weights,
            warnings=[
                *warnings_of(plan.missing, [], source.model_class().__name__),
                *([] if plan.bank is None else size_warnings(plan.bank.maps)),
                ANOTHER_FUNCTION,
            ],
            versions=versions(),
        )

    def _how(self, output: Path) -> str:
        if self._placement.reference:
            return "reference"
        if self._placement.align or self.plan.bank is not None:
            return "rewrite"
        return "link" if not self._placement.copy and can_link(self.plan.source, output) else "copy"

    def write(self, folder: Path, report: ConversionReport, progress: Progress) -> None:
        """Write config, code and tokenizer, and put the weights where they were asked for."""
        start, source = time.perf_counter(), self.plan.source
        progress.stage({"link": "linking", "copy": "copying"}.get(report.weights, "writing"), source.nbytes)
        if self._placement.align:
            self._write_aligned(folder, report, progress)
        elif self.plan.bank is not None:
            self._write_targets(self.plan.bank.targets(source), folder, report, progress)
            report.factorised = losses_of(self.plan.bank.maps)
        elif not self._placement.reference:
            report.files = place_weights(source, folder, self._placement.copy, progress.advance)
            if copied := sum(file["bytes"] for file in report.files.values() if file["how"] == "copied"):
                report.weights, report.bytes_read, report.bytes_to_write = "copy", copied, copied
        self.plan.config.save_pretrained(folder)
        for lost in write_companions(source, folder):
            report.warnings.append(f"not carried over: {lost}")
        report.write_seconds = round(time.perf_counter() - start, 3)

    def _write_aligned(self, folder: Path, report: ConversionReport, progress: Progress) -> None:
        from meo_hf.conversion.aligned_weights import aligned_targets

        plan = self.plan
        targets, blocks = aligned_targets(plan.source, plan.source.meta_model(), plan.layers)
        self._write_targets(targets, folder, report, progress)
        report.alignment = [
            {"layer": one.layer, "before": one.alignment.before, "after": one.alignment.after} for one in blocks
        ]

    def _write_targets(self, targets: Targets, folder: Path, report: ConversionReport, progress: Progress) -> None:
        shards = write_tensors(targets, folder, self._max_shard_size, progress.advance)
        report.files = {shard.name: {"bytes": shard.nbytes, "sha256": shard.sha256} for shard in shards}

    def check(self, folder: Path, report: ConversionReport, verify: str, progress: Progress) -> None:
        """Run the checks of a mode on what was written."""
        report.verification = verify
        if verify == "none":
            return
        progress.stage(f"checking ({verify})", self.plan.source.nbytes)
        report.verification, checks = verify_moe(self.plan, folder, verify)
        report.checks += checks
        if report.verification != verify:
            report.warnings.append("the models were not loaded: only names, shapes and headers were checked")


def reference_to(source: Source) -> dict[str, Any]:
    """Return what `from_pretrained` needs to find the source's weights, and to notice that they have changed."""
    if source.commit is not None:
        return {"repo": source.name, "commit": source.commit}
    files = {path.name: fingerprint(path) for path in weight_files(source)}
    return {"folder": str(source.folder.absolute()), "files": files}
