"""Payment rules: from contribution scores to integer micro-credits."""

from fedinfer_flower.incentives.payments.base import (
    MICRO,
    PAYMENTS,
    PaymentRule,
    Payout,
    apportion,
    make_payment,
)

__all__ = ["MICRO", "PAYMENTS", "PaymentRule", "Payout", "apportion", "make_payment"]
