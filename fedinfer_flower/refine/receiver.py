"""The receiver's side: its own reading, what others brought, and the answer.

Axes: B prompts, J sharers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedinfer_flower.errors import FuserError, ShapeError
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.past import Past
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel, Prefill
from fedinfer_flower.language.quoting import abstains

__all__ = ["Receiver"]


class Receiver:
    """A model that answers, with or without what sharers sent.

    Parameters
    ----------
    model : LanguageModel

    Privacy
    -------
    Nothing leaves this object but answers. What sharers sent is data: entries are numbers
    that attention may weigh, notes are quoted by the prompt format.

    Examples
    --------
    >>> from fedinfer_flower.simulation.facts.families import FAMILIES, build
    >>> from fedinfer_flower.simulation.facts.prompts import FactPrompts
    >>> from fedinfer_flower.simulation.facts.world import FactWorld
    >>> world = FactWorld()
    >>> model = LanguageModel(*build(FAMILIES[0], world), prompts=FactPrompts(world.words))
    >>> receiver = Receiver(model)
    >>> own = receiver.own([world.facts(world.private[0])[0].question()])
    >>> receiver.answer(own) == receiver.answer(receiver.fuse(own, []))
    True
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def own(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]] | None = None
    ) -> Prefill:
        """Read the questions alone, each behind the receiver's own documents if it has any.

        Raises
        ------
        PromptTooLongError
        """
        own = documents or [()] * len(questions)
        prompts = [
            self.model.prompts.ask(question, documents=read)
            for question, read in zip(questions, own, strict=True)
        ]
        return self.model.prefill(prompts)

    def fuse(
        self,
        prefill: Prefill,
        parts: Sequence[tuple[Fuser, CacheEntries]],
        gates: Tensor | None = None,
        *,
        alignments: Sequence[Tensor | None] | None = None,
    ) -> Past:
        """Add what sharers sent to the receiver's own reading (FedRefine, equation 4).

        Parameters
        ----------
        prefill : Prefill
            What `own` returned.
        parts : sequence of (Fuser, CacheEntries)
            One per sharer, in the order of the columns of `gates`.
        gates : tensor (B, J), optional
            1 where a sharer is used, 0 where it is not; default all. A row of zeros is the
            receiver alone.
        alignments : sequence of int64 tensor (B, T_own) or None, optional
            For fusers that need it: column of the sharer's entries for each own column.

        Raises
        ------
        CacheError
            If entries are another model's or not finite.
        FuserError
            If a fuser is for another receiver, or needs an alignment that is not there.
        ShapeError
            If the numbers of sharers or of questions do not fit.
        """
        if gates is not None and tuple(gates.shape) != (prefill.entries.rows, len(parts)):
            raise ShapeError("gates of another shape than questions x sharers")
        if alignments is not None and len(alignments) != len(parts):
            raise ShapeError("not one alignment a sharer")
        clean = past = prefill.past()
        for j, (fuser, entries) in enumerate(parts):
            alignment = None if alignments is None else alignments[j]
            self._require(fuser, entries, alignment, rows=prefill.entries.rows)
            past = fuser.extend(
                past,
                entries,
                gate=None if gates is None else gates[:, j],
                # Entries of past tokens only: the last one is read after fusing.
                alignment=None if alignment is None else alignment[:, :-1],
                clean=clean,
            )
        return past

    def answer(self, state: Prefill | Past, decoding: Decoding | None = None) -> list[str]:
        """Decode answers.

        Parameters
        ----------
        state : Prefill or Past
            From `own` or `fuse`.
        decoding : Decoding, optional
            Default greedy, 32 tokens. Without stop texts those of the prompt format apply.

        Raises
        ------
        PromptTooLongError
        """
        past = state.past() if isinstance(state, Prefill) else state
        return self.model.decode_on(past, self._ending(decoding or Decoding()))

    def answer_with_notes(
        self,
        questions: Sequence[str],
        notes: Sequence[Sequence[str]],
        decoding: Decoding | None = None,
    ) -> list[str]:
        """Answer with what others wrote quoted in the prompt; abstentions are not quoted.

        Parameters
        ----------
        questions : sequence of str
        notes : sequence of sequence of str
            For each question, one note a sharer.
        decoding : Decoding, optional

        Raises
        ------
        PromptTooLongError
        ShapeError
            If there is not one list of notes a question.
        """
        if len(questions) != len(notes):
            raise ShapeError("not one list of notes a question")
        prompts = self.model.prompts
        asked = []
        for question, written in zip(questions, notes, strict=True):
            kept = [note for note in written if not abstains(note, prompts.abstentions)]
            asked.append(prompts.ask_with_notes(question, kept) if kept else prompts.ask(question))
        return self.model.generate(asked, self._ending(decoding or Decoding()))

    def _ending(self, decoding: Decoding) -> Decoding:
        return decoding if decoding.stop else replace(decoding, stop=tuple(self.model.prompts.stop))

    def _require(
        self, fuser: Fuser, entries: CacheEntries, alignment: Tensor | None, *, rows: int
    ) -> None:
        if fuser.spec.receiver.model_digest != self.model.layout.model_digest:
            raise FuserError(
                "a fuser that was made for another receiver",
                hint="a fuser belongs to one revision of both models: train it again, or use text",
            )
        if entries.rows != rows:
            raise ShapeError("entries of another number of questions")
        entries.require_finite()
        if fuser.needs_alignment and alignment is None:
            raise FuserError(
                f"a fuser of kind {fuser.spec.kind!r} needs to know which tokens belong together",
                hint="give alignments, or use a fuser of the last token",
            )
