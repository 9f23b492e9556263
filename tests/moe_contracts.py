"""Contracts of mixture-of-experts models that merge, against an oracle made of stock modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from contracts import assert_close, assert_differs, gate_inputs
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES, MoeFamily
from moe_tiny import STOCK_FAILS, tiny_moe, tiny_moe_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

SEGMENT = 3
KEPT = [name for name, row in MOE_FAMILIES.items() if row.refused is None]
DECODERS = [name for name in KEPT if MOE_FAMILIES[name].kind == "decoder"]
# gates are averaged by code that knows no family: each layout and each kind of router once
BOTH_POOLINGS = (
    "mixtral", "olmoe", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe", "gemma4_text",
    "longcat_flash", "inkling_text", "dbrx", "jetmoe", "llama4_text", "aria_text", "hunyuan_v1_moe", "nemotron_h",
)  # fmt: skip
# stock LongCat fails with one expert per token: its mask loses an axis
ONE_EXPERT = [n for n in KEPT if MOE_FAMILIES[n].chooses_top_k and n != "longcat_flash"]
ONE_EXPERT = [n for n in ONE_EXPERT if isinstance(MOE_FAMILIES[n].top_k, str)]
SINGLE = tuple(name for name, reason in STOCK_FAILS.items() if reason.startswith("fp64"))


@dataclass(frozen=True)
class MoeCase:
    """A family with a way to pool, and config values that differ from the tiny ones."""

    family: str
    pooling: str = "hidden"
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def row(self) -> MoeFamily:
        return MOE_FAMILIES[self.family]

    @property
    def causal(self) -> bool:
        return self.row.kind == "decoder"

    @property
    def dtype(self) -> torch.dtype:
        """Double precision where the stock model can compute in it."""
        return torch.float32 if self.family in SINGLE else torch.float64

    @property
    def tolerance(self) -> float:
        """What rounding may do; some stock modules compute in float32 whatever their parameters are."""
        return 2e-5

    def stock(self) -> PreTrainedModel:
        """Return a stock model of the caller's own."""
        made = tiny_moe(self.family, **dict(self.overrides)) if self.overrides else copy.deepcopy(_stock(self.family))
        return made.to(self.dtype)

    def merged(self, stock: PreTrainedModel, **meo: Any) -> PreTrainedModel:
        """Return the MEO model with a stock model's parameters."""
        own: dict[str, Any] = {"pooling": self.pooling, **({"segment_length": SEGMENT} if self.causal else {})}
        own = {} if meo.get("level") == "unmerged" else own
        return meo_of_moe(stock, **{**own, **meo}).to(self.dtype)

    def inputs(self, **options: Any) -> dict[str, Tensor]:
        return tiny_moe_inputs(self.family, **options)


@lru_cache(maxsize=8)
def _stock(family: str) -> PreTrainedModel:
    return tiny_moe(family)


def cases(families: list[str] = KEPT) -> list[MoeCase]:
    """Return the default pooling of every family, and the other one of those in `BOTH_POOLINGS`."""
    poolings = {name: MOE_FAMILIES[name].poolings[: 2 if name in BOTH_POOLINGS else 1] for name in families}
    return [MoeCase(family, pooling) for family in families for pooling in poolings[family]]


def meo_of_moe(stock: PreTrainedModel, **meo: Any) -> PreTrainedModel:
    """Return the MEO model of a stock mixture of experts, with its parameters by their own names."""
    values = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = meo_config_class(type(stock.config)).from_dict({**values, "meo": {"combine": "weights", **meo}})
    config._attn_implementation = stock.config._attn_implementation
    config._experts_implementation = stock.config._experts_implementation
    model = meo_model_class(type(stock))(config).eval()
    model.load_state_dict({**stock.state_dict(), **_stacks_of_modules(stock)}, strict=not _stacks_of_modules(stock))
    return model


def _stacks_of_modules(stock: PreTrainedModel) -> dict[str, Tensor]:
    """Return experts that are modules of their own, stacked under the names of the MEO model."""
    stacks = {}
    for path, module in stock.named_modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleDict):
            pairs = [linears_of(expert) for expert in experts_of(module.experts)]
            for at, name in enumerate(("up_proj", "down_proj")):
                stacks[f"{path}.experts.{name}"] = torch.stack([pair[at].weight for pair in pairs])
                if pairs[0][at].bias is not None:
                    stacks[f"{path}.experts.{name}_bias"] = torch.stack([pair[at].bias for pair in pairs])
    return stacks


def experts_of(experts: nn.ModuleDict) -> list[nn.Module]:
    return [module for name, module in experts.items() if name.startswith("expert_")]


def linears_of(expert: nn.Module) -> list[nn.Linear]:
    return [child for child in expert.children() if isinstance(child, nn.Linear)]


def moe_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the MoE blocks of a stock or a MEO model, found by what their experts hold."""
    return {path: module for path, module in model.named_modules() if _experts_parameters(module)}


def _experts_parameters(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return (module, name) of everything that one expert has a slice of, of a block of any layout."""
    experts = getattr(block, "experts", None)
    if hasattr(block, "input_linear") and hasattr(block, "router") and hasattr(block, "activation"):
        return [(block.input_linear, "weight"), (block.output_linear, "weight")]
    if isinstance(experts, nn.ModuleDict):
        each = experts_of(experts)
        return [(linear, name) for linear in linears_of(each[0]) for name, _ in linear.named_parameters()]
    if hasattr(getattr(experts, "mlp", None), "w1"):
        return [(experts.mlp, name) for name in ("w1", "v1", "w2")]
    own = dict(experts.named_parameters(recurse=False)) if isinstance(experts, nn.Module) else {}
    return [(experts, name) for name in own] if "down_proj" in own else []


def router_of(block: nn.Module) -> nn.Module:
    found = (getattr(block, name, None) for name in ("gate", "router"))
    return next(router for router in found if isinstance(router, nn.Module))


def make_experts_alike(model: PreTrainedModel) -> None:
    """Give every expert the first one's values, in place."""
    for block in moe_modules(model).values():
        if isinstance(getattr(block, "experts", None), nn.ModuleDict):
            first, *others = experts_of(block.experts)
            for other in others:
                other.load_state_dict(first.state_dict())
            continue
        for module, name in _experts_parameters(block):
            value = getattr(module, name).data
            size = value.shape[0] if not hasattr(module, "w1") else module.ffn_hidden_size
            rows = value[:1] if not hasattr(module, "w1") else value[:size]
            value.copy_(rows.expand_as(value) if not hasattr(module, "w1") else rows.repeat(len(value) // size, 1))


@dataclass
class Seen:
    """What one MoE block of a MEO model was given and gave, in one call."""

    tokens: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    experts_in: Tensor | None = None
    experts_out: Tensor | None = None


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[str, Seen]]:
    """Note what routers and experts see, by the block's path."""
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        for path, block in moe_modules(model).items():
            router, experts = router_of(block), _experts_module(block)

            def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
                seen[path] = Seen(args[0].clone(), (args[1:], kwargs))

            def after(_: Any, args: Any, output: Any, path: str = path) -> None:
                seen[path].experts_in, seen[path].experts_out = args[0].clone(), output.clone()

            stack.callback(router.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(experts.register_forward_hook(after).remove)
        yield seen


def _experts_module(block: nn.Module) -> nn.Module:
    """Return the module that maps tokens and gates to the experts' output."""
    if hasattr(block, "input_linear"):
        return block
    return getattr(block.experts, "mlp", block.experts)


def stock_gates(block: nn.Module, states: Tensor, arguments: Any = ((), {})) -> Tensor:
    """Return the stock router's gates for every expert [T, E], zero for those not selected."""
    router, (args, kwargs) = router_of(block), arguments
    name = type(router).__name__
    flat = states.reshape(-1, states.shape[-1])
    if name == "JetMoeTopKGating":
        logits = router.layer(flat)
        weights, index = logits.topk(router.top_k, -1)
        weights = weights.softmax(-1)
    elif name == "DbrxRouter":
        logits = router(states)
        weights, index = block.route_tokens_to_experts(logits)
    elif name == "Llama4Router":
        scores, logits = router(flat)
        return scores
    elif name in ("SwitchTransformersTop1Router", "NllbMoeTop2Router"):
        logits = router.classifier(flat.to(router.classifier.weight.dtype))
        probs = logits.softmax(-1)
        weights, index = probs.topk(1 if "Switch" in name else 2, -1)
        weights = weights if "Switch" in name else weights / weights.sum(-1, keepdim=True)
    else:
        logits, weights, index, *_ = router(states, *args, **kwargs)
        if not logits.is_floating_point():  # Granite's order up to Transformers 5.17
            logits, index = index, logits
    dense = torch.zeros(len(flat), logits.shape[-1], dtype=torch.float64)
    return dense.scatter_add(1, index.reshape(len(flat), -1), weights.reshape(len(flat), -1).double())


def merged_expert(block: nn.Module, gates: Tensor) -> nn.Module:
    """Return a copy of a stock block whose first expert is the mean of its experts, weighted by gates [E]."""
    made = copy.deepcopy(block)
    shares = gates / gates.sum()
    if isinstance(getattr(block, "experts", None), nn.ModuleDict):
        each = [expert.state_dict() for expert in experts_of(block.experts)]
        mean = {k: sum(s * e[k] for s, e in zip(shares, each, strict=True)) for k in each[0]}
        experts_of(made.experts)[0].load_state_dict(mean)
        return made
    for module, name in _experts_parameters(made):
        value = getattr(module, name).data
        if name.startswith(("w1", "v1", "w2")):
            value = value.view(-1, module.ffn_hidden_size, value.shape[-1])
        real = shares[: len(value)].to(value.dtype)
        if name != "post_expert_norm":
            value[0] = torch.einsum("e,e...->...", real, value[: len(real)])
    return made


def oracle(block: nn.Module, gates: Tensor, x: Tensor) -> Tensor:
    """Return s * f(x; sum_i g_i / s W_i) for gates [E] and tokens [T, D], by the stock expert's own forward."""
    experts = getattr(block, "experts", None)
    real = getattr(experts, "num_routed_experts", len(gates))  # beyond them an expert returns its input
    identity, gates = gates[real:].sum(), gates[:real]
    total = gates.sum()
    made = merged_expert(block, gates)
    if isinstance(experts, nn.ModuleDict):
        drop = getattr(experts, "moe_token_dropout", 0.0)
        return experts_of(made.experts)[0](x) * total * (1 - drop)
    if hasattr(block, "input_linear"):
        h = nn.functional.linear(x, made.input_linear.weight[0])
        gate, up = h.chunk(2, -1)
        return nn.functional.linear(block.activation(gate) * up, made.output_linear.weight[0]) * total + block.bias
    if hasattr(getattr(experts, "mlp", None), "w1"):
        mlp = made.experts.mlp
        parts = [getattr(mlp, n).view(-1, mlp.ffn_hidden_size, mlp.hidden_size)[0] for n in ("w1", "v1", "w2")]
        return mlp(x, *parts) * total
    if "Llama4" in type(block).__name__:
        stacked = made.experts
        gate, up = (x * total @ stacked.gate_up_proj[0]).chunk(2, -1)
        return (up * stacked.act_fn(gate)) @ stacked.down_proj[0]
    index = torch.tensor([0, 1]).expand(len(x), -1)  # the second with weight zero: LongCat wants two
    weights = torch.stack([total, torch.zeros_like(total)]).to(x.dtype).expand(len(x), -1)
    return made.experts(x, index, weights) + identity.to(x.dtype) * x


def pooled_gates(case: MoeCase, block: nn.Module, read: Tensor, arguments: Any, shape: int) -> Tensor:
    """Return a group's gates [E] from what it reads [D] or, in `probs`, from its tokens' mean gates [E]."""
    if case.pooling == "hidden":
        return stock_gates(block, read.reshape(*[1] * (shape - 1), -1), arguments)[0]
    kept = read.topk(case_top_k(block, read), -1)
    gates = torch.zeros_like(read).scatter(-1, kept.indices, kept.values)
    return gates * (read.sum() / gates.sum())


def case_top_k(block: nn.Module, read: Tensor) -> int:
    router = router_of(block)
    found = getattr(router, "top_k", None) or getattr(block, "top_k", None)
    if found is None:  # Gemma 4 reads its config
        found = router.config.top_k_experts
    return min(found, len(read))


def blocks_equal_the_oracle(case: MoeCase, prompts: tuple[int, ...] | None = None) -> None:
    """Every block computes what its definition says, group by group, for real tokens.

    With `prompts`, their lengths, what follows a prompt is an answer gated by all of it.
    """
    stock = case.stock().float()  # in double precision eager attention makes NaN of rows that see nothing
    level = {} if prompts is None else {"level": "sequence"}
    model, inputs = case.merged(stock, **level).float(), case.inputs()
    inputs |= {} if prompts is None else {"prompt_lengths": torch.tensor(prompts)}
    inputs["attention_mask"][0, slice(0, 3) if case.causal else slice(-3, None)] = 0
    mask = inputs["attention_mask"].bool()
    with torch.no_grad(), watched(model) as seen:
        outputs = model(**inputs)
        assert seen, "no MoE block ran"
        blocks = moe_modules(stock)
        for path, one in seen.items():
            partner = case.row.kind == "encoder-decoder" and "decoder" in path.split(".")
            rows = len(inputs["input_ids"])
            source = one.tokens
            if partner:
                source = outputs.encoder_last_hidden_state
            block = blocks[path]
            read = source.reshape(rows, -1, source.shape[-1])
            if case.pooling == "probs":
                dense = stock_gates(block, one.tokens, one.arguments)
                read = dense.reshape(rows, -1, dense.shape[-1])
            given = one.experts_in.reshape(rows, -1, one.experts_in.shape[-1])
            gave = one.experts_out.reshape(rows, -1, one.experts_out.shape[-1])
            for row in range(rows):
                known = read[row][mask[row]]
                own = slice(None) if partner else mask[row]
                x, y = given[row][own], gave[row][own]
                groups = (
                    [(slice(None), known.mean(0))]
                    if not case.causal
                    else gate_inputs(known, SEGMENT, prompts and prompts[row])
                )
                for tokens, state in groups:
                    gates = pooled_gates(case, block, state, one.arguments, one.tokens.dim())
                    assert_close(y[tokens], oracle(block, gates, x[tokens]), case.tolerance)


def one_token_groups_with_alike_experts_are_stock(case: MoeCase) -> None:
    """Where a group is one token and experts are alike, the whole block is the stock one, gates' sum and all."""
    stock = case.stock()
    make_experts_alike(stock)
    assert_close(*single_tokens(case, stock), case.tolerance)


def one_token_groups_with_one_expert_are_stock(case: MoeCase) -> None:
    """Where a group is one token and one expert is selected, merging has nothing to merge."""
    name = case.row.top_k
    stock = MoeCase(case.family, case.pooling, ((_key(case, str(name)), 1),)).stock()
    assert_close(*single_tokens(case, stock), case.tolerance)


def _key(case: MoeCase, name: str) -> str:
    from moe_tiny import SIZES

    return f"text_config.{name}" if "text_config" in SIZES[case.family] else name


def single_tokens(case: MoeCase, stock: PreTrainedModel, **meo: Any) -> tuple[Tensor, Tensor]:
    """Return what the MEO and the stock model compute of rows of one token; of an encoder-decoder the encoder's."""
    inputs = {name: value[:, :1] for name, value in case.inputs(rows=6).items()}
    with torch.no_grad():
        actual, expected = case.merged(stock, **meo)(**inputs), stock(**inputs)
    if case.row.kind == "encoder-decoder":
        return actual.encoder_last_hidden_state, expected.encoder_last_hidden_state
    return actual.logits, expected.logits


def later_tokens_change_nothing_before(case: MoeCase) -> None:
    """Changing a token leaves all logits before it as they were, and moves some after it."""
    model = case.merged(case.stock())
    inputs = case.inputs(length=8)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 5] = 5 + (changed["input_ids"][:, 5] + 11) % 80
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert_differs(after[:, 6:], before[:, 6:], 1e-4)


def pieces_equal_the_whole(case: MoeCase) -> None:
    """A text read in pieces beside a KV cache gives the logits of the text read at once, as stock does."""
    stock = case.stock()
    model, inputs = case.merged(stock), case.inputs(length=8)
    with torch.no_grad():
        whole, cache, parts = model(**inputs).logits, None, []
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):  # some mixers read one token at a time only
            step = {"input_ids": inputs["input_ids"][:, start:end], "past_key_values": cache, "use_cache": True}
            if case.family in POSITIONED:
                step["position_ids"] = torch.arange(start, end).expand(3, len(inputs["input_ids"]), -1)
            outputs = model(**step)
            cache, parts = outputs.past_key_values, [*parts, outputs.logits]
    assert_close(torch.cat(parts, 1), whole, 1e-4)


POSITIONED = ("qwen3_omni_moe_thinker",)


def padding_changes_nothing(case: MoeCase) -> None:
    """A row beside longer ones, padded, gives the logits that it gives alone."""
    model, inputs = case.merged(case.stock()), case.inputs(rows=2, length=8)
    ids = inputs["input_ids"]
    short = ids[:1, :5]
    inputs["attention_mask"][0, 5:] = 0
    ids[0, 5:] = ids[1, 5:]
    with torch.no_grad():
        alone = {"input_ids": short, "attention_mask": torch.ones_like(short)}
        rows = {"decoder_input_ids": inputs["decoder_input_ids"]} if "decoder_input_ids" in inputs else {}
        expected = model(**alone, **{k: v[:1] for k, v in rows.items()}).logits
        actual = model(**inputs).logits
    length = expected.shape[1]
    assert_close(actual[:1, :length], expected, 1e-4)


def gates_differ_between_groups(case: MoeCase) -> None:
    """Routers see what they should: groups of one batch select or weigh differently."""
    model = case.merged(case.stock())
    chosen = []

    def note(_: Any, args: Any, output: Any) -> None:
        chosen.append(args[1:3] if len(args) > 2 else None)

    with torch.no_grad(), ExitStack() as stack:
        for block in moe_modules(model).values():
            if not hasattr(block, "input_linear"):
                stack.callback(_experts_module(block).register_forward_hook(note).remove)
        model(**case.inputs())
    assert all(len(index.unique(dim=0)) > 1 or float(weights.std(0).max()) > 1e-3 for index, weights in chosen)
