"""The cluster as a whole: launch on Ray, supervise, command line."""

from fleet.cluster import Cluster
from fleet.launch import launch

__all__ = ["Cluster", "launch"]
