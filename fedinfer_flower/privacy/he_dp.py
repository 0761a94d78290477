"""Homomorphic encryption of noisy integers: the querier decrypts a sum that is private."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import PROTECTIONS
from fedinfer_flower.privacy.distributed_noise import SharedNoise, check_noise_options
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.he_schemes import BFV

__all__ = ["HeDP"]


@PROTECTIONS.register("he+dp")
@dataclass(frozen=True, kw_only=True)
class HeDP(SharedNoise, HomomorphicEncryption):
    """Encrypt scores with a part of Gaussian noise in each, so that their sum holds all of it.

    Use where `he` suits and the querier asks many queries; prefer `secagg+dp` where
    coordinator and querier might pool what they see.

    Parameters
    ----------
    scheme : str
        ``"bfv"`` only: noise is added to integers.
    epsilon, delta : float
        Privacy of one row of one site's answer towards the querier; see `secagg+dp`.
    dropout_share : float
        Share of the sites, in [0, 0.5), that may fail to answer; more end the batch.
    collusion_share : float
        Share of the sites, in [0, 0.5), that may tell the querier their own noise.

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    As `he`, and: the sum that the querier decrypts is (epsilon, delta)-private for
    replacing one site's whole answer to a row, also if up to `collusion_share` of the
    sites tell it their noise. That the sum is of as many sites as it claims is the
    coordinator's word. Coordinator and querier together decrypt each site's answer under
    its own part of the noise alone, which protects it little. A site with a home folder
    answers a row once: no site can tell whether an earlier sum lacked one of them.

    Examples
    --------
    >>> HeDP(epsilon=2.0).least_sites(100)
    67
    """

    epsilon: float = 1.0
    delta: float = 1e-5
    dropout_share: float = 1 / 3
    collusion_share: float = 0.1

    ring = BFV.plain_modulus

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme != BFV.name:
            raise InvalidValueError(
                "protection 'he+dp' adds noise to integers, which scheme 'ckks' has not",
                hint="scheme='bfv'",
            )
        check_noise_options(
            epsilon=self.epsilon,
            delta=self.delta,
            dropout_share=self.dropout_share,
            collusion_share=self.collusion_share,
        )

    def least_sites(self, n_sites_max: int) -> int:
        """Return the fewest sites of a cohort whose sum holds enough noise."""
        dropouts = math.floor(self.dropout_share * n_sites_max + 1e-9)
        return max(self.min_cohort, n_sites_max - dropouts)
