"""Prints the lower bound of the time of a compiled program, for `stepdistill plan`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
_TIMES = ("bound_ms", "products_ms", "memory_ms", "elements_ms")


def show_bound(bound: dict[str, Any], what: str, console: "Console") -> None:
    """Prints a lower bound of the time of a step or batch, then the parts of the bound and the slowest operations."""
    console.print(
        f"[bold]At least {bound['bound_ms']:.3g} ms per {what}[/bold] on one device,"
        f" {_rates(bound)}. For each of {bound['kernels']} operations, the bound counts the longest of its times"
        f" for products, memory and element operations. Summed over all operations, these times are"
        f" {bound['products_ms']:.3g}, {bound['memory_ms']:.3g} and {bound['elements_ms']:.3g} ms"
        f" ({bound['flops']:.4g} FLOPs, {bound['bytes'] / 1e9:.4g} GB). Transfers between devices take"
        f" {bound['links_ms']:.3g} ms, and are assumed to overlap with the operations.",
        soft_wrap=True,
    )
    if bound["compiler_ms"]:
        console.print(f"The compiler's own estimate: {bound['compiler_ms']:.3g} ms")
    if bound["unknown_loops"] and "token_ms" not in bound:
        console.print(
            f"{bound['unknown_loops']} loops of unknown length were counted as one iteration each"
        )
    for target, count in bound["calls_without_formula"].items():
        console.print(
            f"{count} calls of {target or 'an unnamed target'} are counted only by their bytes, since there is"
            " no formula for their FLOPs"
        )
    _show_parts(bound["parts"], console)
    console.print("The slowest operations:")
    for one in bound["dearest"]:
        where = one["op_name"].split("/")[1:]
        console.print(
            f"  {one['bound_ms']:8.2f} ms  x{one['times']:<4} {one['part']}: {one['result']} "
            f" {'/'.join(where[-4:])}",
            soft_wrap=True,
            markup=False,
        )


def share_used(result: dict[str, Any]) -> str:
    """Returns the usable share of the device's memory as text, such as "75% of --hbm 80GB, ..."."""
    memory = result["hbm"]
    size = f"{memory // GIB}GiB" if memory % GIB == 0 else f"{memory / 1e9:.4g}GB"
    of = f"--hbm {size}" if result["device_kind"] == "virtual CPU" else f"the device's {size}"
    share = result["limit"] / memory
    why = ", JAX's share of a GPU's memory" if share < 1 else ""
    return f"{100 * share:.3g}% of {of}{why}"


def show_collectives(rows: list[dict[str, Any]], console: "Console") -> None:
    """Prints a table of the collectives and the bytes that they send, by kind and dtype."""
    from rich.table import Table

    table = Table()
    for column in ("kind", "dtype", "count", "results, GiB", "sent, GiB"):
        table.add_column(column, justify="left" if column in ("kind", "dtype") else "right")
    for row in rows:
        cells = (f"{row[name] / GIB:.3f}" for name in ("bytes", "wire_bytes"))
        table.add_row(row["kind"], row["dtype"], str(row["count"]), *cells)
    console.print(table if rows else "  none")


def show_decode(result: dict[str, Any], console: "Console") -> None:
    """Prints the result of `planning.plan_decode`."""
    for assumption in result["assumptions"]:
        console.print(f"Assumed: {assumption}", soft_wrap=True)
    sizes, mesh = result["per_device"], result["layout"]
    cut = ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
    console.print(
        f"Label decoder: {result['rows']} rows of {result['input_length']} input tokens and"
        f" {result['tokens']} label tokens each,"
        f" on {result['devices']} {result['device_kind']} ({cut})"
    )
    console.print(
        f"Per device: {sizes['params'] / GIB:.2f} GiB of parameters, {sizes['total'] / GIB:.2f} GiB in"
        f" total: {'fits' if result['fits'] else 'does not fit'};"
        f" {result['limit'] / GIB:.1f} GiB can be used ({share_used(result)})",
        soft_wrap=True,
    )
    console.print("Collectives per batch and device:")
    show_collectives(result["collectives_by_dtype"], console)
    show_bound(result["bound"], "batch", console)
    on_gpu, bound = result["device_kind"].startswith("NVIDIA"), result["bound"]
    console.print(
        f"Decoding one token of every row: {bound['token_ms']:.3g} ms, {bound['kernels_per_token']} operations"
        + (", each of which also takes a few microseconds to launch on a GPU" if on_gpu else "")
    )


def _rates(bound: dict[str, Any]) -> str:
    each = f"{bound['rows_per_second_per_device']:.3g} rows/s per device at most"
    return each if "mfu" not in bound else f"{each}, MFU {100 * bound['mfu']:.3g}% at most"


def _show_parts(parts: list[dict[str, Any]], console: "Console") -> None:
    from rich.table import Table

    table = Table()
    for column in ("part", "bound, ms", "products", "memory", "elements", "TFLOPs", "GB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        times = (f"{part[name]:.2f}" for name in _TIMES)
        amounts = f"{part['flops'] / 1e12:.3f}", f"{part['bytes'] / 1e9:.2f}"
        table.add_row(part["part"], *times, *amounts)
    console.print(table)
