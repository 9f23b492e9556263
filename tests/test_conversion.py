"""A conversion writes what building the model in memory would: from every kind of source, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, listing, run_cli, same_tensors, saved, sha256, tensors
from contracts import assert_close
from meo_hf.modeling.families_meo import FAMILIES
from safetensors.torch import load_file, save_file
from tiny import main_class, meo_of, merged_of, tiny_dense, tiny_inputs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from meo_hf import convert
from meo_hf.errors import CheckpointError


def in_memory(family: str, converted: Path, folder: Path, **meo: object) -> Path:
    """Build the same model without the converter, take only its routers over, and let Transformers save it."""
    model = meo_of(tiny_dense(family), num_experts=3, **meo)
    model.tie_weights()
    written = tensors(converted)
    drawn = {n: t for n, t in written.items() if ".router." in n or n.rpartition(".")[0].endswith(("r.down", "r.up"))}
    model.save_pretrained(folder)
    by_name = load_file(folder / "model.safetensors")
    assert drawn.keys() <= by_name.keys()
    save_file({**by_name, **drawn}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_in_memory_to_the_byte(family: str, tmp_path: Path) -> None:
    report = convert(saved(family, tmp_path / "dense"), tmp_path / "meo", num_experts=3, verify="none")
    made = in_memory(family, tmp_path / "meo", tmp_path / "memory")
    assert (tmp_path / "meo/model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert not report.warnings
    assert report.parameters_after == sum(t.numel() for t in tensors(made).values())


@pytest.mark.parametrize("meo", [{"level": "token"}, {"level": "task", "gate_scope": "projection"}], ids=str)
@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "mt5", "bart"])
def test_streamed_equals_in_memory_at_other_levels(family: str, meo: dict[str, str], tmp_path: Path) -> None:
    convert(saved(family, tmp_path / "dense"), tmp_path / "meo", num_experts=3, verify="none", **meo)
    made = in_memory(family, tmp_path / "meo", tmp_path / "memory", **meo)
    assert (tmp_path / "meo/model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_config_is_the_sources_and_a_meo_block(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense", id2label={0: "no", 1: "yes"}, layer_norm_eps=1e-7)
    convert(source, tmp_path / "meo", num_experts=3, top_k=1, verify="none")
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("dense", "meo"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"architectures", "auto_map", "meo", "model_type"}
    assert after["architectures"] == ["MeoBertForMaskedLM"]
    assert after["meo"]["num_experts"] == 3
    assert after["meo"]["top_k"] == 1
    assert after["meo"]["source"] == {"id": "dense", "commit": None}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")

    def hashes(name: str, **options: object) -> set[str]:
        report = convert(source, tmp_path / name, num_experts=3, verify="none", **options)
        assert {sha256(tmp_path / name / n) for n in report.files} == {f["sha256"] for f in report.files.values()}
        stored = json.loads((tmp_path / name / "meo_report.json").read_text())
        assert stored["files"] == report.files
        return {f["sha256"] for f in report.files.values()}

    for birth in ("copy", "noise", "drop-upcycle"):
        first = hashes(f"{birth}-a", expert_init=birth)
        torch.manual_seed(99)  # the converter draws from its own generators
        assert hashes(f"{birth}-b", expert_init=birth) == first
        assert hashes(f"{birth}-c", expert_init=birth, seed=1) != first
    shutil.copytree(source, tmp_path / "elsewhere")
    assert (
        convert(tmp_path / "elsewhere", tmp_path / "d", num_experts=3, verify="none").files
        == convert(source, tmp_path / "e", num_experts=3, verify="none").files
    ), "the folder of the source shows in the weights"


@pytest.mark.parametrize("birth", ["copy", "drop-upcycle"])
def test_shards_hold_what_a_single_file_holds(birth: str, tmp_path: Path) -> None:
    source = saved("bart", tmp_path / "dense")
    options = {"num_experts": 3, "verify": "none", "expert_init": birth}
    convert(source, tmp_path / "one", **options)
    report = convert(source, tmp_path / "many", max_shard_size="60KB", **options)
    assert len(report.files) > 3
    # a tensor that is larger than a shard may be gets a shard of its own
    assert all(len(load_file(tmp_path / "many" / n)) == 1 or f["bytes"] < 70_000 for n, f in report.files.items())
    assert not same_tensors(tensors(tmp_path / "one"), tensors(tmp_path / "many"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    models = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert not same_tensors(*models)


def test_sharded_source_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny_dense("llama").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    saved("llama", tmp_path / "one")
    reports = [convert(tmp_path / n, tmp_path / f"{n}-meo", verify="none") for n in ("one", "many")]
    assert reports[0].files == reports[1].files


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16", "float16"])
def test_types(source_dtype: str, dtype: str, tmp_path: Path) -> None:
    """Each value is cast once, from the source's type to the wanted one."""
    source = saved("gpt2", tmp_path / "dense", getattr(torch, source_dtype))
    convert(source, tmp_path / "as-is", num_experts=2, verify="none")
    convert(source, tmp_path / "cast", num_experts=2, verify="none", dtype=dtype)
    kept, cast = tensors(tmp_path / "as-is"), tensors(tmp_path / "cast")
    assert {t.dtype for t in kept.values()} == {getattr(torch, source_dtype)}
    carried = {name for name in kept if ".router." not in name}  # routers are drawn in the type they are stored in
    wanted = {name: kept[name].to(getattr(torch, dtype)) for name in carried}
    assert not same_tensors(wanted, {name: cast[name] for name in carried})
    assert {t.dtype for t in cast.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cast").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("layers", ["all", "0"])
def test_t5_keeps_its_second_projection_in_fp32_under_fp16(family: str, layers: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none", dtype="float16", layers=layers)
    wide = {name for name, tensor in tensors(tmp_path / "meo").items() if tensor.dtype is torch.float32}
    converted, dense = 4 if layers == "all" else 2, 0 if layers == "all" else 2
    assert sum(name.endswith("experts.down_proj") for name in wide) == converted
    assert sum(name.endswith("wo.weight") for name in wide) == dense
    assert len(wide) == converted + dense
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "meo", dtype=torch.float16)
    assert {m.experts.down_proj.dtype for m in merged_of(model).values()} == {torch.float32}
    stock = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float16)
    with torch.no_grad():
        assert_close(model(**tiny_inputs(family)).logits, stock(**tiny_inputs(family)).logits, 1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(family: str, tied: bool, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "dense", tie_word_embeddings=tied)
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    outside = {n for n in tensors(tmp_path / "meo") if ".experts." not in n and ".router." not in n}
    assert outside <= tensors(source).keys()
    head = "cls.predictions.decoder.weight" if family == "bert" else "lm_head.weight"
    assert (head in outside) == (not tied)
    assert_same_function(source, tmp_path / "meo", family)


def test_tied_weights_that_are_stored_twice_stay_so(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense", tie_word_embeddings=True)
    twice = tensors(source)
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, source / "model.safetensors", {"format": "pt"})
    report = convert(source, tmp_path / "meo", num_experts=2, verify="none")
    assert report.tensors["carried_unknown"] == []
    assert "lm_head.weight" in tensors(tmp_path / "meo")
    assert_same_function(source, tmp_path / "meo", "llama")


def test_base_checkpoint_and_its_tensors_that_no_class_knows(tmp_path: Path) -> None:
    """A checkpoint of the base class stays one; what stock would ignore is carried over and said so."""
    tiny_dense("bert", BertModel).save_pretrained(tmp_path / "dense")
    odd = {**tensors(tmp_path / "dense"), "extra.statistics": torch.arange(3.0)}
    save_file(odd, tmp_path / "dense/model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "dense", tmp_path / "meo", num_experts=2, verify="none")
    assert report.model_class == "MeoBertModel"
    assert report.tensors["carried_unknown"] == ["extra.statistics"]
    assert "extra.statistics" in report.warnings[0]
    assert tensors(tmp_path / "meo")["extra.statistics"].tolist() == [0, 1, 2]


def test_head_that_the_source_lacks_is_reported(tmp_path: Path) -> None:
    saved("bert", tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", architectures=["BertForSequenceClassification"])
    report = convert(tmp_path / "dense", tmp_path / "meo", num_experts=2, verify="none")
    lost = {"bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"}
    assert set(report.tensors["newly_initialised_on_load"]) == lost
    assert "newly initialised" in report.warnings[0]


def pickled(folder: Path, model: PreTrainedModel, shards: int = 1, rename: bool = False) -> Path:
    """Write a checkpoint as the pickles of older days, also with the older names of layer norms."""
    model.config.save_pretrained(folder)
    edit_json(folder / "config.json", architectures=[type(model).__name__])
    state = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    if rename:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            state = {key.replace(new, name): tensor for key, tensor in state.items()}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    files = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: state[n] for n in names if files[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize(("shards", "rename"), [(1, False), (3, False), (1, True)])
def test_pickles_are_read_when_asked_for(shards: int, rename: bool, tmp_path: Path) -> None:
    model = tiny_dense("bert")
    pickled(tmp_path / "bin", model, shards, rename)
    model.save_pretrained(tmp_path / "dense")
    report = convert(tmp_path / "bin", tmp_path / "meo", num_experts=2, verify="none", allow_pickle=True)
    twin = convert(tmp_path / "dense", tmp_path / "twin", num_experts=2, verify="none")
    assert report.source["format"] == "pytorch"
    assert report.files == twin.files
    assert not report.warnings


def test_pickle_without_one_of_its_shards(tmp_path: Path) -> None:
    source = pickled(tmp_path / "bin", tiny_dense("bert"), 3)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        convert(source, tmp_path / "meo", verify="none", allow_pickle=True)


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = pickled(tmp_path / "bin", tiny_dense("bert"))
    torch.save({"bert": Bomb()}, source / "pytorch_model.bin")
    before = listing(tmp_path)
    refused = run_cli("convert", source, tmp_path / "meo")
    assert refused.code == 2
    assert "--allow-pickle" in refused.err
    assert run_cli("convert", source, tmp_path / "meo", "--allow-pickle").code == 2
    assert listing(tmp_path) == before


def test_weights_only_in_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "gguf").mkdir()
    stock = write_gguf(gguf, tmp_path / "gguf/tiny.gguf")
    report = convert(
        tmp_path / "gguf/tiny.gguf", tmp_path / "meo", num_experts=2, verify="none", level="task", tasks=["a", "b"]
    )
    assert report.source["format"] == "gguf"
    assert "not carried over" not in "".join(report.warnings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "meo")
    model.set_task("b")
    assert_same_logits(model, stock, "llama")
    by_folder = convert(
        tmp_path / "gguf", tmp_path / "meo2", num_experts=2, verify="none", level="task", tasks=["a", "b"]
    )
    assert by_folder.files == report.files


def write_gguf(gguf: object, path: Path) -> LlamaForCausalLM:
    """Write a tiny Llama as llama.cpp does, rotary halves interleaved, and return the model it holds."""
    model = tiny_dense("llama", rms_norm_eps=1e-5, tie_word_embeddings=False)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count:
            halves = tensor.reshape(count, 2, -1, config.hidden_size)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def assert_same_function(source: Path, converted: Path, family: str) -> None:
    auto = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}
    load = auto.get(FAMILIES[family].kind, AutoModelForSeq2SeqLM).from_pretrained
    model, info = load(converted, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_logits(model, main_class(family).from_pretrained(source), family)


@torch.no_grad()
def assert_same_logits(model: PreTrainedModel, stock: PreTrainedModel, family: str) -> None:
    expected = stock.eval()(**tiny_inputs(family)).logits
    error = (model.eval()(**tiny_inputs(family)).logits - expected).square().mean().sqrt()
    assert error <= 1e-5 * expected.square().mean().sqrt()
