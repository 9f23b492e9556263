"""The validated `meo` block, and `Meo<Base>Config` classes made on demand from Transformers' configs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig

from .errors_meo import MeoConfigError
from .families_meo import family_of
from .levels_meo import POOLINGS
from .moe_families_meo import MoeFamily
from .moe_settings_meo import MOE_KEYS, num_experts_of, set_top_k, top_k_of
from .parts_meo import check_parts
from .remote_meo import auto_map, write_code_files

SCHEMA_VERSION = 1
GATE_SCOPES = ("ffn", "projection")
COMBINES = ("weights", "outputs")
ROUTERS = ("noisy_top_k", "top_k")
ROUTINGS = ("segment", "prompt")
FORMATS = ("full", "lowrank", "parts")
STORED = ("expert_format", "expert_ranks", "expert_parts", "expert_counts", "expert_maps")  # how weights are
SKIPS = ("ratio", "cumulative")
MERGING = ("pooling", "routing", "segment_length", "combine", "merged_cache_bytes")  # how experts merge, not which


@dataclass
class MeoSettings:
    """The `meo` block of a config, typed.

    `level` None means the family's default. `layers` lists the converted layers of each stack, None for all.
    In a mixture of experts `num_experts` and `top_k` are those of its own config, and not stored here; `pooling` says
    whether its router reads a group's mean state (`hidden`) or its tokens' gates are averaged (`probs`).
    `default_task` is the task of a batch that carries no `task_ids`. `task_descriptions` are the tokens of a text per
    task: gates then read the text's embedding instead of the task's number. In a decoder, `segment_length` counts the
    tokens per segment, and `routing` says whether gates are frozen at the end of the prompt (`prompt`: the default
    of level `sequence` and `token`) or refreshed with each segment (`segment`). `merged_cache_bytes` bounds what
    merged experts take beside a KV cache; None means a quarter of the free memory. `source` holds id and commit of the
    source checkpoint, `meo_hf_version` the version that wrote the block. `weights` names a repository and commit, or a
    folder and its files, where the weights of a mixture of experts have stayed. With `expert_format` `lowrank` an
    expert is W_0 + B_i A_i: `expert_ranks` gives, by the ending of a linear map's path, the rank of its B_i A_i; the
    longest ending counts, a map that none fits has none, and a feed-forward without any stays dense. At level `task`
    it may name maps outside of feed-forwards too.
    In a mixture of experts at level `unmerged` each token runs its own experts. By the paths of its blocks,
    `expert_counts` gives the number of experts where it is not the config's, and `expert_maps` the expert that runs for
    each one that the router knows. `skip` holds a `rule` by which selected experts do not run, `ratio` or `cumulative`,
    and its `threshold`, one number or one per block. With `expert_format` `parts` an expert is W_0 + B_e A_e + S_e:
    `expert_parts` gives, by the ending of a linear map's path, whether there is a W_0 (`shared`), and for each expert,
    or one number for all, the rank of B_e A_e (`ranks`) and how many columns S_e has (`columns`); maps that none fits
    stay whole.
    """

    schema_version: int = SCHEMA_VERSION
    level: str | None = None
    num_experts: int = 8
    top_k: int = 2
    pooling: str | None = None
    gate_scope: str = "ffn"
    combine: str = "weights"
    router: str = "noisy_top_k"
    balance_loss: float = 0.01
    token_reduction: int = 64
    segment_length: int = 256
    routing: str | None = None
    merged_cache_bytes: int | None = None
    layers: list[int] | None = None
    tasks: list[str] = field(default_factory=lambda: ["default"])
    default_task: str | None = None
    task_descriptions: list[list[int]] | None = None
    source: dict[str, str | None] | None = None
    weights: dict[str, Any] | None = None
    expert_format: str = "full"
    expert_ranks: dict[str, int] | None = None
    expert_parts: dict[str, Any] | None = None
    expert_counts: dict[str, int] | None = None
    expert_maps: dict[str, list[int]] | None = None
    skip: dict[str, Any] | None = None
    meo_hf_version: str | None = None

    @classmethod
    def from_dict(cls, block: dict[str, Any] | None) -> MeoSettings:
        """Read a block; raises MeoConfigError for a newer schema, an unknown key or a bad value."""
        block = dict(block or {})
        version = block.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise MeoConfigError(
                f"this `meo` block has schema version {version}, this code reads up to {SCHEMA_VERSION}: "
                "load the model with the code in its own repository (trust_remote_code=True) or update meo_hf"
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(block) - known):
            raise MeoConfigError(f"unknown key(s) in the `meo` block: {unknown}; allowed: {sorted(known)}")
        settings = cls(**block)
        settings.validate()
        return settings

    def validate(self) -> None:
        """Raise MeoConfigError where a value is not allowed."""
        _one_of("gate_scope", self.gate_scope, GATE_SCOPES)
        _one_of("combine", self.combine, COMBINES)
        _one_of("router", self.router, ROUTERS)
        _one_of("level", self.level, (None, "segment", "sequence", "token", "task", "unmerged"))
        _one_of("routing", self.routing, (None, *ROUTINGS))
        _one_of("pooling", self.pooling, (None, *POOLINGS))
        _one_of("expert_format", self.expert_format, FORMATS)
        self._validate_ranks()
        self._validate_fewer()
        if self.level == "unmerged":
            self._validate_unmerged()
        _at_least("num_experts", self.num_experts, 1)
        _at_least("top_k", self.top_k, 1)
        if self.top_k > self.num_experts:
            raise MeoConfigError(f"top_k is {self.top_k}, more than num_experts ({self.num_experts}); lower one")
        _at_least("token_reduction", self.token_reduction, 1)
        _at_least("segment_length", self.segment_length, 1)
        if self.merged_cache_bytes is not None:
            _at_least("merged_cache_bytes", self.merged_cache_bytes, 0)
        if not isinstance(self.balance_loss, (int, float)) or not 0 <= self.balance_loss < float("inf"):
            raise MeoConfigError(f"balance_loss is {self.balance_loss!r}; give a number >= 0 (0 switches it off)")
        if not isinstance(self.tasks, (list, tuple)) or not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise MeoConfigError(f"tasks is {self.tasks!r}; give at least one name, each once")
        if self.default_task is not None and self.default_task not in self.tasks:
            raise MeoConfigError(f"default_task {self.default_task!r} is not one of the tasks {self.tasks}")
        self._validate_descriptions()
        if self.layers is not None and (
            not isinstance(self.layers, (list, tuple))
            or not self.layers
            or any(not isinstance(i, int) or i < 0 for i in self.layers)
        ):
            raise MeoConfigError(f"layers is {self.layers!r}; give indices >= 0, or null for all layers")

    def _validate_ranks(self) -> None:
        ranks = self.expert_ranks
        for name, needs in (("expert_ranks", "lowrank"), ("expert_parts", "parts")):
            if getattr(self, name) is not None and self.expert_format != needs:
                raise MeoConfigError(f"{name} has no effect with expert_format {self.expert_format!r}: leave it out")
        if self.expert_format == "parts":
            check_parts(self.expert_parts)
            if self.level != "unmerged":
                raise MeoConfigError("experts of expert_format 'parts' run one by one: take level 'unmerged'")
        if self.expert_format != "lowrank":
            return
        if not isinstance(ranks, dict) or not ranks or not all(isinstance(name, str) and name for name in ranks):
            raise MeoConfigError(
                f"expert_ranks is {ranks!r}; give a rank for each linear map, like {{'down_proj': 16}}"
            )
        for name, rank in ranks.items():
            _at_least(f"expert_ranks[{name!r}]", rank, 1)

    def _validate_fewer(self) -> None:
        for name in ("expert_counts", "expert_maps", "skip"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, dict) or not value):
                raise MeoConfigError(f"{name} is {value!r}; give an object, or leave it out")
        if self.level != "unmerged" and (self.skip or self.expert_maps):
            name = "skip" if self.skip else "expert_maps"
            raise MeoConfigError(f"{name} has no effect at level {self.level!r}, only at 'unmerged': leave it out")
        for path, count in (self.expert_counts or {}).items():
            _at_least(f"expert_counts[{path!r}]", count, 1)
        for path, known in (self.expert_maps or {}).items():
            if not isinstance(known, (list, tuple)) or not known or not all(type(i) is int and i >= 0 for i in known):
                raise MeoConfigError(f"expert_maps[{path!r}] is {known!r}; give an expert's number for each old one")
        if self.skip:
            if set(self.skip) != {"rule", "threshold"}:
                raise MeoConfigError(f"skip is {self.skip!r}; give a rule and a threshold")
            _one_of("skip's rule", self.skip["rule"], SKIPS)
            limit = self.skip["threshold"]
            for each in limit.values() if isinstance(limit, dict) else [limit]:
                if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 <= each <= 1:
                    raise MeoConfigError(f"skip's threshold is {each!r}; give a number from 0 to 1")

    def _validate_unmerged(self) -> None:
        """Raise MeoConfigError for what only says how experts merge."""
        idle = [name for name in MERGING if getattr(self, name) != getattr(MeoSettings, name)]
        if idle:
            raise MeoConfigError(f"{idle[0]} has no effect at level 'unmerged', where nothing is merged: leave it out")
        if self.expert_format == "lowrank":
            raise MeoConfigError(
                "experts of expert_format 'lowrank' only run merged: take another level than 'unmerged', or 'full'"
            )

    def count_of(self, path: str) -> int:
        """Return the number of experts of a block."""
        return (self.expert_counts or {}).get(path, self.num_experts)

    @property
    def pools(self) -> bool:
        """Whether gates read what several tokens of a text have in common."""
        return self.level not in ("task", "unmerged")

    def skip_of(self, path: str) -> tuple[str, float] | None:
        """Return the rule by which a block's experts are skipped and its threshold, None where they are not."""
        limit = (self.skip or {}).get("threshold")
        limit = limit.get(path) if isinstance(limit, dict) else limit
        return None if self.skip is None or limit is None else (self.skip["rule"], limit)

    def rank_of(self, path: str) -> int:
        """Return the rank of the experts' parts of a linear map, 0 where it has none."""
        return _by_ending(self.expert_ranks or {}, path) or 0

    def parts_of(self, path: str) -> dict[str, Any] | None:
        """Return what `expert_parts` says of a linear map, None where its experts are whole."""
        return _by_ending(self.expert_parts or {}, path)

    def _validate_descriptions(self) -> None:
        texts = self.task_descriptions
        if texts is None:
            return
        whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for text in texts for t in text)
        if len(texts) != len(self.tasks) or not all(texts) or not whole:
            raise MeoConfigError(
                f"task_descriptions has {len(texts)} texts for {len(self.tasks)} tasks: give token ids for each task"
            )
        if self.level != "task":
            raise MeoConfigError(f"task_descriptions has no effect at level {self.level!r}: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Return the block as plain JSON values; some only where they say something."""
        rare = (
            "pooling", "weights", "task_descriptions", "expert_ranks", "expert_parts", "expert_counts", "expert_maps",
            "skip",
        )  # fmt: skip
        kept = {k: v for k, v in asdict(self).items() if v is not None or k not in rare}
        return kept if self.expert_format != "full" else {k: v for k, v in kept.items() if k != "expert_format"}


def _by_ending(known: dict[str, Any], path: str) -> Any:
    """Return what is known by the longest ending of a path, None if none fits."""
    found = [name for name in known if f".{path}".endswith(f".{name}")]
    return known[max(found, key=len)] if found else None


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise MeoConfigError(f"{name} is {value!r}; allowed: {', '.join(str(a) for a in allowed)}")


def _at_least(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise MeoConfigError(f"{name} is {value!r}; give a whole number >= {low}")


def settings_of(config: PreTrainedConfig) -> MeoSettings:
    """Return the settings of a MEO config with its level filled in.

    Raises MeoConfigError where the family, as configured, cannot take the level: a gate reads only what is
    known before the first token it influences, so a causal stack cannot pool its own sequence.
    """
    family = family_of(config.model_type)
    own: dict[str, Any] = {}
    if isinstance(family, MoeFamily):
        if (count := num_experts_of(config, family)) < 2:
            raise MeoConfigError(f"{_name(config)} has {count} experts here: its config makes a dense model")
        own = {"num_experts": count, "top_k": top_k_of(config, family), "balance_loss": 0.0}  # it has a loss of its own
    settings = MeoSettings.from_dict({**(config.meo or {}), **own})
    settings.level = settings.level or levels_of(config)[0]
    check_level(config, settings.level)
    if isinstance(family, MoeFamily):
        if family.refused is not None:
            raise MeoConfigError(f"{_name(config)} is refused: {family.refused}")
        if settings.level != "unmerged":
            settings.pooling = settings.pooling or family.poolings[0]
        if settings.pooling not in (None, *family.poolings):
            allowed = ", ".join(family.poolings)
            raise MeoConfigError(
                f"pooling {settings.pooling!r} is not possible for {_name(config)}; allowed: {allowed}"
            )
    if settings.routing is not None and not (settings.pools and is_causal(config)):
        raise MeoConfigError(
            f"routing is {settings.routing!r}, which has no effect at level {settings.level!r} of "
            f"{_name(config)}: leave it out"
        )
    return settings


def _name(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix("meo_")


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether a model, as configured, is a decoder whose gates may not read later tokens."""
    kind = family_of(config.model_type).kind
    return kind == "decoder" or (kind == "encoder" and getattr(config, "is_decoder", False))


def levels_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the levels that a family, as configured, can take; the default first."""
    family = family_of(config.model_type)
    return family.levels["decoder" if is_causal(config) else family.kind]


def check_level(config: PreTrainedConfig, level: str) -> None:
    """Raise MeoConfigError if a family, as configured, cannot take a level."""
    allowed = levels_of(config)
    if level not in allowed:
        raise MeoConfigError(
            f"level {level!r} is not possible for {_name(config)}, which is an {family_of(config.model_type).kind}; "
            f"allowed: {', '.join(allowed)}"
        )


def read_block(config: PreTrainedConfig, block: dict[str, Any]) -> dict[str, Any]:
    """Return a checked `meo` block; in a mixture of experts `top_k` goes to the config's own key.

    Raises MeoConfigError for a value that is not allowed, or that has no effect in this family.
    """
    family = family_of(config.model_type)
    if not isinstance(family, MoeFamily):
        if block.get("pooling") is not None:
            raise MeoConfigError("pooling has no effect in a model whose experts were dense: leave it out")
        return MeoSettings.from_dict(block).to_dict()
    block = dict(block)
    top_k = block.pop("top_k", None)
    num_experts = block.pop("num_experts", None)
    if top_k is not None:
        set_top_k(config, family, top_k)
    if num_experts is not None:
        raise MeoConfigError(f"{_name(config)} has its own experts: num_experts has no effect, leave it out")
    if unknown := sorted(set(block) - set(MOE_KEYS)):
        raise MeoConfigError(f"no effect in a mixture of experts: {unknown}; allowed: {sorted((*MOE_KEYS, 'top_k'))}")
    settings = MeoSettings.from_dict(block)
    return {name: value for name, value in settings.to_dict().items() if name in MOE_KEYS}


class MeoConfigMixin:
    """What a MEO config adds to its Transformers config: the `meo` block, and saving that carries the code."""

    meo: dict[str, Any] | None
    on_create: ClassVar[Callable[[type], None] | None] = None  # where meo_hf is installed: registers the models

    def __post_init__(self, **kwargs: Any) -> None:
        if MeoConfigMixin.on_create is not None:
            MeoConfigMixin.on_create(type(self))
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.meo = read_block(self, self.meo) if self.meo else None  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config; a `meo` keyword overrides single keys of the stored block."""
        if overrides := kwargs.pop("meo", None):
            stored = config_dict.get("meo") or {}
            fixed = (*STORED, *(["layers"] if stored.get("expert_ranks") or stored.get("expert_parts") else []))
            if wrong := [key for key in fixed if key in overrides and stored and overrides[key] != stored.get(key)]:
                raise MeoConfigError(f"{wrong[0]} says how the weights are stored: it cannot be overridden on loading")
            if overrides.get("level") == "unmerged":
                stored = {key: value for key, value in stored.items() if key not in MERGING}
            config_dict = {**config_dict, "meo": {**stored, **overrides}}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save config.json with the full `auto_map`, and all remote-code files beside it."""
        if self.meo:
            read_block(self, self.meo)  # type: ignore[arg-type]
        os.makedirs(save_directory, exist_ok=True)
        write_code_files(save_directory)
        self.auto_map = auto_map(type(self).__name__, self.model_type.removeprefix("meo_"))  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def meo_config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the MEO config class of a Transformers config class, made once."""
    name = f"Meo{base.__name__}"
    if name not in globals():
        family_of(base.model_type)
        globals()[name] = type(
            name,
            (MeoConfigMixin, base),
            {
                "__module__": __name__,
                "__qualname__": name,
                "__doc__": f"`{base.__name__}` with a `meo` block.",
                "__annotations__": {"meo": "dict[str, Any] | None"},
                "meo": None,
                "model_type": f"meo_{base.model_type}",
                "keys_to_ignore_at_inference": [*getattr(base, "keys_to_ignore_at_inference", []), "aux_loss"],
            },
        )
    return globals()[name]


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name[3:], None) if name.startswith("Meo") else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return meo_config_class(base)
