"""The last cluster started on this host: a small file that the commands read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from expertmesh.errors import ConfigError


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
    """The folder for this user's state: XDG_STATE_HOME/expertmesh."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "expertmesh"


def _file() -> Path:
    return state_folder() / "last-cluster.json"


def remember(cluster: LastCluster) -> None:
    """Makes this the last cluster."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    fresh = _file().with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(asdict(cluster)))
    fresh.replace(_file())


def forget(address: str) -> None:
    """Removes the file if it still names this cluster."""
    last = recall()
    if last is not None and last.address == address:
        _file().unlink(missing_ok=True)


def recall() -> LastCluster | None:
    """The last cluster, None when there is none."""
    try:
        return LastCluster(**json.loads(_file().read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{_file()} cannot be read ({error}): remove it") from None
