"""Metrics: checkpoints attached to a clean base come in, their scores go out. One file a metric.

Open metric.py first: it has what a metric is.
"""
