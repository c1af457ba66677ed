"""Shows how the cost of a step grows with devices: makes the plot and table of docs/lab/planning.md.

    python benchmarks/growth.py --output docs/images/growth.png

It needs no device and trains nothing: it compiles the step for 1 to 256 virtual CPU devices with a fixed
batch, under fsdp and full remat, as `plan` does. `--json` prints the numbers.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import timing

GIB = 2**30
SIZES = ("small", "base", "large", "xl", "xxl")
DEVICES = (1, 4, 16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="sizes of T5 v1.1")
    parser.add_argument("--devices", nargs="+", type=int, default=DEVICES)
    parser.add_argument("--rows", type=int, default=256, help="packed rows per step")
    parser.add_argument("--input-length", type=int, default=1024)
    parser.add_argument("--target-length", type=int, default=256)
    parser.add_argument("--output", type=pathlib.Path, help="PNG file for the plot")
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = measure(args)
    show(found)
    if args.output:
        plot(found, args.output)
    if args.json:
        print(json.dumps(found))


def measure(args: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Returns {size: {devices: numbers of one device}}."""
    from stepdistill_jax.models.sharding import Layout, make_mesh
    from stepdistill_jax.planning.compiling import compile_step
    from stepdistill_jax.planning.devices import virtual_devices
    from stepdistill_jax.planning.workload import workload
    from stepdistill_jax.training.config import TrainConfig

    everything = virtual_devices(max(args.devices))
    found: dict[str, dict[int, dict[str, float]]] = {}
    for size in args.sizes:
        config = TrainConfig(
            task="made_up_rows",
            model_size=size,
            input_length=args.input_length,
            target_length=args.target_length,
        )
        work = workload(config, rows=args.rows)
        for devices in args.devices:
            mesh = make_mesh(Layout(fsdp=devices), everything[:devices])
            f = compile_step(config, work, mesh, "full")
            found.setdefault(size, {})[devices] = {
                "flops": f.flops_per_device,
                "state": sum(f.state.values()),
                "total": f.total,
                "sent": f.wire_bytes,
                "largest": f.operations[0].wire_bytes if f.operations else 0,
            }
            print(f"{size} {devices}: {f.compile_seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def show(found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Prints the table, one row for each size and number of devices."""
    print(
        "| size | devices | TFLOPs per step | state, GiB | all memory, GiB | sent per step, GiB |"
    )
    print("|---|---|---|---|---|---|")
    for size, by_devices in found.items():
        for devices, f in by_devices.items():
            sizes = " | ".join(f"{f[name] / GIB:.3g}" for name in ("state", "total", "sent"))
            print(f"| {size} | {devices} | {f['flops'] / 1e12:.3g} | {sizes} |")


def plot(found: dict[str, dict[int, dict[str, float]]], path: pathlib.Path) -> None:
    """Plots three panels against the number of devices, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from stepdistill_jax.experiments.plots import COLOURS

    panels = {
        "flops": ("TFLOPs per step", 1e12),
        "total": ("memory, GiB (state dotted)", GIB),
        "sent": ("sent per step, GiB", GIB),
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for axis, (key, (label, unit)) in zip(axes, panels.items(), strict=True):
        for i, (size, by_devices) in enumerate(found.items()):
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": "osD^v"[i % 5]}
            points = [(n, f[key] / unit) for n, f in by_devices.items() if f[key] > 0]
            axis.plot(*zip(*points, strict=True), ms=5, label=size, **look)
            if key == "total":
                state = [f["state"] / unit for f in by_devices.values()]
                axis.plot(list(by_devices), state, ls=":", color=look["color"])
            if key != "sent":  # ideal: the value of one device, divided by N
                first = next(iter(by_devices.values()))[key] / unit
                ideal = [first / n * min(by_devices) for n in by_devices]
                name = "ideal, 1/N" if i == len(found) - 1 else None
                axis.plot(
                    list(by_devices), ideal, color="0.6", lw=3, alpha=0.5, zorder=0, label=name
                )
        axis.set(xscale="log", yscale="log", xlabel="devices", title=f"One device: {label}")
        ticks = sorted({n for by_devices in found.values() for n in by_devices})
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    timing.run(main)
