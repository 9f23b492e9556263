"""Where the weights of a converted mixture of experts go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """`reference` leaves the weights at the source, `copy` forces copies, `align` rewrites permuted experts."""

    reference: bool = False
    align: bool = False
    copy: bool = False
