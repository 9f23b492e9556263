"""Why a few mixtures of experts are refused: what happens if they are converted all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from meo_hf.modeling.moe_layouts_meo import moe_blocks
from moe_contracts import MOE_FAMILIES, MoeCase
from moe_tiny import tiny_moe, tiny_moe_inputs

from meo_hf.errors import MeoConfigError, RoutingError
from meo_hf.installed import families_without_row, installed_rows

torch.set_num_threads(1)


def test_every_family_of_this_transformers_is_known() -> None:
    assert families_without_row() == []


def test_at_most_one_in_ten_is_refused() -> None:
    refused = [name for name in installed_rows() if MOE_FAMILIES[name].refused is not None]
    assert refused == ["diffusion_gemma", "doge", "ernie4_5_vl_moe", "vitpose_backbone"]
    assert len(refused) <= len(installed_rows()) / 10


@pytest.mark.parametrize("family", [name for name, row in MOE_FAMILIES.items() if row.refused is not None])
def test_refused_families_say_why(family: str) -> None:
    case = MoeCase(family)
    if family != "vitpose_backbone":  # whose class no Auto class lists
        with pytest.raises(MeoConfigError, match=f"{family} is refused: {MOE_FAMILIES[family].refused[:20]}"):
            case.merged(tiny_moe(family))


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, row in MOE_FAMILIES.items():
        monkeypatch.setitem(MOE_FAMILIES, family, replace(row, refused=None))


@pytest.mark.usefixtures("allowed")
def test_doge_has_no_matrices_to_merge() -> None:
    with pytest.raises(MeoConfigError, match="found no experts in MeoDogeForCausalLM"):
        MoeCase("doge").merged(tiny_moe("doge"))


def test_vitpose_has_no_gate() -> None:
    model = tiny_moe("vitpose_backbone")
    assert list(moe_blocks(model, "stacked")) == list(moe_blocks(model, "modules")) == []
    assert not [name for name, _ in model.named_parameters() if "gate" in name or "router" in name]


@pytest.mark.usefixtures("allowed")
def test_ernie_vl_hands_over_tokens_without_their_places() -> None:
    stock = tiny_moe("ernie4_5_vl_moe")
    model, inputs = MoeCase("ernie4_5_vl_moe").merged(stock).float(), tiny_moe_inputs("ernie4_5_vl_moe", rows=2)
    images = torch.zeros(2, 8, dtype=torch.long)
    images[0, 2:5] = images[1, 1:4] = 1
    with torch.no_grad():
        assert torch.isfinite(stock(**inputs, moe_mm_token_type_ids=images).logits).all()
        with pytest.raises(RuntimeError, match="Expected index"):
            model(**inputs, moe_mm_token_type_ids=images)


@pytest.mark.usefixtures("allowed")
def test_diffusion_gemma_knows_no_segment_before_the_next() -> None:
    stock, inputs = tiny_moe("diffusion_gemma"), tiny_moe_inputs("diffusion_gemma")
    later = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    later["decoder_input_ids"][:, -1] = 7
    with torch.no_grad():
        moved = (stock(**inputs).logits - stock(**later).logits)[:, :-1].abs().max()
        assert float(moved) > 1e-3, "earlier tokens do not see later ones: it could be a decoder like others"
        with pytest.raises(RoutingError):
            MoeCase("diffusion_gemma").merged(stock).float()(**inputs)
