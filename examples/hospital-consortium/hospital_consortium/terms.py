"""What registry, office and hospitals agreed on before the first question."""

import numpy as np

from fedinfer_flower.incentives import make_scheme
from fedinfer_flower.incentives.payments import MICRO, make_payment
from fedinfer_flower.incentives.shrinkage import shrink

PRICE = 0.05  # credits a row and hospital
FULL_SCORE = 0.4  # at which a hospital earns all of its part of the fee
PRIOR_AUDITS = 50.0  # as many audits without merit draw a score towards 0
SCHEME = make_scheme("audited-blend")
PAYMENT = make_payment("individually-rational", {"full_score": FULL_SCORE})


def fee_for(directory, n_rows):
    """Return micro-credits: what the sites of a directory ask for, audits included."""
    prices = sum(card.profile.price_per_query for card in directory.cards)
    return round(MICRO * prices * n_rows)


def payout_for(settlement, fee):
    """Return the sites' key ids, and what each is due: the treasurer's sum, done again."""
    key_ids = sorted(settlement.values)
    scores = np.array([settlement.values[key_id] for key_id in key_ids])
    scores = shrink(scores, settlement.n_audits, prior_audits=PRIOR_AUDITS)
    return key_ids, PAYMENT.pay(scores, fee=fee)
