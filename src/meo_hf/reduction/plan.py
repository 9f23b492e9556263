"""What becomes of a mixture's experts: per block, rows over the old experts; saved and replayed as JSON.

Legend: E old experts of a block, E' new ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError

Row = tuple[tuple[int, float], ...]
"""One new expert or router row: the old ones it is made of, and their weights; the first is what others align to."""

HOWS = ("mean", "aligned", "joint-svd", "given")


def one_hot(kept: list[int]) -> tuple[Row, ...]:
    """Return rows that keep some experts as they are."""
    return tuple(((expert, 1.0),) for expert in kept)


@dataclass(frozen=True)
class MapParts:
    """What a linear map of new experts is kept as: their mean if `shared`, and of each a rank and whole columns."""

    shared: bool
    ranks: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]

    def check(self, path: str, experts: int) -> None:
        """Raise UsageError for parts that no such number of experts can have."""
        fits = len(self.ranks) == len(self.columns) == experts and min(self.ranks, default=0) >= 0
        distinct = all(len(set(own)) == len(own) and min(own, default=0) >= 0 for own in self.columns)
        if not fits or not distinct or not (self.shared or any(self.ranks) or any(self.columns)):
            raise UsageError(f"the plan for {path} has no ranks or columns for {experts} experts: make it anew")


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of one MoE block.

    New expert j is the sum of old ones, weighted by `experts`[j]: as they are (`mean`), with their neurons permuted to
    match the first one's (`aligned`), as one basis with averaged coefficients (`joint-svd`), or with down projections
    that a file beside the plan holds (`given`). The router either gets `router` rows too, or stays and `stands_for`
    says which new expert runs for each old one. `parts` says, by the paths of linear maps, which of them are then kept
    as parts.
    """

    experts: tuple[Row, ...]
    router: tuple[Row, ...] | None = None
    stands_for: tuple[int, ...] | None = None
    how: str = "mean"
    parts: dict[str, MapParts] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of new experts."""
        return len(self.experts)

    @property
    def keeps(self) -> bool:
        """Whether every new expert is an old one as it was."""
        return all(len(row) == 1 and row[0][1] == 1.0 for row in self.experts)

    def check(self, path: str, experts: int) -> None:
        """Raise UsageError for a plan that does not fit a block of so many experts."""
        rows = [*self.experts, *(self.router or ())]
        wrong = None
        if not self.experts or not all(rows):
            wrong = "has no experts, or one that is made of none"
        elif any(not 0 <= old < experts for row in rows for old, _ in row):
            wrong = f"names experts beyond the {experts} that the block has"
        elif self.count > experts:
            wrong = f"makes {self.count} experts of {experts}, not fewer"
        elif any(len({old for old, _ in row}) < len(row) for row in rows):
            wrong = "names an expert twice in one row"
        elif not all(math.isfinite(sum(abs(weight) for _, weight in row)) and any(w for _, w in row) for row in rows):
            wrong = "has a row whose weights are not finite, or all zero"
        elif (self.router is None) == (self.stands_for is None):
            wrong = "needs either rows for its router or what each old expert stands for"
        elif self.router is not None and len(self.router) != len(self.experts):
            wrong = f"has {len(self.router)} router rows for {len(self.experts)} experts"
        elif self.stands_for is not None and (
            len(self.stands_for) != experts or not all(0 <= new < self.count for new in self.stands_for)
        ):
            wrong = f"must name one of its {self.count} experts for each of {experts} old ones"
        elif self.how not in HOWS:
            wrong = f"joins experts by {self.how!r}, not by one of {', '.join(HOWS)}"
        if wrong is not None:
            raise UsageError(f"the plan for {path} {wrong}: make it anew with --dry-run")
        for name, one in self.parts.items():
            one.check(name, self.count)


@dataclass(frozen=True)
class ReductionPlan:
    """What becomes of a checkpoint: its blocks by path, and what changes at run time.

    `method` holds the method's name and options, `source` id, commit and a fingerprint of the weights, `calibration`
    what was read. `skip` is the rule of the `meo` block, `top_k` a new number of selected experts. `scores` are what a
    method found for each old expert, by block, `notes` what else it has to say. `matrices` are down projections [O, I]
    by block and new expert, `given` their sha256.
    """

    method: dict[str, Any]
    source: dict[str, Any]
    blocks: dict[str, BlockPlan] = field(default_factory=dict)
    skip: dict[str, Any] | None = None
    top_k: int | None = None
    calibration: dict[str, Any] | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    given: str | None = None
    matrices: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def save(self, path: Path) -> None:
        """Write the plan, and its matrices beside it as `NAME.matrices`, which is a safetensors file."""
        if self.matrices:
            _put(path.with_suffix(".matrices"), save(self.matrices))
        _put(path, self.to_json().encode())

    def to_json(self) -> str:
        """Return the plan as text: the same plan gives the same bytes."""
        blocks = {
            path: {
                "experts": [dict_of(row) for row in block.experts],
                **({} if block.router is None else {"router": [dict_of(row) for row in block.router]}),
                **({} if block.stands_for is None else {"stands_for": list(block.stands_for)}),
                "how": block.how,
                **({"parts": {name: asdict(one) for name, one in block.parts.items()}} if block.parts else {}),
            }
            for path, block in self.blocks.items()
        }
        values = {name: getattr(self, name) for name in _PLAIN if getattr(self, name) not in (None, {})}
        return json.dumps({**values, "blocks": blocks}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str) -> ReductionPlan:
        """Read a plan; raises CheckpointError where it is damaged."""
        try:
            values = json.loads(text, object_pairs_hook=_once)
            _check_kinds(values)
            blocks = {
                path: BlockPlan(
                    tuple(map(row_of, one["experts"])),
                    tuple(map(row_of, one["router"])) if "router" in one else None,
                    tuple(_whole(new) for new in one["stands_for"]) if "stands_for" in one else None,
                    str(one["how"]),
                    {name: parts_of(kept) for name, kept in one.get("parts", {}).items()},
                )
                for path, one in values["blocks"].items()
            }
            return cls(**{key: values[key] for key in _PLAIN if key in values}, blocks=blocks)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{name} is no plan of meo-hf reduce ({error!r}): make it anew") from None

    @classmethod
    def load(cls, path: Path, option: str = "--plan") -> ReductionPlan:
        """Read a plan from a file that an option names; raises UsageError where there is none."""
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{option} {path} cannot be read ({error}): give a plan.json") from None
        plan, beside = cls.from_json(text, str(path)), path.with_suffix(".matrices")
        if plan.given is None:
            return plan
        try:
            found = load(beside.read_bytes())
        except (OSError, SafetensorError):
            found = {}
        if hash_of(found) != plan.given:
            raise CheckpointError(f"{beside} is missing or not what {path.name} names: make the plan anew")
        return replace(plan, matrices=found)


def _put(path: Path, content: bytes) -> None:
    """Write a file beside, then rename it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def hash_of(matrices: dict[str, Tensor]) -> str | None:
    """Return the sha256 of matrices as they are saved, None where there are none."""
    return hashlib.sha256(save(matrices)).hexdigest() if matrices else None


_PLAIN: dict[str, type] = {
    "method": dict,
    "source": dict,
    "skip": dict,
    "top_k": int,
    "calibration": dict,
    "scores": dict,
    "notes": dict,
    "given": str,
}


def _check_kinds(values: dict[str, Any]) -> None:
    """Raise TypeError or KeyError where a plan's parts are not what a report reads of them."""
    for key, kind in _PLAIN.items():
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool)):
            raise TypeError(f"{key} is {values[key]!r}")
    str(values["method"]["name"])
    for domain in values.get("calibration", {"domains": ()})["domains"]:
        if not isinstance(domain["name"], str) or not isinstance(domain["tokens"], int):
            raise TypeError(f"a text of the calibration is {domain!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice: {[key for key, _ in pairs][:5]}")
    return found


def _whole(number: Any) -> int:
    if not isinstance(number, int):
        raise TypeError(f"{number!r} is no number of an expert")
    return number


def dict_of(row: Row) -> dict[str, float]:
    """Return a row as JSON keeps it: in its order, by the old experts' numbers."""
    return {str(old): weight for old, weight in row}


def parts_of(kept: dict[str, Any]) -> MapParts:
    """Return the parts of a linear map from JSON."""
    made = MapParts(kept["shared"], tuple(kept["ranks"]), tuple(map(tuple, kept["columns"])))
    if type(made.shared) is not bool or not all(type(n) is int for own in (made.ranks, *made.columns) for n in own):
        raise TypeError(f"parts hold {kept!r:.200}")
    return made


def row_of(kept: dict[str, Any]) -> Row:
    """Return a row from JSON."""
    return tuple((int(old), float(weight)) for old, weight in kept.items())
