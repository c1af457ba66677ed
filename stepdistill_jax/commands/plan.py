"""`stepdistill plan`: computes what a config needs on N devices, and recommends a layout that fits."""

import argparse
import math
import re
from typing import TYPE_CHECKING, Any

from stepdistill_jax.commands.arguments import add_config_arguments, add_data_dir_argument
from stepdistill_jax.commands.plan_bound import (
    GIB,
    share_used,
    show_bound,
    show_collectives,
    show_decode,
)
from stepdistill_jax.commands.shipped import shipped_folder
from stepdistill_jax.commands.terminal import console
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import translated

if TYPE_CHECKING:
    from rich.console import Console

_UNITS = {"B": 1} | {
    f"{prefix}{end}B": (base ** (power + 1))
    for end, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT")
}
_FITS = {True: "yes", False: "no", None: "not tried"}
_SIZES = ("params", "optimizer", "gradients", "activations", "total")
# the columns of the table that need an explanation
_LEGEND = (
    "remat: what the backward pass recomputes to save memory: elementwise operations alone, `minimal` also the"
    " matmuls inside attention, `full` each layer",
    "filled: rows with tokens; the others are padding, since the number of rows is a multiple of"
    " data x fsdp x NUM_MICROBATCHES",
    "work: FLOPs of a step, padding included; 1 means as many as one device needs for the same examples",
)
_RULE = (  # 1.25 is `planning.advice.MORE_WORK`
    "the simplest layout that fits with at most 1.25 times the fewest FLOPs: data is simpler than fsdp,"
    " and fsdp is simpler than tensor"
)
DEFAULT_DEVICES = 16
# flags for the changes of `planning.plan`; every candidate also has a layout and a remat policy
_CHANGES = {
    "devices": "--devices {}",
    "optimizer": "--gin_file optimizers/{}.gin",
    "mu_dtype": "--gin_file memory/{}_moment.gin",
    "dtype": "--gin_file memory/{}.gin",
    "num_microbatches": "--set NUM_MICROBATCHES={}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `plan`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--devices",
        type=int,
        help=f"number of devices (default: {DEFAULT_DEVICES}, or the number in --topology)",
    )
    parser.add_argument(
        "--hbm", metavar="SIZE", help="memory per device, such as 80GB (the default) or 16GiB"
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="plan only this layout, with the config's remat policy (default: compare"
        " layouts); NAME is a layout, or an entry of the printed table such as `fsdp_tensor 32x8`",
    )
    parser.add_argument(
        "--topology",
        metavar="CHIPS",
        help="compile for these chips, which this machine need not have, and show a lower bound of the"
        " step's time: a TPU slice by its shape, such as v5e:8x8 (needs the extra [tpu]), or 1 to 8"
        " H100s of one host, cuda:1 to cuda:8 (needs the extra [aot-cuda])",
    )
    parser.add_argument(
        "--rows",
        type=int,
        help="number of packed rows per step, which `stepdistill inspect` prints; with"
        " --decode, number of rows per batch",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="plan the label decoder instead of the training step; needs --topology",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8",),
        help="only for --decode: keep weights in memory as int8, as `predict"
        " --quantization int8` does",
    )
    add_data_dir_argument(parser)


def parse_size(text: str) -> int:
    """Returns a size in bytes, such as 80e9 for `80GB` and 16 x 2**30 for `16GiB`.

    Raises:
        InputError: the string is not a positive number with a known unit.
    """
    found = re.fullmatch(r"([\d.]+) ?([KMGT]?i?B)", text.strip())
    if found is None or found.group(2) not in _UNITS or found.group(1).count(".") > 1:
        raise InputError(f"--hbm {text}: expected a size with its unit, such as 80GB or 16GiB")
    size = int(float(found.group(1).strip(".") or 0) * _UNITS[found.group(2)])
    if size < 1:
        raise InputError(f"--hbm {text}: expected a size above 0")
    return size


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config, plans the training step or the decoder, and prints the result."""
    if args.topology and args.devices is not None:
        raise InputError(
            "--devices: --topology already sets the number of devices; leave one of the two flags out"
        )
    if args.quantization and not args.decode:
        raise InputError(
            "--quantization: applies only to a decoder; add --decode to plan one, or leave --quantization out"
        )
    hbm = None if args.hbm is None else parse_size(args.hbm)
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.planning import plan, plan_decode

    config, _ = load_config(args.config, args.overrides, args.gin_files, args.gin_bindings)
    if args.decode:
        result = plan_decode(
            config,
            topology=args.topology,
            layout=args.layout,
            rows=args.rows,
            quantization=args.quantization,
            hbm=hbm,
            data_dir=args.data_dir,
        )
        result["assumptions"] = [translated(line) for line in result["assumptions"]]
        show_decode(result, _console())
        return result
    result = plan(
        config,
        devices=DEFAULT_DEVICES if args.devices is None else args.devices,
        hbm=hbm,
        layout=args.layout,
        topology=args.topology,
        rows=args.rows,
        data_dir=args.data_dir,
    )
    result["assumptions"] = [translated(line) for line in result["assumptions"]]
    if args.devices is None and not args.topology:
        result["assumptions"].insert(0, f"{DEFAULT_DEVICES} devices; --devices sets another number")
    result["counted"] = translated(result["counted"])
    for candidate in (*result["candidates"], *result["remedies"]):
        if "remat_policy" in candidate:
            candidate["flags"] = _flags(candidate, config.remat_policy, given=bool(args.layout))
    result["advice"] = [_advice(remedy) for remedy in result["remedies"]]
    if (needed := result["hbm_needed"]) is not None and (smallest := _smallest(result)):
        flags = smallest["flags"]
        how = f"fits with {flags}" if flags else "the config fits unchanged"
        result["advice"].append(f"--hbm {math.ceil(needed / 1e8) / 10:g}GB: {how}")
    show(result, _console())
    return result


def _console() -> "Console":
    return console(width=None if console().is_terminal else 150, highlight=False)


def _flags(candidate: dict[str, Any], policy: str, *, given: bool) -> str:
    """Returns the flags that select a candidate; `train` accepts all of them except `--devices`.

    Args:
        policy: the config's remat policy. A candidate with another policy needs a flag for it.
        given: whether the user has set the layout. If so, flags for the layout are returned only if the
            candidate changes it.
    """
    # "fsdp_tensor 32x8" is the layout fsdp_tensor with tensor = 8
    layout, _, sizes = candidate["name"].partition(" ")
    tensor = [f"--set Layout.tensor={sizes.partition('x')[2]}"] if sizes else []
    changes = candidate.get("changes", {})
    is_chosen = not given or "layout" in changes
    flags = [f"--gin_file layouts/{layout}.gin", *tensor] if is_chosen else []
    if candidate["remat_policy"] != policy:
        part = f"memory/remat_{candidate['remat_policy']}.gin"
        is_shipped = (shipped_folder("gin") / part).is_file()
        named = f"--set train.remat_policy={candidate['remat_policy']}"
        flags.append(f"--gin_file {part}" if is_shipped else named)
    for name, value in changes.items():
        if name in _CHANGES:
            flags.append(_CHANGES[name].format(value))
    return " ".join(flags)


def _smallest(result: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the compiled candidate that needs the least memory, or None."""
    compiled = (c for c in result["candidates"] if "flops" in c)
    return min(compiled, key=lambda c: c["per_device"]["total"], default=None)


def _advice(remedy: dict[str, Any]) -> str:
    """Returns a line about a remedy, a change that makes the config fit.

    The line has the remedy's flags, and the memory, communication and FLOPs of a step with these flags.
    """
    total, sent = remedy["per_device"]["total"] / GIB, remedy["wire_bytes"] / GIB
    bound = f", in {remedy['bound']['bound_ms']:.3g} ms or more" if remedy["bound"] else ""
    return (
        f"{remedy['flags']}: needs {total:.2f} GiB; a step sends {sent:.2f} GiB and computes"
        f" {remedy['flops']['per_device'] / 1e12:.3g} TFLOPs{bound}"
    )


def show(result: dict[str, Any], console: "Console") -> None:
    """Prints the result of `planning.plan`."""
    for assumption in result["assumptions"]:
        console.print(f"Assumed: {assumption}", markup=False)
    if result["counted"]:
        console.print(f"Rows of a step: {result['counted']}", soft_wrap=True, markup=False)
    console.print(_table(result))
    for line in _LEGEND:
        console.print(f"  {line}", soft_wrap=True)
    best = result["best"]
    one = best or _smallest(result)
    if one is not None:
        _show_one(one, result, console)
    if best is None:
        _show_advice(result, console)
    elif best["flags"]:
        console.print(
            f"[bold]Recommended:[/bold] {best['name']}, remat {best['remat_policy']} ({_RULE})",
            soft_wrap=True,
        )
        console.print(f"  {best['flags']}", soft_wrap=True)
    else:
        console.print(f"[bold]{best['name']} fits.[/bold]")


def _show_advice(result: dict[str, Any], console: "Console") -> None:
    if result["advice"]:
        console.print(
            "[bold]Nothing fits.[/bold] Each of these changes makes the config fit (values per device):"
        )
        for line in result["advice"]:
            console.print(f"  {line}", soft_wrap=True)
    else:
        console.print("[bold]Nothing fits,[/bold] and none of the changes that were tried helps.")
    if result["device_kind"] == "virtual CPU" and result["model"]["dtype"] == "float32":
        console.print(
            "with bfloat16 activations (--gin_file memory/bfloat16.gin), the config may fit; pass --topology to"
            " find out, since virtual CPU devices do not show the saving",
            soft_wrap=True,
        )


def _table(result: dict[str, Any]):
    from rich.table import Table

    table = Table(
        title=f"Memory of one of {result['devices']} devices ({result['device_kind']}), in GiB;"
        f" {result['limit'] / GIB:.1f} GiB can be used ({share_used(result)})",
        title_justify="left",
    )
    has_bounds = any(c.get("bound") for c in result["candidates"])
    rates = ("sent per step", "TFLOPs", *(["min. ms"] if has_bounds else []))
    columns = ("layout", "remat", "filled", "work", *_SIZES, *rates, "fits")
    for column in columns:
        side = "left" if column in ("layout", "remat") else "right"
        table.add_column(column, justify=side, no_wrap=column == "layout")
    for c in result["candidates"]:
        best = c is result["best"]
        sizes = c.get("per_device", {})
        cells = [f"{sizes[name] / GIB:.2f}" if name in sizes else "-" for name in _SIZES]
        more = ["-"] * len(rates)
        if "flops" in c:
            more = [f"{c['wire_bytes'] / GIB:.2f}", f"{c['flops']['per_device'] / 1e12:.3g}"]
            more += [f"{c['bound']['bound_ms']:.3g}"] if has_bounds else []
        rows = f"{c['filled_rows']} of {sum(rows for rows, *_ in c['groups'])}"
        table.add_row(
            c["name"], c.get("remat_policy", "any"), rows, f"{c['work']:.2f}", *cells, *more,
            "best" if best and len(result["candidates"]) > 1 else _FITS[c["fits"]],
            style="bold" if best else None,
        )  # fmt: skip
    return table


def _by_chip(seconds: dict[str, float]) -> dict[str, float]:
    """Returns {device kind: seconds} without repeating equal times for variants of a device.

    Example: "NVIDIA A100-SXM4-40GB" is left out if it takes as long as "NVIDIA A100".
    """
    return {
        kind: time
        for kind, time in seconds.items()
        # "NVIDIA A100-SXM4-40GB" is a variant of "NVIDIA A100"
        if not any(
            kind != other and kind.startswith(other) and time == same
            for other, same in seconds.items()
        )
    }


def _show_one(one: dict[str, Any], result: dict[str, Any], console: "Console") -> None:
    """Prints the collectives, FLOPs and times of one candidate."""
    console.print(f"Collectives per step and device, {one['name']}, remat {one['remat_policy']}:")
    show_collectives(one["collectives_by_dtype"], console)
    flops = one["flops"]
    console.print(
        f"FLOPs per step: {flops['step']:.3g} for the model, {flops['recomputed']:.3g} recomputed;"
        f" {flops['per_device']:.3g} per device; the step takes {one['work']:.3g} times the FLOPs that one"
        " device needs for the same examples"
    )
    times = ", ".join(
        f"{name} {seconds:.3g} s" for name, seconds in _by_chip(result["seconds_at_peak"]).items()
    )
    if one["bound"] is not None:
        show_bound(one["bound"], "step", console)
    elif times:
        console.print(
            f"Shortest time, at the bfloat16 peak and with instant links: {times}", soft_wrap=True
        )
    host = result["host_bytes"]
    console.print(
        f"Host memory for each device of the host: {host['save'] / GIB:.2f} GiB to save a checkpoint,"
        f" {host['restore'] / GIB:.2f} GiB to restore one"
    )
    if one["unknown_loops"]:
        console.print(
            f"{one['unknown_loops']} loops of unknown length were counted as one iteration each"
        )
