"""The planner and the autoscaler on a trace, without a cluster: `simulate`."""

from load_controller.simulator.fleet import FleetSpec
from load_controller.simulator.report import Report
from load_controller.simulator.simulate import Control, simulate
from load_controller.simulator.static import smallest_static
from load_controller.simulator.trace import Trace

__all__ = ["Control", "FleetSpec", "Report", "Trace", "simulate", "smallest_static"]
