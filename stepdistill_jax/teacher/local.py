"""Runs a teacher without a server: a sequence-to-sequence or causal model in a transformers directory."""

import asyncio
import pathlib
from typing import Any

from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.budget import Reservation
from stepdistill_jax.teacher.client import now

NEXT_QUESTIONS = ("\nQ:", "\nPremise:")  # a causal model writes these after a complete answer


class LocalTeacher:
    """Generates answers with torch, in batches of the questions that are waiting at the same time."""

    def __init__(self, directory: str, batch_size: int):
        """Loads the model and its tokenizer from disk.

        Args:
            directory: folder written by `save_pretrained`.
            batch_size: largest number of prompts in a batch.

        Raises:
            InputError: torch is missing, or the model cannot be loaded.
        """
        try:
            import torch
            import transformers
        except ImportError:
            raise InputError(
                f"`teacher=hf:DIR` needs torch, which is not installed; {how_to_install('torch')}"
            ) from None
        if not pathlib.Path(directory, "config.json").is_file():
            raise InputError(f"`teacher` hf:{directory}: there is no config.json in this folder")
        try:
            # Python code in the directory is never run
            how = {"local_files_only": True, "trust_remote_code": False}
            config = transformers.AutoConfig.from_pretrained(directory, **how)
            kind = (
                transformers.AutoModelForSeq2SeqLM
                if config.is_encoder_decoder
                else transformers.AutoModelForCausalLM
            )
            model: Any = kind.from_pretrained(directory, **how)
            self._model = model.eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, padding_side="left", **how
            )
        except Exception as error:  # torch, safetensors and tokenizers raise errors of many types
            raise InputError(
                f"`teacher` hf:{directory}: the model cannot be loaded ({error})"
            ) from None
        if torch.cuda.is_available():
            self._model = self._model.to("cuda")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._causal = not config.is_encoder_decoder
        self._batch_size = batch_size
        self._waiting: list[tuple[str, dict[str, Any], asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    async def ask(
        self, prompt: str, parameters: dict[str, Any], reservation: Reservation | None = None
    ) -> Answer:
        """Returns one answer, which is generated in a batch with other waiting questions."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, parameters, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        """Cancels the waiting questions."""
        if self._worker is not None:
            self._worker.cancel()

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets questions of the same moment join the batch
            batch = self._waiting[: self._batch_size]
            del self._waiting[: self._batch_size]
            try:
                prompts = [prompt for prompt, _, _ in batch]
                answers = await asyncio.to_thread(self.generate, prompts, batch[0][1])
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def generate(self, prompts: list[str], parameters: dict[str, Any]) -> list[Answer]:
        """Returns one answer per prompt.

        Args:
            prompts: the users' messages. The tokenizer's chat template, if there is one, is applied here.
            parameters: `max_tokens`, `temperature` (0 means greedy), `top_p`, `top_k`.
        """
        import torch

        encoded = self._encode(prompts).to(self._model.device)
        temperature = parameters.get("temperature", 1.0)
        how: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            names = ("temperature", "top_p", "top_k")
            how |= {name: parameters[name] for name in names if name in parameters}
        with torch.inference_mode():
            output = self._model.generate(
                **encoded,
                max_new_tokens=parameters["max_tokens"],
                stopping_criteria=self._ends(encoded["input_ids"].shape[1]),
                pad_token_id=self._tokenizer.pad_token_id,
                **how,
            )
        if self._causal:
            output = output[:, encoded["input_ids"].shape[1] :]
        else:
            output = output[:, 1:]  # without the decoder's start token
        prompt_tokens = encoded["attention_mask"].sum(dim=1).tolist()
        return [
            self._answer(ids, count, parameters)
            for ids, count in zip(output.tolist(), prompt_tokens, strict=True)
        ]

    def _ends(self, prompt_length: int) -> list[Any] | None:
        """Returns a stopping criterion for a causal model, or None for an encoder-decoder.

        The criterion ends an answer when the model starts to write another question.
        """
        import torch

        if not self._causal:
            return None

        def begins_a_question(ids: Any, _scores: Any, **_: Any) -> Any:
            # the text of the last 16 tokens; a mark is shorter than that
            latest = ids[:, max(prompt_length, ids.shape[1] - 16) :]
            texts = self._tokenizer.batch_decode(latest, skip_special_tokens=True)
            done = [any(mark in text for mark in NEXT_QUESTIONS) for text in texts]
            return torch.tensor(done, device=ids.device)

        return [begins_a_question]

    def _encode(self, prompts: list[str]) -> Any:
        if self._tokenizer.chat_template:
            prompts = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                for prompt in prompts
            ]
        encoded = self._tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not self._tokenizer.chat_template,
        )
        encoded.pop("token_type_ids", None)
        return encoded

    def _answer(self, ids: list[int], prompt_tokens: int, parameters: dict[str, Any]) -> Answer:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        at = next((i for i, token in enumerate(ids) if token in ends), None)
        own = ids if at is None else ids[:at]
        while (
            own and own[-1] == self._tokenizer.pad_token_id
        ):  # padding to the longest of the batch
            own = own[:-1]
        text = self._tokenizer.decode(own, skip_special_tokens=True)
        ended = at is not None or any(stop in text for stop in NEXT_QUESTIONS)
        used = len(own) + (at is not None)
        return Answer(text, "stop" if ended else "length", prompt_tokens, used, now(), parameters)


def fingerprint(directory: str) -> list[list[Any]]:
    """Returns [name, size, modification time] of each file in a model's folder, to identify the model."""
    files = sorted(p for p in pathlib.Path(directory).glob("*") if p.is_file())
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
