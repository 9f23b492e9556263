"""A mixture whose blocks have one expert each, as its dense sibling: the same weights under another family's names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meo_hf.conversion.births import Copied
from meo_hf.conversion.companions import write_companions
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.output import check_space, written_beside
from meo_hf.conversion.safetensors_files import DTYPES, TensorSpec, raw_bytes
from meo_hf.conversion.source import Source, auto_class_of, meta_model, quiet_transformers
from meo_hf.conversion.stored import StoredTensor, stored_tensors
from meo_hf.conversion.write import Targets, write_tensors
from meo_hf.errors import CheckFailedError, UnsupportedError, UsageError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import moe_blocks
from meo_hf.modeling.moe_settings_meo import num_experts_of, top_k_of
from meo_hf.modeling.remote_meo import heads_of

_LEFT = ("model_type", "architectures", "auto_map", "transformers_version")
TOLERANCE = 1e-5
"""The largest difference of two models' outputs, in shares of the largest output, that is rounding in float32."""


@dataclass(frozen=True)
class Sibling:
    """A dense family that computes what a mixture with one expert per block does.

    `block` is the name of a layer's feed-forward there, `linears` are its maps: gate, up and down, or up and down.
    `renamed` are values that the mixture's config has under another name.
    """

    model_type: str
    block: str = "mlp"
    linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    renamed: dict[str, str] = field(default_factory=dict)


SIBLINGS = {
    "flex_olmo": Sibling("olmo2"),
    "granitemoe": Sibling("granite"),
    "mixtral": Sibling("mistral"),
    "qwen3_moe": Sibling("qwen3", renamed={"intermediate_size": "moe_intermediate_size"}),
    "switch_transformers": Sibling("t5", "DenseReluDense", ("wi", "wo"), {"feed_forward_proj": "dense_act_fn"}),
}


@dataclass(frozen=True)
class OfExpert:
    """What a stack of one expert holds: all of it, or one of `parts` equal parts of its rows."""

    found: StoredTensor
    stock: PreTrainedModel
    parts: int
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        rows, columns = self.stock.state_dict()[self.found.live].shape[1:]
        return rows // self.parts, columns

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        part = self.found.load(self.stock)[0].chunk(self.parts)[self.number]
        yield raw_bytes(part.contiguous().to(DTYPES[target.dtype]))


def extract_single(source: Source, output: Path, max_shard_size: str, overwrite: bool) -> Path:
    """Write the dense sibling of a mixture with one expert per block, compared with it; returns the folder.

    Raises UsageError for more experts, UnsupportedError where there is no sibling, or it has no place for a weight,
    CheckFailedError where it computes something else.
    """
    family = source.family
    sibling = SIBLINGS.get(source.config.model_type)
    if not isinstance(family, MoeFamily) or sibling is None:
        raise UnsupportedError(
            f"{source.name}: no dense family of Transformers computes what {source.config.model_type} with one expert "
            f"does; those that have one: {', '.join(SIBLINGS)}"
        )
    if (count := num_experts_of(source.config, family)) != 1:
        raise UsageError(
            f"{source.name} has {count} experts in each block, a dense model has one: leave one with meo-hf reduce "
            f"--keep 1{' --top-k 1' if top_k_of(source.config, family) > 1 else ''} first"
        )
    stock, config = source.meta_model(), dense_config(source.config, sibling)
    kind = dense_class(source, config)
    made = meta_model(kind, config)
    targets = _targets(source, family, sibling, stock, made)
    check_space(output, sum(spec.nbytes for spec, _ in targets.values()))
    with written_beside(output, overwrite) as folder:
        write_tensors(targets, folder, max_shard_size)
        config.save_pretrained(folder)
        write_companions(source, folder)
        _compare(source, folder, kind)
    if (limit := getattr(source.config, "expert_capacity", None)) is not None:
        warnings.warn(
            f"{source.name} lets all but {limit} tokens of a row pass its expert by (expert_capacity); the dense "
            "model does not, so longer rows come out otherwise",
            stacklevel=3,
        )
    return output


def dense_config(config: PreTrainedConfig, sibling: Sibling) -> PreTrainedConfig:
    """Return a mixture's config as its sibling's: all values but those that only mixtures have."""
    kind = CONFIG_MAPPING[sibling.model_type]
    known, own = kind().to_dict(), {*type(config)().to_dict(), *_LEFT} - {"bos_token_id"}  # which T5 has, if it is told
    values = copy.deepcopy(config.to_dict())
    kept = {key: value for key, value in values.items() if (key in known or key not in own) and key not in _LEFT}
    renamed = {new: values[old] for new, old in sibling.renamed.items()}
    if "layer_types" in known and "layer_types" not in values:
        windowed = getattr(config, "sliding_window", None) is not None
        kept["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return kind(**{**kept, **renamed})


def dense_class(source: Source, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a sibling that does what the source's does; raises UnsupportedError where there is none."""
    stock = source.model_class().__name__
    name = heads_of(config.model_type).get(auto_class_of(source.config.model_type, stock))
    if name is None:
        raise UnsupportedError(f"{source.name} is a {stock}, which {config.model_type} has no class for")
    config.architectures, config.dtype = [name], source.dtype
    return getattr(transformers, name)  # type: ignore[no-any-return]


def _targets(
    source: Source, family: MoeFamily, sibling: Sibling, stock: PreTrainedModel, made: PreTrainedModel
) -> Targets:
    """Return what to write; routers have no place in it."""
    state = made.state_dict()
    recipes: dict[str, tuple[StoredTensor, Copied | OfExpert]] = {}
    blocks = {path: path.rpartition(".")[2] for path, _ in moe_blocks(stock, family.layout)}
    for live, found in stored_tensors(source, stock).items():
        block = next((path for path in blocks if live.startswith(f"{path}.")), None)
        if block is not None:
            recipes |= {name: (found, recipe) for name, recipe in _of_block(block, live, found, sibling, stock)}
            continue
        name = live  # dense layers among sparse ones are named as those are
        if live not in state:
            name = next((live.replace(f".{own}.", f".{sibling.block}.") for own in set(blocks.values())), live)
        recipes[name] = (found, Copied(found.first))
    lost = (set(recipes) - set(state)) | (set(state) - set(recipes) - set(made.all_tied_weights_keys))
    if lost:
        raise UnsupportedError(f"{source.name} and {sibling.model_type} have other weights, e.g. {min(lost)}")
    targets: Targets = {}
    for name, disk in disk_names(made, recipes).items():
        found, recipe = recipes[name]
        shape = recipe.shape if isinstance(recipe, OfExpert) else tuple(recipe.source.spec.shape)
        if shape != tuple(state[name].shape):
            raise UnsupportedError(
                f"{source.name}: {found.live} differs in shape from {name} of {sibling.model_type}, {shape} and "
                f"{tuple(state[name].shape)}: there all layers have one width"
            )
        targets[disk] = (TensorSpec(disk, found.dtype, shape), recipe)
    return targets


def _of_block(
    block: str, live: str, found: StoredTensor, sibling: Sibling, stock: PreTrainedModel
) -> Iterator[tuple[str, Copied | OfExpert]]:
    """Yield what becomes of a tensor of a block: names in the sibling, and how each is made."""
    place, own = f"{block.rpartition('.')[0]}.{sibling.block}", live.removeprefix(f"{block}.experts.")
    if own.startswith("expert_0."):
        yield f"{place}.{own.removeprefix('expert_0.')}", Copied(found.first)
    elif own in ("gate_up_proj", "down_proj"):
        maps = sibling.linears[:-1] if own == "gate_up_proj" else sibling.linears[-1:]
        for number, name in enumerate(maps):
            yield f"{place}.{name}.weight", OfExpert(found, stock, len(maps), number)


def _compare(source: Source, folder: Path, kind: type[PreTrainedModel]) -> None:
    """Run both models over a few tokens; raises CheckFailedError where they differ by more than rounding."""
    if 2 * 4 * sum(ref.spec.numel for ref in source.tensors.values()) > 0.8 * psutil.virtual_memory().available:
        warnings.warn(f"{folder.name} was not compared with its source: both do not fit in memory", stacklevel=3)
        return
    tokens = (torch.arange(16).reshape(2, 8) * 7 + 3) % (source.config.get_text_config(decoder=True).vocab_size - 1)
    inputs = {"input_ids": tokens}
    if source.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    with quiet_transformers(), torch.no_grad():
        wanted, found = (
            made.from_pretrained(place, **options).eval()(**inputs)[0]
            for made, place in ((source.model_class(), source.loadable), (kind, folder))
        )
    error = float((wanted - found).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise CheckFailedError(
            f"{source.name} computes something else than its dense sibling would (outputs differ by {error:.1e} of the "
            "largest): not every token gets its single expert with a gate of 1"
        )
