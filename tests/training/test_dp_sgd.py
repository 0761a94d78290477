"""DP-SGD. Statistical tests have a significance of 1e-6: noise and batches have no seed."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import pkgutil
import sys

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import GaussianAccountant
from scipy import stats
from torch import nn

import fedinfer_flower.training as package
from fedinfer_flower import LocalModel
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.errors import InvalidValueError, MissingExtraError, ModelError
from fedinfer_flower.privacy.gaussian_dp import epsilon_of
from fedinfer_flower.query import CountsKind
from fedinfer_flower.training import BatchAudit, RecordPrivacy, train_privately
from fedinfer_flower.training.explicit_positions import with_explicit_positions
from fedinfer_flower.training.poisson_batches import PoissonBatches
from fedinfer_flower.training.preflight import quiet_hooks
from fedinfer_flower.training.record_privacy import calibrated_noise, spent_epsilon
from fedinfer_flower.training.system_noise import system_noise_optimizer

SIGNIFICANCE = 1e-6
N_RECORDS, N_FEATURES, N_CLASSES = 60, 6, 3
MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
CLAIM = RecordPrivacy(
    epsilon=3.0,
    delta=1e-5,
    noise_multiplier=2.5,
    sample_rate=0.1,
    steps=300,
    max_grad_norm=1.0,
)


@pytest.fixture
def records() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N_RECORDS, N_FEATURES, generator=generator)
    return inputs, torch.randint(0, N_CLASSES, (N_RECORDS,), generator=generator)


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(N_FEATURES, 8), nn.ReLU(), nn.Linear(8, N_CLASSES))


def train(model, records, **options):
    given = {"epsilon": 8.0, "delta": 1e-4, "epochs": 1, "batch_size": 20, "learning_rate": 0.1}
    return train_privately(model, *records, **(given | options))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# -- accounting ---------------------------------------------------------------------------


@pytest.mark.parametrize(("z", "steps"), [(1.0, 1), (2.0, 10), (5.0, 100)])
def test_epsilon_of_full_batches_is_the_exact_one_rounded_up(z: float, steps: int) -> None:
    exact = epsilon_of(math.sqrt(steps) / z, 1e-5)
    spent = spent_epsilon(
        noise_multiplier=z, sample_rate=1.0, steps=steps, delta=1e-5, accountant="prv"
    )
    # The accountant returns the upper end of an error interval of 0.01.
    assert exact <= spent <= exact + 0.02


def test_limit_theorem_accountant_under_reports_and_is_refused() -> None:
    facts = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 100}
    with pytest.warns(UserWarning, match="can underestimate"):
        limit = GaussianAccountant()
    limit.history = [tuple(facts.values())]

    # Two sound accountants agree that 7.0 is spent; this one promises 6.0.
    assert spent_epsilon(delta=1e-5, accountant="prv", **facts) > 7.0
    assert limit.get_epsilon(delta=1e-5) < 6.1
    for refused in (
        lambda: spent_epsilon(delta=1e-5, accountant="gdp", **facts),
        lambda: RecordPrivacy(**(CLAIM.to_dict() | {"accountant": "gdp"})),
        lambda: train(small_net(), (torch.zeros(9, 6), torch.zeros(9).long()), accountant="gdp"),
    ):
        with pytest.raises(InvalidValueError, match="less epsilon than is spent"):
            refused()


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_calibrated_noise_keeps_the_promise_and_wastes_little(epsilon: float) -> None:
    facts = {"sample_rate": 0.1, "steps": 50, "delta": 1e-5, "accountant": "prv"}
    z = calibrated_noise(epsilon=epsilon, **facts)

    assert 0.94 * epsilon < spent_epsilon(noise_multiplier=z, **facts) <= epsilon


@pytest.mark.parametrize("epsilon", [0.0, 0.01, -1.0, 65.0, math.nan, math.inf])
def test_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(InvalidValueError, match="epsilon of a training"):
        calibrated_noise(epsilon=epsilon, delta=1e-5, sample_rate=0.1, steps=5, accountant="prv")


def test_unattainable_epsilon_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="no noise is large enough"):
        calibrated_noise(epsilon=0.05, delta=1e-15, sample_rate=1.0, steps=10**12, accountant="rdp")


# -- batches ------------------------------------------------------------------------------


def test_each_record_is_drawn_independently_with_the_same_chance() -> None:
    n_records, q, steps = 40, 0.2, 3000
    batches = PoissonBatches(n_records=n_records, sample_rate=q, steps=steps)
    drawn = np.zeros((steps, n_records), dtype=int)
    for step, rows in enumerate(batches):
        drawn[step, rows] = 1

    counts = drawn.sum(axis=0)
    chi2 = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert SIGNIFICANCE / 2 < stats.chi2.cdf(chi2, n_records) < 1 - SIGNIFICANCE / 2
    # A shuffled epoch has batches of one size; these are binomial.
    sizes = drawn.sum(axis=1)
    spread = (sizes.var() / (n_records * q * (1 - q)) - 1.0) * math.sqrt(steps / 2)
    assert abs(spread) < stats.norm.ppf(1 - SIGNIFICANCE / 2) + 0.5  # kurtosis below 0.5 of that
    audit = batches.audit()
    assert (audit.total, audit.smallest, audit.largest) == (counts.sum(), sizes.min(), sizes.max())


def test_audit_refuses_batches_of_another_rate() -> None:
    facts = {"n_records": 100, "sample_rate": 0.1, "steps": 100, "smallest": 1, "largest": 30}
    BatchAudit(total=1000 + 6 * 30, n_empty=0, **facts).require_plausible()
    with pytest.raises(ModelError, match="1190 records were drawn in 100 batches, 1000"):
        BatchAudit(total=1190, n_empty=0, **facts).require_plausible()


def test_empty_batches_make_noisy_steps_that_count(records) -> None:
    model = small_net()
    trained = train(model, records, batch_size=1, epsilon=8.0)

    # 60 batches at q = 1/60: all have a record with a chance of 0.63^60 = 1e-12.
    assert trained.audit.n_empty > 0
    assert trained.statement.steps == trained.audit.steps == N_RECORDS
    assert trained.statement.sample_rate == 1 / N_RECORDS


# -- clipping and noise -------------------------------------------------------------------


def private_optimizer(model, *, noise_multiplier=1.0, max_grad_norm=0.5, size=10):
    hooked = GradSampleModule(model, loss_reduction="mean")
    private = system_noise_optimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=size,
    )
    return hooked, private


def backward(hooked, inputs, labels) -> None:
    with quiet_hooks():
        nn.functional.cross_entropy(hooked(inputs), labels).backward()


def test_clipped_sum_equals_a_loop_over_records(records) -> None:
    inputs, labels = records[0][:10] * torch.logspace(-2, 2, 10)[:, None], records[1][:10]
    model, norm = small_net(), 1.0
    alone = copy.deepcopy(model)
    expected = [torch.zeros_like(p) for p in alone.parameters()]
    norms = []
    for i in range(10):
        alone.zero_grad()
        nn.functional.cross_entropy(alone(inputs[i : i + 1]), labels[i : i + 1]).backward()
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in alone.parameters())))
        for total, p in zip(expected, alone.parameters(), strict=True):
            total.add_(p.grad * min(1.0, norm / norms[-1]))
    assert min(norms) < norm < max(norms)  # some are clipped, and some are not

    hooked, private = private_optimizer(model, max_grad_norm=norm)
    backward(hooked, inputs, labels)
    private.clip_and_accumulate()

    for total, p in zip(expected, model.parameters(), strict=True):
        # Two orders of summation in float32; opacus divides by the norm plus 1e-6.
        torch.testing.assert_close(p.summed_grad, total, rtol=1e-4, atol=1e-5)


def test_record_with_infinite_gradient_counts_as_absent(records) -> None:
    inputs, labels = records[0][:10].clone(), records[1][:10]
    inputs[3] = torch.inf
    model, other = small_net(), small_net()
    hooked, private = private_optimizer(model)
    backward(hooked, inputs, labels)
    private.clip_and_accumulate()

    rest = [i for i in range(10) if i != 3]
    hooked_rest, private_rest = private_optimizer(other)
    backward(hooked_rest, inputs[rest], labels[rest])
    private_rest.clip_and_accumulate()

    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.summed_grad, q.summed_grad, rtol=1e-4, atol=1e-5)


def test_noise_has_the_claimed_deviation_on_the_grid() -> None:
    model = nn.Linear(200, 100)
    _, private = private_optimizer(model, noise_multiplier=2.0, max_grad_norm=0.5, size=10)
    private.set_empty_batch()
    private.pre_step()

    noise = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy() * 10
    std = 2.0 * 0.5  # the extra for rounding is below 1e-4 of it, far below what this resolves
    statistic = (noise**2).sum() / std**2
    assert SIGNIFICANCE / 2 < stats.chi2.cdf(statistic, noise.size) < 1 - SIGNIFICANCE / 2
    assert stats.kstest(noise / std, "norm").pvalue > SIGNIFICANCE


def test_two_trainings_differ_by_the_noise_whatever_the_seed(records) -> None:
    # One step over all records: nothing but noise can differ.
    weights, options = [], {"batch_size": N_RECORDS, "learning_rate": 1.0, "seed": 4}
    for _ in range(2):
        torch.manual_seed(4)
        trained = train(small_net(), records, **options)
        weights.append(torch.cat([p.detach().flatten() for p in trained.model.parameters()]))

    std = math.sqrt(2.0) * trained.statement.noise_multiplier / N_RECORDS
    difference = (weights[0] - weights[1]).double().numpy()
    statistic = float((difference**2).sum()) / std**2
    assert SIGNIFICANCE / 2 < stats.chi2.cdf(statistic, difference.size) < 1 - SIGNIFICANCE / 2


def test_random_labels_are_memorised_in_clear_and_not_under_dp(records) -> None:
    inputs, labels = records  # the labels are random: what is right about them is memory
    clear = small_net()
    optimiser = torch.optim.Adam(clear.parameters(), lr=0.05)
    for _ in range(500):
        optimiser.zero_grad()
        nn.functional.cross_entropy(clear(inputs), labels).backward()
        optimiser.step()
    trained = train(small_net(), records, epsilon=1.0, epochs=20, learning_rate=0.5, batch_size=20)

    def recalled(model) -> float:
        return float((model(inputs).argmax(dim=1) == labels).float().mean())

    assert recalled(clear) > 0.85
    # Of 60 records at chance 1/3 more than 0.7 are right with 1e-8; epsilon 1 lets one record
    # show itself, and 60 together a little more than nothing.
    assert recalled(trained.model) < 0.7


# -- what comes back ----------------------------------------------------------------------


def test_statement_follows_from_what_was_done(records) -> None:
    trained = train(small_net(), records, epsilon=3.0, epochs=2)
    statement = trained.statement

    assert statement.steps == trained.audit.steps == 6
    assert statement.sample_rate == pytest.approx(20 / 60)
    assert 2.9 < statement.epsilon <= 3.0
    assert statement.recomputed_epsilon() == statement.epsilon
    trained.audit.require_plausible()


def test_model_that_comes_back_is_plain_and_new(records) -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    trained = train(model, records).model

    assert type(trained) is type(model)
    assert not trained.training
    for module in trained.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert "opacus" not in type(module).__module__
    for p in trained.parameters():
        assert not hasattr(p, "grad_sample")
        assert p.grad is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in trained.state_dict().items())


def test_model_serves_in_a_local_model_with_its_claim(records) -> None:
    trained = train(small_net(), records)
    local = LocalModel(
        model=trained.model,
        classes=["a", "b", "c"],
        model_card=trained.statement.as_model_card(),
    )
    site = prepare(local, name="clinic", share_counts=CountsKind.WITHHELD)

    assert float(site.profile.model_card["record-dp-epsilon"]) == trained.statement.epsilon
    assert "not verified" in site.profile.model_card["record-dp-status"]
    answers = site.calibrated_logits(records[0].numpy(), ("a", "b", "c"))
    assert answers.shape == (N_RECORDS, N_CLASSES)


def test_frozen_parameters_stay(records) -> None:
    model = small_net()
    model[0].requires_grad_(False)
    trained = train(model, records).model

    assert torch.equal(trained[0].weight, model[0].weight)
    assert not torch.equal(trained[2].weight, model[2].weight)


@pytest.mark.parametrize("optimizer", ["adam", lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_other_optimizers_train(records, optimizer) -> None:
    assert train(small_net(), records, optimizer=optimizer).statement.steps == 3


# -- refusals -----------------------------------------------------------------------------


class BatchCentred(nn.Module):
    """No layer that a validator knows, and yet records influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, x):
        return self.layer(x - x.mean(dim=0))


class Counting(nn.Module):
    """Keeps statistics of the records in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N_FEATURES, N_CLASSES)
        self.statistics = nn.Module()
        self.statistics.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.statistics.total += x.detach().sum()
        return self.layer(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N_FEATURES, N_CLASSES)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, x):
        return self.layer(nn.functional.dropout(x, 0.5, self.training))


def with_batch_norm(*, frozen: bool) -> nn.Module:
    layers = (nn.Linear(N_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, N_CLASSES))
    model = nn.Sequential(*layers)
    model[1].requires_grad_(not frozen)
    return model


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (with_batch_norm(frozen=False), "BatchNorm1d mixes the records"),
        (with_batch_norm(frozen=True), "BatchNorm1d mixes the records"),
        (BatchCentred(), "are not those of the records alone"),
        (Counting(), "changes its buffers"),
        (Unused(), "spare.weight has no gradient"),
        (Random(), "random in training mode"),
        (nn.Linear(N_FEATURES + 1, N_CLASSES), "trial step failed with RuntimeError"),
        (nn.Linear(N_FEATURES, N_CLASSES).requires_grad_(False), "no parameter"),
    ],
)
def test_model_without_a_gradient_for_each_record_is_refused(records, model, complaint) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        train(model, records)
    assert caught.value.hint


def test_batch_norm_is_replaced_only_when_asked(records) -> None:
    images = records[0].reshape(N_RECORDS, 1, 2, 3)
    layers = (nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, N_CLASSES))
    model = nn.Sequential(*layers)
    with pytest.raises(ModelError, match="BatchNorm2d"):
        train(model, (images, records[1]))
    trained = train(model, (images, records[1]), fix_layers=True).model

    assert isinstance(trained[1], nn.GroupNorm)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_random_model_trains_when_the_comparison_is_left_out(records) -> None:
    assert train(Random(), records, check_gradients=False, seed=1).statement.steps == 3


def test_dropout_layers_do_not_disturb_the_comparison(records) -> None:
    model = nn.Sequential(nn.Linear(N_FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, N_CLASSES))
    assert train(model, records, seed=1).statement.steps == 3


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"),
        lambda out, y: nn.functional.cross_entropy(out - out.mean(dim=0), y),
    ],
    ids=["sum", "across-records"],
)
def test_loss_that_is_no_mean_over_records_is_refused(records, loss) -> None:
    with pytest.raises(ModelError, match="are not those of the records alone"):
        train(small_net(), records, loss=loss)


class TokenClassifier(nn.Module):
    """Position ids of one row for the whole batch, as models of the BERT family have them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.places = nn.Embedding(12, 8)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, input_ids, attention_mask=None, position_ids=None, token_type_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        mixed = torch.tanh(self.words(input_ids) + self.places(position_ids))
        return self.head(mixed.mean(dim=1))


def test_shared_position_ids_are_refused_and_explicit_ones_train(records) -> None:
    tokens = torch.randint(1, 20, (N_RECORDS, 12), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ModelError, match=r"places\.weight has 1 gradients for 4") as caught:
        train(TokenClassifier(), (tokens, records[1]))
    assert "with_explicit_positions" in caught.value.hint

    wrapped = with_explicit_positions(TokenClassifier(), token_types=False)
    assert train(wrapped, (tokens, records[1])).statement.steps == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"delta": 1 / N_RECORDS}, "delta is in"),
        ({"delta": 0.0}, "delta is in"),
        ({"batch_size": N_RECORDS + 1}, "batch_size is in"),
        ({"batch_size": 0}, "batch_size is in"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"accountant": "moments"}, "no accountant"),
        ({"optimizer": "lion"}, "no optimizer"),
        ({"optimizer": lambda p, lr: torch.optim.SGD(p[:1], lr)}, "does not hold exactly"),
    ],
)
def test_option_out_of_range_is_refused(records, options, complaint) -> None:
    with pytest.raises(InvalidValueError, match=complaint):
        train(small_net(), records, **options)


def test_large_delta_warns(records) -> None:
    with pytest.warns(UserWarning, match="above a tenth"):
        train(small_net(), records, delta=0.5 / N_RECORDS)


def test_training_that_diverges_is_an_error(records) -> None:
    with pytest.raises(ModelError, match="did not stay finite"):
        train(small_net(), records, learning_rate=1e38, max_grad_norm=1e3)


def test_missing_opacus_names_the_extra(records, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[dp-training\]"):
        train(small_net(), records)


# -- the claim ----------------------------------------------------------------------------


def test_claim_travels_unchanged() -> None:
    assert RecordPrivacy.from_dict(CLAIM.to_dict()) == CLAIM
    card = CLAIM.as_model_card()
    assert all(isinstance(text, str) and len(text) <= 64 for text in card.values())
    assert float(card["record-dp-delta"]) == CLAIM.delta


def test_claim_that_contradicts_itself_shows() -> None:
    honest = CLAIM.recomputed_epsilon()
    boast = RecordPrivacy(**(CLAIM.to_dict() | {"epsilon": 0.1}))
    assert boast.recomputed_epsilon() == honest > boast.epsilon


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": "1"},
        {"epsilon": math.inf},
        {"delta": 1.0},
        {"sample_rate": 1.5},
        {"steps": 0},
        {"steps": 2.0},
        {"steps": True},
        {"accountant": "none"},
        {"accountant": 3},
        {"extra": 1},
    ],
)
def test_malformed_claim_is_refused(change) -> None:
    with pytest.raises(InvalidValueError):
        RecordPrivacy.from_dict(CLAIM.to_dict() | change)
