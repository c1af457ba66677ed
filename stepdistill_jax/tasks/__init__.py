"""Tasks: `add_task(...)` plugs a dataset in, `load_task(...)` gives its tokens.

`evaluate(...)` gives a model's accuracy on a split of any of them.
"""

_EXPORTS = {
    "add_span_corruption": "tasks.span_corruption",
    "add_task": "tasks.registry",
    "evaluate": "inference.evaluate_task",
    "load_task": "tasks.load",
    "has_split": "tasks.load",
    "TaskData": "tasks.load",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"stepdistill_jax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
