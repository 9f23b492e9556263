"""Make Transformers' Auto classes know the MEO classes of the installed package."""

from __future__ import annotations

from functools import cache

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meo_hf.modeling.configuration_meo import MeoConfigMixin, meo_config_class
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.remote_meo import heads_of


def register() -> None:
    """Register the config of every family; its models follow when the first such config is made.

    Registering the models at once would import the modeling file of every family.
    """
    for model_type in FAMILIES:
        config_class = meo_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for model_type in MOE_FAMILIES:
        if model_type in CONFIG_MAPPING:  # an older Transformers may not have it
            AutoConfig.register(f"meo_{model_type}", _stand_in(model_type), exist_ok=True)
    MeoConfigMixin.on_create = staticmethod(_register_models)


def _stand_in(model_type: str) -> type[PreTrainedConfig]:
    """Return a config class that becomes the MEO config of a family when one is made: importing all is slow."""

    def real() -> type[PreTrainedConfig]:
        return meo_config_class(CONFIG_MAPPING[model_type])

    return type(
        "MeoConfigStandIn",
        (PreTrainedConfig,),
        {
            "model_type": f"meo_{model_type}",
            "__new__": lambda cls, *args, **kwargs: real()(*args, **kwargs),
            "from_dict": classmethod(lambda cls, values, **kwargs: real().from_dict(values, **kwargs)),
            "from_pretrained": classmethod(lambda cls, name, **kwargs: real().from_pretrained(name, **kwargs)),
        },
    )


@cache
def _register_models(config_class: type[PreTrainedConfig]) -> None:
    from meo_hf.modeling.modeling_meo import meo_model_class

    for auto, stock in heads_of(config_class.model_type.removeprefix("meo_")).items():
        model_class = meo_model_class(getattr(transformers, stock))
        getattr(transformers, auto).register(config_class, model_class, exist_ok=True)
