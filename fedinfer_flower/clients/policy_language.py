"""Table ``[language]`` of a site policy: a `LanguagePolicy`, and where the model comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fedinfer_flower.clients.language_policy import LanguagePolicy
from fedinfer_flower.clients.policy_reading import table_of
from fedinfer_flower.clients.policy_tables import require_source
from fedinfer_flower.errors import ConfigError, FedInferError, InvalidValueError

__all__ = ["LanguageRules"]

_SWITCH_OF: Final = {
    "cache": "cache",
    "full_cache": "full-cache",
    "text": "text",
    "answers": "text",
    "candidates": "candidates",
}
"""Switches of `LanguagePolicy`, and the kind of answer that leaves when they are on."""


@dataclass(frozen=True, kw_only=True)
class LanguageRules:
    """Table ``[language]``.

    Parameters
    ----------
    policy : LanguagePolicy
        All keys beside those below, in kebab-case. ``answers`` defaults to whether
        ``[answers] kinds`` lists ``"text"``.
    says_answers : bool
        Whether the table has ``answers``.
    loader, kind, options : str, str, mapping
        As in ``[model]``; without both the model is that of ``[model]``.
    fusers : Path, optional
        Folder of fusers.
    gate : str
        A folder of a trained gate, or the name of one; empty for none.
    rephrase : str
    """

    policy: LanguagePolicy = field(default_factory=LanguagePolicy)
    says_answers: bool = False
    loader: str = ""
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    fusers: Path | None = None
    gate: str = ""
    rephrase: str = "template"

    def __post_init__(self) -> None:
        if self.has_source:
            require_source("language", self.loader, self.kind, self.options)
        elif self.options:
            raise ConfigError("[language] options belong to a kind")

    @property
    def has_source(self) -> bool:
        """Whether the table says where the language model comes from."""
        return bool(self.loader or self.kind)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, folder: Path = Path()) -> LanguageRules:
        """Read the table.

        Raises
        ------
        ConfigError
            Naming the table, and the key where one is wrong.

        Examples
        --------
        >>> LanguageRules.from_mapping({"text": True, "max-questions": 4}).policy.media
        ('text',)
        """
        given = dict(values)
        own: dict[str, Any] = {}
        for key in ("loader", "kind", "gate", "rephrase", "fusers"):
            if key in given:
                own[key] = given.pop(key)
                if not isinstance(own[key], str) or not own[key]:
                    raise InvalidValueError(f"[language] {key} is a text")
        if "options" in given:
            own["options"] = dict(table_of(given.pop("options"), "language.options"))
            path = own["options"].get("path")
            if isinstance(path, str):
                own["options"]["path"] = str(folder / Path(path).expanduser())
        if "fusers" in own:
            own["fusers"] = folder / Path(own["fusers"]).expanduser()
        if "gate" in own and (folder / own["gate"]).is_dir():
            own["gate"] = str(folder / own["gate"])
        try:
            policy = LanguagePolicy.from_mapping(given)
        except FedInferError as exc:
            raise type(exc)(f"[language]: {exc.message}", hint=exc.hint) from None
        return cls(policy=policy, says_answers="answers" in given, **own)

    def policy_for(self, kinds: Collection[str]) -> LanguagePolicy:
        """Return the policy of a site from which these kinds of answer may leave.

        Raises
        ------
        ConfigError
            If a switch is on whose kind may not.
        """
        policy = self.policy
        if not self.says_answers:
            policy = replace(policy, answers="text" in kinds)
        for switch, kind in _SWITCH_OF.items():
            if getattr(policy, switch) and kind not in kinds:
                raise ConfigError(
                    f"[language] {switch.replace('_', '-')} is on, and [answers] kinds does not"
                    f" list {kind!r}",
                    hint="add the kind if it may leave the site, else turn the switch off",
                )
        return policy
