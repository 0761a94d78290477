"""A whole site from its policy: the ClientApp that answers, and nothing else.

`site_app` is what the resident worker runs. `app` is for a FAB: it reads the policy that the
node config names under ``fedinfer-policy``, at the first message, and behaves the same on a
stock SuperNode. There the FAB's own code runs before ours: what a policy says holds for what
this module answers, not for another ClientApp that a FAB brings.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedinfer_flower.clients.containment import log_locally
from fedinfer_flower.clients.language_mod import LanguageMod
from fedinfer_flower.clients.mod import InferenceMod
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.policy_gate import OPEN, Gate, Passage, gate_of
from fedinfer_flower.clients.policy_loader import PolicyLoader, source_of
from fedinfer_flower.clients.site_audit import answer_message, refusal_of
from fedinfer_flower.errors import DeploymentError, FedInferError, PolicyRefusedError
from fedinfer_flower.wire.actions import ACTIONS, LANGUAGE_ACTIONS
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope
from fedinfer_flower.wire.stack_messages import STACK_ACTIONS, TRAIN_ACTION

__all__ = ["POLICY_KEY", "app", "site_app"]

POLICY_KEY: Final = "fedinfer-policy"
"""Key of the node config that names the policy's file."""

log = logging.getLogger("fedinfer_flower.site")

_Answer = Callable[[Message, Context], Message]


def site_app(policy: SitePolicy) -> ClientApp:
    """Return the app of a site with a policy.

    Every action of this package is registered: one that the policy does not list is refused
    with a typed error that says so, and is in the audit log.

    Parameters
    ----------
    policy : SitePolicy

    Raises
    ------
    ConfigError
        If the model's loader cannot be imported, or options do not go together.
    DeploymentError
        If the home cannot be made, or can be read by others.
    AuditLogError
        If the audit log cannot be written.
    """
    made = ClientApp()
    _register(made, _mods(policy))
    return made


def _mods(policy: SitePolicy) -> _Answer:
    """Return what answers a message of a site with a policy."""
    gate, mods = gate_of(policy), dict[str, _Answer]()
    language = policy.language
    if policy.has_classifier:
        mod = InferenceMod(_classifier(policy), site_policy=policy)
        mods |= dict.fromkeys(ACTIONS, mod.handle)
        if mod.stacking is not None:
            mods |= dict.fromkeys((*STACK_ACTIONS, TRAIN_ACTION), mod.stacking)
    if language is not None:
        rules = language if language.has_source else policy.model
        assert rules is not None  # noqa: S101  `check_policy` has seen to it
        load = source_of(
            "language" if language.has_source else "model",
            loader=rules.loader,
            kind=rules.kind,
            options=rules.options,
        )
        mods |= dict.fromkeys(
            LANGUAGE_ACTIONS,
            LanguageMod(
                load,
                fusers=language.fusers,
                gate=language.gate or None,
                rephrase=language.rephrase,
                site_policy=policy,
            ).handle,
        )

    def answer(message: Message, context: Context) -> Message:
        context = _without_run_config(context)
        action = message.metadata.message_type.split(".", maxsplit=1)[-1]
        found = mods.get(action)
        if found is not None:
            return found(message, context)
        if action == TRAIN_ACTION:
            return _no_training(message, gate)
        return answer_message(message, context, _nobody, gate=gate, limits=policy.wire_limits)

    return answer


def _without_run_config(context: Context) -> Context:
    """Return the Context without what the coordinator chose: a site's loader is given it."""
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=context.node_config,
        state=context.state,
        run_config={},
        series_id=context.series_id,
    )


def _classifier(policy: SitePolicy) -> PolicyLoader:
    model = policy.model
    assert model is not None  # noqa: S101  the caller has looked
    return PolicyLoader(
        source_of(
            "model",
            loader=model.loader,
            kind=model.kind,
            options=model.options,
            classes=model.classes,
        ),
        digest=model.digest,
        file=model.options.get("path"),
        classes=model.classes,
        model_id=model.id,
        price_per_query=policy.answers.price_per_query,
        name=policy.digest,
    )


def _nobody(message: Message, asked: Envelope, context: Context, passage: Passage) -> Envelope:  # noqa: ARG001
    # The policy lists the action, as `recover` by default, and has no model for it.
    raise PolicyRefusedError(
        f"this site has no model for {passage.verb or 'unknown'!r} ([model])",
        hint="ask its language model, or another site",
    )


def _no_training(message: Message, gate: Gate) -> Message:
    passage = gate.passage(message)
    refusal = PolicyRefusedError("this site does not train stacks ([answers] actions)")
    error = refusal_of(refusal, passage)
    words = f"{error.code}: {error.message}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words), reply_to=message)


def _register(made: ClientApp, answer: _Answer) -> None:
    for action in (*ACTIONS, *LANGUAGE_ACTIONS, *STACK_ACTIONS):
        made.query(action)(answer)
    made.train(TRAIN_ACTION)(answer)


@functools.lru_cache(maxsize=8)
def _mods_of(path: Path) -> _Answer:
    return _mods(SitePolicy.read(path))


def _answer_by_node(message: Message, context: Context) -> Message:
    """Answer under the policy that the node config names; refuse everything without one."""
    try:
        path = str(context.node_config.get(POLICY_KEY, ""))
        if not path:
            raise DeploymentError(
                f"the node config names no {POLICY_KEY!r}: this site answers nothing",
                hint="flower-supernode --node-config 'fedinfer-policy=\"/path/to/site.toml\"'",
            )
        answer = _mods_of(Path(path))
    except Exception as exc:
        log_locally(exc)
        if isinstance(exc, FedInferError):
            # To the operator alone: the text may name paths of the site.
            log.error("%s: %s", exc.code, exc.message)
        return answer_message(message, context, _unusable, gate=OPEN, limits=DEFAULT_LIMITS)
    return answer(message, context)


def _unusable(message: Message, asked: Envelope, context: Context, passage: Passage) -> Envelope:  # noqa: ARG001
    raise DeploymentError(
        "this site's policy cannot be used, so it answers nothing",
        hint="its operator runs: fedinfer policy check site.toml",
    )


app = ClientApp()
"""For a FAB; see the module."""

_register(app, _answer_by_node)
