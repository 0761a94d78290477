"""`LanguageMod`: one line that makes a ClientApp ask, help and answer with a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedinfer_flower.clients import language_answering, refine_answering, refine_rephrasing
from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_memory import RequestMemory, language_memory
from fedinfer_flower.clients.language_policy import LanguagePolicy
from fedinfer_flower.clients.language_speed import measure_speeds
from fedinfer_flower.clients.language_state import (
    Desk,
    LanguageSite,
    LanguageState,
    get_or_load,
)
from fedinfer_flower.clients.mod_options import require_alone
from fedinfer_flower.clients.model_cache import DEFAULT_CAPACITY
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_gate import Passage, gate_of
from fedinfer_flower.clients.site_audit import answer_message
from fedinfer_flower.clients.site_memory import ContextMemory
from fedinfer_flower.clients.site_place import site_folder, site_name
from fedinfer_flower.errors import (
    ConfigError,
    EnvelopeError,
    InvalidValueError,
    ModelAnswerError,
    ModelError,
    ModelLoadError,
)
from fedinfer_flower.wire.actions import (
    CANDIDATES,
    GENERATE,
    INTRODUCE,
    LANGUAGE_ACTIONS,
    REFINE,
    REPHRASE,
    SHARE_CACHE,
)
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.language_card import FuserNote, LanguageCard

if TYPE_CHECKING:
    from fedinfer_flower.kv.fuser_bank import FuserBank
    from fedinfer_flower.kv.gate import Gate

__all__ = ["LanguageMod", "LanguagePolicy", "LanguageSite"]

_SEE_LOG: Final = "see the site's own log"
_PREFIX: Final = "query."

LoadLanguageModel = Callable[[Context], object]


class LanguageMod:
    """Take part in refinements with a local language model, as sharer and as receiver.

    Attach it to an app of the Message API, beside an `InferenceMod` or without one. With a
    ``client_fn`` it is a mod, and stands before an `InferenceMod` in the list.

    Parameters
    ----------
    load_model : callable
        From Flower's Context to a `LanguageModel`, or to a `LanguageSite` with the site's
        documents. Called once per process, run and partition.
    policy : LanguagePolicy, optional
        What the site shares: nothing by default.
    fusers : FuserBank, path or mapping, optional
        Those that the site has as receiver; without one for a pair, only text helps.
    gate : Gate, path or str, optional
        How the receiver chooses among sharers: a trained one, the folder of one, or the name
        of one that needs no training. Default: all that came are used.
    rephrase : str
        How questions are rewritten for sharers, where the querier does not say.
    name : str, optional
        The site's name; default ``name`` in the node config, else ``site-<partition>``.
    home : path or callable, optional
        As in `InferenceMod`; the same folder serves both, with one identity.
    querier_key_ids, peer_key_ids : collection of str, optional
        Queriers whose questions the site works on, and sites that it helps or is helped by;
        default any, or those in the ``pins.toml`` of the home.
    require_seal : bool
        Work on sealed questions only.
    limits : WireLimits
    max_models : int
        Models kept resident in one process.
    site_policy : SitePolicy, optional
        Says all of the above but the model, fusers, gate and rephraser; its limits, actions
        and audit log are enforced as well. `clients.site_app` makes a whole app of one.

    Raises
    ------
    InvalidValueError
        For an option out of its range.

    Privacy
    -------
    As receiver the site reads the questions; as sharer, rewritten ones. What it shares can be
    read by the receiver, in full if the receiver is dishonest: see `LanguagePolicy`. The
    coordinator relays seals, and reads what is in them only under ``coordinator_fusers``; but
    a coordinator that cheats can be a receiver of its own making, and read what it is given
    as one, unless `peer_key_ids` or `querier_key_ids` say whom the site knows. It never
    receives the text of an exception.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> mod = LanguageMod(lambda context: None, policy=LanguagePolicy(text=True))
    >>> app = mod.attach(ClientApp())
    """

    def __init__(
        self,
        load_model: LoadLanguageModel,
        *,
        policy: LanguagePolicy | None = None,
        fusers: FuserBank | str | Path | Mapping[Any, Any] | None = None,
        gate: Gate | str | Path | None = None,
        rephrase: str = "template",
        name: str | None = None,
        home: str | Path | Callable[[Context], str | Path] | None = None,
        querier_key_ids: Collection[str] | None = None,
        peer_key_ids: Collection[str] | None = None,
        require_seal: bool = False,
        limits: WireLimits = DEFAULT_LIMITS,
        max_models: int = DEFAULT_CAPACITY,
        site_policy: SitePolicy | None = None,
    ) -> None:
        if site_policy is not None:
            require_alone((policy, name, home, querier_key_ids, peer_key_ids, require_seal))
            policy = site_policy.language_policy
            name, home, limits = (
                site_policy.site.name,
                site_policy.site.home,
                site_policy.wire_limits,
            )
        if not callable(load_model):
            raise InvalidValueError("load_model is a function from Context to a language model")
        if policy is not None and not isinstance(policy, LanguagePolicy):
            raise InvalidValueError(
                "policy is a LanguagePolicy", hint="LanguagePolicy.from_mapping reads a table"
            )
        for option, given in (("querier_key_ids", querier_key_ids), ("peer_key_ids", peer_key_ids)):
            if isinstance(given, str):
                raise InvalidValueError(f"{option} is a collection of key ids, not one of them")
        if max_models < 1:
            raise InvalidValueError("max_models is at least 1")
        self._load_model = load_model
        self._policy = policy or LanguagePolicy()
        self._fusers, self._gate, self._rephrase = fusers, gate, rephrase
        self._name, self._home = name, home
        self._site_gate = gate_of(site_policy)
        self._keys = (
            site_policy.consent
            if site_policy is not None
            else Consent(
                querier_key_ids=None if querier_key_ids is None else frozenset(querier_key_ids),
                peer_key_ids=None if peer_key_ids is None else frozenset(peer_key_ids),
                require_seal=require_seal,
            )
        )
        self._limits, self._max_models = limits, max_models

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Act as a Flower mod."""
        if _action(message) in LANGUAGE_ACTIONS:
            return self.handle(message, context)
        return call_next(message, context)

    def attach(self, app: ClientApp) -> ClientApp:
        """Register the handlers at an app of the Message API and return the app.

        Raises
        ------
        ConfigError
            If the app has a ``client_fn``.
        """
        try:
            for action in LANGUAGE_ACTIONS:
                app.query(action)(self.handle)
        except ValueError as exc:
            raise ConfigError(
                "the handlers could not be registered at this ClientApp",
                hint="an app with client_fn takes the mod instead:"
                " ClientApp(client_fn, mods=[LanguageMod(load_model)])",
            ) from exc
        return app

    def handle(self, message: Message, context: Context) -> Message:
        """Answer one message. Always returns a valid reply, and never the text of an exception."""
        return answer_message(
            message, context, self._reply, gate=self._site_gate, limits=self._limits
        )

    def _reply(
        self, message: Message, envelope: Envelope, context: Context, passage: Passage
    ) -> Envelope:
        action, sender = _action(message), context.node_id
        if action == INTRODUCE and envelope.kind is Kind.HELLO:
            return self._card(context).to_envelope(sender=sender)
        if envelope.kind is not Kind.QUERY:
            raise EnvelopeError(f"action {action!r} does not take a {envelope.kind.value} envelope")
        verb, medium = envelope.meta.get("verb"), envelope.meta.get("medium")
        desk = self._desk(context, passage)
        with contained(ModelAnswerError, "the request failed", hint=_SEE_LOG, pass_typed=True):
            if action == REPHRASE:
                return refine_rephrasing.rephrase(envelope, desk, sender=sender)
            if action == SHARE_CACHE and verb == "fetch":
                return language_answering.fetch(envelope, desk, sender=sender)
            if (action, medium) in ((SHARE_CACHE, "cache"), (GENERATE, "text")):
                return language_answering.share(envelope, desk, sender=sender)
            if action == REFINE:
                return refine_answering.refine(envelope, desk, sender=sender)
            if action == CANDIDATES:
                return refine_answering.score_candidates(envelope, desk, sender=sender)
        raise EnvelopeError("an action with a document that is not for it")

    # -- parts -------------------------------------------------------------------------

    def _card(self, context: Context) -> LanguageCard:
        state, policy = self._state(context), self._policy
        notes = [
            FuserNote(
                sharer_digest=spec.sharer.model_digest, kind=spec.kind, share=spec.share.to_dict()
            )
            for spec in state.bank.pairs()
            if spec.receiver.model_digest == state.model.layout.model_digest
        ]
        card = LanguageCard(
            run_id=context.run_id,
            name=site_name(self._name, context),
            layout=state.model.layout.to_json(),
            node_id=context.node_id,
            media=policy.media,
            answers=policy.answers,
            coordinator_fusers=policy.coordinator_fusers,
            candidates=policy.candidates,
            codecs=policy.codecs,
            max_questions=policy.max_questions,
            max_new_tokens=policy.max_new_tokens,
            one_phase_bytes=policy.one_phase_bytes,
            speeds=state.speeds,
            fusers=tuple(notes),
        )
        return card.signed(self._memory(context).identity)

    def _desk(self, context: Context, passage: Passage) -> Desk:
        folder = self._folder(context)
        keys = self._keys if folder is None else self._keys.with_pins_of(folder)
        return Desk(
            state=self._state(context),
            policy=self._policy,
            memory=self._memory(context),
            run_id=context.run_id,
            limits=self._limits,
            now_s=time.time(),
            querier_key_ids=keys.querier_key_ids,
            peer_key_ids=keys.peer_key_ids,
            require_seal=keys.require_seal,
            passage=passage,
        )

    def _memory(self, context: Context) -> RequestMemory:
        folder = self._folder(context)
        return ContextMemory(context) if folder is None else language_memory(folder.absolute())

    def _folder(self, context: Context) -> Path | None:
        return site_folder(self._home, context)

    def _state(self, context: Context) -> LanguageState:
        partition = str(context.node_config.get("partition-id", context.node_id))
        loader = f"{self._load_model.__module__}.{getattr(self._load_model, '__qualname__', '')}"
        key = (context.run_id, partition, loader)
        return get_or_load(key, lambda: self._loaded(context), capacity=self._max_models)

    def _loaded(self, context: Context) -> LanguageState:
        with contained(ModelLoadError, "load_model failed", hint=_SEE_LOG):
            loaded = self._load_model(context)
        with contained(ModelLoadError, "the model is not usable", hint=_SEE_LOG, pass_typed=True):
            site = _as_site(loaded)
            state = LanguageState(
                site,
                bank=_bank(self._fusers),
                gate=_gate(self._gate, receiver=site.model.layout.model_digest),
                rephrase=self._rephrase,
                policy=self._policy,
            )
            if self._policy.share_speeds:
                state.speeds = measure_speeds(site.model)
        return state


def _action(message: Message) -> str:
    return message.metadata.message_type.removeprefix(_PREFIX)


def _as_site(loaded: object) -> LanguageSite:
    from fedinfer_flower.language.model import LanguageModel

    if isinstance(loaded, LanguageModel):
        return LanguageSite(model=loaded)
    if not isinstance(loaded, LanguageSite) or not isinstance(loaded.model, LanguageModel):
        raise ModelError(
            "load_model returned no language model",
            hint="return LanguageModel.from_folder(...), or LanguageSite(model=..., documents=...)",
        )
    if loaded.documents is None:
        return loaded
    given = loaded.documents

    def documents(question: str) -> Sequence[str]:
        # The site's own code: what it raises may quote the question.
        with contained(ModelAnswerError, "the site's documents could not be read", hint=_SEE_LOG):
            found = given(question)
            # A text is a sequence too, of letters: it is meant as one document.
            return [found] if isinstance(found, str) else [str(text) for text in found]

    return LanguageSite(model=loaded.model, documents=documents)


def _bank(given: FuserBank | str | Path | Mapping[Any, Any] | None) -> FuserBank:
    from fedinfer_flower.kv.fuser_bank import FuserBank

    return given if isinstance(given, FuserBank) else FuserBank(given)


def _gate(given: Gate | str | Path | None, *, receiver: str) -> Gate | None:
    from fedinfer_flower.kv.gate import Gate, make_gate
    from fedinfer_flower.kv.gate_file import load_gate

    if given is None or isinstance(given, Gate):
        return given
    if isinstance(given, str) and not Path(given).exists():
        return make_gate(given)
    return load_gate(given, receiver=receiver)
