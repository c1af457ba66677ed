"""Data-sheet compute rates, memory sizes and bandwidths of accelerators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts devices.

    Attributes:
        bfloat16: rate of dense bfloat16 matmuls, FLOP/s.
        memory: main memory, bytes.
        bandwidth: rate of the main memory, bytes/s.
        link: rate at which a device sends data in a collective within its slice or host, bytes/s.
        integer: estimated rate of element-wise operations on integers, 1/s.
        other: estimated rate of element-wise operations on all other dtypes, 1/s.
        clock: clock rate for the TPU compiler's cycle counts, Hz.
        float32: rate of float32 matmuls at default precision, FLOP/s. None means `bfloat16`.
        exact: rate of float32 matmuls at the highest precision, FLOP/s. None means a sixth of `bfloat16`.
    """

    bfloat16: float
    memory: int
    bandwidth: float
    link: float
    integer: float
    other: float
    clock: float
    float32: float | None = None
    exact: float | None = None

    def products(self, dtype: str, precision: str = "default") -> float:
        """Returns the rate of matmuls, FLOP/s.

        Args:
            dtype: HLO's dtype of both operands. Any dtype except `f32` counts as bfloat16.
            precision: `default`, `high` or `highest`; matters only for float32.
        """
        if dtype != "f32":
            return self.bfloat16
        default, exact = self.float32 or self.bfloat16, self.exact or self.bfloat16 / 6
        # bfloat16 passes on a TPU: one for `default`, three for `high`, six for `highest`. On a GPU, `default`
        # and `high` are TF32.
        high = default if self.float32 else self.bfloat16 / 3
        return {"highest": exact, "high": high}.get(precision, default)


# `integer` and `other` are lanes times clock rate: 64 and 128 lanes in each of an H100's 132 multiprocessors,
# and 4 x 8 x 128 lanes in a TPU's vector unit. An H100's `memory` is the size that the driver reports. A TPU's
# `link` is one axis of its torus: half of the data sheet's sum over all links.
_A100 = Chip(
    312e12, 80 * 10**9, 2.039e12, 300e9, 9.7e12, 19.5e12, 1.41e9, float32=156e12, exact=19.5e12
)
_A100_40GB = dataclasses.replace(_A100, memory=40 * 10**9, bandwidth=1.555e12)
_H100 = Chip(
    989e12, 84_942_979_072, 3.352e12, 450e9, 14.8e12, 29.6e12, 1.755e9, float32=494e12, exact=67e12
)

# the keys are prefixes of JAX's device name; the first match counts, so longer prefixes come first
CHIPS: dict[str, Chip] = {
    "NVIDIA A100-SXM4-40GB": _A100_40GB,
    "NVIDIA A100-PCIE-40GB": _A100_40GB,
    "NVIDIA A100": _A100,
    "NVIDIA H100": _H100,
    "NVIDIA H200": dataclasses.replace(_H100, memory=141 * 10**9, bandwidth=4.8e12),
    "TPU v4": Chip(275e12, 32 * 2**30, 1.2e12, 150e9, 8.6e12, 8.6e12, 1.05e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 100e9, 6.1e12, 6.1e12, 1.5e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 300e9, 14e12, 14e12, 1.75e9),  # v5p
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 200e9, 14e12, 14e12, 1.75e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with JAX's `device_kind`, or None if it is unknown."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), None)
