"""Puts the ops of this package into other people's detectors, at run time, by explicit call, and reversibly."""
