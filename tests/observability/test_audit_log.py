"""Audit logs: what is written, what a crash leaves, and that every change is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedinfer_flower.cli.main import app as cli
from fedinfer_flower.errors import AuditLogError, FedInferError, InvalidValueError
from fedinfer_flower.observability.audit_files import rotated_files
from fedinfer_flower.observability.audit_log import AuditLog, verify_audit_log

CANARY = "canary-7f31"


def written(folder: Path, n_entries: int, **options) -> AuditLog:
    log = AuditLog(folder / "audit.jsonl", role="site", clock=lambda: 1_700_000_000.1234, **options)
    for place in range(n_entries):
        log.append("answered", query_id=f"q{place}", n_rows=place, epsilon=place / 8)
    return log


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    # Real ones are slow and change nothing here; the order of calls is tested apart.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# -- what is written ---------------------------------------------------------------------


def test_an_entry_is_one_canonical_line_bound_to_the_one_before(tmp_path):
    log = written(tmp_path, 2)

    first, second = map(json.loads, log.path.read_text().splitlines())

    assert first["previous"] == "0" * 64
    assert second["previous"] == first["hash"]
    assert (first["index"], second["index"]) == (0, 1)
    assert second["facts"] == {"query_id": "q1", "n_rows": 1, "epsilon": 0.125}
    assert second["at"] == 1_700_000_000.123
    assert log.head == second["hash"]


def test_only_the_owner_can_read_the_log(tmp_path):
    log = written(tmp_path / "new", 1)

    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o077 == 0


def test_a_log_that_others_can_read_is_refused(tmp_path):
    log = written(tmp_path, 1)
    log.path.chmod(0o644)

    with pytest.raises(AuditLogError, match="by others"):
        log.append("answered")
    with pytest.raises(AuditLogError, match="by others"):
        AuditLog(log.path, role="site")


def test_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(mode=0o600)
    (tmp_path / "audit.jsonl").symlink_to(elsewhere)

    with pytest.raises(AuditLogError, match="cannot be opened"):
        AuditLog(tmp_path / "audit.jsonl", role="site")


@pytest.mark.parametrize(
    "facts",
    [
        {"inputs": "x"},
        {CANARY: 1},
        {"query_id": CANARY * 40},
        {"query_id": f"{CANARY}\n"},
        {"query_id": f"{CANARY}\u202e"},
        {"query_id": CANARY.encode()},
        {"n_rows": [CANARY]},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"n_rows": 2**63},
        {"n_rows": None},
    ],
    ids=[
        *("unknown-name", "name-of-data", "long", "line-end", "turned", "bytes", "list"),
        *("nan", "infinite", "huge", "none"),
    ],
)
def test_a_fact_that_may_not_be_written_is_refused_without_its_value(tmp_path, facts):
    log = written(tmp_path, 1)
    before = log.path.read_bytes()

    with pytest.raises(AuditLogError) as caught:
        log.append("answered", **facts)

    assert CANARY not in str(caught.value)
    assert log.path.read_bytes() == before


def test_an_event_is_a_fixed_word(tmp_path):
    with pytest.raises(AuditLogError, match="kebab-case"):
        written(tmp_path, 0).append("What is the capital of France?")


@pytest.mark.parametrize(
    "options",
    [{"role": "nobody"}, {"role": "site", "max_file_bytes": 10}],
    ids=["role", "size"],
)
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(InvalidValueError):
        AuditLog(tmp_path / "audit.jsonl", **options)


def test_a_log_of_another_role_is_not_written_on(tmp_path):
    log = written(tmp_path, 2)

    with pytest.raises(AuditLogError, match="another role"):
        AuditLog(log.path, role="gateway")


# -- several writers ---------------------------------------------------------------------


def test_threads_and_two_objects_share_one_chain(tmp_path):
    logs = [written(tmp_path, 0), written(tmp_path, 0)]
    threads = [
        threading.Thread(target=lambda log=log: [log.append("answered") for _ in range(20)])
        for log in logs * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = verify_audit_log(logs[0].path)

    assert (found.ok, found.n_entries) == (True, 80)


def test_processes_share_one_chain(tmp_path):
    code = (
        "import sys; from pathlib import Path;"
        "from fedinfer_flower.observability.audit_log import AuditLog;"
        "log = AuditLog(Path(sys.argv[1]), role='site', max_file_bytes=1 << 16);"
        "[log.append('answered', query_id='q' * 190, name='n' * 190) for _ in range(60)]"
    )
    path = tmp_path / "audit.jsonl"
    started = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]

    found = verify_audit_log(path)

    assert (found.ok, found.n_entries) == (True, 180)
    assert rotated_files(path)


def test_a_forked_child_writes_on(tmp_path):
    log = written(tmp_path, 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log.append("answered")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    log.append("answered")

    assert verify_audit_log(log.path).n_entries == 3


# -- crashes and disks -------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 40, 200], ids=lambda n: f"{n}-bytes")
def test_a_torn_line_is_moved_aside_and_told(tmp_path, kept):
    log = written(tmp_path, 3)
    line = log.path.read_bytes().splitlines(keepends=True)[-1]
    torn = line[:kept]
    with log.path.open("ab") as stream:
        stream.write(torn)
    assert not verify_audit_log(log.path).ok

    again = written(tmp_path, 1)

    events = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [e["event"] for e in events] == ["answered"] * 3 + ["recovered", "answered"]
    assert events[3]["facts"] == {"torn_bytes": kept}
    assert (tmp_path / "audit.3.torn").read_bytes() == torn
    assert (tmp_path / "audit.3.torn").stat().st_mode & 0o077 == 0
    assert verify_audit_log(again.path, head=log.head).ok


def test_a_first_line_that_was_torn_is_recovered(tmp_path):
    log = written(tmp_path, 1)
    log.path.write_bytes(log.path.read_bytes()[:30])

    again = written(tmp_path, 0)

    assert verify_audit_log(again.path).n_entries == 1
    assert (tmp_path / "audit.0.torn").exists()


def test_what_is_no_line_at_the_end_is_not_cut_off(tmp_path):
    log = written(tmp_path, 1)
    with log.path.open("ab") as stream:
        stream.write(b"\0" * 70_000)

    with pytest.raises(AuditLogError, match="no line"):
        AuditLog(log.path, role="site")
    assert log.path.stat().st_size > 70_000


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_a_disk_that_fails_is_a_typed_error_and_leaves_the_chain_whole(tmp_path, monkeypatch, call):
    log = written(tmp_path, 2)
    head, kept = log.head, log.path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, f"No space left on device: {CANARY}")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        with pytest.raises(AuditLogError) as caught:
            log.append("answered", query_id="lost")
    assert CANARY not in str(caught.value)
    assert log.path.read_bytes() == kept

    log.append("answered", query_id="later")
    found = verify_audit_log(log.path, head=head)
    assert (found.ok, found.n_entries) == (True, 3)


def test_a_write_that_is_cut_short_is_taken_back(tmp_path, monkeypatch):
    log = written(tmp_path, 1)
    kept = log.path.read_bytes()
    write = os.write

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(AuditLogError):
            log.append("answered")

    assert log.path.read_bytes() == kept


def test_an_entry_is_on_disk_before_append_returns(tmp_path, monkeypatch):
    log, calls = written(tmp_path, 1), []
    write = os.write
    monkeypatch.setattr(os, "write", lambda *a: (calls.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))

    log.append("answered")

    assert calls == ["write", "fsync"]


def test_a_log_that_was_set_back_in_use_is_noticed(tmp_path):
    log = written(tmp_path, 2)
    older = log.path.read_bytes()
    log.append("answered")
    log.path.write_bytes(older)

    with pytest.raises(AuditLogError, match="older state"):
        log.append("answered")


def test_a_last_line_that_was_altered_is_not_written_on(tmp_path):
    log = written(tmp_path, 2)
    log.path.write_bytes(log.path.read_bytes().replace(b'"q1"', b'"q7"'))

    with pytest.raises(AuditLogError, match="hash of its content"):
        written(tmp_path, 1)


# -- files that are full -----------------------------------------------------------------


def test_the_chain_goes_on_in_the_next_file(tmp_path):
    log = written(tmp_path, 0, max_file_bytes=1 << 16)
    for _ in range(200):
        log.append("answered", query_id="q" * 200, name="n" * 200, model="m" * 200)

    older = rotated_files(log.path)
    found = verify_audit_log(log.path, head=log.head)

    assert [p.name for p in older] == [f"audit-{n + 1:06d}.jsonl" for n in range(len(older))]
    assert len(older) >= 2
    assert all(p.stat().st_size <= 1 << 16 for p in (*older, log.path))
    assert (found.ok, found.n_entries) == (True, 200)
    assert written(tmp_path, 1).append("answered").index == 201


def test_a_crash_between_two_files_loses_nothing(tmp_path):
    log = written(tmp_path, 3)
    log.path.rename(tmp_path / "audit-000001.jsonl")

    again = written(tmp_path, 1)

    assert again.path.exists()
    assert verify_audit_log(again.path, head=log.head).n_entries == 4


def test_a_full_file_that_is_missing_is_found(tmp_path):
    log = written(tmp_path, 0, max_file_bytes=1 << 16)
    for _ in range(200):
        log.append("answered", query_id="q" * 200, name="n" * 200, model="m" * 200)
    rotated_files(log.path)[0].unlink()

    found = verify_audit_log(log.path)

    assert (found.ok, found.first_bad) == (False, 0)
    assert "audit-000002.jsonl line 1" in found.words
    assert "some are missing" in found.words


# -- verification ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[bytes]:
    log = written(tmp_path_factory.mktemp("log"), 8)
    return log.path.read_bytes().splitlines(keepends=True)


def verified(folder: Path, lines: list[bytes], **options):
    path = folder / "copy.jsonl"
    path.write_bytes(b"".join(lines))
    return verify_audit_log(path, **options)


quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(data=st.data())
def test_any_flipped_bit_is_found_at_its_line(tmp_path, lines, data):
    at = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines[at]) - 1))
    changed = bytearray(lines[at])
    changed[place] ^= 1 << data.draw(st.integers(0, 7))

    found = verified(tmp_path, [*lines[:at], bytes(changed), *lines[at + 1 :]])

    assert not found.ok
    assert found.first_bad == at


@quick
@given(at=st.integers(0, 6), n=st.integers(1, 7))
def test_any_deletion_before_the_end_is_found(tmp_path, lines, at, n):
    kept = lines[:at] + lines[at + n :]
    if len(kept) == at:  # nothing after the gap: that is the next test
        kept.append(lines[-1])
    found = verified(tmp_path, kept)

    assert (found.ok, found.first_bad) == (False, at)


@quick
@given(n=st.integers(0, 7))
def test_a_missing_end_is_found_only_against_a_head(tmp_path, lines, n):
    head = json.loads(lines[-1])["hash"]

    assert verified(tmp_path, lines[:n]).ok
    found = verified(tmp_path, lines[:n], head=head)

    assert (found.ok, found.first_bad) == (False, n)
    assert "missing" in found.words


@quick
@given(pair=st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True))
def test_any_swap_is_found(tmp_path, lines, pair):
    low, high = sorted(pair)
    changed = list(lines)
    changed[low], changed[high] = changed[high], changed[low]

    assert verified(tmp_path, changed).first_bad == low


@quick
@given(
    at=st.integers(0, 8),
    line=st.one_of(
        st.integers(0, 7), st.binary(max_size=80), st.sampled_from([b"{}", b"[]", b"null", b"1"])
    ),
)
def test_any_line_that_is_put_in_is_found(tmp_path, lines, at, line):
    added = lines[line] if isinstance(line, int) else line.replace(b"\n", b"") + b"\n"
    found = verified(tmp_path, [*lines[:at], added, *lines[at:]])

    assert not found.ok
    # A copy of the very line that stands there is found at its double.
    assert found.first_bad == (at + 1 if isinstance(line, int) and line == at else at)


def test_a_chain_that_was_made_anew_is_found_only_against_a_head(tmp_path):
    told = written(tmp_path / "told", 4)
    forged = AuditLog(tmp_path / "forged" / "audit.jsonl", role="site")
    for _ in range(4):
        forged.append("refused")

    assert verify_audit_log(forged.path).ok
    assert not verify_audit_log(forged.path, head=told.head).ok


def test_a_head_of_an_earlier_day_still_holds(tmp_path):
    log = written(tmp_path, 3)
    head = log.head
    log.append("answered")

    assert verify_audit_log(log.path, head=head).ok


@pytest.mark.parametrize("head", ["", "00", "Z" * 64, "A" * 64])
def test_a_head_that_is_none_is_refused(tmp_path, head):
    with pytest.raises(AuditLogError, match="64 lower-case"):
        verify_audit_log(written(tmp_path, 1).path, head=head)


def test_an_empty_log_verifies_and_a_missing_one_is_an_error(tmp_path):
    assert verify_audit_log(written(tmp_path, 0).path).n_entries == 0
    with pytest.raises(AuditLogError, match="cannot be read"):
        verify_audit_log(tmp_path / "none.jsonl")


# -- the command -------------------------------------------------------------------------


def fedinfer_verify(*arguments: object):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_the_command_verifies_a_log(tmp_path):
    log = written(tmp_path, 3)

    done = fedinfer_verify(log.path)

    assert done.exit_code == 0
    assert log.head in done.stdout
    assert "the audit log verifies" in done.stdout
    plain = json.loads(fedinfer_verify(log.path, "--head", log.head, "--json").stdout)
    assert (plain["ok"], plain["n_entries"], plain["first_bad"]) == (True, 3, None)


def test_the_command_knows_a_log_by_its_content(tmp_path):
    log = written(tmp_path, 3)
    copy = tmp_path / "copied.txt"
    copy.write_bytes(log.path.read_bytes())

    assert "the audit log verifies" in fedinfer_verify(copy).stdout


def test_the_command_ends_with_1_for_a_bad_log(tmp_path):
    log = written(tmp_path, 3)
    log.path.write_bytes(log.path.read_bytes().replace(b'"q1"', b'"q7"'))

    done = fedinfer_verify(log.path)

    assert done.exit_code == 1
    assert "line 2 does not have the hash" in " ".join(done.stdout.split())
    assert fedinfer_verify(log.path, "--head", "0" * 64).exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [["--head", "12"], ["--coordinator", "ab"], ["--pins", "pins.toml"]],
    ids=["head", "coordinator", "pins"],
)
def test_the_command_refuses_options_that_do_not_fit(tmp_path, arguments):
    done = fedinfer_verify(written(tmp_path, 1).path, *arguments)

    assert isinstance(done.exception, FedInferError)


def test_a_head_is_not_for_a_receipt(tmp_path):
    receipt = tmp_path / "receipt.json"
    receipt.write_text("{}")

    done = fedinfer_verify(receipt, "--head", "0" * 64)

    assert isinstance(done.exception, FedInferError)
    assert "an audit log" in str(done.exception)
