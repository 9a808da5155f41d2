"""The executor's own test: planted bugs (selftest.cu), each caught by at least the builds and schedules named here.

Clean kernels must be clean everywhere. Nothing is asserted of who else may catch a bug.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

import simt

pytestmark = pytest.mark.skipif(bool(simt.missing()), reason=simt.missing())

WRONG, STOPPED, ASAN, UBSAN, TSAN = 1, 2, 99, 98, 66
SCHEDULES = ("in_order", "reverse", "random")
SEEDS = range(1, 9)  # a random schedule catches what at least one of these catches

# bug -> who catches it, and how: a schedule of the fast build, "counts", "address" or "thread"; EVERY: all schedules.
EVERY = ("in_order", "reverse", "random")
CAUGHT: dict[str, dict[str, int]] = {
    "missing_barrier": {"in_order": STOPPED, "random": STOPPED, "thread": STOPPED},
    "missing_second_barrier": {**dict.fromkeys(EVERY, WRONG), "thread": TSAN},
    "barrier_in_branch": dict.fromkeys(EVERY, STOPPED),
    "different_barriers": dict.fromkeys(EVERY, STOPPED),
    "returns_before_barrier": dict.fromkeys(EVERY, STOPPED),
    "lane_returns_before_shuffle": dict.fromkeys(EVERY, STOPPED),
    "shuffle_in_branch": dict.fromkeys(EVERY, STOPPED),
    "lanes_at_different_shuffles": dict.fromkeys(EVERY, STOPPED),
    "partial_warp": dict.fromkeys(EVERY, STOPPED),
    "wrong_shuffle_mask": dict.fromkeys(EVERY, WRONG),
    "shared_out_of_bounds": dict.fromkeys(EVERY, STOPPED),
    "shared_uninitialised": dict.fromkeys(EVERY, STOPPED),
    "shared_race_in_warp": {"thread": TSAN},
    "too_much_shared_memory": dict.fromkeys(EVERY, STOPPED),
    "store_past_end": {"address": ASAN},
    "load_past_end": {"address": ASAN},
    "missing_tail": dict.fromkeys(EVERY, WRONG),
    "misaligned_pack": dict.fromkeys(EVERY, STOPPED),
    "index_overflow": {"address": UBSAN},
    "blocks_share_an_output": {**dict.fromkeys(EVERY, WRONG), "thread": TSAN},
    "plain_counter": {"thread": TSAN},
    "missing_fence": {"thread": TSAN},
    "missing_first_fence": {"thread": TSAN},
    "missing_second_fence": {"thread": TSAN},
    "stale_load": {"counts": STOPPED},
    "not_the_last_block": {"reverse": WRONG, "random": WRONG, "thread": TSAN},
    "counter_not_zeroed": dict.fromkeys(EVERY, WRONG),
    "order_of_arrival": {"reverse": WRONG, "random": WRONG},
    "missing_signal": dict.fromkeys(EVERY, STOPPED),
    "too_few_signals": dict.fromkeys(EVERY, STOPPED),
    "not_together": dict.fromkeys(EVERY, STOPPED),
    "missing_meeting": {**dict.fromkeys(EVERY, WRONG), "thread": TSAN},
    "missing_second_meeting": {**dict.fromkeys(EVERY, WRONG), "thread": TSAN},
    "plain_load_after_signal": {"counts": STOPPED},
    "signal_without_fence": {"thread": TSAN},
    "dynamic_out_of_bounds": dict.fromkeys(EVERY, STOPPED),
    "wrong_fragment_row": dict.fromkeys(EVERY, WRONG),
    "wrong_fragment": dict.fromkeys(EVERY, WRONG),
    "misaligned_matrices": dict.fromkeys(EVERY, STOPPED),
    "divergent_matrices": dict.fromkeys(EVERY, STOPPED),
    "matrices_in_two_places": dict.fromkeys(EVERY, STOPPED),
    "matrices_past_end": dict.fromkeys(EVERY, STOPPED),
    "divergent_product": dict.fromkeys(EVERY, STOPPED),
    "wrong_swizzle": dict.fromkeys(EVERY, WRONG),
    "misaligned_source": dict.fromkeys(EVERY, STOPPED),
    "misaligned_copy": dict.fromkeys(EVERY, STOPPED),
    "copy_past_end": {**dict.fromkeys(EVERY, WRONG), "address": ASAN},
    "copy_out_of_bounds": dict.fromkeys(EVERY, STOPPED),
    "copied_twice": dict.fromkeys(EVERY, STOPPED),
    "missing_commit": dict.fromkeys(EVERY, STOPPED),
    "wait_too_lax": dict.fromkeys(EVERY, STOPPED),
    "missing_wait": dict.fromkeys(EVERY, STOPPED),
    "missing_barrier_after_wait": dict.fromkeys(EVERY, STOPPED),
    "barrier_before_wait": dict.fromkeys(EVERY, STOPPED),
    "copy_too_early": {**dict.fromkeys(EVERY, STOPPED), "thread": TSAN},
    "store_under_copy": dict.fromkeys(EVERY, STOPPED),
    "exit_with_copies": dict.fromkeys(EVERY, STOPPED),
    "own_copy_too_early": dict.fromkeys(EVERY, STOPPED),
    "missing_warp_barrier": dict.fromkeys(EVERY, STOPPED),
    "never_asked": dict.fromkeys(EVERY, STOPPED),
    "more_than_there_is": dict.fromkeys(EVERY, STOPPED),
}
COUNTED = (
    "scalar_accesses",
    "strided_accesses",
    "bank_conflicts",
    "missing_swizzle",
)  # right values, caught by what they cost

# What the message of a stopped kernel must say: the place (kernel, block, thread, line) and the fault.
SAYS = {
    "barrier_in_branch": "a barrier that some threads of the block never reach",
    "different_barriers": "threads of the block wait at different barriers",
    "lane_returns_before_shuffle": "lane 5, which has returned",
    "lanes_at_different_shuffles": "lanes of the warp are in different operations",
    "shared_out_of_bounds": "partial[4] in shared memory, which has 4 elements",
    "shared_uninitialised": "partial[2] in shared memory is read and was never written",
    "stale_load": "what block 0 has stored in this launch: it needs load_fresh()",
    "partial_warp": "a warp operation for 32 lanes in a warp of 16",
    "too_much_shared_memory": "65536 bytes of shared memory, more than 49152",
    "misaligned_pack": "misaligned load of 16 bytes",
    "missing_signal": "deadlock: it waits for a signal that no block gives",
    "too_few_signals": "deadlock: it waits for a signal that no block gives",
    "not_together": "for a signal of a block that is not running: the launch is not cooperative",
    "plain_load_after_signal": "in this launch: it needs load_fresh()",
    "dynamic_out_of_bounds": "dynamic memory[128] in shared memory, which has 128 elements",
    "misaligned_matrices": "misaligned access of 16 bytes in shared memory: tile[",
    "divergent_matrices": "lanes of the warp are in different operations",
    "misaligned_copy": "misaligned access of 16 bytes in shared memory: dynamic memory[4]",
    "copied_twice": "is written, but there was no barrier since thread 0 has waited for its copy of selftest_tensor",
    "wait_too_lax": "is read while a copy to it is under way: thread 61 has not waited for that of selftest_tensor",
    "store_under_copy": "is written while a copy to it is under way: thread 0 has not waited for that of selftest",
    "exit_with_copies": "the thread has returned with 6 copies under way that it has not waited for",
}


def run(*arguments: str, sanitizer: str = "none") -> subprocess.CompletedProcess[str]:
    program = simt.build("simt_selftest", sanitizer)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": f"exitcode={ASAN}:detect_leaks=0",
        "UBSAN_OPTIONS": f"exitcode={UBSAN}",
    }
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def outcomes(bug: str, who: str) -> list[subprocess.CompletedProcess[str]]:
    """One run, or with a random schedule one for each seed."""
    if who in ("address", "thread"):
        return [run(bug, sanitizer=who)]
    return [run(bug, who, str(seed)) for seed in SEEDS] if who == "random" else [run(bug, who)]


def test_the_table_names_every_bug() -> None:
    listed = run()
    assert run("no such bug").returncode == listed.returncode == 64
    assert set(listed.stdout.split()) == {"none", *CAUGHT, *COUNTED}
    assert len(CAUGHT) + len(COUNTED) >= 15


@pytest.mark.parametrize("who", [*SCHEDULES, "counts", "address", "thread"])
def test_clean_kernels_are_clean(who: str) -> None:
    for done in outcomes("none", who):
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("bug", "who"), [(bug, who) for bug, by in CAUGHT.items() for who in by])
def test_a_planted_bug_is_caught(bug: str, who: str) -> None:
    done = outcomes(bug, who)
    codes = [d.returncode for d in done]
    assert CAUGHT[bug][who] in codes, f"exit statuses {codes}: {done[0].stdout}{done[0].stderr}"


@pytest.mark.parametrize("bug", SAYS)
def test_the_message_names_the_place_and_the_fault(bug: str) -> None:
    done = run(bug, "counts" if "counts" in CAUGHT.get(bug, {}) else "in_order")
    assert SAYS[bug] in done.stdout
    assert done.stdout.startswith("SIMT: ")
    for part in (": block ", ", thread ", ", selftest"):
        assert part in done.stdout


def counts(bug: str) -> dict[str, Any]:
    done = run(bug, "counts")
    assert done.returncode == 0, done.stdout
    return {launch["name"]: launch for launch in json.loads(done.stdout)}


def test_counts_of_clean_kernels() -> None:
    clean = counts("none")
    n, threads = 5 * 128 * 4 + 3, 128
    scale = clean["scale"]
    assert (scale["blocks"], scale["threads"]) == (3, threads)
    assert scale["load_bytes"] == scale["store_bytes"] == 4 * n
    assert scale["lanes_of_width"] == {"1": 0, "2": 0, "4": 2 * 3, "8": 0, "16": 2 * (n // 4)}
    # 20 full warps of 512 bytes and the tail; memory begins in the middle of a sector or does not.
    assert 20 * 16 + 1 <= scale["load_sectors"] <= 20 * 17 + 1
    assert clean["row_sums"]["barriers"] == 5 * threads
    assert clean["row_sums"]["wavefronts"] == clean["row_sums"]["ideal_wavefronts"]
    assert clean["reverse_twice"]["wavefronts"] == clean["reverse_twice"]["ideal_wavefronts"]
    assert clean["reverse_twice"]["shared_bytes"] == 4 * threads + 4 * 33 * 32


def test_scalar_accesses_show() -> None:
    scale = counts("scalar_accesses")["scale"]
    assert scale["lanes_of_width"]["16"] == 0
    assert scale["lanes_of_width"]["4"] == 2 * (5 * 128 * 4 + 3)


def test_strided_accesses_cost_sectors() -> None:
    assert counts("strided_accesses")["scale"]["load_sectors"] > 1.9 * 20 * 16


def test_bank_conflicts_cost_wavefronts() -> None:
    launch = counts("bank_conflicts")["reverse_twice"]
    # 4 stores of one warp, all 32 lanes in one bank, where one wavefront would do; in 3 blocks.
    assert launch["wavefronts"] - launch["ideal_wavefronts"] == 3 * 4 * 31
    ((place, wavefronts),) = launch["conflicts"].items()
    assert place.startswith("selftest.cu:")
    assert wavefronts == 3 * 4 * 31


def test_a_missing_swizzle_costs_wavefronts() -> None:
    for name in ("pipeline_f16", "pipeline_bf16"):
        launch = counts("none")[name]
        assert launch["wavefronts"] == launch["ideal_wavefronts"], name
        assert launch["conflicts"] == {}
    launch = counts("missing_swizzle")["pipeline_f16"]
    # Rows of 64 bytes: the eight of a matrix lie in two places of the banks, four in each. 3 steps of 2 times 2 loads
    # by 2 warps, 4 matrices each; the copies, whole rows, are as good as before.
    assert launch["wavefronts"] - launch["ideal_wavefronts"] == 3 * 2 * 2 * 2 * 4 * 3
