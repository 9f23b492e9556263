"""Make Transformers' Auto classes know the MEO classes of the installed package."""

from __future__ import annotations

from functools import cache

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meo_hf.modeling.configuration_meo import MeoConfigMixin, meo_config_class
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.remote_meo import heads_of


def register() -> None:
    """Register the config of every family; its models follow when the first such config is made.

    Registering the models at once would import the modeling file of every family.
    """
    for model_type in FAMILIES:
        config_class = meo_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    MeoConfigMixin.on_create = staticmethod(_register_models)


@cache
def _register_models(config_class: type[PreTrainedConfig]) -> None:
    from meo_hf.modeling.modeling_meo import meo_model_class

    for auto, stock in heads_of(config_class.model_type.removeprefix("meo_")).items():
        model_class = meo_model_class(getattr(transformers, stock))
        getattr(transformers, auto).register(config_class, model_class, exist_ok=True)
