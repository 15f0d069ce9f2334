"""Tests of `jaxpar.schedule`."""
