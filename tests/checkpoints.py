"""Checkpoints on disk: write them, read them back, damage them; and the command line, run in this process."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_dense, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf import cli


def saved(family: str, folder: Path, dtype: torch.dtype | None = None, **overrides: Any) -> Path:
    """Write a tiny stock model with spread weights."""
    model = tiny_dense(family, **overrides)
    (model.to(dtype) if dtype else model).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a checkpoint by their names on disk."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Return the names under which two sets of tensors differ in type, shape or any bit."""
    names = left.keys() | right.keys()
    return sorted(n for n in names if n not in left or n not in right or not identical(left[n], right[n]))


def identical(left: Tensor, right: Tensor) -> bool:
    """Compare type, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def listing(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, and every folder."""
    return {
        path.relative_to(folder).as_posix(): "folder" if path.is_dir() else sha256(path) for path in folder.rglob("*")
    }


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_json(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; a value of None removes its key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def expected_file(path: Path, model: PreTrainedModel, family: str, **inputs: Tensor) -> Path:
    """Write a batch and the logits that a model gives for it, for a process that has neither."""
    batch = {**tiny_inputs(family), **inputs}
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    save_file({**{f"inputs.{k}": v.contiguous() for k, v in batch.items()}, "logits": logits.contiguous()}, path)
    return path


class Ran(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Ran:
    """Run `meo-hf` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.run(lambda: cli.app([str(a) for a in arguments], prog_name="meo-hf"))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())
