"""Planners: from a graph of operators and a cluster to a plan."""
