"""Apply a plan: stream its tensors into safetensors shards, hashing as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from huggingface_hub.serialization import split_state_dict_into_shards_factory

from meo_hf.conversion.births import Recipe
from meo_hf.conversion.safetensors_files import ShardWriter, TensorSpec

Targets = dict[str, tuple[TensorSpec, Recipe]]


@dataclass(frozen=True)
class Shard:
    """A written file: name, size and sha256."""

    name: str
    nbytes: int
    sha256: str


def write_tensors(
    targets: Targets, folder: Path, max_shard_size: str, on_bytes: Callable[[int], None] = lambda _: None
) -> list[Shard]:
    """Write all targets into `folder`, several shards at a time, and the index if there are several."""
    split = split_state_dict_into_shards_factory(
        {name: spec for name, (spec, _) in targets.items()},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    stop = Event()

    def write(name: str, tensors: list[str]) -> Shard:
        with ShardWriter(folder / name, [targets[t][0] for t in tensors]) as writer:
            for spec in writer.specs:
                for chunk in targets[spec.name][1].chunks(spec):
                    if stop.is_set():
                        raise InterruptedError("another shard failed")
                    writer.write(chunk)
                    on_bytes(len(chunk))
            sha256 = writer.close()
        return Shard(name, (folder / name).stat().st_size, sha256)

    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(write, name, tensors) for name, tensors in split.filename_to_tensors.items()]
        try:
            shards = [job.result() for job in jobs]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if split.is_sharded:
        parameters = sum(spec.numel for spec, _ in targets.values())
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")
    return shards
