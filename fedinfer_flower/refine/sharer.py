"""The sharer's side: what a model that helps hands over, as a cache or as text.

Axes: B prompts, T tokens, N tokens not yet read, R tokens that travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedinfer_flower.errors import CacheError, InvalidValueError
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.rotary import rotary_tables, unrotate
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.confidence import evidence
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel, Prefill, Tokens

__all__ = [
    "Shared",
    "Sharer",
    "continue_all",
    "cut_to",
    "find_sections",
    "join_entries",
    "prefill_all",
    "share_prompts",
]

Documents = Callable[[str], Sequence[str]]
_BATCH_ROWS = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Shared:
    """What a sharer hands over for a batch of questions.

    Parameters
    ----------
    entries : CacheEntries
        Cut to what the `ShareSpec` lets travel.
    evidence : float32 tensor (B, 4)
        How sure the sharer was; see `fedinfer_flower.language.confidence`.
    tokens : Tokens, optional
        Of the whole prompts, when the whole prompts travel: for fusers that align tokens.
    sections : list of (int, int)
        Characters of the prompt that are the question, where it stands there unchanged.
    """

    entries: CacheEntries
    evidence: Tensor = field(repr=False)
    tokens: Tokens | None = field(repr=False, default=None)
    sections: list[tuple[int, int]] = field(repr=False, default_factory=list)


class Sharer:
    """A model that helps others to answer, with documents that stay where they are.

    Parameters
    ----------
    model : LanguageModel
    documents : callable, optional
        Return the site's own documents that bear on a question.

    Privacy
    -------
    The receiver can learn more from a cache than the answer. From a full cache all tokens of
    the prompt, documents included, can be read off layer 0 (a dictionary suffices, even
    after quantisation or noise); the last token's entries give away the answer, and often a
    value of the documents that nobody asked for. Text shows what it says. Whether any of it
    may leave is the site's policy, not decided here.

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.families import FAMILIES, build
    >>> from fedinfer_flower.simulation.facts.prompts import FactPrompts
    >>> from fedinfer_flower.simulation.facts.world import FactWorld
    >>> world = FactWorld()
    >>> model = LanguageModel(*build(FAMILIES[0], world), prompts=FactPrompts(world.words))
    >>> question = world.facts(world.private[0])[0].question()
    >>> Sharer(model).share([question], ShareSpec(last=1, decode=1)).entries.tokens
    2
    """

    def __init__(self, model: LanguageModel, *, documents: Documents | None = None) -> None:
        self.model = model
        self._documents: Documents = documents or _no_documents

    def share(
        self,
        questions: Sequence[str],
        spec: ShareSpec,
        *,
        on: Past | Sequence[Past] | None = None,
    ) -> Shared:
        """Compute the cache entries that the spec asks for.

        Parameters
        ----------
        questions : sequence of str
        spec : ShareSpec
        on : Past, or sequence of Past, optional
            The state after this model fused what others sent (iterated refinement): the
            entries are computed on it, and the questions' prompts are not read again. Several
            pasts are batches whose rows are the questions, in their order.

        Raises
        ------
        PromptTooLongError
            If a prompt does not fit into the window.
        CacheError
            If `on` has other rows than there are questions, or fewer tokens than the spec.
        """
        if on is not None:
            pasts = [on] if isinstance(on, Past) else list(on)
            return self._share_on(pasts, spec, rows=len(questions))
        prompts = [self.model.prompts.ask(q, documents=self._documents(q)) for q in questions]
        return share_prompts(self.model, prompts, spec, questions=questions)

    def help(self, questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Write a statement for each question, as text.

        Raises
        ------
        PromptTooLongError
        """
        prompts = [self.model.prompts.help(q, documents=self._documents(q)) for q in questions]
        return continue_all(self.model, prompts, max_new_tokens)

    def _share_on(self, pasts: Sequence[Past], spec: ShareSpec, *, rows: int) -> Shared:
        if sum(len(past.ids) for past in pasts) != rows:
            raise CacheError("the fused states have other rows than there are questions")
        parts = [_read_on(self.model, past, spec) for past in pasts]
        return Shared(
            entries=join_entries([entries for entries, _ in parts]),
            evidence=torch.cat([shown for _, shown in parts]),
        )


def _no_documents(question: str) -> Sequence[str]:  # noqa: ARG001
    return ()


def share_prompts(
    model: LanguageModel,
    prompts: Sequence[str],
    spec: ShareSpec,
    *,
    questions: Sequence[str] = (),
) -> Shared:
    """Read any number of prompts, in batches, and cut their entries to the spec."""
    reads = []
    for start in range(0, len(prompts), _BATCH_ROWS):
        rows = prompts[start : start + _BATCH_ROWS]
        read = model.prefill(rows, decode=spec.decode, hidden=spec.hidden)
        # Cut before joining: the rest of a batch is freed at once.
        reads.append(replace(read, entries=cut_to(read.entries, spec)))
    entries = join_entries([read.entries for read in reads])
    return Shared(
        entries=entries,
        evidence=torch.cat([read.evidence for read in reads]),
        tokens=_join_tokens(reads, entries, model) if spec.full else None,
        sections=find_sections(prompts, questions),
    )


def find_sections(prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each text stands last in its prompt; empty if one does not."""
    begins = [p.rfind(text) for p, text in zip(prompts, texts, strict=False)]
    if not begins or min(begins) < 0:
        return []
    return [(at, at + len(text)) for at, text in zip(begins, texts, strict=True)]


def cut_to(entries: CacheEntries, spec: ShareSpec) -> CacheEntries:
    """Keep the entries that travel under the spec."""
    kept = entries if spec.full else entries.cut(-(spec.last + spec.decode))
    return kept if spec.hidden else kept.without_hidden()


def join_entries(parts: Sequence[CacheEntries]) -> CacheEntries:
    """Stack batches of one model, padded on the left to the longest.

    Raises
    ------
    InvalidValueError
        If there is no part.
    """
    if not parts:
        raise InvalidValueError("no prompts to read")
    longest = max(part.tokens for part in parts)
    padded = [_pad(part, longest - part.tokens) for part in parts]
    first = padded[0]
    layers = range(first.layout.layers)
    return replace(
        first,
        keys=tuple(torch.cat([p.keys[i] for p in padded]) for i in layers),
        values=tuple(torch.cat([p.values[i] for p in padded]) for i in layers),
        mask=torch.cat([p.mask for p in padded]),
        hidden=None
        if first.hidden is None
        else torch.cat([p.hidden for p in padded if p.hidden is not None]),
    )


def prefill_all(model: LanguageModel, prompts: Sequence[str]) -> Prefill:
    """Read any number of prompts, in batches, into one padded `Prefill`."""
    parts = [
        model.prefill(prompts[start : start + _BATCH_ROWS])
        for start in range(0, len(prompts), _BATCH_ROWS)
    ]
    entries = join_entries([part.entries for part in parts])
    shown = torch.cat([part.evidence for part in parts])
    return Prefill(tokens=_join_tokens(parts, entries, model), entries=entries, evidence=shown)


def continue_all(model: LanguageModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Continue any number of prompts greedily, up to the format's stop texts."""
    settings = Decoding(max_new_tokens=max_new_tokens, stop=tuple(model.prompts.stop))
    out: list[str] = []
    for start in range(0, len(prompts), _BATCH_ROWS):
        out += model.generate(prompts[start : start + _BATCH_ROWS], settings)
    return out


def _join_tokens(parts: Sequence[Prefill], entries: CacheEntries, model: LanguageModel) -> Tokens:
    pad = int(model.tokenizer.pad_token_id)
    widths = [entries.tokens - part.tokens.ids.shape[1] for part in parts]
    ids = [
        functional.pad(part.tokens.ids, (width, 0), value=pad)
        for part, width in zip(parts, widths, strict=True)
    ]
    spans = [span for part in parts for span in part.tokens.spans]
    return Tokens(ids=torch.cat(ids), mask=entries.mask, spans=spans)


def _pad(entries: CacheEntries, columns: int) -> CacheEntries:
    if columns == 0:
        return entries
    more = (0, 0, columns, 0)
    return replace(
        entries,
        keys=tuple(functional.pad(k, more) for k in entries.keys),
        values=tuple(functional.pad(v, more) for v in entries.values),
        mask=functional.pad(entries.mask, (columns, 0)),
        hidden=None if entries.hidden is None else functional.pad(entries.hidden, more),
    )


@torch.no_grad()
def _read_on(model: LanguageModel, past: Past, spec: ShareSpec) -> tuple[CacheEntries, Tensor]:
    """Read what a past has left unread, decode on top, and export all but the prefix."""
    n_old, n_new = past.mask.shape[1], past.ids.shape[1]
    own = n_old - past.own_from + n_new
    if spec.hidden and (spec.full or spec.last > n_new):
        raise CacheError(
            "a fused state has the hidden state of its unread tokens only",
            hint="share the last token, or no hidden state, in later rounds",
        )
    if not spec.full and spec.last > own:
        raise CacheError("a fused state with fewer tokens than are to travel")
    mask = torch.cat([past.mask, torch.ones_like(past.ids)], 1)
    at, every = past.ids_positions, torch.cat([past.positions, past.ids_positions], 1)
    out: Any = model._forward(past.ids, mask, at, past=model._import(past), hidden=spec.hidden)
    first = out.logits[:, -1]
    states = [out.hidden_states[-1]] if spec.hidden else []
    for _ in range(spec.decode):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        at, mask = at[:, -1:] + 1, torch.cat([mask, torch.ones_like(token)], 1)
        every = torch.cat([every, at], 1)
        out = model._forward(token, mask, at, past=out.past_key_values, hidden=spec.hidden)
        states += [out.hidden_states[-1]] if spec.hidden else []
    columns = own + spec.decode if spec.full else spec.last + spec.decode
    cos, sin = rotary_tables(model.model, every)
    layers = out.past_key_values.layers
    entries = CacheEntries(
        keys=tuple(unrotate(layer.keys, cos, sin)[:, :, -columns:] for layer in layers),
        values=tuple(layer.values[:, :, -columns:] for layer in layers),
        mask=mask[:, -columns:],
        layout=model.layout,
        hidden=torch.cat(states, 1)[:, -columns:] if spec.hidden else None,
    )
    return entries, evidence(first, model.abstention_ids)
