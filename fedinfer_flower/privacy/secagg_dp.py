"""Secure aggregation of noisy integers: the querier opens a sum that is private by itself."""

from __future__ import annotations

from dataclasses import dataclass

from fedinfer_flower.privacy.base import PROTECTIONS
from fedinfer_flower.privacy.distributed_noise import SharedNoise, check_noise_options
from fedinfer_flower.privacy.secagg import RING, SecAgg

__all__ = ["SecAggDP"]


@PROTECTIONS.register("secagg+dp")
@dataclass(frozen=True, kw_only=True)
class SecAggDP(SharedNoise, SecAgg):
    """Mask scores with a part of Gaussian noise in each, so that their sum holds all of it.

    Use where one federation answers many queries and the querier is not to learn about any
    one site. For the same epsilon the noise in the answer is that of one site under `dp`,
    not of all: with N sites the accuracy of `dp` at a noise smaller by sqrt(N).

    Parameters
    ----------
    dropout_share, self_mask
        As for `secagg`. The noise is provisioned for this share of dropouts, and fewer
        answers end the batch.
    epsilon : float
        Privacy of one row of one site's answer, in (0, 64], towards the querier and
        everyone. **A site's total grows with every row**: give the sites a budget.
    delta : float
        In (0, 1e-3].
    collusion_share : float
        Share of the sites, in [0, 0.5), that may tell the querier their own noise.

    Raises
    ------
    InvalidValueError
        If an option is out of range.

    Privacy
    -------
    As `secagg`, and: the sum is (epsilon, delta)-private for replacing one site's whole
    answer to a row, towards querier and coordinator, alone or pooling what they see, and
    together with up to `collusion_share` of the sites. With more, the noise that is left
    shrinks: with k sites pooling, by sqrt((N - D - k) / (N - D - c)). Coordinator and
    querier that lie together about dropouts can open one site's answer under its own part
    of the noise alone, which protects it little; `self_mask` prevents that. Nothing is
    claimed for sites that leave out their noise beyond `collusion_share`. Without
    `self_mask`, coordinator and querier pooling also have the answer of a site whose reply
    arrives after the others made good for it, under its own part of the noise alone.

    Examples
    --------
    >>> SecAggDP(epsilon=2.0).least_sites(100)
    67
    """

    epsilon: float = 1.0
    delta: float = 1e-5
    collusion_share: float = 0.1

    ring = RING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise_options(
            epsilon=self.epsilon,
            delta=self.delta,
            dropout_share=self.dropout_share,
            collusion_share=self.collusion_share,
        )
