"""Put what sharers gave into the receiver's state: notes into the prompt, entries into the past.

A part that cannot be put in is dropped; the state without it is the receiver's own.

Axes: B questions, J sharers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.containment import contained
from fedinfer_flower.clients.language_state import Desk
from fedinfer_flower.clients.refine_parts import CachePart, Parts
from fedinfer_flower.clients.refine_rephrasing import Kept
from fedinfer_flower.errors import (
    CacheError,
    FedInferError,
    ModelAnswerError,
    ModelError,
    PromptTooLongError,
    ProtocolError,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fedinfer_flower.kv.past import Past
    from fedinfer_flower.language.model import Prefill

__all__ = ["fuse_parts"]

Used = dict[str, npt.NDArray[np.uint8]]
_SEE_LOG: Final = "see the site's own log"


def fuse_parts(kept: Kept, parts: Parts, desk: Desk) -> tuple[Past, Used]:
    """Return what to decode on, and for which questions each sharer is in it.

    Parameters
    ----------
    kept : Kept
    parts : Parts
        Sharers whose part turns out to be of no use are added to `dropped`.
    desk : Desk

    Returns
    -------
    past : Past
    used : dict of key id to uint8 array (B,)
    """
    import torch

    with torch.no_grad():
        prefill, prompts, used = _with_notes(kept, parts, desk)
        gates = _gates(parts.caches, kept, desk)
        past = prefill.past()
        for j, part in enumerate(parts.caches):
            try:
                with contained(ModelAnswerError, "a part failed", hint=_SEE_LOG, pass_typed=True):
                    aligned = _alignment(part, kept, prefill, prompts)
                    past = _extended(past, part, gates[:, j], prefill.past(), aligned)
            except FedInferError as exc:
                parts.dropped[part.sharer] = exc.code
                continue
            used[part.sharer] = gates[:, j].numpy().astype(np.uint8)
    return past, used


def _with_notes(kept: Kept, parts: Parts, desk: Desk) -> tuple[Prefill, list[str], Used]:
    """Read the questions with the notes quoted; as they are, if there are none or no room."""
    from fedinfer_flower.language.quoting import abstains
    from fedinfer_flower.refine.sharer import prefill_all

    model, questions = desk.state.model, kept.asked.questions
    formats = model.prompts
    given = kept.documents
    alone = [formats.ask(q, documents=d) for q, d in zip(questions, given, strict=True)]
    texts = list(parts.texts)
    room = min(desk.policy.max_new_tokens, model.layout.window // 4)
    while texts:
        used = {
            part.sharer: np.array(
                [not abstains(note, formats.abstentions) for note in part.notes], np.uint8
            )
            for part in texts
        }
        prompts = []
        for row, question in enumerate(questions):
            notes = [part.notes[row] for part in texts if used[part.sharer][row]]
            quoting = formats.ask_with_notes(question, notes, documents=given[row])
            prompts.append(quoting if notes else alone[row])
        try:
            model.tokens(prompts, room=room)
            return prefill_all(model, prompts), prompts, used
        except PromptTooLongError as exc:
            # Whoever writes the most loses its place, not those who were brief.
            longest = max(texts, key=lambda part: max(map(len, part.notes)))
            parts.dropped[longest.sharer] = exc.code
            texts.remove(longest)
    return kept.own, alone, {}


def _gates(caches: list[CachePart], kept: Kept, desk: Desk) -> Tensor:
    """Return which parts to use for which questions: float (B, J) of 0 and 1."""
    import torch

    rows, gate = len(kept.asked.questions), desk.state.gate
    chosen = torch.ones(rows, len(caches))
    for j, part in enumerate(caches):
        if part.gate is not None:
            chosen[:, j] = torch.from_numpy(part.gate.astype(np.float32))
    here = [j for j, part in enumerate(caches) if part.fuser is not None]
    if gate is None or not here:
        return chosen
    none = np.zeros((rows, 4), np.float32)
    shown = [caches[j].evidence for j in here]
    evidence = np.stack([none if e is None else e for e in shown], 1)
    available = torch.tensor([[float(e is not None) for e in shown]]).expand(rows, -1)
    try:
        picked = gate.choose(kept.own.evidence, torch.from_numpy(evidence), available)
    except (ProtocolError, ModelError):
        picked = torch.zeros(rows, len(here))  # its own evidence is of no use: answer alone
    for column, j in enumerate(here):
        chosen[:, j] = picked[:, column]
    return chosen


def _extended(
    past: Past, part: CachePart, gate: Tensor, clean: Past, alignment: Tensor | None
) -> Past:
    """Return the past with one part in it; every number of it is finite."""
    import torch

    if part.fuser is not None:
        more = part.fuser.extend(past, part.entries, gate=gate, alignment=alignment, clean=clean)
    else:
        mask = part.entries.mask * gate[:, None].to(part.entries.mask.dtype)
        shown, zero = mask[:, None, :, None] > 0, torch.zeros(())
        more = past.with_prefix(
            tuple(torch.where(shown, k, zero) for k in part.entries.keys),
            tuple(torch.where(shown, v, zero) for v in part.entries.values),
            mask,
            part.entries.positions,
        )
    if not all(bool(torch.isfinite(x).all()) for x in (*more.keys, *more.values)):
        raise CacheError("a fused state with numbers that are not finite")
    return more


def _alignment(part: CachePart, kept: Kept, prefill: Prefill, prompts: list[str]) -> Tensor | None:
    """Return which of the sharer's columns belongs to each own entry; (B, T - 1)."""
    if part.fuser is None or not part.fuser.needs_alignment:
        return None
    from fedinfer_flower.kv.align import alignment_tensor
    from fedinfer_flower.refine.sharer import find_sections

    here = find_sections(prompts, kept.asked.questions)
    rows = len(prompts)
    if (len(part.spans), len(here)) != (rows, rows):
        raise CacheError("a cache without what its tokens are aligned by")
    counts = part.entries.mask.sum(1).tolist()
    if any(len(row) > count for row, count in zip(part.spans, counts, strict=True)):
        raise CacheError("a cache with spans of more tokens than it has")
    theirs = SimpleNamespace(mask=part.entries.mask, spans=[list(row) for row in part.spans])
    whole = alignment_tensor(
        theirs,
        prefill.tokens,
        sharer_sections=[[section] for section in part.sections],
        receiver_sections=[[section] for section in here],
    )
    return whole[:, :-1]  # the last token is read after fusing
