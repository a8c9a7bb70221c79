"""The cluster as a whole: launch on Ray, supervise, command line."""

from fleet.launch import Cluster, launch

__all__ = ["Cluster", "launch"]
