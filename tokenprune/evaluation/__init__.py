"""Closed loop in simulators: every pipeline from the same starts, success in pairs."""
