"""What a site agrees to. The coordinator cannot widen it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedinfer_flower.clients.policy_kinds import kind_of
from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import (
    FedInferError,
    PolicyRefusedError,
    ProtectionRefusedError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.pins import read_pins

__all__ = ["FURTHER_WORK", "Consent", "OptionLimits"]

_PINS: Final = "pins.toml"

FURTHER_WORK: Final = frozenset({"settlement", "settlement-ckks", "stacking", "calibration"})
"""Work beside answering, each with a disclosure of its own: a second copy of each answer, from
which rewards are worked out, in shares or, more weakly, encrypted to the querier; held-out rows,
which other sites answer, and a share in training an aggregator on them; a histogram of how well
the model does on them."""


@dataclass(frozen=True, kw_only=True)
class OptionLimits:
    """How far the querier's choice of privacy options may go at this site.

    Parameters
    ----------
    require_self_mask : bool
        Under `secagg` and `secagg+dp`: only with a mask of the site's own on top.
    max_dropout_share : float
        Largest share of dropouts for which the site helps to open a sum.
    min_collusion_share : float
        Smallest share of colluding sites that shared noise must be planned for.
    max_delta : float

    Privacy
    -------
    The options travel with the question, so a querier that lies chooses them: a strict site
    does not leave to it what protects the site from it.

    Examples
    --------
    >>> OptionLimits(require_self_mask=True, min_collusion_share=0.1, max_delta=1e-5).max_delta
    1e-05
    """

    require_self_mask: bool = False
    max_dropout_share: float = 0.5
    min_collusion_share: float = 0.0
    max_delta: float = 1e-3

    def check(self, protection: Protection) -> None:
        """Refuse options beyond the limits.

        Raises
        ------
        ProtectionRefusedError
            Naming the option.
        """
        broken = self.broken(protection)
        if broken is not None:
            raise ProtectionRefusedError(broken[1])

    def broken(self, protection: Protection) -> tuple[str, str] | None:
        """Return the first limit that options break, as its key and in words; None if all hold."""
        options = protection.options()
        if self.require_self_mask and options.get("self_mask") is False:
            words = "this site answers only with a mask of its own on top: self_mask=True"
            return "require-self-mask", words
        for name, most in (("dropout_share", self.max_dropout_share), ("delta", self.max_delta)):
            if float(options.get(name, 0.0)) > most:
                key = f"max-{name.replace('_', '-')}"
                return key, f"this site accepts {name} up to {most:g}"
        if float(options.get("collusion_share", 1.0)) < self.min_collusion_share:
            words = f"this site accepts collusion_share from {self.min_collusion_share:g}"
            return "min-collusion-share", words
        return None


@dataclass(frozen=True, kw_only=True)
class Consent:
    """What a site agrees to.

    Parameters
    ----------
    protections : frozenset of str, optional
        Protections under which the site answers. Default: all; with a privacy budget, those
        that add noise.
    querier_key_ids : frozenset of str, optional
        Fingerprints of the queriers that the site answers: of the identity that signed a
        sealed query, or of the key for which it encrypts under `he`. None for anyone.
    peer_key_ids : frozenset of str, optional
        Fingerprints of the other sites that the site knows. With them, so many of a
        roster's sites must be known that made-up ones and dropouts leave no sum of fewer
        known sites than the smallest cohort: under `he`, all of them.
    require_seal : bool
        Refuse queries that the coordinator could read, or make up.
    max_epsilon_per_query : float, optional
        Most epsilon that the site spends on one query row; None for no limit.
    option_limits : OptionLimits
    agrees_to : frozenset of str
        Of `FURTHER_WORK`.
    rules : frozenset of str, optional
        Ensemble rules that the site follows; None for any.
    kinds : frozenset of str, optional
        What an answer may be, of `policy_kinds.KINDS`; None for anything.
    min_cohort : int
        Fewest sites in a sum that may be opened, where a sum hides the answer and the
        protection itself would have fewer.
    by_policy : bool
        Whether a site policy says all this: refusals then name its table and key.

    Privacy
    -------
    Without `querier_key_ids` a dishonest coordinator can ask for itself, and under `he` put
    a key of its own in place of the querier's. Without `peer_key_ids` it can make up all
    other sites of a sum.
    """

    protections: frozenset[str] | None = None
    querier_key_ids: frozenset[str] | None = field(default=None)
    peer_key_ids: frozenset[str] | None = field(default=None)
    require_seal: bool = False
    max_epsilon_per_query: float | None = None
    option_limits: OptionLimits = field(default_factory=OptionLimits)
    agrees_to: frozenset[str] = frozenset()
    rules: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    min_cohort: int = 0
    by_policy: bool = False

    def refusal(
        self, error: type[FedInferError], message: str, key: str, *, hint: str = ""
    ) -> FedInferError:
        """Return an error that names the rule of the site policy, if there is one."""
        return error(f"{message} ({key})" if self.by_policy else message, hint=hint)

    def check_rule(self, rule: EnsembleRule) -> None:
        """Refuse a rule under which more would leave than the site agrees to.

        Raises
        ------
        PolicyRefusedError
        """
        if self.rules is not None and rule.name not in self.rules:
            raise self.refusal(
                PolicyRefusedError,
                f"this site does not follow rule {rule.name!r}",
                "[answers] rules",
                hint=f"use {' or '.join(sorted(self.rules))}",
            )
        kind = kind_of(rule)
        if self.kinds is not None and kind not in self.kinds:
            raise self.refusal(
                PolicyRefusedError,
                f"rule {rule.name!r} sends {kind}, which do not leave this site",
                "[answers] kinds",
                hint=f"what may leave: {', '.join(sorted(self.kinds))}",
            )

    def require(self, work: str) -> None:
        """Refuse work that the site's owner has not agreed to.

        Raises
        ------
        ProtectionRefusedError
        """
        if work not in self.agrees_to:
            raise self.refusal(
                ProtectionRefusedError,
                f"this site has not agreed to take part in {work}",
                "[answers] agrees-to",
                hint=f"InferenceMod(..., agrees_to=({work!r},)) at the site; read first what"
                " that gives away",
            )

    def with_pins_of(self, folder: Path) -> Consent:
        """Return this consent with the key ids of the folder's pin file, if it has one.

        In simulation, where partitions have folders in one home, that home's serves all.
        Key ids that were given in code stay.
        """
        files = [path for path in (folder / _PINS, folder.parent / _PINS) if path.exists()]
        if not files:
            return self
        pins = read_pins(files[0])
        queriers, peers = self.querier_key_ids, self.peer_key_ids
        if queriers is None and pins.queriers:
            queriers = frozenset(pins.queriers.values())
        if peers is None and pins.sites:
            peers = frozenset(pins.sites.values())
        return dataclasses.replace(self, querier_key_ids=queriers, peer_key_ids=peers)

    def check(
        self,
        asked: Question,
        protection: Protection,
        plan: ScorePlan,
        *,
        sealed: bool,
        budgeted: bool,
        own_key_id: str = "",
    ) -> None:
        """Refuse what the site did not agree to.

        Parameters
        ----------
        own_key_id : str
            The site's own, which does not count as one of its peers.

        Raises
        ------
        ProtectionRefusedError
            With the rule that forbids it.
        UntrustedKeyError
            If the querier, or too many of the other sites, are unknown.
        """
        self._check_protection(asked, protection, plan, budgeted=budgeted)
        if self.require_seal and not sealed:
            raise self.refusal(
                ProtectionRefusedError,
                "this site answers sealed queries only",
                "[answers] require-seal",
                hint="fetch the directory and ask(inputs, directory=...)",
            )
        self._check_keys(asked, protection, sealed=sealed, own_key_id=own_key_id)

    def _check_protection(
        self, asked: Question, protection: Protection, plan: ScorePlan, *, budgeted: bool
    ) -> None:
        if self.protections is not None and protection.name not in self.protections:
            raise self.refusal(
                ProtectionRefusedError,
                f"this site does not answer under {protection.name!r}",
                "[answers] protections",
                hint=f"use {' or '.join(sorted(self.protections))}",
            )
        if self.protections is None and budgeted and protection.charge(plan, 1) is None:
            raise ProtectionRefusedError(
                f"this site keeps a privacy budget, which no answer under {protection.name!r}"
                " fits: it adds no noise",
                hint="use secagg+dp, he+dp or dp",
            )
        broken = self.option_limits.broken(protection)
        if broken is not None:
            raise self.refusal(ProtectionRefusedError, broken[1], f"[answers] {broken[0]}")
        if asked.n_sites < protection.min_cohort:
            raise ProtectionRefusedError(
                f"{protection.name!r} needs at least {protection.min_cohort} sites in a sum,"
                f" {asked.n_sites} are asked"
            )
        least = protection.least_sites(asked.n_sites)
        if protection.min_cohort > 1 and least < self.min_cohort:
            raise self.refusal(
                PolicyRefusedError,
                f"this site answers into sums of at least {self.min_cohort} sites; of"
                f" {asked.n_sites} that are asked, {least} may be enough here",
                "[answers] min-cohort",
                hint="ask more sites, or plan for fewer dropouts (dropout_share)",
            )
        spent = protection.epsilon_delta(plan)
        limit = self.max_epsilon_per_query
        if spent is not None and limit is not None and spent[0] > limit:
            raise self.refusal(
                ProtectionRefusedError,
                f"epsilon {spent[0]:g} a query is above this site's limit of {limit:g}",
                "[answers] max-epsilon-per-query",
            )

    def _check_keys(
        self, asked: Question, protection: Protection, *, sealed: bool, own_key_id: str
    ) -> None:
        known = self.querier_key_ids
        if known is not None:
            signer = asked.querier.key_id if sealed and asked.querier is not None else ""
            # In clear nobody signs; under `he` the key for which is encrypted stands for it.
            encrypted_for = asked.key_id if protection.needs_key and not sealed else ""
            if signer not in known and encrypted_for not in known:
                raise self.refusal(
                    UntrustedKeyError,
                    "this site does not know the querier's key",
                    "[queriers]",
                    hint="give the site the key id that 'fedinfer key' prints; a query"
                    " in clear has no signature, so ask under seal",
                )
        # Where no sum hides an answer, the other sites do not matter. A query without a
        # roster names no site that could be known.
        if self.peer_key_ids is not None and protection.min_cohort > 1:
            n_known = len((self.peer_key_ids - {own_key_id}) & set(asked.roster.key_ids))
            least = protection.least_sites(asked.n_sites)
            # Sites that are known may be called dropped: even then a sum must hold as many
            # known ones, this site included, as any sum must hold sites.
            cohort = max(protection.min_cohort, self.min_cohort)
            needed = max(least, cohort + asked.n_sites - least)
            if n_known + 1 < needed:
                raise self.refusal(
                    UntrustedKeyError,
                    f"this site knows {n_known} of the other {asked.n_sites - 1} sites of the"
                    f" query, {needed - 1} are needed",
                    "[sites]",
                    hint="compare key ids with the other sites' operators",
                )
