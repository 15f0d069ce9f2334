"""Tests that compile for hardware that is not there."""
