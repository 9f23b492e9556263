"""Options that name things: `--task`, which may describe it, `--adapter` and `--example`."""

from __future__ import annotations

from pathlib import Path

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


def adapter_names(given: list[str]) -> list[str] | dict[str, str]:
    """Return adapters, by name where one has a name; raises UsageError if two have the same."""
    if not any("=" in text for text in given):
        return given
    pairs = [text.partition("=") for text in given]
    named = [(name, place) if equals else (Path(name.rstrip("/")).name, name) for name, equals, place in pairs]
    if len({name for name, _ in named}) < len(named):
        raise UsageError("two adapters have the same name: give each one as --adapter NAME=ADAPTER")
    return dict(named)


def example_files(given: list[str]) -> dict[str, str]:
    """Return text files by adapter; raises UsageError for one without a name, or a name that comes twice."""
    pairs = [text.partition("=") for text in given]
    if bare := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"--example {bare[0]!r} names no adapter: give NAME=FILE")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UsageError("--example names an adapter twice: give one file each")
    return {name: path for name, _, path in pairs}
