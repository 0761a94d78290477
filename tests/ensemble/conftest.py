import numpy as np
import pytest

from fedinfer_flower.ensemble import RULES, SiteContext


@pytest.fixture
def plain_site():
    """Return a function that makes a site which knows all classes and shares nothing."""
    return lambda n_classes: SiteContext(present=np.ones(n_classes, dtype=np.bool_))


@pytest.fixture
def own_registry(monkeypatch):
    """Let a test register rules without leaving them behind."""
    RULES.names()
    monkeypatch.setattr(RULES, "_members", dict(RULES._members))
    return RULES
