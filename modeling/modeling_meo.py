"""`Meo<Class>` on demand: every Transformers class of a known family, with merged feed-forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_meo import decoder_cache, route_cache
from .causal_meo import Reads, Stack
from .configuration_meo import is_causal, meo_config_class, settings_of
from .descriptions_meo import description_size
from .errors_meo import MeoConfigError
from .families_meo import family_of, has_row
from .feedforward_meo import Absorbed, MeoFeedForward, merged_feed_forwards, replace_blocks
from .generation_meo import PromptedGeneration, prepared_inputs
from .implementation_meo import ImplementationMixin
from .loss_meo import LossMixin
from .low_rank_meo import Factors
from .moe_adapters_meo import SparseBlock, stacking_conversions
from .moe_families_meo import MoeFamily
from .moe_layouts_meo import replace_moe
from .moe_meo import merged_moe
from .parallel_meo import check_gates, check_merging, check_parallel, check_ranks, plan_experts
from .parts_meo import Parts
from .peft_meo import share_adapter_names, tell_untouched
from .planning_meo import PlannedModel, check_merges, check_plan, plan_model
from .quantised_meo import tell_unquantised
from .reference_meo import break_links, load_options, own_options, source_of
from .restoring_meo import RestoringMixin
from .routing_meo import ROUTING_ARGUMENTS, RoutingContext, close_call, install_hooks, open_call
from .task_linear_meo import TaskLinear, check_task_linears, give_tasks_parts


class MeoModelMixin(LossMixin, RestoringMixin, ImplementationMixin):
    """What a MEO model adds to its Transformers class."""

    config: Any
    _meo_context: RoutingContext

    def post_init(self) -> None:
        """Swap the feed-forwards in before Transformers initialises and ties weights."""
        settings = settings_of(self.config)
        context = RoutingContext(settings)
        context.causal = is_causal(self.config)
        if settings.task_descriptions is not None:
            context.description_size = description_size(self, settings.task_descriptions)  # type: ignore[arg-type]
        family = family_of(self.config.model_type)
        replace = replace_moe if isinstance(family, MoeFamily) else replace_blocks
        replace(self, family, settings, context)  # type: ignore[arg-type]
        give_tasks_parts(self, settings, context)  # type: ignore[arg-type]
        self._meo_context = context
        context.belongs_to(self)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PreTrainedModel) and module is not self:
                install_hooks(module, context)
        _mark_stacks(self)  # type: ignore[arg-type]
        self._meo_default_task = settings.default_task
        if settings.default_task is not None:
            context.task = settings.tasks.index(settings.default_task)
        super().post_init()  # type: ignore[misc]

    def init_parallel_plans(self) -> None:
        """Plan as Transformers does, with merged experts in the place of the feed-forwards that they replaced."""
        super().init_parallel_plans()  # type: ignore[misc]
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        merged = [path for path, module in modules.items() if hasattr(module, "merged_maps")]
        replaced = [path for path, module in modules.items() if isinstance(module, (MeoFeedForward, Absorbed))]
        plan_experts(self, merged, replaced)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare as Transformers does; raises MeoConfigError for what merged experts contradict."""
        check_parallel(distributed_config)
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """Distribute as Transformers does; raises MeoConfigError for gates that read what would be split."""
        check_gates(distributed_config, mesh, [block for _, block in merged_feed_forwards(model)])
        settings = settings_of(model.config)
        check_ranks(distributed_config, mesh, settings.expert_format)
        check_merging(distributed_config, mesh, settings.level)
        return super().maybe_distribute_model(model, distributed_config, mesh)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load as Transformers does; weights that stayed at their source are fetched from there.

        Raises ReferenceSourceError if that source is not pinned, not there or has changed.
        """
        name, load = pretrained_model_name_or_path, super().from_pretrained  # type: ignore[misc]
        known, rest = config, kwargs
        if name is not None and not isinstance(config, PreTrainedConfig):
            known, rest = cls.config_class.from_pretrained(  # type: ignore[attr-defined]
                config or name, return_unused_kwargs=True, **kwargs
            )
        weights = (getattr(known, "meo", None) or {}).get("weights")
        if weights is None:
            loaded = load(name, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            tell_unquantised(model)
            check_task_linears(model, model._meo_context.settings)
            return loaded
        source, pinned = source_of(weights)
        own = own_options(kwargs)
        known._commit_hash = pinned.get("revision")  # else files are looked for at the referring repository's
        loaded = load(source, *model_args, config=known, **load_options(rest, own), **pinned, use_safetensors=True)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        tell_unquantised(model)
        model.name_or_path = model.config._name_or_path = str(name)
        if model.can_generate():
            with suppress(OSError):  # it has none: the source's holds
                model.generation_config = GenerationConfig.from_pretrained(name, **own)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as Transformers does, with all weights; files that are links to a source's are replaced, not changed."""
        if kwargs.get("is_main_process", True):
            break_links(save_directory)
        if self.config.meo and self.config.meo.get("weights"):
            self.config.meo = {k: v for k, v in self.config.meo.items() if k != "weights"}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint filled, the merged feed-forwards like their dense originals."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, (MeoFeedForward, SparseBlock)):
                module.initialize(self._init_weights)  # type: ignore[attr-defined]
            elif isinstance(module, (Factors, Parts)):
                module.initialize()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: for custom code Transformers would leave some heads of the stock class uninitialised."""
        return False

    @property
    def peft_config(self) -> Any:
        """The adapters' configs by name, which PEFT leaves here; raises AttributeError without adapters."""
        if "_meo_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["_meo_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        self.__dict__["_meo_peft_config"] = configs
        tell_untouched(self, configs)  # type: ignore[arg-type]

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_meo_peft_config", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._meo_context.belongs_to(self)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize as Transformers does; raises MeoConfigError where the output embeddings have parts for tasks."""
        if new_num_tokens is not None and isinstance(self.get_output_embeddings(), TaskLinear):  # type: ignore[attr-defined]
            raise MeoConfigError("the output embeddings have a part for each task, whose rows would be missing: resize "
                                 "the base and its adapters instead")  # fmt: skip
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    def set_task(self, task: str | None) -> None:
        """Fix one task for all rows of later batches without `task_ids`; None goes back to the config's.

        Saved with the config, so that a pipeline on the saved model uses it. Raises MeoConfigError for an
        unknown name or a level other than `task`.
        """
        settings = settings_of(self.config)
        if settings.level != "task":
            raise MeoConfigError(f"set_task needs level 'task'; this model has level {settings.level!r}")
        if task is not None and task not in settings.tasks:
            raise MeoConfigError(f"unknown task {task!r}; this model has: {', '.join(settings.tasks)}")
        task = self._meo_default_task if task is None else task
        self._meo_context.task = None if task is None else settings.tasks.index(task)
        self.config.meo = {**settings.to_dict(), "default_task": task}

    def meo_plan(self, batch: int = 1, tokens: int = 128, stage: str = "prefill") -> PlannedModel:
        """Say how each linear map of merged experts would be computed, and what that should take; print the result.

        `stage` is `prefill`, `batch` rows of `tokens` tokens at once, or `decode`, one more token per row.
        """
        return plan_model(self, batch, tokens, stage)

    def set_meo_plan(self, plan: str | None) -> None:
        """Compute all merged experts by one plan, in this process; None goes back to choosing by shapes."""
        check_plan(plan)
        if plan is not None:
            check_merges(self._meo_context.settings.level)
        self._meo_context.plan = plan

    def route_cache(self, cache: Any) -> None:
        """Make room for routing state in a KV cache, in place.

        Only a compiled prefill needs it beforehand; `generate` and eager calls do it themselves.
        """
        own = decoder_cache(cache)
        if own is not None and self._meo_context.settings.pools:
            route_cache(own, self.config.get_text_config(decoder=True).num_hidden_layers)

    def expect_prefix(self, positions: int) -> None:
        """Take a KV cache that begins with so many positions for one that no token has filled: prefix tuning's.

        Gates read tokens, and virtual ones have none. 0 goes back to refusing such caches.
        """
        self._meo_context.prefix = positions

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Keep each layer's routing call for its recomputation in backward."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        settings = settings_of(self.config)
        partner = family_of(self.config.model_type).kind == "encoder-decoder" and settings.pools
        if enable and options.get("use_reentrant") and partner:
            raise MeoConfigError(
                "reentrant gradient checkpointing drops the gradient from the decoder's gates to the encoder: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if enable and options.get("use_reentrant") and settings.balance_loss:
            raise MeoConfigError(
                "reentrant gradient checkpointing drops the gradient of the balance loss: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set balance_loss to 0"
            )
        context = self._meo_context

        def checkpointed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():  # the graph is replayed, not this Python
                return gradient_checkpointing_func(function, *inputs, **options)
            call = context.current

            def again(*inputs: Any, **options: Any) -> Any:
                current, context.current = context.current, call
                try:
                    return function(*inputs, **options)
                finally:
                    context.current = current

            return gradient_checkpointing_func(again, *inputs, **options)

        super()._set_gradient_checkpointing(enable, checkpointed, *args, **kwargs)  # type: ignore[misc]


class MeoGenerationMixin(PromptedGeneration, MeoModelMixin):
    """The mixin of classes that generate; its name keeps Transformers from building a second class."""


def _mark_stacks(model: PreTrainedModel) -> None:
    """Tell each innermost model around merged feed-forwards what their gates read."""
    context: RoutingContext = model._meo_context  # type: ignore[assignment]
    owned: dict[PreTrainedModel, list[Any]] = {}
    mixtures = ((path, module._meo) for path, module in merged_moe(model))
    for path, site in [*merged_feed_forwards(model), *mixtures]:
        owner: Any = model
        while path:
            path = path.rpartition(".")[0]
            owner = model.get_submodule(path)
            if isinstance(owner, PreTrainedModel):
                break
        owned.setdefault(owner, []).append(site)
    for stack, sites in owned.items():
        reads: Reads = "encoder" if sites[0].reads_encoder else "past" if context.causal else "rows"
        layers = tuple(sorted({site.layer for site in sites}))
        depth = stack.config.get_text_config(decoder=True).num_hidden_layers
        stack._meo_stack = Stack(reads, layers, depth)  # type: ignore[assignment]


def _routed_forward(base_forward: Callable[..., Any], family: Any) -> Callable[..., Any]:
    """Return a forward with the base's signature plus what the gates take, that opens the model's routing call.

    No hook: some libraries call `model.forward` itself.
    """
    signature = inspect.signature(base_forward)
    names = tuple(signature.parameters)[1:]
    causal = family.kind != "encoder-decoder" and "past_key_values" in names
    taken = {name: kind for name, kind in ROUTING_ARGUMENTS.items() if causal or name in ("task_ids", "routing_mask")}

    balances = "load_balancing_loss_func" in inspect.unwrap(base_forward).__code__.co_names

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = self._meo_context
        open_call(context, self, names, args, kwargs)
        outputs = None
        try:
            if balances:
                self._check_balance(kwargs.get("output_router_logits"))
            outputs = base_forward(self, *args, **{k: v for k, v in kwargs.items() if k not in taken})
            return self._finish_loss(outputs, {**dict(zip(names, args, strict=False)), **kwargs})
        finally:
            close_call(context, self, outputs)

    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in taken.items()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _with_stock_body(base: type[PreTrainedModel], stock_config: type[PreTrainedConfig]) -> Callable[..., None]:
    """Return an `__init__` during which `AutoModel.from_config` makes the stock body for a MEO config.

    Generic heads (`LlamaForSequenceClassification`) ask it for their body, and the head swaps the feed-forwards.
    """

    @functools.wraps(base.__init__)
    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        mapping = transformers.AutoModel._model_mapping
        classes, auto_map = mapping._extra_content, config.__dict__.pop("auto_map", None)
        registered = classes.get(type(config))
        classes[type(config)] = mapping[stock_config]
        try:
            base.__init__(self, config, *args, **kwargs)
        finally:
            classes.pop(type(config))
            classes.update({type(config): registered} if registered is not None else {})
            if auto_map is not None:
                config.auto_map = auto_map  # type: ignore[attr-defined]

    return __init__


def _share_conversions(stock: str, made: str, stacked: list[Any]) -> None:
    """Load and save under the names on disk that Transformers maps for the stock class or model type.

    `stacked` are conversions of this code's own, for a model type whose experts are modules.
    """
    mapping = get_checkpoint_conversion_mapping(stock)
    if mapping is not None or stacked:
        register_checkpoint_conversion_mapping(made, [*(mapping or []), *stacked], overwrite=True)


def meo_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the MEO class of a Transformers model class, made once."""
    name = f"Meo{base.__name__}"
    if name not in globals():
        stock_config = cast("type[PreTrainedConfig]", base.config_class)
        config_class = meo_config_class(stock_config)
        family = family_of(config_class.model_type)
        stacked = stacking_conversions(family) if isinstance(family, MoeFamily) else []
        _share_conversions(base.__name__, name, [])
        _share_conversions(stock_config.model_type, config_class.model_type, stacked)
        share_adapter_names(family, config_class.model_type)
        generates = issubclass(base, GenerationMixin)
        mixin = MeoGenerationMixin if generates else MeoModelMixin
        in_fp32 = list(base._keep_in_fp32_modules or [])
        if base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # by it the Trainer knows whose labels to shift
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = name
        globals()[name] = type(
            name,
            (mixin, base),
            {
                "__module__": __name__,
                "__qualname__": name,
                "__doc__": f"`{base.__name__}` whose feed-forwards merge experts into one.",
                "config_class": config_class,
                "__init__": _with_stock_body(base, stock_config),
                "forward": _routed_forward(base.forward, family),
                **({"prepare_inputs_for_generation": prepared_inputs(base)} if generates else {}),
                "_keep_in_fp32_modules": in_fp32 + ["down_proj"] * (getattr(family, "down", None) in in_fp32),
            },
        )
    return globals()[name]


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name[3:], None) if name.startswith("Meo") else None
    config_class = getattr(base, "config_class", None)
    if base is not None and issubclass(base, PreTrainedModel) and has_row(getattr(config_class, "model_type", "")):
        return meo_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
