"""Evidence: a site's second copy of its answer, for settlement."""

from __future__ import annotations

from fedinfer_flower.errors import ConfigError
from fedinfer_flower.settlement.ckks_rows import encrypt_rows
from fedinfer_flower.settlement.forms import EvidenceForm, agreed_form, evidence_form
from fedinfer_flower.settlement.ring import Array, encode_rows
from fedinfer_flower.settlement.shares import split_rows
from fedinfer_flower.wire.identity import Identity, PublicIdentity

__all__ = ["EvidenceForm", "agreed_form", "evidence_form", "site_evidence"]


def site_evidence(
    form: EvidenceForm,
    probabilities_bc: Array,
    *,
    querier: PublicIdentity | None,
    evidence_key: bytes,
    identity: Identity | None,
    query_id: str,
) -> bytes:
    """Make a site's evidence of one batch.

    Parameters
    ----------
    form : EvidenceForm
        From `agreed_form`, never from a message alone.
    probabilities_bc : float array of shape (n_queries, n_classes)
        Calibrated probabilities over the question's classes; rows sum to 1.
    querier : PublicIdentity, optional
        Who asked; needed under `shares`.
    evidence_key : bytes
        The querier's public settlement key; needed under `ckks`.
    identity : Identity, optional
        The site's own keys; needed under `shares`.
    query_id : str

    Raises
    ------
    ProtocolError
        If a row is no distribution, or a key is malformed.
    ConfigError
        If what the form needs is missing.

    Privacy
    -------
    `clear` shows the answer to the coordinator. Under `shares` and `ckks` the coordinator
    alone sees uniform bits or a ciphertext, the querier alone nothing; both who pool what
    they have see the answer. After settlement the coordinator knows one weighted sum over
    at least 30 rows, and both know the sum over all sites of each audit row.

    Examples
    --------
    >>> import numpy as np
    >>> asked = {"querier": None, "evidence_key": b"", "identity": None, "query_id": "q-0"}
    >>> len(site_evidence(EvidenceForm.CLEAR, np.full((3, 2), 0.5), **asked))
    48
    """
    form = EvidenceForm(form)
    if form is EvidenceForm.CKKS:
        return encrypt_rows(evidence_key, probabilities_bc)
    rows = encode_rows(probabilities_bc)
    if form is EvidenceForm.CLEAR:
        return rows.astype("<u8").tobytes()
    if querier is None or identity is None:
        raise ConfigError(
            "evidence in shares needs the querier's and the site's keys",
            hint="seal the query; pass querier=... and identity=...",
        )
    half = split_rows(rows, querier=querier, identity=identity, query_id=query_id)
    return half.to_bytes()
