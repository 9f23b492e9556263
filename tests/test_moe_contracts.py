"""Every family of experts keeps the contracts, with its own routing rules."""

from __future__ import annotations

import moe_contracts
import pytest
import torch
from moe_contracts import DECODERS, KEPT, ONE_EXPERT, MoeCase, cases
from moe_tiny import SWITCHES, tiny_moe, tiny_moe_inputs

from meo_hf.errors import MeoConfigError

torch.set_num_threads(1)


def _id(case: MoeCase) -> str:
    return f"{case.family}-{case.pooling}"


@pytest.mark.parametrize("case", cases(), ids=_id)
def test_blocks_equal_the_oracle(case: MoeCase) -> None:
    moe_contracts.blocks_equal_the_oracle(case)


@pytest.mark.parametrize("case", cases(["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "dbrx", "jetmoe"]), ids=_id)
def test_answers_are_gated_by_their_prompts(case: MoeCase) -> None:
    moe_contracts.blocks_equal_the_oracle(case, (4, 6, 2))


@pytest.mark.parametrize(
    ("family", "switch"), [(family, switch) for family in KEPT for switch in SWITCHES[family]], ids=lambda name: name
)
def test_blocks_equal_the_oracle_with_each_switch_the_other_way(family: str, switch: str) -> None:
    published, other = SWITCHES[family][switch]
    assert published != other
    case = MoeCase(family, MoeCase(family).row.poolings[0], ((switch, other),))
    if not moe_contracts.moe_modules(case.stock()):
        with pytest.raises(MeoConfigError, match="its config makes a dense model"):
            case.merged(case.stock())
    else:
        moe_contracts.blocks_equal_the_oracle(case)


@pytest.mark.parametrize("family", KEPT)
def test_rows_name_their_switches(family: str) -> None:
    tested = {part.removeprefix("text_config.") for switch in SWITCHES[family] for part in switch.split(",")}
    assert set(MoeCase(family).row.switches) == tested


def test_stock_longcat_runs_no_single_expert() -> None:
    """Why one family has no check with one expert."""
    with pytest.raises(ValueError, match="not enough values to unpack"):
        tiny_moe("longcat_flash", num_experts_per_tok=1)(**tiny_moe_inputs("longcat_flash"))


@pytest.mark.parametrize("case", cases(), ids=_id)
def test_one_token_groups_with_alike_experts_are_stock(case: MoeCase) -> None:
    moe_contracts.one_token_groups_with_alike_experts_are_stock(case)


@pytest.mark.parametrize(
    ("family", "switch", "value"),
    [
        *[(name, "norm_topk_prob", both) for name in ("qwen2_moe", "olmoe", "cohere2_moe") for both in (True, False)],
        *[(name, "routed_scaling_factor", scale) for name in ("deepseek_v2", "deepseek_v3") for scale in (1.0, 2.5)],
    ],
)
def test_sums_of_gates_scale_the_output(family: str, switch: str, value: float) -> None:
    """Softmax and sigmoid routers, normalised and not, scaled and not."""
    moe_contracts.one_token_groups_with_alike_experts_are_stock(MoeCase(family, overrides=((switch, value),)))


@pytest.mark.parametrize("case", cases(ONE_EXPERT), ids=_id)
def test_one_token_groups_with_one_expert_are_stock(case: MoeCase) -> None:
    moe_contracts.one_token_groups_with_one_expert_are_stock(case)


@pytest.mark.parametrize("case", cases(DECODERS), ids=_id)
def test_later_tokens_change_nothing_before(case: MoeCase) -> None:
    moe_contracts.later_tokens_change_nothing_before(case)


@pytest.mark.parametrize("case", cases(DECODERS), ids=_id)
def test_pieces_equal_the_whole(case: MoeCase) -> None:
    moe_contracts.pieces_equal_the_whole(case)


@pytest.mark.parametrize("family", KEPT)
def test_padding_changes_nothing(family: str) -> None:
    moe_contracts.padding_changes_nothing(MoeCase(family, MoeCase(family).row.poolings[0]))


@pytest.mark.parametrize("family", KEPT)
def test_gates_differ_between_groups(family: str) -> None:
    moe_contracts.gates_differ_between_groups(MoeCase(family, MoeCase(family).row.poolings[0]))
