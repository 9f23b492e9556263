"""Write an output beside its place and rename it: nothing half-done is ever seen, nothing is overwritten unasked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from meo_hf.errors import OutputError, UsageError

SPARE_BYTES = 64 * 2**20


def check_output(output: Path, overwrite: bool, sources: Sequence[str]) -> None:
    """Raise OutputError or UsageError if the output may not be written where it was asked for."""
    place = output.resolve()
    for source in sources:
        path = Path(source).expanduser().resolve()
        if (path.is_dir() and (path == place or path in place.parents)) or (place in path.parents and path.exists()):
            raise UsageError(f"the output {output} and the source {source} lie in each other: give another output")
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, no folder to write in: give another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}: give another output")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: give another output, or pass --overwrite")
    if (
        output.exists()
        and not (output / "config.json").is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        raise OutputError(
            f"{output} is no model folder (no config.json in it), so it is not overwritten: remove it yourself"
        )


def _existing_parent(output: Path) -> Path:
    return next((folder for folder in output.parents if folder.exists()), output)


def check_space(output: Path, nbytes: int) -> None:
    """Raise OutputError if a disk has no room for an output."""
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < nbytes + SPARE_BYTES:
        raise OutputError(
            f"{nbytes / 1e9:.2f} GB are needed in {parent}, {free / 1e9:.2f} GB are free: make room, or give another "
            "output"
        )


@contextmanager
def written_beside(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside the output; rename it when all went well, remove it when not."""
    missing = [parent for parent in output.parents if not parent.exists()]
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        folder.chmod(0o755)
        yield folder
        replace(folder, output, overwrite)
    except OSError as error:
        if error.errno is not None and not hasattr(error, "response"):
            raise OutputError(f"writing {output} failed ({error.strerror or error}): nothing was kept") from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it holds the output, or was never made
                parent.rmdir()


def replace(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to its place; an existing one goes only once the new one stands."""
    if not (output.exists() and overwrite):
        folder.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def keep_failed(folder: Path, output: Path) -> Path:
    """Keep an output whose check failed as `OUTPUT.failed`, in the place of an earlier one."""
    failed = output.with_name(f"{output.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    return failed
