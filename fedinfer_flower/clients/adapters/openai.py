"""A model behind an OpenAI-compatible server, as a classifier over candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.registry import MODELS, ModelKind
from fedinfer_flower.clients.adapters.upstream import Upstream, read_api_key
from fedinfer_flower.clients.adapters.upstream_replies import (
    DIALECTS,
    Dialect,
    PromptToken,
    UpstreamText,
    chat_text,
    prompt_tokens,
    request_body,
    top_tokens,
)
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ModelAnswerError, ModelError
from fedinfer_flower.wire.text_rows import read_text_rows

__all__ = ["CandidateServer", "OpenAiModel", "UpstreamText", "chat", "detect"]

_PROBE: Final = "The first letters of the alphabet are A, B and"
_LEAST_MASS: Final = 1e-12


@MODELS.register("openai")
@dataclass(frozen=True, kw_only=True)
class OpenAiModel(ModelKind):
    """Options of a model behind an OpenAI-compatible server.

    Parameters
    ----------
    url, model, timeout_s, attempts, allow_http : see `Upstream`
    candidates : tuple of str
        Texts that may follow the prompt: the classes.
    api_key_env : str
        Environment variable that holds the server's API key.
    api_key_file : Path, optional
        File that holds it, readable by its owner alone.
    dialect : {"auto", "echo", "prompt-logprobs", "top-logprobs"}
        How the server tells probabilities; ``"auto"`` asks it, see `detect`.
    prompt : str
        With ``{question}`` in it, once.
    lead : str
        Between the prompt, or the text so far, and a candidate.
    top : int
        Tokens that are asked for under ``"top-logprobs"``.
    parallel : int
        Requests at a time.
    digest : str
        SHA-256 in hex that names the model; a server does not tell it. Without one, queries
        are not bound to this very model.

    Privacy
    -------
    The server reads the questions in clear; candidates are class names, which everybody
    reads.
    """

    url: str
    model: str
    candidates: tuple[str, ...]
    api_key_env: str = ""
    api_key_file: Path | None = None
    dialect: str = "auto"
    prompt: str = "Question: {question}\nAnswer:"
    lead: str = " "
    timeout_s: float = 60.0
    attempts: int = 3
    top: int = 20
    parallel: int = 4
    allow_http: bool = False
    digest: str = ""

    def make(self) -> LocalModel:
        """Ask the server what it can do.

        Raises
        ------
        ModelError
            If it cannot tell probabilities, or there is no API key where one should be.
        ModelAnswerError
            If it does not answer.
        InvalidValueError
        """
        candidates = self._checked_candidates()
        upstream = Upstream(
            url=self.url,
            model=self.model,
            api_key=read_api_key(env=self.api_key_env, file=self.api_key_file),
            timeout_s=self.timeout_s,
            attempts=self.attempts,
            allow_http=self.allow_http,
        )
        wanted = DIALECTS if self.dialect == "auto" else (self.dialect,)
        dialect = detect(upstream, wanted=wanted, top=self.top)
        return LocalModel(
            model=CandidateServer(upstream, dialect=dialect, options=self),
            classes=candidates,
            outputs="logits",
            digest=self.digest,
            model_card={"kind": "candidates of a model server", "logprobs": dialect.name},
        )

    def _checked_candidates(self) -> tuple[str, ...]:
        candidates = tuple(text.strip() for text in self.candidates)
        if len(set(candidates)) < max(2, len(candidates)) or "" in candidates:
            raise InvalidValueError("candidates are at least two texts, none empty or twice")
        if self.prompt.count("{question}") != 1:
            raise InvalidValueError("the prompt holds {question} once")
        if self.dialect not in ("auto", *DIALECTS):
            raise InvalidValueError(f"dialect is 'auto' or one of {', '.join(DIALECTS)}")
        if not 1 <= self.top <= 1000 or not 1 <= self.parallel <= 64:
            raise InvalidValueError("top is from 1 to 1000, parallel from 1 to 64")
        return candidates


class CandidateServer:
    """A callable from rows of text to log-probabilities of the candidates.

    Parameters
    ----------
    upstream : Upstream
    dialect : Dialect
        Under ``"top-logprobs"`` a candidate's first token must be all of it (option letters,
        most short words), and one that is not among the most probable gets the most that it
        can have, so that differences between improbable candidates are lost.
    options : OpenAiModel
    """

    def __init__(self, upstream: Upstream, *, dialect: Dialect, options: OpenAiModel) -> None:
        self._upstream, self._dialect, self._options = upstream, dialect, options
        self._candidates = tuple(text.strip() for text in options.candidates)

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return log-probabilities (n_queries, n_candidates).

        Raises
        ------
        ModelAnswerError
            If the server fails, or does not answer with log-probabilities of what it was
            asked.
        """
        prompts = [self._prompt(*row) for row in read_text_rows(inputs)]
        with ThreadPoolExecutor(self._options.parallel) as pool:
            if self._dialect.name == "top-logprobs":
                return np.array(list(pool.map(self._from_top, prompts)))
            return np.array(self._from_prompts(prompts, pool))

    def _prompt(self, question: str, text: str) -> str:
        before, _, after = self._options.prompt.partition("{question}")
        prompt = f"{before}{question}{after}"
        return prompt + self._options.lead + text if text else prompt

    def _from_prompts(self, prompts: Sequence[str], pool: Executor) -> list[list[float]]:
        """Score each candidate by the tokens that it adds to the prompt."""
        ends = ("", *(self._options.lead + text for text in self._candidates))
        asked = [prompt + end for prompt in prompts for end in ends]
        told = list(pool.map(lambda text: _tokens(self._upstream, self._dialect, text), asked))
        rows = []
        for start in range(0, len(told), len(ends)):
            alone, *others = told[start : start + len(ends)]
            rows.append([_added(alone, whole) for whole in others])
        return rows

    def _from_top(self, prompt: str) -> list[float]:
        body = request_body(self._dialect, prompt)
        told = top_tokens(self._upstream.post("completions", body))
        # What is left for all tokens that were not told, and no more than the least told.
        left = max(1.0 - sum(map(math.exp, told.values())), _LEAST_MASS)
        most = min(math.log(left), *told.values())
        scores = dict.fromkeys(self._candidates, -math.inf)
        for token, value in told.items():
            if (text := token.strip()) in scores:
                scores[text] = float(np.logaddexp(scores[text], value))
        return [most if score == -math.inf else score for score in scores.values()]


def detect(upstream: Upstream, *, wanted: Sequence[str] = DIALECTS, top: int = 20) -> Dialect:
    """Return the first way of telling probabilities that the server masters.

    It is tried, with a sentence of no meaning: servers ignore options that they do not know.

    Parameters
    ----------
    upstream : Upstream
    wanted : sequence of str
        Of `DIALECTS`, from the most wanted.
    top : int

    Raises
    ------
    ModelError
        If it masters none.
    ModelAnswerError
        If it does not answer at all.
    """
    for name in wanted:
        # Some servers must write a token; what they wrote is then left out.
        for max_tokens in (0, 1) if name == "echo" else (1,):
            dialect = Dialect(name=name, max_tokens=max_tokens, top=top)
            if _masters(upstream, dialect):
                return dialect
    raise ModelError(
        f"the model server tells no log-probabilities by {' or '.join(wanted)}",
        hint="vLLM tells those of a prompt; llama.cpp and Ollama only the most probable tokens",
    )


def chat(
    upstream: Upstream, question: str, *, system: str = "", max_new_tokens: int = 256
) -> UpstreamText:
    """Let the server write an answer, through ``/v1/chat/completions``.

    Parameters
    ----------
    upstream : Upstream
    question : str
    system : str
        What stands before the question.
    max_new_tokens : int

    Raises
    ------
    ModelAnswerError
    """
    if not 1 <= max_new_tokens <= 1 << 16:
        raise InvalidValueError("max_new_tokens is from 1 to 65536")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    body = {"messages": messages, "max_tokens": max_new_tokens, "temperature": 0}
    return chat_text(upstream.post("chat/completions", body))


def _masters(upstream: Upstream, dialect: Dialect) -> bool:
    reply = upstream.try_post("completions", request_body(dialect, _PROBE))
    if reply is None:
        return False
    try:
        if dialect.name == "top-logprobs":
            return len(top_tokens(reply)) > 1
        # A token for each of a few characters at least: not a single one for all.
        return len(prompt_tokens(reply, dialect, _PROBE)) > 3
    except ModelAnswerError:
        return False


def _tokens(upstream: Upstream, dialect: Dialect, text: str) -> list[PromptToken]:
    return prompt_tokens(upstream.post("completions", request_body(dialect, text)), dialect, text)


def _added(alone: list[PromptToken], whole: list[PromptToken]) -> float:
    """Return the log-probability of the tokens that `whole` has behind those of `alone`."""
    names = [name for name, _ in alone]
    if len(whole) <= len(alone) or [name for name, _ in whole[: len(alone)]] != names:
        # The tokenizer joins the end of the prompt with the candidate.
        raise ModelAnswerError(
            "a candidate does not begin with a token of its own",
            hint="another lead, or a prompt that ends in no white space",
        )
    return sum(value for _, value in whole[len(alone) :] if value is not None)
