"""Tests of `jaxpar.show`."""
