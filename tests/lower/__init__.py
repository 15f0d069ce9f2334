"""Tests of `jaxpar.lower`."""
