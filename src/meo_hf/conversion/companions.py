"""What travels with the weights: tokenizer or processor, generation config, sentence-transformers files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, GenerationConfig

from meo_hf.conversion.fetch import module_folders
from meo_hf.conversion.source import Source, first_line, quiet_transformers

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def write_companions(source: Source, folder: Path) -> list[str]:
    """Write the source's tokenizer, processor and generation config; returns what could not be carried over.

    Tokenizers are written by `save_pretrained`, not copied: a copied one loads as a generic class beside
    remote code.
    """
    lost = []
    with quiet_transformers():
        lost += _tokenizer(source, folder)
        lost += _processor(source, folder)
        lost += _generation_config(source, folder)
    _forget_code(folder)
    _sentence_transformers(source.folder, folder)
    return lost


def _tokenizer(source: Source, folder: Path) -> list[str]:
    try:
        if (tokenizer := load_tokenizer(source)) is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # any tokenizer library may fail in its own way; the weights are still good
        return [f"tokenizer ({_reason(error, source)})"]
    return []


def load_tokenizer(source: Source) -> Any:
    """Load a source's tokenizer, None if it has none."""
    if source.gguf_file is None and not any(next(source.folder.glob(p), None) for p in _TOKENIZER_FILES):
        return None
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    # its own code is never run: without this, transformers would ask on the terminal
    return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **options)


def _processor(source: Source, folder: Path) -> list[str]:
    if not (source.folder / "preprocessor_config.json").is_file():
        return []
    problem = "no processor class"
    for auto in (AutoImageProcessor, AutoFeatureExtractor):
        try:
            auto.from_pretrained(source.folder, trust_remote_code=False).save_pretrained(folder)
            return []
        except Exception as error:  # as above
            problem = _reason(error, source)
    shutil.copyfile(source.folder / "preprocessor_config.json", folder / "preprocessor_config.json")
    return [f"processor checked (its config was copied as it is: {problem})"]


def _generation_config(source: Source, folder: Path) -> list[str]:
    if not (source.folder / "generation_config.json").is_file():
        return []
    try:
        GenerationConfig.from_pretrained(source.folder).save_pretrained(folder)
    except Exception as error:  # as above
        return [f"generation config ({_reason(error, source)})"]
    return []


def _forget_code(folder: Path) -> None:
    """Take out pointers to code of the source's own, which is not carried over."""
    for path in (folder / name for name in ("tokenizer_config.json", "preprocessor_config.json")):
        values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if values.pop("auto_map", None):
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _reason(error: Exception, source: Source) -> str:
    """Say what went wrong, for the model card too: without the folders of this machine."""
    return first_line(error).replace(str(source.folder), source.public_name)


def _sentence_transformers(source: Path, folder: Path) -> None:
    if not (source / "modules.json").is_file():
        return
    for name in _SENTENCE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in module_folders(source):
        for file in (source / name).glob("*.*"):
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name / file.name)
