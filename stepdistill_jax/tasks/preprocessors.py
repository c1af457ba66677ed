"""SeqIO preprocessors that turn an example into a row for each objective, and keep these rows together."""

import functools
import string
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.vocabulary import EOS_ID, T5_FRAMING, Framing
from stepdistill_jax.errors import InputError, nearest

LABEL_TEXT = "label text"  # a name that no field of a dataset can have


def render(
    dataset: Any,
    *,
    task: str,
    source: str,
    objectives: Mapping[str, Objective],
    variants: Mapping[str, int] | None = None,
) -> Any:
    """Renders each example's fields as the features `PREFIXinputs`, `PREFIXtargets` and `weight`.

    This SeqIO preprocessor is `Objective.render` in TensorFlow. If the first objective's target contains a label
    and the objective is not plain (`Objective.is_plain`), the gold label is added as the feature `LABEL_TEXT`.

    Args:
        task: name of the task, for messages.
        source: description of the task's source, for messages.
        objectives: {prefix: objective}.
        variants: {prefix: index of the rationale to use}. Index 0, the default, means the field `rationale`, and 1
            means `rationale.1`.

    Raises:
        InputError: a field other than `rationale` and `llm_label` is missing, or a field is not text.
    """
    tf = tensorflow()
    spec, first = dataset.element_spec, next(iter(objectives.values()))
    fields = sorted(spec) if isinstance(spec, dict) else []
    for field in dict.fromkeys(f for o in objectives.values() for f in o.fields):
        if field not in fields and field in ("rationale", "llm_label"):
            continue  # optional
        if field not in fields:
            raise InputError(
                f"task {task!r}: field {field!r} is missing; the rows of {source} have"
                f" {', '.join(fields) or 'no named fields'}{nearest(field, fields)}; rename with"
                " preprocessors=[seqio.map_over_dataset(...)]"
            )
        if spec[field].dtype != tf.string or spec[field].shape.rank not in (0, None):
            raise InputError(
                f"task {task!r}: field {field!r} of {source} must be text, got"
                f" {spec[field].dtype.name} of shape {spec[field].shape}"
            )

    def to_text(template: str, row: Mapping[str, Any]) -> Any:
        parts = []
        for literal, field, _, _ in string.Formatter().parse(template):
            parts.append(tf.constant(literal))
            if field is not None:
                parts.append(row.get(field, tf.constant("")))
        return tf.strings.join(parts)

    @tf.autograph.experimental.do_not_convert  # plain TensorFlow, so there is nothing to convert
    def convert(given: Mapping[str, Any]) -> dict[str, Any]:
        out = {}
        for prefix, objective in objectives.items():
            row = dict(given)
            if number := (variants or {}).get(prefix):
                row["rationale"] = given[f"rationale.{number}"]
            present = tf.constant(True)
            for field in objective.needed:
                present &= tf.strings.length(row.get(field, tf.constant(""))) > 0
            target = to_text(objective.target_template, row)
            inputs = to_text(objective.input_template, row)
            # most examples have few rationales, so inputs are not stored for those that are absent
            out[f"{prefix}inputs"] = tf.where(present, inputs, "") if number else inputs
            out[f"{prefix}targets"] = tf.where(present, target, tf.constant(""))
        if "label" in given and first.label_field and not first.is_plain:
            out[LABEL_TEXT] = given["label"]
        out["weight"] = tf.cast(given.get("weight", 1.0), tf.float32)
        return out

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def framing_steps(framing: Framing) -> list[Any]:
    """Returns SeqIO preprocessors that add the special ids of a vocabulary to inputs.

    They do not append the vocabulary's eos, since SeqIO can do that (`add_eos` of a feature).
    """
    return [] if framing == T5_FRAMING else [functools.partial(_frame, framing=framing)]


def _frame(dataset: Any, *, framing: Framing) -> Any:
    """Prepends the vocabulary's bos to inputs. If the vocabulary adds neither bos nor eos, empty inputs get an eos."""
    tf = tensorflow()

    @tf.autograph.experimental.do_not_convert
    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(row)
        for name in row:
            if not name.endswith("inputs"):
                continue
            if framing.add_bos_token:
                out[name] = tf.pad(row[name], [[1, 0]], constant_values=framing.bos_id)
            elif not framing.add_eos_token:
                missing = tf.cast(tf.equal(tf.size(row[name]), 0), tf.int32)
                out[name] = tf.pad(row[name], [[0, missing]], constant_values=EOS_ID)
        return out

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def empty_absent_targets(dataset: Any) -> Any:
    """SeqIO preprocessor: removes the EOS from targets without text.

    The row is kept, so that row i of every objective belongs to the same example.
    """
    tf = tensorflow()

    @tf.autograph.experimental.do_not_convert
    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(row)
        for name in row:
            if name.endswith("targets"):
                present = tf.strings.length(row[f"{name}_pretokenized"]) > 0
                out[name] = row[name][: tf.where(present, tf.size(row[name]), 0)]
        return out

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def drop_absent_rows(dataset: Any) -> Any:
    """SeqIO preprocessor: drops rows with an empty target. It is the last preprocessor of a registered task."""
    tf = tensorflow()
    return dataset.filter(lambda row: tf.size(row["targets"]) > 0)


def with_absent_rows(task: Any) -> Any:
    """Returns `task` without the preprocessor `drop_absent_rows`.

    Row i of the new task belongs to example i of the dataset.
    """
    kept = [p for p in task.preprocessors if p is not drop_absent_rows]
    return task.replace(preprocessors=kept)


@functools.cache
def paired_mixture() -> Any:
    """Returns the class of a `seqio.Mixture` that yields the rows of an example one after the other.

    As part of another mixture, it loses this order, because SeqIO then samples the tasks independently. With
    `shuffle`, the rows of an example stay together only if a seed is given.
    """
    # SeqIO's own sampling would mix the rows of different examples, and stop at the end of the shortest task
    tensorflow()
    import seqio

    class PairedMixture(seqio.Mixture):
        def get_task_dataset(self, task: Any, *args: Any, **kwargs: Any) -> Any:
            return super().get_task_dataset(with_absent_rows(task), *args, **kwargs)

    return PairedMixture


def in_turn(datasets: Sequence[Any], rates: Sequence[float], seed: int | None) -> Any:
    """Yields row i of each task, then row i + 1 of each task, and so on. Rows with an empty target are left out.

    This function is the `sample_fn` of a `paired_mixture`.
    """
    del rates, seed
    tf = tensorflow()
    # one dataset for each row, since rows of two tasks differ in length and cannot be one tensor
    one = tf.data.Dataset.from_tensors
    pairs = tf.data.Dataset.zip(*datasets)
    rows = pairs.flat_map(
        lambda *pair: functools.reduce(
            lambda dataset, row: dataset.concatenate(one(row)), pair[1:], one(pair[0])
        )
    )
    return drop_absent_rows(rows)
