"""How many servers, and how many redundant slots: one decision from what was measured. Pure.

With u the mean utilisation (work offered / capacity; above 1 where a queue grows), n the servers
that run, q the requests at one server and d the p99 of the queue delay, all means over the
look-back,

    by work   = n u / target_utilization
    r         = max(q / target_ongoing_requests, d / target_queue_delay_s)
    by queue  = n u / (1 - (1 - u) r), at most 2 n
    wanted    = by work, or by queue if that is more and the servers that the work asks for run

Waits grow as 1 / (1 - u), so `by queue` servers would bring r to 1: it adds where queues are too
long, and lets no server go that keeps them short. In a jump of the load that law does not hold, so
a queue is heard only once the answer to the work is in place, and at most doubles it. A queue that
shrinks, before servers that have room, is draining: more servers would come too late for it, but
none goes while it is there.

With `peak_utilization`, and once a whole `peak_period_s` has been seen, `by work` is at most

    max(most work of the last period, work now) / peak_utilization

since room for twice the load is room that nothing has needed where the load is at its highest. A
load that was never seen is still answered, with the room that `peak_utilization` leaves.

More than there are must be wanted for `upscale_delay_s`, fewer for `downscale_delay_s` without a
break, and then as many go as the *largest* number wanted in that time allows. A wanted number
within `tolerance` of what is there changes nothing.

What is not known is not zero: without a measurement nothing changes but what the bounds demand,
and the wait to drain begins anew. Servers that do not report are taken to be like those that do
when servers are to be added, and stop any from going.

Redundant slots take the room that the servers have, up to `max_redundant`; below
`quiet_utilization` (which only happens where the floor keeps more servers than the work wants)
they go, after the same delay.

`State` is all that one decision hands to the next. It goes to JSON and back; lost, the next
decision begins from what runs. Deciding again at the same instant changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import ConfigError
from load_controller.autoscale_state import Sample, Seen, State

__all__ = ["Context", "Decision", "Sample", "State", "decide", "least_servers"]

#: By how much a queue alone may multiply the servers in one step.
QUEUE_BOOST = 2.0
#: A period's peaks are kept by parts of it: one that is past goes as a whole.
PEAK_PARTS = 24
#: After a silence of so many look-backs, what was seen before it no longer counts.
STALE_LOOK_BACKS = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What is there when a decision is made, and what was measured since the last one."""

    now_s: float  # of any clock that runs while servers do; it may jump
    running: int  # servers that answer, those that drain left out
    starting: int  # servers asked for that do not answer yet
    experts: int  # routed experts of the layer that has most
    slots: int  # of one layer, that one server has room for
    sample: Sample


@dataclass(frozen=True, slots=True)
class Decision:
    """What there should be."""

    replicas: int  # servers
    redundant: int  # slots of each layer beyond one an expert
    reason: str  # in words, for people


def least_servers(experts: int, slots: int, config: AutoscaleConfig) -> int:
    """The fewest servers there may be. Raises ConfigError where `max_replicas` are too few."""
    if slots < 1:
        raise ConfigError(f"a server has room for {slots} experts of a layer, expected at least 1")
    least = max(config.min_replicas, ceil((experts + config.min_redundant) / slots))
    if least > config.max_replicas:
        raise ConfigError(
            f"{experts} experts and {config.min_redundant} redundant slots need {least} servers of "
            f"{slots} slots, but max_replicas is {config.max_replicas}: raise it, or give servers "
            "more slots"
        )
    return least


def decide(
    context: Context, config: AutoscaleConfig, state: State | None
) -> tuple[Decision, State]:
    """The servers and redundant slots to have, and the state for the next decision.

    `state` is None for the first one. Raises ConfigError where the bounds hold no model.
    """
    least = least_servers(context.experts, context.slots, config)
    if state is None:
        state = _first(context, config)
    elif context.now_s == state.at_s:
        return _decision(state, context, config), state
    elif not 0 < context.now_s - state.at_s <= STALE_LOOK_BACKS * config.look_back_period_s:
        # The clock jumped, or nobody decided for long: no delay has been sat out.
        state = replace(_wait(state), samples=(), quiet_since_s=None)
    state = _note_peak(_see(state, context, config), config)
    bounded = min(max(state.replicas, least), config.max_replicas)
    if bounded != state.replicas:
        reason = f"between {least} and {config.max_replicas} servers are allowed"
        state = replace(_wait(state), replicas=bounded, reason=reason)
    wanted, why = _wanted(state, context, config)
    state = _step(state, wanted, why, least, config)
    state = _calm(state, config)
    return _decision(state, context, config), state


def _first(context: Context, config: AutoscaleConfig) -> State:
    """What runs is kept; a new cluster begins with as few as may be."""
    there = context.running + context.starting
    reason = "what is there" if there else "the fewest that may be"
    return State(replicas=there or config.min_replicas, at_s=context.now_s, reason=reason)


def _see(state: State, context: Context, config: AutoscaleConfig) -> State:
    """The state with one more sample, and without those that have left the look-back."""
    now = context.now_s
    seen = Seen(now, context.running, context.sample)
    kept = (old for old in state.samples if now - old.at_s < config.look_back_period_s)
    return replace(state, at_s=now, samples=(*kept, seen))


def _note_peak(state: State, config: AutoscaleConfig) -> State:
    """The state with the work of now among the period's peaks."""
    work, now = state.mean(lambda seen: seen.work), state.at_s
    if work is None:
        return state
    part_s = config.peak_period_s / PEAK_PARTS
    # A clock that was put back: what it had said to come is not known.
    peaks = [p for p in state.peaks if now - config.peak_period_s - part_s < p[0] <= now]
    if peaks and now - peaks[-1][0] < part_s:
        peaks[-1] = (peaks[-1][0], max(peaks[-1][1], work))
    else:
        peaks.append((now, work))
    return replace(state, peaks=tuple(peaks))


def _by_work(work: float, running: int, state: State, config: AutoscaleConfig) -> tuple[float, str]:
    """How many servers the work asks for, and in words."""
    wanted, each = work / config.target_utilization, config.target_utilization
    oldest = state.peaks[0][0] if state.peaks else state.at_s
    known_s = state.at_s - oldest + config.peak_period_s / PEAK_PARTS
    if config.peak_utilization is not None and known_s >= config.peak_period_s:
        peak = max(most for _, most in state.peaks)
        if peak / config.peak_utilization < wanted:
            return peak / config.peak_utilization, (
                f"{peak:.2f} servers' worth of work at most in a period, "
                f"{config.peak_utilization} of each wanted then"
            )
    return wanted, f"{work:.2f} servers' worth of work at {running}, {each} of each wanted"


def _wanted(state: State, context: Context, config: AutoscaleConfig) -> tuple[float | None, str]:
    """How many servers the look-back asks for, not rounded; None where that is not known."""
    running, work = context.running, state.mean(lambda seen: seen.work)
    wanted, why = None, "no server has reported its load"
    if work is not None:
        wanted, why = _by_work(work, running, state, config)
    ratio, what = _queue(state, config)
    if ratio > 0 and (wanted is None or wanted <= running):
        by_queue = _by_queue(work, running, ratio)
        if ratio > 1 and _drains(state):
            by_queue, what = float(state.replicas), f"{what}, and it drains"
        if by_queue > (running if wanted is None else wanted):
            wanted, why = by_queue, what
    silent = any(seen.sample.reporting < seen.running for seen in state.samples)
    if wanted is not None and wanted < state.replicas and silent:
        wanted, why = None, "some servers have not reported their load"
    return wanted, why


def _by_queue(work: float | None, running: int, ratio: float) -> float:
    """How many servers would bring queues that are `ratio` times too long to what is wanted."""
    if work is None:
        return running * min(ratio, QUEUE_BOOST)
    busy = min(work / running, 1.0) if running else 1.0
    room = 1 - (1 - busy) * ratio  # the utilisation at which the queue is as wanted
    most = QUEUE_BOOST * running
    return min(work / room, most) if room > 0 else most


def _queue(state: State, config: AutoscaleConfig) -> tuple[float, str]:
    """How long the queues are over what is wanted of them (0: not known), and in words."""
    found = [(0.0, "")]
    ongoing = state.mean(lambda seen: seen.sample.ongoing)
    if ongoing is not None:
        target = config.target_ongoing_requests
        found.append((ongoing / target, f"{ongoing:.1f} requests at a server, {target} wanted"))
    delay_s = state.mean(lambda seen: seen.sample.queue_delay_s)
    if delay_s is not None:
        target = config.target_queue_delay_s
        found.append((delay_s / target, f"requests wait {delay_s:.2g} s, {target} wanted"))
    return max(found)


def _drains(state: State) -> bool:
    """Whether the queues shrink over the look-back, before servers that have room."""
    busiest = state.mean(lambda seen: seen.sample.busiest)
    ongoing = [s.sample.ongoing for s in state.samples if s.sample.ongoing is not None]
    delays = [s.sample.queue_delay_s for s in state.samples if s.sample.queue_delay_s is not None]
    shrink = [trend[-1] < trend[0] for trend in (ongoing, delays) if trend]
    return bool(shrink) and all(shrink) and (busiest is None or busiest < 1)


def _step(
    state: State, wanted: float | None, why: str, least: int, config: AutoscaleConfig
) -> State:
    """The state after the delays and step bounds have had their say."""
    here, now = state.replicas, state.at_s
    if wanted is None:
        return _wait(replace(state, reason=why))
    target = min(max(ceil(wanted - 1e-9), least), config.max_replicas)
    change = abs(wanted / here - 1.0)
    if target == here or change <= config.tolerance:
        return _wait(replace(state, reason=why))
    if target > here:
        since = now if state.above_since_s is None else state.above_since_s
        state = replace(_wait(state), above_since_s=since, reason=why)
        if now - since < config.upscale_delay_s:
            return state
        step = ceil((target - here) * config.upscaling_factor)
        step = min(step, config.max_step_up or step)
        return replace(state, replicas=here + step, above_since_s=now)
    since = now if state.below_since_s is None else state.below_since_s
    falling = _falling(state, target, config)
    state = replace(state, above_since_s=None, below_since_s=since, falling=falling, reason=why)
    if now - since < config.downscale_delay_s:
        return state
    surplus = here - falling[0][1]  # the largest number wanted within the delay
    step = ceil(surplus * config.downscaling_factor)
    step = min(step, config.max_step_down or step)
    if step < surplus:  # the rest goes after another delay
        state = replace(state, below_since_s=now, falling=falling[-1:])
    return replace(state, replicas=here - step)


def _falling(state: State, target: int, config: AutoscaleConfig) -> tuple[tuple[float, int], ...]:
    """When which numbers were wanted within the delay to drain: those above all later ones."""
    since = state.at_s - config.downscale_delay_s
    kept = [(at_s, wanted) for at_s, wanted in state.falling if at_s > since and wanted > target]
    return (*kept, (state.at_s, target))


def _wait(state: State) -> State:
    """The state in which neither more nor fewer servers are wanted."""
    return replace(state, above_since_s=None, below_since_s=None, falling=())


def _calm(state: State, config: AutoscaleConfig) -> State:
    """Enters and leaves the quiet in which copies are not needed."""
    utilization = state.mean(lambda seen: seen.sample.utilization)
    now = state.at_s
    if utilization is None:
        return replace(state, quiet_since_s=None)
    if (utilization < config.quiet_utilization) == state.quiet:
        return replace(state, quiet_since_s=None)
    since = now if state.quiet_since_s is None else state.quiet_since_s
    delay_s = config.upscale_delay_s if state.quiet else config.downscale_delay_s
    if now - since < delay_s:
        return replace(state, quiet_since_s=since)
    return replace(state, quiet=not state.quiet, quiet_since_s=None)


def _decision(state: State, context: Context, config: AutoscaleConfig) -> Decision:
    room = state.replicas * context.slots - context.experts
    most = room if config.max_redundant is None else min(room, config.max_redundant)
    # More copies of an expert than servers cannot be placed.
    most = min(most, (state.replicas - 1) * context.experts)
    redundant = min(config.min_redundant, most) if state.quiet else most
    return Decision(state.replicas, redundant, state.reason)
