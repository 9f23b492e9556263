"""Contracts that cannot fail show nothing: each mutation of the model code must break one, in every kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import contracts
import pytest
import torch
from contracts import Case
from meo_hf.modeling import families_meo, feedforward_meo, merging_meo, routing_meo
from meo_hf.modeling.feedforward_meo import Block, MeoFeedForward, MergedExperts, TokenAdapter
from meo_hf.modeling.routing_meo import Call, Gates, MeoRouter
from torch import Tensor

BERT, BART = Case("bert", "sequence"), Case("bart", "sequence")
LLAMA = Case("llama", "task", overrides=(("mlp_bias", True),))
ALL = (BERT, BART, LLAMA)
TASKS = tuple(Case(case.family, "task", overrides=case.overrides) for case in ALL)
Patch = pytest.MonkeyPatch
Contract = Callable[[Case], None]


def padded(case: Case) -> None:
    """Run the padding contract on the right."""
    contracts.padding_changes_nothing(case, "right")


def constant_gate(patch: Patch) -> None:
    def forward(self: MeoRouter, inputs: Tensor) -> tuple[Gates, Tensor]:
        index = torch.arange(self.top_k).expand(len(inputs), -1)
        return Gates(index, torch.full(index.shape, 1 / self.top_k)), torch.zeros(())

    patch.setattr(MeoRouter, "forward", forward)


def all_ones_mask(patch: Patch) -> None:
    patch.setattr(routing_meo, "_two_dimensional", lambda mask, x, name: None)
    patch.setattr(routing_meo, "_refuse_restarts", lambda position_ids, mask: None)


def mask_of_the_encoder_forgotten_by_the_decoder(patch: Patch) -> None:
    original = routing_meo._two_dimensional

    def forget(mask: Any, x: Tensor, name: str) -> Tensor | None:
        return None if name == "encoder_attention_mask" else original(mask, x, name)

    patch.setattr(routing_meo, "_two_dimensional", forget)


def mean_over_other_rows(patch: Patch) -> None:
    original = routing_meo.masked_mean
    patch.setattr(
        routing_meo, "masked_mean", lambda x, mask: original(x, mask).mean(0, keepdim=True).expand(len(x), -1)
    )


def ignored_task_ids(patch: Patch) -> None:
    patch.setattr(routing_meo, "_checked_task_ids", lambda task_ids, rows: torch.zeros_like(task_ids))


def dropped_bias(patch: Patch) -> None:
    original = merging_meo.grouped_linear
    for module in (merging_meo, feedforward_meo):
        patch.setattr(module, "grouped_linear", lambda x, weight, bias: original(x, weight, None))


def bias_outside_the_gates(patch: Patch) -> None:
    original = merging_meo.combine_outputs

    def combine(x: Tensor, stack: Tensor, bias: Tensor | None, *gates: Tensor) -> Tensor:
        return original(x, stack, None, *gates) + (0 if bias is None else bias[0])

    patch.setattr(feedforward_meo, "combine_outputs", combine)


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


def causal_stack_pools_its_sequence(patch: Patch) -> None:
    patch.setitem(families_meo.LEVELS, "decoder", ("task", "sequence"))


def gates_that_do_not_sum_to_one(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor) -> tuple[Gates, Tensor]:
        gates, balance = original(self, inputs)
        return Gates(gates.top_k_index, gates.top_k_weights * 0.9), balance

    patch.setattr(MeoRouter, "forward", forward)


def weights_in_the_wrong_order(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor) -> tuple[Gates, Tensor]:
        gates, balance = original(self, inputs)
        return Gates(gates.top_k_index, gates.top_k_weights.flip(1)), balance

    patch.setattr(MeoRouter, "forward", forward)


def weights_without_a_gradient(patch: Patch) -> None:
    original = merging_meo.merge_experts
    patch.setattr(
        feedforward_meo, "merge_experts", lambda stack, index, weights: original(stack, index, weights.detach())
    )


def unselected_experts_times_zero(patch: Patch) -> None:
    def merge(stack: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dense = weights.new_zeros(len(index), len(stack)).scatter(1, index, weights).to(stack.dtype)
        return torch.einsum("ge,e...->g...", dense, stack)

    patch.setattr(feedforward_meo, "merge_experts", merge)


def swapped_halves(patch: Patch) -> None:
    original, other = MergedExperts.stack, {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    patch.setattr(MergedExperts, "stack", lambda self, name: original(self, other.get(name, name)))


def adapter_left_out(patch: Patch) -> None:
    patch.setattr(TokenAdapter, "forward", lambda self, x: x)


def noise_in_evaluation(patch: Patch) -> None:
    original = MeoRouter.forward

    def forward(self: MeoRouter, inputs: Tensor) -> tuple[Gates, Tensor]:
        self.train()
        return original(self, inputs)

    patch.setattr(MeoRouter, "forward", forward)


def gate_reads_the_first_token_only(patch: Patch) -> None:
    patch.setattr(Call, "mean", lambda self, x: x[:, 0])


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
    (causal_stack_pools_its_sequence, contracts.later_tokens_change_nothing, (Case("llama", "sequence"),)),
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
    if mutate is not causal_stack_pools_its_sequence:  # whose case does not exist without it
        contract(case)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        contract(case)


@pytest.mark.parametrize("kind", families_meo.LEVELS)
def test_every_kind_is_mutated(kind: str) -> None:
    broken = {mutate for mutate, _, some in MUTATIONS if any(case.kind == kind for case in some)}
    assert len(broken) >= 12
