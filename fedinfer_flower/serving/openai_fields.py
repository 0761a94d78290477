"""Fields of OpenAI's requests: what a federation honours, what changes nothing, what it refuses.

A field that is known and cannot be honoured is refused by name: an application that asks for
two answers, tools or JSON must not get one answer in prose and believe that it got what it
asked for. Fields that only say who asks are dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from fedinfer_flower.errors import ConfigError, FedInferError, InvalidValueError, ProtocolError
from fedinfer_flower.serving.problem import HttpProblem
from fedinfer_flower.serving.text_job import TextJob

__all__ = ["Refused", "kept_fields", "options_of", "stream_of", "text_of"]

_MOST_TOKENS: Final = 32_768
_TOOLS: Final = "models of a federation call no tools"
_ZERO: Final = (0, 0.0)

_DROPPED: Final = frozenset(
    {
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
        "max_tool_calls",
    }
)
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": _ZERO,
    "frequency_penalty": _ZERO,
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning": ({}, {"effort": "none"}, {"effort": "minimal"}),
    "reasoning_effort": ("none", "minimal"),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "store": (False,),
}
_WHY: Final[Mapping[str, str]] = {
    "n": "one answer comes back",
    "logprobs": "sites do not show token probabilities",
    "top_logprobs": "sites do not show token probabilities",
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": "the form of an answer is not enforced: 'text' is all there is",
    "text": "the form of an answer is not enforced: 'text' is all there is",
    "store": "no answer is stored",
    "previous_response_id": "no answer is stored: send the messages again",
    "conversation": "no conversation is stored: send the messages again",
    "prompt": "no prompt is stored here",
    "background": "wait for the answer, or ask at /v1/query",
    "reasoning": "models of a federation are not told how long to think",
    "reasoning_effort": "models of a federation are not told how long to think",
    "audio": "text alone",
    "modalities": "text alone",
}


class Refused(Exception):
    """A request that is refused for one of its fields.

    Parameters
    ----------
    error : FedInferError
    param : str
        The field, as OpenAI's errors name it.
    """

    def __init__(self, error: FedInferError, *, param: str) -> None:
        self.problem, self.param = HttpProblem(error), param
        super().__init__(error.message)

    @classmethod
    def because(cls, param: str, why: str, *, hint: str = "") -> Refused:
        """Return the refusal of a field."""
        return cls(InvalidValueError(f"{param}: {why}", hint=hint), param=param)


def kept_fields(
    values: Mapping[str, Any], *, read: Collection[str], dropped: Collection[str] = ()
) -> dict[str, Any]:
    """Return the fields that are read; a null is as good as nothing.

    Parameters
    ----------
    values : mapping
        The body.
    read : collection of str
        Names that the caller goes on with.
    dropped : collection of str
        More names whose values change nothing.

    Raises
    ------
    Refused
        For a field whose value is not honoured, or that is not known.

    Examples
    --------
    >>> kept_fields({"model": "m", "n": 1, "user": "x", "seed": None}, read=("model", "seed"))
    {'model': 'm'}
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or name in _DROPPED or name in dropped:
            continue
        if name in read:
            kept[name] = value
        elif not any(_same(value, neutral) for neutral in _NEUTRAL.get(name, ())):
            known = name in _NEUTRAL or name in _WHY
            why = _WHY.get(name, "not honoured here" if known else "a field that nothing reads")
            raise Refused.because(name[:64], why, hint="leave it out")
    return kept


def options_of(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a text job.

    Parameters
    ----------
    values : mapping
        Fields of the request.
    names : mapping of field to option
        ``max_new_tokens`` is capped at what a site takes; two fields for it must agree.

    Raises
    ------
    Refused
        For a value out of its range.
    """
    options: dict[str, Any] = {}
    for param, option in names.items():
        if param not in values:
            continue
        value = values[param]
        if option == "max_new_tokens" and type(value) is int:
            value = min(value, _MOST_TOKENS)
        if options.get(option, value) != value:
            raise Refused.because(param, "two fields that say different things")
        try:
            options |= TextJob(questions=["?"], options={option: value}).options
        except (ConfigError, ProtocolError) as exc:
            raise Refused.because(param, exc.message) from None
    return options


def stream_of(values: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether to stream, and whether the stream ends with a count.

    Raises
    ------
    Refused
    """
    stream, options = values.get("stream", False), values.get("stream_options", {})
    if type(stream) is not bool:
        raise Refused.because("stream", "true or false")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused.because("stream_options", "an object with include_usage")
    if not all(value is None or type(value) is bool for value in options.values()):
        raise Refused.because("stream_options", "true or false")
    if options and not stream:
        raise Refused.because("stream_options", "goes with stream=true")
    return stream, bool(options.get("include_usage"))


def text_of(content: object, param: str) -> str:
    """Return the text of a message: a string, or a list of parts of text.

    Raises
    ------
    Refused
        For a picture, sound or file.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refused.because(f"{param}.content", "a text, or a list of parts of text")
    texts = []
    for n, part in enumerate(content):
        where = f"{param}.content[{n}]"
        if not isinstance(part, dict) or part.get("type") not in (
            "text",
            "input_text",
            "output_text",
        ):
            raise Refused.because(where, "models of a federation read text alone")
        if not isinstance(part.get("text"), str):
            raise Refused.because(where, "a part of text has a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _same(value: object, neutral: object) -> bool:
    # True is 1 to Python, and not to whoever asks for True answers.
    return type(value) is type(neutral) and value == neutral
