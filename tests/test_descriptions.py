"""Level `task` by description: gates read what a text says of a task, embedded by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import run_cli, saved
from contracts import assert_close, assert_differs
from meo_hf.modeling.descriptions_meo import describe
from test_extraction import auto_of
from tiny import main_class, meo_of, merged_of, recorded_gates, tiny_config, tiny_dense, tiny_inputs
from torch.nn import functional as F
from training_rows import word_tokenizer
from transformers import PreTrainedModel

from meo_hf import convert, extract, verify_output

TEXTS = [[5, 6, 7], [8, 9], [5, 6, 7]]
TASKS = ["first", "second", "as the first"]


def described(family: str = "bert", texts: Any = TEXTS, **meo: Any) -> PreTrainedModel:
    model = meo_of(tiny_dense(family), level="task", tasks=TASKS, task_descriptions=texts, **meo)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in merged_of(model).values():  # alike experts would hide every gate
            for parameter in module.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "gemma2", "t5", "bart", "gpt2"])
@pytest.mark.parametrize("scope", ["ffn", "projection"])
def test_gates_read_the_normalised_mean_embedding(family: str, scope: str) -> None:
    model, inputs = described(family, gate_scope=scope), tiny_inputs(family)
    with recorded_gates(model) as gates, torch.no_grad():
        model(**inputs, task_ids=torch.tensor([1, 0, 2]))
        embed = model.get_input_embeddings()
        means = torch.stack([embed(torch.tensor(text)).mean(0) for text in TEXTS])
        features = (means - means.mean(1, keepdim=True)) / means.std(1, correction=0, keepdim=True)
        for path, seen in gates.items():
            logits = features[[1, 0, 2]] @ model.get_submodule(path).weight.t()
            top, index = logits.topk(2)
            rows = seen[0]
            assert rows.top_k_index.tolist() == index.tolist()
            assert_close(rows.top_k_weights, top.softmax(1))
    assert gates


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_alike_descriptions_are_alike_tasks(family: str) -> None:
    model, inputs = described(family), tiny_inputs(family)
    with torch.no_grad():
        mixed = model(**inputs, task_ids=torch.tensor([0, 1, 2])).logits
        alone = []
        for task in TASKS:
            model.set_task(task)
            alone.append(model(**inputs).logits)
    assert_close(alone[0], alone[2], 0)
    assert_differs(alone[0], alone[1])
    for row in range(3):
        assert_close(mixed[row], alone[row][row])


def test_kept_tasks_see_that_the_embeddings_changed() -> None:
    model, inputs = described(), tiny_inputs("bert")
    model.set_task("second")
    with torch.no_grad():
        before = model(**inputs).logits
        assert_close(model(**inputs).logits, before, 0)
        model.get_input_embeddings().weight[8].mul_(-3)  # a word of the description alone
        assert 8 not in inputs["input_ids"][0]
        after = model(**inputs).logits
        for module in merged_of(model).values():
            module._task_memory.forget()
        assert_close(after, model(**inputs).logits, 0)
    assert_differs(after[0], before[0], 1e-4)


def test_training_moves_the_routers_and_leaves_the_words_of_a_description_alone() -> None:
    model, inputs = described(texts=[[90], [91], [92]]).train(), tiny_inputs("bert")
    model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([0, 1, 2])).loss.backward()
    for module in merged_of(model).values():
        assert module.router.weight.grad.abs().max() > 0
    assert not describe(model.get_input_embeddings(), [[5, 6]]).requires_grad


def test_embeddings_that_are_offloaded_describe_too() -> None:
    from accelerate import cpu_offload

    model, inputs = described("llama"), tiny_inputs("llama")
    tasks = torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected = model(**inputs, task_ids=tasks).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert_close(model(**inputs, task_ids=tasks).logits, expected)


def test_without_normalising_the_scale_of_embeddings_would_matter() -> None:
    embed = torch.nn.Embedding(9, 8)
    features = describe(embed, [[1, 2, 3], [4]])
    embed.weight.data *= 50
    assert_close(describe(embed, [[1, 2, 3], [4]]), features, 1e-5)
    assert_close(features, F.normalize(features, dim=1) * 8**0.5, 1e-5)


@pytest.mark.parametrize(
    ("meo", "message"),
    [
        ({"task_descriptions": [[5], [6]]}, "has 2 texts for 3 tasks"),
        ({"task_descriptions": [[5], [], [6]]}, "give token ids for each task"),
        ({"task_descriptions": [[5], ["a"], [6]]}, "give token ids for each task"),
        ({"task_descriptions": [[5], [6], [1000]]}, "has token 1000, but the model has 99 tokens"),
        ({"task_descriptions": TEXTS, "level": "sequence"}, "no effect at level 'sequence'"),
    ],
)
def test_bad_descriptions_are_refused(meo: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meo_of(tiny_dense("bert"), **{"level": "task", "tasks": TASKS, **meo})


def test_models_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="no token embeddings"):
        meo_of(tiny_dense("vit"), level="task", tasks=["a"], task_descriptions=[[1]])


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "t5"])
def test_what_a_description_computes_is_extracted(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "dense")
    word_tokenizer().save_pretrained(source)
    tasks = {"first": "w1 w2 w3", "second": "w7 w30"}
    verify = "sample" if family == "albert" else "none"  # whose embeddings are narrower than its states
    options = {"level": "task", "tasks": tasks, "expert_init": "drop-upcycle", "num_experts": 4}
    report = convert(source, tmp_path / "meo", **options, verify=verify)
    assert report.passed
    assert family != "albert" or verify_output(tmp_path / "meo", "sample").passed
    auto = auto_of(family)
    model = auto.from_pretrained(tmp_path / "meo").eval()
    assert model.config.meo["task_descriptions"] == [[5, 6, 7], [11, 34]]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in merged_of(model).values():
            module.router.weight.copy_(torch.randn(module.router.weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "trained")
    inputs = tiny_inputs(family)
    for task in tasks:
        extract(tmp_path / "trained", tmp_path / task, task=task)
        dense = getattr(transformers, main_class(family).__name__).from_pretrained(tmp_path / task).eval()
        model.set_task(task)
        with torch.no_grad():
            assert_close(dense(**inputs).logits, model(**inputs).logits, 2e-5)


def test_the_command_takes_descriptions(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    bare = run_cli("convert", source, tmp_path / "no", "--level", "task", "--task", "a=w1", "--task", "b=w2")
    assert bare.code == 2
    assert "has no tokenizer to read task descriptions with" in bare.err
    word_tokenizer().save_pretrained(source)
    for wrong, message in (
        (("--task", "a=w1", "--task", "b"), "'b' has no description, but others do"),
        (("--task", "a=w1", "--task", "a=w2"), "names a task twice"),
        (("--task", "a=", "--task", "b=w2"), "the description of task 'a' is empty"),
    ):
        refused = run_cli("convert", source, tmp_path / "no", "--level", "task", *wrong)
        assert refused.code == 2
        assert message in refused.err
    assert not (tmp_path / "no").exists()
    done = run_cli(
        "convert",
        source,
        tmp_path / "out",
        "--level",
        "task",
        "--task",
        "a=w1 w2",
        "--task",
        "b=w3",
        "--verify",
        "none",
    )
    assert done.code == 0, done.err
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.meo["tasks"] == ["a", "b"]
    assert config.meo["task_descriptions"] == [[5, 6], [7]]
    assert tiny_config("bert").vocab_size == 99
