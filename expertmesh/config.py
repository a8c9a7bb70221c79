"""Configuration as frozen data: read once at the edge, handed down in small sections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from expertmesh.errors import ConfigError

BalanceMode = Literal["frozen", "adaptive", "off"]
BalancePolicy = Literal["sign", "proportional"]
_MAX_SHARED_BYTES = 1 << 30  # of one arena that a server maps
SharedMemoryMode = Literal["auto", "off"]
DataConnectionMode = Literal["auto", "off"]
RateSchedule = Literal["constant", "inverse", "cosine"]
WireDtype = Literal["bfloat16", "bf16", "float8_e4m3fn", "fp8"]
ServerRates = Literal["equal", "measured"]  # by what rows and experts are divided over servers


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


def check_server_rates(server_rates: str) -> None:
    """Raises ConfigError for what no load controller knows."""
    _require(server_rates in get_args(ServerRates), "server_rates", server_rates,
             " or ".join(get_args(ServerRates)))  # fmt: skip


def check_data_connections(mode: DataConnectionMode) -> DataConnectionMode:
    """The mode itself. Raises ConfigError for one that is none."""
    _require(mode in get_args(DataConnectionMode), "data_connections", mode,
             " or ".join(get_args(DataConnectionMode)))  # fmt: skip
    return mode


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How the load controller turns counts into biases.

    Modes: "frozen" serves the checkpoint's own biases, "adaptive" adds a serving delta that moves
    with the load, "off" serves as frozen and does not close windows either. The trained bias is
    never changed; every rule is about the delta, of each layer by itself.
    """

    mode: BalanceMode = "frozen"  # outputs are the checkpoint's unless someone asks otherwise
    policy: BalancePolicy = "sign"  # the paper's choice: better perplexity than proportional
    update_rate: float = 1e-3  # u of arXiv 2408.15664: 1e-4 is slow early, 1e-2 fluctuates late
    schedule: RateSchedule = "constant"  # of the rate: DeepSeek-V3 kept 1e-3 until it froze
    schedule_windows: int = 500  # "inverse" halves the rate after this many windows, "cosine" has
    # come down to the floor: at 1e-3, 500 windows span the whole range of a sigmoid's scores
    update_rate_floor: float = 1e-4  # no schedule goes lower: what cannot move follows no drift
    window_tokens: int = 4096  # a window closes after this many rows of a layer ...
    window_s: float = 1.0  # ... or after this long, whichever comes first
    decay: float = 0.0  # share of the delta forgotten in a window; 0: what balance needs is kept.
    # 1e-3 lets go within some thousand windows of what the load no longer asks for
    max_delta: float | None = None  # |serving bias - trained bias| stays within this; None: free
    divergence_ceiling: float | None = None  # share of a layer's picks that may differ from frozen;
    # above it the delta is halved, at twice this taken back; None: measured only

    def __post_init__(self) -> None:
        _require(self.mode in get_args(BalanceMode), "balance.mode", self.mode, "frozen, "
                 "adaptive or off")  # fmt: skip
        _require(self.policy in get_args(BalancePolicy), "balance.policy", self.policy,
                 "sign or proportional")  # fmt: skip
        _require(self.schedule in get_args(RateSchedule), "balance.schedule", self.schedule,
                 "constant, inverse or cosine")  # fmt: skip
        _require_finite(self.update_rate, "balance.update_rate", above=0)
        _require(self.schedule_windows > 0, "balance.schedule_windows", self.schedule_windows,
                 "> 0")  # fmt: skip
        _require(self.schedule == "constant" or 0 < self.update_rate_floor <= self.update_rate,
                 "balance.update_rate_floor", self.update_rate_floor,
                 f"within (0, update_rate={self.update_rate}]")  # fmt: skip
        _require(self.window_tokens > 0, "balance.window_tokens", self.window_tokens, "> 0")
        _require_finite(self.window_s, "balance.window_s", above=0)
        _require(0 <= self.decay < 1, "balance.decay", self.decay, "within [0, 1)")
        if self.max_delta is not None:
            _require_finite(self.max_delta, "balance.max_delta", above=0)
        _require(self.divergence_ceiling is None or 0 < self.divergence_ceiling <= 1,
                 "balance.divergence_ceiling", self.divergence_ceiling,
                 "within (0, 1] or None")  # fmt: skip

    @classmethod
    def of(cls, balance: str | BalanceConfig) -> BalanceConfig:
        """`balance` itself, or the default configuration of the mode it names."""
        return balance if isinstance(balance, cls) else cls(mode=balance)  # type: ignore[arg-type]

    def with_settings(self, settings: Sequence[str]) -> BalanceConfig:
        """This configuration with settings like "max_delta=0.1" changed. Raises ConfigError.

        "none" takes a bound away.
        """
        kinds: dict[str, str] = {each.name: str(each.type) for each in fields(self)}
        return replace(self, **_changes(settings, kinds, "balance"))  # type: ignore[arg-type]


def _changes(settings: Sequence[str], kinds: dict[str, str], section: str) -> dict[str, object]:
    """Values by name, from texts like "max_delta=0.1" with or without their section."""
    changes: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().removeprefix(f"{section}.")
        _require(bool(equals) and name in kinds, f"a setting of {section}", setting,
                 f"NAME=VALUE with NAME one of {', '.join(kinds)}")  # fmt: skip
        changes[name] = _parsed(f"{section}.{name}", text.strip(), kinds[name])
    return changes


def _parsed(name: str, text: str, kind: str) -> object:
    """A setting's value from its text, by the annotation of its field."""
    if text.lower() == "none" and "None" in kind:
        return None
    try:
        if kind.startswith("int"):
            return int(text)
        return float(text) if kind.startswith("float") else text
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, expected a number") from None


def _require_finite(value: float, name: str, *, above: float) -> None:
    _require(value > above and math.isfinite(value), name, value, f"> {above}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RpcConfig:
    """Limits of a gRPC server of ours."""

    host: str = "::"  # every interface, IPv4 ones as well: peers are on other nodes
    port: int = 0  # 0: any free one, reported once bound
    data_connections: DataConnectionMode = "auto"  # whether callers may open TCP beside their
    # streams; "off": gRPC carries every byte
    data_port: int = 0  # where they connect; 0: any free one
    max_request_bytes: int = 256 << 20  # one request's hidden states: 16k tokens of width 7168
    max_inflight_bytes: int = 1 << 30  # all requests' hidden states: beyond, QUEUE_FULL
    max_inflight_frames: int = 4096  # the same in number: each holds a task and a future
    max_shared_bytes: int = _MAX_SHARED_BYTES  # one caller's shared memory; 0: everything over TCP
    stream_frames: int = 1024  # what one stream of ours may have in flight: the rest waits at its
    # sender, and others find a place
    stream_bytes: int = 256 << 20  # the same in bytes: a quarter, too
    drain_s: float = 5.0  # a stopping server lets this long pass for requests in flight

    def __post_init__(self) -> None:
        check_data_connections(self.data_connections)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemoryConfig:
    """Whether a caller shares memory with the peers of each of its streams, and how much."""

    mode: SharedMemoryMode = "off"  # "auto": with those on the same host, of the same user; one
    # more way to fail is for those to choose who gain by it
    size_bytes: int = 256 << 20  # of each stream; only what was needed at a time is ever touched,
    # and what finds no room goes over TCP

    def __post_init__(self) -> None:
        _require(self.mode in get_args(SharedMemoryMode), "shared_memory", self.mode,
                 "auto or off")  # fmt: skip
        _require(
            0 < self.size_bytes <= _MAX_SHARED_BYTES,
            "shared_memory.size_bytes",
            self.size_bytes,
            f"1 to {_MAX_SHARED_BYTES}, which servers take",
        )

    @classmethod
    def of(cls, shared_memory: str | SharedMemoryConfig) -> SharedMemoryConfig:
        """`shared_memory` itself, or the default configuration of the mode it names."""
        if isinstance(shared_memory, cls):
            return shared_memory
        return cls(mode=shared_memory)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How a router batches, spreads and retries."""

    max_batch_rows: int = 4096  # rows of one merged batch: merging copies them, and beyond there is
    # nothing to gain by it
    max_batches_per_layer: int = 2  # one computes while the next one travels
    overlap_after: float = 3.0  # times its usual time that a batch of few rows has a layer to
    # itself, for another one would read the same experts' weights beside it; 0: none
    small_rows: int = 256  # requests of more rows queue apart: decoding does not wait for prompts
    default_timeout_s: float = 30.0  # for requests that bring no deadline
    hedge_after_s: float = 0.25  # a server is overdue after this, or after `hedge_factor` times its
    # usual time where that is longer: a replica may be asked too
    hedge_factor: float = 4.0
    hedge_share: float = 0.05  # of all askings may be second ones of a server that is slow ...
    hedge_burst: float = 8.0  # ... and this many at once: it holds a few batches
    retry_pause_s: float = 0.02  # between two looks for a server, when none can be asked
    reconnect_pause_s: float = 0.1  # between two tries to connect, doubled up to ...
    reconnect_max_pause_s: float = 1.0  # ... this: actors come back within seconds
    report_every_s: float = 0.1  # counts to the controller, while they change
    sample_rows: int = 256  # of a layer between two reports, in mode "adaptive": enough to measure
    # a divergence of 5 % to one part in ten with 8 experts a row
    sample_bytes: int = 1 << 20  # of scores in one report, over all layers: 58 layers of 256
    # experts get 17 rows each
    data_connections: DataConnectionMode = "auto"  # to the expert servers: TCP beside the streams
    shared_memory: SharedMemoryConfig = SharedMemoryConfig()  # with the expert servers
    inline_rows: int = 64  # batches up to this are planned on the event loop: a thread hop costs
    # more than the work
    wire_dtype: WireDtype | None = None  # what hidden states and partial sums travel as, to and
    # from expert servers, where the batch's own type is wider; None: its own, answers are exact

    def __post_init__(self) -> None:
        _require(self.wire_dtype is None or self.wire_dtype in get_args(WireDtype),
                 "router.wire_dtype", self.wire_dtype,
                 f"{', '.join(get_args(WireDtype))} or None")  # fmt: skip
        _require(self.overlap_after >= 0, "router.overlap_after", self.overlap_after, ">= 0")
        check_data_connections(self.data_connections)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """How an expert server queues."""

    max_queue: int = 256  # requests waiting for the device; beyond, QUEUE_FULL
    merge_rows: int = 256  # waiting requests of a layer are computed together up to this: beyond,
    # arithmetic and no longer the reading of weights takes the time
    block_rows: int = 1024  # a larger request lets others go first after each so many rows
    inline_compute_s: float = 5e-4  # what usually takes less is computed on the event loop when
    # nobody waits: the way to the device thread and back would take longer
    announce_every_s: float = 1.0  # heartbeat to the controller, whatever the load takes
    load_share: float = 0.25  # of one core, for slots that are loaded while requests are answered:
    # in steps of a millisecond, with rests between them

    def __post_init__(self) -> None:
        _require(0 < self.load_share <= 1, "expert.load_share", self.load_share, "within (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig:
    """How the number of expert servers, and of redundant slots, follows the load.

    The names are Ray Serve's where it has one; a *replica* here is one expert server. Bounds hold
    at once, everything else after its delay. Whatever `min_replicas` says, there are never fewer
    servers than hold every expert once.
    """

    min_replicas: int = 1  # servers, however quiet it is
    max_replicas: int = 64  # servers, however busy it is: bounds the bill
    target_ongoing_requests: float = 2.0  # waiting or computing at one server, mean (Ray Serve's 2)
    target_utilization: float = 0.45  # work offered / capacity, mean: twice the load still fits
    # while new servers start
    peak_utilization: float | None = None  # no more servers than this of each would be kept busy by
    # the most work of the last `peak_period_s`; None: twice the load fits, however high it is
    peak_period_s: float = 86_400.0  # a day: until so long is known, `peak_utilization` waits
    target_queue_delay_s: float = 0.1  # p99 of the wait for a device; above, servers are added
    look_back_period_s: float = 10.0  # what decides is the mean over this long
    upscale_delay_s: float = 0.0  # more must be wanted for this long: a late server is a queue,
    # one too many costs `downscale_delay_s` of it
    downscale_delay_s: float = 120.0  # fewer must be wanted for this long: to load a server again
    # costs most of a minute
    upscaling_factor: float = 1.0  # part of the way to the wanted number that one step goes
    downscaling_factor: float = 1.0  # the same downwards
    max_step_up: int | None = None  # servers that one step may add; None: any number
    max_step_down: int | None = None  # servers that one step may drain; None: any number
    tolerance: float = 0.1  # wanted within this share of what is there: nothing changes
    min_redundant: int = 0  # slots of a layer beyond one an expert, however quiet it is
    max_redundant: int | None = (
        None  # the same, however busy it is; None: what servers have room for
    )
    quiet_utilization: float = 0.1  # mean, below which copies bring nothing: `min_redundant` stay

    def __post_init__(self) -> None:
        counts = {
            "min_replicas": (self.min_replicas, 1),
            "max_replicas": (self.max_replicas, self.min_replicas),
            "max_step_up": (self.max_step_up, 1),
            "max_step_down": (self.max_step_down, 1),
            "min_redundant": (self.min_redundant, 0),
            "max_redundant": (self.max_redundant, self.min_redundant),
        }
        for name, (count, least) in counts.items():
            _require(count is None or count >= least, f"autoscale.{name}", count, f">= {least}")
        for name in ("target_ongoing_requests", "target_queue_delay_s", "look_back_period_s",
                     "peak_period_s"):  # fmt: skip
            value = getattr(self, name)
            _require(0 < value < math.inf, f"autoscale.{name}", value, "a number > 0")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"autoscale.{name}", value, "a number >= 0")
        for name in ("target_utilization", "upscaling_factor", "downscaling_factor"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"autoscale.{name}", value, "within (0, 1]")
        _require(
            self.peak_utilization is None or self.target_utilization <= self.peak_utilization < 1,
            "autoscale.peak_utilization", self.peak_utilization,
            f"within [target_utilization = {self.target_utilization}, 1) or None",
        )  # fmt: skip
        _require(0 <= self.tolerance < 1, "autoscale.tolerance", self.tolerance, "within [0, 1)")
        _require(0 <= self.quiet_utilization < self.target_utilization,
                 "autoscale.quiet_utilization", self.quiet_utilization,
                 f"within [0, target_utilization = {self.target_utilization})")  # fmt: skip

    def with_settings(self, settings: Sequence[str]) -> AutoscaleConfig:
        """This configuration with settings like "max_replicas=8" changed. Raises ConfigError.

        "none" takes a bound away.
        """
        kinds: dict[str, str] = {each.name: str(each.type) for each in fields(self)}
        return replace(self, **_changes(settings, kinds, "autoscale"))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceConfig:
    """When experts move between servers by themselves, to even out what the servers have to do.

    Moving costs the reading of weights, and noise is no skew: so it is planned from an average of
    windows, and a layer moves only where that brings enough.
    """

    window_s: float = (
        10.0  # what routers count in so long is one window; and how often it is looked
    )
    half_life_windows: float = 6.0  # a window that is so many windows old weighs half
    least_assignments: int = 65536  # of a layer, in the average: with fewer, noise looks like skew
    # (256 experts: 6 % of an expert's count)
    max_violation: float = 0.15  # MaxVio over servers of the worst layer; up to it, nothing moves
    least_gain: float = 0.05  # by which a layer's MaxVio must fall, beyond what its moves cost
    pause_s: float = 60.0  # between the end of one migration and the next
    redundant: int | None = (
        None  # slots of a layer beyond one an expert; None: as many as there are
    )

    def __post_init__(self) -> None:
        for name in ("window_s", "half_life_windows"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"rebalance.{name}", value, "a number > 0")
        for name in ("max_violation", "least_gain", "pause_s"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"rebalance.{name}", value, "a number >= 0")
        _require(self.least_assignments >= 1, "rebalance.least_assignments",
                 self.least_assignments, ">= 1")  # fmt: skip
        _require(self.redundant is None or self.redundant >= 0, "rebalance.redundant",
                 self.redundant, ">= 0 or None")  # fmt: skip

    def with_settings(self, settings: Sequence[str]) -> RebalanceConfig:
        """This configuration with settings like "pause_s=30" changed. Raises ConfigError."""
        kinds: dict[str, str] = {each.name: str(each.type) for each in fields(self)}
        return replace(self, **_changes(settings, kinds, "rebalance"))  # type: ignore[arg-type]


def rebalance_config(settings: str | None) -> RebalanceConfig | None:
    """From "pause_s=30,max_violation=0.1"; the defaults from "", None from None."""
    if settings is None:
        return None
    return RebalanceConfig().with_settings(settings.split(",") if settings else ())
