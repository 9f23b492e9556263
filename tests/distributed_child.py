"""Child of test_distributed: one of the processes that `torchrun` starts.

Runs the cases in `cases.json` of the folder it is given, and writes `<case>.<rank>.pt` beside it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import distributed_tensor
import distributed_train
import torch

import meo_hf  # noqa: F401  # registers the Auto classes


def main(folder: Path) -> None:
    """Run all cases, in all processes the same."""
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects after each training, and what was imported is much
    rank = int(os.environ["RANK"])
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        print(name, file=sys.stderr, flush=True)
        if "data" in case:
            found = distributed_train.train(case, str(folder / "runs" / case.get("run", name)))
        else:
            found = distributed_tensor.run(case, rank)
        torch.save(found, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
