"""More than one process, on existing engines: DDP, FSDP2 and tensor parallel compute what one process does.

Two gloo processes on a CPU run all cases, one after the other: DDP and FSDP2 by the stock Trainer, tensor parallel by
`from_pretrained`. Here they are compared with one process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import distributed_tensor
import distributed_train
import pytest
import torch
import transformers
from example_data import SCRIPTS, write_data, write_models
from meo_hf.modeling.remote_meo import code_files
from moe_contracts import meo_of_moe
from moe_tiny import tiny_moe, tiny_moe_inputs
from packaging.version import Version
from tiny import FAMILIES, VOCAB, draw_experts, meo_of, tiny_dense, tiny_inputs
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel

from meo_hf.errors import MeoConfigError

pytestmark = pytest.mark.xdist_group("distributed")  # one worker: the processes run once
CHILD = Path(__file__).with_name("distributed_child.py")
EXPERTS = "model.layers.*.mlp.experts"
TASKS = {"level": "task", "tasks": ["a", "b", "c"]}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
SAVED = {"save_strategy": "steps", "save_steps": 2}
OWN_EXPERTS = {**FSDP["fsdp_config"], "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "MergedExperts"]}


def model_of(
    family: str, head: type[PreTrainedModel] | None = None, sizes: dict[str, int] | None = None, **meo: Any
) -> PreTrainedModel:
    """Return a tiny model with experts drawn one by one; its gates draw no noise and have no balance loss."""
    short = {"segment_length": 4} if family not in FAMILIES or FAMILIES[family].kind == "decoder" else {}
    sizes = {"vocab_size": VOCAB + 1, **(sizes or {})}  # Transformers 5.17 splits a head only into equal parts
    if family not in FAMILIES:
        return meo_of_moe(tiny_moe(family, **sizes), **short, **meo)
    labels = {"num_labels": 3} if head is BertForSequenceClassification else {}
    dense = tiny_dense(family, head, **sizes, **labels)
    return draw_experts(meo_of(dense, **{**short, "router": "top_k", "balance_loss": 0.0, **meo}))


def rows_for(model: PreTrainedModel, count: int = 24, length: int = 8) -> list[dict[str, Any]]:
    """Draw rows of a few words each: those of a batch select different experts, and count differently in its loss."""
    generator = torch.Generator().manual_seed(5)
    classes, level = "Classification" in type(model).__name__, model.config.meo["level"]
    rows = []
    for i in range(count):
        words = torch.randint(5, VOCAB, (3,), generator=generator)
        ids = words[torch.randint(0, 3, (length,), generator=generator)]
        row = {"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.long)}
        row["labels"] = i % 3 if classes else torch.where(torch.arange(length) < i % 4, -100, ids)
        if level == "task":
            row["task_ids"] = int(torch.randint(0, 3, (1,), generator=generator))
        rows.append(row)
    return rows


def classifier(**meo: Any) -> PreTrainedModel:
    return model_of("bert", BertForSequenceClassification, **meo)


def decoder(**meo: Any) -> PreTrainedModel:
    return model_of("llama", **meo)


TRAINED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "sequence": (classifier, {}),
    "segment": (decoder, {}),
    "token": (lambda: classifier(level="token", top_k=1), {}),
    "task": (lambda: classifier(**TASKS), {}),
    "one task": (lambda: classifier(**TASKS), {"one_task": True}),
    "mixture": (lambda: model_of("mixtral"), {}),
    "accumulated": (decoder, {"arguments": {"gradient_accumulation_steps": 2, **CHECKPOINTED}}),
    "fsdp": (decoder, {"fsdp": True, "arguments": {**FSDP, **SAVED}, "saved": "fsdp.model"}),
    "fsdp resumed": (decoder, {"fsdp": True, "arguments": FSDP, "run": "fsdp", "resume": "runs/fsdp/checkpoint-2"}),
    "fsdp own experts": (decoder, {"fsdp": True, "arguments": {**FSDP, "fsdp_config": OWN_EXPERTS, **CHECKPOINTED}}),
    "fsdp mixture": (lambda: model_of("mixtral"), {"fsdp": True, "arguments": FSDP}),
}
BALANCED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "balance": (lambda: classifier(balance_loss=0.5), {}),
    "balance of segments": (lambda: decoder(balance_loss=0.5), {}),
    "noise": (lambda: decoder(balance_loss=0.5, router="noisy_top_k"), {"arguments": CHECKPOINTED}),
}
SPLIT: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (decoder, {}),
    "gpt_neox": (lambda: model_of("gpt_neox"), {}),
    "bert": (lambda: model_of("bert", level="token"), {}),
    "tasks": (lambda: decoder(level="task", tasks=["a", "b", "c"]), {}),
    "noisy": (lambda: decoder(router="noisy_top_k", balance_loss=0.5), {}),
    "mixtral": (lambda: model_of("mixtral"), {}),
    "deepseek_v3": (lambda: model_of("deepseek_v3"), {}),
    "gpt_oss": (lambda: model_of("gpt_oss"), {}),
    "longcat_flash": (lambda: model_of("longcat_flash"), {}),
    "llama4_text": (lambda: model_of("llama4_text"), {}),
    "native fsdp": (decoder, {"config": {"fsdp_size": 2}}),
}
if Version(transformers.__version__) < Version("5.18"):  # whose LongCat-Flash routes in another way
    del SPLIT["longcat_flash"]
EXACT = [name for name in SPLIT if name != "noisy"]
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "projection": (
        lambda: classifier(gate_scope="projection"),
        {},
        "the last gate reads all intermediate features",
    ),
    "uneven": (lambda: decoder(sizes={"intermediate_size": 47}), {}, "does not divide the 47 intermediate features"),
    "some layers": (lambda: model_of("mixtral", layers=[0]), {}, "keep experts that do not merge"),
    "other layout": (lambda: model_of("jetmoe"), {}, "stores its experts in a way"),
    "other rule": (decoder, {"tp_plan": {EXPERTS: "meo_experts", f"{EXPERTS}.down_proj": "colwise"}}, "is split as"),
}


def auto_of(model: PreTrainedModel) -> str:
    kinds = {"ForSequenceClassification": "SequenceClassification", "ForMaskedLM": "MaskedLM"}
    return f"AutoModelFor{next((k for end, k in kinds.items() if type(model).__name__.endswith(end)), 'CausalLM')}"


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Let the collections that accelerate asks for after each training pass over what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save all models, and run all cases in two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    cases: dict[str, dict[str, Any]] = {}
    for name, (make, case) in (TRAINED | BALANCED).items():
        model = make()
        rows = rows_for(model)
        if case.get("one_task"):
            rows = [{**row, "task_ids": 0} for row in rows]
        torch.save(rows, folder / f"{name}.rows")
        paths = {key: str(folder / case[key]) for key in ("saved", "resume") if key in case}
        cases[name] = {
            **case,
            **paths,
            "data": str(folder / f"{name}.rows"),
            "rows_per_step": 4,
            "auto": auto_of(model),
        }
        cases[name]["folder"] = str(folder / name)
        model.save_pretrained(folder / name)
    for name, (make, case) in SPLIT.items():
        model = make()
        inputs = tiny_inputs(model.config.model_type[4:]) if model.config.model_type[4:] in FAMILIES else None
        inputs = inputs or tiny_moe_inputs(model.config.model_type[4:])
        if model.config.meo["level"] == "task":
            inputs["task_ids"] = torch.tensor([0, 1, 0])
        torch.save(inputs, folder / f"{name}.inputs")
        cases[name] = {
            "config": {"tp_size": 2},
            **case,
            "auto": auto_of(model),
            "inputs": str(folder / f"{name}.inputs"),
        }
        cases[name] |= {"folder": str(folder / f"split {name}"), "saved": str(folder / f"{name}.saved")}
        model.save_pretrained(folder / f"split {name}")
    for name, (make, config, _) in REFUSED.items():
        model = make()
        cases[name] = {"config": {"tp_size": 2, **config}, "auto": auto_of(model), "folder": str(folder / name)}
        cases[name]["refused"] = True
        model.save_pretrained(folder / name)
    (folder / "cases.json").write_text(json.dumps(cases))
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", 2, CHILD, folder)
    return folder


def launch(module: str, *arguments: object) -> str:
    """Run a module of Python offline; returns what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def results(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the two processes found."""
    return torch.load(folder / f"{name}.0.pt"), torch.load(folder / f"{name}.1.pt")


def alone(folder: Path, name: str, **arguments: Any) -> dict[str, Any]:
    """Run a case of training in this process."""
    case = json.loads((folder / "cases.json").read_text())[name]
    given = {k: v for k, v in case.get("arguments", {}).items() if k not in ("fsdp", "fsdp_config", *SAVED)}
    case = {k: v for k, v in case.items() if k not in ("fsdp", "saved", "resume")}
    return distributed_train.train({**case, "arguments": {**given, **arguments}}, str(folder / "alone"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_trained_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_as_one_with_twice_the_rows(folder: Path, name: str) -> None:
    first, second = results(folder, name)
    assert (
        first["wrapped"].startswith("FSDPMeo")
        if name.startswith("fsdp")
        else first["wrapped"] == "DistributedDataParallel"
    )
    assert same(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    expected = alone(folder, name)
    assert len(expected["losses"]) == 3
    assert_trained_alike(first, expected)


@pytest.mark.parametrize("name", BALANCED)
def test_balance_losses_of_two_processes_are_averaged(folder: Path, name: str) -> None:
    """Each process balances its own rows, as accumulated batches of one process do."""
    first, second = results(folder, name)
    assert same(first["weights"], second["weights"])
    assert all(map(torch.isfinite, map(torch.sum, first["weights"].values())))
    if name != "noise":
        assert_trained_alike(first, alone(folder, name, gradient_accumulation_steps=2))


def test_processes_select_different_experts(folder: Path) -> None:
    """Else the tests above would not show that those without gradient in one process do no harm."""
    for name in ("segment", "token", "fsdp"):
        first, second = results(folder, name)
        assert set(first["selected"]) != set(second["selected"]), name


def test_fsdp_shards_experts_by_the_layers_that_the_model_names(folder: Path) -> None:
    first, second = results(folder, "fsdp")
    assert first["bytes"][0] + second["bytes"][0] == first["bytes"][1]
    assert first["bytes"][0] == second["bytes"][0]
    assert "FSDPLlamaDecoderLayer" in first["units"]
    assert "FSDPMergedExperts" not in first["units"]
    assert "FSDPMergedExperts" in results(folder, "fsdp own experts")[0]["units"]


def test_what_fsdp_trained_is_saved_in_shards_and_whole(folder: Path) -> None:
    shards = list((folder / "runs" / "fsdp" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(shards) == 2
    saved = folder / "fsdp.model"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["MeoLlamaForCausalLM"]
    assert {file.name for file in saved.glob("*.py")} == {file.name for file in code_files()}
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert same(dict(model.named_parameters()), results(folder, "fsdp")[0]["weights"])


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_model_computes_what_one_process_does(folder: Path, name: str) -> None:
    case = json.loads((folder / "cases.json").read_text())[name]
    model = distributed_tensor.load(case, None)
    expected = distributed_tensor.measure(model, torch.load(case["inputs"]))
    first, second = results(folder, name)
    for found in (first, second):
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["again"], expected["again"], rtol=1e-5, atol=1e-5)
        if "tokens" in expected:
            assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.equal(first["loss"], second["loss"])
    for key, gradient in expected["gradients"].items():
        assert_gradients_alike(key, first, second, gradient if name in EXACT else None)


def assert_gradients_alike(name: str, first: dict[str, Any], second: dict[str, Any], expected: Tensor | None) -> None:
    """Both processes have the same gradient, and it is the one of a single process where nothing is drawn."""
    here, there = first["gradients"][name], second["gradients"][name]
    assert (here is None) == (there is None), name
    if here is None:
        assert expected is None, name
        return
    assert torch.equal(here, there), name
    if expected is not None:
        scale = float(expected.abs().max())
        torch.testing.assert_close(here, expected, rtol=1e-4, atol=1e-5 * scale + 1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", SPLIT)
def test_each_process_holds_half_of_the_experts(folder: Path, name: str) -> None:
    case = json.loads((folder / "cases.json").read_text())[name]
    model = distributed_tensor.load(case, None)
    whole = distributed_tensor.expert_bytes(model)
    assert whole
    for found in results(folder, name):
        for key, size in whole.items():
            shared = key.endswith("down_proj_bias") and "tp_size" in case["config"]
            assert found["bytes"][key] == (size if shared else size // 2), key


def test_experts_kept_for_tasks_are_parts_too(folder: Path) -> None:
    case = json.loads((folder / "cases.json").read_text())["tasks"]
    expected = distributed_tensor.measure(distributed_tensor.load(case, None), torch.load(case["inputs"]))
    assert expected["kept"] > 0
    assert [found["kept"] * 2 for found in results(folder, "tasks")] == [expected["kept"]] * 2


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_model_is_saved_whole(folder: Path, name: str) -> None:
    case = json.loads((folder / "cases.json").read_text())[name]
    weights = distributed_tensor.load(case, None).state_dict()
    again = distributed_tensor.load({**case, "folder": case["saved"]}, None).state_dict()
    assert same(weights, again)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused(folder: Path, name: str) -> None:
    for found in results(folder, name):
        assert found["error"] == "MeoConfigError", found["message"]
        assert REFUSED[name][2] in found["message"]
        assert "DDP, FSDP2" in found["message"] or name == "other rule"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tp_size": 2, "ep_size": 2}, "expert parallel keeps each expert in one process"),
        ({"tp_size": 2, "enable_expert_parallel": True}, "take tensor parallel"),
        ({"pp_size": 2}, "pipeline parallel is not supported"),
    ],
)
def test_expert_and_pipeline_parallel_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    decoder().save_pretrained(tmp_path)
    with pytest.raises(MeoConfigError, match=reason):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=config)


def test_plans_name_what_is_there() -> None:
    """A rule that matches nothing would leave a part whole, or fail late."""
    for model in (decoder(), model_of("gpt_neox"), model_of("mixtral"), model_of("bert")):
        names = {
            ".".join("*" if part.isdigit() else part for part in name.split("."))
            for name, _ in chain(model.named_modules(), model.named_parameters())
        }
        assert set(model.tp_plan) <= names
        assert "meo_experts" in model.tp_plan.values()
        assert not model._ep_plan


def test_accelerate_launches_an_example(tmp_path: Path) -> None:
    write_data(tmp_path)
    write_models(tmp_path)
    out, data = tmp_path / "out", tmp_path / "mood.csv"
    arguments = [
        "--model_name_or_path",
        tmp_path / "bert",
        "--num_experts",
        3,
        "--level",
        "sequence",
        "--output_dir",
        out,
    ]
    arguments += ["--train_file", data, "--validation_file", data, "--do_train", "--do_eval", "--max_steps", 2]
    arguments += [
        "--per_device_train_batch_size",
        2,
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
    ]
    processes = (
        "--cpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    launch("accelerate.commands.launch", *processes, SCRIPTS["run_glue"], *arguments)
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["eval_samples"] == 12
    assert metrics["train_loss"] > 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "MeoBertForSequenceClassification"
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
