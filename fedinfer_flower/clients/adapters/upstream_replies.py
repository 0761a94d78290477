"""Replies of OpenAI-compatible servers, read strictly, in the forms that servers give them.

Forms, as the servers' public sources and issue threads show them:

- ``echo``: ``/v1/completions`` with ``echo`` and ``logprobs`` gives tokens of the prompt with
  their log-probabilities. OpenAI's older models, vLLM, llama-cpp-python, SGLang.
- ``prompt-logprobs``: vLLM's own ``prompt_logprobs``, by token id.
- ``top-logprobs``: only the most probable first tokens of an answer. llama.cpp's server, which
  refuses ``echo``, and gives the form of chat completions; Ollama's recent versions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from fedinfer_flower.errors import ModelAnswerError

__all__ = [
    "DIALECTS",
    "Dialect",
    "PromptToken",
    "UpstreamText",
    "chat_text",
    "prompt_tokens",
    "request_body",
    "top_tokens",
]

DIALECTS: Final = ("echo", "prompt-logprobs", "top-logprobs")
"""From the one that tells most."""

_MAX_TOKENS: Final = 1 << 17
_MAX_TEXT: Final = 1 << 20
_ROUNDING: Final = 1e-3
_MOST_LOGPROB: Final = 1e5
"""-9999 and the like stand for what is impossible."""

PromptToken = tuple[str, float | None]
"""What a token is called, and its log-probability; None for the first."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one server tells probabilities.

    Parameters
    ----------
    name : str
        Of `DIALECTS`.
    max_tokens : int
        Tokens that a request lets the server write: 0 where it takes that, else 1.
    top : int
        Tokens asked for under ``"top-logprobs"``.
    """

    name: str
    max_tokens: int = 1
    top: int = 20


@dataclass(frozen=True, kw_only=True)
class UpstreamText:
    """A text that a server wrote.

    Parameters
    ----------
    text : str
    finish : {"stop", "length"}
        Whether it came to its end, or to the most tokens.
    """

    text: str
    finish: str


def request_body(dialect: Dialect, prompt: str) -> dict[str, Any]:
    """Return the body of a request to ``/v1/completions``, without the model."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": dialect.max_tokens, "temperature": 0}
    if dialect.name == "echo":
        return {**body, "echo": True, "logprobs": 1}
    if dialect.name == "prompt-logprobs":
        return {**body, "prompt_logprobs": 0}
    return {**body, "logprobs": dialect.top}


def prompt_tokens(reply: dict[str, Any], dialect: Dialect, prompt: str) -> list[PromptToken]:
    """Return the prompt's tokens, the first without a log-probability.

    Raises
    ------
    ModelAnswerError
        If the reply is not one about this prompt.
    """
    choice = _choice(reply)
    if dialect.name == "prompt-logprobs":
        return _by_id(choice.get("prompt_logprobs"))
    text = choice.get("text")
    # A server that does not know `echo` tells the tokens of what it wrote itself.
    if not isinstance(text, str) or not text.startswith(prompt):
        raise _not("the prompt that it was asked about")
    found = choice.get("logprobs")
    logprobs: dict[str, Any] = found if isinstance(found, dict) else {}
    names, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if (
        not isinstance(names, list)
        or not isinstance(values, list)
        or not len(names) == len(values) <= _MAX_TOKENS
        or not all(isinstance(name, str) for name in names)
    ):
        raise _not("tokens with as many log-probabilities")
    n_prompt = len(names) - dialect.max_tokens
    return _checked(list(zip(names[:n_prompt], values[:n_prompt], strict=True)))


def top_tokens(reply: dict[str, Any]) -> dict[str, float]:
    """Return log-probabilities of the most probable first tokens of an answer, by text.

    Raises
    ------
    ModelAnswerError
    """
    found = _choice(reply).get("logprobs")
    logprobs: dict[str, Any] = found if isinstance(found, dict) else {}
    content, top = logprobs.get("content"), logprobs.get("top_logprobs")
    first = content[0] if isinstance(content, list) and content else {}
    listed = first.get("top_logprobs") if isinstance(first, dict) else None
    if isinstance(top, list) and top and isinstance(top[0], dict):
        pairs = list(top[0].items())
    elif isinstance(listed, list) and all(isinstance(each, dict) for each in listed):
        pairs = [(each.get("token"), each.get("logprob")) for each in listed]
    else:
        pairs = []
    if not 0 < len(pairs) <= _MAX_TOKENS or not all(isinstance(name, str) for name, _ in pairs):
        raise _not("the most probable tokens")
    told: dict[str, float] = {}
    for name, value in pairs:
        # Two tokens may have one text; both write it.
        told[name] = float(max(_number(value), told.get(name, -math.inf)))
    return told


def chat_text(reply: dict[str, Any]) -> UpstreamText:
    """Return the text of a reply of ``/v1/chat/completions``.

    Raises
    ------
    ModelAnswerError
    """
    choice = _choice(reply)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise _not("a message with a text")
    return UpstreamText(
        text=text, finish="length" if choice.get("finish_reason") == "length" else "stop"
    )


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise _not("one choice")
    return choices[0]


def _by_id(listed: Any) -> list[PromptToken]:
    """Read vLLM's form: for each token of the prompt a mapping from its id, None for the first."""
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_TOKENS:
        raise _not("log-probabilities of the prompt")
    tokens: list[PromptToken] = []
    for place, entry in enumerate(listed):
        if place == 0 and entry is None:
            tokens.append(("", None))
            continue
        # More than one entry would leave open which of them is the prompt's own.
        if not isinstance(entry, dict) or len(entry) != 1:
            raise _not("one log-probability for each token of the prompt")
        ((name, facts),) = entry.items()
        tokens.append((str(name), facts.get("logprob") if isinstance(facts, dict) else facts))
    return _checked(tokens)


def _checked(tokens: list[tuple[str, Any]]) -> list[PromptToken]:
    if len(tokens) < 1:
        raise _not("a token of the prompt")
    # The first token follows nothing; what a server tells of it is not used.
    return [(tokens[0][0], None), *((name, _number(value)) for name, value in tokens[1:])]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _not("numbers for log-probabilities")
    # A whole number may be too large for a float; a little above 0 is rounding.
    if abs(value) < _MOST_LOGPROB and value < _ROUNDING:
        return min(float(value), 0.0)
    raise _not("finite log-probabilities")


def _not(what: str) -> ModelAnswerError:
    return ModelAnswerError(f"the site's model server did not answer with {what}")
