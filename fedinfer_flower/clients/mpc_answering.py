"""The site's part of a joint computation: state what it brings, share weights, compute.

===============  ==========================================  ============================
verb             the coordinator sends                       the site returns
===============  ==========================================  ============================
``statement``    nothing                                     its signed statement
``weights``      the session                                 three sealed shares
``compute``      the session, sealed shares of weights and   its sealed shares of the
                 queries for this party                      results
===============  ==========================================  ============================
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.policy_gate import OPEN, Passage
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    ModelError,
    PartyFailedError,
)
from fedinfer_flower.mpc import tls
from fedinfer_flower.mpc.network import NetworkSpec
from fedinfer_flower.mpc.party_process import (
    STALL_S,
    Credentials,
    PartyProcess,
    require_spu,
)
from fedinfer_flower.mpc.sealed_shares import link_id, open_shares, seal_result, seal_shares
from fedinfer_flower.mpc.session import MpcConsent, MpcSession
from fedinfer_flower.mpc.shares import encode_reals
from fedinfer_flower.mpc.statement import SiteStatement
from fedinfer_flower.wire import fields
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, WireLimits
from fedinfer_flower.wire.identity import Identity

__all__ = ["MPC", "MpcSite", "answer_mpc"]

MPC: Final = "fi_mpc"
"""Action of all messages of a joint computation."""


class MpcSite:
    """What a site brings to joint computations, and what it agrees to.

    Parameters
    ----------
    identity : Identity
    consent : MpcConsent
    name : str
    model : torch.nn.Sequential or (NetworkSpec, weights), optional
        The site's network; None for a site that only computes.
    input_shape : tuple of int, optional
        Of one query; with a torch model.
    classes : sequence of str
        Names of the model's logits, in order.
    address : str
        ``host:port`` at which the other parties reach this site, and which it listens on;
        empty for a site that only owns a network. One session at a time uses it.
    stall_s : float
        Longest silence of another party; see `PartyProcess`.

    Raises
    ------
    ModelError
        If the network cannot run on shares.
    InvalidValueError
        If a weight is not finite or too large, or the classes do not fit.
    MissingExtraError
        If the site is to compute, and SPU is not installed.

    Privacy
    -------
    Weights leave the site as shares only, each sealed to one of three parties that the site
    itself named. Two of those parties together can put them together again.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        consent: MpcConsent,
        name: str,
        model: Any = None,
        input_shape: Sequence[int] = (),
        classes: Sequence[str] = (),
        address: str = "",
        stall_s: float = STALL_S,
    ) -> None:
        self.identity, self.consent, self.stall_s = identity, consent, stall_s
        network, self._weights = _network(model, input_shape)
        for array in self._weights:
            encode_reals(array)
        about = {"name": name, "network": network, "classes": tuple(str(c) for c in classes)}
        if address:
            require_spu()
            made = SiteStatement.of_party(identity, address=address, **about)  # type: ignore[arg-type]
        else:
            made = SiteStatement(identity=identity.public, **about)  # type: ignore[arg-type]
        self.statement = made

    def share_weights(self, session: MpcSession) -> tuple[bytes, ...]:
        """Return this site's weights for the three parties of a session it agrees to.

        Raises
        ------
        BindingError
            If the session names another network of this site than it has.
        FedInferError
            Where the site's consent does not cover the session.
        """
        self.consent.check(session)
        number = session.owner_number(self.identity.key_id)
        place = session.owner_places[number]
        if (place.network, place.classes) != (self.statement.network, self.statement.classes):
            raise BindingError(
                "the session describes another network than this site has now",
                hint="collect the sites' statements again",
            )
        return seal_shares(self.identity, session, self._weights, label=f"weights-{number}")

    def compute(
        self,
        session: MpcSession,
        weights: Sequence[bytes | memoryview],
        queries: Sequence[bytes | memoryview],
        *,
        ends_at: float,
    ) -> list[bytes]:
        """Be one of the three parties; return sealed shares of every batch's result.

        Parameters
        ----------
        weights : sequence of bytes
            One owner's sealed shares after another.
        queries : sequence of bytes
            One batch's sealed shares after another.
        ends_at : float
            On the monotonic clock.

        Raises
        ------
        PartyFailedError
            If this party or another one failed, or time was up.
        """
        self.consent.check(session)
        rank = session.rank_of(self.identity.key_id)
        computation, me = session.computation, self.identity
        # All signatures and lengths are checked before anything runs.
        opened = [
            open_shares(
                me,
                session,
                sealed,
                maker=owner.identity,
                label=f"weights-{number}",
                shapes=session.specs[number].parameter_shapes,
            )
            for number, (owner, sealed) in enumerate(
                zip(session.owner_places, weights, strict=True)
            )
        ]
        held_weights = b"".join(held for _, held in opened)
        opened += [
            open_shares(
                me,
                session,
                sealed,
                maker=session.querier,
                label=f"query-{batch}",
                shapes=[computation.input_shape],
            )
            for batch, sealed in enumerate(queries)
        ]
        held_queries = [held for _, held in opened[len(weights) :]]
        with PartyProcess(
            computation=computation,
            link_id=link_id(session, [secret for secret, _ in opened]),
            rank=rank,
            addresses=tuple(place.address for place in session.party_places),
            credentials=self._credentials(session, rank),
            stall_s=self.stall_s,
        ) as process:
            process.open(held_weights, ends_at=ends_at)
            return [
                seal_result(me, session, process.query(held, ends_at=ends_at), batch=batch)
                for batch, held in enumerate(held_queries)
            ]

    def _credentials(self, session: MpcSession, rank: int) -> Credentials:
        places = session.party_places
        return Credentials(
            certificate=tls.pem_of(places[rank].certificate),
            key=tls.secret_pem(self.identity, places[rank].salt),
            trusted=b"".join(tls.pem_of(p.certificate) for i, p in enumerate(places) if i != rank),
        )


def answer_mpc(
    envelope: Envelope,
    *,
    site: MpcSite,
    run_id: int,
    sender: int,
    limits: WireLimits = DEFAULT_LIMITS,
    passage: Passage | None = None,
) -> Envelope:
    """Answer one `MPC` message.

    Parameters
    ----------
    envelope : Envelope
    site : MpcSite
    run_id, sender : int
        Flower's run, and this site's node id.
    limits : WireLimits
        Largest sizes that this site accepts.
    passage : Passage, optional
        Rules of a site policy, as `site_audit.answer_message` hands them to its handler;
        default none. A session's rows are counted once, for its querier.

    Raises
    ------
    FedInferError
        Typed, and safe to send.
    """
    passage = passage or Passage(OPEN, MPC)
    passage.require_action("mpc")
    if envelope.kind is not Kind.JOB or envelope.run_id != run_id:
        raise BindingError("the message belongs to another run, or is no job")
    if sum(len(data) for _, data in envelope.sections) > limits.max_payload_bytes:
        raise EnvelopeError("the message is larger than this site accepts")
    verb = fields.text(envelope.meta, "verb", max_chars=32)
    sections: tuple[tuple[str, bytes], ...]
    if verb == "statement":
        sections = (("statement", site.statement.to_bytes(site.identity)),)
    elif verb == "weights":
        session = _counted_session(envelope, site, passage)
        shares = site.share_weights(session)
        sections = tuple((f"share-{rank}", data) for rank, data in enumerate(shares))
    elif verb == "compute":
        sections = _compute(envelope, site, _counted_session(envelope, site, passage))
    else:
        raise EnvelopeError("a verb that this release does not know")
    return Envelope(
        kind=Kind.ANSWER,
        run_id=run_id,
        query_id=envelope.query_id,
        sender=sender,
        meta={"verb": verb},
        sections=sections,
    )


def _counted_session(envelope: Envelope, site: MpcSite, passage: Passage) -> MpcSession:
    """Return the session, after the site's consent to it and the limits of its policy."""
    session = MpcSession.from_bytes(envelope.section("session"))
    site.consent.check(session)
    passage.note(querier=session.querier.key_id, protection="mpc")
    n_rows = session.n_queries * session.n_batches
    passage.require_rows(n_rows)
    name = f"mpc-{session.session_id}"
    passage.count(querier=session.querier.key_id, query_id=name, n_rows=n_rows)
    return session


def _compute(
    envelope: Envelope, site: MpcSite, session: MpcSession
) -> tuple[tuple[str, bytes], ...]:
    ends_at = time.monotonic() + fields.number(envelope.meta, "seconds-left")
    try:
        results = site.compute(
            session,
            [envelope.section(f"weights-{i}") for i in range(len(session.owners))],
            [envelope.section(f"query-{b}") for b in range(session.n_batches)],
            ends_at=ends_at,
        )
    except OSError as exc:
        raise PartyFailedError(f"the party process did not start: {type(exc).__name__}") from None
    return tuple((f"result-{batch}", data) for batch, data in enumerate(results))


def _network(
    model: Any, input_shape: Sequence[int]
) -> tuple[NetworkSpec | None, list[npt.NDArray[np.float32]]]:
    if model is None:
        return None, []
    if isinstance(model, tuple):
        spec, weights = model
        if not isinstance(spec, NetworkSpec):
            raise ModelError("model is a torch.nn.Sequential or (NetworkSpec, weights)")
        spec.require_weights(weights)
        return spec, [np.asarray(w, dtype=np.float32) for w in weights]
    return NetworkSpec.from_torch(model, input_shape)
