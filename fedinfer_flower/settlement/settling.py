"""The querier's side of a settlement: it opens sums, reveals the audits, gives its halves."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from fedinfer_flower.errors import (
    ConfigError,
    InvalidValueError,
    ReplayError,
    SettlementError,
    ShapeError,
    UntrustedKeyError,
)
from fedinfer_flower.incentives.base import LinearScheme, likeliest
from fedinfer_flower.privacy.noise import gaussian_integers
from fedinfer_flower.settlement import ckks_rows
from fedinfer_flower.settlement.audits import AuditRow
from fedinfer_flower.settlement.blinded import BlindedRows, SlotSums
from fedinfer_flower.settlement.ckks_rows import SettlementKeys
from fedinfer_flower.settlement.documents import SettlementReply, SettlementRequest
from fedinfer_flower.settlement.epoch import FLOOD, Epoch, require_scheme, total_slack
from fedinfer_flower.settlement.forms import EvidenceForm
from fedinfer_flower.settlement.reading import require_answer, signed
from fedinfer_flower.settlement.release_noise import gaussian_sums
from fedinfer_flower.settlement.ring import ONE, Array, IntArray, RingArray, centred, stream
from fedinfer_flower.settlement.row_sums import MIN_SITES, MIN_SPARE_BITS
from fedinfer_flower.settlement.scaling import SlotScale
from fedinfer_flower.settlement.shares import open_half
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = ["QuerierDesk", "settle"]


class QuerierDesk:
    """Settles one epoch at the querier. Not thread-safe.

    Parameters
    ----------
    request : SettlementRequest
    scheme : LinearScheme
        Agreed on before the epoch.
    asked : mapping of str to int
        The querier's own query ids with their numbers of rows.
    form : EvidenceForm, optional
        For which it asked; None to take the coordinator's word.
    sites : iterable of PublicIdentity, optional
        Sites that the querier trusts to be real, from a pinned directory. Needed under
        `shares`: a coordinator that made up all sites but one would read that one's answers
        from the totals.
    identity : Identity, optional
        The querier's keys. Needed unless evidence is in clear.
    keys : SettlementKeys, optional
        Needed under `ckks`. Fresh for each epoch.
    settled_query_ids : collection of str
        Every query id settled before: the caller keeps them, and adds those of this
        request before it sends the reply.
    min_sites : int
        Fewest sites of an epoch. Set it to the number that answered: a coordinator that
        settles a few sites of its choice has totals of these few.
    noise_std : float, optional
        Gaussian noise on each row sum, in contribution units: hides single answers from the
        coordinator too, who otherwise solves an exact sum of sure answers for who said what.
        Default `RowWeights.sensitivity`, what one answer can change: epsilon 4.4 for an answer
        at delta 1e-5. 0 for exact sums, of enough audits; in clear there is nothing to hide.
        Under `ckks` at least 16 times the decryption's error is added.

    Raises
    ------
    SettlementError
        If the request names queries that were not asked, another scheme, or too few sites.
    ReplayError
        If a query was settled before.
    UntrustedKeyError
        If a site is not among `sites`.
    SealError, SignatureError
        If a sealed half is not by its site, or of another query.
    ConfigError
        If what the form needs is missing.

    Privacy
    -------
    Holds the seeds or the secret key, and never a share or readable ciphertext of one
    site's evidence. Learns the sum over all sites of each row of the epoch, audits and
    others, and nothing of one site, unless it is shown the settled values: then one that
    audits rows alike many times reads single answers. All sites but one, with the querier,
    know that one's answers by subtraction.

    Under `shares` a coordinator alone that breaks the protocol gets what one that follows it
    gets, the audits' totals and one weighted sum a site: with weights other than those of
    the reply it has uniform numbers, and by false totals it can bend the weights only within
    the guards. Under `ckks` it gets more, because the querier cannot see what it decrypts:
    such a coordinator reads single answers as exactly as the noise lets it.
    """

    def __init__(
        self,
        request: SettlementRequest,
        *,
        scheme: LinearScheme,
        asked: Mapping[str, int],
        form: EvidenceForm | None = None,
        sites: Iterable[PublicIdentity] | None = None,
        identity: Identity | None = None,
        keys: SettlementKeys | None = None,
        settled_query_ids: Collection[str] = (),
        min_sites: int = MIN_SITES,
        noise_std: float | None = None,
    ) -> None:
        if noise_std is not None and not (math.isfinite(noise_std) and noise_std >= 0.0):
            raise InvalidValueError("noise_std is a number that is not negative")
        require_scheme(request, scheme)
        if form is not None and request.form != form:
            raise SettlementError("evidence in another form than this querier asked for")
        if len(request.sites) < max(min_sites, MIN_SITES):
            raise SettlementError(f"an epoch of fewer than {max(min_sites, MIN_SITES)} sites")
        if any(asked.get(query_id) != n for query_id, n in request.queries):
            raise SettlementError("a settlement of queries that this querier did not ask")
        if {query_id for query_id, _ in request.queries} & set(settled_query_ids):
            raise ReplayError(
                "a settlement of a query that was settled before",
                hint="two row sums that share rows tell single answers apart",
            )
        known = None if sites is None else {site.key_id: site for site in sites}
        _require_parts(request.form, known, identity, keys)
        if known is not None and not set(request.sites) <= set(known):
            raise UntrustedKeyError("a settlement with a site that is not in the directory")
        self.request, self.noise_std = request, noise_std or 0.0
        self._noise_by_default = noise_std is None and request.form is not EvidenceForm.CLEAR
        self._scheme, self._identity, self._keys = scheme, identity, keys
        self._seeds = self._opened_halves(known)
        self._totals = self._opened_totals()
        self._reply: tuple[SettlementReply, Epoch] | None = None
        self._done = False

    def __repr__(self) -> str:
        return f"<querier's settlement desk, {len(self.request.sites)} sites, keys hidden>"

    @property
    def totals(self) -> dict[str, Array]:
        """Sums of evidence over all sites: by query id, shape (n_queries, n_classes)."""
        sizes = [n for _, n in self.request.queries]
        parts = np.split(self._totals / ONE, np.cumsum(sizes)[:-1])
        return {query_id: p for (query_id, _), p in zip(self.request.queries, parts, strict=True)}

    def check_against_answer(self, answers: Mapping[str, Array], *, slack: float = 1e-4) -> None:
        """Require that evidence adds up to the answers that were opened.

        For rule `mean-probability`, whose score is the evidence: a site that answers one
        thing and settles another is noticed. Which site stays unknown.

        Parameters
        ----------
        answers : mapping of str to float array of shape (n_queries, n_classes)
            Opened sums of scores over the same sites, by query id.
        slack : float
            How far an answer's entry may be off a site, by the answer's own codec.

        Raises
        ------
        ShapeError
            If an answer is missing, or has another shape.
        SettlementError
            If an entry differs by more than both codecs explain.
        """
        n_sites = len(self.request.sites)
        limit = n_sites * slack + total_slack(self.request.form, n_sites)
        for query_id, total in self.totals.items():
            answer = np.asarray(answers.get(query_id, np.zeros(0)), dtype=np.float64)
            if answer.shape != total.shape:
                raise ShapeError("an answer that is missing, or of another shape than its evidence")
            if not np.abs(answer - total).max() <= limit:
                raise SettlementError(
                    "evidence does not add up to the answer: a site answered one thing and"
                    " settles another, or other sites answered than settle",
                    hint="leave this epoch unsettled; ask groups of sites to find which",
                )

    def settle(self, audits: Collection[AuditRow]) -> SettlementReply:
        """Reveal the audits, and give this role's half of each row sum, once.

        Audits in queries that are not in this epoch are left out.

        Raises
        ------
        SettlementError
            If a guard holds: see `Epoch.of`.
        ReplayError
            If the audits of this epoch were revealed before.
        """
        if self._reply is not None:
            raise ReplayError("the audits of this epoch were revealed before")
        audits_t3 = self._placed(audits)
        offsets = np.cumsum([0, *(n for _, n in self.request.queries)])
        rows_in = np.array([n for _, n in self.request.queries])
        row = audits_t3[:, 1]
        if not ((row >= 0) & (row < rows_in[audits_t3[:, 0]])).all():
            raise SettlementError("an audit in a row that was not asked")
        totals = self._totals[offsets[audits_t3[:, 0]] + audits_t3[:, 1]]
        epoch = Epoch.of(self.request, audits_t3=audits_t3, totals_tc=totals, scheme=self._scheme)
        if self._noise_by_default:
            self.noise_std = epoch.weights.sensitivity
        right = float((likeliest(totals / ONE) == audits_t3[:, 2]).mean())
        if right < 1.0 / self.request.n_classes - 3.0 / math.sqrt(4.0 * len(audits_t3)):
            raise SettlementError(
                "the sites together are right about fewer audits than by chance: labels are"
                " probably in another order than the classes of the answer",
                hint="labels are indices into result.combined.classes",
            )
        self._require_noise_or_bits(epoch)
        reply = SettlementReply(
            epoch_id=self.request.epoch_id,
            answers_to=self.request.digest,
            audits_t3=audits_t3,
            totals_tc=totals,
            weights_tc=epoch.weights.grid_tc,
            halves_k=self._own_halves(epoch),
            noise_std=0.0 if self.request.form is EvidenceForm.CKKS else self.noise_std,
        )
        reply = signed(reply, self._identity)
        self._reply = (reply, epoch)
        return reply

    def open_sums(self, blinded: BlindedRows) -> SlotSums:
        """Decrypt blinded row sums, and add noise, once (`ckks`).

        Raises
        ------
        ProtocolError
            If they are malformed, or answer another reply.
        ReplayError
            If row sums of this epoch were opened before.
        """
        if self._keys is None or self._reply is None:
            raise SettlementError("blinded rows before the audits were revealed")
        if self._done:
            raise ReplayError("row sums of this epoch were opened before")
        reply, epoch = self._reply
        require_answer(blinded, epoch_id=self.request.epoch_id, digest=reply.digest)
        n_sites = len(self.request.sites)
        if len(blinded.rows) != n_sites * ckks_rows.CIPHERTEXT_BYTES:
            raise SettlementError("blinded rows are one ciphertext a site")
        residues = ckks_rows.open_constants(self._keys, blinded.rows)
        noise_std = max(self.noise_std, FLOOD * epoch.cipher_error_std)
        noise = SlotScale.of(epoch).noise(n_sites, noise_std)
        noisy = [(a + b) % ckks_rows.PRIME for a, b in zip(residues, noise, strict=True)]
        self._done = True
        sums = SlotSums(
            epoch_id=self.request.epoch_id,
            answers_to=blinded.digest,
            sums_k=np.array(noisy, dtype=np.uint64),
            noise_std=noise_std,
        )
        return signed(sums, self._identity)

    def _require_noise_or_bits(self, epoch: Epoch) -> None:
        # In clear there is nothing to hide, and under CKKS there is noise in any case.
        is_exact = self.request.form is EvidenceForm.SHARES and self.noise_std == 0.0
        if is_exact and epoch.weights.spare_bits < MIN_SPARE_BITS:
            raise SettlementError(
                "with so few audits and classes an exact row sum could be solved for the"
                " answers in it",
                hint=f"noise_std={epoch.weights.sensitivity:.3g}, or settle more audits at once",
            )

    def _opened_halves(self, known: Mapping[str, PublicIdentity] | None) -> list[list[bytes]]:
        if self.request.form is not EvidenceForm.SHARES:
            return []
        if known is None or self._identity is None:
            raise ConfigError("evidence in shares needs sites=... and identity=...")
        return [
            [
                open_half(
                    self.request.half(place, number),
                    identity=self._identity,
                    query_id=query_id,
                    site=known[site],
                )
                for number, (query_id, _) in enumerate(self.request.queries)
            ]
            for place, site in enumerate(self.request.sites)
        ]

    def _opened_totals(self) -> IntArray:
        request = self.request
        if request.form is EvidenceForm.CKKS:
            return self._decrypted_totals()
        shape = (request.n_rows, request.n_classes)
        totals = np.frombuffer(request.totals, dtype="<u8").astype(np.uint64).reshape(shape)
        for seeds in self._seeds:
            totals += np.concatenate(
                [self._stream(seed, number) for number, seed in enumerate(seeds)]
            )
        return centred(totals)

    def _decrypted_totals(self) -> IntArray:
        if self._keys is None:
            raise ConfigError("encrypted evidence needs keys=SettlementKeys")
        opened, at, n_classes = [], 0, self.request.n_classes
        view = memoryview(self.request.totals)
        for _, n_queries in self.request.queries:
            end = at + ckks_rows.payload_bytes(n_queries, n_classes)
            opened.append(
                ckks_rows.open_totals(
                    self._keys, view[at:end], n_queries=n_queries, n_classes=n_classes
                )
            )
            at = end
        totals = np.concatenate(opened)
        limit = 2.0**20
        if not (np.isfinite(totals).all() and np.abs(totals).max() < limit):
            raise SettlementError("the sums of evidence are no sums of distributions")
        # What this role gives away of a decryption carries noise far above its error.
        std = FLOOD * ckks_rows.SLOT_ERROR_STD * math.sqrt(len(self.request.sites)) * ONE
        exact: IntArray = np.rint(totals * ONE).astype(np.int64)
        return exact + gaussian_integers(exact.shape, std)

    def _stream(self, seed: bytes, query: int) -> RingArray:
        n_queries, n_classes = self.request.queries[query][1], self.request.n_classes
        return stream(seed, n_queries * n_classes).reshape(n_queries, n_classes)

    def _placed(self, audits: Collection[AuditRow]) -> IntArray:
        number = {query_id: i for i, (query_id, _) in enumerate(self.request.queries)}
        placed = sorted(
            (number[audit.query_id], audit.row, audit.label)
            for audit in audits
            if audit.query_id in number
        )
        return np.array(placed, dtype=np.int64).reshape(-1, 3)

    def _own_halves(self, epoch: Epoch) -> RingArray:
        """Return, for each site, the weighted sum of its B, plus noise."""
        n_sites, form = len(self.request.sites), self.request.form
        if form is EvidenceForm.CKKS:
            return np.zeros(0, dtype=np.uint64)
        halves = gaussian_sums(n_sites, self.noise_std / epoch.weights.unit).view(np.uint64)
        for place, seeds in enumerate(self._seeds):
            masks = np.zeros(epoch.totals_tc.shape, dtype=np.uint64)
            for query, seed in enumerate(seeds):
                places, rows = epoch.rows_in(query)
                masks[places] = self._stream(seed, query)[rows]
            halves[place : place + 1] += np.array([epoch.weights.ring_sum(masks)], dtype=np.uint64)
        return halves


def _require_parts(
    form: EvidenceForm,
    known: Mapping[str, PublicIdentity] | None,
    identity: Identity | None,
    keys: SettlementKeys | None,
) -> None:
    if form is not EvidenceForm.CLEAR and identity is None:
        raise ConfigError("a sealed settlement is signed", hint="pass identity=Identity(...)")
    if form is EvidenceForm.SHARES and known is None:
        raise ConfigError(
            "evidence in shares needs the sites' keys",
            hint="pass sites=[seat.identity for seat in directory.roster.seats]",
        )
    if form is EvidenceForm.CKKS and keys is None:
        raise ConfigError("encrypted evidence needs keys=SettlementKeys")


def settle(
    request: SettlementRequest,
    audits: Collection[AuditRow],
    *,
    scheme: LinearScheme,
    asked: Mapping[str, int],
    form: EvidenceForm | None = None,
    sites: Iterable[PublicIdentity] | None = None,
    identity: Identity | None = None,
    settled_query_ids: Collection[str] = (),
    min_sites: int = MIN_SITES,
    noise_std: float | None = None,
) -> SettlementReply:
    """Answer a request in one call, for evidence in clear or in shares.

    Parameters and errors are those of `QuerierDesk` and `QuerierDesk.settle`.
    """
    desk = QuerierDesk(
        request,
        scheme=scheme,
        asked=asked,
        form=form,
        sites=sites,
        identity=identity,
        settled_query_ids=settled_query_ids,
        min_sites=min_sites,
        noise_std=noise_std,
    )
    return desk.settle(audits)
