"""Pipelined steps against the undecorated ones, in float64."""
