"""Every family: a stock checkpoint is converted, loaded where meo_hf is not installed, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import expected_file, saved, tensors
from fresh import Fresh, Values
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.remote_meo import heads_of
from safetensors.torch import load_file
from tiny import main_class

from meo_hf import convert

pytestmark = pytest.mark.xdist_group("families_roundtrip")  # one worker: the costly fixtures are made once
TOLERANCE = 1e-5


def relative_rms(actual: Any, expected: Any) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())


def run_batch(model: Any, path: str) -> Any:
    """Return logits, and what they should be; at level `task`, each row has a task of its own."""
    stored = load_file(path)
    inputs = {name.removeprefix("inputs."): value for name, value in stored.items() if name != "logits"}
    if model.config.meo["level"] == "task":
        inputs["task_ids"] = torch.arange(len(stored["logits"])) % len(model.config.meo["tasks"])
    return model.eval()(**inputs).logits, stored["logits"]


def spread_routers(model: Any) -> list[Any]:
    """Draw routers whose gates differ between rows, and collect those gates from now on."""
    torch.manual_seed(1)
    gates: list[Any] = []
    for module in model.modules():
        if type(module).__name__ == "MeoRouter":
            module.weight.data.normal_(0, 3)
            module.register_forward_hook(lambda module, args, out: gates.append(out[0]))
    return gates


def differ(gates: Any) -> bool:
    """Say whether rows chose other experts, or weighted them otherwise."""
    return len(gates.top_k_index.unique(dim=0)) > 1 or float(gates.top_k_weights.std(0).max()) > 0.01


def check_family(folder: str, again: str, auto: str, batch: str) -> dict[str, Any]:
    """Load a conversion, compare logits, save it, and load what was saved."""
    load = getattr(transformers, auto).from_pretrained
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, info = load(folder, **options)
    found = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    model.save_pretrained(again)
    twin, info_again = load(again, **options)
    state, twin_state = model.state_dict(), twin.state_dict()
    changed = sorted(n for n in state.keys() | twin_state.keys() if not state[n].equal(twin_state[n]))
    as_saved, expected = run_batch(model, batch)
    gates = spread_routers(model)
    spread, _ = run_batch(model, batch)
    written, rewritten = load_file(f"{folder}/model.safetensors"), load_file(f"{again}/model.safetensors")
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "keys": found,
        "error as saved": relative_rms(as_saved, expected),
        "error spread": relative_rms(spread, expected),
        "gates that differ": sum(map(differ, gates)) / len(gates),
        "saved keys": {key: sorted(map(str, info_again[key])) for key in found},
        "changed in memory": changed,
        "changed names on disk": sorted(written.keys() ^ rewritten.keys()),
        "changed on disk": sorted(n for n in written if n in rewritten and not written[n].equal(rewritten[n])),
        "code files": sorted(path.name for path in Path(again).glob("*.py")),
        "auto_map": json.loads(Path(again, "config.json").read_text())["auto_map"],
    }


def missing_under_heads(folder: str) -> dict[str, list[str]]:
    """Load a conversion under every head of its `auto_map`; return each class with what it had to draw."""
    heads = json.loads(Path(folder, "config.json").read_text())["auto_map"]
    missing = {}
    for auto in sorted(heads.keys() - {"AutoConfig"}, reverse=True):  # AutoModel last: no head may need it first
        load = getattr(transformers, auto).from_pretrained
        model, info = load(folder, trust_remote_code=True, output_loading_info=True)
        missing[auto] = [
            type(model).__name__,
            *sorted(info["missing_keys"]),
            *sorted(map(str, info["mismatched_keys"])),
        ]
    return missing


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert a stock checkpoint of every family, at its default level."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        dense = saved(family, folder / family / "dense")
        model = main_class(family).from_pretrained(dense)  # some positions are computed, never stored
        expected_file(folder / family / "batch.safetensors", model, family)
        convert(dense, folder / family / "meo", num_experts=4, verify="none")
    return folder


@pytest.fixture(scope="module")
def outcomes(converted: Path) -> Values:
    """Check all families in one process without meo_hf."""
    fresh = Fresh(relative_rms, run_batch, spread_routers, differ)
    for family in FAMILIES:
        heads = {getattr(transformers, name): auto for auto, name in heads_of(family).items()}
        folder = converted / family
        options = {"folder": folder / "meo", "again": folder / "again", "auto": heads[main_class(family)]}
        fresh.add(family, check_family, **options, batch=folder / "batch.safetensors")
        fresh.add(f"{family} heads", missing_under_heads, folder=folder / "meo")
    return fresh.run(converted)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_without_meo_hf_and_computes_what_the_source_does(outcomes: Values, family: str) -> None:
    found = outcomes[family]
    assert found["class"].startswith("transformers_modules.")
    assert found["class"].endswith(f"modeling_meo.Meo{main_class(family).__name__}")
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["error as saved"] <= TOLERANCE
    assert found["error spread"] <= TOLERANCE
    assert found["gates that differ"] > 0, "gates were the same for all rows: the comparison shows too little"


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_again_what_was_converted(outcomes: Values, converted: Path, family: str) -> None:
    found = outcomes[family]
    assert found["saved keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["changed in memory"] == found["changed names on disk"] == found["changed on disk"] == []
    code = sorted(path.name for path in (converted / family / "meo").glob("*.py"))
    assert found["code files"] == code
    assert set(found["auto_map"]) == {"AutoConfig", *heads_of(family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_opens_under_every_head(outcomes: Values, converted: Path, family: str) -> None:
    """A head draws the parameters that the stock head draws from the dense checkpoint, and no others."""
    found = outcomes[f"{family} heads"]
    assert found.keys() == heads_of(family).keys()
    transformers.logging.set_verbosity_error()
    drawn_by_all = set()
    for auto, name in heads_of(family).items():
        _, info = getattr(transformers, name).from_pretrained(converted / family / "dense", output_loading_info=True)
        assert found[auto][0] == f"Meo{name}"
        merged = {key for key in found[auto][1:] if ".experts." in key or ".router." in key}
        drawn = set(found[auto][1:]) - merged
        assert drawn <= info["missing_keys"]
        # a few stock heads call their base model by another name than the checkpoint does, and draw all of it
        assert bool(merged) == (drawn != info["missing_keys"])
        drawn_by_all |= drawn
    assert drawn_by_all or len(found) == 2, "no head drew anything: nothing was compared"


def test_experts_are_copies_and_routers_are_drawn(converted: Path) -> None:
    """Routers are a seeded N(0, 0.02), never zeros, and no two of them alike."""
    routers = []
    for family in FAMILIES:
        for name, tensor in tensors(converted / family / "meo").items():
            if ".experts." in name:
                assert all(torch.equal(tensor[0], expert) for expert in tensor), (family, name)
            elif name.endswith("noise_weight"):
                assert not tensor.any(), (family, name)
            elif ".router." in name:
                routers.append(tensor.flatten())
    drawn = torch.cat(routers)
    assert abs(float(drawn.std()) - 0.02) < 0.001
    assert abs(float(drawn.mean())) < 0.001
    wide = [r[:64] for r in routers if len(r) > 64]
    assert len({tuple(r.tolist()) for r in wide[:4]}) == 4, "layers share a router's draw"
