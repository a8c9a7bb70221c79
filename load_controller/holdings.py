"""Which slots routers are shown, and what a restarted server shall load.

Servers say what they hold. Copies that are arriving (being loaded) or leaving (about to be dropped)
are hidden from routers, so that all of a step's changes are seen as one placement. Both are
written down before anything is done: a controller that was killed in mid-step begins again with the
placement that it had published, and has all hidden copies dropped, the arriving ones as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from expertmesh.codec.slots import slots_of
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2 as pb
from load_controller.migration import Copy, Step


@dataclass(frozen=True)
class Assignment:
    """What a server holds since experts have moved, and what its start had named."""

    initial: frozenset[Slot]
    slots: frozenset[Slot]


@dataclass
class Holdings:
    """Hidden copies and assignments."""

    arriving: set[Copy] = field(default_factory=set)
    leaving: set[Copy] = field(default_factory=set)
    assigned: dict[str, Assignment] = field(default_factory=dict)

    def copy(self) -> Holdings:
        """The same, to be changed, stored, and only then taken over."""
        return Holdings(set(self.arriving), set(self.leaving), dict(self.assigned))

    @property
    def hidden(self) -> set[Copy]:
        """Copies that routers are not shown."""
        return self.arriving | self.leaving

    def shown(self, announcement: pb.AnnounceServerRequest) -> frozenset[Slot]:
        """The slots of a server that routers are shown."""
        server = announcement.server.server_id
        return frozenset(slots_of(announcement.layers)) - {
            copy.slot for copy in self.hidden if copy.server == server
        }

    def switch(self, step: Step) -> None:
        """What was loaded is shown from now on, what shall go is not."""
        self.arriving -= set(step.loads)
        self.leaving |= set(step.drops)

    def give_up(self, copies: Iterable[Copy]) -> None:
        """Copies that were arriving shall go again."""
        self.arriving -= set(copies)
        self.leaving |= set(copies)

    def forget(self, server: str) -> None:
        """That server has gone for good."""
        self.arriving = {copy for copy in self.arriving if copy.server != server}
        self.leaving = {copy for copy in self.leaving if copy.server != server}
        self.assigned.pop(server, None)

    def gone(self, announcement: pb.AnnounceServerRequest) -> set[Copy]:
        """Copies that were leaving and are not held any more."""
        server, held = announcement.server.server_id, set(slots_of(announcement.layers))
        return {c for c in self.leaving if c.server == server and c.slot not in held}

    def assign(self, announcement: pb.AnnounceServerRequest) -> None:
        """Notes what a server is shown to hold, for its next start."""
        initial = frozenset(slots_of(announcement.initial_layers))
        assignment = Assignment(initial, self.shown(announcement))
        if assignment.slots == initial:
            self.assigned.pop(announcement.server.server_id, None)
        else:
            self.assigned[announcement.server.server_id] = assignment

    def to_load(self, announcement: pb.AnnounceServerRequest) -> frozenset[Slot]:
        """What a server that starts shall load instead of its initial slots; none for those.

        An assignment is void once the server is started with other slots than it was: somebody
        has decided anew.
        """
        assignment = self.assigned.get(announcement.server.server_id)
        initial = frozenset(slots_of(announcement.initial_layers))
        if assignment is None or assignment.initial != initial:
            return frozenset()
        return assignment.slots
