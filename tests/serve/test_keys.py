"""The file of API keys, limits over time, and who is let in."""

from __future__ import annotations

import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.errors import RequestError
from serve.key_ring import BURST_S, KeyRing, TokenBucket, sent_key
from serve.keys import digest_of, new_key, read_keys, revoke_key
from trainer.errors import SlimrankError


def test_a_key_is_kept_as_a_hash_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop", candidates_per_s=1000)
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix("slim_") not in text
    assert len(secret) >= 5 + 43  # 256 bits in base64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = read_keys(path).keys
    assert (key.name, key.sha256, key.candidates_per_s, key.revoked) == ("shop", digest_of(secret), 1000, None)
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda i: new_key(path, f"k{i}"), range(16)))
    assert {key.sha256 for key in read_keys(path).keys} == {digest_of(s) for s in secrets}


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "x" * 65, "a\nb", "-dash"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SlimrankError, match="name"):
        new_key(tmp_path / "keys.json", name)
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit: float, tmp_path: Path) -> None:
    with pytest.raises(SlimrankError, match="requests_per_s"):
        new_key(tmp_path / "keys.json", "shop", requests_per_s=limit)


def test_a_name_is_taken_once_also_when_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new_key(path, "shop")
    revoke_key(path, "shop")
    with pytest.raises(SlimrankError, match="already"):
        new_key(path, "shop")
    with pytest.raises(SlimrankError, match="no key 'other', it has: shop"):
        revoke_key(path, "other")


# -- the ring --------------------------------------------------------------------------------------------------------


def status_of(ring: KeyRing, key: str | None, now: float = 0.0) -> int:
    try:
        ring.find(key, now)
    except RequestError as error:
        return error.status
    return 200


def test_known_keys_enter_and_others_do_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop")
    ring = KeyRing(path)
    assert status_of(ring, secret) == 200
    for wrong in (None, "", secret[:-1], secret + "x", secret.upper(), digest_of(secret), "x" * 100_000, "\xff\x00"):
        assert status_of(ring, wrong) == 401
    assert ring.find(secret, 0.0).key.name == "shop"


def test_changes_of_the_file_count_within_a_second(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = new_key(path, "first")
    ring = KeyRing(path)
    assert status_of(ring, first, 0.0) == 200
    second = new_key(path, "second")
    revoke_key(path, "first")
    assert status_of(ring, second, 0.5) == 401  # not looked at yet
    assert status_of(ring, second, 1.5) == 200
    assert status_of(ring, first, 1.6) == 403


@pytest.mark.parametrize("harm", ["remove", "truncate", "open to others"])
def test_a_file_that_is_damaged_leaves_the_keys_and_is_told_once(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop")
    told: list[str] = []
    ring = KeyRing(path, told.append)
    whole = path.read_text()
    if harm == "remove":
        path.unlink()
    elif harm == "truncate":
        path.write_text(whole[:40])
    else:
        path.chmod(0o666)
    for now in (2.0, 4.0, 6.0):
        assert status_of(ring, secret, now) == 200
    assert len(told) == 1
    assert str(path) in told[0]
    assert ring.problem == told[0]
    path.unlink(missing_ok=True)
    new_key(path, "fresh")
    assert status_of(ring, secret, 8.0) == 401
    assert ring.problem is None


def test_a_change_of_the_file_gives_no_new_tokens_to_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = new_key(path, "shop", requests_per_s=1)
    ring = KeyRing(path)
    ring.find(secret, 0.0).ask(1, 0.0, 1.0, candidates=False)
    new_key(path, "other")
    with pytest.raises(RequestError, match="1 requests a second") as caught:
        ring.find(secret, 0.2 + 1.0).ask(1, 0.2, 1.0, candidates=False)
    assert caught.value.status == 429
    assert caught.value.retry_after_s == pytest.approx(0.8)


def test_the_key_is_found_in_either_header() -> None:
    assert sent_key([(b"authorization", b"Bearer abc")]) == "abc"
    assert sent_key([(b"authorization", b"bearer  abc ")]) == "abc"
    assert sent_key([(b"x-api-key", b"abc")]) == "abc"
    assert sent_key([(b"authorization", b"Basic abc")]) is None
    assert sent_key([]) is None


# -- limits over time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 3.0, 1000.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_bucket_grants_its_rate_over_time_and_no_more(rate: float, share: float) -> None:
    bucket, granted, now = TokenBucket(rate), 0, 0.0
    seconds = 600.0
    step = min(1 / (rate * share), 1.0) / 4.3  # far more often than is granted
    while now < seconds:
        granted += bucket.take(1, now, share) == 0
        now += step
    most = rate * share * seconds + max(rate * share * BURST_S, 1)
    assert most * 0.95 - 1 <= granted <= most + 1e-6


def test_a_bucket_says_when_to_ask_again() -> None:
    bucket = TokenBucket(10.0)
    assert [bucket.take(1, 0.0) for _ in range(10)] == [0.0] * 10
    wait_s = bucket.take(1, 0.0)
    assert wait_s == pytest.approx(0.1)
    assert bucket.take(1, 0.05) == pytest.approx(0.05)
    assert bucket.take(1, wait_s) == 0.0


def test_an_amount_above_the_burst_is_granted_and_owed() -> None:
    bucket = TokenBucket(100.0)
    assert bucket.take(1000, 0.0) == 0.0
    wait_s = bucket.take(1, 0.0)
    assert wait_s == pytest.approx(9.01)
    assert bucket.take(1, 9.0) > 0
    assert bucket.take(1, 9.02) == 0.0


def test_a_bucket_survives_a_clock_that_stands_still_and_a_share_that_changes() -> None:
    bucket = TokenBucket(4.0)
    assert [bucket.take(1, 5.0) for _ in range(4)] == [0.0] * 4
    assert bucket.take(1, 5.0) > 0
    assert bucket.take(1, 5.5, 0.5) == 0.0  # half the rate: one token in half a second
    assert bucket.take(1, 5.5, 0.5) == pytest.approx(0.5)


# -- hostile files ---------------------------------------------------------------------------------------------------

GOOD = {"name": "a", "sha256": "0" * 64, "created": "2026-01-01"}
HOSTILE = {
    "empty": b"",
    "no json": b"hello",
    "cut": b'{"format_version": 1, "keys": [{"name": "a"',
    "list": b"[]",
    "null": b"null",
    "nested": b"[" * 100_000,
    "bytes": bytes(range(256)),
    "surrogate": b'{"keys": [{"name": "\\ud800"}]}',
    "version": b'{"format_version": 2, "keys": []}',
    "version as truth": b'{"format_version": true, "keys": []}',
    "unknown key": json.dumps({"keys": [{**GOOD, "admin": True}]}).encode(),
    "name twice": json.dumps({"keys": [GOOD, {**GOOD, "sha256": "1" * 64}]}).encode(),
    "hash twice": json.dumps({"keys": [GOOD, {**GOOD, "name": "b"}]}).encode(),
    "plain key": json.dumps({"keys": [{**GOOD, "sha256": "slim_abc"}]}).encode(),
    "limit NaN": json.dumps({"keys": [{**GOOD, "requests_per_s": float("nan")}]}).encode(),
    "limit as text": json.dumps({"keys": [{**GOOD, "requests_per_s": "5"}]}).encode(),
    "limit of 0": json.dumps({"keys": [{**GOOD, "candidates_per_s": 0}]}).encode(),
    "limit of 1e400": b'{"keys": [{"name": "a", "sha256": "%s", "created": "", "requests_per_s": 1e400}]}'
    % (b"0" * 64),
    "line break in a name": json.dumps({"keys": [{**GOOD, "name": "a\n{}"}]}).encode(),
    "too long": b" " * (17 << 20),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_key_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(HOSTILE[kind])
    path.chmod(0o600)
    for act in (lambda: KeyRing(path), lambda: new_key(path, "x"), lambda: revoke_key(path, "a")):
        with pytest.raises(SlimrankError, match=re.escape(str(path))) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert path.read_bytes() == HOSTILE[kind]


def test_a_file_that_others_may_write_a_folder_and_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new_key(path, "shop")
    path.chmod(0o660)
    with pytest.raises(SlimrankError, match="chmod 600"):
        KeyRing(path)
    with pytest.raises(SlimrankError, match="cannot be read"):
        KeyRing(tmp_path)
    with pytest.raises(SlimrankError, match="slimrank key new"):
        KeyRing(tmp_path / "none.json")
    with pytest.raises(SlimrankError, match="folder cannot be opened"):
        new_key(tmp_path / "no" / "keys.json", "shop")
