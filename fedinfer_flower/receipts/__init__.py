"""Signed receipts: what each site says it did for a job, and who could have learnt what."""

from fedinfer_flower.receipts.disclosure import DisclosureLine, disclosures
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SignedStatement, SiteStatement, cohort_digest
from fedinfer_flower.receipts.verification import Verification, verify

__all__ = [
    "DisclosureLine",
    "Receipt",
    "SignedStatement",
    "SiteStatement",
    "Verification",
    "cohort_digest",
    "disclosures",
    "verify",
]
