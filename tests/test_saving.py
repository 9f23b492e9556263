"""Whoever saves a MEO model, installed or remote code, model, Trainer or config: it loads where meo_hf is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import expected_file, saved
from fresh import Fresh, Values
from meo_hf.modeling.remote_meo import auto_map, code_files
from safetensors.torch import load_file
from test_families_roundtrip import relative_rms, run_batch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

from meo_hf import convert

pytestmark = pytest.mark.xdist_group("saving")  # one worker: the costly fixtures are made once
AUTOS = {"bert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM}
WAYS = ("model", "sharded", "trainer", "in place", "trained")
TASKS = ("a", "b", "c")


def train_a_step(trainer: Any, folder: str) -> None:
    """Change every parameter that gets a gradient, as training would, and let the Trainer save."""
    model = trainer.model
    model.train()
    ids = torch.arange(5, 21).reshape(2, 8)
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(parameter.grad)
    trainer.save_model(folder)


def save_every_way(source: str, folder: str, auto: str, trust: bool) -> dict[str, str]:
    """Save a model in every way that users have; return the class of each."""
    load, folder = getattr(transformers, auto).from_pretrained, Path(folder)
    options = {"trust_remote_code": True} if trust else {}
    model = load(source, **options)
    if model.config.meo["level"] == "task":
        model.set_task("b")
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")
    arguments = transformers.TrainingArguments(output_dir=str(folder / "runs"), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments)
    trainer.save_model(str(folder / "trainer"))
    model.save_pretrained(folder / "in place")
    again = load(folder / "in place", **options)
    again.save_pretrained(folder / "in place")
    train_a_step(transformers.Trainer(model=again, args=arguments), str(folder / "trained"))
    config = transformers.AutoConfig.from_pretrained(source, **options)
    config.save_pretrained(folder / "config")
    base = transformers.AutoModel.from_pretrained(source, **options)
    base.save_pretrained(folder / "base")
    return {"model": type(model).__module__, "config": type(config).__module__, "base": type(base).__module__}


def check_saved(folder: str, auto: str, batch: str) -> dict[str, Any]:
    """Load what was saved and compare its logits."""
    load = getattr(transformers, auto).from_pretrained
    model, info = load(folder, trust_remote_code=True, output_loading_info=True)
    actual, expected = run_batch(model, batch)
    return {
        "keys": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "error": relative_rms(actual, expected),
        "default task": model.config.meo["default_task"],
    }


def check_config(folder: str, auto: str) -> dict[str, Any]:
    """Build a model from a config that was saved alone, and run it."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto).from_config(config, trust_remote_code=True)
    tasks = {"task_ids": torch.tensor([0])} if config.meo["level"] == "task" else {}
    logits = model.eval()(input_ids=torch.arange(5, 13)[None], **tasks).logits
    return {"class": type(model).__name__, "finite": bool(logits.isfinite().all())}


def check_base(folder: str, auto: str) -> list[str]:
    """Open a base model that was saved under its head; return what the head had to draw."""
    load = getattr(transformers, auto).from_pretrained
    model, info = load(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__.startswith("Meo")
    return sorted(info["missing_keys"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert, and save by the installed code and by the remote code."""
    folder = tmp_path_factory.mktemp("saving")
    fresh = Fresh(train_a_step)
    for family, auto in AUTOS.items():
        source = saved(family, folder / family / "dense")
        tasks = {"level": "task", "tasks": TASKS} if family == "llama" else {}
        convert(source, folder / family / "meo", num_experts=4, expert_init="noise", verify="none", **tasks)
        model = auto.from_pretrained(folder / family / "meo")
        ids = {"task_ids": torch.arange(3) % len(TASKS)} if tasks else {}
        batch = expected_file(folder / f"{family}.safetensors", model, family, **ids)
        assert batch.is_file()
        options = {"source": str(folder / family / "meo"), "auto": auto.__name__}
        classes = save_every_way(folder=str(folder / family / "installed"), trust=False, **options)
        assert all(name.startswith("meo_hf.modeling.") for name in classes.values())
        fresh.add(family, save_every_way, folder=folder / family / "remote", trust=True, **options)
    values = fresh.run(folder)
    for family in AUTOS:
        assert all(name.startswith("transformers_modules.") for name in values[family].values())
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Values:
    """Load everything that was saved in another process without meo_hf, with an empty cache of modules."""
    fresh = Fresh(relative_rms, run_batch)
    for family, auto in AUTOS.items():
        for who in ("installed", "remote"):
            place = folder / family / who
            for way in WAYS:
                batch = folder / f"{family}.safetensors"
                fresh.add(f"{family} {who} {way}", check_saved, folder=place / way, auto=auto.__name__, batch=batch)
            fresh.add(f"{family} {who} config", check_config, folder=place / "config", auto=auto.__name__)
            fresh.add(f"{family} {who} base", check_base, folder=place / "base", auto=auto.__name__)
    return fresh.run(folder)


@pytest.mark.parametrize("who", ["installed", "remote"])
@pytest.mark.parametrize("family", AUTOS)
class TestSaved:
    @pytest.mark.parametrize("way", WAYS)
    def test_weights_come_back(self, outcomes: Values, family: str, who: str, way: str) -> None:
        found = outcomes[f"{family} {who} {way}"]
        assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        assert found["default task"] == (
            "b" if family == "llama" and way not in ("in place",) else found["default task"]
        )
        assert (found["error"] == 0) == (way != "trained")

    @pytest.mark.parametrize("way", [*WAYS, "config", "base"])
    def test_code_travels(self, folder: Path, family: str, who: str, way: str) -> None:
        place = folder / family / who / way
        assert {f.name: f.read_bytes() for f in place.glob("*.py")} == {f.name: f.read_bytes() for f in code_files()}
        written = json.loads((place / "config.json").read_text())
        name = {"bert": "MeoBertConfig", "llama": "MeoLlamaConfig"}[family]
        assert written["auto_map"] == auto_map(name, family)

    def test_config_alone_builds_a_model(self, outcomes: Values, family: str, who: str) -> None:
        found = outcomes[f"{family} {who} config"]
        assert found == {
            "class": {"bert": "MeoBertForMaskedLM", "llama": "MeoLlamaForCausalLM"}[family],
            "finite": True,
        }

    def test_base_model_opens_under_a_head(self, outcomes: Values, family: str, who: str) -> None:
        missing = outcomes[f"{family} {who} base"]
        assert missing
        assert all(name.startswith(("cls.", "lm_head.")) for name in missing)


def test_installed_and_remote_save_the_same_bytes(folder: Path) -> None:
    for family in AUTOS:
        for way in ("model", "sharded", "trainer", "base"):
            ours, theirs = (folder / family / who / way for who in ("installed", "remote"))
            names = {path.name for path in ours.iterdir()} - {"training_args.bin"}
            assert names == {path.name for path in theirs.iterdir()} - {"training_args.bin"}
            for name in names:
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (family, way, name)


def test_weights_change_only_where_they_were_trained(folder: Path) -> None:
    """What the Trainer saves after a step is the trained state, not a copy of what was loaded."""
    before = load_file(folder / "bert/installed/model/model.safetensors")
    after = load_file(folder / "bert/installed/trained/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".experts." in name for name in changed)
    assert any(".router.weight" in name for name in changed)


def test_trainer_saves_what_auto_classes_load_here(tmp_path: Path) -> None:
    """In the process that trained, no trust flag is needed."""
    convert(saved("bert", tmp_path / "dense"), tmp_path / "meo", num_experts=2, verify="none")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "meo")
    Trainer(model, TrainingArguments(str(tmp_path / "runs"), report_to=[])).save_model(str(tmp_path / "saved"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is type(model.config)
