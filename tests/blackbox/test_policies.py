"""Section 5 and the session statistics: what each policy decides, where that can be seen from outside."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox import engine as scripts
from tests.blackbox.router import Router
from tests.support.waiting import until

QUICK = {"health-check-interval-secs": 0.4, "health-check-timeout-secs": 10.0, "metrics-interval-secs": 0.1}


def settings(**scheduler: object) -> dict[str, Any]:
    return {"scheduler": {"stats-interval-secs": 0.3, **scheduler}, "manager": QUICK}


@pytest.fixture(scope="module")
def aware(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    config = settings(**{"policy": "cache_aware", "cache-block-size": 4, "load-balance-weight": 0.05})
    with Router(tmp_path_factory.mktemp("aware"), config=config) as router:
        for _ in range(2):
            router.engine()
        yield router


def test_round_robin_takes_turns_by_url_from_the_first_on(tmp_path: Path) -> None:
    with Router(tmp_path, config=settings(policy="round_robin")) as router:
        ports = sorted((router.engine().port for _ in range(3)), key=str)  # as URLs are sorted
        asked = [router.chat().json()["from"] for _ in range(7)]
        assert asked == [*ports, *ports, ports[0]]


def test_process_tokens_counts_two_for_each_character(tmp_path: Path) -> None:
    """Two long prompts in one script against one in another: characters count, not bytes."""
    with Router(tmp_path, config=settings(policy="process_tokens")) as router:
        engines, go = [router.engine() for _ in range(2)], threading.Event()
        for engine in engines:
            engine.script = scripts.hold(go)
        threads = []
        for count, text in enumerate(("漢字漢字漢字", "abcdefghijkl", "x", "y"), 1):
            threads.append(threading.Thread(target=router.chat, args=(text,)))
            threads[-1].start()
            until(lambda count=count: sum(len(e.asked) for e in engines) == count, "the next to arrive")
        # 6 characters here, 12 there: both short ones go to the six, which by bytes would be eighteen.
        assert Counter(len(engine.asked) for engine in engines) == {3: 1, 1: 1}
        router.await_line(r"\[INFO\] .*: select worker \(mixed\): .*, count: 3", "out")
        go.set()
        for thread in threads:
            thread.join()
        router.await_line(r"\[INFO\] .*: release prefill tokens: .*, tokens: 0", "out")


def test_the_remote_policy_reads_what_engines_say_and_asks_nobody_for_a_decision(tmp_path: Path) -> None:
    with Router(tmp_path, config=settings(**{"policy": "fd_remote_metrics_score", "waiting-weight": 10})) as router:
        busy, idle, plain = router.engine(), router.engine(), router.engine(metrics_port=1)
        text = (
            b'fastdeploy:num_requests_running{model="m"} %d\n'
            b"fastdeploy:num_requests_waiting %d\navailable_gpu_block_num 9\n"
        )
        busy.pages["/metrics"] = (200, text % (1, 2))
        idle.pages["/metrics"] = (200, text % (3, 0))

        def scores() -> list[Any]:
            return [row["waiting"] for row in router.get("/instances").json()["instances"]]

        until(lambda: sorted(map(str, scores())) == ["0", "2", "None"], lambda: f"reports of two: {scores()}")
        polls, began = idle.gets.count("/metrics"), time.monotonic()
        answers = Counter(router.chat().json()["from"] for _ in range(20))
        assert answers == {plain.port: 20}  # nothing known of it but its own requests: none
        # As many as the clock makes due, however long that took. One for each decision would be 20 more.
        due = (time.monotonic() - began) / QUICK["metrics-interval-secs"]
        assert idle.gets.count("/metrics") - polls <= due + 2
        plain.close()
        router.engines.remove(plain)
        router.await_number(2)
        assert {router.chat().json()["from"] for _ in range(10)} == {idle.port}
        router.await_line(
            rf"\[WARN\] .*: GetRemoteMetrics failed for {plain.url}, falling back to local counter: .*", "out"
        )


@pytest.mark.parametrize(("common", "ratio"), [(8, 66), (12, 100), (4, 33), (0, 0)])
def test_hits_are_percentages_of_whole_blocks(aware: Router, common: int, ratio: int) -> None:
    start = f"{common:012d}"[::-1]
    first = aware.chat(start).json()["from"]
    again = aware.chat(start[:common] + "~" * (12 - common))
    found = rf"hitRatios=map\[http://127\.0\.0\.1:{first}:{ratio}\]" if ratio else r"hitRatios=map\[\]"
    chosen = first if ratio else r"\d+"
    aware.await_line(
        r"\[INFO\] .*: cache-aware prefill: final strategy: cache_aware_scoring, "
        rf"selected=http://127\.0\.0\.1:{chosen}, loads=map\[http://\S+:0 http://\S+:0\], {found}\. ts_ms=.*",
        "out",
    )
    if ratio:
        assert again.json()["from"] == first


def test_uneven_loads_are_balanced_first(aware: Router) -> None:
    go = threading.Event()
    prompt = "a prompt that all of them share, to stay where it was"
    owner = next(e for e in aware.engines if e.port == aware.chat(prompt).json()["from"])
    before = len(owner.asked)
    owner.script = scripts.hold(go)
    threads = [threading.Thread(target=aware.chat, args=(prompt,)) for _ in range(2)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        until(lambda count=count: len(owner.asked) == before + count, "the next to arrive")
    assert aware.chat(prompt).json()["from"] != owner.port  # 2 against 0: by more than 1 and more than a fifth
    go.set()
    for thread in threads:
        thread.join()
    owner.script = scripts.answer
    aware.await_line(
        r"\[INFO\] .*: cache-aware prefill: final strategy: process_tokens, reason: load imbalanced, "
        r"loads=map\[http://\S+:[02] http://\S+:[02]\]\. ts_ms=.*",
        "out",
    )


def test_more_blocks_than_the_originals_tree_can_hold_stop_nothing(aware: Router) -> None:
    """It stands still for good at 200,000 nodes. `tests/stress` has as many prompts; here they are blocks of two."""
    for start in (0, 1 << 24):
        prompt = "".join(f"{number:08x}" for number in range(start, start + 75_000))  # 150,000 blocks of four
        first = aware.chat(prompt)
        assert first.status == 200
        assert aware.chat(prompt).json()["from"] == first.json()["from"]
    assert aware.chat("and on it goes").status == 200


def test_a_session_that_stays_is_a_hit(aware: Router) -> None:
    before = [aware.metric(f"router_cache_{name}_total")[""] for name in ("hit", "request")]
    for _ in range(3):
        assert aware.chat("the same words for one session", session_id="s").status == 200
    after = [aware.metric(f"router_cache_{name}_total")[""] for name in ("hit", "request")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 3]
    aware.await_line(r"\[INFO\] .*: \[stats\] .*, cache_hit_rate=\d+\.\d\d% \(hits=[1-3]/total=[1-3]\)", "out")
