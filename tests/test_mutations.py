"""Contracts that cannot fail show nothing: each mutation of the model code must break one, in every kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import contracts
import pytest
import torch
from contracts import Case
from meo_hf.modeling import (
    causal_meo,
    families_meo,
    feedforward_meo,
    groups_meo,
    merged_linear_meo,
    merger_meo,
    merging_meo,
    modeling_meo,
    routing_meo,
)
from meo_hf.modeling.blocks_meo import Block
from meo_hf.modeling.feedforward_meo import MeoFeedForward, MergedExperts, TokenAdapter
from meo_hf.modeling.groups_meo import Groups, TaskGroups
from meo_hf.modeling.router_meo import Gates, MeoRouter
from meo_hf.modeling.segments_meo import Layout, Pool
from torch import Tensor

BERT, BART = Case("bert", "sequence"), Case("bart", "sequence")
LLAMA = Case("llama", "segment", overrides=(("mlp_bias", True),))
PROMPTED = Case("llama", "sequence")
ALL = (BERT, BART, LLAMA)
TASKS = tuple(Case(case.family, "task", overrides=case.overrides) for case in ALL)
Patch = pytest.MonkeyPatch
Contract = Callable[[Case], None]


def padded(case: Case) -> None:
    """Run the padding contract on the right."""
    contracts.padding_changes_nothing(case, "right")


def padded_on_the_left(case: Case) -> None:
    """Run the padding contract on the left."""
    contracts.padding_changes_nothing(case, "left")


def constant_gate(patch: Patch) -> None:
    def forward(self: MeoRouter, inputs: Tensor, real: Tensor | None = None) -> tuple[Gates, Tensor]:
        index = torch.arange(self.top_k).expand(len(inputs), -1)
        return Gates(index, torch.full(index.shape, 1 / self.top_k)), torch.zeros(())

    patch.setattr(MeoRouter, "forward", forward)


def all_ones_mask(patch: Patch) -> None:
    patch.setattr(routing_meo, "padding_mask", lambda *_: None)
    patch.setattr(routing_meo, "document_starts", lambda *_: None)


def mask_of_the_encoder_forgotten_by_the_decoder(patch: Patch) -> None:
    original = routing_meo.padding_mask

    def forget(mask: Any, shape: Any, device: Any, name: str = "") -> Tensor | None:
        return None if name == "encoder_attention_mask" else original(mask, shape, device, name)

    patch.setattr(routing_meo, "padding_mask", forget)


def mean_over_other_rows(patch: Patch) -> None:
    original = groups_meo.masked_mean
    for module in (groups_meo, routing_meo):
        patch.setattr(module, "masked_mean", lambda x, mask: original(x, mask).mean(0, keepdim=True).expand(len(x), -1))


def ignored_task_ids(patch: Patch) -> None:
    original = TaskGroups.read

    def read(self: TaskGroups, name: str, cells: Tensor) -> Tensor:
        return torch.zeros_like(original(self, name, cells))

    patch.setattr(TaskGroups, "read", read)


def linear_with(patch: Patch, **changed: Callable[[Any], Any]) -> None:
    """Change arguments of every linear map of merged experts: `stack`, `bias`, `index` or `gates`."""
    original = merger_meo.merged_linear

    def linear(x: Tensor, stack: Any, bias: Any, index: Any, gates: Any, *rest: Any) -> Tensor:
        given = {"stack": stack, "bias": bias, "index": index, "gates": gates}
        given |= {name: change(given[name]) for name, change in changed.items()}
        return original(x, *given.values(), *rest)

    patch.setattr(merger_meo, "merged_linear", linear)


def dropped_bias(patch: Patch) -> None:
    linear_with(patch, bias=lambda bias: None)
    original = merging_meo.grouped_linear
    patch.setattr(merger_meo, "grouped_linear", lambda x, weight, bias: original(x, weight, None))


def bias_outside_the_gates(patch: Patch) -> None:
    original = merging_meo.combine_outputs

    def combine(x: Tensor, stack: Tensor, bias: Tensor | None, *gates: Tensor) -> Tensor:
        return original(x, stack, None, *gates) + (0 if bias is None else bias[0])

    patch.setattr(merged_linear_meo, "combine_outputs", combine)


def layer_left_dense(patch: Patch) -> None:
    original = feedforward_meo.find_blocks

    def find(*arguments: Any) -> Iterator[Block]:
        yield from list(original(*arguments))[:-1]

    patch.setattr(feedforward_meo, "find_blocks", find)


def layer_passes_through(patch: Patch) -> None:
    original, first = MeoFeedForward.forward, []

    def forward(self: MeoFeedForward, hidden_states: Tensor) -> Tensor:
        first.append(self)
        return hidden_states if self is first[0] else original(self, hidden_states)

    patch.setattr(MeoFeedForward, "forward", forward)


def decoder_reads_its_own_tokens(patch: Patch) -> None:
    original = MeoFeedForward.__init__

    def init(self: MeoFeedForward, *arguments: Any) -> None:
        original(self, *arguments)
        self.reads_encoder = False

    patch.setattr(MeoFeedForward, "__init__", init)


def published_rule_in_a_decoder(patch: Patch) -> None:
    """Gate a causal stack by the mean of the whole sequence, as the code of the MEO paper does."""
    patch.setattr(modeling_meo, "is_causal", lambda config: False)


def advance_with(patch: Patch, change: Callable[[Tensor, Layout, Tensor], Tensor]) -> None:
    """Change what the gates of segments read, given it, the layout and the cells [B, G, W, D]."""
    original = groups_meo.advance

    def advance(pool: Pool, layout: Layout, cells: Tensor) -> tuple[Tensor, Pool]:
        inputs, after = original(pool, layout, cells)
        shape = (layout.rows, layout.groups)
        changed = change(inputs.reshape(*shape, -1), layout, cells.reshape(*shape, layout.width, -1).to(inputs.dtype))
        return changed.reshape(inputs.shape), after

    patch.setattr(groups_meo, "advance", advance)


def segments_read_themselves(patch: Patch) -> None:
    advance_with(patch, lambda inputs, layout, cells: cells.mean(2))


def first_segment_reads_itself(patch: Patch) -> None:
    """As Lory does."""
    advance_with(patch, lambda inputs, layout, cells: torch.cat([cells[:, :1].mean(2), inputs[:, 1:]], 1))


def segments_read_two_back(patch: Patch) -> None:
    advance_with(patch, lambda inputs, layout, cells: torch.cat([inputs[:, :1], inputs[:, :-1]], 1))


def segments_of_other_rows(patch: Patch) -> None:
    advance_with(patch, lambda inputs, layout, cells: inputs.mean(0, keepdim=True).expand_as(inputs))


def padding_takes_places(patch: Patch) -> None:
    original = causal_meo.lay_out
    patch.setattr(
        causal_meo, "lay_out", lambda count, length, segment, mask, **o: original(count, length, segment, **o)
    )


def prompt_that_never_ends(patch: Patch) -> None:
    patch.setattr(causal_meo, "_within", lambda *_: (None, False))


def answer_reads_beyond_its_prompt(patch: Patch) -> None:
    advance_with(
        patch,
        lambda inputs, layout, cells: (
            inputs
            if layout.answer is None
            else torch.where(layout.answer[..., None], cells.mean((1, 2))[:, None], inputs)
        ),
    )


def gates_that_do_not_sum_to_one(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor, real: Tensor | None = None) -> tuple[Gates, Tensor]:
        gates, balance = original(self, inputs)
        return Gates(gates.top_k_index, gates.top_k_weights * 0.9), balance

    patch.setattr(MeoRouter, "forward", forward)


def weights_in_the_wrong_order(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor, real: Tensor | None = None) -> tuple[Gates, Tensor]:
        gates, balance = original(self, inputs)
        return Gates(gates.top_k_index, gates.top_k_weights.flip(1)), balance

    patch.setattr(MeoRouter, "forward", forward)


def weights_without_a_gradient(patch: Patch) -> None:
    linear_with(patch, gates=torch.Tensor.detach)


def unselected_experts_times_zero(patch: Patch) -> None:
    patch.setattr(merged_linear_meo, "_sound", lambda y: True)
    linear = merger_meo.merged_linear
    patch.setattr(merger_meo, "merged_linear", lambda *arguments: linear(*arguments[:-1], "product"))


def swapped_halves(patch: Patch) -> None:
    original, other = MergedExperts.stack, {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    patch.setattr(MergedExperts, "stack", lambda self, name: original(self, other.get(name, name)))


def adapter_left_out(patch: Patch) -> None:
    patch.setattr(TokenAdapter, "forward", lambda self, x: x)


def noise_in_evaluation(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor, real: Tensor | None = None) -> tuple[Gates, Tensor]:
        self.train()
        return original(self, inputs)

    patch.setattr(MeoRouter, "forward", forward)


def gate_reads_the_first_token_only(patch: Patch) -> None:
    patch.setattr(Groups, "read", lambda self, name, cells: cells[:, 0])


MUTATIONS: list[tuple[Callable[[Patch], None], Contract, tuple[Case, ...]]] = [
    (constant_gate, contracts.permuted_experts_change_nothing, ALL),
    (constant_gate, contracts.gates_differ_between_inputs, ALL),
    (all_ones_mask, padded, (BERT, BART)),
    (mask_of_the_encoder_forgotten_by_the_decoder, padded, (BART,)),
    (mean_over_other_rows, contracts.rows_do_not_meet, (BERT, BART)),
    (ignored_task_ids, contracts.task_ids_are_tasks_one_by_one, TASKS),
    (ignored_task_ids, contracts.merged_feed_forward_is_reference, TASKS),
    (dropped_bias, contracts.identical_experts_are_dense, ALL),
    (dropped_bias, contracts.merged_feed_forward_is_reference, ALL),
    (bias_outside_the_gates, contracts.weights_combined_are_outputs_combined, ALL),
    (layer_left_dense, contracts.every_layer_is_merged, ALL),
    (layer_passes_through, contracts.identical_experts_are_dense, ALL),
    (layer_passes_through, contracts.every_layer_is_merged, ALL),
    (decoder_reads_its_own_tokens, contracts.later_tokens_change_nothing, (BART,)),
    (published_rule_in_a_decoder, contracts.later_tokens_change_nothing, (LLAMA,)),
    (published_rule_in_a_decoder, contracts.merged_feed_forward_is_reference, (LLAMA,)),
    (segments_read_themselves, contracts.later_tokens_change_nothing, (LLAMA, PROMPTED)),
    (first_segment_reads_itself, contracts.merged_feed_forward_is_reference, (LLAMA, PROMPTED)),
    (segments_read_two_back, contracts.merged_feed_forward_is_reference, (LLAMA, PROMPTED)),
    (segments_of_other_rows, contracts.rows_do_not_meet, (LLAMA, PROMPTED)),
    (padding_takes_places, padded_on_the_left, (LLAMA, PROMPTED)),
    (prompt_that_never_ends, contracts.merged_feed_forward_is_reference, (PROMPTED,)),
    (answer_reads_beyond_its_prompt, contracts.later_tokens_change_nothing, (PROMPTED,)),
    (gates_that_do_not_sum_to_one, contracts.identical_experts_are_dense, ALL),
    (gates_that_do_not_sum_to_one, contracts.one_expert_is_dense, ALL),
    (weights_in_the_wrong_order, contracts.merged_feed_forward_is_reference, ALL),
    (weights_in_the_wrong_order, contracts.underflowing_gates_stay_finite, ALL),
    (weights_without_a_gradient, contracts.gradients_reach_what_was_selected, ALL),
    (unselected_experts_times_zero, contracts.gradients_reach_what_was_selected, ALL),
    (swapped_halves, contracts.identical_experts_are_dense, (Case("mt5", "sequence"), LLAMA)),
    (adapter_left_out, contracts.merged_feed_forward_is_reference, (Case("bert", "token"), Case("bart", "token"))),
    (noise_in_evaluation, contracts.rows_do_not_meet, ALL),
    (gate_reads_the_first_token_only, contracts.merged_feed_forward_is_reference, (BERT, BART)),
]
EACH = [
    pytest.param(mutate, contract, case, id=f"{mutate.__name__}-{contract.__name__}-{case.family}")
    for mutate, contract, some in MUTATIONS
    for case in some
]


@pytest.mark.parametrize(("mutate", "contract", "case"), EACH)
def test_mutation_breaks_its_contract(
    mutate: Callable[[Patch], None], contract: Contract, case: Case, monkeypatch: Patch
) -> None:
    contract(case)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        contract(case)


@pytest.mark.parametrize("kind", families_meo.LEVELS)
def test_every_kind_is_mutated(kind: str) -> None:
    broken = {mutate for mutate, _, some in MUTATIONS if any(case.kind == kind for case in some)}
    assert len(broken) >= 12
