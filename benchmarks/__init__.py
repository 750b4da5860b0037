"""Measurements that take minutes to hours; tests never import them. See benchmarks/README.md."""
