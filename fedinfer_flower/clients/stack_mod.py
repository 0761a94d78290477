"""`StackingMod`: a site's part in the training of a stack.

Four steps (`wire.stack_messages`) and Flower's training rounds between the third and the
fourth. Labels never leave the site, and neither does its model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedinfer_flower.clients.adapters.base import class_name
from fedinfer_flower.clients.containment import contained, log_locally
from fedinfer_flower.clients.policy_gate import Passage
from fedinfer_flower.clients.site_audit import answer_message, refusal_of
from fedinfer_flower.clients.site_model import SiteModel
from fedinfer_flower.clients.stack_shelf import keep_stack
from fedinfer_flower.clients.stack_training import local_step
from fedinfer_flower.ensemble.fitted import MAX_VALUE, FittedAggregator
from fedinfer_flower.ensemble.stack_participation import check_on_rows, check_participation
from fedinfer_flower.ensemble.stack_rule import exact_probabilities
from fedinfer_flower.ensemble.stack_shapes import require_shapes
from fedinfer_flower.errors import (
    BindingError,
    BudgetExceededError,
    ConfigError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    ModelAnswerError,
    ProtectionRefusedError,
    UntrustedKeyError,
)
from fedinfer_flower.wire import fields, stack_messages
from fedinfer_flower.wire.actions import message_type
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.sealing import SealedBody
from fedinfer_flower.wire.stack_messages import INSTALL, OFFER, PEERS, TRAIN, StackJob

if TYPE_CHECKING:
    from fedinfer_flower.clients.mod import InferenceMod

__all__ = ["DEFAULT_MAX_ROWS", "StackingMod"]

DEFAULT_MAX_ROWS: Final = 20_000

_JOB: Final = "fedinfer-stack-job"
_DATA: Final = "fedinfer-stack-answers"
_QUERIES: Final = frozenset(message_type(action) for action in stack_messages.STACK_ACTIONS)
_MAX_STEPS: Final = 1000

T = TypeVar("T")
Sections = dict[str, bytes | memoryview]


class StackingMod:
    """Take part in training stacks, beside an `InferenceMod`.

    Parameters
    ----------
    mod : InferenceMod
        Whose model, keys, pins and home are used.
    max_rows : int
        Most rows of peers that the site answers in a run.

    Raises
    ------
    InvalidValueError
        If `max_rows` is below 1.
    ConfigError
        If the site keeps a privacy budget: answers to peers have no noise that it could
        count.

    Privacy
    -------
    To take part is to agree that

    - every other site of the roster reads this site's held-out inputs (not their labels),
    - the owner of held-out rows reads this site's own calibrated answers to them: single
      answers, in clear, without noise, up to `max_rows` rows a run. A peer chooses its rows
      and can use them to copy the model as far as so many answers allow;
    - the coordinator reads this site's gradients, its loss and its number of held-out rows.
      Gradients are a function of the held-out labels and all sites' answers: they show about
      how often each class comes, and of few rows single labels. The rows themselves and the
      answers it relays unread.

    With `peer_key_ids` every other site of the roster must be known: a made-up peer would
    otherwise get rows and answers.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> from fedinfer_flower.clients import InferenceMod
    >>> mod = InferenceMod(lambda context: None)
    >>> app = StackingMod(mod, max_rows=500).attach(mod.attach(ClientApp()))
    """

    def __init__(self, mod: InferenceMod, *, max_rows: int = DEFAULT_MAX_ROWS) -> None:
        if max_rows < 1:
            raise InvalidValueError("max_rows is at least 1")
        if mod._budget is not None:
            raise ConfigError(
                "a site with a privacy budget does not train stacks: its answers to peers have"
                " no noise that the budget could count",
                hint="drop the budget, or do not take part",
            )
        self._mod = mod
        self._max_rows = max_rows

    def takes(self, message: Message) -> bool:
        """Return whether a message belongs to the training of a stack."""
        kind = message.metadata.message_type
        return kind == TRAIN or kind in _QUERIES

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message that this site `takes`, whatever it is."""
        is_round = message.metadata.message_type == TRAIN
        return (self.train if is_round else self.handle)(message, context)

    def attach(self, app: ClientApp) -> ClientApp:
        """Register the handlers at an app of the Message API and return the app."""
        for action in stack_messages.STACK_ACTIONS:
            app.query(action)(self.handle)
        app.train(stack_messages.TRAIN_ACTION)(self.train)
        return app

    def handle(self, message: Message, context: Context) -> Message:
        """Answer one step. Always returns a valid reply, and no text of an exception."""
        mod = self._mod
        return answer_message(message, context, self._reply, gate=mod._gate, limits=mod._limits)

    def train(self, message: Message, context: Context) -> Message:
        """Answer one training round of Flower's strategy."""
        passage = self._mod._gate.passage(message)
        passage.note(run_id=str(context.run_id))
        try:
            passage.require_action()
            with contained(
                ModelAnswerError,
                "the training step failed",
                hint="see the site's own log",
                pass_typed=True,
            ):
                content = self._step(message.content, context)
            passage.answered()
            return Message(content, reply_to=message)
        except FedInferError as exc:
            error = refusal_of(exc, passage)
        except Exception as exc:
            log_locally(exc)
            error = refusal_of(ModelAnswerError("the training step failed"), passage)
        words = f"{error.code}: {error.message}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words), reply_to=message)

    # -- the steps ---------------------------------------------------------------------

    def _reply(
        self, message: Message, envelope: Envelope, context: Context, passage: Passage
    ) -> Envelope:
        job, sections = stack_messages.read_step(envelope, limits=self._mod._limits)
        own = self._place(job, context)
        action = message.metadata.message_type.removeprefix("query.")
        answer: Sections
        if action == OFFER:
            answer, rows = self._offer(job, own, context)
        elif action == PEERS:
            answer, rows = self._answer_peers(job, own, sections, context, passage)
        elif action == INSTALL:
            answer, rows = self._install(job, sections, context)
        else:
            answer, rows = self._take(job, own, sections, context)
        return stack_messages.reply(
            job.job_id, answer, run_id=context.run_id, sender=context.node_id, rows=rows
        )

    def _place(self, job: StackJob, context: Context) -> int:
        """Return this site's place in the job, after finding all peers to be known."""
        own = self._mod._memory(context).identity.key_id
        if own not in job.key_ids:
            raise BindingError("this site is not in the directory of the stack's training")
        known = self._mod._agreed(context).peer_key_ids
        strangers = 0 if known is None else len(set(job.key_ids) - known - {own})
        if strangers:
            raise UntrustedKeyError(
                f"this site does not know {strangers} of the sites of the stack's training",
                hint="compare key ids with the other sites' operators",
            )
        if len(job.key_ids) < 2:
            raise BindingError("a stack is trained by two sites or more")
        return job.key_ids.index(own)

    def _offer(self, job: StackJob, own: int, context: Context) -> tuple[Sections, int]:
        inputs, _ = held_out(self._mod._model(context), job.classes)
        if not len(inputs):
            return {}, 0
        peers = [place for place in range(len(job.key_ids)) if place != own]
        identity = self._mod._memory(context).identity
        sealed = stack_messages.seal_rows(inputs, job, identity=identity, to=peers)
        return {"body": sealed.body, "wraps": sealed.wraps}, len(inputs)

    def _answer_peers(
        self,
        job: StackJob,
        own: int,
        sections: Sections,
        context: Context,
        passage: Passage,
    ) -> tuple[Sections, int]:
        model, identity = self._mod._model(context), self._mod._memory(context).identity
        places = [p for p in range(len(job.key_ids)) if p != own and f"body-{p}" in sections]
        if len(sections) != 2 * len(places):
            raise EnvelopeError("rows of the stack's peers with a section too many")
        answers: Sections = {}
        answered = 0
        for place in places:
            owner = job.identity(place)
            wraps = sections.get(f"wraps-{place}", b"")
            rows = stack_messages.open_rows(
                SealedBody(body=sections[f"body-{place}"], wraps=wraps),
                job,
                identity=identity,
                owner=owner,
                max_rows=self._max_rows,
            )
            passage.require_rows(answered + len(rows))
            name = f"stack-{job.job_id}"
            passage.count(querier=owner.key_id, query_id=name, n_rows=len(rows))
            self._count(len(rows), context)  # before the model sees them
            answers[f"answer-{place}"] = stack_messages.seal_answers(
                exact_probabilities(model.calibrated_logits(rows, job.classes)),
                job,
                identity=identity,
                owner=owner,
            )
            answered += len(rows)
        return answers, answered

    def _take(
        self, job: StackJob, own: int, sections: Sections, context: Context
    ) -> tuple[Sections, int]:
        model, identity = self._mod._model(context), self._mod._memory(context).identity
        inputs, _ = held_out(model, job.classes)
        wanted = {f"answer-{p}": p for p in range(len(job.key_ids)) if p != own}
        if not len(inputs) or sections.keys() != wanted.keys():
            raise EnvelopeError("answers of the stack's peers are missing, or one too many")
        shape = (len(job.key_ids), len(inputs), len(job.classes))
        answers_kbc = np.empty(shape)
        answers_kbc[own] = exact_probabilities(model.calibrated_logits(inputs, job.classes))
        for name, place in wanted.items():
            answers_kbc[place] = stack_messages.open_answers(
                sections[name],
                job,
                identity=identity,
                site=job.identity(place),
                n_rows=len(inputs),
            )
        context.state[_DATA] = ArrayRecord({"answers": Array(answers_kbc)})
        state = _state(context)
        state["job"], state["sites"] = job.job_id, list(job.key_ids)
        state["classes"] = json.dumps(job.classes)
        return {}, len(inputs)

    def _install(self, job: StackJob, sections: Sections, context: Context) -> tuple[Sections, int]:
        if sections.keys() != {"aggregator"}:
            raise EnvelopeError("a stack to install, and nothing else")
        fitted = FittedAggregator.from_bytes(sections["aggregator"])
        model = self._mod._model(context)
        if fitted.sites != job.key_ids or fitted.classes != job.classes:
            raise BindingError("the stack is of other sites or classes than its job")
        check_participation(fitted)
        # Whatever the job's name: another would be a way around the check.
        state = _state(context)
        same = (list(fitted.sites), json.dumps(fitted.classes)) == (
            state.get("sites"),
            state.get("classes"),
        )
        if same and _DATA in context.state:
            check_on_rows(fitted, _answers(context))
        elif fitted.kind == "deep-set" and len(held_out(model, fitted.classes)[0]):
            raise ProtectionRefusedError(
                "this deep set was not trained with this site's rows, so its part in the sum is"
                " not known",
                hint="train it in this run, with this site",
            )
        keep_stack(fitted, context, self._mod._folder(context))
        return {"digest": bytes.fromhex(fitted.digest)}, 0

    def _step(self, content: RecordDict, context: Context) -> RecordDict:
        config = _only(content.config_records, "config")
        state = _state(context)
        if config.get("job") != state.get("job") or _DATA not in context.state:
            raise BindingError("this site has taken no answers for that training")
        classes = tuple(json.loads(str(state["classes"])))
        kind = str(config.get("kind", ""))
        arrays = {
            name: np.asarray(array.numpy(), dtype=np.float64)
            for name, array in _only(content.array_records, "arrays").items()
        }
        n_sites = len(cast(list[str], state["sites"]))
        require_shapes(kind, arrays, n_sites=n_sites, n_classes=len(classes))
        # "not <=" catches NaN with the rest.
        if not all(bool((np.abs(array) <= MAX_VALUE).all()) for array in arrays.values()):
            raise InvalidValueError("parameters that are not finite, or far too large")
        _, labels = held_out(self._mod._model(context), classes)
        moved, loss = local_step(
            kind,
            arrays,
            _answers(context),
            labels,
            steps=fields.whole(config, "steps", low=1, high=_MAX_STEPS),
            learning_rate=fields.number(config, "learning-rate"),
            decay=fields.number(config, "decay"),
        )
        return RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in moved.items()}),
                "metrics": MetricRecord({"num-examples": len(labels), "loss": loss}),
            }
        )

    def _count(self, n_rows: int, context: Context) -> None:
        """Count rows that peers asked in this run, up to the site's limit."""
        state = _state(context)
        asked = cast(int, state.get("rows", 0)) + n_rows
        if asked > self._max_rows:
            raise BudgetExceededError(
                f"this site answers at most {self._max_rows} rows of peers in a run",
                hint="StackingMod(mod, max_rows=...), at the site",
            )
        state["rows"] = asked


def held_out(
    model: SiteModel, classes: tuple[str, ...]
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
    """Return the site's held-out inputs and labels whose class is among `classes`."""
    if model.local.holdout is None:
        return np.empty((0, 0)), np.empty(0, np.int64)
    inputs, labels = model.local.holdout
    place = {name: column for column, name in enumerate(classes)}
    columns = np.array([place.get(class_name(label), -1) for label in labels], dtype=np.int64)
    known = columns >= 0
    return np.asarray(inputs)[known], columns[known]


def _state(context: Context) -> ConfigRecord:
    return cast(ConfigRecord, context.state.setdefault(_JOB, ConfigRecord()))


def _answers(context: Context) -> npt.NDArray[np.float64]:
    record = cast(ArrayRecord, context.state[_DATA])
    return np.asarray(record["answers"].numpy(), dtype=np.float64)


def _only(records: Mapping[str, T], name: str) -> T:
    if set(records) != {name}:
        raise EnvelopeError(f"a training message does not have exactly one record {name!r}")
    return records[name]
