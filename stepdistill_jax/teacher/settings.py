"""Defines the settings of `annotate`: teacher, prompt and limits."""

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
        task: `cqa`, `svamp`, `esnli`, `anli`, or `generic` for any other rows.
        model: name of the model on the server; None with `teacher`.
        teacher: `hf:DIR`, a local transformers directory instead of a server.
        base_url: URL of an OpenAI-compatible server; None means $OPENAI_BASE_URL, else OpenAI's.
        api_key_env: environment variable that holds the key; only the client reads it.
        exemplars: file of JSON lines with `input`, `rationale`, `label` that replace the task's exemplars.
        instructions: text that replaces the template's instructions.
        choices: allowed answers of rows without their own.
        samples: answers per row; if there are several, the majority's label is kept.
        temperature: sampling temperature; None means 0 for one sample and 0.7 for several, `default`
            sends none.
        max_tokens: limit of an answer's tokens, including a model's reasoning.
        reasoning_effort: field of the request for reasoning models; None sends none.
        parameters: additional fields of the request (`{"top_p": 0.9}`).
        label_given: whether the prompt contains the gold label and asks for its rationale.
        concurrency: requests at once; for a local teacher, prompts per batch.
        retries: how often to ask again for an unreadable answer. Before the run's first usable answer,
            only its first question is asked again.
        attempts: how often to send a request before a server error counts as its answer.
        timeout: seconds for a request.
        max_truncated: share of truncated or otherwise unusable answers above which the run stops, after
            20 answers. Answers in the cache count as usable.
        max_tokens_total, max_cost: limits of this run, in tokens and in money.
        price_input, price_output: money per million tokens.
        cache: SQLite file; None means `teacher_cache.sqlite` next to the output.
        batch_file: ("write", FILE) or ("read", FILE, ...), for OpenAI's batch format.
        dry_run: whether to only show the first prompt and the estimated cost, and send nothing.
        backoff: scale of the waits between attempts, seconds.
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
        """Checks the fields.

        Raises:
            InputError: a field has a bad value; names it.
        """
        if (self.model is None) == (self.teacher is None):
            raise InputError("pass either `model` (of a server) or `teacher=hf:DIR`")
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
                f"`samples={self.samples}` and `temperature=0`: every sample would be the same"
            )
        self._check_texts()
        self._check_prices()
        self._check_parameters()
        if self.batch_file and (
            len(self.batch_file) < 2 or self.batch_file[0] not in ("write", "read")
        ):
            raise refused("batch_file", "write FILE, or read FILE...", " ".join(self.batch_file))
        if self.batch_file and self.teacher:
            raise InputError("`batch_file` is for servers; leave it out with `teacher=hf:DIR`")

    def _check_texts(self) -> None:
        texts = [("choices", choice) for choice in self.choices]
        texts += [(n, getattr(self, n)) for n in ("model", "instructions", "reasoning_effort")]
        for name, text in texts:
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise InputError(f"`{name}`: not valid UTF-8 or Unicode ({text!a})") from None
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
                "`max_cost` needs the prices per million tokens: `price_input` and `price_output`"
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
                raise InputError(f"`parameters` {name}: set it with {taken[name]}")
            if name == "stream":
                raise InputError("`parameters` stream: not supported; answers arrive in one piece")

    @property
    def name(self) -> str:
        """The teacher's name: `gpt-x`, `hf:flan-t5-xl`."""
        if self.teacher is None:
            return str(self.model)
        directory = os.path.abspath(self.teacher.removeprefix(LOCAL))
        return LOCAL + os.path.basename(directory)

    @property
    def source(self) -> str:
        """The rationales' `source`: the teacher's name, and whether it knew the label."""
        return f"{self.name} (label given)" if self.label_given else self.name

    @property
    def server(self) -> str | None:
        """The server's URL; None means OpenAI's."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def request_parameters(self) -> dict[str, Any]:
        """Returns the fields of a request other than model and messages."""
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
        """Returns the name of the token limit: OpenAI needs the newer name, many servers the older one."""
        host = urlsplit(self.server).hostname or "" if self.server else "api.openai.com"
        newer = any(host == h or host.endswith("." + h) for h in ("openai.com", "openai.azure.com"))
        return "max_completion_tokens" if newer and not self.teacher else "max_tokens"
