"""`FedCalibrate`: a threshold for prediction sets from the sites' held-out rows."""

from __future__ import annotations

import logging
import secrets
import time

from flwr.app import Message
from flwr.serverapp import Grid

from fedinfer_flower.errors import (
    FedInferError,
    InvalidValueError,
    KeyAtCoordinatorError,
    QuorumNotMetError,
)
from fedinfer_flower.planning.label_space import shared_classes
from fedinfer_flower.privacy.base import CoordinatorSide, Protection, key_id_of, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.key_presence import secret_in_process
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.onboarding import onboard, read_arrival, wait_for_nodes
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.strategies.recovery_rounds import ANSWER_SHARE
from fedinfer_flower.uncertainty.combined_histogram import CombinedHistogram
from fedinfer_flower.uncertainty.conformal import OWN
from fedinfer_flower.uncertainty.federated_quantile import (
    HistogramSpec,
    coordinator_sum,
    require_protection,
)
from fedinfer_flower.wire.actions import RECOVER, message_type
from fedinfer_flower.wire.calibrate import (
    CALIBRATE,
    CalibrationCall,
    calibration,
    read_histogram,
)
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, WireLimits
from fedinfer_flower.wire.records import content_digest, pack
from fedinfer_flower.wire.recovery import RecoveryCall, read_recovered, recovery
from fedinfer_flower.wire.roster import Roster

__all__ = ["FedCalibrate"]

log = logging.getLogger("fedinfer_flower.coordinator")


class FedCalibrate:
    """Sum the sites' histograms of nonconformity, for the querier to read a quantile from.

    Sites score their own held-out rows with their own models: see
    `uncertainty.federated_quantile` for what the threshold promises, and about whose answers.
    For joint answers use `ConformalPredictor.from_audits`.

    Parameters
    ----------
    spec : HistogramSpec
        What is counted; its scope is "own".
    protection : str or Protection
    deadline : Deadline
        Seconds and quorum.
    min_available_nodes : int
        Nodes to wait for; with 0, at least two and until no more are joining.
    patience_s : float
        How long to wait for them.
    classes : tuple of str, optional
        Label space; default the union of the sites' classes.
    allow_coordinator_key : bool
        Permit the querier's secret key in this process.
    limits : WireLimits

    Raises
    ------
    IncompatibleProtection
        When built, if the protection cannot carry counts.
    InvalidValueError
        If the spec asks for joint answers, which sites do not have here.

    Privacy
    -------
    The coordinator sees of each site's histogram what the protection reveals; the querier
    the sum. Sites take part only where their owners agreed to calibration.

    Examples
    --------
    >>> FedCalibrate(protection="secagg").spec.n_bins
    200
    """

    def __init__(
        self,
        *,
        spec: HistogramSpec | None = None,
        protection: str | Protection = "secagg",
        deadline: Deadline | None = None,
        min_available_nodes: int = 0,
        patience_s: float = 60.0,
        classes: tuple[str, ...] | None = None,
        allow_coordinator_key: bool = False,
        limits: WireLimits = DEFAULT_LIMITS,
    ) -> None:
        self.spec = spec or HistogramSpec()
        if self.spec.scope != OWN:
            raise _joint()
        self.protection = (
            make_protection(protection, {}) if isinstance(protection, str) else protection
        )
        require_protection(self.protection)
        self.deadline = deadline or Deadline()
        self.min_available_nodes, self.patience_s = min_available_nodes, patience_s
        self.classes = classes
        self.allow_coordinator_key = allow_coordinator_key
        self.limits = limits

    def start(self, grid: Grid, *, public_key: bytes = b"") -> CombinedHistogram:
        """Ask all sites and return the sum, which the querier opens.

        Parameters
        ----------
        grid : Grid
        public_key : bytes
            The querier's, of ``protection.make_keys()``; empty under `plain` and `dp` alone.

        Raises
        ------
        KeyAtCoordinatorError
            If the secret key of a protection that needs one is in this process.
        InvalidValueError
            Without a public key where one is needed.
        NotEnoughNodesError, QuorumNotMetError
            If too few sites are there or answer.
        """
        if (self.protection.needs_roster or self.protection.needs_key) and not public_key:
            raise InvalidValueError(
                f"histograms under {self.protection.name!r} are for whoever holds a key, and no"
                " public key was given",
                hint="start(grid, public_key=keys.public_key), of the querier's"
                " protection.make_keys()",
            )
        key_id = key_id_of(public_key)
        here = self.protection.needs_key and secret_in_process(key_id)
        if here and not self.allow_coordinator_key:
            raise KeyAtCoordinatorError(
                "the secret key that opens the histograms is in the coordinator's process",
                hint="make the keys in another process, or use protection 'secagg'",
            )
        run_id = int(grid.run.run_id)
        cards = self._onboard(grid, run_id)
        call = self._call(cards, public_key=public_key, key_id=key_id)
        content = pack(calibration(call, run_id=run_id))
        digest = content_digest(content)
        cohort = Cohort(
            query_id=call.query_id, roster=call.roster, public_key=public_key, content=digest
        )
        side = coordinator_sum(
            self.spec,
            self.protection,
            n_sites_max=call.n_sites,
            public_key=public_key,
            cohort=cohort,
        )
        timeout_s, start = self.deadline.timeout_s, time.monotonic()
        first_s = ANSWER_SHARE * timeout_s if self.protection.needs_roster else timeout_s
        asks = [
            Message(
                content, node_id, message_type(CALIBRATE), ttl=timeout_s, group_id=call.query_id
            )
            for node_id in cards
        ]
        self._collect(grid, asks, cards, call, side, run_id=run_id, timeout_s=first_s)
        self._require_quorum(side, call)
        self._recover(grid, side, cards, call, digest, run_id=run_id, end=start + timeout_s)
        return CombinedHistogram(
            query_id=call.query_id,
            spec=self.spec,
            classes=call.classes,
            n_sites=side.n_sites,
            protection=self.protection.name,
            protection_options=self.protection.options(),
            roster=call.roster,
            total=side.total(),
            content=digest,
            key_id=key_id,
        )

    def _onboard(self, grid: Grid, run_id: int) -> dict[int, SiteCard]:
        nodes = wait_for_nodes(
            grid,
            at_least=self.min_available_nodes or max(2, self.protection.min_cohort),
            patience_s=self.patience_s,
            settle_s=0.0 if self.min_available_nodes else 0.5,
        )
        found = onboard(
            grid, nodes, run_id=run_id, timeout_s=self.deadline.timeout_s, limits=self.limits
        )
        if len(found.cards) < max(self.deadline.quorum, self.protection.min_cohort):
            raise QuorumNotMetError(
                f"{len(found.cards)} sites could be onboarded for a calibration",
                hint="start more sites, or mend those that failed",
            )
        return found.cards

    def _call(
        self, cards: dict[int, SiteCard], *, public_key: bytes, key_id: str
    ) -> CalibrationCall:
        profiles = {node_id: card.profile for node_id, card in cards.items()}
        return CalibrationCall(
            query_id=secrets.token_hex(16),
            classes=self.classes or shared_classes(profiles),
            n_sites=len(cards),
            n_bins=self.spec.n_bins,
            max_rows=self.spec.max_rows,
            method=self.spec.method,
            protection=self.protection.name,
            protection_options=self.protection.options(),
            roster=Roster(tuple(card.seat for card in cards.values())),
            public_key=public_key,
            key_id=key_id,
        )

    def _collect(
        self,
        grid: Grid,
        asks: list[Message],
        cards: dict[int, SiteCard],
        call: CalibrationCall,
        side: CoordinatorSide,
        *,
        run_id: int,
        timeout_s: float,
    ) -> None:
        for arrival in stream_replies(grid, asks, timeout_s=timeout_s):
            card = cards[arrival.node_id]
            try:
                envelope = read_arrival(arrival, run_id=run_id, limits=self.limits)
                payload = read_histogram(
                    envelope,
                    call,
                    run_id=run_id,
                    sender=arrival.node_id,
                    commitment=card.profile.commitment(),
                )
                side.add(payload, sender=card.key_id)
            except FedInferError as exc:
                log.warning("%s", exc.at_site(card.profile.name))

    def _require_quorum(self, side: CoordinatorSide, call: CalibrationCall) -> None:
        needed = max(self.deadline.quorum, self.protection.least_sites(call.n_sites))
        if side.n_sites < needed:
            raise QuorumNotMetError(
                f"{side.n_sites} of {call.n_sites} sites gave a histogram, {needed} are needed",
                hint="see the log for why; sites must agree to calibration and hold rows out",
            )

    def _recover(
        self,
        grid: Grid,
        side: CoordinatorSide,
        cards: dict[int, SiteCard],
        call: CalibrationCall,
        digest: bytes,
        *,
        run_id: int,
        end: float,
    ) -> None:
        """Make good for sites that dropped out, where masks are left of them."""
        if not isinstance(side, MaskedSum):
            return
        nodes = {card.key_id: node_id for node_id, card in cards.items()}
        while requests := side.recovery_requests():
            left_s = max(end - time.monotonic(), 0.05)
            asks = [
                Message(
                    pack(recovery(self._recovery_call(call, request, digest), run_id=run_id)),
                    nodes[key_id],
                    message_type(RECOVER),
                    ttl=left_s,
                    group_id=call.query_id,
                )
                for key_id, request in requests.items()
            ]
            for arrival in stream_replies(grid, asks, timeout_s=left_s):
                card = cards[arrival.node_id]
                try:
                    envelope = read_arrival(arrival, run_id=run_id, limits=self.limits)
                    reply = read_recovered(
                        envelope, query_id=call.query_id, run_id=run_id, sender=arrival.node_id
                    )
                    side.add_recovery(reply, sender=card.key_id)
                except FedInferError as exc:
                    log.warning("%s", exc.at_site(card.profile.name))

    @staticmethod
    def _recovery_call(call: CalibrationCall, request: bytes, digest: bytes) -> RecoveryCall:
        return RecoveryCall(
            query_id=call.query_id,
            protection=call.protection,
            protection_options=call.protection_options,
            public_key=call.public_key,
            roster=call.roster,
            request=request,
            content=digest,
        )


def _joint() -> FedInferError:
    return InvalidValueError(
        "sites have no joint answers to their held-out rows here",
        hint="ConformalPredictor.from_audits; or sites ask their own rows, and give"
        " site_histogram(scores, HistogramSpec(scope='joint'))",
    )
