"""A federation of three roles that settles, with real keys and documents as bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from fedinfer_flower.incentives import AuditedAnswers, LinearScheme, make_scheme
from fedinfer_flower.settlement import (
    AuditRow,
    BlindedRows,
    EvidenceBook,
    EvidenceForm,
    QuerierDesk,
    Settlement,
    SettlementDesk,
    SettlementKeys,
    SettlementReply,
    SettlementRequest,
    SlotSums,
    site_evidence,
)
from fedinfer_flower.wire.identity import Identity

SEED = 20260301


@dataclass(kw_only=True)
class World:
    form: EvidenceForm
    probabilities_ktc: np.ndarray
    labels: np.ndarray
    queries: dict[str, slice]
    audits: tuple[AuditRow, ...]
    sites: list[Identity]
    querier: Identity
    keys: SettlementKeys | None
    book: EvidenceBook
    payloads: dict[tuple[str, str], bytes] = field(default_factory=dict)

    @classmethod
    def make(cls, form, *, n_sites=4, n_audits=45, n_others=10, n_classes=3, keys=None):
        rng = np.random.default_rng(SEED)
        n_rows = n_audits + n_others
        labels = rng.permutation(np.arange(n_rows) % n_classes)
        # Sites of very different worth: their values must not be alike.
        skill = np.linspace(0.0, 4.0, n_sites)[:, None, None]
        logits = skill * np.eye(n_classes)[labels] + rng.normal(size=(n_sites, n_rows, n_classes))
        p = np.exp(logits)
        p /= p.sum(axis=-1, keepdims=True)
        half = n_rows // 2 + 1
        queries = {"job-0": slice(0, half), "job-1": slice(half, n_rows)}
        places = np.sort(rng.choice(n_rows, size=n_audits, replace=False))
        audits = tuple(
            AuditRow(query_id=f"job-{t // half}", row=int(t % half), label=int(labels[t]))
            for t in places
        )
        sites = sorted((Identity.generate() for _ in range(n_sites)), key=lambda i: i.key_id)
        if form is EvidenceForm.CKKS and keys is None:
            keys = SettlementKeys.make()
        world = cls(
            form=form,
            probabilities_ktc=p,
            labels=labels,
            queries=queries,
            audits=audits,
            sites=sites,
            querier=Identity.generate(),
            keys=keys,
            book=EvidenceBook(form),
        )
        for query_id, rows in queries.items():
            for site, answers in zip(sites, p, strict=True):
                payload = world.evidence(site, query_id, answers[rows])
                world.payloads[query_id, site.key_id] = payload
                world.book.add(
                    query_id,
                    site.key_id,
                    payload,
                    n_queries=rows.stop - rows.start,
                    n_classes=n_classes,
                )
        return world

    def evidence(self, site, query_id, answers_bc):
        return site_evidence(
            self.form,
            answers_bc,
            querier=self.querier.public,
            evidence_key=self.public_key,
            identity=site,
            query_id=query_id,
        )

    @property
    def public_key(self) -> bytes:
        return b"" if self.keys is None else self.keys.public_key

    @property
    def asked(self) -> dict[str, int]:
        return {query_id: rows.stop - rows.start for query_id, rows in self.queries.items()}

    @property
    def audit_places(self) -> np.ndarray:
        return np.array([self.queries[a.query_id].start + a.row for a in self.audits])

    def desk(self, scheme: LinearScheme | None = None, **options) -> SettlementDesk:
        given = {"book": self.book, "querier": self.querier.public, **options}
        return SettlementDesk(
            given.pop("book"),
            scheme=scheme or make_scheme("brier-shapley"),
            evidence_key=self.public_key,
            **given,
        )

    def querier_desk(self, request, scheme: LinearScheme | None = None, **options) -> QuerierDesk:
        given = {
            "asked": self.asked,
            "sites": [site.public for site in self.sites],
            "identity": self.querier,
            "keys": self.keys,
            # Exact, to be compared with sums in clear; what the default adds has its own test.
            "noise_std": 0.0,
            **options,
        }
        return QuerierDesk(request, scheme=scheme or make_scheme("brier-shapley"), **given)

    def run(self, scheme: LinearScheme | None = None, **querier_options) -> Settlement:
        """Settle, every document as bytes."""
        desk = self.desk(scheme)
        request = SettlementRequest.from_bytes(desk.request().to_bytes())
        querier = self.querier_desk(request, scheme, **querier_options)
        reply = SettlementReply.from_bytes(querier.settle(self.audits).to_bytes())
        if self.form is not EvidenceForm.CKKS:
            return Settlement.from_bytes(desk.finish(reply).to_bytes())
        blinded = BlindedRows.from_bytes(desk.blind(reply).to_bytes())
        sums = SlotSums.from_bytes(querier.open_sums(blinded).to_bytes())
        return desk.finish_blinded(sums)

    def audited(self) -> AuditedAnswers:
        places = self.audit_places
        return AuditedAnswers(
            probabilities_ktc=self.probabilities_ktc[:, places], labels=self.labels[places]
        )

    def in_order(self, settlement: Settlement) -> np.ndarray:
        return np.array([settlement.values[site.key_id] for site in self.sites])


@pytest.fixture
def make_world():
    return World.make


@pytest.fixture(scope="session")
def settlement_keys():
    pytest.importorskip("tenseal")
    return SettlementKeys.make()
