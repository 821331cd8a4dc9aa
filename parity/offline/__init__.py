"""Recorded here, compared there: what a run was on any cluster, and whether two of them agree."""
