"""Which sites are here: joining, leaving, failing, coming back, sharing a key."""

from __future__ import annotations

import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower.errors import SiteFailedError, UnavailableError
from fedinfer_flower.query import SiteId, SiteOutcome, SiteStatus
from fedinfer_flower.serving.hub import GridHub
from fedinfer_flower.serving.membership import Membership
from fedinfer_flower.wire.pins import Pins


@pytest.fixture
def make(bed):
    made = []

    def build(sites, **options) -> Membership:
        hub = GridHub(sites.grid)
        hub.start()
        members = Membership(hub, run_id=sites.grid.run_id, **options)
        made.append((members, hub))
        members.start()
        return members

    yield build
    for members, hub in made:
        members.close()
        hub.close()


def outcome(node_id: int, status: SiteStatus, *, code: str = "") -> SiteOutcome:
    return SiteOutcome(
        site_id=SiteId(node_id), name="s", status=status, seconds=0.5, error_code=code
    )


def test_sites_are_found_and_a_directory_of_them_is_made_once(bed, make):
    changes = []
    members = make(bed.sites(), changed=lambda: changes.append(1))

    bed.until(lambda: len(members.cards()) == 3)

    assert members.directory() is members.directory()
    assert [c.profile.name for c in members.directory().cards] == ["site-0", "site-1", "site-2"]
    assert changes
    assert all(m.last_seen_at > 0.0 for m in members.members())


def test_without_sites_there_is_no_directory(bed, make):
    members = make(bed.sites(1))
    with pytest.raises(UnavailableError):
        members.directory({})


def test_site_that_leaves_is_left_out_and_asked_anew_when_it_is_back(bed, make, monkeypatch):
    sites = bed.sites()
    members = make(sites)
    bed.until(lambda: len(members.cards()) == 3)
    nodes = sites.grid.get_node_ids()
    with monkeypatch.context() as patched:
        patched.setattr(sites.grid, "get_node_ids", lambda: nodes[:2])
        bed.until(lambda: len(members.cards()) == 2)
        assert [m.online for m in members.members()] == [True, True, False]
    bed.until(lambda: len(members.cards()) == 3)

    bed.until(lambda: sites.asked["fi_hello", 2] == 2)
    assert sites.asked["fi_hello", 0] == 1


def test_site_that_fails_is_shown_with_its_typed_error_and_asked_again(bed, make):
    sites = bed.sites()

    def fail_once(action, partition, *_):
        if partition == 1 and sites.asked["fi_hello", 1] == 1:
            raise RuntimeError("broken")

    sites.instead = fail_once
    members = make(sites)
    bed.until(lambda: len(members.cards()) == 2)
    bed.until(lambda: members.members()[1].error is not None)
    assert isinstance(members.members()[1].error, SiteFailedError)

    bed.until(lambda: len(members.cards()) == 3)

    assert members.members()[1].error is None


def test_silent_site_is_left_out_and_holds_up_nobody(bed, make):
    sites = bed.sites()
    sites.instead = lambda action, partition, *_: (
        sites.hanging.wait(20.0) and None if partition == 2 else None
    )
    members = make(sites, hello_s=0.3)

    bed.until(lambda: len(members.cards()) == 2)
    bed.until(lambda: members.members()[2].error is not None)

    assert "no profile" in members.members()[2].error.message


def test_stale_and_late_sites_are_asked_for_their_cards_at_once(bed, make):
    sites = bed.sites()
    members = make(sites)
    bed.until(lambda: len(members.cards()) == 3)
    nodes = [m.node_id for m in members.members()]

    stale = members.note(
        [
            outcome(nodes[0], SiteStatus.ANSWERED),
            outcome(nodes[1], SiteStatus.FAILED, code="FI303"),
            outcome(nodes[2], SiteStatus.LATE),
        ]
    )

    assert stale == {nodes[1]}
    assert members.renew(stale, timeout_s=10.0)
    bed.until(lambda: sites.asked["fi_hello", 2] == 2)
    assert [sites.asked["fi_hello", k] for k in range(3)] == [1, 2, 2]
    assert [(m.answers, m.failures) for m in members.members()] == [(1, 0), (0, 1), (0, 1)]
    assert members.members()[0].latency_s == 0.5


def test_of_sites_that_show_one_key_the_first_alone_is_asked(bed, make, tmp_path):
    sites = bed.sites(3, home=lambda context: tmp_path / "shared")
    # All partitions but the last have the same folder: a copied key.
    app = sites.grid.client_app
    assert isinstance(app, ClientApp)
    for node_id, context in sites.grid._contexts.items():
        if node_id != max(sites.grid._contexts):
            context.node_config["partition-id"] = 0
    members = make(sites)

    bed.until(lambda: all(m.card is not None for m in members.members()) and members.cards())

    bed.until(lambda: len(members.cards()) == 2)
    first, second, other = (m.error is not None for m in members.members())
    assert first != second
    assert not other


def test_site_that_the_operator_does_not_know_is_shown_and_not_asked(bed, make):
    sites = bed.sites()
    first = make(sites)
    bed.until(lambda: len(first.cards()) == 3)
    keys = {c.profile.name: c.key_id for c in first.cards().values()}
    known = Pins(sites={"site-0": keys["site-0"], "site-1": keys["site-2"]})

    members = make(sites, pins=known)
    bed.until(lambda: sum(m.error is not None for m in members.members()) == 2)

    assert [c.profile.name for c in members.cards().values()] == ["site-0"]
    assert {m.error.code for m in members.members() if m.error is not None} == {"FI311"}
