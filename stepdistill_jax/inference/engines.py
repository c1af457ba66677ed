"""Decodes rows of ids with one of two engines: our decoder on JAX's devices, or CTranslate2 on CPU cores."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from stepdistill_jax.data.vocabulary import EOS_ID, Vocabulary
from stepdistill_jax.decoding.beam import LENGTH_PENALTY, search
from stepdistill_jax.decoding.choices import CHUNK_TOKENS, ChoiceScorer
from stepdistill_jax.decoding.greedy import (
    ROWS_PER_DEVICE,
    Decoded,
    LabelDecoder,
    pipelined,
    rows_at_once,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.ctranslate2 import (
    check_model,
    import_ctranslate2,
    read_ctranslate2,
)
from stepdistill_jax.formats.directory import CONFIG, TaskInfo, is_ctranslate2
from stepdistill_jax.inference.model import device_mesh, load_model, params_fingerprint
from stepdistill_jax.inference.options import DecodeOptions
from stepdistill_jax.models.quantized import quantize
from stepdistill_jax.runtime.fingerprints import digest, sha256
from stepdistill_jax.runtime.stores import as_path, local_path


class Engine(Protocol):
    """A model and the engine that runs it.

    Attributes:
        task_info: contents of `stepdistill.json`; None if the directory lacks that file.
        step: step of the checkpoint; None if `path` is not a workdir.
        batch_size: number of rows decoded at once.
        identity: digest of the weights, configuration and vocabulary.
        device: such as `cpu`.
    """

    path: pathlib.Path
    vocabulary: Vocabulary
    task_info: TaskInfo | None
    step: int | None
    batch_size: int
    device: str

    @property
    def identity(self) -> str: ...

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        max_decode_len: int,
        on_progress: Callable[[int], None] | None = None,
        decoder_prefix: Sequence[int] = (),
    ) -> Decoded:
        """Returns the answers to `rows`, in the same order.

        Args:
            rows: ids of each input, at least its end of sequence.
            max_decode_len: largest number of ids in an answer, the end of sequence included.
            on_progress: called with the row count of each finished batch.
            decoder_prefix: ids that the decoder reads before the answer. The score leaves them out.
        """
        ...

    def score(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Returns the log probabilities of each row's answers, as one array per row."""
        ...


def open_engine(path: os.PathLike | str, options: DecodeOptions | None = None) -> Engine:
    """Opens a model with the engine that reads its directory.

    Args:
        path: workdir, model directory or CTranslate2 directory.
        options: None means `DecodeOptions()`.

    Raises:
        InputError: the model is bad, or an option does not fit it.
    """
    options = options or DecodeOptions()
    converted = is_ctranslate2(path)
    if options.engine == "jax" and converted:
        raise InputError(
            f"`engine=jax`: {path} is a CTranslate2 directory, which this engine cannot read; use the"
            " directory that it was made from"
        )
    if options.engine == "ctranslate2" and not converted and as_path(path).is_dir():
        raise InputError(
            f"`engine=ctranslate2`: {path} is not a CTranslate2 directory; to make one, run"
            f" `stepdistill export {path} NEW_FOLDER --format ctranslate2`"
        )
    if options.quantization and converted:
        raise InputError(
            f"`quantization`: {path} is a CTranslate2 directory, and its quantization was chosen when it was"
            " exported (`stepdistill export --format ctranslate2 --quantization int8`); leave this option out"
        )
    return (CTranslate2Engine if converted else JaxEngine)(path, options)


class JaxEngine:
    """Engine that runs our decoder. If there are several processes, all must make the same calls."""

    def __init__(self, path: os.PathLike | str, options: DecodeOptions):
        """Opens a workdir or model directory; see `open_engine`."""
        mesh = device_mesh(options.layout)
        model = load_model(path, options.step, mesh=mesh)
        self._config, self._params = model.config, model.params
        if options.quantization:
            self._params, self._config = quantize(model.params, model.config)
        self.path, self.step = model.path, model.step
        self.vocabulary, self.task_info = model.vocabulary, model.task_info
        self.batch_size = rows_at_once(options.batch_size, mesh)  # on all devices together
        decode_fn = search(options.num_beams, options.length_penalty)
        # cached, since each decoder and scorer keeps its compiled programs
        self._decoder = functools.cache(
            functools.partial(LabelDecoder, self._config, mesh=mesh, decode_fn=decode_fn)
        )
        self._scorer = functools.cache(functools.partial(ChoiceScorer, self._config, mesh=mesh))
        self.device = jax.devices()[0].device_kind

    @property
    def identity(self) -> str:
        """Digest of the parameters, configuration and vocabulary; prompts and lengths are not included."""
        config = dataclasses.asdict(self._config)
        if config["logits_softcap"] is None:  # so that older, unfinished outputs can be continued
            del config["logits_softcap"]
        return digest([params_fingerprint(self._params), config, self.vocabulary.fingerprint])

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        max_decode_len: int,
        on_progress: Callable[[int], None] | None = None,
        decoder_prefix: Sequence[int] = (),
    ) -> Decoded:
        """Implements `Engine.decode`."""
        decoder = self._decoder(
            max_decode_len=max_decode_len,
            batch_size=self._rows_at_once(len(rows)),
            decoder_prefix=tuple(decoder_prefix),
        )
        return decoder(self._params, rows, on_progress)

    def score(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Implements `Engine.score`."""
        scorer = self._scorer(batch_size=self._rows_at_once(len(rows)))
        return scorer(self._params, rows, answers, on_progress)

    def _rows_at_once(self, rows: int) -> int:
        """Returns the batch size for a number of rows: `batch_size`, or less if all rows fit into a smaller batch.

        For example, 10 rows use a batch of 16 instead of 64, which saves 48 padding rows. The size is only ever
        halved, so that few shapes are compiled.
        """
        size = self.batch_size
        while size > 1 and size // 2 >= rows:
            size //= 2
        return size


class CTranslate2Engine:
    """Engine that runs CTranslate2, with a single-threaded worker for each core that this process may use.

    The workers share one copy of the weights. A worker with several threads would often wait for the slowest
    of them.
    """

    device: str = "cpu"
    step: int | None = None

    def __init__(self, path: os.PathLike | str, options: DecodeOptions):
        """Opens a CTranslate2 directory and reads all of its weights; see `open_engine`."""
        if options.step not in ("best", "last"):
            raise InputError(
                f"`step` {options.step}: {path} is a CTranslate2 directory, which contains only one model;"
                " leave this option out"
            )
        if options.layout != "data":
            raise InputError("`layout`: CTranslate2 runs only on CPU cores; leave this option out")
        if jax.process_count() > 1:
            raise InputError(
                f"{path}: CTranslate2 runs in a single process, but this job has {jax.process_count()};"
                " start one process"
            )
        library = import_ctranslate2(f"{path}")
        self.path = local_path(path, "model directory")
        files = read_ctranslate2(path)
        check_model(path, files)
        self.vocabulary, self.task_info = files.vocabulary, files.task_info
        config = sha256(self.path / CONFIG)  # CTranslate2 reads it, too
        self.identity = digest(["ctranslate2", files.sha256, config, files.vocabulary.fingerprint])
        self._names, self._ids = files.tokens, {name: i for i, name in enumerate(files.tokens)}
        self._beams, given = options.num_beams, options.length_penalty
        self._penalty = LENGTH_PENALTY if given is None else given
        if self._beams == 1:
            self._penalty = 0.0
        self._workers, asked = usable_cores(), options.batch_size
        rows = ROWS_PER_DEVICE if asked is None else -(-asked // self._workers)
        self.batch_size = rows * self._workers
        # enough to keep a fast worker busy; a caller that stops waits for all queued batches
        self._ahead = 2 * self._workers
        try:
            self._translator = library.Translator(
                os.fspath(self.path), device="cpu", inter_threads=self._workers, intra_threads=1
            )
        except (RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())
            raise InputError(
                f"{self.path}: CTranslate2 cannot open this directory ({message})"
            ) from None

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        max_decode_len: int,
        on_progress: Callable[[int], None] | None = None,
        decoder_prefix: Sequence[int] = (),
    ) -> Decoded:
        """Implements `Engine.decode`.

        Raises:
            InputError: a row has only an end of sequence, or a decoder prefix is combined with a
                length penalty.
        """
        prefix = [self._names[i] for i in decoder_prefix]
        if prefix and self._penalty:
            raise InputError(
                f"{self.path}: CTranslate2 would count the decoder prefix of a rationale in the length"
                " penalty; set `length_penalty=0`, or use the directory that this one was made from"
            )
        decoded = Decoded(
            [[] for _ in rows], np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        )

        # the longest first, so that all workers end together; few rows are divided among the workers
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        at_once = min(self.batch_size, len(rows))
        size = max(1, -(-at_once // self._workers))
        batches = (order[start : start + size] for start in range(0, len(order), size))
        started = (
            (places, self._start([rows[i] for i in places], max_decode_len, prefix))
            for places in batches
        )
        for places, results in pipelined(started, self._ahead):
            for place, result in zip(places, results, strict=True):
                result = result.result()
                ids = [self._ids[name] for name in result.hypotheses[0]]
                if not ids:
                    raise InputError(
                        f"{self.path}: CTranslate2 cannot answer a row with an empty input and an empty"
                        " prefix; leave such rows out, or use the directory that this one was made from"
                    )
                ids = ids[len(prefix) :]
                decoded.ids[place], decoded.finished[place] = ids, ids[-1] == EOS_ID
                decoded.scores[place] = result.scores[0] * len(ids) ** self._penalty
            if on_progress:
                on_progress(len(places))
        return decoded

    def score(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Implements `Engine.score`, but encodes an input again for each of its answers.

        Raises:
            InputError: an answer lacks the end of sequence.
        """
        if any(ids[-1] != EOS_ID for of_row in answers for ids in of_row):
            raise InputError(
                f"{self.path}: CTranslate2 can score only targets that end with an end of sequence, but"
                " some targets have none; use the directory that this one was made from"
            )
        scores = [np.zeros(len(of_row), np.float32) for of_row in answers]

        def started():
            for pairs in self._pairs(rows, answers):
                yield (
                    pairs,
                    self._translator.score_batch(
                        [[self._names[i] for i in rows[place]] for place, _ in pairs],
                        # it adds the end of sequence itself
                        [[self._names[i] for i in answers[place][n][:-1]] for place, n in pairs],
                        max_input_length=0,
                        asynchronous=True,
                    ),
                )

        for pairs, results in pipelined(started(), self._ahead):
            for (place, number), result in zip(pairs, results, strict=True):
                scores[place][number] = sum(result.result().log_probs)
            done = sum(number == len(answers[place]) - 1 for place, number in pairs)
            if on_progress and done:
                on_progress(done)
        return scores

    def _pairs(self, rows, answers) -> Iterator[list[tuple[int, int]]]:
        """Yields batches of pairs (row index, answer index), in order of decreasing input length.

        The answers of a batch have at most `CHUNK_TOKENS` tokens, padding included.
        """
        pairs, longest = [], 0
        for place in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            for number, ids in enumerate(answers[place]):
                new_longest = max(longest, len(ids))
                # all tokens of a batch have logits at the same time
                if pairs and (len(pairs) + 1) * new_longest > CHUNK_TOKENS:
                    yield pairs
                    pairs, new_longest = [], len(ids)
                pairs.append((place, number))
                longest = new_longest
        if pairs:
            yield pairs

    def _start(
        self, rows: list[Sequence[int]], max_decode_len: int, prefix: list[str]
    ) -> list[Any]:
        """Puts one batch into CTranslate2's queue, and returns a pending result for each row."""
        return self._translator.translate_batch(
            [[self._names[i] for i in row] for row in rows],
            target_prefix=[prefix] * len(rows) if prefix else None,
            asynchronous=True,
            beam_size=self._beams,
            length_penalty=self._penalty,
            max_decoding_length=len(prefix) + max_decode_len,
            # 0 and 0: by default, CTranslate2 truncates inputs to 1024 tokens and forbids empty answers
            max_input_length=0,
            min_decoding_length=0,
            return_scores=True,
            return_end_token=True,
        )


class NotFinite(InputError):
    """Raised when a model gives NaN or infinite scores."""


def require_finite(model: Engine, scores: np.ndarray) -> None:
    """Raises `NotFinite` if a score is NaN or infinite."""
    if not np.isfinite(scores).all():
        raise NotFinite(
            f"{model.path}: the model gives NaN or infinite scores; its weights are damaged"
        )


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
