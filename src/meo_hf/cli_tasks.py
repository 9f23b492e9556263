"""The option `--task`, in which a task may be described."""

from __future__ import annotations

from meo_hf.errors import UsageError


def task_names(given: list[str]) -> list[str] | dict[str, str]:
    """Return task names, or names and descriptions where they have one."""
    pairs = [text.partition("=") for text in given]
    if not any(equals for _, equals, _ in pairs):
        return given
    if bare := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"--task {bare[0]!r} has no description, but others do: describe every task, or none")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError("--task names a task twice: give each once")
    return {name: text for name, _, text in pairs}
