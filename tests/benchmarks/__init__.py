"""Tests of what `benchmarks` computes without a device."""
