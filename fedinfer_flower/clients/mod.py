"""`InferenceMod`: one line that makes any ClientApp answer queries with its local model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedinfer_flower.clients.answering import Consent, answer_question
from fedinfer_flower.clients.containment import contained, log_locally
from fedinfer_flower.clients.model_cache import DEFAULT_CAPACITY, get_or_load
from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    ModelAnswerError,
    ModelLoadError,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import ACTIONS, HELLO, PREDICT, PREFIX
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import pack, unpack

__all__ = ["InferenceMod", "inference"]

log = logging.getLogger("fedinfer_flower.site")

_SEE_LOG = "see the site's own log"

LoadModel = Callable[[Context], object]


class InferenceMod:
    """Answer ``query.fi_*`` messages with a local model; pass everything else on.

    Attach it to an app of the Message API, or give it to an app with a ``client_fn`` as
    a mod. Training and evaluation are not touched.

    Parameters
    ----------
    load_model : callable
        From Flower's Context to a fitted model, or to a `LocalModel`. Called once per
        process, run and partition; what it returns stays resident.
    share_counts : {"presence", "counts", "withheld"}
        What the coordinator is told of the training data's classes.
    name : str, optional
        The site's name; default ``name`` in the node config, else ``site-<partition>``.
    protections : collection of str, optional
        Protections under which the site answers; default all.
    querier_key_ids : collection of str, optional
        Fingerprints of the queriers' keys that the site trusts; default any.
    max_epsilon_per_query : float, optional
        Refuse `dp` with a larger epsilon for one query row.
    limits : WireLimits
        Largest messages that are read.
    max_models : int
        Models kept resident in one process.

    Raises
    ------
    InvalidValueError
        For an option out of its range.

    Privacy
    -------
    The coordinator learns the profile (class names, counts or presence bits as far as
    consented, model card, temperature) and the protected scores. It never receives the
    text of an exception: Flower would send it verbatim, so every failure becomes a
    typed error with fixed words.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp()
    >>> _ = InferenceMod(lambda context: None).attach(app)     # Message API
    >>> legacy = ClientApp(lambda context: None,               # client_fn
    ...                    mods=[InferenceMod(lambda context: None)])
    """

    def __init__(
        self,
        load_model: LoadModel,
        *,
        share_counts: str = "presence",
        name: str | None = None,
        protections: Collection[str] | None = None,
        querier_key_ids: Collection[str] | None = None,
        max_epsilon_per_query: float | None = None,
        limits: WireLimits = DEFAULT_LIMITS,
        max_models: int = DEFAULT_CAPACITY,
    ) -> None:
        if not callable(load_model):
            raise InvalidValueError("load_model is a function from Context to a model")
        if share_counts not in CountsKind.__members__.values():
            raise InvalidValueError(
                f"share_counts is 'presence', 'counts' or 'withheld', not {share_counts!r}"
            )
        if isinstance(protections, str) or isinstance(querier_key_ids, str):
            raise InvalidValueError(
                "protections and querier_key_ids are collections", hint="write ('he',), not 'he'"
            )
        if max_models < 1:
            raise InvalidValueError("max_models is at least 1")
        self._load_model = load_model
        self._share_counts = CountsKind(share_counts)
        self._name = name
        self._consent = Consent(
            protections=None if protections is None else frozenset(protections),
            querier_key_ids=None if querier_key_ids is None else frozenset(querier_key_ids),
            max_epsilon_per_query=max_epsilon_per_query,
        )
        self._limits = limits
        self._max_models = max_models

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Act as a Flower mod."""
        if message.metadata.message_type.startswith(PREFIX):
            return self.handle(message, context)
        return call_next(message, context)

    def attach(self, app: ClientApp) -> ClientApp:
        """Register the handlers at an app of the Message API and return the app.

        Flower runs mods around registered functions only, so a mod in
        ``ClientApp(mods=[...])`` alone is never asked about an action that no function
        has registered; with a ``client_fn`` it is.

        Raises
        ------
        ConfigError
            If the app has a ``client_fn``.
        """
        try:
            for action in ACTIONS:
                app.query(action)(self.handle)
        except ValueError as exc:
            raise ConfigError(
                "the handlers could not be registered at this ClientApp",
                hint="an app with client_fn takes the mod instead:"
                " ClientApp(client_fn, mods=[InferenceMod(load_model)])",
            ) from exc
        return app

    def handle(self, message: Message, context: Context) -> Message:
        """Answer one ``query.fi_*`` message. Always returns a valid reply.

        A reply that is None or cannot be sent blocks a SuperNode for good, and the text
        of an exception travels to the server: neither leaves this function.
        """
        try:
            # Packed in here, because a value that JSON cannot hold raises as well.
            return Message(pack(self._reply(message, context)), reply_to=message)
        except FedInferError as exc:
            envelope = self._error(exc, message, context)
        except (Exception, SystemExit) as exc:
            log_locally(exc)
            generic = ModelAnswerError("the site's handler failed", hint="see the site's own log")
            envelope = self._error(generic, message, context)
        return Message(pack(envelope), reply_to=message)

    def _reply(self, message: Message, context: Context) -> Envelope:
        if not message.has_content():
            raise EnvelopeError("a query without content")
        envelope = unpack(message.content, limits=self._limits)
        if envelope.run_id != context.run_id:
            raise BindingError("the query belongs to another run")
        action = message.metadata.message_type.removeprefix("query.")
        run_id, sender = context.run_id, context.node_id
        if action == HELLO and envelope.kind is Kind.HELLO:
            profile = self._model(context).profile
            return messages.site_profile(profile, run_id=run_id, sender=sender)
        if action == PREDICT and envelope.kind is Kind.QUERY:
            asked = messages.read_question(envelope, limits=self._limits)
            return self._answer(asked, context)
        if envelope.kind is Kind.PING:
            return Envelope(kind=Kind.PING, run_id=run_id, sender=sender)
        raise EnvelopeError(f"action {action!r} does not take a {envelope.kind.value} envelope")

    def _answer(self, asked: messages.Question, context: Context) -> Envelope:
        model = self._model(context)
        with contained(
            ModelAnswerError, "the query could not be answered", hint=_SEE_LOG, pass_typed=True
        ):
            payload, width = answer_question(model, asked, self._consent)
        return messages.answer(
            asked,
            run_id=context.run_id,
            sender=context.node_id,
            payload=payload,
            width=width,
            commitment=model.profile.commitment(),
        )

    def _model(self, context: Context) -> SiteModel:
        partition = str(context.node_config.get("partition-id", context.node_id))
        loader = f"{self._load_model.__module__}.{getattr(self._load_model, '__qualname__', '')}"

        def load() -> SiteModel:
            with contained(ModelLoadError, "load_model failed", hint=_SEE_LOG):
                loaded = self._load_model(context)
            with contained(
                ModelLoadError, "the model is not usable", hint=_SEE_LOG, pass_typed=True
            ):
                return prepare(
                    loaded, name=self._site_name(context), share_counts=self._share_counts
                )

        key = (context.run_id, partition, loader)
        return get_or_load(key, load, capacity=self._max_models)

    def _site_name(self, context: Context) -> str:
        default = f"site-{context.node_config.get('partition-id', context.node_id)}"
        return str(self._name or context.node_config.get("name", default))[:128]

    @staticmethod
    def _error(exc: FedInferError, message: Message, context: Context) -> Envelope:
        query_id = ""
        try:
            query_id = unpack(message.content).query_id
        except Exception:
            log.debug("the query could not be read at all")
        return messages.error(exc, run_id=context.run_id, sender=context.node_id, query_id=query_id)


def inference(app: ClientApp, **options: object) -> Callable[[LoadModel], LoadModel]:
    """Decorate `load_model` so that `app` answers queries with what it returns.

    Parameters
    ----------
    app : ClientApp
        Of the Message API.
    **options
        As for `InferenceMod`.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp()
    >>> @inference(app, share_counts="counts")
    ... def load_model(context):
    ...     return None
    """

    def decorator(load_model: LoadModel) -> LoadModel:
        InferenceMod(load_model, **options).attach(app)  # type: ignore[arg-type]
        return load_model

    return decorator
