"""A digest follows what a model has learned, and says nothing of what it cannot see."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.clients.model_digest import model_digest

RNG = np.random.default_rng(3)
X = RNG.standard_normal((60, 4))
Y = (X @ RNG.standard_normal(4) > 0).astype(int)


def estimators():
    pytest.importorskip("sklearn")
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "logistic": LogisticRegression,
        "forest": lambda: RandomForestClassifier(n_estimators=3, random_state=0),
        "bayes": GaussianNB,
        "neighbours": lambda: KNeighborsClassifier(algorithm="kd_tree"),
        "pipeline": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        "network": lambda: MLPClassifier((3,), max_iter=2000, tol=1e-2, random_state=0),
    }


@pytest.mark.parametrize(
    "name", ["logistic", "forest", "bayes", "neighbours", "pipeline", "network"]
)
def test_digest_of_an_estimator_is_stable_and_follows_its_data(name):
    make = estimators()[name]
    one, two = make().fit(X, Y), make().fit(X, Y)
    other = make().fit(X[:50], Y[:50])
    assert model_digest(one) == model_digest(two)
    assert len(model_digest(one)) == 64
    assert len({model_digest(one), model_digest(other), model_digest(make())}) == 3
    before = model_digest(one)
    one.predict(X)
    assert model_digest(one) == before


def test_digest_of_a_module_follows_every_weight_and_buffer():
    torch = pytest.importorskip("torch")

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    one = network()
    digests = {model_digest(one), model_digest(network())}
    assert len(digests) == 1
    for name in one.state_dict():
        changed = network()
        changed.state_dict()[name].add_(1)
        digests.add(model_digest(changed))
    assert len(digests) == 1 + len(one.state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int8"])
def test_digest_of_a_module_in_any_type(dtype):
    torch = pytest.importorskip("torch")

    class Holder(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            weight = torch.full((2, 3), value).to(getattr(torch, dtype))
            self.register_buffer("weight", weight)
            self.register_buffer("scale", weight[0, 0].clone())  # no dimension at all

    assert model_digest(Holder(1.0)) == model_digest(Holder(1.0))
    assert model_digest(Holder(1.0)) != model_digest(Holder(2.0))


def test_types_of_equal_bytes_differ():
    torch = pytest.importorskip("torch")

    def holder(tensor):
        module = torch.nn.Module()
        module.register_buffer("w", tensor)
        return module

    zeros = [torch.zeros(2, dtype=t) for t in (torch.bfloat16, torch.float16, torch.int16)]
    assert len({model_digest(holder(tensor)) for tensor in zeros}) == 3


class Estimator:
    """Has what makes an estimator for the digest, and any attributes."""

    def __init__(self, **attributes) -> None:
        self.__dict__.update(attributes)

    def get_params(self):
        return {}


class Slots:
    __slots__ = ("a",)

    def __init__(self, a) -> None:
        self.a = a


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": "1"}, {"a": 1}),
        ({"a": np.zeros((2, 3))}, {"a": np.zeros((3, 2))}),
        ({"a": np.zeros(2, "<f4")}, {"a": np.zeros(2, "<i4")}),
        ({"a": np.array([1, "x"], dtype=object)}, {"a": np.array([2, "x"], dtype=object)}),
        ({"a": [1, [2, 3]]}, {"a": [1, [2, 4]]}),
        ({"a": {"x": np.ones(2)}}, {"a": {"x": np.zeros(2)}}),
        ({"a": Slots(1)}, {"a": Slots(2)}),
        ({"a": Estimator(b=1)}, {"a": Estimator(b=2)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_digest_tells_attributes_apart(one, two):
    assert model_digest(Estimator(**one)) != model_digest(Estimator(**two))
    assert model_digest(Estimator(**one)) == model_digest(Estimator(**one))


def test_digest_does_not_depend_on_the_order_of_attributes():
    assert model_digest(Estimator(a=1, b=2)) == model_digest(Estimator(b=2, a=1))


def test_endless_and_huge_structures_end():
    loop = Estimator()
    loop.me = loop
    assert len(model_digest(loop)) == 64
    assert len(model_digest(Estimator(many=[[0] * 1000] * 1000))) == 64


@pytest.mark.parametrize("model", [lambda rows: rows, None, 7, "model", object(), np.ones(3)])
def test_what_cannot_be_named_has_no_digest(model):
    assert model_digest(model) == ""
