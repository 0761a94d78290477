import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedinfer_flower.errors import CacheError, FuserError, InvalidValueError, UnknownNameError
from fedinfer_flower.kv.fuser import FuserSpec, count_parameters, make_fuser
from fedinfer_flower.kv.fusers.hub import Hub, HubSpec
from fedinfer_flower.kv.layer_map import LAYER_MAPS, layer_map
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld

# float32 sums over at most about 40 entries in at most 5 layers, in another order; logits of
# these models are below 10. Measured: at most 5e-6.
TOLERANCE = 5e-5


def layout(number, *, layers=2, heads=2, head_size=4):
    return CacheLayout(
        layers=layers,
        heads=heads,
        head_size=head_size,
        hidden_size=6,
        window=64,
        rope="{}",
        architecture="llama",
        tokenizer_digest="0" * 64,
        model_digest=str(number) * 64,
    )


SHARER, RECEIVER = layout(1, layers=3), layout(2, heads=1)


def entries_of(layout, mask, *, seed=0, hidden=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(mask)
    shape = (len(mask), layout.heads, mask.shape[1], layout.head_size)

    def drawn(*size):
        return torch.randn(*size, generator=generator)

    return CacheEntries(
        keys=tuple(drawn(*shape) for _ in range(layout.layers)),
        values=tuple(drawn(*shape) for _ in range(layout.layers)),
        mask=mask,
        layout=layout,
        hidden=drawn(*mask.shape, layout.hidden_size) if hidden else None,
    )


def past_of(layout, mask, *, seed=9):
    own = entries_of(layout, mask, seed=seed)
    return Past(
        keys=own.keys,
        values=own.values,
        mask=own.mask,
        positions=own.positions,
        ids=torch.zeros(own.rows, 1, dtype=torch.long),
        ids_positions=own.mask.sum(1, keepdim=True),
    )


def spec_of(kind, **options):
    return FuserSpec.for_pair(kind, SHARER, RECEIVER, **{"width": 8, **options})


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
    return [facts[i].question(i % 4) for i in range(8)]


# -- layer maps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sharer", "receiver", "expected"),
    [
        ("bottom", 3, 5, (0, 1, 2, 2, 2)),
        ("bottom", 5, 3, (0, 1, 2)),
        ("terminal", 3, 5, (0, 0, 0, 1, 2)),
        ("terminal", 5, 3, (2, 3, 4)),
        ("depth", 3, 5, (0, 0, 1, 2, 2)),
        ("depth", 5, 3, (0, 2, 4)),
        ("depth", 28, 1, (0,)),
        ("depth", 1, 4, (0, 0, 0, 0)),
    ],
)
def test_layer_map_is_the_published_table(how, sharer, receiver, expected):
    assert layer_map(sharer, receiver, how) == expected


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(LAYER_MAPS))
def test_layer_map_rises_inside_the_sharer(sharer, receiver, how):
    mapped = layer_map(sharer, receiver, how)

    assert len(mapped) == receiver
    assert list(mapped) == sorted(mapped)
    assert 0 <= mapped[0] <= mapped[-1] < sharer
    if sharer == receiver:
        assert mapped == tuple(range(receiver))


def test_unknown_layer_map_is_refused():
    with pytest.raises(InvalidValueError, match="no layer map"):
        layer_map(2, 2, "middle")
    with pytest.raises(InvalidValueError):
        layer_map(0, 2)


@pytest.mark.parametrize("how", LAYER_MAPS)
def test_fuser_reads_only_the_layers_of_its_map(how):
    spec = spec_of("concat", layer_map=how)
    fuser = make_fuser(spec).eval()
    sharer = entries_of(SHARER, [[1, 1]])
    before = fuser.project(sharer)

    for layer in range(SHARER.layers):
        keys = [k.clone() for k in sharer.keys]
        keys[layer] += torch.randn(keys[layer].shape, generator=torch.Generator().manual_seed(1))
        after = fuser.project(dataclasses.replace(sharer, keys=tuple(keys)))
        changed = [not torch.equal(a, b) for a, b in zip(before.keys, after.keys, strict=True)]
        assert changed == [mapped == layer for mapped in spec.layers]


# -- specs -----------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["concat", "fuse", "hub", "identity", "last-token"]),
    how=st.sampled_from(LAYER_MAPS),
    width=st.integers(1, 16_384),
    depth=st.integers(0, 8),
    dropout=st.floats(0, 1, exclude_max=True),
    share=st.builds(ShareSpec, last=st.integers(0, 9), hidden=st.booleans()),
)
def test_spec_through_json_is_the_same(kind, how, width, depth, dropout, share):
    spec = FuserSpec(
        kind=kind,
        sharer=SHARER,
        receiver=RECEIVER,
        share=share,
        layer_map=how,
        width=width,
        depth=depth,
        dropout=dropout,
    )

    assert FuserSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(
    field=st.sampled_from(sorted(FuserSpec.__dataclass_fields__)),
    value=json_values,
    drop=st.booleans(),
)
def test_spec_with_any_other_value_is_itself_or_a_fuser_error(field, value, drop):
    values = {**spec_of("last-token").to_dict(), field: value}
    if drop:
        del values[field]

    try:
        spec = FuserSpec.from_dict(values)
    except FuserError:
        return
    assert spec.to_dict() == values
    assert not drop


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0},
        {"width": 1 << 20},
        {"width": True},
        {"depth": -1},
        {"depth": 9},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"layer_map": "middle"},
        {"layer_map": []},
        {"lookahead": 2},
        {"latent_layers": 0},
        {"sharer": 5},
        {"sharer": "{}"},
        {"share": {"last": 1}},
        {"kind": ""},
        {"more": 1},
    ],
)
def test_hostile_spec_is_refused(wrong):
    with pytest.raises(FuserError):
        FuserSpec.from_dict({**spec_of("last-token").to_dict(), **wrong})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("concat", {"share": ShareSpec(last=1)}),
        ("last-token", {"share": ShareSpec(last=0)}),
        ("last-token", {"lookahead": 1}),
        ("fuse", {"share": ShareSpec(last=1)}),
        ("identity", {}),
        ("identity", {"receiver": SHARER, "share": ShareSpec(last=1)}),
        ("identity", {"receiver": SHARER, "share": ShareSpec(last=0, hidden=True)}),
    ],
)
def test_kind_that_does_not_fit_its_share_or_pair_is_refused_when_built(kind, options):
    share = {"share": ShareSpec(last=0, decode=0), **options}
    spec = FuserSpec(**{"kind": kind, "sharer": SHARER, "receiver": RECEIVER, **share})

    with pytest.raises(FuserError):
        make_fuser(spec)


def test_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="last-token"):
        spec_of("last-tokens")


def test_counting_a_large_fuser_takes_no_memory_for_it():
    big = layout(3, layers=12, heads=32, head_size=128)

    spec = FuserSpec.for_pair("last-token", big, big, width=8192)

    assert count_parameters(spec) > 4e9  # 16 GB as float32


# -- concatenation ---------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
def test_last_token_prefix_stands_at_positions_from_zero_over_the_own(hidden):
    share = ShareSpec(last=1, decode=1, hidden=hidden)
    fuser = make_fuser(spec_of("last-token", share=share)).eval()
    past = past_of(RECEIVER, [[0, 1, 1], [1, 1, 1]])

    out = fuser.extend(past, entries_of(SHARER, [[1, 1], [1, 1]], hidden=hidden))

    assert out.positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 1, 2]]
    assert out.own_from == 2
    assert torch.equal(out.keys[0][:, :, 2:], past.keys[0])
    assert torch.equal(out.ids_positions, past.ids_positions)


def test_hidden_state_is_read():
    share = ShareSpec(last=1, decode=0, hidden=True)
    fuser = make_fuser(spec_of("last-token", share=share)).eval()
    sharer = entries_of(SHARER, [[1]], hidden=True)
    other = dataclasses.replace(sharer, hidden=sharer.hidden.flip(-1))

    assert not torch.equal(fuser.project(sharer).keys[0], fuser.project(other).keys[0])
    with pytest.raises(CacheError, match="hidden state"):
        fuser.project(sharer.without_hidden())


def test_more_tokens_than_agreed_are_refused():
    fuser = make_fuser(spec_of("last-token"))

    with pytest.raises(CacheError, match="3 tokens"):
        fuser.project(entries_of(SHARER, [[1, 1, 1]]))


def test_padding_of_the_sharer_never_enters_the_prefix():
    fuser = make_fuser(spec_of("concat")).eval()
    padded = entries_of(SHARER, [[0, 0, 1, 1]])
    past = past_of(RECEIVER, [[1, 1]])

    long = fuser.extend(past, padded)
    short = fuser.extend(past, padded.cut(2))

    assert long.mask.tolist() == [[0, 0, 1, 1, 1, 1]]
    assert not long.keys[0][:, :, :2].any()
    # The same numbers through the same weights; only the size of the matrix product differs.
    assert torch.allclose(long.keys[1][:, :, 2:], short.keys[1], rtol=0, atol=1e-6)
    assert torch.equal(long.positions[:, 2:], short.positions)


def test_order_of_sharers_in_front_does_not_matter(models, questions):
    sharer, receiver = models
    spec = FuserSpec.for_pair("last-token", sharer.layout, receiver.layout, width=16)
    one, two = (make_fuser(spec, seed=s).eval() for s in (1, 2))
    sent = sharer.prefill(questions, decode=1).entries.cut(-2)
    past = receiver.prefill(questions).past()

    first = receiver.logits_on(two.extend(one.extend(past, sent), sent))
    second = receiver.logits_on(one.extend(two.extend(past, sent), sent))

    assert (first - second).abs().max() < TOLERANCE


# -- residual --------------------------------------------------------------------------


@pytest.fixture
def fuse():
    fuser = make_fuser(spec_of("fuse", lookahead=0, share=ShareSpec(last=0, decode=0))).eval()
    return fuser


OWN_MASK = [[0, 1, 1], [1, 1, 1]]
SHARER_MASK = [[0, 0, 1, 1], [0, 1, 1, 1]]
ALIGNMENT = torch.tensor([[2, 2, 3], [1, 0, -1]])


def test_residual_is_added_only_where_both_sides_have_a_token(fuse):
    past = past_of(RECEIVER, OWN_MASK)

    out = fuse.extend(past, entries_of(SHARER, SHARER_MASK), alignment=ALIGNMENT)

    changed = (out.keys[0] != past.keys[0]).any((1, 3))
    # Row 0: own padding. Row 1: the sharer's padding, and no token at all.
    assert changed.tolist() == [[False, True, True], [True, False, False]]
    assert (out.own_from, out.mask.tolist()) == (0, OWN_MASK)


def test_residual_reads_the_aligned_token(fuse):
    past, sharer = past_of(RECEIVER, OWN_MASK), entries_of(SHARER, SHARER_MASK)
    order = [1, 0, 3, 2]
    moved = dataclasses.replace(
        sharer,
        keys=tuple(k[:, :, order] for k in sharer.keys),
        values=tuple(v[:, :, order] for v in sharer.values),
        mask=sharer.mask[:, order],
    )
    index = torch.tensor(order)[ALIGNMENT.clamp_min(0)].where(ALIGNMENT >= 0, -1)

    one = fuse.extend(past, sharer, alignment=ALIGNMENT)
    two = fuse.extend(past, moved, alignment=index)

    assert torch.equal(one.keys[1], two.keys[1])
    assert torch.equal(one.values[1], two.values[1])


def test_lookahead_reads_the_token_after(fuse):
    ahead = make_fuser(dataclasses.replace(fuse.spec, lookahead=1)).eval()
    past, sharer = past_of(RECEIVER, [[1, 1, 1]]), entries_of(SHARER, [[1, 1, 1]])

    one = ahead.extend(past, sharer, alignment=torch.tensor([[0, 1, 2]]))
    two = fuse.extend(past, sharer, alignment=torch.tensor([[1, 2, 2]]))

    assert torch.equal(one.keys[0], two.keys[0])


def test_parallel_sharers_project_from_the_clean_past_and_are_summed(fuse):
    other = make_fuser(fuse.spec, seed=5).eval()
    past, sharer = past_of(RECEIVER, OWN_MASK), entries_of(SHARER, SHARER_MASK)
    more = {"alignment": ALIGNMENT}

    def chained(first, second, clean):
        start = first.extend(past, sharer, **more)
        return second.extend(start, sharer, clean=past if clean else None, **more).keys[0]

    deltas = [f.extend(past, sharer, **more).keys[0] - past.keys[0] for f in (fuse, other)]

    # Additions of three float32 numbers below 10 in another order.
    assert torch.allclose(chained(fuse, other, True), past.keys[0] + sum(deltas), atol=1e-6)
    assert torch.allclose(chained(fuse, other, True), chained(other, fuse, True), atol=1e-6)
    assert not torch.allclose(chained(fuse, other, False), chained(other, fuse, False), atol=1e-6)


def test_residual_leaves_a_prefix_as_it_is(fuse):
    concat = make_fuser(spec_of("concat")).eval()
    past, sharer = past_of(RECEIVER, OWN_MASK), entries_of(SHARER, SHARER_MASK)
    prefixed = concat.extend(past, sharer)

    out = fuse.extend(prefixed, sharer, alignment=ALIGNMENT)
    plain = fuse.extend(past, sharer, alignment=ALIGNMENT)

    assert torch.equal(out.keys[0][:, :, :4], prefixed.keys[0][:, :, :4])
    assert torch.equal(out.keys[0][:, :, 4:], plain.keys[0])


def test_switch_is_hard_in_use_and_soft_in_training(fuse):
    past, sharer = past_of(RECEIVER, OWN_MASK), entries_of(SHARER, SHARER_MASK)
    with torch.no_grad():
        fuse.nets[0].switch.copy_(torch.tensor([-0.1, 0.1]))  # keys off, values on

    out = fuse.extend(past, sharer, alignment=ALIGNMENT)
    torch.manual_seed(0)
    soft = fuse.train().extend(past, sharer, alignment=ALIGNMENT)

    assert torch.equal(out.keys[0], past.keys[0])
    assert not torch.equal(out.values[0], past.values[0])
    assert not torch.equal(soft.keys[0], past.keys[0])


def test_switch_at_a_low_temperature_is_nearly_hard(fuse):
    net = fuse.nets[0].train()
    torch.manual_seed(0)

    warm, cold = net._switched(1000, 1.0), net._switched(1000, 0.01)

    # Logistic noise of scale 1 around 0.5: a share of sigmoid(0.5) = 0.622 is on; the
    # standard error over 2000 draws is 0.011, so 0.06 is more than five of them.
    assert abs(float((cold > 0.5).float().mean()) - 0.622) < 0.06
    assert float(((cold < 0.05) | (cold > 0.95)).float().mean()) > 0.95
    assert float(((warm < 0.05) | (warm > 0.95)).float().mean()) < 0.3


@pytest.mark.parametrize(
    "alignment",
    [
        None,
        ALIGNMENT[:, :2],
        ALIGNMENT[:1],
        torch.tensor([[4, 0, 0], [0, 0, 0]]),
        torch.tensor([[-2, 0, 0], [0, 0, 0]]),
    ],
)
def test_wrong_alignment_is_refused(fuse, alignment):
    past, sharer = past_of(RECEIVER, OWN_MASK), entries_of(SHARER, SHARER_MASK)

    with pytest.raises((CacheError, FuserError), match="align"):
        fuse.extend(past, sharer, alignment=alignment)


# -- identity --------------------------------------------------------------------------


def identity_of(model):
    return make_fuser(FuserSpec.for_pair("identity", model.layout, model.layout))


def test_own_cache_from_elsewhere_gives_the_plain_answers(models, questions):
    model = models[1]
    settings = Decoding(max_new_tokens=6)
    sent = model.prefill(questions).entries
    past = model.prefill(questions).past()
    blank = dataclasses.replace(
        past,
        keys=tuple(torch.zeros_like(k) for k in past.keys),
        values=tuple(torch.zeros_like(v) for v in past.values),
    )

    replaced = identity_of(model).replace_own(blank, sent)

    assert model.decode_on(replaced, settings) == model.generate(questions, settings)
    assert (model.logits_on(replaced) - model.logits_on(past)).abs().max() < TOLERANCE
    assert (model.logits_on(blank) - model.logits_on(past)).abs().max() > 100 * TOLERANCE


def test_own_cache_of_other_prompts_is_refused(models, questions):
    model = models[1]
    past = model.prefill(questions[:2]).past()
    assert past.mask[0].tolist() != past.mask[1].tolist()

    with pytest.raises(CacheError, match="other prompts"):
        identity_of(model).replace_own(past, model.prefill(questions[1::-1]).entries)


def test_prefix_and_prompt_behind_it_are_the_joint_text(models, questions):
    model = models[0]
    whole = model.tokens(questions[:1])
    cut = whole.ids.shape[1] // 2
    read = model.prefill(questions[:1])
    none = read.entries.cut(0, 0)
    behind = Past(
        keys=none.keys,
        values=none.values,
        mask=none.mask,
        positions=none.mask,
        ids=whole.ids[:, cut:],
        ids_positions=whole.positions[:, cut:],
    )

    out = identity_of(model).extend(behind, read.entries.cut(0, cut))

    logits = model.logits_on(out)[:, -1]
    assert (logits - model.logits_on(read.past())[:, -1]).abs().max() < TOLERANCE


# -- hub -------------------------------------------------------------------------------

MODELS = (SHARER, RECEIVER, layout(3, layers=4, heads=3))
DIGESTS = tuple(model.model_digest for model in MODELS)


def hub_of(models=MODELS):
    hub = Hub(HubSpec(width=8, latent_layers=3))
    for seed, model in enumerate(models):
        hub.join(model, seed=seed)
    return hub.eval()


def test_hub_serves_all_pairs_with_one_encoder_and_decoder_a_model():
    hub = hub_of()

    for sharer, receiver in hub.pairs():
        fuser = hub.fuser(sharer, receiver)
        out = fuser.project(entries_of(hub.layouts[sharer], [[1, 1]]))
        assert out.layout == hub.layouts[receiver]
        assert fuser.encoder is hub.encoders[sharer]
        assert fuser.decoder is hub.decoders[receiver]
    assert len(hub.pairs()) == 6
    assert len(hub.encoders) == len(hub.decoders) == 3


def test_hub_has_fewer_parameters_than_fusers_of_all_pairs():
    hub = hub_of()

    alone = sum(count_parameters(hub.fuser(a, b).spec) for a, b in hub.pairs())

    # Every encoder and every decoder would exist twice with three models.
    assert 2 * sum(p.numel() for p in hub.parameters()) == alone


def test_model_that_joins_trains_its_own_parts_only():
    hub = hub_of(MODELS[:2])
    before = {name: x.clone() for name, x in hub.state_dict().items()}
    hub.join(MODELS[2])
    hub.train_only(DIGESTS[2])
    pairs = [(DIGESTS[2], DIGESTS[0]), (DIGESTS[1], DIGESTS[2])]
    optimiser = torch.optim.SGD([p for p in hub.parameters() if p.requires_grad], lr=0.1)

    for sharer, receiver in pairs:
        out = hub.fuser(sharer, receiver).project(entries_of(hub.layouts[sharer], [[1, 1]]))
        sum(x.square().sum() for x in (*out.keys, *out.values)).backward()
    optimiser.step()

    after = hub.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    joined = [p for part in (hub.encoders, hub.decoders) for p in part[DIGESTS[2]].parameters()]
    assert all(p.grad is not None and p.grad.any() for p in joined)
    hub.train_only(None)
    assert all(p.requires_grad for p in hub.parameters())


def test_hub_without_a_model_names_it():
    hub = hub_of(MODELS[:2])

    with pytest.raises(FuserError, match="333333333333") as caught:
        hub.fuser(DIGESTS[0], DIGESTS[2])
    assert "text" in caught.value.hint
    with pytest.raises(FuserError):
        hub.train_only(DIGESTS[2])
    with pytest.raises(InvalidValueError, match="already"):
        hub.join(SHARER)


# -- learning --------------------------------------------------------------------------


def test_last_token_fuser_learns_eight_answers_in_twenty_steps(models, questions):
    sharer, receiver = models
    spec = FuserSpec.for_pair("last-token", sharer.layout, receiver.layout, width=32)
    fuser = make_fuser(spec).train()
    sent = sharer.prefill(questions, decode=1).entries.cut(-2)
    # All ask the same of the receiver: only what the sharer sends can tell the rows apart.
    past = receiver.prefill([questions[0]] * 8).past()
    labels = torch.arange(20, 28)
    optimiser = torch.optim.AdamW(fuser.parameters(), lr=1e-2)

    def loss_on(entries):
        logits = receiver.logits_on(fuser.extend(past, entries))[:, -1]
        return functional.cross_entropy(logits, labels)

    torch.manual_seed(0)  # of dropout
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = loss_on(sent)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    fuser.eval()
    with torch.no_grad():
        after, shuffled = loss_on(sent).item(), loss_on(sent.select([*range(1, 8), 0])).item()

    # Guessing evenly among the eight labels costs ln 8 = 2.08: below it, the rows are told
    # apart; entries of another row must then do worse.
    assert after < 2.08 < losses[0]
    assert shuffled > after + 1.0
