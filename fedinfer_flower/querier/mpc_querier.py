"""`MpcQuerier`: shares its queries among three parties, and puts the answer together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import BindingError, InvalidValueError, ShapeError, UntrustedKeyError
from fedinfer_flower.mpc.documents import MpcAnswer, MpcJob
from fedinfer_flower.mpc.forward import Disclosed, MpcRule
from fedinfer_flower.mpc.sealed_shares import open_result, seal_shares
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.mpc.shares import N_PARTIES, decode_integers, decode_reals, join
from fedinfer_flower.mpc.statement import SiteStatement
from fedinfer_flower.query import Prediction
from fedinfer_flower.wire.identity import Identity

__all__ = ["MpcQuerier"]


class MpcQuerier:
    """Ask questions that no single site can read. Needs neither SPU nor JAX.

    Parameters
    ----------
    identity : Identity
        Its key id must be in every site's `MpcConsent`.
    parties : sequence of str
        Key ids of the three sites that compute, compared out of band; their order is the
        parties' rank.
    owners : collection of str, optional
        Key ids of the owners to ask; default every owner that made a statement, which lets
        the coordinator leave out owners, or add some of its own.
    rule : MpcRule or str
    disclosed : Disclosed or str
        What this querier is shown: the totals, or the winning label alone.

    Privacy
    -------
    One party learns nothing about the query. Two that pool what they have learn all of it,
    and all weights. The querier learns what `disclosed` says about the owners' networks, and
    nothing else; labels or totals of enough queries let it train a copy of the ensemble.

    Examples
    --------
    >>> querier = MpcQuerier(identity=Identity.generate(), parties=["0" * 64, "1" * 64, "2" * 64])
    >>> querier
    MpcQuerier(rule='mean-logit', disclosed='totals')
    """

    def __init__(
        self,
        *,
        identity: Identity,
        parties: Collection[str],
        owners: Collection[str] | None = None,
        rule: MpcRule | str = MpcRule.MEAN_LOGIT,
        disclosed: Disclosed | str = Disclosed.TOTALS,
    ) -> None:
        if isinstance(parties, str) or len(set(parties)) != N_PARTIES:
            raise InvalidValueError(f"a joint computation has {N_PARTIES} distinct parties")
        if rule not in list(MpcRule) or disclosed not in list(Disclosed):
            raise InvalidValueError(
                f"rule {str(rule)!r} with disclosure {str(disclosed)!r}",
                hint=f"rules: {', '.join(MpcRule)}; disclosures: {', '.join(Disclosed)}",
            )
        self._identity = identity
        self._parties, self._owners = tuple(parties), owners
        self._rule, self._disclosed = MpcRule(rule), Disclosed(disclosed)
        self._asked: dict[str, tuple[MpcSession, int]] = {}

    def __repr__(self) -> str:
        rule, disclosed = self._rule.value, self._disclosed.value
        return f"MpcQuerier(rule={rule!r}, disclosed={disclosed!r})"

    def ask(
        self,
        inputs: npt.ArrayLike,
        statements: Iterable[bytes],
        *,
        batch_size: int | None = None,
        valid_s: float = 600.0,
    ) -> MpcJob:
        """Share queries among the parties.

        Parameters
        ----------
        inputs : array of shape (n_queries, ...)
        statements : iterable of bytes
            What `FedMPC.collect` returned.
        batch_size : int, optional
            Rows that are computed at once; default all. The last batch is filled up with
            zeros, whose answers are dropped.
        valid_s : float
            Seconds after which sites refuse the job.

        Returns
        -------
        job : MpcJob
            Sealed; for the coordinator.

        Raises
        ------
        UntrustedKeyError
            If a party, or an owner that was asked for, made no statement.
        ShapeError
            If the queries do not fit the owners' networks.
        InvalidValueError
            If a value cannot be shared.
        """
        rows = np.asarray(inputs, dtype=np.float64)
        parties, owners = self._chosen(list(statements))
        size = len(rows) if batch_size is None else batch_size
        if len(rows) == 0 or size < 1:
            raise InvalidValueError("at least one query, and at least one row a batch")
        session = MpcSession(
            session_id=secrets.token_hex(16),
            querier=self._identity.public,
            parties=parties,
            owners=owners,
            rule=self._rule,
            disclosed=self._disclosed,
            n_queries=size,
            n_batches=-(-len(rows) // size),
            expires_at=int(time.time() + valid_s),
        )
        if rows.shape[1:] != session.specs[0].input_shape:
            raise ShapeError(
                f"queries of shape {rows.shape[1:]}, the networks take"
                f" {session.specs[0].input_shape}"
            )
        filled = np.zeros((session.n_batches * size, *rows.shape[1:]))
        filled[: len(rows)] = rows
        queries = tuple(
            seal_shares(
                self._identity,
                session,
                [filled[batch * size : (batch + 1) * size]],
                label=f"query-{batch}",
            )
            for batch in range(session.n_batches)
        )
        self._asked[session.session_id] = (session, len(rows))
        return MpcJob(session=session.to_bytes(self._identity), queries=queries)

    def totals(self, answer: MpcAnswer) -> npt.NDArray[np.generic]:
        """Put the result together, without a decision.

        Returns
        -------
        totals : array
            Mean logits or votes of shape (n_queries, n_classes), or labels of shape
            (n_queries,) where only those are disclosed.

        Raises
        ------
        BindingError
            If the answer is to another querier's job, or two parties disagree on a share.
        ProtocolError
            If a share does not open, or is not signed by its party.
        """
        session, n_queries = self._session(answer)
        if len(answer.results) != session.n_batches:
            raise BindingError("the answer does not cover the job's queries")
        batches = []
        for batch, triple in enumerate(answer.results):
            held = [
                open_result(self._identity, session, sealed, batch=batch, rank=rank)
                for rank, sealed in enumerate(triple)
            ]
            batches.append(join(held))
        words = np.concatenate(batches)[:n_queries]
        if session.disclosed is Disclosed.LABEL:
            return decode_integers(words, low=0, high=len(session.classes) - 1)
        if session.rule is MpcRule.MAJORITY_VOTE:
            return decode_integers(words, low=0, high=len(session.owners))
        return decode_reals(words)

    def open(self, answer: MpcAnswer) -> Prediction:
        """Put the result together and decide; a tie goes to the class that comes first.

        Where only labels are disclosed, `probabilities` are 1 at the label and `margin` is 0:
        there is nothing that they could be worked out from.

        Raises
        ------
        ProtocolError
            As for `totals`.
        """
        totals = self.totals(answer)
        session, n_queries = self._session(answer)
        n_classes = len(session.classes)
        if session.disclosed is Disclosed.LABEL:
            labels = totals.astype(np.int64)
            probabilities, margin = np.eye(n_classes)[labels], np.zeros(n_queries)
        else:
            scores = totals.astype(np.float64)
            labels = scores.argmax(axis=1)
            ordered = np.sort(scores, axis=1)
            margin = ordered[:, -1] - ordered[:, -2]
            if session.rule is MpcRule.MEAN_LOGIT:
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            probabilities = scores / scores.sum(axis=1, keepdims=True)
        return Prediction(
            classes=session.classes,
            labels=labels,
            probabilities=probabilities,
            margin=margin,
            abstained=np.zeros(n_queries, dtype=bool),
        )

    def _session(self, answer: MpcAnswer) -> tuple[MpcSession, int]:
        asked = self._asked.get(answer.session_id)
        if asked is None:
            raise BindingError("the joint answer belongs to a job of another querier")
        return asked

    def _chosen(self, statements: list[bytes]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        made = {SiteStatement.from_bytes(data).identity.key_id: data for data in statements}
        with_network = [
            key_id for key_id, data in made.items() if SiteStatement.from_bytes(data).network
        ]
        owners = with_network if self._owners is None else list(self._owners)
        for key_id in (*self._parties, *owners):
            if key_id not in made:
                raise UntrustedKeyError(
                    f"the site with key {key_id[:16]} made no statement",
                    hint="is it online, and is this still its key?",
                )
        return tuple(made[k] for k in self._parties), tuple(made[k] for k in sorted(owners))
