"""Run a mixture over calibration rows and show what its experts get, and what they answer, to observers.

Legend: B rows, S positions, T real tokens of a batch, P tokens of them that selected one expert, D features, E experts,
K selected experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.progress import SILENT, Progress
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.moe_layouts_meo import router_of
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.reduction.by_layer import Step, is_offloaded, run_by_layer
from meo_hf.reduction.calibration import Batch


@dataclass(eq=False)
class RouterCall:
    """How a block's router was called, with tokens that are padding too, and what it is."""

    router: Any
    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Tensor | None

    def again(self) -> Any:
        """Call the router once more, as it may have been changed."""
        return self.router(self.hidden_states, *self.args, **self.kwargs)


@dataclass(eq=False)
class BlockView:
    """What the experts of one MoE block got in one batch, without padding.

    `x` [T, D] are tokens, `index` and `gates` [T, K] exactly what the experts get: the gates need not sum to one, and
    LongCat's experts from number `count` on return their input. `logits` [T, E] are None where the router has none,
    `weights` [T] what each token counts, in float64. `real` [B * S] says which tokens of the router's call these are.
    """

    path: str
    experts: Any
    call: RouterCall
    real: Tensor
    x: Tensor
    index: Tensor
    gates: Tensor
    logits: Tensor | None
    weights: Tensor

    @property
    def count(self) -> int:
        """The number of experts."""
        return int(self.experts.count())

    @property
    def chosen(self) -> Tensor:
        """Which selections [T, K] mean that an expert runs: a gate of zero is a token that Switch Transformers drop."""
        return (self.index < self.count) & (self.gates != 0)

    def outputs(self, number: int, x: Tensor) -> Tensor:
        """Return f_e(x) [P, D] of one expert for tokens [P, D], unweighted."""
        return self.experts.expert(number, x)


@dataclass(eq=False)
class ExpertView:
    """What one expert answers in one batch: `outputs` [P, D], unweighted, to tokens number `token` [P].

    `gates` [P] are theirs, `weights` [P] what the tokens count. `everything` [T, D] are its answers to all tokens,
    where an observer asked for them.
    """

    number: int
    token: Tensor
    slot: Tensor
    gates: Tensor
    weights: Tensor
    outputs: Tensor
    everything: Tensor | None

    def answers(self) -> Tensor:
        """Return its answers to all tokens [T, D]; raises UsageError for an observer that did not ask for them."""
        if self.everything is None:
            raise UsageError("an observer of the experts' answers to all tokens sets reads = 'all'")
        return self.everything


class Observer:
    """What is shown each block's tokens; `reads` says whether also the experts' answers, to `routed` or `all` tokens.

    A block is shown once for each batch, then its experts one after the other, so no answer is computed twice.
    """

    reads: str = "gates"

    def see(self, block: BlockView) -> None:
        """Take in a batch of a block."""

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        """Take in what one of its experts answers."""


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    observers: Sequence[Observer],
    progress: Progress = SILENT,
    blocks: Collection[str] | None = None,
    by_layer: bool = False,
) -> None:
    """Run a MEO model of level `unmerged` over batches and show its blocks, or those named, to observers.

    A decoder beside an encoder reads the row shifted right, and the encoder the row. With `by_layer`, and where weights
    are offloaded, all batches pass a layer before the next one, so that its weights are loaded once. Raises UsageError
    for blocks that are not there, UnsupportedError for a model whose tokens are not those of the rows, or NaN.
    """
    level = getattr(getattr(model, "_meo_context", None), "settings", None)
    if getattr(level, "level", None) != "unmerged":
        raise UsageError(f"{type(model).__name__} is no MEO model of level 'unmerged', whose experts run one by one")
    watch = _Watch(model, observers, progress, blocks)
    forward = _forward_of(model)
    was_training = model.training
    model.eval()
    try:
        with watch.attached():
            progress.stage("observing experts", watch.nbytes * len(batches))
            steps = [Step(partial(forward, batch), partial(watch.turn, batch)) for batch in batches]
            if by_layer or is_offloaded(model):
                run_by_layer(model, watch.paths, steps)
            else:
                for step in steps:
                    step.enter()
                    step.run()
    finally:
        model.train(was_training)


def _forward_of(model: PreTrainedModel) -> Any:
    """Return what runs a batch, without logits of the vocabulary where the model can leave them out."""
    body: Any = model.base_model
    extra: dict[str, Any] = {"use_cache": False}
    if body is model and "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1
    place: Any = model.get_input_embeddings().weight.device

    def forward(batch: Batch) -> None:
        ids, mask = batch.input_ids.to(place), batch.attention_mask.to(place)
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            shifted = torch.cat([ids.new_full((len(ids), 1), start), ids[:, :-1]], 1)
            body(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, decoder_attention_mask=mask, **extra)
        else:
            body(input_ids=ids, attention_mask=mask, **extra)

    return forward


class _Watch:
    """Stands between the blocks of a model and observers while batches run."""

    def __init__(
        self, model: PreTrainedModel, observers: Sequence[Observer], progress: Progress, blocks: Collection[str] | None
    ) -> None:
        found = {module._meo.path: module for _, module in merged_moe(model)}
        if blocks is not None and (lost := sorted(set(blocks) - set(found))):
            raise UsageError(f"{lost[0]} is no block with experts; blocks: {', '.join(found)}")
        self._found = {path: module for path, module in found.items() if blocks is None or path in blocks}
        self.paths = list(self._found)
        self._routers = {path: router_of(model.get_submodule(path)) for path in self.paths}
        self._observers, self._progress = observers, progress
        self._sizes = {path: _nbytes(module) for path, module in self._found.items()}
        self.nbytes = sum(self._sizes.values())
        self._calls: dict[str, RouterCall] = {}
        self._batch: Any = None

    def turn(self, batch: Batch) -> None:
        """Say whose rows run now."""
        self._batch = batch

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch routers and experts."""
        with ExitStack() as stack:
            for path, module in self._found.items():
                router = self._routers[path]
                stack.callback(router.register_forward_hook(self._note(path), with_kwargs=True).remove)
                module._run_each = self._instead(path, module, module._run_each)
                stack.callback(module.__dict__.pop, "_run_each")
            yield

    def _note(self, path: str) -> Any:
        def note(router: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
            logits = output[router.places[0]]
            if logits is not None and not logits.is_floating_point():  # Granite's order up to Transformers 5.17
                logits = output[2]
            hidden, *rest = args or (kwargs["hidden_states"],)
            named = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            self._calls[path] = RouterCall(router, hidden, tuple(rest), named, logits)

        return note

    def _instead(self, path: str, module: Any, own: Any) -> Any:
        def run_each(stock: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            answer = own(stock, hidden_states, index, weights)
            self._show(path, module, hidden_states, index, weights)
            self._progress.advance(self._sizes[path])
            return answer

        return run_each

    def _show(self, path: str, module: Any, hidden_states: Tensor, index: Tensor, gates: Tensor) -> None:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        real = self._batch.attention_mask.reshape(-1).bool().to(x.device)
        if len(real) != len(x):
            raise UnsupportedError(
                f"{path} got {len(x)} tokens of rows that hold {len(real)}: they cannot be told apart"
            )
        index, gates = index.reshape(len(x), -1)[real], gates.reshape(len(x), -1)[real]
        if not bool(torch.isfinite(gates).all()):
            what = "check the weights" if gates.dtype == torch.float32 else "load the model in a wider type"
            raise UnsupportedError(f"{path}: gates are not finite in {gates.dtype}: {what}")
        call = self._calls.pop(path)
        logits = None if call.logits is None else call.logits.reshape(len(x), -1)[real]
        weights = self._batch.token_weights.reshape(-1).to(x.device)[real]
        show(BlockView(path, module, call, real, x[real], index, gates, logits, weights), self._observers)


def show(block: BlockView, observers: Sequence[Observer]) -> None:
    """Show a batch of a block to observers; every expert runs once for all of them."""
    for observer in observers:
        observer.see(block)
    reading = [observer for observer in observers if observer.reads != "gates"]
    everything = any(observer.reads == "all" for observer in reading)
    index = torch.where(block.chosen, block.index, -1)
    for number in range(block.count if reading else 0):
        token, slot = (index == number).nonzero(as_tuple=True)
        answers = block.outputs(number, block.x) if everything else None
        outputs = block.outputs(number, block.x[token]) if answers is None else answers[token]
        seen = ExpertView(number, token, slot, block.gates[token, slot], block.weights[token], outputs, answers)
        for observer in reading:
            observer.see_expert(block, seen)


def _nbytes(module: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
