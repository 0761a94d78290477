"""What a sharer learns of a question from its rewrite, and two sharers from two rewrites.

The attacker has the rephraser, which is public, and a list of what may have been asked. It
runs the rephraser on every candidate and compares: a rewrite that only one candidate gives
is that candidate. Where none gives it, words are compared, rare ones counting more.

References
----------
.. [1] Salton and Buckley, Term-weighting approaches in automatic text retrieval, 1988 (words
   weighted by how rare they are, cosine).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedinfer_flower.attacks.base import AttackResult
from fedinfer_flower.attacks.cache_decoder import Recovered
from fedinfer_flower.attacks.measures import ERROR_RATE
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    from fedinfer_flower.language.rephrase import Rephraser

__all__ = [
    "RephraseDisclosure",
    "RephraseRow",
    "link_rewrites",
    "rank_originals",
    "rephrase_report",
    "word_similarity",
]

_WORD: Final = re.compile(r"\w+")
_SAME: Final = 2.0
"""Score of a candidate whose own rewrite is the one observed; similarities end at 1."""


@dataclass(frozen=True, kw_only=True)
class RephraseRow:
    """What one attack on rewrites achieved.

    Parameters
    ----------
    attack : str
        ``"question"``: which of the candidates was asked. ``"wording"``: in which of several
        wordings the user put it. ``"link"``: which rewrites at two sharers are of one question.
        ``"names"``, ``"words"``, ``"pairs"``, ``"triples"``, ``"fours"``: what is still there.
    styles : tuple of int
        One of the rewrites that were seen, or two.
    recovered : Recovered
    """

    attack: str
    styles: tuple[int, ...]
    recovered: Recovered


@dataclass(frozen=True, kw_only=True)
class RephraseDisclosure:
    """What rewriting hides, and what it does not.

    Parameters
    ----------
    rephraser : str
    questions, candidates : int
    rewritten : float
        Share of the questions that were changed at all, over all styles.
    rows : tuple of RephraseRow

    Privacy
    -------
    Holds rates only. Words that survive are counted, not secrets that are kept.
    """

    rephraser: str
    questions: int
    candidates: int
    rewritten: float
    rows: tuple[RephraseRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def results(self) -> list[AttackResult]:
        """Return attacks as other attacks have them; see `attacks.markdown_table`."""
        return [
            AttackResult(
                attack=f"rephrase-{row.attack}",
                mode=f"{self.rephraser}, styles {', '.join(map(str, row.styles))}",
                statistic=f"share of {row.recovered.secret}",
                value=row.recovered.share,
                baseline=row.recovered.chance,
                threshold=row.recovered.threshold,
                threshold_reason=f"a guess among equals, paired test at {ERROR_RATE:g}",
            )
            for row in self.rows
        ]

    def markdown(self) -> str:
        """Return the rows as a Markdown table."""
        lines = ["| attack | styles | what | value | chance |", "|---" * 5 + "|"]
        for row in self.rows:
            r, styles = row.recovered, ", ".join(map(str, row.styles))
            cells = [
                row.attack,
                styles,
                r.secret,
                f"{100 * r.share:.0f} %",
                f"{100 * r.chance:.1f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def word_similarity(
    texts: Sequence[str], others: Sequence[str], *, corpus: Iterable[str] = ()
) -> Array:
    """Return how alike texts are by their words, in [0, 1]: shape (n texts, m others).

    Parameters
    ----------
    texts, others : sequence of str
    corpus : iterable of str
        Where rarity is counted, beside `texts` and `others`.

    Examples
    --------
    >>> word_similarity(["where is ann"], ["ann , where ?", "who is ben"]).round(1).tolist()
    [[0.8, 0.2]]
    """
    left, right = ([Counter(_words(text)) for text in part] for part in (texts, others))
    counted = [*left, *right, *(Counter(_words(text)) for text in corpus)]
    known = Counter(word for one in counted for word in one)
    place = {word: at for at, word in enumerate(known)}
    rarity = np.array([math.log(1.0 + len(counted) / n) for n in known.values()])

    def table(rows: list[Counter[str]]) -> Array:
        out = np.zeros((len(rows), len(place)))
        for at, row in enumerate(rows):
            for word, n in row.items():
                out[at, place[word]] = n * rarity[place[word]]
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return np.asarray(out / np.maximum(norms, 1e-12))

    return np.asarray(np.clip(table(left) @ table(right).T, 0.0, 1.0))


def rank_originals(
    rewrites: Sequence[str],
    candidates: Sequence[str],
    *,
    rewrite: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> Array:
    """Score which candidate each rewrite was made from.

    Parameters
    ----------
    rewrites : sequence of str
        As a sharer reads them.
    candidates : sequence of str
        Possible originals.
    rewrite : callable, optional
        The rephraser in the style that was used, if the attacker has it.

    Returns
    -------
    scores : float array of shape (n rewrites, n candidates)
        2 where the candidate's own rewrite is the one observed, else at most 1.

    Raises
    ------
    InvalidValueError
        If there are no rewrites or no candidates.

    Examples
    --------
    >>> from fedinfer_flower.language.rephrasers.template import TemplateRephraser
    >>> asked = ["Who wrote Emma?", "Who wrote Ulysses?"]
    >>> seen = TemplateRephraser(None).rephrase(asked, style=1)
    >>> rank_originals(seen, asked).argmax(axis=1).tolist()
    [0, 1]
    """
    if not rewrites or not candidates:
        raise InvalidValueError("originals are ranked for one rewrite and one candidate at least")
    scores = word_similarity(rewrites, candidates)
    if rewrite is not None:
        own = rewrite(candidates)
        same = np.array([[a == b for b in own] for a in rewrites])
        scores = np.where(same, _SAME, scores)
    return np.asarray(scores)


def link_rewrites(first: Sequence[str], second: Sequence[str]) -> Array:
    """Score which rewrites at one sharer are of the same question as which at another.

    Returns
    -------
    scores : float array of shape (n first, n second)

    Examples
    --------
    >>> link_rewrites(["Which person wrote Emma?", "Is 7 prime?"],
    ...     ["Tell me: is 7 prime?", "Name the one who wrote Emma."]).argmax(axis=1).tolist()
    [1, 0]
    """
    if not first or not second:
        raise InvalidValueError("rewrites of two sharers are linked, one each at least")
    return word_similarity(first, second)


def rephrase_report(
    rephraser: Rephraser,
    questions: Sequence[str],
    candidates: Sequence[str],
    *,
    wordings: Sequence[Sequence[str]] = (),
    styles: Sequence[int] = (1, 2),
    entities: Callable[[str], Iterable[str]] | None = None,
) -> RephraseDisclosure:
    """Attack a rephraser with questions of one's own.

    Parameters
    ----------
    rephraser : Rephraser
    questions : sequence of str
        As users ask them.
    candidates : sequence of str
        What the attacker thinks may have been asked, in words of its own: questions that
        differ in meaning. The meaning of ``questions[i]`` is ``candidates[i]``; more may
        follow.
    wordings : sequence of sequences of str, optional
        For each question, ways in which users put it, itself among them: can the attacker
        tell which?
    styles : sequence of int
        Those of the sharers.
    entities : callable, optional
        From a question to its names; default those with capitals and numbers.

    Returns
    -------
    report : RephraseDisclosure

    Raises
    ------
    InvalidValueError
        If there are fewer than two questions or styles, or lists do not fit.

    Privacy
    -------
    Give questions that may be read: they are held in memory only, and the report has none.

    Examples
    --------
    >>> from fedinfer_flower.language.rephrasers.template import TemplateRephraser
    >>> asked = ["Who wrote Emma?", "Who wrote Ulysses?", "When was Ada born?"]
    >>> report = rephrase_report(TemplateRephraser(None), asked, asked)
    >>> {row.recovered.share for row in report.rows if row.attack in ("question", "link")}
    {1.0}
    """
    if len(questions) < 2 or len(candidates) < len(questions) or len(set(styles)) < 2:
        raise InvalidValueError("a report needs two questions, a candidate each, and two styles")
    if wordings and len(wordings) != len(questions):
        raise InvalidValueError("wordings are given for every question, or not at all")
    seen = {style: list(rephraser.rephrase(questions, style=style)) for style in styles}
    rows = []
    for style, texts in seen.items():
        rows += _kept(questions, texts, style, entities)
        scores = rank_originals(texts, candidates)
        name = f"questions found among {len(candidates)}"
        rows.append(_row("question", (style,), _hits(name, scores)))
        if wordings:
            rows.append(
                _row("wording", (style,), _wording(rephraser, texts, wordings, questions, style))
            )
    for a, b in itertools.combinations(seen, 2):
        scores = link_rewrites(seen[a], seen[b])
        rows.append(_row("link", (a, b), _hits(f"pairs linked among {len(questions)}", scores)))
    changed = [
        text != q for texts in seen.values() for text, q in zip(texts, questions, strict=True)
    ]
    return RephraseDisclosure(
        rephraser=rephraser.name,
        questions=len(questions),
        candidates=len(candidates),
        rewritten=sum(changed) / len(changed),
        rows=tuple(rows),
    )


def _row(attack: str, styles: tuple[int, ...], recovered: Recovered) -> RephraseRow:
    return RephraseRow(attack=attack, styles=styles, recovered=recovered)


def _kept(
    questions: Sequence[str],
    texts: Sequence[str],
    style: int,
    entities: Callable[[str], Iterable[str]] | None,
) -> list[RephraseRow]:
    """Count what is still there: no attack is needed to read it."""
    from fedinfer_flower.language.overlap import overlap

    measured = [
        overlap(q, text, entities=None if entities is None else entities(q))
        for q, text in zip(questions, texts, strict=True)
    ]
    blind = [0.0] * len(measured)
    shares = {"names": [one.entities for one in measured]}
    for at, name in enumerate(("words", "pairs", "triples", "fours")):
        shares[name] = [one.ngrams[at] for one in measured]
    return [
        _row(name, (style,), Recovered.of(f"{name} still there", found, blind))
        for name, found in shares.items()
    ]


def _hits(name: str, scores: Array) -> Recovered:
    """Return how often row i has its best score at place i; ties are guessed among."""
    found = [_chance_of(row, at) for at, row in enumerate(scores)]
    return Recovered.of(name, found, [1.0 / scores.shape[1]] * len(found))


def _wording(
    rephraser: Rephraser,
    texts: Sequence[str],
    wordings: Sequence[Sequence[str]],
    questions: Sequence[str],
    style: int,
) -> Recovered:
    """Guess in which words a user put a question whose meaning is known."""
    found, by_chance = [], []
    for text, ways, question in zip(texts, wordings, questions, strict=True):
        listed = list(dict.fromkeys(ways))
        if question not in listed:
            raise InvalidValueError("a question that is not among its own wordings")
        scores = rank_originals(
            [text], listed, rewrite=lambda q: rephraser.rephrase(q, style=style)
        )
        # If several candidates give this rewrite, all of them are as likely as before.
        found.append(_chance_of(scores[0], listed.index(question)))
        by_chance.append(1.0 / len(listed))
    return Recovered.of("wordings told", found, by_chance)


def _chance_of(scores: Array, right: int) -> float:
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return 1.0 / len(best) if right in best else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
