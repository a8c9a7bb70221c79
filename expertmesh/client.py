"""The client: torch tensors in, torch tensors out, over one or several routers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch

from expertmesh.codec import narrow
from expertmesh.codec.messages import ForwardRequest, ForwardResponse
from expertmesh.config import (
    DataConnectionMode,
    SharedMemoryConfig,
    SharedMemoryMode,
    check_data_connections,
)
from expertmesh.errors import (
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    MeshError,
    UnavailableError,
)
from expertmesh.info import MeshInfo, MeshLoad, info_of, load_of
from expertmesh.request import deadline_after, make_request
from expertmesh.router_link import SILENT_S, RouterLink
from expertmesh.rpc import forks, loop
from expertmesh.rpc.address import format_address, parse_address
from expertmesh.rpc.channel import check_proxy
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.narrowing import ask_narrow
from expertmesh.v1 import router_pb2 as pb

_RETRY_PAUSE_S = 0.05  # between tries to reach a router that has just gone
_CONTROL_TIMEOUT_S = 10.0
_COUNTS_SILENT_S = 0.5  # of a router whose answer no other one can give: more patience than else


class _Connected:
    """Base of what holds open connections, which belong to their process."""

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            f"a {type(self).__name__} can neither be pickled nor copied: it holds open "
            "connections. Pass the address on, and connect where it is used"
        )


class AsyncMesh(_Connected):
    """A connection to a cluster, for asyncio. Used from one event loop; see `connect_async`."""

    def __init__(
        self,
        addresses: list[str],
        shared_memory: str | SharedMemoryConfig = "off",
        wire_dtype: torch.dtype | str | None = None,
        data_connections: DataConnectionMode = "auto",
        proxy: str = "",
    ) -> None:
        self._proxy = check_proxy(proxy)
        self._wire_dtype = narrow.wire_dtype(wire_dtype)
        self._shared_memory = SharedMemoryConfig.of(shared_memory)
        self._data_connections = check_data_connections(data_connections)
        self._links = {each: self._link(each) for each in dict.fromkeys(addresses)}
        self._info: MeshInfo | None = None
        self._turn = 0
        self._closed = False

    async def open(self, timeout: float) -> None:
        """Finds out what is served, and by which routers. Raises UnavailableError."""
        self._info = await self._describe(deadline_after(timeout))
        # A cluster of one machine advertises its loopback address: of no use from another one.
        local = any(_is_loopback(address) for address in self._links)
        for address in self._info.routers:
            if address not in self._links and (local or not _is_loopback(address)):
                self._links[address] = self._link(address)

    def _link(self, address: str) -> RouterLink:
        return RouterLink(
            address, self._shared_memory, self._data_connections, self._proxy, self._judged
        )

    def _judged(self) -> None:
        """A router is suspected, or trusted again: what suspects hold goes to those that answer."""
        if any(not link.suspected for link in self._links.values()):
            for link in self._links.values():
                if link.suspected:
                    link.give_up()

    async def _describe(self, deadline: Deadline) -> MeshInfo:
        silent_s = SILENT_S
        while True:
            try:
                link, answer = await self._ask_any(
                    "Describe", pb.DescribeRequest(), deadline, silent_s
                )
                return info_of(answer, link.address)
            except (UnavailableError, DeadlineError) as error:
                if deadline.remaining <= _RETRY_PAUSE_S:
                    raise UnavailableError(error.message, retry_after_s=1.0) from None
            silent_s *= 2  # perhaps they are slow
            await asyncio.sleep(_RETRY_PAUSE_S)

    async def _ask_any(
        self, method: str, request: Any, deadline: Deadline, silent_s: float = SILENT_S
    ) -> tuple[RouterLink, Any]:
        """The first answer to a unary call, of routers asked one after the other; and whose it is.

        None is waited for that answers nothing, if there is another one.
        """
        avoid: frozenset[str] = frozenset()
        while True:
            link = self._pick(avoid)
            avoid |= {link.address}
            judged = silent_s if len(self._links) > 1 else None
            try:
                call = getattr(link.stub, method)
                return link, await link.control(call, request, deadline, judged)
            except (UnavailableError, DeadlineError):
                if len(avoid) == len(self._links) or deadline.remaining <= 0:
                    raise

    async def _ask_all(self, method: str, request: Any, deadline: Deadline) -> list[Any]:
        """Every router's answer to a unary call, of those that answer, in the order of asking.

        Raises UnavailableError when none does.
        """
        self._pick(frozenset())  # refuses a closed connection
        links = list(self._links.values())
        judged = _COUNTS_SILENT_S if len(links) > 1 else None
        answers: list[Any] = []
        failure: MeshError | None = None
        for link in [link for link in links if not link.suspected] or links:
            try:
                call = getattr(link.stub, method)
                answers.append(await link.control(call, request, deadline, judged))
            except (UnavailableError, DeadlineError) as error:
                failure = error
        if not answers:
            raise failure or UnavailableError("no router can be reached")
        return answers

    def describe(self) -> MeshInfo:
        """What is served: sizes, layers, dtype."""
        assert self._info is not None, "open() comes first"
        return self._info

    async def forward(
        self,
        hidden: torch.Tensor,
        layer: int,
        *,
        expert_ids: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        shared: bool = False,
        non_finite: Literal["refuse", "pass"] = "refuse",
        timeout: float = 30.0,
    ) -> torch.Tensor:
        """The feed-forward output of one layer for each row, without the residual.

        `hidden` is [..., H] float32, float16 or bfloat16 on any device; the result has its shape,
        dtype and device. With `expert_ids` and `expert_weights`, both [..., k], the caller has
        gated: only those routed experts are computed, and the shared expert if `shared`. A NaN or
        infinity is refused unless `non_finite` is "pass". Raises MeshError. No gradients.
        """
        request = make_request(hidden, layer, expert_ids, expert_weights, shared, non_finite)
        deadline = deadline_after(timeout)
        if self._wire_dtype is None:
            response = await self._forward(request, deadline)
        else:
            response = await ask_narrow(
                request,
                self._wire_dtype,
                "a router",
                lambda narrowed: self._forward(narrowed, deadline),
            )
        output = response.hidden_states
        if output.shape == hidden.shape and output.device == hidden.device:
            return output
        return output.to(hidden.device).view(hidden.shape)

    async def _forward(self, request: ForwardRequest, deadline: Deadline) -> ForwardResponse:
        avoid: frozenset[str] = frozenset()
        while True:
            link = self._pick(avoid)
            try:
                return await link.forward(request, deadline, judged=len(self._links) > 1)
            except UnavailableError:
                if deadline.remaining <= _RETRY_PAUSE_S:
                    raise
            avoid |= {link.address}
            if len(avoid) == len(self._links):
                avoid = frozenset()
                await asyncio.sleep(_RETRY_PAUSE_S)

    def _pick(self, avoid: frozenset[str]) -> RouterLink:
        """The router with the fewest requests in flight; those with equally few take turns.

        Suspects are the last choice.
        """
        forks.use_grpc()
        if self._closed:
            raise UnavailableError("this connection has been closed: connect again")
        links = [link for address, link in self._links.items() if address not in avoid]
        links = [link for link in links if not link.suspected] or links
        self._turn += 1
        first = self._turn % len(links)
        return min(links[first:] + links[:first], key=lambda link: link.in_flight)

    async def load(self, timeout: float = _CONTROL_TIMEOUT_S) -> MeshLoad:
        """Cumulative assignments and MaxVio. Raises UnavailableError without a controller."""
        # Every router first tells the controller its counts: the last to be asked knows them all.
        answers = await self._ask_all("GetLoad", pb.GetLoadRequest(), deadline_after(timeout))
        return load_of(answers[-1], self.describe())

    async def status(self, timeout: float = _CONTROL_TIMEOUT_S) -> pb.GetStatusResponse:
        """One router's view of its cluster, as router.proto has it."""
        request, deadline = pb.GetStatusRequest(), deadline_after(timeout)
        answer: pb.GetStatusResponse = (await self._ask_any("GetStatus", request, deadline))[1]
        return answer

    async def statuses(self, timeout: float = _CONTROL_TIMEOUT_S) -> list[pb.GetStatusResponse]:
        """Every router's view, of those that answer. Raises UnavailableError when none does."""
        return await self._ask_all("GetStatus", pb.GetStatusRequest(), deadline_after(timeout))

    async def close(self) -> None:
        """Closes every connection; requests in flight fail with UnavailableError."""
        self._closed = True
        for link in self._links.values():
            await link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Mesh(_Connected):
    """A connection to a cluster, for any number of threads; see `connect`."""

    def __init__(self, mesh: AsyncMesh) -> None:
        self._mesh = mesh

    def describe(self) -> MeshInfo:
        """What is served: sizes, layers, dtype."""
        return self._mesh.describe()

    def forward(
        self,
        hidden: torch.Tensor,
        layer: int,
        *,
        expert_ids: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        shared: bool = False,
        non_finite: Literal["refuse", "pass"] = "refuse",
        timeout: float = 30.0,
    ) -> torch.Tensor:
        """See AsyncMesh.forward."""
        return loop.run(
            self._mesh.forward(
                hidden,
                layer,
                expert_ids=expert_ids,
                expert_weights=expert_weights,
                shared=shared,
                non_finite=non_finite,
                timeout=timeout,
            )
        )

    def load(self, timeout: float = _CONTROL_TIMEOUT_S) -> MeshLoad:
        """See AsyncMesh.load."""
        return loop.run(self._mesh.load(timeout))

    def status(self, timeout: float = _CONTROL_TIMEOUT_S) -> pb.GetStatusResponse:
        """See AsyncMesh.status."""
        return loop.run(self._mesh.status(timeout))

    def statuses(self, timeout: float = _CONTROL_TIMEOUT_S) -> list[pb.GetStatusResponse]:
        """See AsyncMesh.statuses."""
        return loop.run(self._mesh.statuses(timeout))

    def close(self) -> None:
        """See AsyncMesh.close."""
        loop.run(self._mesh.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Connecting(Coroutine[Any, Any, AsyncMesh]):
    """A connection being made: a coroutine to await, which `async with` takes as well."""

    def __init__(self, opening: Coroutine[Any, Any, AsyncMesh]) -> None:
        self._opening = opening
        self._mesh: AsyncMesh | None = None

    def send(self, value: Any) -> Any:
        """See Coroutine."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """See Coroutine."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """See Coroutine."""
        self._opening.close()

    def __await__(self) -> Generator[Any, Any, AsyncMesh]:
        return self._opening.__await__()

    async def __aenter__(self) -> AsyncMesh:
        self._mesh = await self._opening
        return self._mesh

    async def __aexit__(self, *_: object) -> None:
        if self._mesh is not None:
            await self._mesh.close()


async def _open(
    addresses: list[str],
    timeout: float,
    shared_memory: str | SharedMemoryConfig,
    wire_dtype: torch.dtype | str | None,
    data_connections: DataConnectionMode,
    proxy: str,
) -> AsyncMesh:
    mesh = AsyncMesh(addresses, shared_memory, wire_dtype, data_connections, proxy)
    try:
        await mesh.open(timeout)
    except BaseException:
        await mesh.close()
        raise
    return mesh


def connect_async(
    address: str,
    timeout: float = 10.0,
    *,
    shared_memory: SharedMemoryMode | SharedMemoryConfig = "off",
    wire_dtype: torch.dtype | str | None = None,
    data_connections: DataConnectionMode = "auto",
    proxy: str = "",
) -> Connecting:
    """Connects to a cluster by the address of a router, or several, separated by commas.

    `mesh = await connect_async(...)`, or `async with connect_async(...) as mesh`. Further routers
    of the same cluster are found, and requests spread over all of them. Raises UnavailableError
    when none answers within `timeout` seconds.

    With `shared_memory` "auto", hidden states go through memory that is shared with those routers
    that run on the same host as the same user, and over TCP to the others.

    `wire_dtype` makes hidden states and answers travel narrower than the caller has them:
    "bfloat16" of float32, "float8_e4m3fn" of all three; answers are less exact then
    (docs/protocol.md has the error). What is as narrow already travels as it is.

    Requests go over a TCP connection of their own, beside the gRPC stream that opened it, where the
    router's host can be reached at its data port; with `data_connections` "off", over gRPC always.

    Proxies that the environment names are not used. `proxy`, "http://host:port", is one that takes
    CONNECT: every byte goes through it then, over gRPC, but to hosts that `no_proxy` names.
    """
    opening = _open(
        _addresses(address), timeout, shared_memory, wire_dtype, data_connections, proxy
    )
    return Connecting(opening)


def connect(
    address: str,
    timeout: float = 10.0,
    *,
    shared_memory: SharedMemoryMode | SharedMemoryConfig = "off",
    wire_dtype: torch.dtype | str | None = None,
    data_connections: DataConnectionMode = "auto",
    proxy: str = "",
) -> Mesh:
    """The blocking, thread-safe twin of `connect_async`."""
    opening = _open(
        _addresses(address), timeout, shared_memory, wire_dtype, data_connections, proxy
    )
    return Mesh(loop.run(opening))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0]
    return host.startswith("127.") or host in ("localhost", "[::1]")


def _addresses(address: str) -> list[str]:
    """The addresses that a text names, separated by commas. Raises InvalidRequestError."""
    if not isinstance(address, str):
        raise InvalidRequestError(f"address is {address!r}, expected 'host:port'", field="address")
    parts = [part.strip() for part in address.split(",") if part.strip()]
    if not parts:
        raise InvalidRequestError("address is empty, expected host:port", field="address")
    return [_address(part) for part in parts]


def _address(text: str) -> str:
    address = parse_address(text, "address", InvalidRequestError)
    # Our servers speak IPv4, and say 127.0.0.1 of themselves: one router, one name.
    host = "127.0.0.1" if address.host.lower() == "localhost" else address.host
    return format_address(host, address.port)
