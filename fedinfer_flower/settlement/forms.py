"""In which form a site's evidence travels, and which forms a protection allows."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fedinfer_flower.errors import EnvelopeError, IncompatibleProtection, ProtectionRefusedError
from fedinfer_flower.privacy.base import Protection

__all__ = ["EvidenceForm", "agreed_form", "evidence_form", "wanted_form"]


_CKKS: Final = ("he", True)
"""Protection, and whether sealed, that may take evidence under encryption."""


class EvidenceForm(StrEnum):
    """How a second copy of an answer travels."""

    CLEAR = "clear"
    """The coordinator sees every answer anyway."""
    SHARES = "shares"
    """One share to the coordinator, one to the querier; neither says anything alone."""
    CKKS = "ckks"
    """Encrypted to the querier's settlement key; the coordinator weighs it blind."""


def evidence_form(
    protection: Protection, *, sealed: bool, wanted: str | None = None
) -> EvidenceForm:
    """Return the form that gives away no more than the answers themselves do.

    Parameters
    ----------
    protection : Protection
        Of the query.
    sealed : bool
        Whether querier and coordinator are two parties.
    wanted : str, optional
        ``"ckks"``, which `he` allows under seal; default the strongest form, shares.

    Raises
    ------
    IncompatibleProtection
        If no form does, or not the one wanted: with the reason, and what to use instead.

    Privacy
    -------
    Under `shares` and `ckks` coordinator and querier who pool what they have see every
    site's evidence, also where `secagg` alone would have hidden its answer from both: sites
    that agree to settle under `secagg` trust the two not to pool. `ckks` trusts the
    coordinator to keep to the protocol as well: one that does not has single answers
    decrypted without the querier noticing.

    Examples
    --------
    >>> from fedinfer_flower.privacy.base import make_protection
    >>> evidence_form(make_protection("secagg"), sealed=True).value
    'shares'
    """
    legal = {
        ("plain", False): EvidenceForm.CLEAR,
        ("plain", True): EvidenceForm.SHARES,
        ("secagg", True): EvidenceForm.SHARES,
        ("he", True): EvidenceForm.SHARES,
    }
    form = legal.get((protection.name, sealed))
    if form is not None and wanted == EvidenceForm.CKKS and (protection.name, sealed) == _CKKS:
        return EvidenceForm.CKKS
    if form is not None and wanted in (None, form.value):
        return form
    if form is not None:
        raise IncompatibleProtection(
            f"evidence in form {wanted!r} under protection {protection.name!r}",
            hint=f"settle in form {form.value!r}; 'ckks' goes with sealed 'he' alone",
        )
    what = f"no evidence for settlement under protection {protection.name!r}"
    if protection.name in ("secagg", "he"):
        raise IncompatibleProtection(
            f"{what} without sealing: the coordinator is the querier, and would hold both"
            " shares, or the key",
            hint="seal the query, so that querier and coordinator are two parties",
        )
    raise IncompatibleProtection(
        f"{what}: a second copy without its noise would undo it",
        hint="settle under 'plain', sealed 'secagg' or sealed 'he', or pay by a scheme that"
        " needs no evidence",
    )


def agreed_form(asked: str, protection: Protection, *, sealed: bool) -> EvidenceForm:
    """Return the form that a question asks a site for, if it is the legal one.

    A site never takes the form from the question alone: evidence in clear beside masked
    answers would undo the masks.

    Parameters
    ----------
    asked : str
        As it came with the question.
    protection : Protection
    sealed : bool
        Whether the question came sealed, by a querier that signed it.

    Raises
    ------
    EnvelopeError
        If there is no such form.
    IncompatibleProtection
        If no form is legal.
    ProtectionRefusedError
        If another form is.

    Examples
    --------
    >>> from fedinfer_flower.privacy.base import make_protection
    >>> agreed_form("clear", make_protection("plain"), sealed=False).value
    'clear'
    """
    if asked not in EvidenceForm.__members__.values():
        raise EnvelopeError("a question asks for evidence of an unknown form")
    legal = evidence_form(protection, sealed=sealed)
    if asked == EvidenceForm.CKKS and (protection.name, sealed) == _CKKS:
        return EvidenceForm.CKKS
    if asked != legal:
        raise ProtectionRefusedError(
            f"evidence in form {asked!r} under protection {protection.name!r}; the site gives it"
            f" in form {legal.value!r} only",
            hint=f"ask with evidence={legal.value!r}",
        )
    return legal


def wanted_form(protection: Protection, evidence: bool | str, *, sealed: bool) -> str:
    """Return the form that a question names; empty if it asks for no evidence.

    Parameters
    ----------
    evidence : bool or str
        True for the strongest form, or the name of one.

    Raises
    ------
    IncompatibleProtection
        If the protection does not allow it.

    Examples
    --------
    >>> from fedinfer_flower.privacy.base import make_protection
    >>> wanted_form(make_protection("he"), True, sealed=True)
    'shares'
    """
    if not evidence:
        return ""
    wanted = evidence if isinstance(evidence, str) else None
    return evidence_form(protection, sealed=sealed, wanted=wanted).value
