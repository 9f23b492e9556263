"""How close a variant's predictions are to its source's, how close its MoE blocks are, and how its gates mix.

Legend: B rows, S positions, V vocabulary, N groups that share a gate, K selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from meo_hf.benchmark.compare_variants import Subject
from meo_hf.benchmark.decode_checks import TOLERANCES, relative_rms
from meo_hf.errors import CheckFailedError
from meo_hf.modeling.moe_meo import merged_moe

NEAR_UNIFORM = 0.01
"""Distance (total variation) from uniform up to which gates count as near uniform."""


@dataclass
class Quality:
    """Sums over predicted tokens."""

    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood in nats."""
        return math.exp(self.nll / self.tokens)

    @property
    def kl(self) -> float:
        """Mean KL divergence of the variant from the source, in nats per token."""
        return self.divergence / self.tokens

    @property
    def agreement(self) -> float:
        """Share of tokens for which both rank the same token first."""
        return self.agreeing / self.tokens

    def add(self, source: Tensor, variant: Tensor, ids: Tensor) -> None:
        """Count one text [S]: logits [S, V] of both models, read in float32."""
        p, q = (logits[:-1].float().log_softmax(-1) for logits in (source, variant))
        self.tokens += len(p)
        self.nll -= float(q.gather(1, ids[1:, None]).double().sum())
        gap = torch.where(p.isneginf(), 0, p.exp() * (p - q))  # what the source rules out weighs nothing
        self.divergence += float(gap.sum(-1).double().sum())
        self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())


@torch.inference_mode()
def measure_quality(
    source: Subject, variant: Subject, windows: Tensor, batch_size: int, advance: Callable[[str], None]
) -> Quality:
    """Let both models read the same windows [N, S], batch by batch; every token but a window's first is predicted."""
    quality = Quality()
    for ids in windows.split(batch_size):
        advance(f"{variant.name}: predicting")
        expected = source.logits(ids)
        found = expected if variant is source else variant.logits(ids)
        for row in zip(expected, found, ids, strict=True):
            quality.add(*row)
    return quality


@torch.inference_mode()
def check_causal(subject: Subject, window: Tensor, seed: int, dtype: str) -> None:
    """Raise CheckFailedError if a window's logits [1, S, V] change when its last third does: some gate looks ahead."""
    cut = window.shape[1] - window.shape[1] // 3
    kept = subject.logits(window)[:, :cut]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(kept.shape[-1], (1, window.shape[1] - cut), generator=generator)
    changed = subject.logits(torch.cat([window[:, :cut], drawn.to(window.device)], 1))[:, :cut]
    difference = relative_rms(changed, kept)
    if not difference <= TOLERANCES[dtype]:  # so that NaN fails too
        raise CheckFailedError(
            f"{subject.name}: logits change by {difference:.1e} (relative RMS) when later tokens do. It reads tokens "
            "that it is to predict, so its perplexity would mean nothing: compare a causal decoder"
        )


@dataclass
class LayerError:
    """Sums of squares over one MoE block's outputs."""

    difference: float = 0.0
    expected: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the difference, relative to what was expected."""
        return math.sqrt(self.difference / self.expected) if self.expected else math.nan

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Count the outputs of one call."""
        self.difference += float((found.double() - expected.double()).square().sum())
        self.expected += float(expected.double().square().sum())


@torch.inference_mode()
def layer_errors(
    source: Subject, meo: Subject, windows: Tensor, batch_size: int, advance: Callable[[str], None]
) -> dict[str, LayerError]:
    """Give every merged MoE block what the source's block of that layer read, and compare what they return."""
    errors = {module._meo.path: LayerError() for _, module in merged_moe(meo.model)}
    seen: dict[str, tuple[Any, Any, Tensor]] = {}
    for ids in windows.split(batch_size):
        advance(f"{meo.name}: its blocks on the source's states")
        with _capturing(source.model, seen, errors):
            source.logits(ids)
        with _forcing(meo.model, seen, errors):
            meo.logits(ids)
    return errors


@contextmanager
def _capturing(model: nn.Module, seen: dict[str, tuple[Any, Any, Tensor]], paths: Any) -> Iterator[None]:
    """Keep inputs and outputs of blocks, as they are before anybody writes to them."""

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            seen[path] = args, kwargs, _first(output).clone()

        return keep

    with ExitStack() as hooks:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@contextmanager
def _forcing(
    model: nn.Module, seen: dict[str, tuple[Any, Any, Tensor]], errors: dict[str, LayerError]
) -> Iterator[None]:
    """Replace what blocks are given by what was seen, and count how their outputs differ."""

    def give(path: str) -> Callable[..., Any]:
        return lambda module, args, kwargs: seen[path][:2]

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, output: errors[path].add(_first(output), seen[path][2])

    with ExitStack() as hooks:
        for path in errors:
            block = model.get_submodule(path)
            hooks.callback(block.register_forward_pre_hook(give(path), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(hook(path)).remove)
        yield


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass
class GateTally:
    """Sums over the gates of one MoE block: K normalised weights per group."""

    top_k: int = 0
    groups: int = 0
    merged: int = 0
    entropy_sum: float = 0.0
    distance_sum: float = 0.0
    total_sum: float = 0.0
    identity_sum: float = 0.0

    def add(self, weights: Tensor, tokens: int, merges: bool) -> None:
        """Count the gates [N, K] of one call, whose groups have some tokens each."""
        self.top_k = weights.shape[1]
        self.groups += len(weights)
        several = (weights > 0).sum(1) > 1
        self.merged += int(several.sum()) if merges and tokens > 1 else 0
        self.entropy_sum += float(torch.special.entr(weights.double()).sum())
        self.distance_sum += float((weights.double() - 1 / self.top_k).abs().sum() / 2)

    @property
    def merged_share(self) -> float:
        """Share of groups for which weights were merged: several tokens, and several experts with a weight."""
        return self.merged / self.groups

    @property
    def entropy(self) -> float:
        """Mean entropy in nats."""
        return self.entropy_sum / self.groups

    @property
    def relative_entropy(self) -> float | None:
        """Mean entropy relative to that of K equal weights; None where one expert is selected."""
        return self.entropy / math.log(self.top_k) if self.top_k > 1 else None

    @property
    def distance(self) -> float:
        """Mean total variation between a gate and K equal weights."""
        return self.distance_sum / self.groups

    @property
    def label(self) -> str:
        """What is to be known about gates that hardly choose."""
        if self.top_k == 1:
            return "one expert"
        return "near uniform" if self.distance <= NEAR_UNIFORM else ""

    @property
    def totals(self) -> tuple[float, float]:
        """Mean sum of a gate before it was normalised, and of its share of experts that return their input."""
        return self.total_sum / self.groups, self.identity_sum / self.groups


@contextmanager
def tallied_gates(model: nn.Module) -> Iterator[dict[str, GateTally]]:
    """Within this context count every gate of a MEO model's MoE blocks, by the path of their experts."""
    tallies: dict[str, GateTally] = {}
    modules = dict(merged_moe(model))
    for path, module in modules.items():
        _tally(module, tallies.setdefault(path, GateTally()))
    try:
        yield tallies
    finally:
        for module in modules.values():
            del module._run, module._normalise


def _tally(module: Any, tally: GateTally) -> None:
    run_of, normalise = module._run, module._normalise

    def run_and_count(call: Any, groups: Any, gates: Any, adapted: Any) -> Callable[[Tensor], Tensor]:
        run = run_of(call, groups, gates, adapted)

        def run_counted(x: Tensor) -> Tensor:
            tally.add(gates.top_k_weights, x.shape[1], module.combine == "weights")
            return run(x)

        return run_counted

    def normalise_and_count(index: Tensor, weights: Tensor) -> Any:
        gates, total, identity = normalise(index, weights)
        tally.total_sum += float(total.double().sum())
        tally.identity_sum += 0.0 if identity is None else float(identity.double().sum())
        return gates, total, identity

    module._run, module._normalise = run_and_count, normalise_and_count
