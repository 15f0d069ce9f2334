"""Tests of `jaxpar.trace`."""
