"""Distilling Step-by-Step (Hsieh et al. 2023, arXiv:2305.02301) in JAX and Flax.

`load(directory)` returns a model that labels texts. `curves(workdir)` returns a run's metrics as columns, and
`plot_curves(workdir)` plots them. Bad usage and bad input raise `InputError`, a `ValueError`.
"""

__version__ = "0.2.0"

# name -> module, which is imported on first use, so that `import stepdistill_jax` is quick
_EXPORTS = {
    "InputError": "errors",
    "load": "inference.predictor",
    "curves": "runtime.metrics",
    "plot_curves": "experiments.plots",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
