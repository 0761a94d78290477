"""What a site remembers: in Flower's context for a run, in its home for ever."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import Context, RecordDict

from fedinfer_flower.clients.site_memory import ContextMemory, HomeMemory
from fedinfer_flower.errors import BindingError, ConfigError, DifferencingError, ReplayError
from fedinfer_flower.privacy.site_budget import BudgetPolicy

POLICY = BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=2.0)
FILES = ("identity.json", "queries.sqlite", "cohorts.sqlite", "answers.sqlite", "budget.sqlite")


@pytest.fixture(params=["context", "home"])
def reopen(request, tmp_path):
    """Return a function that opens the same memory again."""
    if request.param == "home":
        return lambda: HomeMemory(tmp_path / "home")
    context = Context(run_id=1, node_id=2, state=RecordDict(), run_config={}, node_config={})
    return lambda: ContextMemory(context)


def test_identity_and_row_key_stay(reopen):
    one, two = reopen(), reopen()
    assert one.identity.key_id == two.identity.key_id
    assert one.row_key() == two.row_key()
    assert len(one.row_key()) == 32


def test_row_key_is_not_the_signing_key(reopen):
    memory = reopen()
    assert memory.row_key() != memory.identity.signing.private_bytes_raw()


def test_query_id_is_used_once(reopen):
    reopen().admit("q-0", b"context")
    with pytest.raises(ReplayError, match="fresh query id"):
        reopen().admit("q-0", b"other")
    assert reopen().answered("q-0") == b"context"
    reopen().admit("q-1", b"")
    assert reopen().answered("q-1") == b""


def test_query_that_was_never_answered_has_no_recovery(reopen):
    with pytest.raises(BindingError, match="has not answered"):
        reopen().answered("q-0")


def test_names_of_queries_and_of_the_record_s_own_fields_do_not_meet(reopen):
    for name in ("identity", "q:x", "d:x"):
        reopen().admit(name, b"c")
        assert reopen().answered(name) == b"c"
    assert reopen().identity.key_id


def test_one_set_of_dropped_sites_a_query(reopen):
    memory = reopen()
    memory.admit("q-0", b"c")
    if memory.guard is not None:
        memory.guard.admit("q-0", [bytes(32)], b"roster", survivors_known=True)
    memory.admit_dropped("q-0", frozenset({"a", "b"}))
    reopen().admit_dropped("q-0", frozenset({"b", "a"}))
    for other in (frozenset({"a"}), frozenset(), frozenset({"a", "b", "c"})):
        with pytest.raises(DifferencingError, match="ask again"):
            reopen().admit_dropped("q-0", other)


def test_nobody_dropped_is_a_set_too(reopen):
    reopen().admit("q-0", b"c")
    reopen().admit_dropped("q-0", frozenset())
    with pytest.raises(DifferencingError):
        reopen().admit_dropped("q-0", frozenset({"a"}))


def test_home_refuses_a_recovery_that_its_guard_refuses(tmp_path):
    memory = HomeMemory(tmp_path)
    for query_id in ("q-0", "q-1"):  # the same row in two sums
        memory.admit(query_id, b"c")
        memory.guard.admit(query_id, [bytes(32)], b"roster", survivors_known=True)
    with pytest.raises(DifferencingError):
        memory.admit_dropped("q-1", frozenset({"a"}))
    # Refused is not recorded: with nobody missing there is nothing to compare.
    memory.admit_dropped("q-1", frozenset())


# -- files ---------------------------------------------------------------------------------


def test_files_are_their_owner_s_alone(tmp_path):
    home = tmp_path / "deep" / "home"
    HomeMemory(home, POLICY)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert sorted(path.name for path in home.iterdir()) == sorted(FILES)
    for path in home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["garbage", "empty", "readable", "folder"])
def test_damaged_file_is_refused_and_not_replaced(tmp_path, name, damage):
    HomeMemory(tmp_path, POLICY)
    path = tmp_path / name
    if damage == "readable":
        path.chmod(0o644)
    elif damage == "folder":
        path.unlink()
        path.mkdir(mode=0o700)
    else:
        path.write_bytes(b"x" * 5000 if damage == "garbage" else b"")
    before = path.stat().st_mode, path.is_file() and path.read_bytes()
    with pytest.raises(ConfigError):
        HomeMemory(tmp_path, POLICY)
    assert (path.stat().st_mode, path.is_file() and path.read_bytes()) == before


@pytest.mark.parametrize("name", FILES[1:])
def test_deleted_file_is_noticed_and_not_made_anew(tmp_path, name):
    HomeMemory(tmp_path, POLICY)
    (tmp_path / name).unlink()
    for _ in range(2):
        with pytest.raises(ConfigError):
            HomeMemory(tmp_path, POLICY)
    assert not (tmp_path / name).exists()


def test_budget_can_be_added_later_and_not_left_out_again(tmp_path):
    HomeMemory(tmp_path)
    assert HomeMemory(tmp_path, POLICY).budget is not None
    with pytest.raises(ConfigError, match="would not be counted"):
        HomeMemory(tmp_path)


def test_threads_that_start_together_share_one_memory(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: HomeMemory(tmp_path, POLICY), range(16)))
    assert len({memory.identity.key_id for memory in found}) == 1
    found[0].admit("q-0", b"c")
    assert all(memory.answered("q-0") == b"c" for memory in found)


def test_new_identity_beside_old_memory_is_refused(tmp_path):
    HomeMemory(tmp_path)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ConfigError, match="another key"):
        HomeMemory(tmp_path)


def test_home_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises((ConfigError, OSError)):
        HomeMemory(tmp_path / "home")
