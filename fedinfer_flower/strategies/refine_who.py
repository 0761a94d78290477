"""Who takes part in an exchange: names and key ids resolved against those who are there."""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.errors import BindingError, ConfigError, NotEnoughNodesError
from fedinfer_flower.strategies.refine_onboarding import LanguageSite, LanguageSites
from fedinfer_flower.strategies.refine_options import RefineOptions, consents, require_names
from fedinfer_flower.wire.refine_job import RefineJob

__all__ = ["Who", "who_of"]


@dataclass(kw_only=True)
class Who:
    """The parties of an exchange, and on what terms.

    Parameters
    ----------
    receivers, sharers : tuple of LanguageSite
    missing : tuple of str
        Names of sharers, or starts of their key ids, that are not there.
    absent : tuple of str
        Key ids of a job's receivers that are not there.
    allow : frozenset of str
    rounds : int
    rephrase : str
    sealed : bool
    job : RefineJob, optional
    characters : int
        Of the longest question; 0 where they are sealed.
    """

    receivers: tuple[LanguageSite, ...]
    sharers: tuple[LanguageSite, ...]
    missing: tuple[str, ...]
    absent: tuple[str, ...]
    allow: frozenset[str]
    rounds: int
    rephrase: str
    sealed: bool
    job: RefineJob | None = None
    characters: int = 0

    def sharers_of(self, receiver: LanguageSite) -> tuple[LanguageSite, ...]:
        """Return who may help a receiver: everybody but itself."""
        return tuple(s for s in self.sharers if s.key_id != receiver.key_id)

    def site(self, key_id: str) -> LanguageSite:
        """Return a receiver by its key id."""
        return next(site for site in self.receivers if site.key_id == key_id)

    def name_of(self, key_id: str) -> str:
        """Return the name of a receiver."""
        return self.site(key_id).name


def who_of(
    options: RefineOptions,
    sites: LanguageSites,
    *,
    job: RefineJob | None,
    run_id: int,
    strict: bool,
) -> Who:
    """Resolve who takes part.

    Parameters
    ----------
    options : RefineOptions
    sites : LanguageSites
    job : RefineJob, optional
        A sealed one: its receivers, sharers, media and rounds are the most there can be.
    run_id : int
    strict : bool
        Whether a sharer that is named and not there is an error.

    Raises
    ------
    UnknownNameError
        For a name that no site has, with the nearest one.
    ConfigError
        If nobody can answer, or the job does not allow what the settings ask for.
    BindingError
        If the job is of another run.
    """
    for option in (options.receivers, options.sharers if strict else None):
        require_names(option or (), sites.names, _failed(sites))
    receivers = _receivers(options, sites)
    helpers = [s for s in sites.sites if options.sharers is None or s.name in options.sharers]
    missing = tuple(n for n in options.sharers or () if n not in sites.names)
    if job is None:
        return Who(
            receivers=tuple(receivers),
            sharers=tuple(helpers) if options.medium != "own" else (),
            missing=missing,
            absent=(),
            allow=options.allow,
            rounds=options.rounds,
            rephrase=options.rephrase,
            sealed=False,
        )
    _require_fits(options, job, run_id)
    there = {site.key_id for site in sites.sites}
    receivers = [site for site in receivers if site.key_id in job.receivers]
    helpers = [site for site in helpers if site.key_id in job.sharers]
    missing += tuple(f"key {key[:16]}" for key in job.sharers if key not in there)
    if not receivers:
        raise NotEnoughNodesError(
            "no receiver of the job is there, or none that these settings name",
            hint="questions are sealed to the receivers' keys: make the job from fresh cards",
        )
    return Who(
        receivers=tuple(receivers),
        sharers=tuple(helpers) if options.medium != "own" else (),
        missing=missing,
        absent=tuple(key for key in job.receivers if key not in there),
        allow=consents(job.media),
        rounds=min(options.rounds, job.rounds) if options.rounds > 1 else job.rounds,
        rephrase=job.rephrase,
        sealed=True,
        job=job,
    )


def _receivers(options: RefineOptions, sites: LanguageSites) -> list[LanguageSite]:
    willing = [site for site in sites.sites if site.card.answers]
    if options.receivers is None:
        if not willing:
            raise NotEnoughNodesError(
                f"none of {len(sites.sites)} sites with a language model takes part as receiver"
                f"{_failed(sites)}",
                hint="start sites with LanguageMod, and answers=True in their policy",
            )
        return willing
    found = [sites.named(name) for name in options.receivers]
    for site in found:
        if not site.card.answers:
            raise ConfigError(
                f"{site.name!r} takes no part as receiver",
                hint="name another receiver, or ask its operator",
            )
    return found


def _require_fits(options: RefineOptions, job: RefineJob, run_id: int) -> None:
    if job.run_id != run_id:
        raise BindingError(
            "the job was made for another run",
            hint="sites bind their cards to a run: make the job from cards of this one",
        )
    allowed = consents(job.media)
    if options.medium in ("cache", "text") and not allowed & {options.medium}:
        raise ConfigError(
            f"medium={options.medium!r}, and the job's querier does not consent to it",
            hint="LanguageQuerier.ask(..., allow=...) names the media",
        )


def _failed(sites: LanguageSites) -> str:
    codes = sorted({f"{error.code}" for error in sites.failures.values()})
    return f"; {len(sites.failures)} nodes failed to: {', '.join(codes)}" if codes else ""
