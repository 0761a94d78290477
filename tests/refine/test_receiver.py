"""A receiver alone, with sharers, and with notes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedinfer_flower.errors import CacheError, FuserError, ShapeError
from fedinfer_flower.kv.fuser import Fuser, FuserSpec, make_fuser
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.pair_data import prepare_pair
from fedinfer_flower.refine.receiver import Receiver
from fedinfer_flower.refine.sharer import Sharer

SHORT = Decoding(max_new_tokens=4)
# Masked entries and longer caches change the order of float32 sums.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def loud(fuser: Fuser) -> Fuser:
    """Make an untrained fuser change answers: its weights are near zero at first."""
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return fuser.eval()


@pytest.fixture
def parts(models: list[LanguageModel], questions: list[str]) -> list[tuple]:
    """Fusers from models 1 and 2 to model 0, with what these share."""
    out = []
    for sharer in models[1:]:
        spec = FuserSpec.for_pair("last-token", sharer.layout, models[0].layout, width=8)
        shared = Sharer(sharer).share(questions, spec.share)
        out.append((loud(make_fuser(spec)), shared.entries))
    return out


@pytest.fixture
def questions(examples: list[FuserExample]) -> list[str]:
    return [e.question for e in examples[:4]]


def test_row_without_open_gates_is_the_receiver_alone(
    models: list[LanguageModel], questions: list[str], parts: list
) -> None:
    receiver = Receiver(models[0])
    own = receiver.own(questions)
    gates = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])

    gated = models[0].logits_on(receiver.fuse(own, parts, gates))
    alone = models[0].logits_on(own.past())

    torch.testing.assert_close(gated[0], alone[0], **CLOSE)
    for row in (1, 2, 3):
        assert not torch.allclose(gated[row], alone[row], atol=1e-2)


def test_closed_gate_equals_a_sharer_that_is_not_there(
    models: list[LanguageModel], questions: list[str], parts: list
) -> None:
    receiver = Receiver(models[0])
    own = receiver.own(questions)
    gates = torch.tensor([[1, 0]] * 4)

    both = models[0].logits_on(receiver.fuse(own, parts, gates))
    one = models[0].logits_on(receiver.fuse(own, parts[:1]))

    torch.testing.assert_close(both, one, **CLOSE)


def test_order_of_sharers_does_not_matter_when_they_concatenate(
    models: list[LanguageModel], questions: list[str], parts: list
) -> None:
    receiver = Receiver(models[0])
    own = receiver.own(questions)

    there = models[0].logits_on(receiver.fuse(own, parts))
    back = models[0].logits_on(receiver.fuse(own, parts[::-1]))

    torch.testing.assert_close(there, back, **CLOSE)


def test_answer_of_prefill_and_of_its_past_agree_and_end_at_the_stop(
    models: list[LanguageModel], questions: list[str]
) -> None:
    receiver = Receiver(models[0])
    own = receiver.own(questions)

    assert receiver.answer(own, SHORT) == receiver.answer(receiver.fuse(own, []), SHORT)
    assert not any(" ." in text for text in receiver.answer(own))


def test_aligned_fuser_takes_the_alignment_of_all_prompt_tokens(
    models: list[LanguageModel], examples: list[FuserExample], questions: list[str]
) -> None:
    spec = FuserSpec.for_pair("fuse", models[1].layout, models[0].layout, width=8)
    fuser = loud(make_fuser(spec))
    data = prepare_pair(models[0], models[1], examples[:4], spec.share, aligned=True)
    receiver = Receiver(models[0])

    past = receiver.fuse(
        receiver.own(questions), [(fuser, data.shared)], alignments=[data.alignment]
    )

    torch.testing.assert_close(
        models[0].logits_on(past), models[0].logits_on(data.fused(fuser)), **CLOSE
    )
    with pytest.raises(FuserError, match="which tokens belong together"):
        receiver.fuse(receiver.own(questions), [(fuser, data.shared)])


def test_parts_that_do_not_fit_are_refused(
    models: list[LanguageModel], questions: list[str], parts: list
) -> None:
    receiver = Receiver(models[0])
    own = receiver.own(questions)
    (fuser, entries), (_, foreign) = parts

    with pytest.raises(CacheError, match="expected"):
        receiver.fuse(own, [(fuser, foreign)])
    with pytest.raises(FuserError, match="another receiver"):
        Receiver(models[2]).fuse(Receiver(models[2]).own(questions), [(fuser, entries)])
    with pytest.raises(ShapeError, match="another number of questions"):
        receiver.fuse(own, [(fuser, entries.select([0]))])
    with pytest.raises(ShapeError, match="gates"):
        receiver.fuse(own, parts, torch.ones(4, 1))
    with pytest.raises(ShapeError, match="alignment"):
        receiver.fuse(own, parts, alignments=[None])
    entries.values[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(CacheError, match="not finite"):
        receiver.fuse(own, [(fuser, entries)])


class Recorder:
    """A model that keeps the prompts it is given."""

    def __init__(self, model: LanguageModel) -> None:
        self.prompts, self.asked = model.prompts, []

    def generate(self, prompts: Sequence[str], settings: Decoding) -> list[str]:
        self.asked += prompts
        return [""] * len(prompts)


def test_notes_are_quoted_and_abstentions_are_not(models: list[LanguageModel]) -> None:
    recorder = Recorder(models[0])
    first, last = "city of", models[0].prompts
    question = "Q city of someone here ?"
    relation = next(iter(last._words - {"city", "of", "is"}))

    Receiver(recorder).answer_with_notes(  # type: ignore[arg-type]
        [question] * 3, [[f"{first} is {relation}", "unk", "I don't know."], ["unk .", ""], []]
    )

    assert recorder.asked == [
        f"D city of is {relation} . {question} A",
        f"{question} A",
        f"{question} A",
    ]


def test_notes_for_other_questions_are_refused(models: list[LanguageModel]) -> None:
    with pytest.raises(ShapeError):
        Receiver(models[0]).answer_with_notes(["q"], [])


def test_iterated_refinement_runs_on_the_fused_state(
    models: list[LanguageModel], questions: list[str], parts: list
) -> None:
    receiver = Receiver(models[0])
    fused = receiver.fuse(receiver.own(questions), parts)

    again = Sharer(models[0]).share(questions, ShareSpec(), on=fused)
    plain = Sharer(models[0]).share(questions, ShareSpec())

    assert again.entries.tokens == plain.entries.tokens == 2
    assert not torch.allclose(again.entries.values[-1], plain.entries.values[-1], atol=1e-3)
