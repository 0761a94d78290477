"""What a shared cache gives away, measured on a sharer's own model and examples.

Axes: B prompts, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from fedinfer_flower.attacks.base import AttackResult
from fedinfer_flower.attacks.cache_decoder import Recovered, train_decoder
from fedinfer_flower.attacks.cache_defences import CacheChange, coded
from fedinfer_flower.attacks.cache_secrets import Secrets, word_secrets
from fedinfer_flower.attacks.measures import ERROR_RATE
from fedinfer_flower.attacks.prompt_inversion import (
    cache_features,
    nearest_prompts,
    prompt_features,
    read_tokens,
    token_dictionary,
)
from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

    from fedinfer_flower.kv.fuser import Fuser
    from fedinfer_flower.kv.layout import CacheEntries
    from fedinfer_flower.kv.share import ShareSpec
    from fedinfer_flower.language.model import LanguageModel
    from fedinfer_flower.refine.examples import FuserExample

__all__ = [
    "CacheDisclosure",
    "DisclosureRow",
    "SharedPrompts",
    "disclosure_report",
    "shared_prompts",
]

_BATCH_ROWS: Final = 256
_LEAST_TRAINED_ON: Final = 50
_LEAST_ATTACKED: Final = 20
_HOLDOUT: Final = 0.2
_LAST_OF_FULL: Final = 4
_NEEDS: Final = {
    "look-up": "the sharer's model",
    "candidates": "the sharer's model, and a list of likely prompts",
    "decoder": "public prompts with their caches",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class SharedPrompts:
    """What travels for some prompts, and the tokens behind it: the truth.

    Parameters
    ----------
    entries : CacheEntries
    ids : int64 tensor (B, T)
        -1 where an entry is padding.
    prompts : tuple of str
    decoded : int
        How many of the last columns the sharer decoded itself.
    """

    entries: CacheEntries = field(repr=False)
    ids: Tensor = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)
    decoded: int = 0

    def changed(self, change: CacheChange) -> SharedPrompts:
        """Return the same prompts with changed entries."""
        return replace(self, entries=change(self.entries))

    def look_up(self, dictionary: Tensor, *, layer: int = 0) -> list[Recovered]:
        """Read tokens off one layer and compare: those of the prompt, and decoded ones."""
        found, parts = read_tokens(self.entries, dictionary, layer=layer), []
        cut = self.ids.shape[1] - self.decoded
        for name, columns in (("prompt tokens", slice(0, cut)), ("decoded", slice(cut, None))):
            truth = self.ids[:, columns]
            if truth.shape[1]:
                parts.append(_same_tokens(name, found[:, columns], truth))
        return parts


@dataclass(frozen=True, kw_only=True)
class DisclosureRow:
    """What one attacker read from one payload.

    Parameters
    ----------
    attacker : str
        ``"look-up"``, ``"candidates"`` or ``"decoder"``.
    payload : str
    recovered : Recovered
    """

    attacker: str
    payload: str
    recovered: Recovered

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return {"attacker": self.attacker, "payload": self.payload} | asdict(self.recovered)

    def result(self) -> AttackResult:
        """Return the row as the result of an attack, as other attacks have it."""
        r = self.recovered
        return AttackResult(
            attack=f"cache-{self.attacker}",
            mode=self.payload,
            statistic=f"share of {r.secret} read",
            value=r.share,
            baseline=r.chance,
            threshold=r.threshold,
            threshold_reason=f"more than the best constant guess, paired test at {ERROR_RATE:g}",
            interval=(max(0.0, r.share - 1.96 * r.error), min(1.0, r.share + 1.96 * r.error)),
            detail={"prompts": r.counted, "needs": _NEEDS[self.attacker]},
        )


@dataclass(frozen=True, kw_only=True)
class CacheDisclosure:
    """What attackers read from the caches of one sharer, as it would share them.

    Parameters
    ----------
    sharer, receiver : str
        Digests of the models; no receiver where no fuser was given.
    share : dict
        The `ShareSpec`.
    codec : str
    trained_on, attacked : int
        Public prompts that the decoder learned from, and other prompts that were attacked.
    rows : tuple of DisclosureRow

    Privacy
    -------
    Holds rates only. They bound nothing from above: a better attacker reads more.
    """

    sharer: str
    receiver: str
    share: dict[str, Any]
    codec: str
    trained_on: int
    attacked: int
    rows: tuple[DisclosureRow, ...]

    @property
    def worst(self) -> DisclosureRow:
        """The row with the largest gain over chance."""
        return max(self.rows, key=lambda row: row.recovered.share - row.recovered.chance)

    def results(self) -> list[AttackResult]:
        """Return all rows as results of attacks; see `fedinfer_flower.attacks.markdown_table`."""
        return [row.result() for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        return plain | {"rows": [row.to_dict() for row in self.rows]}

    def markdown(self) -> str:
        """Return the rows as a Markdown table."""
        lines = ["| attacker | payload | secret | recovered | chance |", "|---" * 5 + "|"]
        for row in self.rows:
            r = row.recovered
            value = f"{100 * r.share:.0f} ± {196 * r.error:.0f} %"
            mark = "" if r.above_chance else " (no more than chance)"
            cells = [row.attacker, row.payload, r.secret, value + mark, f"{100 * r.chance:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def disclosure_report(
    sharer: LanguageModel,
    examples: Sequence[FuserExample],
    share: ShareSpec,
    fuser: Fuser | None = None,
    codec: str = "int8",
    *,
    attacked: Sequence[FuserExample] | None = None,
    secrets: Secrets = word_secrets,
    steps: int = 300,
    seed: int = 0,
) -> CacheDisclosure:
    """Attack what a sharer would share, before it shares anything.

    Parameters
    ----------
    sharer : LanguageModel
    examples : sequence of FuserExample
        Public, of the kind that will be asked, with documents of the kind that the site has:
        the decoder learns from them. Some thousand show what an attacker with data can do;
        with few the report is too friendly.
    share : ShareSpec
        What would travel.
    fuser : Fuser, optional
        Attack its output too, which is what a receiver gets from a coordinator that hosts it.
        The 4-bit static codec needs its scales.
    codec : str
    attacked : sequence of FuserExample, optional
        Whose prompts are attacked; default a held-out fifth of the examples.
    secrets : callable
        What the attacker wants of an example; default all words.
    steps, seed : int
        Of the decoder's training.

    Returns
    -------
    report : CacheDisclosure

    Raises
    ------
    InvalidValueError
        If there are fewer than 50 examples to learn from or 20 to attack.
    CacheError, UnknownNameError
        If the codec is unknown or lacks its scales, or the fuser is of another model.
    PromptTooLongError

    Privacy
    -------
    Runs at the site, on its model. The report holds rates. An attacker that fails here proves
    nothing: others have more data, larger networks and more time.

    Examples
    --------
    >>> from fedinfer_flower.attacks.cache_secrets import fact_secrets
    >>> from fedinfer_flower.kv.share import ShareSpec
    >>> from fedinfer_flower.refine.examples import FuserExample
    >>> from fedinfer_flower.simulation.facts.checkpoints import load
    >>> from fedinfer_flower.simulation.facts.world import FactWorld
    >>> world = FactWorld()
    >>> stated = world.documents(120, people=world.strangers_seen, statements=1, seed=0)
    >>> examples = [FuserExample(f.question(), f.value, text) for f, text in stated]
    >>> report = disclosure_report(load("qwen3"), examples, ShareSpec(), secrets=fact_secrets,
    ...                            steps=20)
    >>> {row.attacker for row in report.rows} == {"look-up", "candidates", "decoder"}
    True
    """
    from fedinfer_flower.refine.examples import split_examples

    if attacked is None:
        known, targets = split_examples(examples, holdout=_HOLDOUT, seed=seed)
    else:
        known, targets = list(examples), list(attacked)
    if len(known) < _LEAST_TRAINED_ON or len(targets) < _LEAST_ATTACKED:
        raise InvalidValueError(
            f"{len(known)} examples to learn from and {len(targets)} to attack; a report needs"
            f" {_LEAST_TRAINED_ON} and {_LEAST_ATTACKED}",
            hint="give more public examples of the kind that will be asked",
        )
    scales = None if fuser is None else fuser.scales
    change = coded(codec, scales=scales)
    learned, seen = (
        shared_prompts(sharer, part, share).changed(change) for part in (known, targets)
    )
    what = _payload(share, codec)
    rows = [
        DisclosureRow(attacker="look-up", payload=what, recovered=found)
        for found in seen.look_up(token_dictionary(sharer))
    ]
    if not share.full:
        found = _by_candidates(sharer, seen, share)
        rows.append(DisclosureRow(attacker="candidates", payload=what, recovered=found))
    truths = ([secrets(e) for e in known], [secrets(e) for e in targets])
    views = {what: (learned.entries, seen.entries)}
    if fuser is not None and fuser.projects:
        views[f"{what}, after the fuser"] = _projected(fuser, learned), _projected(fuser, seen)
    for name, (public, private) in views.items():
        last = _LAST_OF_FULL if share.full else 0
        decoder = train_decoder(
            cache_features(public, last=last), truths[0], steps=steps, seed=seed
        )
        rows += [
            DisclosureRow(attacker="decoder", payload=name, recovered=found)
            for found in decoder.recovered(cache_features(private, last=last), truths[1])
        ]
    return CacheDisclosure(
        sharer=sharer.layout.model_digest,
        receiver="" if fuser is None else fuser.spec.receiver.model_digest,
        share=share.to_dict(),
        codec=codec,
        trained_on=len(known),
        attacked=len(targets),
        rows=tuple(rows),
    )


def shared_prompts(
    sharer: LanguageModel, examples: Sequence[FuserExample], share: ShareSpec
) -> SharedPrompts:
    """Return what travels for some examples, with the tokens behind it.

    Raises
    ------
    PromptTooLongError
    """
    import torch
    from torch.nn import functional

    from fedinfer_flower.refine.sharer import cut_to, join_entries

    prompts = [sharer.prompts.ask(e.question, documents=e.documents) for e in examples]
    entries, ids = [], []
    for start in range(0, len(prompts), _BATCH_ROWS):
        rows = prompts[start : start + _BATCH_ROWS]
        read = sharer.prefill(rows, decode=share.decode, hidden=share.hidden)
        kept = cut_to(read.entries, share)
        entries.append(kept)
        ids.append(read.tokens.ids[:, -kept.tokens :])
    joined = join_entries(entries)
    padded = torch.cat([functional.pad(x, (joined.tokens - x.shape[1], 0)) for x in ids])
    return SharedPrompts(
        entries=joined,
        ids=torch.where(joined.mask > 0, padded, -1),
        prompts=tuple(prompts),
        decoded=share.decode,
    )


def _by_candidates(sharer: LanguageModel, seen: SharedPrompts, share: ShareSpec) -> Recovered:
    """Find each prompt among all that were attacked."""
    candidates = list(dict.fromkeys(seen.prompts))
    listed = prompt_features(sharer, candidates, share)
    nearest = nearest_prompts(cache_features(seen.entries), listed).tolist()
    found = [
        float(candidates[at] == prompt) for at, prompt in zip(nearest, seen.prompts, strict=True)
    ]
    usual = Counter(seen.prompts).most_common(1)[0][0]
    by_chance = [float(prompt == usual) for prompt in seen.prompts]
    return Recovered.of(f"the prompt, among {len(candidates)}", found, by_chance)


def _projected(fuser: Fuser, shared: SharedPrompts) -> CacheEntries:
    import torch

    with torch.no_grad():
        return fuser.project(shared.entries)


def _same_tokens(name: str, found: Tensor, truth: Tensor) -> Recovered:
    real = truth >= 0
    hits, counts = ((found == truth) & real).sum(1), real.sum(1)
    usual = []
    for column in truth.T:
        there = column[column >= 0].tolist()
        # By place: the end of a prompt is the same in all, and reading it is no success.
        usual.append(Counter(there).most_common(1)[0][0] if there else -2)
    blind = ((truth == truth.new_tensor(usual)) & real).sum(1)
    has = counts > 0
    shares = (hits[has] / counts[has]).tolist(), (blind[has] / counts[has]).tolist()
    return Recovered.of(name, *shares)


def _payload(share: ShareSpec, codec: str) -> str:
    parts = ["full cache" if share.full else f"last {share.last}"]
    parts += [f"{share.decode} decoded"] if share.decode else []
    parts += ["hidden state"] if share.hidden else []
    return f"{' + '.join(parts)}, {codec}"
