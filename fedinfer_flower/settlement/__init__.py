"""Rewards from one weighted sum a site, not from its answers: evidence, row sums, reveals.

A site sends a second copy of its answer, as shares or encrypted. At the end of an epoch the
querier reveals which rows were audits, and a linear scheme's score of each site is opened as
one sum over all of them. See `settlement.desk` for who sends what and who learns what.
"""

from __future__ import annotations

from fedinfer_flower.settlement.audits import AuditMix, AuditRow, mix_audits
from fedinfer_flower.settlement.blinded import BlindedRows, SlotSums
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.settlement.ckks_rows import SettlementKeys
from fedinfer_flower.settlement.desk import SettlementDesk
from fedinfer_flower.settlement.documents import SettlementReply, SettlementRequest
from fedinfer_flower.settlement.evidence import (
    EvidenceForm,
    agreed_form,
    evidence_form,
    site_evidence,
)
from fedinfer_flower.settlement.outcome import Settlement
from fedinfer_flower.settlement.settling import QuerierDesk, settle

__all__ = [
    "AuditMix",
    "AuditRow",
    "BlindedRows",
    "EvidenceBook",
    "EvidenceForm",
    "QuerierDesk",
    "Settlement",
    "SettlementDesk",
    "SettlementKeys",
    "SettlementReply",
    "SettlementRequest",
    "SlotSums",
    "agreed_form",
    "evidence_form",
    "mix_audits",
    "settle",
    "site_evidence",
]
