"""Convert a dense checkpoint: its feed-forwards become experts, written as a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from meo_hf.conversion.centroids import fit_routers, overwrite, pieces_of
from meo_hf.conversion.companions import load_tokenizer, write_companions
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.options import Options
from meo_hf.conversion.plan import build_plan
from meo_hf.conversion.progress import Progress
from meo_hf.conversion.report import ConversionReport, losses_of, report_of
from meo_hf.conversion.safetensors_files import sha256_of
from meo_hf.conversion.source import Source, index_tensors, public_name, quiet_transformers
from meo_hf.conversion.verification import mode_that_fits, outside_differences, verify_files
from meo_hf.conversion.write import write_tensors
from meo_hf.errors import UsageError


class DenseConversion:
    """A dense checkpoint's conversion, planned from headers alone."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: Options,
        max_shard_size: str = "5GB",
        adapters: Sequence[LoraSource] = (),
    ) -> None:
        self.plan = build_plan(sources[0], sources[1:], options, adapters)
        self.nbytes = self.plan.nbytes
        self._max_shard_size = max_shard_size

    def report(self, output: Path, options: dict[str, Any]) -> ConversionReport:
        """Describe what was not applied yet."""
        return report_of(self.plan, output, options)

    def write(self, folder: Path, report: ConversionReport, progress: Progress) -> None:
        """Write weights, config, code and tokenizer."""
        progress.stage("writing", self.nbytes)
        start = time.perf_counter()
        shards = write_tensors(self.plan.targets, folder, self._max_shard_size, progress.advance)
        report.files = {shard.name: {"bytes": shard.nbytes, "sha256": shard.sha256} for shard in shards}
        self.plan.config.save_pretrained(folder)
        for lost in write_companions(self.plan.source, folder):
            report.warnings.append(f"not carried over: {lost}")
        if self.plan.options.examples:
            self._fit_routers(folder, report, progress)
        if self.plan.bank is not None:
            report.factorised = losses_of(self.plan.bank.maps)
        report.write_seconds = round(time.perf_counter() - start, 3)

    def _fit_routers(self, folder: Path, report: ConversionReport, progress: Progress) -> None:
        """Make the written model's routers of example texts."""
        plan = self.plan
        tokenizer = load_tokenizer(plan.source)
        if tokenizer is None:
            raise UsageError(f"{plan.source.name} has no tokenizer to read --example with: leave it out")
        paths = dict(plan.options.examples)
        names = [] if plan.adapters is None else [adapter.task for adapter in plan.adapters.adapters]
        pieces = [pieces_of(Path(paths[name]).expanduser(), tokenizer, name) for name in names]
        count = sum(map(len, pieces))
        progress.stage("reading examples", 2 * count - sum(len(each) // 4 for each in pieces))
        with quiet_transformers():
            model = plan.model_class.from_pretrained(folder, dtype=torch.float32).eval()
        made, right = fit_routers(model, pieces, lambda: progress.advance(1))
        written, disks = index_tensors(folder), disk_names(model, model.state_dict())
        changed = set()
        for name, router in made.items():
            for leaf in ("weight", "bias"):
                ref = written[disks[f"{name}.{leaf}"]]
                overwrite(ref, getattr(router, leaf))
                changed.add(ref.path)
        for path in changed:
            report.files[path.name]["sha256"] = sha256_of(path)
        report.routed = {
            "pieces": dict(zip(names, map(len, pieces), strict=True)),
            "held_out": sum(len(each) // 4 for each in pieces),
            "right": round(sum(right.values()) / len(right), 4),
            "worst_router": round(min(right.values()), 4),
        }

    def check(self, folder: Path, report: ConversionReport, verify: str, progress: Progress) -> None:
        """Run the checks of a mode on what was written."""
        mode = mode_that_fits(self.plan, verify)
        report.verification = mode
        if mode != verify:
            report.warnings.append("both models do not fit in memory: checked layer by layer (sample), not as a whole")
        if mode == "none":
            if self.plan.experts:
                report.warnings.append(
                    "the experts' tensors outside the feed-forwards were not compared with the source's"
                )
            return
        if self.plan.experts:
            self._compare_outside(report)
        progress.stage(f"checking ({mode})", self.nbytes)
        report.checks += verify_files(self.plan, folder, mode, progress.advance)

    def _compare_outside(self, report: ConversionReport) -> None:
        report.experts = outside_differences(self.plan)
        for expert in report.experts:
            if count := expert["outside_differing"] + expert["outside_only_here"]:
                report.warnings.append(
                    f"{public_name(expert['id'])} differs from the source in {count} tensors outside the "
                    "feed-forwards: the source's are used"
                )
