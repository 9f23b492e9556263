"""What observers of a mixture should find, by plain loops: rows one by one, without padding, through stock blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from moe_contracts import MoeCase, Seen, moe_modules, router_of, stock_gates, watched
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from unmerged_reference import case_of, count_of, expert_output

from meo_hf.reduction.calibration import Batch
from meo_hf.reduction.statistics import (
    Frequency,
    GateMass,
    LogitSimilarity,
    MeanOutput,
    OutputNorm,
    Reap,
    Statistic,
    TailRatio,
)

LENGTHS = (8, 3, 8, 7, 5, 1)
SELECTS_ONE = ("llama4_text", "switch_transformers")


@dataclass
class Tokens:
    """What one block of a stock model makes of real tokens: x [T, D], gates and logits [T, E], answers [T, E, D]."""

    x: Tensor
    gates: Tensor
    logits: Tensor
    answers: Tensor


def every_statistic(family: str) -> list[Statistic]:
    tail = [] if family in SELECTS_ONE else [TailRatio()]
    return [
        Frequency(),
        GateMass(),
        OutputNorm(),
        Reap(),
        Reap(renormalise=False),
        MeanOutput(),
        LogitSimilarity(),
        *tail,
    ]


def prepared(family: str) -> tuple[MoeCase, Any, Any, list[Tensor], list[Tensor]]:
    case = case_of(family)
    stock = case.stock()
    rows = rows_of(family)
    return case, stock, case.merged(stock, level="unmerged"), rows, weights_of(rows)


def rows_of(family: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 80, (length,), generator=draw) for length in lengths]


def batches_of(rows: list[Tensor], weights: list[Tensor], size: int, left: bool = False) -> list[Batch]:
    """Pad rows [S] and their token weights [S] to batches, with tokens and weights that must not count."""
    made = []
    for at in range(0, len(rows), size):
        own, width = rows[at : at + size], max(map(len, rows[at : at + size]))
        ids, mask = torch.full((len(own), width), 7), torch.zeros(len(own), width, dtype=torch.long)
        weigh = torch.zeros(len(own), width, dtype=torch.float64)
        for i, row in enumerate(own):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids[i, place], mask[i, place], weigh[i, place] = row, 1, weights[at + i]
        made.append(Batch(ids, mask, weigh))
    return made


def weights_of(rows: list[Tensor], seed: int = 5) -> list[Tensor]:
    """Draw whole numbers, so that a token of weight two is as good as two tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 4, (len(row),), generator=draw).double() for row in rows]


def tokens_by_block(
    case: MoeCase, stock: PreTrainedModel, model: PreTrainedModel, rows: list[Tensor]
) -> dict[str, Tokens]:
    """Run a model over each row alone, and stock routers and experts over what its blocks then get."""
    found: dict[str, list[Tokens]] = {}
    with torch.no_grad():
        for row in rows:
            inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
            if case.row.kind == "encoder-decoder":
                first = torch.tensor([[model.config.decoder_start_token_id]])
                inputs["decoder_input_ids"] = torch.cat([first, row[None, :-1]], 1)
            with watched(model) as seen:
                model(**inputs)
            for path, block in moe_modules(stock).items():
                found.setdefault(path, []).append(_tokens(block, seen[path], count_of(stock)))
    return {
        path: Tokens(*(torch.cat([getattr(one, f.name) for one in each]) for f in fields(Tokens)))
        for path, each in found.items()
    }


def _tokens(block: nn.Module, seen: Seen, experts: int) -> Tokens:
    assert seen.experts_in is not None
    x = seen.experts_in.reshape(-1, seen.experts_in.shape[-1])
    ones = torch.ones(len(x), dtype=x.dtype)
    gates = stock_gates(block, seen.tokens, seen.arguments).reshape(len(x), -1)
    dropout = getattr(getattr(block, "experts", None), "moe_token_dropout", 0.0)
    answers = torch.stack([expert_output(block, number, x, ones) for number in range(experts)], 1) / (1 - dropout)
    named = dict(router_of(block).named_parameters())
    (weight,) = (value for value in named.values() if value.dim() == 2)
    logits = F.linear(seen.tokens.reshape(len(x), -1), weight, named.get("bias"))
    return Tokens(x, gates.double(), logits[:, :experts].double(), answers.double())
