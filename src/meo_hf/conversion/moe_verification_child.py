"""Check a converted mixture of experts in a process where meo_hf cannot be imported: run with `python -I`.

Reads a JSON request, writes a JSON list of checks. What is expected comes from the stock classes alone.
"""

import copy
import json
import sys

sys.modules["meo_hf"] = None  # type: ignore[assignment]  # whoever loads this model may not have it

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.utils import logging  # noqa: E402

TOLERANCE = 1e-4


def relative_rms(a, b):
    """Root mean square of a - b, relative to b's; infinite where either is not finite."""
    a, b = a.double(), b.double()
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
    return error if error == error else float("inf")


def text_holder(config, path):
    """Return the sub-config that holds a key of the text config, and the key."""
    *parents, name = path.split(".")
    holder = config.get_text_config(decoder=True)
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name


def load(request, top_k=None):
    """Load the converted model through its Auto class and the source through its stock class, both as fp32."""
    auto = getattr(transformers, request["auto_class"])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    stock_class = getattr(transformers, request["stock_class"])
    config = transformers.AutoConfig.from_pretrained(request["source"])
    extra = {"meo": {"segment_length": 4}} if request["kind"] == "decoder" else {}
    if request["top_k"] is not None and top_k is None:
        top_k = request["experts_per_gate"]
    if top_k is not None:
        holder, name = text_holder(config, request["top_k"])
        old = getattr(holder, name)
        setattr(holder, name, [top_k] * len(old) if isinstance(old, list) else top_k)
        extra.setdefault("meo", {})["top_k"] = top_k
    model, info = auto.from_pretrained(
        request["output"], trust_remote_code=True, output_loading_info=True, **options, **extra
    )
    stock = stock_class.from_pretrained(request["source"], config=config, **options)
    for live, (path, name) in request["stacks"].items():
        multiply_out(model.get_submodule(path), name, live.rpartition(".")[2], stock, live)
    return model.eval(), stock.eval(), info


def multiply_out(module, name, parameter, stock, live):
    """Give the stock model the experts that low-rank ones are: W_0 + B A; where it keeps modules, it stays as it is."""
    own = dict(stock.named_parameters()).get(live)
    if own is None:
        return
    factors = module.low_rank[name.removesuffix("_proj")]
    whole = module.stack(name)[0].data + factors.B.data.transpose(1, 2) @ factors.A.data
    probe = copy.copy(module)
    probe._parameters = {**module._parameters, parameter: own}
    probe.stack(name)[0].data[: len(whole)].copy_(whole)


def loading_check(request, info):
    """Every tensor found its place, but for those that the source lacks too."""
    lost = sorted(set(info["missing_keys"]) - set(request["missing"]))
    wrong = {"missing": lost, "mismatched": sorted(map(str, info["mismatched_keys"]))}
    wrong["unexpected"] = sorted(info["unexpected_keys"])
    bad = {name: keys[:5] for name, keys in wrong.items() if keys}
    detail = "all tensors found their place" if not bad else f"{bad}"
    return {"name": "loads without meo_hf", "passed": not bad, "detail": detail[:500]}


def tensors_check(request, model, stock):
    """Every tensor that both models have under one name holds the same values; low-rank experts stand for others."""
    state, expected = model.state_dict(), stock.state_dict()
    state = {
        name: tensor for name, tensor in state.items() if name not in request["stacks"] and ".low_rank." not in name
    }
    expected |= {name: stack_of(stock, name) for name in state if name not in expected}
    shared = [name for name in expected if name in state]
    differing = [name for name in shared if not torch.equal(state[name], expected[name])]
    detail = f"{len(shared)} of {len(state)} tensors" + (f"; differs: {differing[:3]}" if differing else "")
    return {"name": "tensors equal the source's", "passed": not differing and bool(shared), "detail": detail}


def stack_of(stock, name):
    """Stack what the stock model keeps in one module per expert, as a stack of this name should hold it."""
    path, _, stack = name.rpartition(".")
    experts = [module for key, module in stock.get_submodule(path).items() if key.startswith("expert_")]
    place = 0 if stack.startswith("up_proj") else 1
    linears = [[child for child in expert.children() if isinstance(child, torch.nn.Linear)] for expert in experts]
    return torch.stack([getattr(pair[place], "bias" if stack.endswith("_bias") else "weight") for pair in linears])


def single_tokens(stock, kind):
    """Return a few rows of one token each."""
    vocabulary = stock.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 8)[:, None] * 7 % (vocabulary - 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids} if kind == "encoder-decoder" else inputs


def run(model, inputs):
    """Run a model; gates that read a prompt are told that all of it is one."""
    context = getattr(model, "_meo_context", None)
    return model(**inputs, **({"routing": "segment"} if context is not None and context.reads_past else {}))


def compare(name, model, stock, kind, inputs):
    """Compare what both models compute; of an encoder-decoder the encoder, whose gates read its own input."""
    with torch.no_grad():
        actual, expected = run(model, inputs), run(stock, inputs)
    if kind == "encoder-decoder":
        actual, expected = actual.encoder_last_hidden_state, expected.encoder_last_hidden_state
    else:
        actual, expected = actual[0], expected[0]
    error = relative_rms(actual, expected)
    detail = f"relative RMS {error:.1e} (allowed {TOLERANCE:.0e}), fp32"
    return {"name": name, "passed": error <= TOLERANCE, "detail": detail}


def make_experts_alike(model):
    """Give all experts of each stack the first one's values, in place."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and "shared" not in name and ".expert_" not in name and parameter.dim() > 1:
            parameter.data.copy_(parameter.data[:1].expand_as(parameter.data))


def texts(stock, kind):
    """Return two rows of several segments each, one of them padded."""
    vocabulary = stock.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(24).reshape(2, 12) * 7 + 3) % (vocabulary - 1)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids[:, :5]} if kind == "encoder-decoder" else inputs


def combine_outputs(model, combine):
    """Make every block merge weights, or combine the outputs of each linear map, which is the same function."""
    for module in model.modules():
        if hasattr(module, "merged_maps"):
            module.combine = combine


def check_ways(model, stock, kind):
    """Merging weights gives what combining each linear map's outputs gives, over groups of several tokens."""
    inputs, found = texts(stock, kind), []
    for combine in ("weights", "outputs"):
        combine_outputs(model, combine)
        found.append(run(model, inputs).logits)
    combine_outputs(model, "weights")
    error = relative_rms(*found)
    passed = bool(torch.isfinite(found[0]).all()) and error <= TOLERANCE
    detail = f"relative RMS {error:.1e} (allowed {TOLERANCE:.0e}), fp32"
    return {"name": "merged weights compute what combined outputs do", "passed": passed, "detail": detail}


def watch(model, path):
    """Note what a block's router and experts are given, and what the experts give."""
    block, seen = model.get_submodule(path), {}
    router = next(r for r in (getattr(block, "gate", None), getattr(block, "router", None)) if r is not None)

    def before(module, args, kwargs):
        seen["tokens"], seen["more"] = args[0].clone(), (args[1:], kwargs)

    def after(module, args, output):
        seen["given"], seen["gave"] = args[0].clone(), output.clone()

    router.register_forward_pre_hook(before, with_kwargs=True)
    block.experts.register_forward_hook(after)
    return seen


def stock_router(stock, path, states, more):
    """Return the stock router's gates for all experts."""
    block = stock.get_submodule(path)
    router = next(r for r in (getattr(block, "gate", None), getattr(block, "router", None)) if r is not None)
    logits, weights, index = router(states, *more[0], **more[1])[:3]
    if not logits.is_floating_point():
        logits, index = index, logits
    dense = torch.zeros(states.shape[:-1].numel(), logits.shape[-1])
    return dense.scatter_add(1, index.flatten(0, -2), weights.flatten(0, -2).float())


def merged_block(experts, gates, x):
    """Run tokens through a copy of the stock experts whose first one is the mean of all, weighted by gates."""
    made, total = copy.deepcopy(experts), gates.sum()
    for parameter in made.parameters(recurse=False):
        parameter.data[0] = torch.einsum("e,e...->...", gates / total, parameter.data)
    index = torch.tensor([0, 1]).expand(len(x), -1)
    return made(x, index, torch.stack([total, torch.zeros(())]).expand(len(x), -1))


def group_reads(known, segment):
    """Yield the tokens of each segment, and what its gate reads: the segment before, in the first its first token."""
    for start in range(0, len(known), segment):
        read = known[0] if start == 0 else known[start - segment : start].mean(0)
        yield slice(start, start + segment), read


def check_definition(request, model, stock):
    """The last MoE block computes its definition for each segment of several tokens, from stock modules alone."""
    path = request["blocks"][-1]
    seen, inputs = watch(model, path), texts(stock, request["kind"])
    run(model, inputs)
    top_k, worst = request["experts_per_gate"], 0.0
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        tokens, given, gave = (
            seen[n].reshape(2, -1, seen[n].shape[-1])[row][real] for n in ("tokens", "given", "gave")
        )
        rank = [1] * (seen["tokens"].dim() - 1)
        known = tokens
        if model.config.meo["pooling"] == "probs":
            known = stock_router(stock, path, tokens.reshape(*rank[1:], *tokens.shape), seen["more"])
        segment = model.config.meo["segment_length"] if request["kind"] == "decoder" else None
        groups = group_reads(known, segment) if segment else [(slice(None), known.mean(0))]
        for group, read in groups:
            if model.config.meo["pooling"] == "probs":
                kept = read.topk(top_k)
                gates = torch.zeros_like(read).scatter(0, kept.indices, kept.values)
                gates = gates * (read.sum() / gates.sum())
            else:
                gates = stock_router(stock, path, read.reshape(*rank, -1), seen["more"])[0]
            expected = merged_block(stock.get_submodule(path).experts, gates, given[group])
            worst = max(worst, relative_rms(gave[group], expected))
    detail = f"worst relative RMS {worst:.1e} (allowed {TOLERANCE:.0e}) at {path}, fp32"
    return {"name": "groups of several tokens compute their definition", "passed": worst <= TOLERANCE, "detail": detail}


@torch.no_grad()
def check_full(request):
    """Compare whole models on single tokens, whose gates are the source's own."""
    model, stock, info = load(request)
    checks = [loading_check(request, info)]
    if not request["aligned"]:
        checks.append(tensors_check(request, model, stock))
    elif request["kind"] != "encoder-decoder":
        own = type(stock).from_pretrained(
            request["output"], config=stock.config, dtype=torch.float32, attn_implementation="eager"
        )
        inputs = {"input_ids": torch.arange(3, 19)[None] % 90}
        checks.append(compare("aligned experts compute what the source's do", own.eval(), stock, "decoder", inputs))
    checks.append(check_ways(model, stock, request["kind"]))
    if request["definable"] and not request["aligned"]:
        checks.append(check_definition(request, model, stock))
    if request["stackable"] and request["same_top_k"]:
        make_experts_alike(model), make_experts_alike(stock)
        inputs = single_tokens(stock, request["kind"])
        checks.append(compare("single tokens, experts made alike", model, stock, request["kind"], inputs))
    del model, stock
    if request["top_k"] is not None and not request["aligned"]:
        model, stock, _ = load(request, top_k=1)
        inputs = single_tokens(stock, request["kind"])
        checks.append(compare("single tokens with top_k 1", model, stock, request["kind"], inputs))
    return checks


def check_sample(request):
    """Build the class from the shipped code without its weights, and find a place for every tensor's name."""
    config = transformers.AutoConfig.from_pretrained(request["output"], trust_remote_code=True)
    model_class = get_class_from_dynamic_module(request["auto_map_class"], request["output"])
    with torch.device("meta"):
        model = model_class(config)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    found = set()
    for name in sorted(request["on_disk"], key=dot_natural_key):
        live = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        if live not in state and name in state:
            live = rename_source_key(name, [], [], model.base_model_prefix, state)[0]
        found.add(live)
    lost = sorted(set(state) - found - set(model.all_tied_weights_keys) - set(request["missing"]))
    detail = f"missing: {lost[:5]}" if lost else f"{len(state)} tensors; headers only, no tensor was loaded"
    return [{"name": "every tensor of the model is in the files", "passed": not lost, "detail": detail}]


def main():
    """Read the request, run the checks, write the answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checks = check_full(request) if request["mode"] == "full" else check_sample(request)
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(checks, file)


if __name__ == "__main__":
    main()
