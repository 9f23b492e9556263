"""What a child of test_distributed does to train: the stock Trainer, in as many processes as there are."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from tiny import recorded_gates
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

ARGUMENTS = {
    "use_cpu": True,
    "optim": "sgd",  # Adam's steps have the size of its rate even where gradients are rounding errors
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
    "max_grad_norm": 0.0,
}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it would be in one process."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def own_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of merged experts that this process holds, and those of all processes."""
    stacks = [p for name, p in model.named_parameters() if ".experts." in name]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in stacks), sum(p.nbytes for p in stacks)


def lend_accelerator() -> None:
    """Let accelerate take these processes for ones with a GPU each: on a CPU it ignores FSDP, and runs DDP instead."""
    PartialState().distributed_type = DistributedType.MULTI_GPU


def train(case: dict[str, Any], output: str) -> dict[str, Any]:
    """Train a saved model on saved rows; return losses, weights, and the experts that its first layers selected."""
    torch.manual_seed(0)
    model = getattr(transformers, case["auto"]).from_pretrained(case["folder"], **case.get("options", {}))
    options = {**ARGUMENTS, **case.get("arguments", {})}
    if case.get("rows_per_step"):
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        per_step = case["rows_per_step"] // (processes * options.get("gradient_accumulation_steps", 1))
        options["per_device_train_batch_size"] = per_step
    arguments = TrainingArguments(output, **options)
    if case.get("fsdp"):
        lend_accelerator()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=torch.load(case["data"]),
        data_collator=default_data_collator,
    )
    with recorded_gates(model) as gates:
        trainer.train(resume_from_checkpoint=case.get("resume"))
    found = {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "selected": sorted({int(i) for made in gates.values() for i in made[0].top_k_index.unique()}),
        "wrapped": type(trainer.model_wrapped).__name__,
        "units": sorted({type(m).__name__ for m in model.modules() if type(m).__name__.startswith("FSDP")}),
        "bytes": own_bytes(model),
    }
    if case.get("saved"):
        if case.get("fsdp"):  # else the Trainer saves nothing here
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(case["saved"])
    return found
