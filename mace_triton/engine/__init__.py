"""Energies and forces step after step: static buffers, neighbours on the device, one CUDA graph for a step."""

from .engine import SKIN, Engine, Results

__all__ = ["SKIN", "Engine", "Results"]
