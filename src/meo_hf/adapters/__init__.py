"""Adapters of merged experts in PEFT's manner; importing this registers them with PEFT."""

from __future__ import annotations

from meo_hf.adapters.config import PEFT_TYPE, MeoLoraConfig
from meo_hf.adapters.layer import ParamWrapper
from meo_hf.adapters.model import MeoLoraModel, register

__all__ = ["PEFT_TYPE", "MeoLoraConfig", "MeoLoraModel", "ParamWrapper"]

register()
