from __future__ import annotations

import pytest

from fedinfer_flower.attacks import TargetFederation


@pytest.fixture(scope="session")
def federation() -> TargetFederation:
    """Five overfit sites on digits; the same for all tests."""
    return TargetFederation.digits(seed=0)
