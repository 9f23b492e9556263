"""The two models of a recovery: what is opened, and what does not fit together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from meo_hf.conversion.fetch import SourceOptions, locate
from meo_hf.conversion.source import first_line, public_name, raw_config
from meo_hf.errors import CheckpointError, MeoError, SourceError, UnsupportedError, UsageError
from meo_hf.texts import load_tokenizer
from meo_hf.training.recover_settings import WINDOW

_HEADS = {
    "AutoModelForCausalLM": set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
    "AutoModelForMaskedLM": set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk that is a language model: its name, folder, commit and config, and the Auto class to load it."""

    name: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    auto: str
    trust_remote_code: bool

    @property
    def masked(self) -> bool:
        """Whether it is a masked language model."""
        return self.auto == "AutoModelForMaskedLM"

    @property
    def text_config(self) -> Any:
        """The config of its language model."""
        return self.config.get_text_config(decoder=True)

    @property
    def entry(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"id": public_name(self.name), "commit": self.commit, "class": _stated_class(self.config)}

    def load(self, dtype: str | torch.dtype) -> PreTrainedModel:
        """Load the model on the CPU. Raises SourceError if that fails, CheckpointError if it leaves weights out."""
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        try:
            model, info = getattr(transformers, self.auto).from_pretrained(
                self.folder, dtype=dtype, output_loading_info=True, **options
            )
        except MeoError:
            raise
        except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
            raise SourceError(f"{self.name} cannot be loaded ({first_line(error)}): check it") from None
        if lost := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"{self.name} leaves out {len(lost)} of its model's weights, e.g. {lost[0]}: check it"
            )
        return model

    def tokenizer(self) -> Any:
        """Load its tokenizer; raises SourceError if it has none."""
        return load_tokenizer(self.folder, self.name, trust_remote_code=self.trust_remote_code)


def open_checkpoint(name: str, options: SourceOptions) -> Checkpoint:
    """Find a language model, in a folder or on the Hub.

    Raises SourceError if it is not there, UnsupportedError for an encoder-decoder, a model without a language-model
    head, a quantised one, or one whose own code would have to run.
    """
    folder, commit, gguf_file = locate(name, options)
    if gguf_file is not None:
        raise UnsupportedError(f"{name} is a GGUF file: give the folder or repository of the model itself")
    raw = raw_config(folder)
    known = str(raw.get("model_type", "")) in transformers.CONFIG_MAPPING
    if not known and "auto_map" in raw and not options.trust_remote_code:
        raise UnsupportedError(f"{name} brings its own code, which is not run unless you trust it: --trust-remote-code")
    code = options.trust_remote_code and not known
    try:
        config = AutoConfig.from_pretrained(folder, **({"trust_remote_code": True} if code else {}))
    except MeoError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that the config is unusable
        raise UnsupportedError(f"transformers cannot read the config of {name}: {first_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name} is quantised: give the model that it was made from")
    return Checkpoint(name, folder, commit, config, _auto_class(name, config), code)


def _auto_class(name: str, config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} is an encoder-decoder ({config.model_type}): recovery trains decoder-only models and masked "
            "language models so far"
        )
    stated = _stated_class(config)
    for auto, classes in _HEADS.items():
        if stated.removeprefix("Meo") in classes or stated.endswith(auto.removeprefix("AutoModel")):
            return auto
    raise UnsupportedError(
        f"{name} is saved as {stated}, which has no language-model head: recovery compares predictions of tokens, so "
        "save or convert it as a ...ForCausalLM or ...ForMaskedLM"
    )


def _stated_class(config: PreTrainedConfig) -> str:
    return (config.architectures or ["no class"])[0]


def check_pair(student: Checkpoint, teacher: Checkpoint) -> Any:
    """Return the tokenizer that both models have; raises UsageError if their tokens differ."""
    if student.masked != teacher.masked:
        raise UsageError(
            f"{student.name} is loaded by {student.auto}, the teacher {teacher.name} by {teacher.auto}: give a teacher "
            "of the same kind"
        )
    sizes = [model.text_config.vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{student.name} has {sizes[0]} tokens, the teacher {teacher.name} {sizes[1]}: the divergence needs one "
            "vocabulary, so give a teacher with the same"
        )
    found: list[Any] = []
    for model in (student, teacher):
        try:
            found.append(model.tokenizer())
        except SourceError:  # then it is meant for the other's
            continue
    if not found:
        raise SourceError(
            f"neither {student.name} nor {teacher.name} has a tokenizer: put its files beside the weights"
        )
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise UsageError(
            f"{student.name} and the teacher {teacher.name} have different tokenizers: their predictions cannot be "
            "compared"
        )
    return found[0]


def check_window(window: int | None, student: Checkpoint, teacher: Checkpoint) -> int:
    """Return the window to use; raises UsageError if a model has fewer positions."""
    rooms = {model.name: getattr(model.text_config, "max_position_embeddings", None) for model in (student, teacher)}
    shortest = min(((room, name) for name, room in rooms.items() if room), default=(None, ""))
    if window is None:
        return min(WINDOW, shortest[0] or WINDOW)
    if shortest[0] is not None and window > shortest[0]:
        raise UsageError(f"--window is {window}, but {shortest[1]} has {shortest[0]} positions: give at most that many")
    return window
