"""Simulates a Gen4 camera: recordings of moving textured objects with boxes, by seed."""

from evspan.data_prep.simulator.config import CLASSES, SimulatorConfig
from evspan.data_prep.simulator.recording import (
    SimulationReport,
    simulate,
    simulated_boxes,
    simulated_events,
)

__all__ = [
    "CLASSES",
    "SimulationReport",
    "SimulatorConfig",
    "simulate",
    "simulated_boxes",
    "simulated_events",
]
