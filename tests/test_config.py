"""The `meo` block: what it accepts and refuses, and what a saved folder carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contracts import TASKS, Case, assert_close, logits_of
from fresh import Fresh, Values
from meo_hf.modeling import configuration_meo, modeling_meo
from meo_hf.modeling.blocks_meo import describe_unknown
from meo_hf.modeling.configuration_meo import SCHEMA_VERSION, MeoSettings, check_level, meo_config_class, settings_of
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.families_meo import FAMILIES, LEVELS
from meo_hf.modeling.remote_meo import code_files, heads_of
from safetensors.torch import load_file, save_file
from tiny import draw_experts, main_class, meo_config, meo_of, merged_of, tiny_config, tiny_dense

HEADS = sorted((family, name) for family in FAMILIES for name in set(heads_of(family).values()))
FILES = {path.name for path in code_files()}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"level": "layer"}, "level is 'layer'; allowed: None, segment, sequence, token, task"),
    ({"routing": "frozen"}, "routing is 'frozen'; allowed: None, segment, prompt"),
    ({"segment_length": 0}, "segment_length is 0; give a whole number >= 1"),
    ({"merged_cache_bytes": -1}, "merged_cache_bytes is -1; give a whole number >= 0"),
    ({"num_experts": 0}, "num_experts is 0; give a whole number >= 1"),
    ({"num_experts": 2.5}, "num_experts is 2.5; give a whole number"),
    ({"num_experts": True}, "num_experts is True; give a whole number"),
    ({"num_experts": 2, "top_k": 3}, "top_k is 3, more than num_experts (2); lower one"),
    ({"top_k": 0}, "top_k is 0; give a whole number >= 1"),
    ({"gate_scope": "layer"}, "gate_scope is 'layer'; allowed: ffn, projection"),
    ({"combine": "both"}, "combine is 'both'; allowed: weights, outputs"),
    ({"router": "softmax"}, "router is 'softmax'; allowed: noisy_top_k, top_k"),
    ({"balance_loss": -1}, "balance_loss is -1; give a number >= 0 (0 switches it off)"),
    ({"balance_loss": "0.1"}, "balance_loss is '0.1'; give a number >= 0"),
    ({"balance_loss": float("nan")}, "balance_loss is nan; give a number >= 0"),
    ({"token_reduction": 0}, "token_reduction is 0; give a whole number >= 1"),
    ({"layers": []}, "layers is []; give indices >= 0, or null for all layers"),
    ({"layers": [-1]}, "layers is [-1]; give indices >= 0"),
    ({"layers": ["0"]}, "layers is ['0']; give indices >= 0"),
    ({"tasks": []}, "tasks is []; give at least one name, each once"),
    ({"tasks": ["a", "a"]}, "tasks is ['a', 'a']; give at least one name, each once"),
    ({"tasks": "ab"}, "tasks is 'ab'; give at least one name"),
    ({"default_task": "z"}, "default_task 'z' is not one of the tasks ['default']"),
    ({"experts": 4}, "unknown key(s) in the `meo` block: ['experts']; allowed: ['balance_loss', 'combine'"),
    ({"schema_version": SCHEMA_VERSION + 1}, f"schema version {SCHEMA_VERSION + 1}, this code reads up to"),
    ({"schema_version": "1"}, "schema version 1, this code reads up to"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_config_can_be_made(family: str) -> None:
    config_class = meo_config_class(type(tiny_config(family)))
    assert config_class().meo is None
    assert config_class().model_type == f"meo_{family}"
    assert config_class().to_diff_dict()["model_type"] == f"meo_{family}"
    assert getattr(configuration_meo, config_class.__name__) is config_class
    ignored = getattr(type(tiny_config(family)), "keys_to_ignore_at_inference", [])
    assert config_class.keys_to_ignore_at_inference == [*ignored, "aux_loss"]


@pytest.mark.parametrize(("block", "message"), BAD, ids=[str(block) for block, _ in BAD])
def test_bad_block_is_refused(block: dict[str, Any], message: str) -> None:
    config_class = meo_config_class(type(tiny_config("bert")))
    with pytest.raises(MeoConfigError) as error:
        config_class(meo=block)
    assert message in str(error.value)
    with pytest.raises(MeoConfigError):
        config_class.from_dict({"meo": {}}, meo=block)


def test_block_is_checked_before_it_is_saved(tmp_path: Path) -> None:
    config = meo_config(tiny_config("bert"))
    config.meo["top_k"] = 99
    with pytest.raises(MeoConfigError, match="top_k is 99"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_a_family(family: str) -> None:
    config = meo_config(tiny_config(family))
    kind = FAMILIES[family].kind
    assert settings_of(config).level == FAMILIES[family].default_level
    for level in LEVELS["decoder"]:
        if level in LEVELS[kind]:
            check_level(config, level)
        else:
            allowed = "allowed: sequence, token, task"
            with pytest.raises(MeoConfigError, match=rf"level '{level}' is not possible for {family}.*{allowed}"):
                modeling_meo.meo_model_class(main_class(family))(meo_config(tiny_config(family), level=level))


def test_bert_as_a_causal_decoder_has_the_levels_of_one() -> None:
    config = meo_config(tiny_config("bert", is_decoder=True))
    assert settings_of(config).level == "segment"
    for level in LEVELS["decoder"]:
        check_level(config, level)


@pytest.mark.parametrize(("family", "level"), [("bert", "sequence"), ("t5", "sequence"), ("llama", "task")])
def test_routing_without_effect_is_refused(family: str, level: str) -> None:
    with pytest.raises(MeoConfigError, match=rf"no effect at level '{level}' of {family}"):
        settings_of(meo_config(tiny_config(family), level=level, routing="segment"))


@pytest.mark.parametrize("family", FAMILIES)
def test_dictionary_round_trip(family: str) -> None:
    block = {"num_experts": 4, "top_k": 3, "tasks": TASKS, "default_task": "b", "layers": [0], "balance_loss": 0.5}
    config = meo_config(tiny_config(family), **block)
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.meo == config.meo == {**MeoSettings().to_dict(), **block}
    stock = tiny_config(family).to_dict()
    changed = {name for name, value in stock.items() if config.to_dict()[name] != value}
    assert changed <= {"model_type", "architectures"}


def test_override_at_load_changes_single_keys(tmp_path: Path) -> None:
    case = Case("bert", "sequence", "projection")
    model = case.drawn().float()
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path, meo={"combine": "outputs"})
    assert config.meo == {**model.config.meo, "combine": "outputs"}
    assert type(config).from_dict(model.config.to_dict(), meo={"combine": "outputs"}).meo == config.meo
    loaded, info = type(model).from_pretrained(tmp_path, meo={"combine": "outputs"}, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {module.experts.combine for module in merged_of(loaded).values()} == {"outputs"}
    assert_close(logits_of(loaded, case.inputs()), logits_of(model, case.inputs()), 1e-5)
    with pytest.raises(MeoConfigError, match="unknown key"):
        type(model).from_pretrained(tmp_path, meo={"combin": "outputs"})
    with pytest.raises(MeoConfigError, match="combine is 'sum'; allowed: weights, outputs"):
        type(model).from_pretrained(tmp_path, meo={"combine": "sum"})


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_carries_the_code_and_every_head(family: str, tmp_path: Path) -> None:
    model = Case(family, FAMILIES[family].default_level).drawn().float()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == FILES
    for path in code_files():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["meo"] == model.config.meo
    assert found["model_type"] == f"meo_{family}"
    assert found["auto_map"].keys() == {"AutoConfig", *heads_of(family)}
    for auto, reference in found["auto_map"].items():
        module, name = reference.split(".")
        made = getattr({"configuration_meo": configuration_meo, "modeling_meo": modeling_meo}[module], name)
        assert hasattr(transformers, auto)
        assert made.__name__ == name
        assert getattr(made, "config_class", made) is type(model.config)


def test_auto_class_takes_the_override(tmp_path: Path) -> None:
    Case("bert", "sequence").drawn().float().save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, meo={"combine": "outputs"})
    assert type(model).__name__ == "MeoBertForMaskedLM"
    assert {module.experts.combine for module in merged_of(model).values()} == {"outputs"}


def test_adapter_added_at_load_changes_nothing(tmp_path: Path) -> None:
    case = Case("bert", "sequence")
    model = case.drawn().float()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, meo={"level": "token"}, output_loading_info=True)
    assert {name.split(".")[-3] for name in info["missing_keys"]} == {"adapter"}
    assert_close(logits_of(loaded, case.inputs()), logits_of(model, case.inputs()))


def test_task_that_was_set_is_saved(tmp_path: Path) -> None:
    case = Case("llama", "task")
    model = case.drawn().float()
    model.set_task("c")
    model.save_pretrained(tmp_path)
    inputs = {name: value for name, value in case.inputs().items() if name != "task_ids"}
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.meo["default_task"] == "c"
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    each = {**inputs, "task_ids": torch.tensor([0, 1, 2])}
    assert torch.equal(logits_of(loaded, each), logits_of(model, each))


@pytest.mark.parametrize(("family", "head"), HEADS, ids=[head for _, head in HEADS])
def test_names_on_disk_are_those_of_the_stock_head(family: str, head: str, tmp_path: Path) -> None:
    """Outside the feed-forwards; and what was saved is what loads."""
    dense = tiny_dense(family, getattr(transformers, head))
    level = "task" if FAMILIES[family].kind == "decoder" else "token"
    model = draw_experts(meo_of(dense, level=level))
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "meo")
    stock, found = load_file(tmp_path / "dense/model.safetensors"), load_file(tmp_path / "meo/model.safetensors")
    own = {name for name in found if ".experts." in name or ".router." in name or ".adapter." in name}
    assert own
    assert found.keys() - own <= stock.keys()
    assert all(torch.equal(found[name], stock[name]) for name in found.keys() - own)
    merged = tuple(f"{path}." for path in merged_of(model))
    kept = [name for name, _ in model.named_parameters() if not name.startswith(merged)]
    assert len(stock.keys() - found.keys()) == len(list(dense.parameters())) - len(kept)
    loaded, info = type(model).from_pretrained(tmp_path / "meo", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    for name, value in model.state_dict().items():  # Marian computes its positions anew
        assert torch.equal(state[name], value) or name.endswith("embed_positions.weight"), name


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(MeoConfigError, match=r"layers \[2, 7\] do not exist: the model has layers 0 to 1"):
        meo_of(tiny_dense("llama"), layers=[0, 2, 7])


def test_unknown_families_are_refused_with_what_was_found() -> None:
    with pytest.raises(MeoConfigError, match=r"no family row for model type 'funnel'; known: afmoe, albert"):
        meo_config_class(transformers.FunnelConfig)
    for module, name in (
        (modeling_meo, "MeoFunnelModel"),
        (modeling_meo, "MeoNothing"),
        (configuration_meo, "Nothing"),
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
    proposals = describe_unknown(tiny_dense("llama"))
    assert proposals == [
        {"path": f"model.layers.{layer}.mlp", "up": ["gate_proj", "up_proj"], "down": "down_proj"} for layer in (0, 1)
    ]


def code_in(folder: str) -> list[str]:
    """Return the names of the Python files of a folder."""
    return sorted(path.name for path in Path(folder).glob("*.py"))


def resaved(folder: str, config_only: str, again: str, auto: str, batch: str) -> dict[str, Any]:
    """Load and save the config alone, then the model from the code that this wrote; return what each wrote."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.save_pretrained(config_only)
    kept = json.loads(Path(config_only, "config.json").read_text())
    Path(config_only, "model.safetensors").write_bytes(Path(folder, "model.safetensors").read_bytes())
    load = getattr(transformers, auto).from_pretrained
    model = load(config_only, trust_remote_code=True)
    model.save_pretrained(again)
    inputs = load_file(batch)
    expected = inputs.pop("logits")
    with torch.no_grad():
        error = (load(again, trust_remote_code=True)(**inputs).logits - expected).abs().max()
    return {
        "class": type(model).__module__.split(".")[0],
        "code": [code_in(config_only), code_in(again)],
        "maps": [kept["auto_map"], json.loads(Path(again, "config.json").read_text())["auto_map"]],
        "error": float(error / expected.abs().max()),
    }


CHILD = ("bert", "t5", "llama", "vit")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Values]:
    """Load, save and run a model of several families in one process that has no meo_hf."""
    root = tmp_path_factory.mktemp("fresh")
    fresh = Fresh(code_in)
    for family in CHILD:
        case = Case(family, FAMILIES[family].default_level)
        model = case.drawn().float()
        model.save_pretrained(root / family)
        inputs = {n: v.float() if v.is_floating_point() else v for n, v in case.inputs().items()}
        save_file({**inputs, "logits": logits_of(model, inputs)}, root / f"{family}.safetensors")
        auto = next(name for name, head in heads_of(family).items() if head == main_class(family).__name__)
        fresh.add(
            family,
            resaved,
            folder=root / family,
            config_only=root / f"{family}-config",
            again=root / f"{family}-again",
            auto=auto,
            batch=root / f"{family}.safetensors",
        )
    return fresh.run(root)


@pytest.mark.parametrize("family", CHILD)
def test_config_alone_saves_all_code_where_meo_hf_is_missing(outcomes: Values, family: str) -> None:
    found = outcomes[family]
    assert found["class"] == "transformers_modules"
    assert [set(files) for files in found["code"]] == [FILES, FILES]
    assert all(made.keys() == {"AutoConfig", *heads_of(family)} for made in found["maps"])
    assert found["error"] < 1e-6
