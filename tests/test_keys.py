"""Keys as data: made, hashed, kept, given from outside, found, and read again when they change."""

import json
import logging
import os
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.auth import ring as ring_module
from app.auth.attempts import MAX_A_MINUTE, MAX_ADDRESSES, FailedAttempts
from app.auth.key import MADE_HERE, BadKey, Key, new_key, scopes_from
from app.auth.outside import environment_key, keys_in, line_of
from app.auth.ring import KeyRing
from app.auth.scope import ALL_SCOPES
from app.auth.signed_link import LinkSigner
from app.auth.store import MAX_KEYS, KeyStore, KeysUnreadable, KeyTaken, UnknownKey
from app.auth.watch import KeySources, KeyWatch, NoKeys

SECRET = "a-secret-of-thirty-two-characters"
HASH = sha256(SECRET.encode()).hexdigest()


def valid(token: str, ring: KeyRing) -> str | None:
    grant = ring.find(token.encode(), time.time())
    return grant and grant.name


def test_a_key_holds_256_random_bits_and_is_nowhere_on_disk(tmp_path: Path) -> None:
    key, token = KeyStore(tmp_path).create("ci", ("predict",))
    assert MADE_HERE.fullmatch(token.encode())
    assert token.split("_")[1] == key.id
    for file in tmp_path.iterdir():
        assert token.split("_", 2)[2] not in file.read_text()
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "keys.json").read_text())["keys"][0]["scopes"] == ["predict"]


def test_keys_of_several_processes_at_once_are_all_kept(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=KeyStore(tmp_path).create, args=(f"k{i}", ("predict",)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in KeyStore(tmp_path).read()} == {f"k{i}" for i in range(8)}
    assert not list(tmp_path.glob(".keys.json-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_makes_keys_for_the_owner_of_the_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 10001, 10001)
    KeyStore(tmp_path).create("ci", ("predict",))
    LinkSigner(tmp_path, 60).sign("/a")
    assert {file.stat().st_uid for file in tmp_path.iterdir()} == {10001}


def test_revoke_by_name_and_by_id(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    first, token = store.create("ci", ("predict",))
    with pytest.raises(KeyTaken, match="'ci'"):
        store.create("ci", ("predict",))
    assert store.revoke("ci").id == first.id
    second, _ = store.create("ci", ("predict",))
    assert valid(token, KeyRing(store.read())) is None
    assert store.revoke(second.id).revoked is not None
    with pytest.raises(UnknownKey, match="keys list"):
        store.revoke("ci")


def test_a_thousand_keys_leave_room_only_if_some_are_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.auth.store.MAX_KEYS", 2)
    store = KeyStore(tmp_path)
    store.create("a", ("predict",))
    store.create("b", ("predict",))
    with pytest.raises(Exception, match="revoke one first"):
        store.create("c", ("predict",))
    store.revoke("a")
    store.create("c", ("predict",))
    assert [key.name for key in store.read()] == ["b", "c"]
    assert MAX_KEYS == 1000


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"keys":[{"id":"x"}]}', '{"keys":[],"more":1}', "\x00" * 2_000_000]
)
def test_a_damaged_file_is_one_sentence_and_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(KeysUnreadable, match=r"keys\.json"):
        KeyStore(tmp_path).create("ci", ("predict",))
    assert (tmp_path / "keys.json").read_text() == text


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "é", "x\n", "../x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(BadKey, match="name"):
        new_key(name, ("predict",), None)


def test_scopes_by_name() -> None:
    assert scopes_from(["metrics", "predict", "metrics"]) == ("predict", "metrics")
    assert scopes_from(["all"]) == ALL_SCOPES
    with pytest.raises(BadKey, match="'root' is no scope; the scopes are predict"):
        scopes_from(["root"])
    with pytest.raises(BadKey, match="at least one"):
        new_key("x", (), None)


def test_an_expired_key_opens_nothing_though_it_was_remembered() -> None:
    now = datetime.now(UTC)
    key, token = new_key("ci", ("predict",), now + timedelta(hours=1))
    ring = KeyRing([key])
    assert ring.find(token.encode(), now.timestamp()) is not None
    assert ring.remembered(token.encode(), now.timestamp()) is not None
    assert ring.remembered(token.encode(), now.timestamp() + 3600) is None
    assert ring.find(token.encode(), now.timestamp() + 3600) is None


def test_every_key_is_compared_whether_one_fits_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key(f"k{i}", ("predict",), None) for i in range(5)]
    compared: list[bytes] = []

    def compare(stored: bytes, digest: bytes) -> bool:
        compared.append(stored)
        return stored == digest

    monkeypatch.setattr(ring_module, "compare_digest", compare)
    ring = KeyRing([key for key, _ in made])
    for token in (made[0][1], made[4][1], "ptl_unknown"):
        compared.clear()
        ring.find(token.encode(), 0.0)
        assert [one.hex() for one in compared] == [key.sha256 for key, _ in made]


def test_only_good_keys_are_remembered() -> None:
    key, token = new_key("ci", ("predict",), None)
    ring = KeyRing([key])
    for number in range(1000):
        assert ring.find(b"bad-%d" % number, 0.0) is None
    ring.find(token.encode(), 0.0)
    assert len(ring._remembered) == 1
    assert ring.find(b"x" * 1_000_000, 0.0) is None


def test_the_key_of_the_environment_has_all_scopes() -> None:
    key = environment_key(SECRET)
    assert key.scopes == ALL_SCOPES
    assert valid(SECRET, KeyRing([key])) == "environment"
    for text in ("short", "has spaces in it for sure", "ümlaute-are-not-visible-ascii"):
        with pytest.raises(BadKey, match="PYTORCHLIB_API_KEY") as refused:
            environment_key(text)
        assert text not in str(refused.value)


def test_a_malformed_line_takes_no_other_key_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, token = new_key("cd", ("predict", "metrics"), None)
    lines = [
        "# name scopes hash",
        f"ci predict,evaluate sha256:{HASH}",
        f"pasted-by-mistake {SECRET}",
        f"typo prdict {HASH}",
        f"bad/name predict {HASH}",
        f"extra predict {HASH} {HASH}",
        "",
        line_of(key),
    ]
    (tmp_path / "keys").write_text("\r\n".join(lines))
    found = keys_in(tmp_path / "keys")
    assert [one.name for one in found] == ["ci", "cd"]
    assert valid(SECRET, KeyRing(found)) == "ci"
    assert valid(token, KeyRing(found)) == "cd"
    assert [f"line {n} " in caplog.text for n in range(1, 9)] == [
        *(False, False, True, True, True, True, False, False)
    ]
    for secret in (SECRET, HASH, "typo", "pasted"):
        assert secret not in caplog.text


@given(st.binary(max_size=200))
def test_any_bytes_in_the_mounted_secret_cost_only_their_line(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes
) -> None:
    logging.getLogger("app.auth.outside").disabled = True
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_bytes(noise + f"\nci predict {HASH}\n".encode() + noise)
    assert valid(SECRET, KeyRing(keys_in(file))) == "ci"
    logging.getLogger("app.auth.outside").disabled = False


def sources(folder: Path, **given: object) -> KeySources:
    return KeySources(folder, **given)  # type: ignore[arg-type]


def test_all_sources_make_one_ring(tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text(f"ci predict {HASH}\n")
    _, token = KeyStore(tmp_path).create("person", ("metrics",))
    other = "another-secret-from-the-environment"
    made = sources(tmp_path, keys_file=tmp_path / "mounted", api_key=SecretStr(other))
    ring = made.ring()
    assert [valid(one, ring) for one in (SECRET, token, other)] == ["ci", "person", "environment"]
    assert other not in repr(made)


def test_whether_somebody_could_come_in(tmp_path: Path) -> None:
    with pytest.raises(NoKeys, match=r"Others can reach 0\.0\.0\.0.*--no-auth"):
        sources(tmp_path).require_one("0.0.0.0")
    KeyStore(tmp_path).create("late", ("predict",), datetime.now(UTC) - timedelta(hours=1))
    with pytest.raises(NoKeys):
        sources(tmp_path).require_one("0.0.0.0")
    KeyStore(tmp_path).create("ci", ("predict",))
    sources(tmp_path).require_one("0.0.0.0")


def test_a_changed_file_makes_another_ring_and_an_unchanged_one_none(tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text(f"ci predict {HASH}\n")
    watch = KeyWatch(sources(tmp_path, keys_file=tmp_path / "mounted"), 1.0)
    before = watch.ring
    watch.look()
    assert watch.ring is before
    _, token = KeyStore(tmp_path).create("person", ("metrics",))
    watch.look()
    assert valid(token, watch.ring) == "person"
    KeyStore(tmp_path).revoke("person")
    (tmp_path / "mounted").write_text("# nobody\n")
    watch.look()
    assert (valid(token, watch.ring), valid(SECRET, watch.ring)) == (None, None)


def test_a_mounted_secret_that_is_swapped_by_a_link_is_read_again(tmp_path: Path) -> None:
    """As Kubernetes does it: the path is a link, and another folder takes its place."""
    for name, line in (("old", f"ci predict {HASH}"), ("new", f"cd predict {HASH}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(line + "\n")
    (tmp_path / "data").symlink_to("old")
    watch = KeyWatch(sources(tmp_path, keys_file=tmp_path / "data" / "keys"), 1.0)
    assert valid(SECRET, watch.ring) == "ci"
    (tmp_path / "next").symlink_to("new")
    os.rename(tmp_path / "next", tmp_path / "data")
    watch.look()
    assert valid(SECRET, watch.ring) == "cd"


def test_a_file_that_is_damaged_or_vanishes_opens_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, token = KeyStore(tmp_path).create("ci", ("predict",))
    watch = KeyWatch(sources(tmp_path), 1.0)
    (tmp_path / "keys.json").write_text("{")
    for _ in range(3):
        watch.look()
    assert valid(token, watch.ring) == "ci"
    assert caplog.text.count("stay as they are") == 1
    (tmp_path / "keys.json").unlink()
    watch.look()
    assert valid(token, watch.ring) is None
    assert watch.ring.exists


def test_ten_bad_keys_a_minute_from_one_address() -> None:
    attempts = FailedAttempts()
    for second in range(MAX_A_MINUTE):
        assert attempts.wait_s("192.0.2.1", second) == 0
        attempts.count("192.0.2.1", second)
    assert attempts.wait_s("192.0.2.1", 10.0) == 50.0
    assert attempts.wait_s("::ffff:192.0.2.1", 10.0) == 50.0
    assert attempts.wait_s("192.0.2.2", 10.0) == 0
    assert attempts.wait_s("192.0.2.1", 60.0) == 0
    attempts.count("192.0.2.1", 61.0)
    assert attempts.wait_s("192.0.2.1", 61.0) == 0


def test_one_network_of_ipv6_is_one_address_and_memory_is_bounded() -> None:
    attempts = FailedAttempts()
    for number in range(MAX_A_MINUTE):
        attempts.count(f"2001:db8::{number:x}", 0.0)
    assert attempts.wait_s("2001:db8::ffff:1", 1.0) == 59.0
    assert attempts.wait_s("2001:db8:0:1::1", 1.0) == 0
    for number in range(2 * MAX_ADDRESSES):
        attempts.count(f"192.0.{number // 256}.{number % 256}", 0.0)
    assert len(attempts) == MAX_ADDRESSES


def test_a_signed_link_opens_its_own_path_until_it_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = LinkSigner(tmp_path, lifetime_s=60)
    path, _, query = links.sign("/v1/evaluations/e1/report").partition("?")
    assert links.holds(path, query.encode())
    assert LinkSigner(tmp_path, lifetime_s=60).holds(path, query.encode())
    assert stat.S_IMODE((tmp_path / "links.secret").stat().st_mode) == 0o600
    later = query.replace("expires=1", "expires=9")
    for other, text in (
        ("/v1/evaluations/e2/report", query),
        (path, later),
        (path, query[:-1] + ("0" if query[-1] != "0" else "1")),
        (path, query + "&x=1"),
        (path, ""),
    ):
        assert not links.holds(other, text.encode()), (other, text)
    monkeypatch.setattr("app.auth.signed_link.time.time", lambda: 1e11)
    assert not links.holds(path, query.encode())


def test_many_processes_make_one_secret(tmp_path: Path) -> None:
    signers = [LinkSigner(tmp_path, 60) for _ in range(8)]
    links: list[str] = []
    threads = [threading.Thread(target=lambda s=s: links.append(s.sign("/a"))) for s in signers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({link.partition("signature=")[2] for link in links}) <= 2  # of two seconds
    assert all(s.holds("/a", links[0].partition("?")[2].encode()) for s in signers)
    assert [file.name for file in tmp_path.iterdir()] == ["links.secret"]


def test_without_a_folder_to_write_links_end_with_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file, where a folder should be")
    links = LinkSigner(tmp_path / "home", lifetime_s=60)
    path, _, query = links.sign("/a").partition("?")
    assert links.holds(path, query.encode())
    assert "end with this process" in caplog.text


def test_what_a_key_shows_of_itself_is_no_secret() -> None:
    key, token = new_key("ci", ("predict",), None)
    assert token.split("_", 2)[2] not in repr(key)
    assert isinstance(key, Key)
