"""Check a conversion in a process where meo_hf cannot be imported: run as `python -I verification_child.py REQUEST`.

Reads a JSON request, writes a JSON list of checks. Everything here is computed independently of the converter:
dense models come from the stock classes, expert weights from the files by their names on disk.
"""

import copy
import json
import re
import sys

sys.modules["meo_hf"] = None  # type: ignore[assignment]  # whoever loads this model may not have it

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.utils import logging  # noqa: E402

TOLERANCE = 1e-5


def relative_rms(a, b):
    """Root mean square of a - b, relative to b's; infinite where either is not finite."""
    a, b = a.double(), b.double()
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
    return error if error == error else float("inf")


def read(path, name, index=None):
    """Read a tensor by its name on disk, or one expert of a stack, as float32."""
    with safe_open(path, framework="pt") as file:
        return (file.get_tensor(name) if index is None else file.get_slice(name)[index]).float()


def product(request, factors, expert):
    """The product B A of an expert's factors, from the output's files."""
    down, up = (read(request["files"][factors[letter]], factors[letter], expert) for letter in "AB")
    return up.t() @ down


def inputs_for(config, kind):
    """Random inputs; the second row is padded where the family knows padding."""
    torch.manual_seed(0)
    if hasattr(config, "image_size") and kind == "encoder":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size)}
    length = min(16, getattr(config, "max_position_embeddings", 16) - 4)
    ids = torch.randint(0, config.vocab_size, (2, length))
    mask = torch.ones_like(ids)
    if kind != "decoder":
        mask[1, length // 2 :] = 0
        if config.pad_token_id is not None:
            ids[1, length // 2 :] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(0, config.vocab_size, (2, min(6, length)))
    return inputs


def first_tensor(outputs):
    """Logits, or the last hidden state."""
    found = getattr(outputs, "logits", None)
    return outputs[0] if found is None else found


def load_models(request):
    """Load the converted model through its Auto class, and the dense source through its stock class."""
    auto = getattr(transformers, request["auto_class"])
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = auto.from_pretrained(request["output"], trust_remote_code=True, **options)
    dense = getattr(transformers, request["dense_class"]).from_pretrained(
        request["source"], dtype=getattr(torch, request["dtype"])
    )
    if model.config.meo["level"] == "task":
        model.set_task(model.config.meo["tasks"][-1])
    return model.eval(), dense.float().eval(), info


def loading_check(info, missing):
    """Every tensor found its place, but for those that the source lacks too."""
    lost = sorted(set(info["missing_keys"]) - set(missing))
    wrong = {"missing": lost, "mismatched": sorted(map(str, info["mismatched_keys"]))}
    bad = {name: keys for name, keys in wrong.items() if keys}
    detail = "all tensors found their place" if not bad else f"{bad}"
    return {"name": "loads without meo_hf", "passed": not bad, "detail": detail[:500]}


def spread_routers(model):
    """Draw router weights so large that gates differ clearly between inputs."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".router." in name and not name.endswith(("noise_weight", "bias")):
            parameter.data.normal_(0, 1)


def force_expert(model, expert):
    """Make every router choose one expert with weight one."""

    def hook(module, args, output):
        gates, balance = output
        index = gates.top_k_index.clone()
        others = [e for e in range(module.weight.shape[0]) if e != expert]
        index[:, 0] = expert
        for k in range(1, index.shape[1]):
            index[:, k] = others[k - 1]
        weights = torch.zeros_like(gates.top_k_weights)
        weights[:, 0] = 1
        return type(gates)(index, weights), balance

    routers = [m for m in model.modules() if type(m).__name__ == "MeoRouter"]
    return [router.register_forward_hook(hook) for router in routers]


def set_dense_expert(request, dense, expert):
    """Give the dense model's feed-forwards the weights of one expert, read from its own file."""
    parameters = dict(dense.named_parameters())
    for live, source in request["experts"][expert].items():
        value = read(source["file"], source["name"], source["index"])
        if source.get("factors"):
            value = value.clone()
            value[slice(*source["rows"])] += product(request, source["factors"], source["factors"]["expert"])
        if source["index"] is not None:
            value = value[slice(*source["rows"])] if source["rows"] else value
            value = value.t() if source["transposed"] and value.dim() == 2 else value
        parameters[live].data.copy_(value.to(getattr(torch, source["dtype"])))


@torch.no_grad()
def check_full(request):
    """Compare whole models: the source itself where experts are copies, and single experts one by one."""
    model, dense, info = load_models(request)
    checks = [loading_check(info, request["missing"])]
    own = dict(model.named_parameters())
    for name in request["missing"]:  # both were drawn at random
        own[name].data.copy_(dict(dense.named_parameters())[name])
    inputs = inputs_for(dense.config, request["kind"])
    routed = {**inputs, "routing": "segment"} if model._meo_context.reads_past else inputs
    if request["copies"]:
        expected = first_tensor(dense(**inputs))
        for what in ("as saved", "spread"):
            if what == "spread":
                spread_routers(model)
            error = relative_rms(first_tensor(model(**routed)), expected)
            detail = f"relative RMS {error:.1e} (allowed {TOLERANCE:.0e}), fp32"
            checks.append(
                {"name": f"logits equal the source's, gates {what}", "passed": error <= TOLERANCE, "detail": detail}
            )
    checks += check_adapters(request, model, dense, inputs, routed)
    for expert in sorted({0, len(request["experts"]) - 1} if request["experts"] else ()):
        set_dense_expert(request, dense, expert)
        hooks = force_expert(model, expert)
        error = relative_rms(first_tensor(model(**routed)), first_tensor(dense(**inputs)))
        for hook in hooks:
            hook.remove()
        detail = f"relative RMS {error:.1e} (allowed {TOLERANCE:.0e}), fp32"
        checks.append({"name": f"logits with only expert {expert}", "passed": error <= TOLERANCE, "detail": detail})
    return checks


def round_factors(model, dtype):
    """Round PEFT's factors, B with its scale, to the type that they were asked to be written in."""
    if dtype is None:
        return
    kept = getattr(torch, dtype)
    for module in model.modules():
        for name in getattr(module, "lora_A", ()):
            scale = module.scaling[name]
            down, up = module.lora_A[name].weight.data, module.lora_B[name].weight.data
            down.copy_(down.to(kept))
            up.copy_((up * scale).to(kept))
            module.scaling[name] = 1.0 if scale else 0.0


def check_adapters(request, model, dense, inputs, routed):
    """Compare rows that have one adapter with PEFT's own model of base and adapter."""
    if not request["adapters"]:
        return []
    from peft import PeftModel

    worst, rows = (0.0, ""), len(next(iter(inputs.values())))
    for path, place in request["changed"].items():  # all adapters' mean, which its own check covers
        dense.get_parameter(f"{path}.weight").data.copy_(read(place["file"], place["name"]))
    for number, adapter in enumerate(request["adapters"]):
        base = copy.deepcopy(dense)
        holder, prefix = torch.nn.Module(), base.base_model_prefix
        setattr(holder, prefix, base)
        adapted = {"": base, f"{prefix}.": getattr(base, prefix, base)}.get(adapter["prefix"], holder)
        wrapped = PeftModel.from_pretrained(adapted, adapter["folder"]).eval()
        for path in request["changed"]:
            changed = base.get_submodule(path)
            for name in getattr(changed, "scaling", ()):
                changed.scaling[name] = 0.0
        round_factors(base, request["factor_type"])
        expected = first_tensor(base(**inputs))
        if model.config.meo["level"] == "task":
            found = first_tensor(model(**routed, task_ids=torch.full((rows,), number)))
        else:
            hooks = force_expert(model, number)
            found = first_tensor(model(**routed))
            for hook in hooks:
                hook.remove()
        del wrapped
        worst = max(worst, (relative_rms(found, expected), adapter["task"]))
    count, kept = len(request["adapters"]), worst[0] <= TOLERANCE
    detail = f"worst relative RMS {worst[0]:.1e} at {worst[1]} (allowed {TOLERANCE:.0e}), {count} adapters, fp32"
    return [{"name": "logits with one adapter equal PEFT's", "passed": kept, "detail": detail}]


def expert_part(request, block, name, expert):
    """One expert of a stack, [out, in]: from the checkpoint it is a copy of, or, if it was drawn, from the output."""
    disk, origins = block["stacks"][name], block["origins"]
    if block["factors"] and not name.endswith("_bias"):
        weight = read(request["files"][disk], disk, 0).clone()
        for factors in block["factors"].get(name, ()):
            weight[slice(*factors["rows"])] += product(request, factors, expert)
        return weight
    if not origins:
        return read(request["files"][disk], disk, expert)
    parts = [read(part["file"], part["name"]) for part in origins[expert % len(origins)][name]]
    if block["transposed"]:
        parts = [part.t() if part.dim() == 2 else part for part in parts]
    return torch.cat(parts).to(getattr(torch, block["dtypes"][name])).float()


def naive_feed_forward(request, block, x, activation, index, weights):
    """The merged feed-forward by its definition: tokens x [T, D], one group's experts and their weights."""

    def merged(name):
        if name not in block["stacks"]:
            return torch.zeros(())
        return sum(w * expert_part(request, block, name, e) for e, w in zip(index, weights, strict=True))

    h = x @ merged(block["first"]).t() + merged(block["first"] + "_bias")
    if block["gated"]:
        gate, value = h.chunk(2, -1)
        h = activation(gate) * value
    else:
        h = activation(h)
    return h @ merged("down_proj").t() + merged("down_proj_bias")


@torch.no_grad()
def check_sample(request):
    """Compare layer by layer, one layer in memory at a time."""
    reference = request["auto_map_class"]
    config = transformers.AutoConfig.from_pretrained(request["output"], trust_remote_code=True)
    model_class = get_class_from_dynamic_module(reference, request["output"])
    with torch.device("meta"):
        model = model_class(config)
    expected = set(request["live_names"])
    tied = set(model.all_tied_weights_keys)
    made = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))  # computed, in no file
    absent = expected | tied | set(request["missing"])
    lost = sorted(name for name in model.state_dict() if name not in absent and not made.search(name))
    checks = [
        {
            "name": "every tensor of the model is in the files",
            "passed": not lost,
            "detail": f"missing: {lost[:5]}" if lost else f"{len(expected)} tensors",
        }
    ]
    worst, worst_at = 0.0, ""
    for block in request["blocks"]:
        error = check_layer(request, model, block)
        if error >= worst:
            worst, worst_at = error, block["slot"]
    detail = (
        f"worst relative RMS {worst:.1e} at {worst_at} (allowed {TOLERANCE:.0e}), {len(request['blocks'])} layers, fp32"
    )
    checks.append({"name": "each layer equals its definition", "passed": worst <= TOLERANCE, "detail": detail})
    return checks


def check_layer(request, model, block):
    """Run one merged feed-forward alone on random tokens against its definition; returns the worst relative RMS."""
    module = model.get_submodule(block["slot"])
    module.to_empty(device="cpu").float().eval()
    for name, disk in block["parameters"].items():
        with safe_open(request["files"][disk], framework="pt") as file:
            module.get_parameter(name).data.copy_(file.get_tensor(disk))
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.startswith("router") and not name.endswith(("noise_weight", "bias")):
            parameter.data.normal_(0, 1)  # spread gates, so that a wrong choice shows
    error = max(one_group(request, model, module, block, seed) for seed in range(2))
    module.to("meta")
    return error


def one_group(request, model, module, block, seed):
    """Compare a merged feed-forward with its definition for one group of tokens."""
    routing = sys.modules[type(module._context).__module__]
    generator = torch.Generator().manual_seed(seed)
    width = module.experts.down_proj.shape[1]
    x = torch.randn(1, 8, width, generator=generator)
    encoded = torch.randn(1, 5, width, generator=generator)
    call = routing.Call(owner=0, outer=None, rows=1)
    if module.reads_encoder:
        call.causal = routing.CausalCall(x.shape[1], encoder=encoded.mean(1))
    if module.level == "task":
        call.task_ids = torch.tensor([seed % len(model.config.meo["tasks"])])
    seen = []

    def first_gates(router, args, output):
        # a definition by linear maps needs one choice: with a gate per map, all take the first one's
        seen.append((router, args[0], output[0]))
        return seen[0][2], output[1]

    routers = [m for m in module.modules() if type(m).__name__ == "MeoRouter"]
    hooks = [router.register_forward_hook(first_gates) for router in routers]
    module._context.current = call
    actual = module(x)
    module._context.current = None
    for hook in hooks:
        hook.remove()
    router, pooled, _ = seen[0]
    weight = router.weight
    logits = pooled @ weight.t() if pooled.is_floating_point() else weight[:, pooled].t()
    logits = logits if getattr(router, "bias", None) is None else logits + router.bias
    top, index = logits.topk(router.top_k, 1)
    tokens = x if module.adapter is None else module.adapter(x)
    expected = naive_feed_forward(request, block, tokens[0], module.activation, index[0].tolist(), top[0].softmax(0))
    return relative_rms(actual[0], expected)


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
