"""Check a reduced mixture in a process where meo_hf cannot be imported: run with `python -I`.

Reads a JSON request, writes a JSON list of checks. What is expected comes from the stock classes and the plan alone.
"""

import json
import sys

sys.modules["meo_hf"] = None  # type: ignore[assignment]  # whoever loads this model may not have it

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.utils import logging  # noqa: E402


def load(request):
    """Load the reduced model as its users do, and the source through its stock class, both as fp32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    if request["own"]:
        made = getattr(transformers, request["auto_class"])
        model, info = made.from_pretrained(request["output"], trust_remote_code=True, **options)
    else:
        model, info = getattr(transformers, request["stock_class"]).from_pretrained(request["output"], **options)
    stock_class = getattr(transformers, request["stock_class"])
    stock = None
    if request["mode"] == "full":
        stock = stock_class.from_pretrained(request["source"], **{**options, "output_loading_info": False})
        stock = stock.eval()
    return model.eval(), stock, info


def loading_check(request, info):
    """Every tensor found its place, but for those that the source lacks too."""
    wrong = {"missing": sorted(set(info["missing_keys"]) - set(request["missing"]))}
    wrong["mismatched"] = sorted(map(str, info["mismatched_keys"]))
    wrong["unexpected"] = sorted(info["unexpected_keys"])
    bad = {name: keys[:5] for name, keys in wrong.items() if keys}
    how = "with the code beside it" if request["own"] else "without code of ours"
    detail = f"all tensors found their place, {how}" if not bad else f"{bad}"
    return {"name": "loads without meo_hf", "passed": not bad, "detail": detail[:500]}


def stacked(state, request):
    """Give experts that are modules of their own one stack each, by the names that the request has for them."""
    made = dict(state)
    for kind, names in request["modules"].items():
        if all(name in state for name in names):
            for name in names:
                made.pop(name)
            made[kind] = torch.stack([state[name] for name in names])
    return made


def by_rows(tensor, rows, experts, axis, per):
    """Return a tensor with a slice for each row over its experts' slices."""
    moved = tensor.movedim(axis, 0)
    own = moved[: experts * per].reshape(experts, per, *moved.shape[1:])
    made = torch.stack([sum(own[int(old)].double() * weight for old, weight in row) for row in rows])
    whole = torch.cat([made.reshape(-1, *moved.shape[1:]), moved[experts * per :].double()])
    return whole.movedim(0, axis)


def tensors_check(request, model, stock):
    """Every tensor is the source's, or what the plan makes of it; one-hot rows give equal values."""
    old, new = stacked(stock.state_dict(), request), model.state_dict()
    for kind, names in request["modules"].items():
        own = [name for name in names if name in new]
        if own:
            new[kind] = torch.stack([new.pop(name) for name in own])
        elif request["stacks"].get(kind) in new:
            new[kind] = new.pop(request["stacks"][kind])
    equal, summed, wrong = 0, 0, []
    parts = {name for name in new if request["stacks"].get(name, name) in request["parts"]}
    for name, tensor in new.items():
        if name in parts:
            continue
        if name not in old:
            wrong.append(name)
            continue
        change = request["changed"].get(name)
        if change is None:
            equal += 1
            if not torch.equal(tensor, old[name]):
                wrong.append(name)
            continue
        if change["rows"] is None:
            continue
        expected = by_rows(old[name], change["rows"], change["experts"], change["axis"], change["per"])
        if tensor.shape != expected.shape:
            wrong.append(name)
        elif all(len(row) == 1 for row in change["rows"]):
            equal += 1
            if not torch.equal(tensor.double(), expected):
                wrong.append(name)
        else:
            summed += 1
            error = (tensor.double() - expected).norm() / expected.norm().clamp(min=1e-30)
            if not error <= request["rounding"]:
                wrong.append(name)
    counted = len(request["changed"]) - sum(change["rows"] is not None for change in request["changed"].values())
    detail = f"{equal} equal, {summed} sums within rounding"
    detail += f", {counted} computed ones compared in the files" if counted else ""
    detail += f", {len(parts)} of experts' parts compared by their products" if parts else ""
    detail += f"; wrong: {wrong[:3]}" if wrong else ""
    return {"name": "tensors are what the plan makes of the source's", "passed": not wrong, "detail": detail}


def run_check(request, model):
    """The model computes finite numbers for a few tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(24).reshape(2, 12) * 7 + 3) % (vocabulary - 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request["kind"] == "encoder-decoder":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        found = model(**inputs)[0]
    passed = bool(torch.isfinite(found).all())
    detail = f"output of shape {tuple(found.shape)}" + ("" if passed else " is not finite")
    return {"name": "runs", "passed": passed, "detail": detail}


def main():
    """Answer the request whose path is the only argument."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    model, stock, info = load(request)
    checks = [loading_check(request, info)]
    if stock is not None:
        checks.append(tensors_check(request, model, stock))
    checks.append(run_check(request, model))
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(checks, file)


if __name__ == "__main__":
    main()
