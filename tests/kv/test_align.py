"""Token alignment: by characters between canonical tokenisations, and C2C's one to one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedinfer_flower.errors import CacheError, InvalidValueError
from fedinfer_flower.kv.align import align_sections, align_spans, alignment_tensor
from fedinfer_flower.kv.retokenize import retokenize
from fedinfer_flower.simulation.facts.tokenizer import build_tokenizer

SPECIAL = (0, 0)
PAD, START, END = "<pad>", "<s>", "</s>"
WORDS = ["bodun", "is", "asked", "where", "the", "relation"]
WHOLE = build_tokenizer(WORDS, piece_length=None, seed=1)
PIECES = build_tokenizer(WORDS, piece_length=3, seed=2)
CORPUS = ["the cat sat on the mat", "where is the cat now", "is this the cat 🙂", "café naïve"] * 4


def byte_level(vocabulary: int, *, specials: tuple[str, ...] = (), composed: bool = False):
    """Train a byte-level BPE tokenizer: small vocabularies split characters over tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if composed:
        core.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, START, END, *specials],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=list(specials),
        clean_up_tokenization_spaces=False,
    )


BYTES, MERGED = byte_level(259), byte_level(320)


def tokens(tokenizer, prompts: list[str]):
    """Tokenize as `LanguageModel.tokens` does."""
    coded = tokenizer(
        prompts,
        padding=True,
        padding_side="left",
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    mask = coded["attention_mask"]
    rows = zip(coded["offset_mapping"].tolist(), mask.tolist(), strict=True)
    spans = [[tuple(s) for s, on in zip(row, real, strict=True) if on] for row, real in rows]
    return SimpleNamespace(ids=coded["input_ids"].long(), mask=mask.long(), spans=spans)


def align(sharer, receiver, **options) -> list[int]:
    return align_spans([sharer], [receiver], **options)[0]


# -- the rule ----------------------------------------------------------------------------


@st.composite
def cuts(draw, length: int) -> list[tuple[int, int]]:
    """Cut a text of that length into spans, some of them losing the character in front."""
    ends = sorted(draw(st.sets(st.integers(1, length), min_size=1))) if length else []
    spans = []
    for start, stop in zip([0, *ends], ends, strict=False):
        trimmed = start + 1 if stop - start > 1 and draw(st.booleans()) else start
        spans.append((trimmed, stop))
    return spans


@st.composite
def with_extras(draw, length: int = 12) -> list[tuple[int, int]]:
    """Cut, with special tokens anywhere and characters that lie in several tokens."""
    spans = []
    for span in draw(cuts(length)):
        spans += [SPECIAL] * draw(st.integers(0, 2))
        spans += [span] * draw(st.integers(1, 3))
    return spans + [SPECIAL] * draw(st.integers(0, 2))


def by_definition(sharer, receiver) -> list[int]:
    """Read the rule off its text, for tokens of whole characters without special ones."""
    found = []
    for _, end in receiver:
        inside = [j for j, (start, stop) in enumerate(sharer) if start < end < stop]
        before = [j for j, (_, stop) in enumerate(sharer) if stop <= end]
        found.append(inside[0] if inside else before[-1] if before else 0)
    return found


@given(cuts(12), cuts(12))
def test_text_tokens_follow_the_definition(sharer, receiver):
    assert align(sharer, receiver) == by_definition(sharer, receiver)


@given(with_extras())
def test_equal_tokenisations_give_the_identity(spans):
    assert align(spans, spans) == list(range(len(spans)))


@given(with_extras(), with_extras(), st.integers(-20, 20))
def test_alignment_never_goes_back_and_stays_inside(sharer, receiver, offset):
    found = align(sharer, receiver, offset=offset)
    assert len(found) == len(receiver)
    assert found == sorted(found)
    assert all(0 <= j < len(sharer) for j in found)


@given(cuts(10), cuts(10), st.integers(1, 30))
def test_offset_is_the_same_as_a_document_that_ends_there(sharer, receiver, offset):
    moved = [(a + offset, b + offset) for a, b in sharer]
    document = [(0, offset)]
    with_document = align(document + moved, receiver, offset=offset)
    # Where the sharer's question has no token yet, the document's last one has just been read.
    plain = by_definition([(-1, 0), *sharer], receiver)
    assert with_document == plain


wild = st.lists(st.tuples(st.integers(-5, 20), st.integers(-5, 20)), max_size=8)


@given(wild, wild, wild, st.integers(-5, 5))
def test_spans_that_another_site_made_up_give_columns_or_a_typed_error(there, here, at, shift):
    sections = {
        "sharer_sections": at,
        "receiver_sections": [(a + shift, b + shift) for a, b in at],
    }
    for attempt in (lambda: align(there, here), lambda: align_sections(there, here, **sections)):
        try:
            found = attempt()
        except CacheError:
            continue
        assert len(found) == len(here)
        assert found == sorted(found)
        assert all(0 <= j < len(there) for j in found)


def test_special_tokens_pair_in_order_and_fall_back_to_what_stands_before():
    text = [(0, 2), (2, 4)]
    assert align([SPECIAL, *text], [SPECIAL, *text]) == [0, 1, 2]
    assert align([SPECIAL, *text], text) == [1, 2]
    assert align(text, [SPECIAL, *text, SPECIAL]) == [0, 0, 1, 1]
    assert align([*text, SPECIAL], [*text, SPECIAL, SPECIAL]) == [0, 1, 2, 2]
    # Two leading ones against one; one in the middle that the sharer has not.
    assert align([SPECIAL, *text], [SPECIAL, SPECIAL, *text]) == [0, 0, 1, 2]
    assert align([SPECIAL, *text], [SPECIAL, text[0], SPECIAL, text[1]]) == [0, 1, 1, 2]


def test_special_token_after_a_partly_read_token_does_not_go_back():
    # The receiver's first token ends inside the sharer's second one.
    assert align([(0, 1), (1, 4)], [(0, 2), SPECIAL, (2, 4)]) == [1, 1, 1]


def test_start_token_stays_with_the_start_token_behind_a_document():
    assert align([SPECIAL, (0, 9), (9, 12)], [SPECIAL, (0, 3)], offset=9) == [0, 2]


def test_parts_of_one_character_pair_in_order_and_the_last_with_the_last():
    four, two = [(0, 1)] * 4, [(0, 1)] * 2
    assert align(four, two) == [0, 3]
    assert align(two, four) == [0, 1, 1, 1]
    assert align([(0, 1)], four) == [0, 0, 0, 0]


def test_empty_text_and_one_empty_side():
    assert align([], []) == []
    assert align([(0, 1)], []) == []
    assert align([SPECIAL], [SPECIAL]) == [0]
    assert align([SPECIAL], [SPECIAL, (0, 2)]) == [0, 0]
    with pytest.raises(CacheError, match="not a single token"):
        align([], [(0, 1)])
    with pytest.raises(CacheError, match="not a single token"):
        align_sections([], [(0, 1)], sharer_sections=[], receiver_sections=[])


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidValueError, match="strategy"):
        align([(0, 1)], [(0, 1)], strategy="nearest")
    with pytest.raises(InvalidValueError, match="numbers of prompts"):
        align_spans([[(0, 1)]], [])
    with pytest.raises(InvalidValueError, match="numbers of prompts"):
        align_spans([[(0, 1)]], [[(0, 1)]], offset=[0, 1])


# -- real tokenizers ---------------------------------------------------------------------


def test_emoji_split_over_byte_tokens_is_read_by_its_last_byte():
    there, here = tokens(BYTES, ["is 🙂 now"]), tokens(MERGED, ["is 🙂 now"])
    assert there.spans[0].count((3, 4)) > 1  # the tokenizer did split the character
    found = align(there.spans[0], here.spans[0])
    last = max(j for j, span in enumerate(there.spans[0]) if span == (3, 4))
    ends = [end for _, end in here.spans[0]]
    assert found[max(t for t, end in enumerate(ends) if end == 4)] == last
    assert [there.spans[0][j][1] for j in found] == ends


def test_family_emoji_of_several_characters_is_aligned_character_by_character():
    text = "👩‍👧 the cat"  # two characters and a joiner
    there, here = tokens(MERGED, [text]), tokens(BYTES, [text])
    found = align(there.spans[0], here.spans[0])
    for j, (_, end) in zip(found, here.spans[0], strict=True):
        start, stop = there.spans[0][j]
        assert stop == end or start < end < stop or stop <= end


def test_combining_character_that_one_side_composes():
    text = "cafe\N{COMBINING ACUTE ACCENT} is"
    there, here = tokens(byte_level(300, composed=True), [text]), tokens(BYTES, [text])
    # The composed character counts as the letter: no token of this side covers the mark.
    assert there.spans[0] == [(0, 4), (5, 8)]
    assert here.spans[0].count((4, 5)) == 2
    # Letters and both bytes of the mark belong to the word, what follows to the next token.
    assert align(there.spans[0], here.spans[0]) == [0] * 6 + [1] * 3
    # The other way round the word is read with the letter; its mark is not seen.
    assert align(here.spans[0], there.spans[0]) == [3, 8]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_any_text_aligns_between_byte_level_tokenizers(text):
    there, here = tokens(BYTES, [text]), tokens(MERGED, [text])
    found = align(there.spans[0], here.spans[0])
    # Both cut at every character's end or later: the sharer, which cuts finer, has always
    # read exactly as much.
    assert [there.spans[0][j][1] for j in found] == [end for _, end in here.spans[0]]
    same = align(here.spans[0], here.spans[0])
    assert same == list(range(len(here.spans[0])))


def test_left_padding_and_unequal_lengths_give_padded_columns():
    prompts = ["where is bodun", "is", "the relation is asked"]
    there, here = tokens(PIECES, prompts), tokens(WHOLE, prompts)
    found = alignment_tensor(there, here)
    assert found.dtype == torch.long
    assert found.shape == here.mask.shape
    # Padded on the left, a row points at real tokens of its own row only.
    assert bool((there.mask.gather(1, found) == 1).all())
    for row, prompt in enumerate(prompts):
        alone = alignment_tensor(tokens(PIECES, [prompt]), tokens(WHOLE, [prompt]))
        width, shift = alone.shape[1], there.mask.shape[1] - int(there.mask[row].sum())
        assert torch.equal(found[row, -width:], alone[0] + shift)
    # "bodun" is two pieces: the word has been read with the second.
    words = there.ids.gather(1, found)[0, -3:].tolist()
    assert PIECES.convert_ids_to_tokens(words) == ["##re", "is", "##un"]


def test_document_in_front_of_the_question_is_an_offset():
    document = "the relation is asked "
    there = tokens(PIECES, [document + "where is bodun", "is bodun"])
    here = tokens(WHOLE, ["where is bodun", "is bodun"])
    found = alignment_tensor(there, here, offset=[len(document), 0])
    for row, offset in enumerate((len(document), 0)):
        shift = int((there.mask[row] == 0).sum())
        own = found[row, -len(here.spans[row]) :].tolist()
        for j, (_, end) in zip(own[1:], here.spans[row][1:], strict=True):
            assert there.spans[row][j - shift][1] == end + offset
        assert own[0] == shift  # start token with start token


def test_tokens_that_a_model_decoded_have_no_span():
    there, here = tokens(PIECES, ["is bodun"]), tokens(WHOLE, ["is bodun"])
    longer = SimpleNamespace(mask=torch.ones(1, 6, dtype=torch.long), spans=here.spans)
    found = alignment_tensor(there, longer)
    assert found.tolist() == [[0, 1, 3, 3, 3, 3]]


def test_tokens_padded_on_the_right_are_refused():
    here = tokens(WHOLE, ["is bodun"])
    right = SimpleNamespace(mask=torch.tensor([[1, 1, 0]]), spans=[[SPECIAL, (0, 2)]])
    crowded = SimpleNamespace(mask=torch.tensor([[0, 1]]), spans=[[SPECIAL, (0, 2)]])
    for wrong in (right, crowded):
        with pytest.raises(CacheError, match="padded on the left"):
            alignment_tensor(wrong, here)


# -- chat templates ----------------------------------------------------------------------

MARKS = ("<|im_start|>", "<|im_end|>")
CHAT = byte_level(330, specials=MARKS)
MESSAGES = [("system", "the cat is on the mat"), ("user", "where is the cat 🙂")]


def long_template(messages) -> tuple[str, list[tuple[int, int]]]:
    return written(messages, lambda role: f"<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>a")


def short_template(messages) -> tuple[str, list[tuple[int, int]]]:
    return written(messages, lambda role: f"[{role[0]}]", "", ">")


def written(messages, before, after, end):
    text, sections = "", []
    for role, content in messages:
        text += before(role)
        sections.append((len(text), len(text) + len(content)))
        text += content + after
    return text + end, sections


@pytest.mark.parametrize(
    ("theirs", "ours"), [(long_template, short_template), (short_template, long_template)]
)
def test_messages_align_with_messages_whatever_the_templates_write(theirs, ours):
    (there_text, there_at), (here_text, here_at) = theirs(MESSAGES), ours(MESSAGES)
    there, here = tokens(CHAT, [there_text]), tokens(BYTES, [here_text])
    found = alignment_tensor(there, here, sharer_sections=[there_at], receiver_sections=[here_at])
    found = found[0].tolist()
    assert found == sorted(found)
    checked = 0
    for j, (start, end) in zip(found, here.spans[0], strict=True):
        for (a, stop), (b, _) in zip(here_at, there_at, strict=True):
            if a <= start and end <= stop:
                first, last = there.spans[0][j]
                at = end - a + b
                assert first < at <= last or last <= at
                assert b < last  # a token of the message, not of the template before it
                checked += 1
    assert checked > 20
    # The last token of the prompt, which is decoded on, stands with the last one.
    assert found[-1] == len(there.spans[0]) - 1


def test_equal_templates_give_the_identity_by_sections_too():
    text, sections = long_template(MESSAGES)
    spans = tokens(CHAT, [text]).spans[0]
    found = align_sections(spans, spans, sharer_sections=sections, receiver_sections=sections)
    assert found == list(range(len(spans)))
    assert align(spans, spans) == found


def test_section_without_a_token_at_the_sharer_takes_the_token_before():
    # The sharer's template writes nothing between its messages and nothing at the end.
    found = align_sections(
        [(0, 2), (2, 4)],
        [(0, 2), (2, 3), (3, 5), (5, 6)],
        sharer_sections=[(0, 2), (2, 4)],
        receiver_sections=[(0, 2), (3, 5)],
    )
    assert found == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        ([(0, 2)], [(0, 2), (2, 4)], "2 messages at the receiver and 1"),
        ([(0, 2)], [(0, 3)], "longer at one side"),
        ([(2, 4), (0, 2)], [(0, 2), (2, 4)], "out of order"),
        ([(-1, 1)], [(0, 2)], "out of order"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(theirs, ours, text):
    spans = [(0, 2), (2, 4)]
    with pytest.raises(CacheError, match=text):
        align_sections(spans, spans, sharer_sections=theirs, receiver_sections=ours)


def test_sections_combine_with_nothing_else():
    batch = tokens(WHOLE, ["is bodun"])
    sections = [[(0, 8)]]
    both = {"sharer_sections": sections, "receiver_sections": sections}
    assert alignment_tensor(batch, batch, **both).tolist() == [[0, 1, 2]]
    for wrong in (
        {"sharer_sections": sections},
        {**both, "offset": 1},
        {**both, "strategy": "first"},
        {"sharer_sections": [], "receiver_sections": []},
    ):
        with pytest.raises(InvalidValueError):
            alignment_tensor(batch, batch, **wrong)


# -- C2C's one to one --------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["first", "longest"])
def test_retokenised_prompt_is_aligned_token_by_token(strategy):
    here = tokens(WHOLE, ["where is bodun", "is"])
    options = {"receiver": WHOLE, "sharer": PIECES, "strategy": strategy}
    ids = retokenize(here.ids, here.mask, **options)
    there = SimpleNamespace(ids=ids, mask=here.mask, spans=here.spans)
    found = alignment_tensor(there, here, strategy=strategy)
    real = here.mask.bool()
    assert torch.equal(found[real], torch.arange(4).expand(2, 4)[real])
    assert bool((ids[~real] == PIECES.pad_token_id).all())
    assert ids[0, 0] == PIECES.bos_token_id


def test_first_and_longest_keep_different_ids():
    receiver = build_tokenizer(["abcdefg"], piece_length=None, seed=0)
    sharer = byte_level(262)  # bytes and three merges
    here = tokens(receiver, ["abcdefg"])
    kept = {
        strategy: sharer.decode(
            retokenize(here.ids, here.mask, receiver=receiver, sharer=sharer, strategy=strategy)[
                0, -1:
            ]
        )
        for strategy in ("first", "longest")
    }
    pieces = [sharer.decode([i]) for i in sharer("abcdefg")["input_ids"]]
    assert kept["first"] == pieces[0]
    assert kept["longest"] == max(pieces, key=len)


def test_special_tokens_are_translated_by_role_then_text_then_unknown():
    text, _ = long_template(MESSAGES)
    here = tokens(CHAT, [f"<s>{text}</s>"])

    def translated(sharer) -> dict[str, str]:
        ids = retokenize(here.ids, here.mask, receiver=CHAT, sharer=sharer)[0].tolist()
        both = zip(here.ids[0].tolist(), ids, strict=True)
        names = {i: CHAT.convert_ids_to_tokens(i) for i in CHAT.all_special_ids}
        return {names[i]: sharer.convert_ids_to_tokens(j) for i, j in both if i in names}

    by_role = translated(PIECES)  # which knows no chat marks, and has an unknown token
    assert by_role == {"<s>": "<bos>", "</s>": "<eos>", MARKS[0]: "<?>", MARKS[1]: "<?>"}
    by_text = translated(byte_level(300, specials=tuple(reversed(MARKS))))
    assert by_text == {"<s>": "<s>", "</s>": "</s>", MARKS[0]: MARKS[0], MARKS[1]: MARKS[1]}
    without_unknown = translated(BYTES)
    assert without_unknown[MARKS[0]] == "<pad>"


def test_equal_tokenizers_retokenise_to_themselves():
    here = tokens(MERGED, ["where is the cat", "cat"])
    assert torch.equal(retokenize(here.ids, here.mask, receiver=MERGED, sharer=MERGED), here.ids)


def test_part_of_a_character_is_lost_one_to_one_and_kept_by_spans():
    # The reason why "spans" is the default.
    here = tokens(BYTES, ["🙂"])
    ids = retokenize(here.ids, here.mask, receiver=BYTES, sharer=MERGED)
    assert MERGED.decode(ids[0]) != "🙂"
    there = tokens(MERGED, ["🙂"])
    assert alignment_tensor(there, here)[0, -1] == there.mask.shape[1] - 1


def test_one_to_one_needs_as_many_tokens_and_no_offset():
    here, there = tokens(WHOLE, ["where is bodun"]), tokens(PIECES, ["where is bodun"])
    with pytest.raises(CacheError, match="another number"):
        alignment_tensor(there, here, strategy="first")
    with pytest.raises(InvalidValueError, match="no offset"):
        alignment_tensor(here, here, strategy="longest", offset=3)
    with pytest.raises(InvalidValueError, match="'first' or the 'longest'"):
        retokenize(here.ids, here.mask, receiver=WHOLE, sharer=PIECES, strategy="spans")


def test_tokenizer_without_any_stand_in_is_refused():
    bare = SimpleNamespace(
        **dict.fromkeys(("unk_token_id", "pad_token_id", "eos_token_id", "bos_token_id")),
        get_vocab=dict,
    )
    here = tokens(WHOLE, ["is"])
    with pytest.raises(CacheError, match="no token for something"):
        retokenize(here.ids, here.mask, receiver=WHOLE, sharer=bare)
