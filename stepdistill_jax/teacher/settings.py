"""Defines the settings of `annotate`: the teacher, the prompt and the limits."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, refused, whole

LOCAL = "hf:"
SAMPLING_TEMPERATURE = 0.7  # default with several samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `annotate`, named like the command's flags.

    Attributes:
        task: `cqa`, `svamp`, `esnli` or `anli`; `generic` for any other rows.
        model: name of the model on the server; None if `teacher` is set.
        teacher: `hf:DIR`, where DIR is a local transformers directory; None asks a server.
        base_url: URL of an OpenAI-compatible server; None means $OPENAI_BASE_URL, or else OpenAI's server.
        api_key_env: environment variable with the API key.
        exemplars: JSON-lines file that replaces the task's exemplars. Fields: `input`, `rationale`, `label`.
        instructions: text that replaces the template's instructions; empty keeps them.
        choices: allowed answers for rows without the field `choices`.
        samples: number of answers per row. The commonest label is used.
        temperature: None means 0 for one sample and 0.7 for several; `default` sends none.
        max_tokens: largest number of tokens in an answer, reasoning included.
        reasoning_effort: only for reasoning models; None sends none.
        parameters: additional fields of the request (`{"top_p": 0.9}`).
        label_given: whether the prompt contains the gold label and asks only for a rationale.
        concurrency: number of simultaneous requests; for a local teacher, number of prompts per batch.
        retries: how often to ask again after an unreadable answer. Until an answer has been usable, only the first
            question is asked again.
        attempts: how often to send a request to a failing server before giving up its question.
        timeout: time limit of a request, in seconds.
        max_truncated: largest share of answers that may be unusable, for any reason. From the 20th answer on, a
            larger share stops the run.
        max_tokens_total, max_cost: limits for this run; None means no limit.
        price_input, price_output: prices per million tokens of prompts and of answers; None if unknown.
        cache: SQLite file of answers; None means `teacher_cache.sqlite` next to the output.
        batch_file: `("write", FILE)` writes requests in OpenAI's batch format. `("read", FILE, ...)` reads a
            batch's results. Empty asks the server.
        dry_run: whether to only show the first prompt and the estimated cost.
        backoff: longest wait before the second attempt, in seconds. The wait doubles with each attempt.
    """

    task: str
    model: str | None = None
    teacher: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    exemplars: os.PathLike | str | None = None
    instructions: str = ""
    choices: Sequence[str] = ()
    samples: int = 1
    temperature: float | str | None = None
    max_tokens: int = 1024
    reasoning_effort: str | None = None
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    label_given: bool = False
    concurrency: int = 16
    retries: int = 1
    attempts: int = 8
    timeout: float = 300.0
    max_truncated: float = 0.05
    max_tokens_total: int | None = None
    max_cost: float | None = None
    price_input: float | None = None
    price_output: float | None = None
    cache: os.PathLike | str | None = None
    batch_file: Sequence[str] = ()
    dry_run: bool = False
    backoff: float = 1.0

    def __post_init__(self):
        """Raises InputError, with the name of the field, if a field has a bad value."""
        if (self.model is None) == (self.teacher is None):
            raise InputError("pass either `model` (for a model on a server) or `teacher=hf:DIR`")
        if self.teacher is not None and not self.teacher.startswith(LOCAL):
            raise refused("teacher", f"{LOCAL}DIR", self.teacher)
        keep(self, whole, "samples", "max_tokens", "concurrency", "attempts", least=1)
        keep(self, whole, "retries", least=0)
        keep(self, number, "timeout", "max_truncated", least=0)
        if self.max_tokens_total is not None:
            keep(self, whole, "max_tokens_total", least=1, most=2**63 - 1)
        for name in ("max_cost", "price_input", "price_output"):
            if getattr(self, name) is not None:
                keep(self, number, name, least=0)
        if self.temperature not in (None, "default"):
            if isinstance(self.temperature, str):
                raise refused("temperature", "a number or `default`", self.temperature)
            keep(self, number, "temperature", least=0)
        if self.samples > 1 and self.temperature == 0:
            raise InputError(
                f"`samples={self.samples}` and `temperature=0`: every sample would be the same; raise the"
                " temperature, or ask for one sample"
            )
        self._check_texts()
        self._check_prices()
        self._check_parameters()
        if self.batch_file and (
            len(self.batch_file) < 2 or self.batch_file[0] not in ("write", "read")
        ):
            raise refused("batch_file", "write FILE, or read FILE...", " ".join(self.batch_file))
        if self.batch_file and self.teacher:
            raise InputError(
                "`batch_file`: cannot be combined with `teacher`, since only servers take batch files; leave one of the two out"
            )

    def _check_texts(self) -> None:
        texts = [("choices", choice) for choice in self.choices]
        texts += [(n, getattr(self, n)) for n in ("model", "instructions", "reasoning_effort")]
        for name, text in texts:
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"`{name}`: the text is not valid UTF-8 or Unicode ({text!a})"
                ) from None
        try:
            urlsplit(self.server or "")
        except ValueError as error:
            raise InputError(f"`base_url` {self.server}: {error}") from None

    def _check_prices(self) -> None:
        prices = (self.price_input, self.price_output)
        if (prices[0] is None) != (prices[1] is None):
            raise InputError(
                "pass both `price_input` and `price_output` (per million tokens), or neither"
            )
        if self.max_cost is not None and prices[0] is None:
            raise InputError(
                "`max_cost` needs the prices per million tokens; set `price_input` and `price_output`, too"
            )

    def _check_parameters(self) -> None:
        taken = {
            "model": "`model`",
            "messages": "`instructions` and `exemplars`",
            "temperature": "`temperature`",
            "max_tokens": "`max_tokens`",
            "max_completion_tokens": "`max_tokens`",
            "reasoning_effort": "`reasoning_effort`",
            "n": "`samples`",
        }
        for name in self.parameters:
            if name in taken:
                raise InputError(f"`parameters` {name}: set this field with {taken[name]} instead")
            if name == "stream":
                raise InputError(
                    "`parameters` stream: streaming is not supported; leave this field out"
                )

    @property
    def name(self) -> str:
        """Name of the teacher, such as `gpt-x` or `hf:flan-t5-xl`."""
        if self.teacher is None:
            return str(self.model)
        directory = os.path.abspath(self.teacher.removeprefix(LOCAL))
        return LOCAL + os.path.basename(directory)

    @property
    def source(self) -> str:
        """Source of the rationales: the teacher's name, and whether the teacher was given the label."""
        return f"{self.name} (label given)" if self.label_given else self.name

    @property
    def server(self) -> str | None:
        """URL of the server; None means OpenAI's server."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def request_parameters(self) -> dict[str, Any]:
        """Returns the fields of a request other than the model and the messages."""
        temperature = self.temperature
        if temperature is None:
            temperature = SAMPLING_TEMPERATURE if self.samples > 1 else 0.0
        found: dict[str, Any] = dict(self.parameters)
        if temperature != "default":
            found["temperature"] = temperature
        if self.reasoning_effort:
            found["reasoning_effort"] = self.reasoning_effort
        return found | {self._limit_name(): self.max_tokens}

    def _limit_name(self) -> str:
        """Returns `max_completion_tokens` for OpenAI's server, or else `max_tokens`, which other servers know."""
        host = urlsplit(self.server).hostname or "" if self.server else "api.openai.com"
        newer = any(host == h or host.endswith("." + h) for h in ("openai.com", "openai.azure.com"))
        return "max_completion_tokens" if newer and not self.teacher else "max_tokens"
