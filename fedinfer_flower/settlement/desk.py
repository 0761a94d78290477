"""The coordinator's side of a settlement.

Who sends what, and who learns what by it:

====  ===========================  ===================================  =====================
step  from, to                     content                              the receiver learns
====  ===========================  ===================================  =====================
0     site, to the coordinator     its share or ciphertexts, and the    that the site settles
                                   querier's half, sealed
1     coordinator, to the querier  sums over all sites of their         each row's sum over
                                   shares or ciphertexts; the sealed    all sites
                                   halves
2     querier, to the coordinator  places and labels of the audits,     labels, the audits'
                                   their totals; under `shares` its     totals; one row sum a
                                   half of each row sum, with noise     site
3     coordinator, to the querier  (`ckks` only) each site's row sum    nothing: uniform
                                   under encryption, blinded
4     querier, to the coordinator  (`ckks` only) what that decrypts     one row sum a site
                                   to, with noise
====  ===========================  ===================================  =====================

Both work out the weights from labels and totals, and refuse weights that open single answers.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection

import numpy as np

from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    ReplayError,
    SettlementError,
)
from fedinfer_flower.incentives.base import LinearScheme, without_dust
from fedinfer_flower.settlement import ckks_rows
from fedinfer_flower.settlement.blinded import BlindedRows, SlotSums
from fedinfer_flower.settlement.book import EvidenceBook, clear_rows
from fedinfer_flower.settlement.documents import SettlementReply, SettlementRequest
from fedinfer_flower.settlement.epoch import Epoch
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.outcome import Settlement
from fedinfer_flower.settlement.reading import require_answer, require_signed
from fedinfer_flower.settlement.release_noise import gaussian_sums
from fedinfer_flower.settlement.ring import Array, RingArray
from fedinfer_flower.settlement.scaling import SlotScale
from fedinfer_flower.settlement.shares import CoordinatorHalf
from fedinfer_flower.wire.identity import PublicIdentity

__all__ = ["SettlementDesk"]


class SettlementDesk:
    """Settles one epoch at the coordinator. Not thread-safe.

    The epoch is made of the query ids of `book` that one set of sites answered, the set
    with most rows. Others stay for another epoch: see `left_out`.

    Parameters
    ----------
    book : EvidenceBook
    scheme : LinearScheme
        Agreed on with the querier before the epoch.
    querier : PublicIdentity, optional
        Whose signature replies must have. Needed unless evidence is in clear.
    evidence_key : bytes
        Public settlement key under which evidence was encrypted; only under `ckks`.
    settled_query_ids : collection of str
        Every query id that was settled before: the caller keeps them, and adds
        `query_ids` before it releases the settlement.
    noise_std : float
        Gaussian noise that this role adds to each released value, in contribution units.

    Raises
    ------
    SettlementError
        If no query that is not settled yet has evidence of three sites.
    ConfigError
        If what the form of the evidence needs is missing.

    Privacy
    -------
    Holds the coordinator's shares or ciphertexts, and never the seeds or the secret key.
    Learns from a reply which rows were audits, their labels, each audit's sum over all
    sites, and one row sum a site. Its own noise protects sites from whoever sees the
    settlement, not from itself; the querier's noise does that.
    """

    def __init__(
        self,
        book: EvidenceBook,
        *,
        scheme: LinearScheme,
        querier: PublicIdentity | None = None,
        evidence_key: bytes = b"",
        settled_query_ids: Collection[str] = (),
        noise_std: float = 0.0,
    ) -> None:
        if not (math.isfinite(noise_std) and noise_std >= 0.0):
            raise InvalidValueError("noise_std is a number that is not negative")
        if not isinstance(book, EvidenceBook):
            raise ConfigError(
                "no evidence was collected",
                hint="both ask for it: FedEnsemble(..., evidence=True) and"
                " querier.ask(..., evidence=True)",
            )
        if querier is None and book.form is not EvidenceForm.CLEAR:
            raise ConfigError(
                f"evidence in form {book.form.value!r} is settled with a querier",
                hint="pass querier=PublicIdentity: its replies are signed",
            )
        if not evidence_key and book.form is EvidenceForm.CKKS:
            raise ConfigError("encrypted evidence needs evidence_key=...")
        sites, query_ids = book.largest_cohort(exclude=frozenset(settled_query_ids))
        self.sites = tuple(sorted(sites))
        self.query_ids = query_ids
        self.noise_std = noise_std
        self._book, self._scheme, self._querier = book, scheme, querier
        self._key = evidence_key
        self._epoch_id = secrets.token_hex(16)
        self._request: SettlementRequest | None = None
        self._epoch: Epoch | None = None
        self._sent: tuple[str, list[int]] | None = None
        self._done = False
        self._replied = ""

    def __repr__(self) -> str:
        return f"<settlement desk, {len(self.sites)} sites, {len(self.query_ids)} query ids>"

    @property
    def left_out(self) -> tuple[str, ...]:
        """Query ids in the book that this epoch leaves out."""
        return tuple(q for q in self._book.query_ids if q not in set(self.query_ids))

    def request(self) -> SettlementRequest:
        """Return what to ask the querier; the same at each call."""
        if self._request is None:
            self._request = SettlementRequest(
                epoch_id=self._epoch_id,
                form=self._book.form,
                scheme=self._scheme.name,
                scheme_options=self._scheme.options(),
                sites=self.sites,
                queries=tuple((q, self._book[q].n_queries) for q in self.query_ids),
                n_classes=self._book[self.query_ids[0]].n_classes,
                totals=b"".join(self._total(query_id) for query_id in self.query_ids),
                halves=self._halves(),
            )
        return self._request

    def finish(self, reply: SettlementReply) -> Settlement:
        """Open the row sums, check them, and release the settlement, once.

        Raises
        ------
        ProtocolError
            If the reply is not by the querier, of another epoch, or does not pass the
            checks of `Epoch`: as `SignatureError`, `BindingError` or `SettlementError`.
        ReplayError
            If this epoch was released.
        """
        if self._book.form is EvidenceForm.CKKS:
            raise SettlementError("encrypted evidence needs one more exchange", hint="desk.blind")
        epoch = self._checked(reply)
        if reply.halves_k.shape != (len(self.sites),):
            raise SettlementError("a reply has one half a site")
        values = np.zeros(len(self.sites))
        for place, site in enumerate(self.sites):
            own = epoch.weights.ring_sum(self._audited(epoch, site))
            values[place] = epoch.weights.value((own + int(reply.halves_k[place])) % 2**64)
        return self._release(epoch, values, noise_std=reply.noise_std)

    def blind(self, reply: SettlementReply) -> BlindedRows:
        """Weigh encrypted evidence and blind it (`ckks`).

        Raises
        ------
        ProtocolError
            As `finish`.
        ReplayError
            If rows of this epoch were sent before: other weights a second time would open
            a second row sum.
        """
        if self._book.form is not EvidenceForm.CKKS:
            raise SettlementError("only encrypted evidence is blinded", hint="desk.finish")
        if self._sent is not None:
            raise ReplayError("the blinded rows of this epoch were sent before")
        epoch = self._checked(reply)
        scale = SlotScale.of(epoch)
        blinded, blinds = [], []
        for site in self.sites:
            weighed = [
                (self._book[query_id].payloads[site], scale.slot_weights(epoch, number))
                for number, query_id in enumerate(self.query_ids)
            ]
            row, blind = ckks_rows.blinded_row_sum(self._key, weighed)
            blinded.append(row)
            blinds.append(blind)
        rows = BlindedRows(epoch_id=self._epoch_id, answers_to=reply.digest, rows=b"".join(blinded))
        self._epoch, self._sent = epoch, (rows.digest, blinds)
        return rows

    def finish_blinded(self, sums: SlotSums) -> Settlement:
        """Take the blinds off, check the row sums, and release the settlement, once.

        Raises
        ------
        ProtocolError
            As `finish`.
        """
        if self._sent is None or self._epoch is None:
            raise SettlementError("no blinded rows were sent", hint="desk.blind comes first")
        digest, blinds = self._sent
        require_answer(sums, epoch_id=self._epoch_id, digest=digest)
        self._require_signature(sums)
        if sums.sums_k.shape != (len(self.sites),) or sums.sums_k.max() >= ckks_rows.PRIME:
            raise SettlementError("slot sums are one residue a site")
        scale = SlotScale.of(self._epoch)
        values = np.array(
            [
                scale.value(self._epoch, int(residue) - blind)
                for residue, blind in zip(sums.sums_k, blinds, strict=True)
            ]
        )
        return self._release(self._epoch, values, noise_std=sums.noise_std)

    def _total(self, query_id: str) -> bytes:
        entry = self._book[query_id]
        payloads = [entry.payloads[site] for site in self.sites]
        if self._book.form is EvidenceForm.CKKS:
            return ckks_rows.add_rows(self._key, payloads)
        total = np.zeros(entry.shape, dtype=np.uint64)
        for payload in payloads:
            total += self._ring_rows(payload, entry.shape)
        return total.astype("<u8").tobytes()

    def _halves(self) -> bytes:
        if self._book.form is not EvidenceForm.SHARES:
            return b""
        return b"".join(
            CoordinatorHalf.from_bytes(
                self._book[query_id].payloads[site], shape=self._book[query_id].shape
            ).sealed
            for site in self.sites
            for query_id in self.query_ids
        )

    def _ring_rows(self, payload: bytes, shape: tuple[int, int]) -> RingArray:
        if self._book.form is EvidenceForm.CLEAR:
            return clear_rows(payload, shape)
        return CoordinatorHalf.from_bytes(payload, shape=shape).share_bc

    def _audited(self, epoch: Epoch, site: str) -> RingArray:
        """Return one site's ring elements of the audits, shape (n_audits, n_classes)."""
        found = np.zeros(epoch.totals_tc.shape, dtype=np.uint64)
        for number, query_id in enumerate(self.query_ids):
            places, rows = epoch.rows_in(number)
            entry = self._book[query_id]
            found[places] = self._ring_rows(entry.payloads[site], entry.shape)[rows]
        return found

    def _checked(self, reply: SettlementReply) -> Epoch:
        if self._done:
            raise ReplayError("this epoch was released before: one release an epoch")
        request = self.request()
        require_answer(reply, epoch_id=self._epoch_id, digest=request.digest)
        self._require_signature(reply)
        # Of every reply that is worked out something is told, if only that it was refused.
        if self._replied not in ("", reply.digest):
            raise ReplayError(
                "another reply to this epoch came before",
                hint="leave this epoch unsettled; ask the querier why it replied twice",
            )
        self._replied = reply.digest
        epoch = Epoch.of(
            request,
            audits_t3=reply.audits_t3,
            totals_tc=reply.totals_tc,
            scheme=self._scheme,
        )
        return epoch.with_grid(reply.weights_tc)

    def _require_signature(self, document: SettlementReply | SlotSums) -> None:
        if self._querier is not None:
            require_signed(document, self._querier)

    def _release(self, epoch: Epoch, values_k: Array, *, noise_std: float) -> Settlement:
        if self._done:
            raise ReplayError("this epoch was released before: one release an epoch")
        epoch.require_plausible(values_k, noise_std=noise_std)
        if not noise_std and not self.noise_std:
            values_k = without_dust(values_k, epoch.weights.error)
        unit = epoch.weights.unit
        own = gaussian_sums(len(values_k), self.noise_std / unit) * unit
        self._done = True
        return Settlement(
            epoch_id=self._epoch_id,
            scheme=self._scheme.name,
            values=dict(zip(self.sites, (values_k + own).tolist(), strict=True)),
            n_audits=len(epoch.audits_t3),
            noise_scale=math.hypot(noise_std, self.noise_std, epoch.cipher_error_std),
        )
