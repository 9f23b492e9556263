"""The tuner: PEFT's LoRA, which wraps stacks of experts in our layer."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper as StockWrapper
from peft.tuners.lora.model import LoraModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.utils import logging

from meo_hf.adapters.config import PEFT_TYPE, MeoLoraConfig
from meo_hf.adapters.layer import ParamWrapper
from meo_hf.adapters.targets import ROLES, routers, stacks
from meo_hf.errors import UsageError
from meo_hf.modeling.wrapped_meo import innermost

logger = logging.get_logger(__name__)


class MeoLoraModel(LoraModel):
    """A model with our adapters.

    Raises UsageError where nothing would be trained.
    """

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(resolve(config, self.model))

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if parameter_name is not None and isinstance(target, StockWrapper) and not isinstance(target, ParamWrapper):
            raise UsageError(
                f"a plain LoRA holds {current_key}: add a LoraConfig, or begin with MeoLoraConfig.from_pretrained"
            )
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return resolve(peft_config, self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as PEFT does, whose warning about patterns takes no notice of parameters."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        reached = [*self.targeted_module_names, *self.targeted_parameter_names]
        for pattern in {*config.rank_pattern, *config.alpha_pattern}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in reached):
                logger.warning(f"Pattern {pattern!r} fits no target of adapter {adapter_name!r}.")

    @staticmethod
    def _create_new_module(lora_config: MeoLoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        name = kwargs.pop("parameter_name", None)
        if name is not None and hasattr(innermost(target), "merged_maps"):
            return ParamWrapper(target, adapter_name, parameter_name=name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, parameter_name=name, **kwargs)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if not config.inference_mode:
            logger.warning(summary(model, config, adapter_name))


def resolve(config: MeoLoraConfig, model: nn.Module) -> MeoLoraConfig:
    """Write what `up`, `down` and `trainable` mean in a model as PEFT's own fields; doing it again changes nothing.

    Raises UsageError where the model has no experts, or no routers, that are meant.
    """
    targets = ["up", "down"] if config.target_modules is None else config.target_modules
    names = set() if isinstance(targets, str) else set(targets)
    parameters = set(config.target_parameters or ())
    if config.trainable == "routers":
        config.target_modules, parameters = DUMMY_TARGET_MODULES, set()
    else:
        for role in sorted(names & set(ROLES)):
            parameters |= set(_chosen(config, stacks(model, role), role))
        if not isinstance(targets, str):
            config.target_modules = sorted(names - set(ROLES))
    config.target_parameters = sorted(parameters)
    if config.trainable != "adapters":
        found = routers(model)
        if not found:
            raise UsageError(f"trainable is {config.trainable!r}, and {type(model).__name__} has no routers of experts")
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *found})
    return config


def _chosen(config: MeoLoraConfig, found: list[str], role: str) -> list[str]:
    layers, excluded = config.layers_to_transform, config.exclude_modules
    if layers is not None:
        wanted = [layers] if isinstance(layers, int) else layers
        found = [name for name in found if _layer(name, config.layers_pattern) in wanted]
    if excluded:
        found = [name for name in found if not _is_excluded(name.rpartition(".")[0], excluded)]
    if not found:
        where = "" if layers is None else f" in layers {layers}"
        where += f" that exclude_modules={excluded} leaves" if excluded else ""
        raise UsageError(f"there are no experts{where} for target {role!r}: is this a MEO model?")
    return found


def _layer(name: str, patterns: list[str] | str | None) -> int | None:
    """Return the number of the layer that a name leads through: the first in it, or the one behind a pattern."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]:
        match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        if match is not None:
            return int(match.group(1))
    return None


def _is_excluded(path: str, excluded: list[str] | str) -> bool:
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in excluded)


def summary(model: nn.Module, config: MeoLoraConfig, adapter_name: str) -> str:
    """Say what an adapter trains.

    Raises UsageError if that is nothing.
    """
    learned = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and _is_of(n, adapter_name)}
    if not learned:
        raise UsageError("this adapter would train nothing: name `up`, `down` or modules in target_modules")
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, ParamWrapper) and adapter_name in m.lora_A}
    gated = set(routers(model))
    pairs = sum(size for n, size in learned.items() if n.split(".lora_")[0] in wrappers)
    gates = sum(size for n, size in learned.items() if n.split(".modules_to_save.")[0] in gated)
    parts = []
    if wrappers:
        one = next(iter(wrappers.values()))
        blocks = len({id(wrapper.get_base_layer()) for wrapper in wrappers.values()})
        each = "a pair for each" if config.scope == "per_expert" else "one pair for the merge"
        of = f"{each} of {one.num_experts} experts"
        base: Any = one.get_base_layer()
        if base.bank() is not None:
            of = "one pair for the weight that all low-rank experts share"
        parts.append(f"{of} in {blocks} blocks ({pairs:,})")
    parts += [f"routers ({gates:,})"] * (gates > 0)
    total, others = sum(learned.values()), sum(learned.values()) - pairs - gates
    parts += [f"other modules ({others:,})"] * (others > 0)
    share = total / sum(p.numel() for p in model.parameters())
    return f"Adapter {adapter_name!r} trains {total:,} parameters ({share:.2%}): {', '.join(parts)}."


def _is_of(name: str, adapter_name: str) -> bool:
    return f".{adapter_name}." in name or name.endswith(f".{adapter_name}")


def register() -> None:
    """Tell PEFT of our type; again is harmless."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MeoLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MeoLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MeoLoraModel.prefix
