"""A site's policy: one file from which its operator knows what can leave the site.

The file is read once, when the site starts, and enforced at the site; nothing in a message
changes it. What its tables mean: `policy_tables`, and ``docs/reference/site-policy.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.clients.consent import Consent
from fedinfer_flower.clients.language_policy import LanguagePolicy
from fedinfer_flower.clients.policy_checks import check_policy
from fedinfer_flower.clients.policy_language import LanguageRules
from fedinfer_flower.clients.policy_reading import (
    key_ids,
    read_file,
    read_table,
    require_known,
    table_of,
)
from fedinfer_flower.clients.policy_tables import (
    AnswerRules,
    AuditRules,
    CodeRules,
    LimitRules,
    ModelRules,
    SiteRules,
)
from fedinfer_flower.errors import ConfigError, DeploymentError, InvalidValueError
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.wire.envelope import WireLimits

if TYPE_CHECKING:
    from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy

__all__ = ["SitePolicy"]

_TABLES: Final = {
    "site": SiteRules,
    "model": ModelRules,
    "answers": AnswerRules,
    "queriers": dict,
    "sites": dict,
    "budget": BudgetPolicy,
    "limits": LimitRules,
    "language": LanguageRules,
    "code": CodeRules,
    "audit": AuditRules,
}


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What ``site.toml`` says.

    Parameters
    ----------
    site : SiteRules
    answers : AnswerRules
    model : ModelRules, optional
        Of the classifier; may be left out where `language` has a source of its own, and
        then the site has no classifier.
    queriers, sites : mapping of name to key id
        Whom the site answers, and which other sites it knows. Without `sites`: any.
    budget : BudgetPolicy, optional
    limits : LimitRules
    language : LanguageRules, optional
        Without it the site follows no action of language models.
    code : CodeRules
    audit : AuditRules
    digest : str
        SHA-256 in hex of the file, or of the mapping; goes into the audit log.

    Raises
    ------
    ConfigError
        If rules contradict each other, or one that must be given is not. The text names
        the table and the key.

    Privacy
    -------
    A coordinator can only ask for less than the policy allows. It can lie about what it
    alone knows: under `he` about how many sites a sum holds, and, where ``[sites]`` is empty,
    about who the other sites are.

    Examples
    --------
    >>> policy = SitePolicy.from_mapping({
    ...     "site": {"name": "north", "home": "state"},
    ...     "model": {"loader": "ward.models:load_model"},
    ...     "answers": {"protections": ["secagg"]},
    ...     "queriers": {"registry": "ab" * 32},
    ... })
    >>> policy.answers.require_seal, policy.code.app
    (True, 'own')
    >>> SitePolicy.from_mapping({"site": {"name": "north", "hom": "x"}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.UnknownConfigKeyError: FI206 ...
    """

    site: SiteRules
    answers: AnswerRules
    model: ModelRules | None = None
    queriers: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)
    budget: BudgetPolicy | None = None
    limits: LimitRules = field(default_factory=LimitRules)
    language: LanguageRules | None = None
    code: CodeRules = field(default_factory=CodeRules)
    audit: AuditRules = field(default_factory=AuditRules)
    digest: str = ""

    def __post_init__(self) -> None:
        check_policy(self)

    @classmethod
    def read(cls, path: str | Path) -> SitePolicy:
        """Read a file; relative paths in it are relative to its folder.

        Raises
        ------
        ConfigError
            If it cannot be read, or says what nothing reads, or contradicts itself.
        """
        path = Path(path).absolute()
        return cls.from_mapping(read_file(path), folder=path.parent)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, folder: Path = Path()) -> SitePolicy:
        """Read what `tomllib` made of a file."""
        given: dict[str, Any] = {}
        for name, table in values.items():
            require_known(str(name), _TABLES, "the file")
            given[str(name)] = _read(str(name), table, folder)
        for name in ("site", "answers"):
            if name not in given:
                raise ConfigError(
                    f"a site policy has no table [{name}]",
                    hint="see docs/reference/site-policy.md for one to begin with",
                )
        text = json.dumps(values, sort_keys=True, default=str)
        return cls(**given, digest=hashlib.sha256(text.encode()).hexdigest())

    @property
    def has_language_source(self) -> bool:
        """Whether ``[language]`` says itself where its model comes from."""
        return self.language is not None and self.language.has_source

    @property
    def has_classifier(self) -> bool:
        """Whether ``[model]`` is a classifier's, and not the language model's."""
        return self.model is not None and (self.language is None or self.has_language_source)

    # -- what enforces it ----------------------------------------------------------------

    @cached_property
    def consent(self) -> Consent:
        """What `InferenceMod` and `LanguageMod` check a query against."""
        answers = self.answers
        return Consent(
            protections=frozenset(answers.protections),
            querier_key_ids=None if answers.anyone else frozenset(self.queriers.values()),
            peer_key_ids=frozenset(self.sites.values()) or None,
            require_seal=answers.require_seal,
            max_epsilon_per_query=answers.max_epsilon_per_query,
            option_limits=answers.option_limits,
            agrees_to=frozenset(answers.agrees_to),
            rules=frozenset(answers.rules) or None,
            kinds=frozenset(answers.kinds),
            min_cohort=answers.min_cohort,
            by_policy=True,
        )

    @property
    def encrypted(self) -> EncryptedPolicy | None:
        """Terms of encrypted queries; None where they are not answered."""
        if "encrypted-query" not in self.answers.protections:
            return None
        from fedinfer_flower.clients.encrypted_answering import EncryptedPolicy

        return EncryptedPolicy(min_sites=max(3, self.answers.min_cohort))

    @property
    def language_policy(self) -> LanguagePolicy:
        """What a language model shares.

        Raises
        ------
        ConfigError
            If the policy has no table ``[language]``.
        """
        if self.language is None:
            raise ConfigError("a site policy has no table [language]")
        return self.language.policy_for(self.answers.kinds)

    @property
    def wire_limits(self) -> WireLimits:
        """Largest messages that are read at all."""
        return WireLimits(max_payload_bytes=self.limits.bytes_per_query)

    def open_home(self) -> Path:
        """Make the home for its owner alone, and return it.

        Raises
        ------
        DeploymentError
            If it cannot be made, others can read it, or it is another user's.
        """
        home = self.site.home.absolute()
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = home.stat()
            mode = found.st_mode
        except OSError as exc:
            raise DeploymentError(
                f"[site] home cannot be made: {type(exc).__name__}",
                hint="give a folder in which this user may write",
            ) from None
        if os.name == "posix" and mode & 0o077:
            raise DeploymentError(
                "[site] home can be read by others: it holds the site's secret keys",
                hint=f"chmod 700 {home}",
            )
        # Only root gets here: nobody else can use another's folder of mode 700.
        if os.name == "posix" and found.st_uid != os.geteuid():
            raise DeploymentError(
                "[site] home belongs to another user, who can put other keys and counters there",
                hint="run the site as its owner, or give it a folder of its own",
            )
        return home


def _read(name: str, table: object, folder: Path) -> Any:
    if name in ("queriers", "sites"):
        return key_ids(table, name)
    if name == "budget":
        # Its own checks name the fields, not the table.
        try:
            return read_table(BudgetPolicy, table, name)
        except InvalidValueError as exc:
            words = exc.message if exc.message.startswith("[") else f"[budget]: {exc.message}"
            raise InvalidValueError(words, hint=exc.hint) from None
    if name == "language":
        return LanguageRules.from_mapping(table_of(table, name), folder=folder)
    made: object = read_table(_TABLES[name], table, name, folder=folder)
    if isinstance(made, ModelRules):
        return dataclasses.replace(made, options=local_paths(made.options, folder))
    return made


def local_paths(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options with the paths in them relative to the folder of the policy."""
    given = dict(options)
    for key in ("path", "api-key-file"):
        if isinstance(given.get(key), str):
            given[key] = str(folder / Path(given[key]).expanduser())
    return given
