"""Contracts that every family keeps, as functions of a case; each raises AssertionError where it is broken."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, variance
from typing import Any

import torch
from meo_hf.modeling.families_meo import FAMILIES, LEVELS
from meo_hf.modeling.feedforward_meo import MeoFeedForward
from meo_hf.modeling.router_meo import Gates, MeoRouter
from tiny import VOCAB, draw_experts, inputs_as, main_class, meo_of, merged_of, recorded_gates, tiny_dense, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

TASKS = ["a", "b", "c"]
LENGTHS = (8, 5, 3)
PROMPTS = (5, 3, 2)
SEGMENT = 3
FEW = ("llama", "gpt2", "opt")  # decoders that stand for all at levels which share their code with `segment`
SCOPES = ("ffn", "projection")
POSITION_OFFSET = {"roberta": 2, "xlm-roberta": 2, "mpnet": 2}
RELATIVE = ("t5", "mt5")


@lru_cache(maxsize=4)
def _dense(family: str, overrides: tuple[tuple[str, Any], ...], every_dropout: float) -> PreTrainedModel:
    return tiny_dense(family, every_dropout=every_dropout, **dict(overrides))


@dataclass(frozen=True)
class Case:
    """A family with a level, a gate scope, and config values that differ from the tiny ones."""

    family: str
    level: str
    scope: str = "ffn"
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def kind(self) -> str:
        return FAMILIES[self.family].kind

    @property
    def causal(self) -> bool:
        """Whether gates read what came before in the same text."""
        return self.kind == "decoder" and self.level != "task"

    def dense(self, every_dropout: float = 0.0) -> PreTrainedModel:
        """Return the stock model, shared with other cases: copy it before a change."""
        return _dense(self.family, self.overrides, every_dropout).eval()

    def identical(self, dense: PreTrainedModel, **meo: Any) -> PreTrainedModel:
        """Return the MEO model whose experts are all the dense feed-forward."""
        own = {"tasks": TASKS} if self.level == "task" else {"segment_length": SEGMENT} if self.causal else {}
        return meo_of(dense, **{"level": self.level, "gate_scope": self.scope, **own, **meo})

    def drawn(self, **meo: Any) -> PreTrainedModel:
        """Return a MEO model whose experts were drawn one by one, in double precision."""
        return draw_experts(self.identical(self.dense(), **meo)).double()

    def inputs(self, **options: Any) -> dict[str, Tensor]:
        """Return a batch without padding, with a task or a prompt length per row where the level reads one."""
        inputs = tiny_inputs(self.family, **options)
        rows = len(next(iter(inputs.values())))
        if self.level == "task":
            inputs["task_ids"] = torch.arange(rows) % len(TASKS)
        elif self.causal and self.level != "segment":
            inputs["prompt_lengths"] = torch.tensor(PROMPTS)[torch.arange(rows) % len(PROMPTS)]
        return inputs_as(inputs, torch.double)

    def accepts(self, name: str) -> bool:
        """Return whether the model takes an argument."""
        return name in inspect.signature(main_class(self.family).forward).parameters


def cases(scopes: tuple[str, ...] = SCOPES, families: Any = FAMILIES) -> list[Case]:
    """Return every level of every family in the given scopes."""
    made = [Case(f, level, scope) for f in families for level in LEVELS[FAMILIES[f].kind] for scope in scopes]
    return [case for case in made if not case.causal or case.level == "segment" or case.family in FEW]


def stock_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the dense model takes."""
    return {name: value for name, value in inputs.items() if name not in ("task_ids", "prompt_lengths")}


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of one forward pass."""
    return model(**inputs).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare the root mean square of the difference with that of what is expected."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_differs(actual: Tensor, expected: Tensor, least: float = 1e-3) -> None:
    """Fail if two results are so close that a comparison of them shows nothing."""
    error = float((actual - expected).double().pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt())
    assert error >= least, f"relative difference {error:.2e}: the comparison is vacuous"


def cv_squared(x: list[float]) -> float:
    """Squared coefficient of variation, unbiased."""
    return variance(x) / fmean(x) ** 2


def parameters_of_map(module: MeoFeedForward, name: str) -> list[tuple[Tensor, slice]]:
    """Return weight and bias of one linear map with the rows [E, rows, ...] that belong to it."""
    experts = module.experts
    fused = name in ("gate_proj", "up_proj") and hasattr(experts, "gate_up_proj")
    own = "gate_up_proj" if fused else name
    width = getattr(experts, own).shape[1]
    rows = {"gate_proj": slice(0, width // 2), "up_proj": slice(width // 2, width)}[name] if fused else slice(None)
    found = [getattr(experts, own), getattr(experts, f"{own}_bias")]
    return [(parameter, rows) for parameter in found if parameter is not None]


def selections(model: PreTrainedModel, gates: dict[str, list[Gates]]) -> Iterator[tuple[list[Any], list[int], Any]]:
    """Yield, per router: the parameters it chooses among, the experts it chose, and the router."""
    for path, module in merged_of(model).items():
        for name in module.maps:
            at = f"{path}.router" if module.scope == "ffn" else f"{path}.router.{name}"
            chosen = sorted({int(i) for g in gates[at] for i in g.top_k_index.flatten()})
            yield parameters_of_map(module, name), chosen, model.get_submodule(at)


def identical_experts_are_dense(case: Case, train: bool = False, every_dropout: float = 0.0, **meo: Any) -> None:
    """Identical experts, however they are weighted, are the dense model."""
    dense = case.dense(every_dropout=every_dropout)
    model = case.identical(dense, router="top_k", **meo)
    inputs = inputs_as(case.inputs(), torch.float)
    dense.train(train), model.train(train)
    torch.manual_seed(3)
    expected = logits_of(dense, stock_inputs(inputs))
    torch.manual_seed(3)
    assert_close(logits_of(model, inputs), expected)


def one_expert_is_dense(case: Case) -> None:
    """A single expert is the dense model: to the bit where the whole batch shares its gate."""
    dense = case.dense()
    inputs = inputs_as(case.inputs(), torch.float)
    expected = logits_of(dense, stock_inputs(inputs))
    model = case.identical(dense, num_experts=1, top_k=1)
    assert_close(logits_of(model, inputs), expected)
    if case.level == "task":
        model.set_task("b")
        actual = logits_of(model, stock_inputs(inputs))
        if case.family == "gpt2":  # its Conv1D multiplies by a transposed weight, which rounds differently
            assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected)


@torch.no_grad()
def permuted_experts_change_nothing(case: Case) -> None:
    """The order of the experts, moved with their router rows, means nothing."""
    model, inputs = case.drawn(), case.inputs()
    expected = logits_of(model, inputs)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    for module in merged_of(model).values():
        for parameter in (*module.experts.parameters(), *module.router.parameters()):
            assert parameter.shape[0] == len(order)
            parameter.copy_(parameter[order])
    assert_close(logits_of(model, inputs), expected)


def weights_combined_are_outputs_combined(case: Case) -> None:
    """Merging weights first is the same function as adding the outputs of each linear map."""
    model, inputs = case.drawn(), case.inputs()
    other = case.drawn(combine="outputs")
    assert {m.experts.combine for m in merged_of(other).values()} == {"outputs"}
    assert_close(logits_of(other, inputs), logits_of(model, inputs))
    assert_close(logits_of(other.float(), inputs_as(inputs, torch.float)), logits_of(model, inputs), 1e-5)


def gates_differ_between_inputs(case: Case) -> None:
    """Routers see what they should: logits spread by more than one, other experts for other rows."""
    model = case.drawn()
    with recorded_gates(model) as gates:
        logits_of(model, case.inputs())
    chosen = [len({tuple(row) for g in found for row in g.top_k_index.tolist()}) for found in gates.values()]
    assert max(chosen) > 1, "every router chose alike for all rows"
    heard = []
    for found in gates.values():
        index, weights = torch.cat([g.top_k_index for g in found]), torch.cat([g.top_k_weights for g in found])
        assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=weights.dtype))
        heard.append(float(torch.zeros(len(weights), 6, dtype=weights.dtype).scatter(1, index, weights).std(0).max()))
    assert sum(spread > 1e-2 for spread in heard) >= len(heard) / 2, "most routers weighted alike for all rows"


def gate_inputs(read: Tensor, segment: int | None, prompt: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens that share a gate, and what it reads of tokens [T, D]: all, or what a causal gate may know."""
    if segment is None:
        yield slice(None), read.mean(0)
        return
    end = len(read) if prompt is None else prompt
    for start in range(0, end, segment):
        known = read[0] if start == 0 else read[start - segment : start].mean(0)
        yield slice(start, min(start + segment, end)), known
    if end < len(read):
        yield slice(end, None), read[:end].mean(0)


def reference_row(
    module: MeoFeedForward,
    tokens: Tensor,
    known: Tensor | None,
    task: Tensor | None,
    segment: int | None = None,
    prompt: int | None = None,
) -> Tensor:
    """Run one row's real tokens [T, D] the slow way: every selected expert's map, weighted and added.

    The gates read the task, else `known` [S, D] where another stack's output is given, else the map's own input.
    """

    def linear(name: str, x: Tensor, read: Tensor) -> Tensor:
        groups = gate_inputs(read, segment, prompt)
        return torch.cat([merged(name, x[tokens], context) for tokens, context in groups])

    def merged(name: str, x: Tensor, context: Tensor) -> Tensor:
        router = module.router if module.scope == "ffn" else module.router[name]
        logits = router.weight @ context if task is None else router.weight[:, task]
        chosen = logits.argsort(descending=True)[: router.top_k].tolist()
        gates = logits[chosen].exp() / logits[chosen].exp().sum()
        total = torch.zeros(())
        for gate, expert in zip(gates, chosen, strict=True):
            weight, *bias = [p[expert, rows] for p, rows in parameters_of_map(module, name)]
            total = total + gate * (x @ weight.t() + sum(bias))
        return total

    adapted = tokens
    if module.level == "token":
        down, up = module.adapter.down, module.adapter.up
        adapted = tokens + (tokens @ down.weight.t() + down.bias).clamp(min=0) @ up.weight.t() + up.bias
    read = tokens if known is None else known
    first = [part for name in module.maps[:-1] for part in linear(name, adapted, read).chunk(1 + name.count("_up_"), 1)]
    h = module.activation(first[0]) * (first[1] if len(first) == 2 else 1)
    return linear("down_proj", h, h if known is None and module.scope == "projection" else read)


def merged_feed_forward_is_reference(case: Case) -> None:
    """Every merged feed-forward computes what a loop over rows and experts computes, level by level."""
    model = case.drawn()
    inputs, mask = padded(case, "right") if "input_ids" in case.inputs() else (case.inputs(), None)
    calls: list[tuple[str, Tensor, Tensor]] = []
    for path, module in merged_of(model).items():
        module.register_forward_hook(lambda _m, args, out, path=path: calls.append((path, args[0], out)))
    with torch.no_grad():
        outputs = model(**inputs)
        for path, x, actual in calls:
            partner = case.kind == "encoder-decoder" and "decoder" in path.split(".")
            read = outputs.encoder_last_hidden_state if partner else None
            for row in range(len(outputs.logits)):
                shape = (len(outputs.logits), -1, x.shape[-1])
                real = slice(None) if mask is None else mask[row].bool()
                own = slice(None) if partner else real
                known = read[row][real] if partner else None
                task = inputs["task_ids"][row] if case.level == "task" else None
                causal = (SEGMENT, int(inputs["prompt_lengths"][row]) if "prompt_lengths" in inputs else None)
                expected = reference_row(
                    model.get_submodule(path), x.reshape(shape)[row][own], known, task, *causal if case.causal else ()
                )
                assert_close(actual.reshape(shape)[row][own], expected, 1e-9)


def every_layer_is_merged(case: Case) -> None:
    """No dense feed-forward is left in any stack."""
    model = case.drawn()
    config = model.config
    stacks = 2 if case.kind == "encoder-decoder" else 1
    layers = getattr(config, "num_hidden_layers", 2) * stacks
    if case.family == "albert":
        layers = config.num_hidden_groups * config.inner_group_num
    assert len(merged_of(model)) == layers
    with recorded_gates(model) as gates:
        before = logits_of(model, case.inputs())
    assert len(gates) == len([m for m in model.modules() if isinstance(m, MeoRouter)]), "a router was never asked"
    for module in merged_of(model).values():
        kept = {name: value.clone() for name, value in module.experts.state_dict().items()}
        draw_experts(module, seed=9)
        assert_differs(logits_of(model, case.inputs()), before)
        module.experts.load_state_dict(kept)


def padded(
    case: Case, side: str, fill: int | None = None, lengths: tuple[int, ...] = LENGTHS
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch whose rows are cut to lengths and padded again, and its mask; `fill` None is garbage."""
    inputs = case.inputs()
    width = inputs["input_ids"].shape[1]
    places = torch.arange(width).expand(len(lengths), -1)
    keep = torch.tensor(lengths)[:, None]
    mask = (places < keep if side == "right" else places >= width - keep).long()
    filler = torch.randint(5, VOCAB, mask.shape, generator=torch.Generator().manual_seed(7))
    ids = inputs["input_ids"]
    shift = 0 if side == "right" else width - keep
    moved = ids.gather(1, (places - shift).clamp(min=0))
    inputs["input_ids"] = torch.where(mask.bool(), moved, filler if fill is None else torch.full_like(ids, fill))
    inputs["attention_mask"] = mask
    if case.accepts("position_ids"):
        first = POSITION_OFFSET.get(case.family, 0)
        inputs["position_ids"] = torch.where(mask.bool(), mask.cumsum(1) - 1 + first, 1)
    return inputs, mask


def sides(case: Case) -> tuple[str, ...]:
    """Return the sides on which a family may be padded: absolute positions without a say allow the right only."""
    if case.family == "vit":
        return ()
    return ("right", "left") if case.accepts("position_ids") or case.family in RELATIVE else ("right",)


def padding_changes_nothing(case: Case, side: str) -> None:
    """A padded batch gives each row what it gets alone, whatever the padding holds."""
    model = case.drawn()
    if case.family == "gemma2":
        model.float()  # its eager attention takes the softmax of a double mask's minimum in single precision: NaN
    alone = [logits_of(model, row) for row in single_rows(case)]
    for fill in (1, None):
        batch, mask = padded(case, side, fill)
        compare_rows(logits_of(model, batch), alone, mask, case)
    batch, mask = padded(case, side)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    batch["inputs_embeds"] = torch.where(mask.bool()[..., None], embeds, torch.full_like(embeds, 1e4))
    compare_rows(logits_of(model, batch), alone, mask, case)


def single_rows(case: Case) -> Iterator[dict[str, Tensor]]:
    """Yield each row alone, without padding."""
    for row, length in enumerate(LENGTHS):
        single = {name: value[row : row + 1] for name, value in case.inputs().items()}
        yield {n: v[:, :length] if n in ("input_ids", "attention_mask") else v for n, v in single.items()}


def compare_rows(logits: Tensor, alone: list[Tensor], mask: Tensor, case: Case) -> None:
    """Compare each row's logits at its real positions with those it gets alone."""
    for row, expected in enumerate(alone):
        actual = logits[row] if case.kind == "encoder-decoder" else logits[row][mask[row].bool()]
        assert_close(actual, expected[0], 1e-5 if actual.dtype == torch.float else 1e-6)


def rows_do_not_meet(case: Case) -> None:
    """A row gets in a batch what it gets alone."""
    model, inputs = case.drawn(), case.inputs()
    batch = logits_of(model, inputs)
    for row in range(len(batch)):
        alone = logits_of(model, {name: value[row : row + 1] for name, value in inputs.items()})
        assert_close(batch[row], alone[0])


def later_tokens_change_nothing(case: Case) -> None:
    """What a decoder says at a position does not depend on later tokens, wherever they begin."""
    model, inputs = case.drawn(), case.inputs()
    name = "decoder_input_ids" if case.kind == "encoder-decoder" else "input_ids"
    ids, before = inputs[name], logits_of(model, inputs)
    for known in range(1, ids.shape[1]):
        changed = torch.cat([ids[:, :known], 5 + (ids[:, known:] + 1) % 90], 1)
        after = logits_of(model, {**inputs, name: changed})
        assert_differs(after[:, known:], before[:, known:])
        assert_close(after[:, :known], before[:, :known])


def gradients_reach_what_was_selected(case: Case, **meo: Any) -> None:
    """Router and selected experts get gradients; unselected experts get none, and may hold NaN."""
    few = {"rows": 1, "length": 6} if case.causal else {"rows": 2}  # so that experts remain unselected
    model, inputs = case.drawn(**meo), case.inputs(**few)
    with recorded_gates(model) as gates:
        model(**inputs).logits.pow(2).mean().backward()
    expected = logits_of(model, inputs)
    unselected = []
    for parameters, chosen, router in selections(model, gates):
        assert len(chosen) < 6, "all experts were selected: nothing to compare with"
        reached = router.weight.grad is not None and router.weight.grad[chosen].abs().sum(1).min() > 0
        assert reached, "a selected expert's gate got no gradient"
        for parameter, rows in parameters:
            for expert in range(6):
                found = bool((parameter.grad[expert, rows] != 0).any())
                assert found == (expert in chosen), f"expert {expert}, selected {chosen}"
            unselected += [(parameter, expert, rows) for expert in set(range(6)) - set(chosen)]
    with torch.no_grad():
        for parameter, expert, rows in unselected:
            parameter[expert, rows] = torch.nan
    torch.testing.assert_close(logits_of(model, inputs), expected)


def underflowing_gates_stay_finite(case: Case) -> None:
    """Gates that underflow to zero leave the selected expert alone, with finite losses and gradients."""
    model, inputs = case.drawn(), case.inputs()
    winner = case.drawn(top_k=1)
    for one in (model, winner):
        for name, parameter in one.named_parameters():
            if ".router." in name and not name.endswith("noise_weight"):
                parameter.data.mul_(1e8)
    with recorded_gates(model) as gates:
        logits = model(**inputs).logits
    assert all((g.top_k_weights[:, -1] == 0).any() for found in gates.values() for g in found), "no gate underflowed"
    assert_close(logits.detach(), logits_of(winner, inputs))
    model.train()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def task_ids_are_tasks_one_by_one(case: Case) -> None:
    """A batch of several tasks gives each row what it gets with its task set."""
    model, inputs = case.drawn(), stock_inputs(case.inputs())
    tasks = [2, 0, 2]
    mixed = logits_of(model, {**inputs, "task_ids": torch.tensor(tasks)})
    by_task = {}
    for task in (0, 2):
        model.set_task(TASKS[task])
        by_task[task] = logits_of(model, inputs)
    assert_differs(by_task[0], by_task[2])
    for row, task in enumerate(tasks):
        assert_close(mixed[row], by_task[task][row])
    ids = torch.tensor(tasks)
    assert torch.equal(logits_of(model, {**inputs, "task_ids": ids}), mixed), "set_task overrode task_ids"
