"""The last cluster started on this host: a small file that the commands read.

It is a convenience of the commands: a cluster starts and ends as well where it cannot be written.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from expertmesh.errors import ConfigError
from expertmesh.rpc.address import parse_address

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastCluster:
    """Where a cluster can be reached, and which process owns it."""

    address: str
    pid: int
    started: str  # when the process started, as the system counts: pids are used again
    command: str  # "serve" or "demo", which `down` may end; "launch" belongs to somebody's program


def started(pid: int) -> str:
    """When a process started, in the system's own ticks; empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie has ended, but for its parent


def state_folder() -> Path:
    """The folder for this user's state: XDG_STATE_HOME/expertmesh, ~/.local/state/expertmesh.

    Raises ConfigError for a user without a home folder.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    if Path(named).is_absolute():  # the XDG specification: others are to be ignored
        return Path(named) / "expertmesh"
    try:
        return Path.home() / ".local" / "state" / "expertmesh"
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder: set HOME, or XDG_STATE_HOME to a folder that can be "
            "written"
        ) from None


def _file() -> Path:
    return state_folder() / "last-cluster.json"


def remember(cluster: LastCluster) -> None:
    """Makes this the last cluster; where that cannot be noted, the log says so."""
    try:
        _write(json.dumps(asdict(cluster)))
    except (OSError, ConfigError) as error:
        _log.warning(
            "the cluster cannot be noted (%s): `expertmesh down` will not find it, other commands "
            "with --router %s", error, cluster.address,
        )  # fmt: skip


def _write(text: str) -> None:
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def forget(address: str) -> None:
    """Removes the file if it still names this cluster; where it cannot be, the log says so."""
    try:
        last = recall()
        if last is not None and last.address == address:
            _file().unlink(missing_ok=True)
    except (OSError, ConfigError) as error:
        _log.warning("the note of the last cluster stays: %s", error)


def recall() -> LastCluster | None:
    """The last cluster, None when there is none. Raises ConfigError when that cannot be read."""
    file = _file()
    try:
        return _parse(file.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}), which names the last cluster of this "
            "host: mend that, or name a router with --router HOST:PORT"
        ) from None
    except (ValueError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"{file} does not name a cluster ({error}): remove it, and name a router with --router "
            "HOST:PORT"
        ) from None


def _parse(text: str) -> LastCluster:
    """Raises ValueError and ConfigError for anything that `remember` would not have written.

    `down` sends a signal to the process: a pid of -1 would be every process there is.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.keys() != {each.name for each in fields(LastCluster)}:
        raise ValueError("other fields are expected")
    last = LastCluster(**found)
    for each in str(last.address).split(","):
        parse_address(each)
    if type(last.pid) is not int or last.pid < 1:
        raise ValueError(f"pid is {last.pid!r}")
    if not (isinstance(last.started, str) and last.started and isinstance(last.command, str)):
        raise ValueError(f"started is {last.started!r}, command {last.command!r}")
    return last
