"""Gaps between tokens while others' prompts are read, on machines whose passes take other times."""

from __future__ import annotations

import pytest

from benchmarks.mixed import Times, warm

MACHINES = {
    "much for any pass": Times(),
    "fast": Times(8.0, 0.34, 0.20),
    "as much for a token of either kind": Times(18.0, 0.45, 0.45),
    "much for a prompt": Times(8.0, 1.0, 1.2),
    "little for any pass": Times(6.0, 0.5, 0.45),
    "beside others": Times(noise=0.2),
}


@pytest.mark.parametrize("tokens", [48, 96])
@pytest.mark.parametrize("times", MACHINES.values(), ids=MACHINES)
def test_tokens_of_many_that_came_together_come_evenly_over_the_whole_run(times, tokens):
    evenness = warm(times).at_once(32, 62, tokens)
    assert evenness.ratio < 1.5


@pytest.mark.parametrize("times", MACHINES.values(), ids=MACHINES)
def test_first_tokens_come_no_later_than_from_one_prompt_after_the_other(times):
    evenness = warm(times).at_once(32, 62, 96)
    alone = times.pass_ms + 62 * times.prompt_ms + times.answer_ms
    assert max(evenness.first_ms, evenness.first_mean_ms) < (1 + 32) / 2 * alone
    assert evenness.gap_most_ms < 32 / 3 * alone, "nobody waits for all of them"
