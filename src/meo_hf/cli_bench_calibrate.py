"""The command `meo-hf bench calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

    from meo_hf.benchmark.calibrate import CheckedChoice


def calibrate_command(
    device: Annotated[str, typer.Option(help="Device to measure, like cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="TYPE,...", help="Types to measure.")] = "float32,bfloat16,float16",
    keep: Annotated[bool, typer.Option(help="Let models of this user choose by what was measured.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write rates and checks as JSON.")] = None,
) -> None:
    """Measure what this machine does per second, by which models choose how to run merged experts; then check it."""
    from meo_hf.benchmark.calibrate import check_choices, measure_rates
    from meo_hf.benchmark.machine import Machine
    from meo_hf.benchmark.options import check_place
    from meo_hf.cli_bench import check_outputs
    from meo_hf.cli_progress import err, out
    from meo_hf.modeling.plans_meo import write_rates

    names = tuple(dict.fromkeys(dtype.split(",")))
    for name in names:
        check_place(name, device)
    check_outputs(json_file, None)
    machine = Machine.look(device)
    kind = device.partition(":")[0]
    with err.status("") as status:
        rates = {name: measure_rates(name, device, status.update) for name in dict.fromkeys(("float32", *names))}
        checks = {name: check_choices(name, device, rates[name], rates["float32"], status.update) for name in names}
    for name in names:
        out.print(_table(name, checks[name]))
        out.print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in asdict(rates[name]).items()))
    out.print(str(machine), markup=False, soft_wrap=True)
    if machine.noise:
        out.print(machine.noise, markup=False)
    measured = {f"{kind}/{name}": rates[name] for name in rates}
    if keep:
        path = write_rates(measured, {"machine": str(machine)})
        out.print(f"models of this user now choose by {escape(str(path))}; delete it to go back", soft_wrap=True)
    if json_file is not None:
        result = {
            "machine": {**asdict(machine), "noisy": bool(machine.noise)},
            "rates": {name: asdict(value) for name, value in measured.items()},
            "checks": {
                name: [{**asdict(choice), "loss": round(choice.loss, 4)} for choice in found]
                for name, found in checks.items()
            },
        }
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.print(f"wrote {escape(str(json_file))}", soft_wrap=True)


def _table(dtype: str, checks: list[CheckedChoice]) -> Table:
    from rich import box
    from rich.table import Table

    plans = list(dict.fromkeys(plan for choice in checks for plan in choice.measured))
    table = Table(title=f"{dtype}: ms measured (estimated)", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("experts", "top_k", "gates", "tokens", *plans, "chosen", "over best"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in checks:
        work = choice.work
        cells = [
            f"{1e3 * choice.measured[plan]:.2f} ({1e3 * choice.estimated[plan]:.2f})" if plan in choice.measured else ""
            for plan in plans
        ]
        numbers = (str(n) for n in (work.experts, work.top_k, work.gates, work.tokens))
        table.add_row(*numbers, *cells, choice.chosen, f"{choice.loss:.2f}")
    return table
