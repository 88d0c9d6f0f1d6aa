"""Simulators that policies act in."""
