"""The database under a ledger: making it, moving it between releases, and what can be wrong."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from fedinfer_flower.errors import (
    ConfigError,
    FedInferError,
    InvalidValueError,
    LedgerError,
    MissingExtraError,
)
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.incentives.ledger.migrating import migrate_to, revision_of
from fedinfer_flower.incentives.ledger.store import Store

from .conftest import FEE, Opened

CANARY = "canary-7f3a"


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ledger.db",
        "sqlite://",
        "sqlite:///:memory:",
        f"mysql://user:{CANARY}@host/db",
        f"nonsense://user:{CANARY}@host/db",
        f"sqlite:///file:{CANARY}?mode=memory",
    ],
)
def test_url_of_another_kind_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Ledger(url)
    assert CANARY not in str(caught.value)


def test_postgres_without_driver_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[postgres\]"):
        Ledger(f"postgresql://user:{CANARY}@localhost/db")


def test_server_that_is_not_there_is_a_typed_error_without_the_password() -> None:
    pytest.importorskip("psycopg")
    ledger = Ledger(f"postgresql://user:{CANARY}@127.0.0.1:1/db")
    with pytest.raises(ConfigError) as caught:
        ledger.head()
    assert CANARY not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_ledger_that_was_never_made_is_not_made_by_reading(sqlite_url: str) -> None:
    ledger = Ledger(sqlite_url)
    with pytest.raises(ConfigError):
        ledger.head()
    assert not path_of(sqlite_url).exists()


def test_empty_database_asks_for_migrate(url: str) -> None:
    if url.startswith("sqlite"):
        path_of(url).touch()
    with pytest.raises(LedgerError, match="migrate"):
        Ledger(url).balance("clinic")


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_file_is_its_owners_alone(sqlite_opened: Opened) -> None:
    assert stat.S_IMODE(path_of(sqlite_opened.url).stat().st_mode) == 0o600


def test_file_that_is_no_database_is_a_typed_error(sqlite_url: str) -> None:
    path_of(sqlite_url).write_bytes(b"no database, but long enough to look at" * 100)
    for act in (Ledger(sqlite_url).head, Ledger(sqlite_url).migrate):
        with pytest.raises(ConfigError, match="SQLITE_NOTADB"):
            act()


def test_damaged_page_is_a_typed_error_or_named_by_verify(sqlite_opened: Opened) -> None:
    for number in range(50):
        sqlite_opened.ledger.deposit("clinic", 1, key=f"k{number}")
    path = path_of(sqlite_opened.url)
    data = bytearray(path.read_bytes())
    # Each page but the first, which holds the tables' names, one at a time.
    for page in range(1, len(data) // 4096):
        broken = data.copy()
        broken[page * 4096 : page * 4096 + 512] = b"\xaa" * 512
        path.write_bytes(broken)
        try:
            assert not sqlite_opened.ledger.verify().ok, page
        except ConfigError:
            continue
    path.write_bytes(data)
    assert sqlite_opened.ledger.verify().ok


def test_full_disk_loses_nothing_that_was_written(sqlite_opened: Opened, monkeypatch) -> None:
    connect = Store._connect_sqlite

    def nearly_full(self):
        db = connect(self)
        used = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {used}")
        return db

    with monkeypatch.context() as full:
        full.setattr(Store, "_connect_sqlite", nearly_full)
        ledger, done = Ledger(sqlite_opened.url), []
        with pytest.raises(ConfigError, match="SQLITE_FULL"):
            done.extend(ledger.deposit("clinic", 1, key=f"k{number}") for number in range(1000))
    found = sqlite_opened.ledger.verify()
    assert found.ok
    assert found.balances["clinic"] == 10 * FEE + len(done)
    assert found.n_entries == 2 + len(done)
    sqlite_opened.ledger.deposit("clinic", 1, key="after")


def test_failure_inside_an_operation_undoes_all_of_it(opened: Opened) -> None:
    from fedinfer_flower.incentives.ledger.entry import Draft

    def fail_late() -> None:
        with opened.ledger.writing() as book:
            book.append(Draft(kind="fee", key="f1", amounts={"clinic": -1, "north": 1}))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_late()
    assert opened.ledger.balance("north") == 0
    assert opened.ledger.verify().n_entries == 2


def test_error_of_the_database_does_not_quote_what_was_written(opened: Opened) -> None:
    opened.ledger.post("fee", "f1", {"clinic": -1, CANARY: 1})
    edit = f"UPDATE ledger_postings SET amount = 2 WHERE account = '{CANARY}'"  # noqa: S608
    with pytest.raises(LedgerError) as caught, opened.ledger.writing() as book:
        book.rows(edit)
    assert CANARY not in str(caught.value)
    assert isinstance(caught.value, FedInferError)


def test_reader_cannot_write(opened: Opened) -> None:
    if opened.dialect == "sqlite":
        pytest.skip("a reader's transaction in SQLite could become a writer's")
    from fedinfer_flower.incentives.ledger.entry import Draft

    with pytest.raises(ConfigError), opened.ledger.reading() as book:
        book.append(Draft(kind="fee", key="f1", amounts={"clinic": -1, "north": 1}))


def test_writer_needs_insert_and_select_alone_on_postgres(postgres) -> None:
    opened = Opened(postgres())
    opened.ledger.migrate()
    schema = opened.sql("SELECT current_schema()")[0][0]
    tables = "ledger_entries, ledger_postings, ledger_claims"
    opened.sql(
        f"CREATE ROLE writer_{schema} LOGIN",
        f"GRANT USAGE ON SCHEMA {schema} TO writer_{schema}",
        f"GRANT SELECT, INSERT ON {tables} TO writer_{schema}",
        f"GRANT SELECT ON fedinfer_ledger_version TO writer_{schema}",
    )
    writer = Opened(opened.url.replace("//postgres@", f"//writer_{schema}@"))
    writer.ledger.deposit("clinic", 5, key="d")
    assert writer.ledger.verify().ok
    for edit in (
        "UPDATE ledger_entries SET at = 0",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_claims",
        "ALTER TABLE ledger_entries DISABLE TRIGGER ALL",
        "DROP TRIGGER ledger_entries_update ON ledger_entries",
    ):
        with pytest.raises(Exception, match=r"permission denied|must be owner"):
            writer.sql(edit)
    # A table of the same name that comes first in the writer's search path changes nothing.
    with pytest.raises(Exception, match="append-only"):
        writer.sql(
            "CREATE TEMPORARY TABLE ledger_entries (seq bigint)",
            "INSERT INTO pg_temp.ledger_entries VALUES (1)",
            "INSERT INTO ledger_postings VALUES (1, 'eve', 5, 5)",
        )


# -- migrations --------------------------------------------------------------------------


def test_migrations_go_back_and_forth_with_entries(opened: Opened) -> None:
    before = [json.dumps(e.to_dict()) for e in opened.ledger.entries()]
    store = Store(opened.url)
    with store.transaction(write=True) as connection:
        migrate_to(connection, "001")
        assert revision_of(connection) == "001"
    with pytest.raises(LedgerError, match="revision 001"):
        Ledger(opened.url).head()
    # Without the second revision nothing refuses an edit; with it again, something does.
    opened.sql("UPDATE ledger_entries SET at = at")
    Ledger(opened.url).migrate()
    with pytest.raises(Exception, match="append-only"):
        opened.sql("UPDATE ledger_entries SET at = at")
    assert [json.dumps(e.to_dict()) for e in opened.ledger.entries()] == before
    assert opened.ledger.verify().ok


def test_migration_back_to_nothing_is_refused_while_there_are_entries(opened: Opened) -> None:
    store = Store(opened.url)
    with (
        pytest.raises(LedgerError, match="not taken back"),
        store.transaction(write=True) as connection,
    ):
        migrate_to(connection, "base")
    # All of it was undone, the dropped triggers included.
    assert opened.ledger.verify().ok


def test_migration_back_to_nothing_of_an_empty_ledger(url: str) -> None:
    store = Store(url)
    store.create_file()
    with store.transaction(write=True) as connection:
        migrate_to(connection)
        migrate_to(connection, "base")
        assert revision_of(connection) == ""
        migrate_to(connection)
        assert revision_of(connection) == "002"


def test_ledger_of_a_newer_release_is_left_alone(opened: Opened) -> None:
    opened.sql("UPDATE fedinfer_ledger_version SET version_num = '099'")
    with pytest.raises(LedgerError, match="newer release"):
        Ledger(opened.url).balance("clinic")
    with pytest.raises(ConfigError, match="does not know"):
        Ledger(opened.url).migrate()


def test_migrating_at_once_makes_one_ledger(url: str) -> None:
    errors: list[BaseException] = []

    def make() -> None:
        try:
            Ledger(url).migrate()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert Ledger(url).verify().n_entries == 1


def test_migrating_again_changes_nothing(opened: Opened) -> None:
    head = opened.ledger.head()
    opened.ledger.migrate()
    assert opened.ledger.head() == head


def test_path_with_percent_and_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "100% of it"
    ledger = Ledger(f"sqlite:///{folder}/a ledger.db")
    ledger.migrate()
    assert ledger.verify().ok
    with closing(sqlite3.connect(folder / "a ledger.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM ledger_entries").fetchone() == (1,)


def test_ledger_id_differs(tmp_path: Path) -> None:
    heads = set()
    for name in "ab":
        ledger = Ledger(f"sqlite:///{tmp_path}/{name}.db", clock=lambda: 5.0)
        ledger.migrate()
        heads.add(ledger.head())
    assert len(heads) == 2
