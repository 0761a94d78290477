"""Every registered kind of fuser keeps the contract; a new kind is tested by existing."""

import dataclasses
import json

import pytest
import torch

from fedinfer_flower.errors import CacheError, FuserError, InvalidValueError
from fedinfer_flower.kv.fuser import FUSERS, FuserSpec, count_parameters, make_fuser
from fedinfer_flower.kv.fuser_file import load_fuser, save_fuser
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

KINDS = FUSERS.names()
TRAINABLE = tuple(name for name in KINDS if FUSERS.get(name).trainable)
WIDTH = 16
# Masked or zero entries change nothing but the order of float32 sums over at most about 40
# entries in at most 5 layers; logits of these models are below 10. Measured: at most 5e-6.
TOLERANCE = 5e-5


class Scene:
    """Two small models, and ragged prompts that both have read."""

    def __init__(self, spec, sharer, receiver, questions):
        self.spec, self.sharer, self.receiver, self.questions = spec, sharer, receiver, questions

    def entries(self, questions):
        share = self.spec.share
        # Not the receiver's own text: entries of the same tokens twice change no attention.
        asked = [f"S {question}" for question in questions]
        read = self.sharer.prefill(asked, decode=share.decode, hidden=share.hidden).entries
        return read if share.full else read.cut(-(share.last + share.decode))

    def arguments(self, questions):
        """Return past, entries, and what else `extend` of this kind needs."""
        past, entries = self.receiver.prefill(questions).past(), self.entries(questions)
        # Any alignment serves here: column c of the receiver reads column c of the sharer.
        columns = torch.arange(past.mask.shape[1]).clamp_max(entries.tokens - 1)
        rows = columns.expand(len(questions), -1).clone()
        return past, entries, {"alignment": rows} if self.aligns else {}

    @property
    def aligns(self):
        return FUSERS.get(self.spec.kind).needs_alignment


@pytest.fixture(scope="module")
def models():
    world = FactWorld()
    made = []
    for family in FAMILIES[:2]:
        model, tokenizer = build(family, world)
        made.append(LanguageModel(model, tokenizer, prompts=FactPrompts(world.words)))
    return made


@pytest.fixture(scope="module")
def questions():
    world = FactWorld()
    facts = world.facts(world.private[0][:2])
    # Two wordings of other lengths: the batch is padded on the left.
    return [facts[0].question(0), facts[5].question(2), facts[3].question(1)]


@pytest.fixture
def scene(request, models, questions):
    kind = request.param
    sharer, receiver = (models[1], models[1]) if kind == "identity" else models
    spec = FuserSpec.for_pair(kind, sharer.layout, receiver.layout, width=WIDTH)
    return Scene(spec, sharer, receiver, questions)


every_kind = pytest.mark.parametrize("scene", KINDS, indirect=True)
every_trainable_kind = pytest.mark.parametrize("scene", TRAINABLE, indirect=True)


def strong(spec, seed=0):
    """Return a fuser whose help is large enough to be seen."""
    fuser = make_fuser(spec, seed=seed).eval()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.mul_(3.0).add_(0.05)  # a switch that starts at 0 is then on
    return fuser


@every_kind
def test_closed_gate_is_the_receiver_alone_and_an_open_one_is_not(scene):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)
    alone = scene.receiver.logits_on(past)

    helped = fuser.extend(past, entries, gate=torch.tensor([0, 1, 0]), **more)
    with torch.no_grad():
        change = (scene.receiver.logits_on(helped) - alone).abs().amax((1, 2))

    assert change[0] < TOLERANCE
    assert change[2] < TOLERANCE
    assert change[1] > 100 * TOLERANCE


@every_kind
def test_gate_of_ones_is_no_gate(scene):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)

    opened = fuser.extend(past, entries, gate=torch.ones(3), **more)
    plain = fuser.extend(past, entries, **more)

    assert torch.equal(scene.receiver.logits_on(opened), scene.receiver.logits_on(plain))


@every_kind
def test_closed_row_hides_numbers_that_are_not_finite(scene):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)
    for values in entries.values:
        values[0] = torch.nan

    helped = fuser.extend(past, entries, gate=torch.tensor([0, 1, 1]), **more)

    assert torch.isfinite(scene.receiver.logits_on(helped)).all()


@every_kind
def test_rows_do_not_see_each_other_nor_their_padding(scene):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)
    together = scene.receiver.logits_on(fuser.extend(past, entries, **more))

    for row, question in enumerate(scene.questions):
        past, entries, _ = scene.arguments([question])
        start = more["alignment"].shape[1] - past.mask.shape[1] if more else 0
        theirs = scene.entries(scene.questions).tokens - entries.tokens
        # The same tokens alone: both sides lose their padding.
        one = {"alignment": more["alignment"][row : row + 1, start:] - theirs} if more else {}
        if one:
            one["alignment"] = one["alignment"].clamp_min(-1)
        alone = scene.receiver.logits_on(fuser.extend(past, entries, **one))
        assert (alone[0] - together[row]).abs().max() < TOLERANCE


@every_kind
def test_several_sharers_can_be_chained(scene):
    first, second = strong(scene.spec, seed=1), strong(scene.spec, seed=2)
    past, entries, more = scene.arguments(scene.questions)
    closed = torch.zeros(3)

    both = second.extend(first.extend(past, entries, **more), entries, **more)
    one = second.extend(first.extend(past, entries, **more), entries, gate=closed, **more)
    only = scene.receiver.logits_on(first.extend(past, entries, **more))

    assert (scene.receiver.logits_on(one) - only).abs().max() < TOLERANCE
    assert (scene.receiver.logits_on(both) - only).abs().max() > 100 * TOLERANCE


@every_kind
def test_hosted_elsewhere_is_the_same_or_refused(scene):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)

    if not fuser.projects:
        with pytest.raises(FuserError, match="own entries"):
            fuser.project(entries)
        return
    gate = torch.tensor([1, 0, 1])
    projected = fuser.project(entries)
    halves = fuser.extend_projected(past, projected, gate)
    whole = fuser.extend(past, entries, gate=gate, **more)

    assert projected.layout == scene.receiver.layout
    assert torch.equal(scene.receiver.logits_on(halves), scene.receiver.logits_on(whole))


@every_trainable_kind
def test_gradients_reach_the_fuser_and_no_model(scene):
    fuser = make_fuser(scene.spec).train()
    past, entries, more = scene.arguments(scene.questions)

    logits = scene.receiver.logits_on(fuser.extend(past, entries, **more))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()

    untouched = [n for n, p in fuser.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    for model in (scene.sharer.model, scene.receiver.model):
        assert all(p.grad is None for p in model.parameters())


@every_kind
def test_same_seed_gives_the_same_weights_and_leaves_torch_alone(scene):
    before = torch.random.get_rng_state()

    first, second = (make_fuser(scene.spec, seed=7).state_dict() for _ in range(2))
    other = make_fuser(scene.spec, seed=8).state_dict()

    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if first:
        assert any(not torch.equal(first[name], other[name]) for name in first)


@every_kind
def test_spec_through_json_is_the_same(scene):
    assert FuserSpec.from_dict(json.loads(json.dumps(scene.spec.to_dict()))) == scene.spec


@every_kind
def test_saved_and_loaded_fuser_gives_the_same_logits(scene, tmp_path):
    fuser = strong(scene.spec)
    past, entries, more = scene.arguments(scene.questions)

    again = load_fuser(save_fuser(fuser, tmp_path / "pair", {"seed": 0}))

    assert (again.spec, again.card, again.training) == (scene.spec, {"seed": 0}, False)
    before = scene.receiver.logits_on(fuser.extend(past, entries, **more))
    after = scene.receiver.logits_on(again.extend(past, entries, **more))
    assert torch.equal(before, after)


@every_trainable_kind
def test_width_keeps_the_bound_on_parameters(scene):
    wide = dataclasses.replace(scene.spec, width=128)
    most = count_parameters(wide) // 2

    spec = FuserSpec.for_pair(wide.kind, wide.sharer, wide.receiver, max_parameters=most, width=128)

    assert count_parameters(spec) <= most < count_parameters(wide)
    assert count_parameters(dataclasses.replace(spec, width=spec.width + 8)) > most
    assert count_parameters(spec) == sum(p.numel() for p in make_fuser(spec).parameters())
    with pytest.raises(InvalidValueError, match="at most 10 parameters"):
        FuserSpec.for_pair(wide.kind, wide.sharer, wide.receiver, max_parameters=10)


@every_kind
def test_entries_of_another_model_are_refused(scene):
    fuser = make_fuser(scene.spec)
    past, entries, more = scene.arguments(scene.questions)
    layout = dataclasses.replace(entries.layout, model_digest="f" * 64)

    with pytest.raises(CacheError, match="ffffffffffff"):
        fuser.extend(past, dataclasses.replace(entries, layout=layout), **more)


@every_kind
def test_past_of_another_receiver_is_refused(scene, models, questions):
    fuser = make_fuser(scene.spec)
    _, entries, more = scene.arguments(questions)
    other = next(m for m in models if m.layout != scene.receiver.layout)

    with pytest.raises(FuserError, match="other layers or heads"):
        fuser.extend(other.prefill(questions).past(), entries, **more)


@every_kind
def test_entries_of_another_number_of_prompts_are_refused(scene):
    fuser = make_fuser(scene.spec)
    past, _, more = scene.arguments(scene.questions)

    with pytest.raises(CacheError):
        fuser.extend(past, scene.entries(scene.questions[:2]), **more)


@every_kind
@pytest.mark.parametrize("gate", [torch.tensor([0.5, 1, 1]), torch.ones(2), torch.ones(3, 1)])
def test_gate_that_is_no_row_of_zeros_and_ones_is_refused(scene, gate):
    fuser = make_fuser(scene.spec)
    past, entries, more = scene.arguments(scene.questions)

    with pytest.raises(InvalidValueError):
        fuser.extend(past, entries, gate=gate, **more)
