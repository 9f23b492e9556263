"""Bad input ends in one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from checkpoints import edit_json, listing, run_cli, saved
from tiny import tiny_config

from meo_hf import cli, convert
from meo_hf.errors import (
    CheckpointError,
    LicenseError,
    MeoConfigError,
    MeoError,
    OutputError,
    SourceError,
    UnsupportedError,
    UsageError,
)


class Case(NamedTuple):
    """What makes the input bad, the options then given, and what is to come of it."""

    name: str
    prepare: Callable[[Path], Any]
    options: tuple[str, ...]
    error: type[MeoError]
    builtin: type[Exception]
    message: str
    source: str = "src"
    output: str = "out"


CASES: list[Case] = []


def bad(
    error: type[MeoError],
    builtin: type[Exception],
    message: str,
    *options: str,
    source: str = "src",
    output: str = "out",
) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Register a case; the decorated function prepares its folder."""

    def register(prepare: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES.append(Case(prepare.__name__, prepare, options, error, builtin, message, source, output))
        return prepare

    return register


def nothing(folder: Path) -> None:
    """Leave the source sound: the options alone are bad."""


def bad_options(error: type[MeoError], builtin: type[Exception], message: str, *options: str, **where: str) -> None:
    CASES.append(Case(" ".join(options) or message, nothing, options, error, builtin, message, **where))


def stock(folder: Path, config: Any, **edits: Any) -> None:
    shutil.rmtree(folder / "src")
    config.save_pretrained(folder / "src")
    edit_json(folder / "src/config.json", **edits)


@bad(UnsupportedError, ValueError, "add to families_meo.py: Family('gptj', kind=..., up=(('fc_in',),), down='fc_out'")
def unknown_family(folder: Path) -> None:
    stock(folder, transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=50, rotary_dim=4))


@bad(UnsupportedError, ValueError, "its text_config is of a known family: save that part as a model of its own")
def family_in_a_bigger_model(folder: Path) -> None:
    stock(folder, transformers.LlavaConfig(text_config=tiny_config("llama").to_dict()))


@bad(UnsupportedError, ValueError, "is a MEO model already: nothing to convert", source="meo")
def meo_model(folder: Path) -> None:
    convert(folder / "src", folder / "meo", num_experts=2, verify="none")


@bad(UnsupportedError, ValueError, "doge is refused: its experts are single neurons looked up by product keys")
def refused_mixture(folder: Path) -> None:
    stock(folder, transformers.DogeConfig(is_moe=True, hidden_size=32, num_hidden_layers=1))


@bad(UnsupportedError, ValueError, "is quantised: convert the unquantised checkpoint, then quantise the result")
def quantised_model(folder: Path) -> None:
    edit_json(folder / "src/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@bad(UnsupportedError, ValueError, "read it, then pass --trust-remote-code")
def own_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    edit_json(folder / "src/config.json", model_type="own", auto_map=auto_map)
    (folder / "src/configuration_own.py").write_text("raise SystemExit('this code ran')")


@bad(SourceError, OSError, "has no config.json: give the folder that save_pretrained wrote")
def no_config(folder: Path) -> None:
    (folder / "src/config.json").unlink()


@bad(CheckpointError, OSError, "config.json is damaged")
def damaged_config(folder: Path) -> None:
    (folder / "src/config.json").write_bytes(b'{"model_type": "bert", \xff')


@bad(CheckpointError, OSError, "config.json is damaged (no object)")
def config_that_is_a_list(folder: Path) -> None:
    (folder / "src/config.json").write_text("[1, 2]")


@bad(UnsupportedError, ValueError, "transformers cannot read the config")
def config_of_wrong_types(folder: Path) -> None:
    edit_json(folder / "src/config.json", hidden_size="many")


@bad(SourceError, OSError, "has no *.safetensors weights (with --allow-pickle, .bin files are read too)")
def no_weights(folder: Path) -> None:
    (folder / "src/model.safetensors").unlink()


@bad(UnsupportedError, ValueError, "pass --allow-pickle to read them with torch.load(weights_only=True)")
def pickled_weights(folder: Path) -> None:
    (folder / "src/model.safetensors").unlink()
    torch.save({}, folder / "src/pytorch_model.bin")


@bad(SourceError, OSError, "does not exist: give a folder with config.json and weights, or a Hub id", source="a/b/c")
def no_source(folder: Path) -> None:
    pass


@bad(UnsupportedError, ValueError, "transformers cannot read", source="broken.gguf")
def damaged_gguf(folder: Path) -> None:
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(40))


def index_of(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Shard the source, and change its index."""
    model = transformers.BertForMaskedLM.from_pretrained(folder / "src")
    (folder / "src/model.safetensors").unlink()
    model.save_pretrained(folder / "src", max_shard_size="20KB")
    path = folder / "src/model.safetensors.index.json"
    content = json.loads(path.read_text())
    changed = edit(content["weight_map"])
    path.write_text(json.dumps(content if changed is None else changed))


@bad(CheckpointError, OSError, "is missing from")
def missing_shard(folder: Path) -> None:
    index_of(folder, lambda weight_map: (folder / "src" / min(weight_map.values())).unlink())


@bad(CheckpointError, OSError, "a file outside the folder: refused")
def index_that_leads_up(folder: Path) -> None:
    shutil.copytree(folder / "src", folder / "other")
    index_of(folder, lambda weight_map: weight_map.update({min(weight_map): "../other/model.safetensors"}))


@bad(CheckpointError, OSError, "a file outside the folder: refused")
def index_that_leads_away(folder: Path) -> None:
    shutil.copytree(folder / "src", folder / "other")
    away = str(folder / "other/model.safetensors")
    index_of(folder, lambda weight_map: weight_map.update({min(weight_map): away}))


@bad(CheckpointError, OSError, "names 1 tensors that no shard holds, e.g. ghost")
def index_of_a_tensor_that_is_nowhere(folder: Path) -> None:
    index_of(folder, lambda weight_map: weight_map.update(ghost=min(weight_map.values())))


@bad(CheckpointError, OSError, "index.json is damaged (file names are no text)")
def index_of_numbers(folder: Path) -> None:
    index_of(folder, lambda weight_map: dict.update(weight_map, dict.fromkeys(weight_map, 3)))


@bad(CheckpointError, OSError, "index.json is damaged")
def index_without_a_map(folder: Path) -> None:
    index_of(folder, lambda weight_map: {"metadata": {}})


def weights(folder: Path, content: Callable[[bytes], bytes]) -> None:
    path = folder / "src/model.safetensors"
    path.write_bytes(content(path.read_bytes()))


def with_header(header: bytes, data: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda _: struct.pack("<Q", len(header)) + header + data


@bad(CheckpointError, OSError, "is truncated: ")
def truncated_weights(folder: Path) -> None:
    weights(folder, lambda content: content[:-10])


@bad(CheckpointError, OSError, "is truncated or no safetensors file: download it again")
def empty_weights(folder: Path) -> None:
    weights(folder, lambda content: b"")


@bad(CheckpointError, OSError, "is truncated or no safetensors file: download it again")
def huge_header(folder: Path) -> None:
    weights(folder, lambda content: struct.pack("<Q", 2**63) + content[8:])


@bad(CheckpointError, OSError, "download it again")
def random_header(folder: Path) -> None:
    weights(folder, with_header(bytes(range(256)), bytes(100)))


@bad(CheckpointError, OSError, "download it again")
def nested_header(folder: Path) -> None:
    weights(folder, with_header(b"[" * 200_000))


@bad(CheckpointError, OSError, "should have 16 bytes, not 8")
def header_of_wrong_sizes(folder: Path) -> None:
    weights(folder, with_header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}', bytes(8)))


@bad(UnsupportedError, ValueError, "has type F8_E4M3, which is not converted: cast it to one of F64, F32")
def header_of_an_unknown_type(folder: Path) -> None:
    weights(folder, with_header(b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', bytes(4)))


@bad(CheckpointError, OSError, "lacks bert.encoder.layer.0.intermediate.dense.weight")
def lost_tensors(folder: Path) -> None:
    weights(folder, with_header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))


@bad(CheckpointError, OSError, "has shape [48, 32], the config asks for [64, 32]")
def config_of_another_size(folder: Path) -> None:
    edit_json(folder / "src/config.json", intermediate_size=64)


@bad(OutputError, OSError, "exists: give another output, or pass --overwrite")
def output_exists(folder: Path) -> None:
    (folder / "out").mkdir()


@bad(OutputError, OSError, "exists: give another output, or pass --overwrite")
def output_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("dear diary")


@bad(OutputError, OSError, "is no model folder (no config.json in it), so it is not overwritten", "--overwrite")
def output_is_no_model(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/diary.txt").write_text("dear diary")


@bad(OutputError, OSError, "is no model folder (no config.json in it), so it is not overwritten", "--overwrite")
def overwritten_output_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("dear diary")


@bad(OutputError, OSError, "is a file, no folder to write in: give another output", output="out/deeper/model")
def output_below_a_file(folder: Path) -> None:
    (folder / "out").write_text("dear diary")


@bad(UsageError, ValueError, "lie in each other: give another output", "--overwrite", source="link")
def output_is_the_source_by_another_name(folder: Path) -> None:
    (folder / "src").rename(folder / "out")
    (folder / "link").symlink_to(folder / "out")


@bad(LicenseError, ValueError, "licences differ (", "--expert", "{}/one", "--expert", "{}/two")
def licences_that_contradict(folder: Path) -> None:
    for name, license_ in (("one", "cc-by-nc-4.0"), ("two", "apache-2.0")):
        shutil.copytree(folder / "src", folder / name)
        (folder / name / "README.md").write_text(f"---\nlicense: {license_}\n---\n")


@bad(UnsupportedError, ValueError, "experts must be fine-tunes of one base", "--expert", "{}/roberta", "--top-k", "1")
def expert_of_another_family(folder: Path) -> None:
    saved("roberta", folder / "roberta")


@bad(CheckpointError, OSError, "has shape [96, 32]", "--expert", "{}/wide", "--top-k", "1")
def expert_of_another_shape(folder: Path) -> None:
    saved("bert", folder / "wide", intermediate_size=96)


bad_options(UsageError, ValueError, "lie in each other: give another output", output="src", source="src")
bad_options(UsageError, ValueError, "lie in each other: give another output", output="src/out")
bad_options(UsageError, ValueError, "lie in each other: give another output", "--overwrite", output="../{}")
bad_options(MeoConfigError, ValueError, "top_k is 5, more than num_experts (4); lower", "--num-experts=4", "--top-k=5")
bad_options(MeoConfigError, ValueError, "num_experts is 0; give a whole number >= 1", "--num-experts=0")
bad_options(MeoConfigError, ValueError, "num_experts is -2; give a whole number >= 1", "--num-experts=-2")
bad_options(MeoConfigError, ValueError, "top_k is 0; give a whole number >= 1", "--top-k=0")
bad_options(UsageError, ValueError, "no layer 7; the model has layers 0 to 1", "--layers=0,7")
bad_options(UsageError, ValueError, "the model has only 2 layers (0 to 1)", "--layers=last:9")
bad_options(UsageError, ValueError, "names no layer of a model with layers 0 to 1", "--layers=last:0")
bad_options(UsageError, ValueError, "is not understood: give all, even, odd, last:N or indices", "--layers=first:1")
bad_options(UsageError, ValueError, "is not understood: give all, even, odd, last:N or indices", "--layers=-1")
bad_options(UsageError, ValueError, "is not understood: give all, even, odd, last:N or indices", "--layers=")
bad_options(UsageError, ValueError, "no effect at level 'sequence': add --level task", "--task=a")
bad_options(MeoConfigError, ValueError, "give at least one name, each once", "--level=task", "--task=a", "--task=a")
bad_options(UsageError, ValueError, "contradicts 1 --expert", "--expert", "{}/src", "--num-experts=3", "--top-k=1")
bad_options(UsageError, ValueError, "no effect with --expert", "--expert", "{}/src", "--expert-init=noise", "--top-k=1")
bad_options(UsageError, ValueError, "is not understood: give a size like 500MB", "--max-shard-size=0GB")
bad_options(UsageError, ValueError, "is not understood: give a size like 500MB", "--max-shard-size=large")
bad_options(UsageError, ValueError, "--private has no effect without --push-to-hub", "--private")
bad_options(UsageError, ValueError, "--push-revision has no effect without --push-to-hub", "--push-revision=dev")
bad_options(UsageError, ValueError, "--commit-message has no effect without", "--commit-message=hello")
bad_options(UsageError, ValueError, "is no name of a repository", "--push-to-hub=no good/name")
bad_options(UsageError, ValueError, "where --source-revision has no effect", "--source-revision=v1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("bert", tmp_path_factory.mktemp("sound") / "src")


def arguments_of(case: Case, folder: Path) -> list[object]:
    options = [option.format(folder) for option in case.options]
    return ["convert", folder / case.source, folder / case.output.format(folder.name), *options]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "src")
    case.prepare(tmp_path)
    before = listing(tmp_path)
    done = run_cli(*arguments_of(case, tmp_path))
    assert done.code == 2, done.err
    assert case.message in done.err
    assert done.err.startswith("meo-hf: ")
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert not done.out
    assert listing(tmp_path) == before, "something was written"
    with pytest.raises(case.error) as caught:
        cli.app([str(argument) for argument in arguments_of(case, tmp_path)])
    assert isinstance(caught.value, case.builtin)


def test_level_that_the_family_cannot_take(tmp_path: Path) -> None:
    saved("bert", tmp_path / "src")
    done = run_cli("convert", tmp_path / "src", tmp_path / "out", "--level", "segment")
    assert done.code == 2
    assert "'segment' is not possible for bert, which is an encoder; allowed: sequence, token, task" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "sentence"}, "unknown level 'sentence': give segment, sequence, token or task"),
        ({"expert_init": "clone"}, "give one of copy, noise, drop-upcycle"),
        ({"gate_scope": "layer"}, "gate_scope is 'layer'; allowed: ffn, projection"),
        ({"dtype": "int8"}, "give one of float32, bfloat16, float16"),
        ({"verify": "maybe"}, "give one of full, sample, none"),
        ({"routing": "prompt"}, "--routing has no effect at level 'sequence' of bert"),
        ({"segment_length": 8}, "--segment-length has no effect at level 'sequence' of bert"),
        ({"num_experts": 2.5}, "give a whole number >= 1"),
        ({"num_experts": True}, "give a whole number >= 1"),
    ],
)
def test_values_that_the_command_line_would_not_let_through(
    options: dict[str, Any], message: str, sound: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert(sound, tmp_path / "out", **options)
    assert isinstance(caught.value, MeoError)
    assert not list(tmp_path.iterdir())
