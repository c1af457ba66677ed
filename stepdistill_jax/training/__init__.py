"""Trains a model (`train`), and shows what training would read (`inspect`).

Subclasses of `ExtraLoss` and `PairedLoss` add a term to the loss.
"""

_EXPORTS = {
    "TrainConfig": "config",
    "OptimizerConfig": "config",
    "OptimizerFunction": "optimizer_function",
    "LearningRate": "learning_rate",
    "ExtraLoss": "extra_loss",
    "PairedLoss": "extra_loss",
    "train": "loop",
    "inspect": "inspection",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
