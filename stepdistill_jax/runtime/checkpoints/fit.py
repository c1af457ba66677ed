"""Whether a checkpoint is one of this model and optimizer, before Orbax reads an array of it."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from stepdistill_jax.errors import InputError


def require_fit(item_folder: pathlib.Path, abstract: Any, fits: str) -> None:
    """Compares names, shapes and dtypes: Orbax itself would cast a dtype without a word.

    Args:
        item_folder: `STEP/params` or `STEP/state`.
        abstract: the tree that is to be restored.
        fits: what the tree comes from, for the message: "the model's config.json".

    Raises:
        InputError: a leaf differs; names the first, and how many do. Or Orbax cannot read what is there.
    """
    try:
        saved = _leaves(ocp.StandardCheckpointHandler().metadata(epath.Path(item_folder)).tree)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{item_folder}: is no checkpoint that Orbax can read ({reason})"
        ) from error
    wanted = _leaves(ocp.tree.serialize_tree(abstract, keep_empty_nodes=True))
    problems = [
        f"{name} is {saved.get(name, 'not in it')}, {wanted.get(name, 'nothing of that name')} is wanted"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if problems:
        more = f", and {len(problems) - 1} more differ" if len(problems) > 1 else ""
        raise InputError(f"{item_folder}: does not fit {fits} ({problems[0]}{more})")


def _leaves(tree: Any) -> dict[str, str]:
    """`float32[8, 4]` of each array by its path."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as its numbers
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return leaves
