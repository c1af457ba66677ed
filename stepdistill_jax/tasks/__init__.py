"""Tasks: `add_task(...)` registers a dataset, and `load_task(...)` loads tokens."""

_EXPORTS = {
    "add_span_corruption": "span_corruption",
    "add_task": "registry",
    "load_task": "load",
    "register_prepared": "prepared_tasks",
    "has_split": "load",
    "TaskData": "task_data",
}


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
