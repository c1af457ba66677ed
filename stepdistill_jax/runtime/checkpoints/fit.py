"""Checks that a checkpoint fits the model and optimizer, before Orbax reads its arrays."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from stepdistill_jax.errors import InputError


def require_fit(item_folder: pathlib.Path, abstract: Any, fits: str) -> None:
    """Checks that a checkpoint's arrays have the names, shapes and dtypes of the tree to restore.

    Args:
        item_folder: `STEP/params` or `STEP/state`.
        fits: name of the tree for the message, such as "the model's config.json".

    Raises:
        InputError: an array differs, or Orbax cannot read the checkpoint.
    """
    try:
        saved = _leaves(ocp.StandardCheckpointHandler().metadata(epath.Path(item_folder)).tree)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{item_folder}: is not a checkpoint that Orbax can read ({reason})"
        ) from error
    wanted = _leaves(ocp.tree.serialize_tree(abstract, keep_empty_nodes=True))
    # Orbax would silently cast an array to another dtype
    problems = [
        f"{name}: expected {wanted.get(name, 'no such leaf')}, got {saved.get(name, 'no such leaf')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if problems:
        more = f", and {len(problems) - 1} more differ" if len(problems) > 1 else ""
        raise InputError(f"{item_folder}: does not fit {fits} ({problems[0]}{more})")


def _leaves(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of each array by its path, such as {"mlp/wo/kernel": "float32[8, 4]"}."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as integers
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return leaves
