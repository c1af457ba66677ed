"""Asks an OpenAI-compatible server, and sends a question again after a temporary error."""

import asyncio
import collections
import datetime
import email.utils
import json
import os
import random
import socket
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.budget import Reservation
from stepdistill_jax.teacher.prompts import estimate_tokens
from stepdistill_jax.teacher.secret import Secret
from stepdistill_jax.teacher.settings import Settings

RATE_LIMIT_PATIENCE = 6 * 3600.0  # longest time that a question waits for a rate limit, seconds
LONGEST_BACKOFF = 60.0
REPORTED_WAIT = 5.0  # seconds; a shorter wait is reported only the first time
MOST_TOKENS = 10**12  # per answer; a larger count is nonsense
SENT_AGAIN = (
    408,
    409,
    425,
    429,
)  # retried, as is 5xx; any other 4xx means that the request is wrong
NO_KEY = "none"  # key for local servers, which need none
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class Teacher(Protocol):
    """A model that answers questions."""

    async def ask(
        self, prompt: str, parameters: dict[str, Any], reservation: Reservation | None = None
    ) -> Answer:
        """Returns one answer, which may be incomplete. `reservation` counts the tokens of failed attempts."""
        ...

    async def close(self) -> None:
        """Frees the teacher's resources."""
        ...


class ServerError(Exception):
    """Raised when all attempts failed. The message is the error of the last attempt."""


class SentAgain(Exception):
    """Raised when an attempt failed and another one may succeed.

    Attributes:
        status: HTTP status; 0 if there was no response.
        wait: seconds that the server asks the client to wait, or None.
        used: (prompt tokens, answer tokens) of the attempt; None if unknown.
    """

    def __init__(
        self,
        message: str,
        status: int = 0,
        wait: float | None = None,
        used: tuple[int, int] | None = (0, 0),
    ):
        super().__init__(message)
        self.status, self.wait, self.used = status, wait, used


def now() -> str:
    """Returns the current time in UTC, to the second, in the format of ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ChatClient:
    """Asks a server through its endpoint `chat/completions`.

    The API key is passed only to the HTTP client, and removed from every message and answer.
    """

    def __init__(self, settings: Settings):
        """Creates the connections without sending anything.

        Raises:
            InputError: a library or the key is missing.
        """
        try:
            import httpx
            import openai

            from stepdistill_jax.teacher.transport import bounded_client
        except ImportError as error:
            raise InputError(
                f"annotate needs {error.name}, which is not installed; {how_to_install('teacher')}"
            ) from None
        self._settings, self._openai = settings, openai
        self._key = os.environ.get(settings.api_key_env, "").strip()
        if not self._key and settings.server is None:
            raise InputError(
                f"${settings.api_key_env} is not set; set this environment variable to the API key, set"
                " `api_key_env` to use another variable, or set `base_url` to use another server"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(
                f"${settings.api_key_env} contains a character that is not printable ASCII, which an HTTP"
                " header cannot contain; copy the key again"
            )
        self._secret = Secret(self._key)
        self._httpx, self._verify = httpx, httpx.create_ssl_context()
        self._bounded_client = bounded_client
        self._clients: list[Any] = []
        try:
            self._free = [self._new_client()]
        except Exception as error:  # a malformed base URL
            raise InputError(self.hide(f"`base_url` {settings.server}: {error}")) from None
        # on the monotonic clock: time of the next allowed request, and end of the last reported wait
        self._open_at = self._reported_until = 0.0
        self._responded = False  # whether the server has responded to any request

    def hide(self, text: str) -> str:
        """Returns `text` without the key, which may be in any usual encoding."""
        return self._secret.hide(text)

    async def ask(
        self, prompt: str, parameters: dict[str, Any], reservation: Reservation | None = None
    ) -> Answer:
        """Returns the answer to a prompt. After a temporary error, the prompt is sent again.

        Args:
            parameters: additional fields of the request.
            reservation: delays an attempt that might exceed a limit.

        Raises:
            BudgetReached: another attempt might exceed a limit.
            InputError: the server refuses the request, no server runs at an address of this machine, or the server's
                name is unknown.
            ServerError: all attempts failed.
        """
        start, failures = time.monotonic(), collections.Counter()
        while True:
            if reservation is not None:
                await reservation.renew()
            try:
                return await self._once(prompt, parameters)
            except SentAgain as error:
                if reservation is not None:
                    await reservation.lose(error.used)
                # counted separately: rate limits do not mean that the server is broken
                for_rate = error.status == 429
                failures[for_rate] += 1
                hopeless = failures[for_rate] >= self._settings.attempts
                if for_rate:
                    hopeless = time.monotonic() - start > RATE_LIMIT_PATIENCE
                if hopeless:
                    raise ServerError(str(error)) from None
                wait = self._wait(error, failures[for_rate])
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.close()

    def _new_client(self) -> Any:
        """Returns a client with a single connection, for one request at a time.

        A pool checks all its connections for every request (httpcore 1.0), which is slow with 64 of them.
        """
        client = self._openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=self._settings.server,
            max_retries=0,  # our own retries obey Retry-After for all requests together
            http_client=self._bounded_client(self._settings.timeout, self._verify),
        )
        self._clients.append(client)
        return client

    async def _once(self, prompt: str, parameters: dict) -> Answer:
        while (wait := self._open_at - time.monotonic()) > 0:
            await asyncio.sleep(wait * (1 + 0.1 * random.random()))
        openai = self._openai
        client = self._free.pop() if self._free else self._new_client()
        try:
            # httpx limits each read separately: a server that sends a byte now and then would never end
            async with asyncio.timeout(self._settings.timeout):
                # the raw response, since the client's own parser accepts bodies that are not completions
                response = await client.chat.completions.with_raw_response.create(
                    model=self._settings.name,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body=parameters,
                )
            content, self._responded = response.content, True
        except (openai.APITimeoutError, TimeoutError) as error:
            used = self._used_by(error)
            what = "answer" if used is None else "connection"
            message = f"no {what} within {self._settings.timeout:g} s"
            raise SentAgain(message, used=used) from None
        except openai.APIConnectionError as error:
            raise self._of_connection(error, str(client.base_url).rstrip("/")) from None
        except openai.APIStatusError as error:
            self._responded = True
            raise self._of_status(error) from None
        except openai.OpenAIError as error:
            raise SentAgain(self.hide(f"{type(error).__name__}: {error}")) from None
        finally:
            self._free.append(client)
        return self._read(prompt, content, parameters)

    def _of_connection(self, error: Any, url: str) -> Exception:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}"
        # a server that has responded may be restarting
        if (
            isinstance(cause, self._httpx.ConnectError)
            and (urlsplit(url).hostname in THIS_MACHINE or _is_unknown_host(cause))
            and not self._responded
        ):
            return InputError(
                self.hide(
                    f"`base_url` {url}: no server answers there ({reason}); start the server, or correct the"
                    " address"
                )
            )
        return SentAgain(self.hide(f"no answer from {url} ({reason})"), used=self._used_by(error))

    def _used_by(self, error: Exception) -> tuple[int, int] | None:
        """Returns the tokens that a failed attempt used; None if their number is unknown."""
        unmade = (self._httpx.ConnectError, self._httpx.ConnectTimeout)
        return (0, 0) if isinstance(error.__cause__, unmade) else None

    def _read(self, prompt: str, content: bytes, parameters: dict) -> Answer:
        """Returns the answer in the body of a response, or raises SentAgain if there is none."""
        body = None
        try:
            body = json.loads(content)
            if isinstance(body, dict) and body.get("error"):
                message = self.hide(f"the server answers with an error: {body['error']}")[:300]
                raise SentAgain(message, used=_usage(body) or (0, 0))
            text, reason, usage = completion(body)
            used = [
                token_count(usage.get(name), estimate_tokens(len(sent)))
                for name, sent in (("prompt_tokens", prompt), ("completion_tokens", text))
            ]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            # hide the key before truncating: a truncated key would not be recognised
            start = self.hide(content.decode("utf-8", "replace"))[:80]
            raise SentAgain(
                self.hide(f"the server's answer is not a completion: {start!r}"),
                used=_usage(body) if isinstance(body, dict) else (0, 0),
            ) from None
        reason = self.hide(reason)[:100]
        return Answer(self.hide(text), reason, used[0], used[1], now(), parameters)

    def _of_status(self, error: Any) -> Exception:
        status, body = error.status_code, error.body
        message = body.get("message") if isinstance(body, dict) else None
        # hide the key before truncating: a truncated key would not be recognised
        message = self.hide(" ".join(str(message or error.message).split()))[:300]
        summary = f"HTTP {status}: {message}"
        out_of_money = isinstance(body, dict) and body.get("code") == "insufficient_quota"
        if status < 500 and (status not in SENT_AGAIN or out_of_money):
            return InputError(
                f"the server refuses the request for model {self._settings.model}: {summary}"
                f"{_hint(status, message, self._settings)}"
            )
        wait = retry_after(error.response.headers)
        if wait:
            # all requests wait: one sent now would be refused, too
            self._open_at = max(self._open_at, time.monotonic() + wait)
        return SentAgain(summary, status, wait)

    def _wait(self, error: SentAgain, failures: int) -> float:
        wait = error.wait
        if wait is not None:
            # a random part, so that not all requests are sent at the same moment
            wait += random.uniform(0, min(1.0, 0.1 * wait + 0.05))
        else:
            # backoff, 2 backoff, 4 backoff, ... up to a minute; the exponent is bounded, since six hours
            # of refusals are more doublings than a float holds
            longest = min(LONGEST_BACKOFF, self._settings.backoff * 2 ** min(failures - 1, 64))
            wait = random.uniform(longest / 2, longest)
        attempt = f"attempt {failures + 1} of {self._settings.attempts}"
        self._report(str(error), wait, "the next attempt" if error.status == 429 else attempt)
        return wait

    def _report(self, message: str, wait: float, attempt: str) -> None:
        """Logs the run's first wait and every long wait.

        If the waits of several requests end at about the same time, only one of them is logged.
        """
        until = time.monotonic() + wait
        is_news = wait >= REPORTED_WAIT and until > self._reported_until + wait / 2
        if self._reported_until and not is_news:
            return
        self._reported_until = until
        log(f"{message}; waiting {wait:.{0 if wait >= 1 else 2}f} s before {attempt}")


def _is_unknown_host(error: BaseException | None) -> bool:
    """Returns whether a connection failed because no host has the server's name."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None and error.errno != socket.EAI_AGAIN


def completion(body: Any) -> tuple[str, str, dict[str, Any]]:
    """Returns the text, the finish reason and the usage in the body of a response.

    Raises:
        KeyError, IndexError, TypeError, AttributeError, ValueError: the body is not a completion.
    """
    choice, usage = body["choices"][0], body.get("usage") or {}
    content = choice["message"].get("content") or ""
    if isinstance(content, list):  # a list of parts: join the text parts
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str) or not isinstance(usage, dict):
        raise TypeError
    reason = str(choice.get("finish_reason") or "stop")
    f"{content}{reason}".encode()  # raises for an unpaired surrogate, which cannot be saved
    return content, reason, usage


def token_count(value: Any, otherwise: int) -> int:
    """Returns the token count that a server reports, or `otherwise` if it is not a plausible number."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 0 <= value <= MOST_TOKENS else otherwise


def _usage(body: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the numbers of prompt and answer tokens that a body reports; None if the body has none."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return token_count(prompt, 0), token_count(completion, 0)


def retry_after(headers: Any) -> float | None:
    """Returns the seconds to wait according to the headers; None if the headers name no time.

    The headers are `retry-after-ms`, and `Retry-After` with seconds or a date.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return min(max(0.0, float(value) * scale), RATE_LIMIT_PATIENCE)  # `inf` is possible
        except ValueError:
            pass
        try:
            date = email.utils.parsedate_to_datetime(value)
            return min(max(0.0, date.timestamp() - time.time()), RATE_LIMIT_PATIENCE)
        except (ValueError, TypeError, OverflowError):
            continue
    return None


def _hint(status: int, message: str, settings: Settings) -> str:
    if status in (401, 403):
        return f" (the key is read from ${settings.api_key_env})"
    if "temperature" in message:
        return " (`temperature=default` sends none)"
    if "max_tokens" in message or "max_completion_tokens" in message:
        return " (`max_tokens` limits the length of an answer)"
    return ""
