"""Models stay resident: loaded once, bounded, and never a failure."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedinfer_flower.clients import model_cache
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.model_cache import get_or_load
from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.errors import ModelLoadError
from fedinfer_flower.query import CountsKind

SITE = prepare(
    LocalModel(model=lambda rows: rows, classes=["a"]), name="s", share_counts=CountsKind.PRESENCE
)


@pytest.fixture(autouse=True)
def fresh_cache():
    model_cache.clear()
    yield
    model_cache.clear()


class Loader:
    """Counts its calls, and holds all threads at the door first."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> SiteModel:
        with self._lock:
            self.calls += 1
        threading.Event().wait(0.02)  # long enough for the other threads to arrive
        return SITE


def test_cache_under_eight_threads_loads_each_key_once():
    loaders = [Loader() for _ in range(3)]
    keys = [(1, "0", "load"), (1, "1", "load"), (2, "0", "load")]
    door = threading.Barrier(8)

    def work(number: int) -> list[SiteModel]:
        door.wait(timeout=10)
        order = [(number + i) % 3 for i in range(3)]
        return [get_or_load(keys[i], loaders[i], capacity=8) for i in order]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))

    assert [loader.calls for loader in loaders] == [1, 1, 1]
    assert all(model is SITE for models in results for model in models)


def test_cache_is_bounded_and_drops_the_least_recently_used():
    loaders = {name: Loader() for name in "abc"}

    def use(name: str) -> None:
        get_or_load((1, name, "load"), loaders[name], capacity=2)

    for name in "abacab":
        use(name)

    # a stays, being used again before c comes; b is dropped for c and loaded again.
    assert {name: loader.calls for name, loader in loaders.items()} == {"a": 1, "b": 2, "c": 1}
    assert len(model_cache._models) == 2


def test_cache_does_not_keep_a_failure():
    attempts = []

    def load() -> SiteModel:
        attempts.append(1)
        if len(attempts) < 3:
            raise ModelLoadError("not yet")
        return SITE

    for _ in range(2):
        with pytest.raises(ModelLoadError):
            get_or_load((1, "0", "load"), load, capacity=2)
    assert get_or_load((1, "0", "load"), load, capacity=2) is SITE
    assert get_or_load((1, "0", "load"), load, capacity=2) is SITE
    assert len(attempts) == 3


def test_site_loads_its_model_once_for_all_messages(make_site):
    calls = []

    def load_model(context):
        calls.append(1)
        return LocalModel(model=lambda rows: np.ones((len(rows), 2)), classes=["a", "b"])

    site = make_site(load_model)
    site.hello()
    for number in range(3):
        site.scores(query_id=f"q-{number}")
    assert len(calls) == 1


def test_site_whose_model_failed_to_load_tries_again(make_site):
    calls = []

    def load_model(context):
        calls.append(1)
        if len(calls) == 1:
            raise OSError
        return LocalModel(model=lambda rows: np.ones((len(rows), 2)), classes=["a", "b"])

    site = make_site(load_model)
    assert site.error().code == "FI403"
    assert site.scores().shape == (2, 2)


def test_sites_of_other_runs_and_partitions_do_not_share_a_model(make_site):
    def load_model(context):
        name = f"r{context.run_id}-p{context.node_config['partition-id']}"
        return LocalModel(model=lambda rows: np.ones((len(rows), 2)), classes=["a", name])

    first, second = make_site(load_model), make_site(load_model)
    names = {site.profile().classes[1] for site in (first, second)}
    first.context.node_config["partition-id"] = 1
    names.add(first.profile().classes[1])
    assert len(names) == 3
