"""Check a converted mixture of experts: files against the source, then behaviour in a process without meo_hf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from meo_hf.conversion.linking import weight_files
from meo_hf.conversion.moe_plan import MoePlan
from meo_hf.conversion.report import Check
from meo_hf.conversion.source import auto_class_of, index_tensors
from meo_hf.conversion.verification import bytes_check, products_check, run_child
from meo_hf.modeling.moe_layouts_meo import layer_number, moe_blocks
from meo_hf.modeling.reference_meo import fingerprint
from meo_hf.modeling.remote_meo import auto_map, heads_of


def verify_moe(plan: MoePlan, folder: Path, mode: str) -> tuple[str, list[Check]]:
    """Return the mode that was possible and its checks; `full` loads both models, `sample` reads headers only."""
    weights = plan.config.meo.get("weights")
    local = weights is None or "folder" in weights
    if mode == "full" and not (local and _fits(plan)):
        mode = "sample"
    checks = [_config_check(plan, folder)] + ([] if weights else _files_checks(plan, folder))
    return mode, [*checks, *run_child("moe_verification_child.py", _request(plan, folder, mode))]


def _fits(plan: MoePlan) -> bool:
    """Whether source and output fit in memory as fp32."""
    parameters = sum(ref.spec.numel for ref in plan.source.tensors.values())
    return 8 * parameters + 2**30 < 0.8 * psutil.virtual_memory().available


def _config_check(plan: MoePlan, folder: Path) -> Check:
    """Compare the config with the planned one, but for what saving adds."""
    added = ("transformers_version", "auto_map", "_name_or_path", "architectures", "dtype")
    found, planned = type(plan.config).from_pretrained(folder).to_dict(), plan.config.to_dict()
    wrong = [key for key in sorted(found.keys() | planned) if key not in added and found.get(key) != planned.get(key)]
    detail = f"differs in {', '.join(wrong)}" if wrong else f"{len(planned)} keys"
    return Check("the config is the planned one", not wrong, detail)


def _files_checks(plan: MoePlan, folder: Path) -> list[Check]:
    if plan.bank is None:
        return [_files_check(plan, folder)]
    targets, written = plan.bank.targets(plan.source), index_tensors(folder)
    same = bytes_check(targets, written)
    return [same, products_check(plan.bank.maps.values(), targets, written)] if same.passed else [same]


def _files_check(plan: MoePlan, folder: Path) -> Check:
    """Compare what the files say of their tensors with the source's; linked and copied files must be the same."""
    name = "every tensor has the source's name, type and shape"
    written = {key: ref.spec for key, ref in index_tensors(folder).items()}
    expected = {key: ref.spec for key, ref in plan.source.tensors.items()}
    if wrong := [key for key in sorted(written.keys() | expected) if written.get(key) != expected.get(key)]:
        return Check(name, False, f"{len(wrong)} differ, e.g. {wrong[0]}")
    kept = [(path, folder / path.name) for path in weight_files(plan.source) if (folder / path.name).is_file()]
    if any(fingerprint(theirs) != fingerprint(ours) for theirs, ours in kept):
        return Check(name, False, "the header or size of a file differs from the source's")
    linked = sum(ours.samefile(theirs) for theirs, ours in kept)
    return Check(name, True, f"{len(written)} tensors; {linked} file(s) are the source's own")


def _request(plan: MoePlan, folder: Path, mode: str) -> dict[str, Any]:
    stock = plan.source.meta_model()
    auto = auto_class_of(plan.family.model_type, type(stock).__name__)
    top_k = plan.family.top_k
    blocks = list(moe_blocks(stock, plan.family.layout))
    zero_experts = any(getattr(block.experts, "zero_expert_num", 0) for _, block in blocks if hasattr(block, "experts"))
    return {
        "mode": mode,
        "source": str(plan.source.folder),
        "output": str(folder),
        "kind": plan.family.kind,
        "stock_class": type(stock).__name__ if auto != "AutoModel" else heads_of(plan.family.model_type)["AutoModel"],
        "auto_class": auto,
        "auto_map_class": auto_map(type(plan.config).__name__, plan.family.model_type)[auto],
        "top_k": top_k if isinstance(top_k, str) and plan.family.chooses_top_k and not zero_experts else None,
        "same_top_k": plan.top_k == plan.source_top_k,
        "aligned": plan.aligned,
        "missing": plan.missing,
        "on_disk": sorted(plan.source.tensors if plan.bank is None else plan.bank.targets(plan.source)),
        "stacks": {} if plan.bank is None else {one.live: [one.path, one.map] for one in plan.bank.stacks.values()},
        "stackable": plan.family.layout in ("stacked", "llama4"),
        "definable": plan.family.layout == "stacked" and plan.family.poolings[0] == "hidden" and not zero_experts,
        "experts_per_gate": plan.top_k,
        "blocks": [path for path, _ in blocks if layer_number(path) in plan.layers],
    }
