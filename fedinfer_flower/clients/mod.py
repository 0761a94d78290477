"""`InferenceMod`: one line that makes any ClientApp answer queries with its local model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from fedinfer_flower.clients.answering import answer_question
from fedinfer_flower.clients.consent import Consent, OptionLimits
from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.further_work import further_handler
from fedinfer_flower.clients.mod_options import LoadModel, check_options, require_alone
from fedinfer_flower.clients.model_cache import DEFAULT_CAPACITY, get_or_load
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_gate import Passage, gate_of
from fedinfer_flower.clients.policy_loader import PolicyLoader
from fedinfer_flower.clients.recovering import answer_recovery
from fedinfer_flower.clients.site_audit import answer_message
from fedinfer_flower.clients.site_call import SiteCall
from fedinfer_flower.clients.site_memory import ContextMemory, SiteMemory, home_memory
from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.clients.site_place import site_folder, site_name
from fedinfer_flower.clients.stack_shelf import bring_stack
from fedinfer_flower.clients.stating import signed_statement
from fedinfer_flower.errors import (
    ConfigError,
    EnvelopeError,
    ModelAnswerError,
    ModelLoadError,
)
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import ACTIONS, HELLO, PREDICT, PREFIX, RECOVER
from fedinfer_flower.wire.directory import SiteCard, site_card
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.records import content_digest
from fedinfer_flower.wire.recovery import read_recovery, recovered
from fedinfer_flower.wire.sealed_query import open_question

if TYPE_CHECKING:
    from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy
    from fedinfer_flower.clients.stack_mod import StackingMod

__all__ = ["InferenceMod", "inference"]

_SEE_LOG = "see the site's own log"


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
        Protections under which the site answers. Default all; with a budget, those that
        add noise.
    querier_key_ids, peer_key_ids : collection of str, optional
        Fingerprints of the queriers that the site answers, and of the other sites that it
        knows; default any.
    require_seal : bool
        Refuse queries that the coordinator could read, or make up.
    max_epsilon_per_query : float, optional
        Refuse noise of a larger epsilon for one query row.
    option_limits : OptionLimits, optional
        How far the querier's choice of privacy options may go.
    home : path or callable, optional
        Folder in which the site keeps its keys, the query ids it used, what it drew and
        what it spent, or a function from Context to it; default ``fedinfer-home`` in the
        node config. Without one, keys and query ids live as long as a run, and nothing
        else is remembered. In simulation each partition has a folder of its own in it. A
        ``pins.toml`` in the folder names the queriers that the site answers and the other
        sites that it knows, unless `querier_key_ids` or `peer_key_ids` do.
    budget : BudgetPolicy, optional
        Caps on the privacy that the site spends; needs `home`.
    encrypted : EncryptedPolicy, optional
        On what terms the site answers encrypted queries, which it does only where
        `protections` names ``"encrypted-query"`` and the querier's key is pinned.
    receipts : bool
        Sign a statement with every answer: see `InferenceResult.receipt`.
    agrees_to : collection of str
        Further work that the site does when asked, of `clients.consent.FURTHER_WORK`, each
        with a disclosure of its own. Default none.
    limits : WireLimits
        Largest messages that are read.
    max_models : int
        Models kept resident in one process.
    site_policy : SitePolicy, optional
        Says all of the above but `load_model` and `max_models`; its limits, actions and audit
        log are enforced as well. `clients.site_app` makes a whole app of one.

    Raises
    ------
    InvalidValueError
        For an option out of its range.
    ConfigError
        If encrypted queries are set up without consent to them, or beside a budget.

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
        peer_key_ids: Collection[str] | None = None,
        require_seal: bool = False,
        max_epsilon_per_query: float | None = None,
        option_limits: OptionLimits | None = None,
        home: str | Path | Callable[[Context], str | Path] | None = None,
        budget: BudgetPolicy | None = None,
        encrypted: EncryptedPolicy | None = None,
        receipts: bool = True,
        agrees_to: Collection[str] = (),
        limits: WireLimits = DEFAULT_LIMITS,
        max_models: int = DEFAULT_CAPACITY,
        site_policy: SitePolicy | None = None,
    ) -> None:
        if site_policy is not None:
            keys = (querier_key_ids, peer_key_ids, require_seal)
            bounds = (protections, max_epsilon_per_query, option_limits, tuple(agrees_to))
            require_alone((name, home, budget, encrypted, *keys, *bounds))
            name, home, limits = (
                site_policy.site.name,
                site_policy.site.home,
                site_policy.wire_limits,
            )
            budget, encrypted = site_policy.budget, site_policy.encrypted
            protections, agrees_to = site_policy.answers.protections, site_policy.answers.agrees_to
            receipts = site_policy.answers.receipts
            share_counts = (
                "presence" if site_policy.model is None else site_policy.model.share_counts
            )
        check_options(
            load_model=load_model,
            share_counts=share_counts,
            collections={
                "protections": protections,
                "querier_key_ids": querier_key_ids,
                "peer_key_ids": peer_key_ids,
                "agrees_to": agrees_to,
            },
            budget=budget,
            encrypted=encrypted,
            max_models=max_models,
        )
        self._load_model = load_model
        self._share_counts = CountsKind(share_counts)
        self._name = name
        self._gate = gate_of(site_policy)
        self._consent = (
            site_policy.consent
            if site_policy is not None
            else Consent(
                protections=None if protections is None else frozenset(protections),
                querier_key_ids=None if querier_key_ids is None else frozenset(querier_key_ids),
                peer_key_ids=None if peer_key_ids is None else frozenset(peer_key_ids),
                require_seal=require_seal,
                max_epsilon_per_query=max_epsilon_per_query,
                option_limits=option_limits or OptionLimits(),
                agrees_to=frozenset(agrees_to),
            )
        )
        self._home = home
        self._budget = budget
        self._encrypted = encrypted
        self._receipts = receipts
        self._limits = limits
        self._max_models = max_models
        self._stacking: StackingMod | None = None
        if "stacking" in agrees_to:
            from fedinfer_flower.clients.stack_mod import StackingMod

            self._stacking = StackingMod(self)

    @property
    def stacking(self) -> StackingMod | None:
        """The site's part in the training of stacks, if it has agreed to that."""
        return self._stacking

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Act as a Flower mod."""
        if self._stacking is not None and self._stacking.takes(message):
            return self._stacking(message, context)
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
            if self._stacking is not None:
                self._stacking.attach(app)
        except ValueError as exc:
            raise ConfigError(
                "the handlers could not be registered at this ClientApp",
                hint="an app with client_fn takes the mod instead:"
                " ClientApp(client_fn, mods=[InferenceMod(load_model)])",
            ) from exc
        return app

    def handle(self, message: Message, context: Context) -> Message:
        """Answer one ``query.fi_*`` message. Always returns a valid reply: `answer_message`."""
        return answer_message(message, context, self._reply, gate=self._gate, limits=self._limits)

    def _reply(
        self, message: Message, envelope: Envelope, context: Context, passage: Passage
    ) -> Envelope:
        action = message.metadata.message_type.removeprefix("query.")
        run_id, sender = context.run_id, context.node_id
        if action == HELLO and envelope.kind is Kind.HELLO:
            identity = self._memory(context).identity
            profile = self._model(context).profile
            card = SiteCard.signed(profile, identity=identity, run_id=run_id)
            return site_card(card, sender=sender)
        if action == PREDICT and envelope.kind in (Kind.QUERY, Kind.SEALED_QUERY):
            return self._answer(envelope, context, passage, content_digest(message.content))
        if action == RECOVER and envelope.kind is Kind.RECOVER:
            with contained(ModelAnswerError, "recovery failed", hint=_SEE_LOG, pass_typed=True):
                call = read_recovery(envelope)
                reply = answer_recovery(call, self._memory(context), run_id=run_id)
            return recovered(reply, query_id=envelope.query_id, run_id=run_id, sender=sender)
        if envelope.kind is Kind.PING:
            passage.require_action("ping")
            return Envelope(kind=Kind.PING, run_id=run_id, sender=sender)
        handler = further_handler(action, envelope.kind)
        return handler(
            SiteCall(
                action=action,
                envelope=envelope,
                context=context,
                consent=self._agreed(context),
                memory=self._memory(context),
                load=lambda: self._model(context),
                limits=self._limits,
                encrypted=self._encrypted,
                passage=passage,
            )
        )

    def _answer(
        self, envelope: Envelope, context: Context, passage: Passage, content: bytes
    ) -> Envelope:
        memory = self._memory(context)
        sealed = envelope.kind is Kind.SEALED_QUERY
        if sealed:
            asked = open_question(envelope, identity=memory.identity, limits=self._limits)
        else:
            asked = messages.read_question(envelope, limits=self._limits)
            if asked.querier is not None:
                raise EnvelopeError("a query in clear cannot show that its querier asked it")
        passage.require_rows(asked.n_queries)
        model = self._model(context)
        with contained(
            ModelAnswerError, "the query could not be answered", hint=_SEE_LOG, pass_typed=True
        ):
            bring_stack(asked, context, self._folder(context))
            now_s = time.time()
            answer = answer_question(
                model,
                asked,
                self._agreed(context),
                memory,
                sealed=sealed,
                content=content,
                run_id=context.run_id,
                now_s=now_s,
                passage=passage,
            )
            statement = b""
            if self._receipts and len(asked.roster):
                signed = signed_statement(
                    answer,
                    asked,
                    profile=model.profile,
                    memory=memory,
                    run_id=context.run_id,
                    sealed=sealed,
                    now_s=now_s,
                )
                statement = signed.to_bytes()
        return messages.answer(
            asked,
            run_id=context.run_id,
            sender=context.node_id,
            payload=answer.payload,
            width=answer.width,
            commitment=model.profile.commitment(),
            statement=statement,
            evidence=answer.evidence,
        )

    def _memory(self, context: Context) -> SiteMemory:
        folder = self._folder(context)
        if folder is not None:
            return home_memory(folder.absolute(), self._budget)
        if self._budget is not None:
            raise ConfigError(
                "a privacy budget needs a folder that outlives the process",
                hint="InferenceMod(..., home=...), or fedinfer-home in the node config",
            )
        return ContextMemory(context)

    def _folder(self, context: Context) -> Path | None:
        return site_folder(self._home, context)

    def _agreed(self, context: Context) -> Consent:
        folder = self._folder(context)
        return self._consent if folder is None else self._consent.with_pins_of(folder)

    def _model(self, context: Context) -> SiteModel:
        partition = str(context.node_config.get("partition-id", context.node_id))
        loader = f"{self._load_model.__module__}.{getattr(self._load_model, '__qualname__', '')}"

        def load() -> SiteModel:
            ours = isinstance(self._load_model, PolicyLoader)
            with contained(ModelLoadError, "load_model failed", hint=_SEE_LOG, pass_typed=ours):
                loaded = self._load_model(context)
            with contained(
                ModelLoadError, "the model is not usable", hint=_SEE_LOG, pass_typed=True
            ):
                return prepare(
                    loaded, name=site_name(self._name, context), share_counts=self._share_counts
                )

        key = (context.run_id, partition, loader)
        return get_or_load(key, load, capacity=self._max_models)


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
