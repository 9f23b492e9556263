"""What travels with the weights: tokenizers, processors, generation config, and pipelines that use them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from checkpoints import edit_json, listing, run_cli, saved
from fresh import Fresh, Values
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    MarianTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
    ViTImageProcessor,
)

from meo_hf import convert, extract

pytestmark = pytest.mark.xdist_group("companions")  # one worker: the costly fixtures are made once
WORDS = ["[PAD]", "<p>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(93))]
TEXT = "w1 w2 w3 w40 unknown"
CHAT = "{% for m in messages %}{{ m.role }} says {{ m.content }}.{% endfor %}"
PIPELINES = {"bert": ["fill-mask", "feature-extraction"], "gpt2": ["text-generation"], "llama": ["text-generation"]}


def bert(folder: Path) -> Any:
    (folder / "words.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(vocab=str(folder / "words.txt"), model_max_length=32)
    (folder / "words.txt").unlink()
    return tokenizer


def gpt2(folder: Path) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocab = {**{letter: i + 5 for i, letter in enumerate(letters)}, "<|endoftext|>": 3}
    return GPT2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT)


def llama(folder: Path) -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", chat_template=CHAT
    )


def t5(folder: Path) -> Any:
    pieces = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [(f"▁w{i}", -1.0) for i in range(90)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def marian(folder: Path) -> Any:
    sentences = [" ".join(f"w{i + j}" for j in range(4)) for i in range(60)]
    model = io.BytesIO()
    options = {"vocab_size": 40, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **options)
    (folder / "m.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<pad>": len(vocab)}))
    files = {"source_spm": "m.model", "target_spm": "m.model", "vocab": "vocab.json"}
    tokenizer = MarianTokenizer(**{key: str(folder / name) for key, name in files.items()})
    tokenizer.save_pretrained(folder)
    (folder / "m.model").unlink()
    return tokenizer


TOKENIZERS: dict[str, Callable[[Path], Any]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "marian": marian}


def describe_tokenizer(folder: str, text: str) -> dict[str, Any]:
    """Load a tokenizer without any trust flag; also as a processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {
        "class": type(tokenizer).__name__,
        "processor": type(transformers.AutoProcessor.from_pretrained(folder)).__name__,
        "ids": tokenizer(text)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(text)["input_ids"]),
        "chat": tokenizer.chat_template,
        "length": tokenizer.model_max_length,
        "special": tokenizer.special_tokens_map,
    }


def run_pipeline(folder: str, task: str, text: str, trust: bool) -> Any:
    """Use a model as the pipeline's documentation shows."""
    options = {"trust_remote_code": True} if trust else {}
    pipe = transformers.pipeline(task, model=folder, **options)
    if task == "text-generation":
        return pipe(text, do_sample=False, max_new_tokens=5)
    return pipe(text.replace("w3", "[MASK]")) if task == "fill-mask" else pipe(text)


def describe_processor(folder: str, trust: bool) -> dict[str, Any]:
    """Load an image processor without a trust flag, and classify an image."""
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = Image.new("RGB", (20, 30), (200, 30, 90))
    options = {"trust_remote_code": True} if trust else {}
    pipe = transformers.pipeline("image-classification", model=folder, **options)
    return {
        "class": type(processor).__name__,
        "processor": type(transformers.AutoProcessor.from_pretrained(folder)).__name__,
        "sum": float(processor(image, return_tensors="pt")["pixel_values"].sum()),
        "answer": sorted((row["label"], round(row["score"], 4)) for row in pipe(image)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert models with tokenizers, and extract those that can be."""
    folder = tmp_path_factory.mktemp("companions")
    for family, build in TOKENIZERS.items():
        source = saved(family, folder / family / "dense")
        build(source).save_pretrained(source)
        if family != "marian":  # its decoder cannot do with the tiny default
            GenerationConfig(max_new_tokens=7, eos_token_id=3, pad_token_id=1).save_pretrained(source)
        report = convert(source, folder / family / "meo", num_experts=2, verify="none")
        assert not report.warnings, report.warnings
        if family in ("gpt2", "llama"):
            convert(source, folder / family / "tasks", num_experts=2, level="task", verify="none")
            extract(folder / family / "tasks", folder / family / "extracted")
    source = saved("vit", folder / "vit/dense", id2label={0: "cat", 1: "dog"})
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(source)
    report = convert(source, folder / "vit/meo", num_experts=2, verify="none")
    assert not report.warnings, report.warnings
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Values:
    fresh = Fresh()
    for family in TOKENIZERS:
        for kind in ("dense", "meo", "extracted"):
            place = folder / family / kind
            if not place.is_dir():
                continue
            fresh.add(f"{family} {kind}", describe_tokenizer, folder=place, text=TEXT)
            for task in PIPELINES.get(family, ()):
                options = {"folder": place, "task": task, "text": TEXT, "trust": kind == "meo"}
                fresh.add(f"{family} {kind} {task}", run_pipeline, **options)
    for kind in ("dense", "meo"):
        fresh.add(f"vit {kind}", describe_processor, folder=folder / "vit" / kind, trust=kind == "meo")
    return fresh.run(folder)


@pytest.mark.parametrize(
    "where", [*(f"{family} meo" for family in TOKENIZERS), "gpt2 extracted", "llama extracted", "vit meo"]
)
def test_tokenizers_and_processors_are_those_of_the_source(outcomes: Values, where: str) -> None:
    family = where.split()[0]
    expected = outcomes[f"{family} dense"]
    assert outcomes[where] == expected
    names = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "t5": "T5Tokenizer", "marian": "MarianTokenizer"}
    assert expected["class"] == names.get(family, expected["class"])
    if family in ("gpt2", "llama"):
        assert expected["chat"] == CHAT


def near(left: Any, right: Any) -> bool:
    """Compare nested answers, numbers to five digits."""
    if isinstance(left, float):
        return left == pytest.approx(right, rel=1e-4, abs=1e-5)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(near, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(near(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.mark.parametrize(("family", "task"), [(family, task) for family, tasks in PIPELINES.items() for task in tasks])
def test_pipelines_answer_as_with_the_source(outcomes: Values, family: str, task: str) -> None:
    expected = outcomes[f"{family} dense {task}"]
    assert expected
    assert near(outcomes[f"{family} meo {task}"], expected)
    if family != "bert":
        assert near(outcomes[f"{family} extracted {task}"], expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_generation_config_travels(folder: Path, family: str) -> None:
    found = GenerationConfig.from_pretrained(folder / family / "meo")
    assert found.to_diff_dict() == GenerationConfig.from_pretrained(folder / family / "dense").to_diff_dict()
    assert found.max_new_tokens == 7


def test_no_folder_of_this_machine_travels(folder: Path) -> None:
    for path in folder.glob("*/meo/*"):
        if path.name != "meo_report.json":
            assert str(folder).encode() not in path.read_bytes(), path


def test_code_of_a_tokenizer_is_left_behind(tmp_path: Path) -> None:
    """It is neither run nor asked about: the family's own class reads the files, as for the source."""
    source = saved("bert", tmp_path / "dense")
    bert(source).save_pretrained(source)
    (source / "tokenization_own.py").write_text("raise SystemExit('this code ran')")
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit_json(source / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    done = run_cli("convert", source, tmp_path / "meo", "--num-experts", "2", "--verify", "none")
    assert done.code == 0
    assert not (tmp_path / "meo/tokenization_own.py").exists()
    written = json.loads((tmp_path / "meo/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == type(AutoTokenizer.from_pretrained(source, trust_remote_code=False)).__name__
    assert "auto_map" not in written


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_damaged_companions_do_not_stop_a_conversion(name: str, tmp_path: Path) -> None:
    source = saved("gpt2", tmp_path / "dense")
    gpt2(source).save_pretrained(source)
    GenerationConfig(max_new_tokens=7).save_pretrained(source)
    (source / name).write_text("{")
    report = convert(source, tmp_path / "meo", num_experts=2, verify="none")
    assert [warning.partition(" (")[0] for warning in report.warnings] == [
        f"not carried over: {'tokenizer' if name == 'tokenizer.json' else 'generation config'}"
    ]
    assert str(tmp_path) not in (tmp_path / "meo/README.md").read_text(), "a folder of this machine is on the card"


def test_sentence_transformers_files_travel(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    modules = ["", "1_Pooling", "2_Dense", "../elsewhere"]
    (source / "modules.json").write_text(json.dumps([{"path": path} for path in modules]))
    (source / "config_sentence_transformers.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    shutil.copytree(source / "1_Pooling", source / "2_Dense")
    (source / "2_Dense/model.safetensors").write_bytes(b"weights")
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    before, after = listing(source), listing(tmp_path / "meo")
    own = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json"}
    assert {name: after[name] for name in own} == {name: before[name] for name in own}
    assert after["2_Dense/model.safetensors"] == before["2_Dense/model.safetensors"]
    assert (tmp_path / "meo/modules.json").is_file()
    assert not (tmp_path / "elsewhere").exists()
