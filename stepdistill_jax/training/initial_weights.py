"""Loads the weights of `init_from` that `init_rules` select."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.formats.hf import load_params, stored_shapes
from stepdistill_jax.inference.model import load_model
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.lora import base_of, combine
from stepdistill_jax.training.state import TrainState, drawn, shardings_of, with_new_adapters

Rules = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """A run's initial parameters, which come from `init_from`.

    Attributes:
        path: a model directory or another run's workdir.
        step: step to load from that workdir; None for a model directory.
        rules: `TrainConfig.init_rules`; None loads each parameter under its own name.
        abstract: shapes and shardings of the run's state.
    """

    path: pathlib.Path
    step: int | None
    rules: Rules | None
    model: ModelConfig
    abstract: TrainState

    @functools.cached_property
    def sources(self) -> dict[str, str | None]:
        """{name of a parameter of the run: name of the parameter in `path` that it is loaded from}.

        A parameter that is not loaded has the value None.

        Raises:
            InputError: as for `sources_of`.
        """
        shapes = _shapes(base_of(self.abstract.params))
        return sources_of(shapes, self._stored, self.rules or (), str(self.path))

    @functools.cached_property
    def _stored(self) -> dict[str, tuple[int, ...]]:
        if self.step is not None:  # a workdir's checkpoints have the shapes of the run's model
            return _shapes(base_of(self.abstract.params))
        return stored_shapes(self.path, dataclasses.replace(self.model, lora=None))

    def described(self) -> dict[str, Any]:
        """Returns the entry for `run.json`: `step` and, if there are rules, three groups of parameters.

        The groups are `from_scratch` (the run's parameters that are not loaded), `renamed` ({name in the run: name
        in `path`}) and `unused` (parameters in `path` that are not loaded).
        """
        found: dict[str, Any] = {"step": self.step}
        if self.rules is not None:
            used = set(self.sources.values())
            found["from_scratch"] = [n for n, source in self.sources.items() if source is None]
            found["renamed"] = {n: s for n, s in self.sources.items() if s not in (None, n)}
            found["unused"] = [name for name in self._stored if name not in used]
        return found

    def report(self) -> list[str]:
        """Returns log lines that say where the parameters come from.

        Raises:
            InputError: as for `sources_of`.
        """
        found, lines = self.described(), []
        if self.step is not None:
            lines.append(f"`init_from` {self.path}: uses step {self.step} of this training run")
        if self.rules is not None:
            renamed = [f"{name} from {source}" for name, source in found["renamed"].items()]
            kinds = {"from scratch": found["from_scratch"], "renamed": renamed}
            kinds["left out"] = found["unused"]
            lines += [
                f"`init_rules`: {what}: {', '.join(names) or 'none'}"
                for what, names in kinds.items()
            ]
        return lines

    def load(self, mesh: Mesh, seed: int) -> Any:
        """Returns the run's initial parameters. All processes must call this method.

        Adapters, and parameters that are not loaded, are drawn from the seed.
        """
        base = self._loaded(mesh)
        if self.rules is not None:
            names = [name for name, source in self.sources.items() if source is None]

            def from_scratch(params: Any) -> Any:
                flat = flatten_dict(base_of(params), sep="/")
                return unflatten_dict({n: flat[n] for n in names}, sep="/")

            if names:
                scratch = drawn(from_scratch, self.model, self.abstract, seed=seed)
                base = combine(scratch, base)
        if self.model.lora is not None:
            base = with_new_adapters(base, self.model, self.abstract, seed=seed)
        return base

    def _loaded(self, mesh: Mesh) -> Any:
        """Returns the parameters loaded from `path`, under their names in the run.

        The rules may give two parameters the same array.
        """
        shardings = shardings_of(base_of(self.abstract.params))
        plain = dataclasses.replace(self.model, lora=None)
        sources = None
        if self.rules is not None:
            sources = {name: source for name, source in self.sources.items() if source}
        if self.step is None:
            return load_params(self.path, plain, shardings, sources=sources)
        params = load_model(self.path, self.step, mesh=mesh).params  # adapters are merged
        if sources is None:
            return params
        # rules may give two parameters the same array; `state_from_params` copies each of them
        flat = flatten_dict(params, sep="/")
        return unflatten_dict({name: flat[source] for name, source in sources.items()}, sep="/")


def sources_of(
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
    rules: Rules,
    where: str,
) -> dict[str, str | None]:
    r"""Returns the stored name of each parameter of a run, chosen by rules as in T5X.

    The first rule whose expression matches the complete name decides. Its replacement, in which `\1` stands for a
    group, is the stored name; None means not loaded. Without a matching rule, the name stays the same.

    >>> rules = [(r"decoder/layers/self_(.*)", r"encoder/layers/\1"), ("logits_dense/.*", None)]
    >>> names = ["decoder/layers/self_attention/out/kernel", "logits_dense/kernel", "token_embedder"]
    >>> stored = {"encoder/layers/attention/out/kernel": (2, 8, 8), "token_embedder": (99, 8)}
    >>> wanted = dict(zip(names, [(2, 8, 8), (8, 99), (99, 8)]))
    >>> for name, source in sources_of(wanted, stored, rules, "base").items():
    ...     print(name, "<-", source)
    decoder/layers/self_attention/out/kernel <- encoder/layers/attention/out/kernel
    logits_dense/kernel <- None
    token_embedder <- token_embedder

    Args:
        wanted: shapes of the run's parameters, by name.
        stored: shapes of the stored parameters, by name.
        rules: `TrainConfig.init_rules`.
        where: path of the stored parameters, for messages.

    Raises:
        InputError: a stored parameter is missing or has another shape, or a rule applies to no parameter.
    """
    sources, used = {}, set()
    for name in wanted:
        sources[name] = name
        for number, (pattern, replacement) in enumerate(rules):
            if match := re.fullmatch(pattern, name):
                used.add(number)
                sources[name] = _expanded(match, replacement)
                break
    for number, (pattern, _) in enumerate(rules):
        if number not in used:
            raise InputError(
                f"`init_rules`: {pattern!r} applies to no parameter of the model; the model's names"
                f" look like {next(iter(wanted))}{nearest(pattern, wanted)}"
            )
    problems = []
    for name, source in sources.items():
        if source is None or stored.get(source) == wanted[name]:
            continue
        if source in stored:
            shapes = f"{list(stored[source])}, but the model's {name} has {list(wanted[name])}"
            problem = f"{source} in {where} has the shape {shapes}"
        else:
            of = "" if source == name else f" for {name}"
            problem = f"{where} has no parameter {source}{of}{nearest(source, stored)}"
        problems.append(f"{problem}; add the rule ({name!r}, None) to start it from scratch")
    if problems:
        more = f" (others that do not fit: {len(problems) - 1})" if len(problems) > 1 else ""
        raise InputError(f"`init_rules`: {problems[0]}{more}")
    return sources


def _expanded(match: re.Match, replacement: str | None) -> str | None:
    if replacement is None:
        return None
    try:
        return match.expand(replacement)
    except (re.error, IndexError) as error:
        raise InputError(
            f"`init_rules`: {replacement!r} cannot replace {match.re.pattern!r} ({error})"
        ) from None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat: Any = flatten_dict(tree, sep="/")
    return {name: tuple(x.shape) for name, x in flat.items()}
