"""Advice on traces whose answer is known by construction."""

import json

import numpy as np
import pytest

from eplb_core import EplbError
from eplb_core.advise import NEAR_BEST, advise
from eplb_core.advise.advice import Verdict, explain, summarize_advice
from eplb_core.costs import Costs, Links
from eplb_core.simulate.replay import Gain

WINDOWS, LAYERS, EXPERTS, RANKS = 32, 3, 16, 4
CHEAP = Costs(bytes_per_expert=1000, links=Links(latency=0.0))
SWEEP = {"policies": ["incremental", "greedy"], "costs": CHEAP}


def shares(rng, *shape, skew=1.0):
    """Popularity of experts, log-normal."""
    level = np.exp(skew * rng.normal(size=(*shape, LAYERS, EXPERTS)))
    return level / level.sum(axis=-1, keepdims=True)


def stable(tokens=2**16, windows=WINDOWS):
    """One skewed distribution for ever."""
    rng = np.random.default_rng(0)
    return rng.poisson(shares(rng) * tokens, (windows, LAYERS, EXPERTS))


def chaotic(windows=60):
    """Each window has popularities of its own."""
    rng = np.random.default_rng(1)
    return rng.poisson(shares(rng, windows) * 2**16)


def drifting(every=8):
    """Popularities that change entirely every few windows."""
    rng = np.random.default_rng(2)
    return rng.poisson(np.repeat(shares(rng, WINDOWS // every), every, axis=0) * 2**16)


def balanced():
    return np.random.default_rng(3).poisson(2**12, (WINDOWS, LAYERS, EXPERTS))


def test_a_balanced_trace_needs_nothing():
    advice = advise(balanced(), RANKS, **SWEEP)
    assert (advice.recommend, advice.verdict) == (False, Verdict.BALANCED)
    assert advice.possible_gain < 0.02
    assert "balanced already" in explain(advice)


def test_a_stable_skewed_trace_is_planned_once():
    advice = advise(stable(), RANKS, redundancies=[4], costs=CHEAP)
    assert (advice.recommend, advice.verdict) == (True, Verdict.ENABLE)
    assert advice.chosen.replay.configuration.interval is None
    assert 0.02 <= advice.chosen.gain.low <= advice.chosen.gain.share <= advice.possible_gain + 1e-9
    assert "Enable it" in explain(advice)
    assert "planned once" in explain(advice)


def test_traffic_that_changes_at_times_is_planned_as_often():
    advice = advise(drifting(), RANKS, redundancies=[0, 4], **SWEEP)
    assert advice.recommend
    assert advice.chosen.replay.configuration.interval in (1, 2, 4, 8)


def test_independent_windows_cannot_be_foreseen():
    advice = advise(chaotic(), RANKS, redundancies=[0], **SWEEP)
    assert (advice.recommend, advice.verdict) == (False, Verdict.UNPREDICTABLE)
    assert advice.possible_gain > 0.1
    assert "does not foretell" in explain(advice)


def test_redundancy_may_help_where_planning_does_not():
    advice = advise(chaotic(), RANKS, redundancies=[0, 16], **SWEEP)
    assert (advice.recommend, advice.verdict) == (False, Verdict.REDUNDANCY_ALONE)
    assert advice.even_gain.low > 0.02
    assert "spread evenly and never moved" in explain(advice)


def test_few_tokens_do_not_pay_for_moves_and_the_advice_says_how_many_would():
    load = stable(tokens=60)
    costs = Costs(bytes_per_expert=10**7)
    advice = advise(load, RANKS, policies=["incremental"], costs=costs)
    assert (advice.recommend, advice.verdict) == (False, Verdict.COST)
    assert advice.break_even_scale > 1
    assert "times as many tokens" in explain(advice)
    more = Costs(bytes_per_expert=10**7, scale=advice.break_even_scale * 3)
    assert advise(load, RANKS, policies=["incremental"], costs=more).recommend
    less = Costs(bytes_per_expert=10**7, scale=advice.break_even_scale / 3)
    assert not advise(load, RANKS, policies=["incremental"], costs=less).recommend


def test_at_the_break_even_scale_the_best_gains_just_the_minimum():
    costs = Costs(bytes_per_expert=10**7)
    options = {"policies": ["greedy"], "redundancies": [0, 4, 16]}
    found = advise(stable(tokens=60), RANKS, minimum_gain=0.1, costs=costs, **options)
    exact = Costs(bytes_per_expert=10**7, scale=found.break_even_scale)
    at = advise(stable(tokens=60), RANKS, minimum_gain=0.1, costs=exact, **options)
    assert max(min(c.gain.share, c.gain_over_even.share) for c in at.candidates) == pytest.approx(0.1)
    assert at.break_even_scale == pytest.approx(1)


def test_what_no_traffic_would_pay_for_has_no_break_even_scale():
    assert advise(balanced(), RANKS, **SWEEP).break_even_scale is None


def test_moves_that_are_overlapped_cost_nothing():
    costs = Costs(bytes_per_expert=10**7, overlapped=True)
    assert advise(stable(tokens=60), RANKS, policies=["incremental"], costs=costs).recommend


def test_a_short_trace_gets_no_recommendation():
    advice = advise(stable(windows=8), RANKS, **SWEEP)
    assert (advice.recommend, advice.verdict, advice.chosen) == (False, Verdict.TOO_SHORT, None)
    assert "too short" in explain(advice)
    assert advise(stable(windows=9), RANKS, **SWEEP).recommend


def test_a_gain_that_may_be_too_small_is_noise():
    load = stable()
    sure = advise(load, RANKS, redundancies=[0], **SWEEP)
    # A gain between its estimate and its lower end is likely, but not sure.
    asked = (sure.chosen.gain.share + sure.chosen.gain.low) / 2
    best = max(c.gain.share for c in sure.candidates)
    advice = advise(load, RANKS, redundancies=[0], minimum_gain=asked, **SWEEP)
    if not advice.recommend:
        assert advice.verdict is Verdict.NOISE
    advice = advise(load, RANKS, redundancies=[0], minimum_gain=best - 1e-6, **SWEEP)
    assert (advice.recommend, advice.verdict) == (False, Verdict.NOISE)
    assert "Record more windows" in explain(advice)


def test_the_fewest_redundant_experts_near_the_best_are_chosen():
    advice = advise(stable(), RANKS, max_redundant=16, **SWEEP)
    sure = [c for c in advice.candidates if min(c.gain.low, c.gain_over_even.low) >= 0.02]
    best = max(c.gain.share for c in sure)
    near = [c for c in sure if c.gain.share >= best - NEAR_BEST]
    assert advice.chosen in near
    assert advice.chosen.num_redundant == min(c.num_redundant for c in near)
    same = [c for c in near if c.num_redundant == advice.chosen.num_redundant]
    assert len(advice.chosen.replay.events) == min(len(c.replay.events) for c in same)


def test_the_sweep_covers_every_combination():
    advice = advise(stable(windows=20), RANKS, policies=["greedy", "refined"], costs=CHEAP)
    found = {
        (c.num_redundant, c.replay.configuration.policy, c.replay.configuration.interval) for c in advice.candidates
    }
    expected = {(m, p, i) for m in (0, 4, 8) for p in ("greedy", "refined") for i in (1, 2, 4, 8, None)}
    assert found == expected
    assert len(advice.candidates) == len(expected)


def test_memory_of_redundant_experts_is_counted():
    advice = advise(stable(), RANKS, redundancies=[0, 8], **SWEEP)
    assert {c.num_redundant: c.extra_bytes_per_rank for c in advice.candidates} == {0: 0, 8: 2 * LAYERS * 1000}


def test_experts_that_do_not_divide_start_from_the_fewest_slots_that_fit():
    advice = advise(stable()[:, :, :14], RANKS, **SWEEP)
    assert {c.num_redundant for c in advice.candidates} == {2, 6}
    with pytest.raises(EplbError, match=r"max_redundant=1.*Allow at least 2"):
        advise(stable()[:, :, :14], RANKS, max_redundant=1)


def test_processes_change_nothing():
    one, two = (advise(drifting(), RANKS, redundancies=[4], jobs=jobs, **SWEEP) for jobs in (1, 2))
    assert one.verdict == two.verdict
    assert [c.gain for c in one.candidates] == [c.gain for c in two.candidates]


def test_summaries_are_plain_values():
    advice = advise(stable(), RANKS, redundancies=[0, 4], **SWEEP)
    figures = json.loads(json.dumps(summarize_advice(advice)))
    assert figures["recommend"] is True
    assert figures["verdict"] == "enable"
    assert figures["chosen"]["gain"]["share"] == advice.chosen.gain.share
    assert figures["chosen"]["redundant"] == advice.chosen.num_redundant
    assert len(figures["candidates"]) == len(advice.candidates)
    short = json.loads(json.dumps(summarize_advice(advise(stable(windows=4), RANKS, **SWEEP))))
    assert (short["recommend"], short["chosen"], short["candidates"]) == (False, None, [])


def test_a_silent_trace_is_balanced():
    advice = advise(np.zeros((12, LAYERS, EXPERTS), dtype=int), RANKS, **SWEEP)
    assert advice.verdict is Verdict.BALANCED
    assert advice.chosen.gain == Gain(0.0, 0.0, 0.0)


def test_the_gain_is_over_the_fewest_slots_in_round_robin():
    load = stable()
    advice = advise(load, RANKS, redundancies=[4], policies=["greedy"], intervals=[None], costs=Costs(overlapped=True))
    on_rank = load[1:].reshape(WINDOWS - 1, LAYERS, RANKS, EXPERTS // RANKS).sum(axis=-1)
    base = on_rank.max(axis=-1).sum() * 2e-7
    (candidate,) = advice.candidates
    assert candidate.gain.share == pytest.approx(1 - candidate.replay.serving_seconds.sum() / base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum_gain": 1.0}, r"minimum_gain=1.0"),
        ({"max_redundant": -4}, r"max_redundant=-4"),
        ({"redundancies": [3]}, r"Use num_redundant=4"),
        ({"policies": ["magic"]}, r"policy='magic'"),
        ({"num_nodes": 3}, r"num_nodes=3"),
    ],
)
def test_requests_that_cannot_be_met_say_why(options, message):
    with pytest.raises(EplbError, match=message):
        advise(stable(), RANKS, **options)
