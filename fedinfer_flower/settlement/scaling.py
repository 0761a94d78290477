"""How weights of an epoch fit the slots of a CKKS ciphertext."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.settlement.ckks_rows import (
    PRIME,
    PRODUCT_SCALE,
    ROWS,
    signed_constant,
)
from fedinfer_flower.settlement.epoch import Epoch
from fedinfer_flower.settlement.release_noise import gaussian_sums
from fedinfer_flower.settlement.ring import Array

__all__ = ["SlotScale"]


@dataclass(frozen=True, kw_only=True)
class SlotScale:
    """The unit of weights in slots.

    A row sum has to fit the constant coefficient, which holds up to twice 1024 slots of
    size one: so the largest weights of all rows together are at most 1024 units.

    Parameters
    ----------
    unit : float
        What a slot weight of 1 stands for, in contribution units.
    """

    unit: float

    @classmethod
    def of(cls, epoch: Epoch) -> SlotScale:
        """Return the scale of an epoch; the same at both roles, up to float rounding."""
        rows = float(np.abs(epoch.weights.weights_tc).max(axis=1).sum())
        return cls(unit=max(epoch.weights.peak, rows / ROWS.slots))

    def slot_weights(self, epoch: Epoch, query: int) -> Array:
        """Return the weights of one query's rows, zero where no audit is."""
        weights = np.zeros((epoch.request.queries[query][1], epoch.request.n_classes))
        places, rows = epoch.rows_in(query)
        weights[rows] = epoch.weights.weights_tc[places] / self.unit
        return weights

    def value(self, epoch: Epoch, constant: int) -> float:
        """Return the contribution that a constant coefficient stands for."""
        weights = epoch.weights.weights_tc
        return signed_constant(constant) * self.unit - float(weights.sum() / weights.shape[1])

    def noise(self, count: int, std: float) -> list[int]:
        """Draw noise for `count` constant coefficients.

        Parameters
        ----------
        std : float
            In contribution units.

        Raises
        ------
        InvalidValueError
            If ten deviations of it do not fit beside a row sum.
        """
        in_slots = std / self.unit
        if 10.0 * in_slots > ROWS.slots / 2:
            raise InvalidValueError(
                "the noise does not fit beside an encrypted row sum",
                hint=f"noise_std at most {self.unit * ROWS.slots / 20.0:.3g} in this epoch",
            )
        drawn = gaussian_sums(count, in_slots / ROWS.slots * PRODUCT_SCALE)
        return [int(one) % PRIME for one in drawn]
