"""The config of our adapter: PEFT's LoRA, with experts among its targets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftType

from meo_hf.errors import UsageError

SCOPES = ("per_expert", "shared")
TRAINABLE = ("adapters", "routers", "both")
OWN_FILE = "meo_lora.json"
"""Beside an adapter that is saved as a plain LoRA: what only this config knows."""


class _Name(str):
    """A PEFT type that is no member of its enumeration; PEFT asks members for their value."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name itself."""
        return str(self)


PEFT_TYPE: Any = _Name("meo_hf.LORA")
"""What `adapter_config.json` says where plain LoRA cannot say it: it names the package to install."""


@dataclass
class MeoLoraConfig(LoraConfig):
    """LoRA on experts that are merged, and on whatever else LoRA adapts.

    `target_modules` may name `up` (the first linear map of all experts, gate and up together where there are both),
    `down` (the last) and modules as LoRA does. Scope `per_expert` gives each expert a pair of factors, merged by the
    experts' gates; `shared` gives the merged expert one. `trainable` says whether adapters, routers or both learn.
    Beyond PEFT's own LoRA of parameters it takes `lora_dropout` (on what the factors read), `use_dora` and
    `lora_bias` (a bias per expert). Raises UsageError for values that it does not know.
    """

    target_modules: list[str] | str | None = field(default_factory=lambda: ["up", "down"])
    scope: str = "per_expert"
    trainable: str = "adapters"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name, allowed in (("scope", SCOPES), ("trainable", TRAINABLE)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise UsageError(f"init_lora_weights is {self.init_lora_weights!r}; experts take True, False or 'gaussian'")

    @property
    def is_plain(self) -> bool:
        """Whether PEFT's own LoRA computes the same from the same weights."""
        return self.scope == "per_expert" and not self.use_dora and not self.lora_bias

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does: as a plain LoRA where that computes the same, so that it opens without meo_hf."""
        if not self.is_plain:
            return super().save_pretrained(save_directory, **kwargs)
        values = self.to_dict()
        own = {name: values.pop(name) for name in ("scope", "trainable")} | {"lora_dropout": self.lora_dropout}
        plain = LoraConfig(**{**values, "peft_type": PeftType.LORA, "lora_dropout": 0.0})
        plain.save_pretrained(save_directory, **kwargs)
        (Path(save_directory) / OWN_FILE).write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", "utf-8")
        return None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MeoLoraConfig:
        """Load the config of an adapter of ours, or of a plain LoRA, to go on with it as ours."""
        found = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(found, cls):
            return found
        if not isinstance(found, LoraConfig):
            raise UsageError(f"{pretrained_model_name_or_path} holds an adapter of type {found.peft_type}, no LoRA")
        own = _own_values(pretrained_model_name_or_path, subfolder, kwargs)
        return cls(**{**found.to_dict(), **own})


def _own_values(name: str, subfolder: str | None, options: dict[str, Any]) -> dict[str, Any]:
    local = Path(name, subfolder or "")
    if local.is_dir():
        path = local / OWN_FILE
    else:
        access = {k: v for k, v in options.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
        try:
            path = Path(hf_hub_download(name, OWN_FILE, subfolder=subfolder, **access))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
