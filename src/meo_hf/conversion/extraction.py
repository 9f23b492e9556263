"""Extract a dense model: of one task of a MEO model of level `task`, or of a mixture with one expert per block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meo_hf.conversion.births import Copied, Recipe
from meo_hf.conversion.companions import write_companions
from meo_hf.conversion.fetch import SourceOptions, locate
from meo_hf.conversion.names import disk_names, live_names
from meo_hf.conversion.output import check_output, check_space, written_beside
from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes
from meo_hf.conversion.single_expert import extract_single
from meo_hf.conversion.source import Source, index_tensors, meta_model, open_source, raw_config
from meo_hf.conversion.write import write_tensors
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.modeling.blocks_meo import find_blocks
from meo_hf.modeling.configuration_meo import MeoSettings, settings_of
from meo_hf.modeling.descriptions_meo import describe
from meo_hf.modeling.families_meo import family_of
from meo_hf.modeling.feedforward_meo import converts
from meo_hf.modeling.low_rank_meo import LowRank, merged_part
from meo_hf.modeling.merger_meo import bank_key
from meo_hf.modeling.merging_meo import merge_experts
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.router_meo import MeoRouter


@dataclass(frozen=True)
class Merged:
    """A dense tensor: an expert stack merged in float32 with one task's gates, a part of it, cast once.

    `read` [1] or [1, D] is what the gates read of the task. With `factors` A and B the stack holds one weight, to which
    their products are added.
    """

    stack: TensorRef
    router: TensorRef
    read: Tensor
    top_k: int
    rows: tuple[int, int] | None
    transposed: bool
    factors: tuple[TensorRef, TensorRef] | None = None
    shared: bool = False

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        weight = self.router.load()
        router = MeoRouter(weight.shape[1], weight.shape[0], self.top_k, noisy=False)
        router.weight.data = weight
        with torch.no_grad():
            gates, _ = router.eval()(self.read)
            merged = self.stack.load()[0].float() if self.shared else merge_experts(self.stack.load(), *gates)[0]
        merged = merged[slice(*self.rows)] if self.rows else merged
        if self.factors is not None:
            down, up = (ref.load() for ref in self.factors)
            merged = merged + merged_part(LowRank(down, up.transpose(1, 2), 1.0), gates)[0][0]
        merged = merged.t() if self.transposed and merged.dim() == 2 else merged
        yield raw_bytes(merged.to(DTYPES[target.dtype]))


@dataclass(frozen=True)
class WithPart:
    """A weight with what one task adds to it; `transposed` where it is stored [in, out]."""

    source: TensorRef
    factors: tuple[TensorRef, TensorRef]
    task: int
    transposed: bool

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        down, up = (ref.load()[self.task].float() for ref in self.factors)
        delta = up.t() @ down
        weight = self.source.load().float() + (delta.t() if self.transposed else delta)
        yield raw_bytes(weight.to(DTYPES[target.dtype]))


def extract_all(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write the dense checkpoint of every task, each in a folder of its name; returns the folders by task.

    Raises UsageError for tasks whose names make no folders, and what `extract` raises.
    """
    output = Path(output).expanduser().absolute()
    check_output(output, overwrite, [os.fspath(source)])
    folder, _, _ = locate(os.fspath(source), SourceOptions(revision=revision, token=token))
    if is_mixture(folder):
        raise UsageError(f"{folder} is a mixture of experts without tasks: leave --all-tasks out")
    tasks = settings_of(meo_config(folder)).tasks
    if wrong := [task for task in tasks if task in ("", ".", "..") or "/" in task or "\\" in task]:
        raise UsageError(f"task {wrong[0]!r} makes no name of a folder: extract the tasks one by one, with --task")
    options = {"revision": revision, "token": token, "max_shard_size": max_shard_size}
    with written_beside(output, overwrite) as whole:
        for task in tasks:
            extract(source, whole / task, task=task, **options)  # type: ignore[arg-type]
    return {task: output / task for task in tasks}


def extract(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write the dense checkpoint that a task-level MEO model computes for one task; returns its folder.

    The result loads with the stock class, without remote code. `task` may be left out if there is only one. Of a stock
    mixture with one expert per block it is the dense family that computes the same.
    Raises UnsupportedError for a model of another level, UsageError for an unknown task.
    """
    output = Path(output).expanduser().absolute()
    check_output(output, overwrite, [os.fspath(source)])
    options = SourceOptions(revision=revision, token=token)
    folder, commit, _ = locate(os.fspath(source), options)
    if is_mixture(folder):
        if task is not None:
            raise UsageError(f"{folder} is a mixture of experts without tasks: leave --task out")
        with closing(open_source(os.fspath(source), options)) as opened:
            return extract_single(opened, output, max_shard_size, overwrite)
    config = meo_config(folder)
    settings = settings_of(config)
    index = _task_index(settings, task)
    tensors = index_tensors(folder)
    if not tensors:
        raise CheckpointError(f"{folder} has no safetensors weights")
    meo_class = _model_class(config)
    dense_config = _dense_config(config)
    dense_class = getattr(transformers, meo_class.__name__.removeprefix("Meo"))
    meo, dense = meta_model(meo_class, config), meta_model(dense_class, dense_config)
    targets = _targets(meo, dense, tensors, settings, _read_of_task(meo, tensors, settings, index), index)
    check_space(output, sum(spec.nbytes for spec, _ in targets.values()))
    with written_beside(output, overwrite) as partial:
        write_tensors(targets, partial, max_shard_size)
        dense_config.architectures = [dense_class.__name__]
        dense_config.save_pretrained(partial)
        write_companions(Source(os.fspath(source), folder, commit, dense_config, tensors), partial)
    return output


def meo_config(folder: Path) -> PreTrainedConfig:
    """Read the config of a MEO folder with the installed code; raises UnsupportedError for any other folder."""
    if not (folder / "config.json").is_file():
        raise UnsupportedError(f"{folder} has no config.json: give a MEO model")
    config = AutoConfig.from_pretrained(folder)
    if not config.model_type.startswith("meo_"):
        raise UnsupportedError(f"{folder} is a plain {config.model_type} model, no MEO model")
    return config


def is_mixture(folder: Path) -> bool:
    """Return whether a folder holds a stock mixture of experts."""
    path = folder / "config.json"
    return path.is_file() and raw_config(folder).get("model_type") in MOE_FAMILIES


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    name = (config.architectures or [""])[0]
    return meo_model_class(getattr(transformers, name.removeprefix("Meo")))


def _dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    values = config.to_dict()
    for key in ("meo", "auto_map", "model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    return CONFIG_MAPPING[config.model_type.removeprefix("meo_")](**values)


def _task_index(settings: MeoSettings, task: str | None) -> int:
    if settings.level == "unmerged":
        raise UnsupportedError(
            "at level 'unmerged' experts run one by one: no dense model computes that; a mixture that meo-hf reduce "
            "leaves one expert per block (merged with --router merge) can be extracted"
        )
    if settings.level != "task":
        raise UnsupportedError(
            f"only level 'task' can be extracted: at level {settings.level!r} the merged weights depend on the input"
        )
    if task is None and len(settings.tasks) == 1:
        return 0
    if task not in settings.tasks:
        found = "no --task" if task is None else f"unknown task {task!r}"
        raise UsageError(f"{found}: give one of {', '.join(settings.tasks)}")
    return settings.tasks.index(task)


def _read_of_task(meo: PreTrainedModel, tensors: dict[str, TensorRef], settings: MeoSettings, task: int) -> Tensor:
    """Return what the gates read of a task: its number [1], or its embedded description [1, D]."""
    if settings.task_descriptions is None:
        return torch.tensor([task])
    live = {name: tensors[disk] for disk, name in live_names(meo, tensors).items()}
    weight = meo.get_input_embeddings().weight
    tied = [name for name, parameter in meo.named_parameters(remove_duplicate=False) if parameter is weight]
    stored = next(live[name] for name in tied if name in live)
    embed = nn.Embedding.from_pretrained(stored.load())
    return describe(embed, [settings.task_descriptions[task]])


def _targets(
    meo: PreTrainedModel,
    dense: PreTrainedModel,
    tensors: dict[str, TensorRef],
    settings: MeoSettings,
    read: Tensor,
    task: int,
) -> dict[str, tuple[TensorSpec, Recipe]]:
    live = {name: tensors[disk] for disk, name in live_names(meo, tensors).items()}
    recipes: dict[str, tuple[TensorRef, Recipe]] = {}
    replaced: set[str] = set()
    for block in find_blocks(dense, family_of(dense.config.model_type)):
        if not converts(block, settings):
            continue
        replaced.add(f"{block.slot}.")
        first = "gate_up_proj" if block.gated else "up_proj"
        for target, paths in ((first, block.up), ("down_proj", (block.down,))):
            start = 0
            for path in paths:
                linear = block.projection(path)
                transposed = hasattr(linear, "nf")  # GPT-2's Conv1D
                width = linear.weight.shape[1] if transposed else linear.weight.shape[0]
                for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                    if getattr(linear, leaf) is None:
                        continue
                    stack = live[f"{block.slot}.experts.{target}{suffix}"]
                    router = live[f"{block.slot}.{_router_name(settings, path, target, len(paths), block.up)}.weight"]
                    rows = (start, start + width) if len(paths) > 1 else None
                    key = next(bank_key(name) for name, own in block.paths.items() if own == path)
                    low = leaf == "weight" and settings.expert_format == "lowrank"
                    factors = _factors(live, f"{block.slot}.experts.low_rank.{key}") if low else None
                    recipe: Recipe = Merged(stack, router, read, settings.top_k, rows, transposed, factors, low)
                    recipes[f"{block.path}.{path}.{leaf}"] = (stack, recipe)
                start += width
    for name, ref in live.items():
        if any(name.startswith(slot) for slot in replaced) or ".low_rank." in name:
            continue
        path = name.removesuffix(".weight")
        factors = _factors(live, f"{path}.low_rank")
        transposed = factors is not None and hasattr(dense.get_submodule(path), "nf")
        recipes[name] = (ref, Copied(ref) if factors is None else WithPart(ref, factors, task, transposed))
    parts = [name.removesuffix(".low_rank.A") for name in live if name.endswith(".low_rank.A")]
    if lost := [path for path in parts if f"{path}.weight" not in recipes]:
        raise UnsupportedError(
            f"{lost[0]} adds a part for each task to a weight that is the embeddings' too: a dense checkpoint of this "
            "family ties both, so that part has no place in it"
        )
    state = dense.state_dict()
    to_disk = disk_names(dense, [name for name in recipes if name in state])
    targets = {}
    for name in [*(n for n in state if n in recipes), *sorted(set(recipes) - set(state))]:
        ref, recipe = recipes[name]
        shape = tuple(state[name].shape) if name in state else ref.spec.shape
        spec = TensorSpec(to_disk.get(name, name), ref.spec.dtype, shape)
        targets[spec.name] = (spec, recipe)
    return targets


def _factors(live: dict[str, TensorRef], path: str) -> tuple[TensorRef, TensorRef] | None:
    return (live[f"{path}.A"], live[f"{path}.B"]) if f"{path}.A" in live else None


def _router_name(settings: MeoSettings, path: str, target: str, count: int, up: Sequence[str]) -> str:
    if settings.gate_scope == "ffn":
        return "router"
    if count == 2:
        return f"router.{('gate_proj', 'up_proj')[list(up).index(path)]}"
    return f"router.{target}"
