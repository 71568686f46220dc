"""Optuna lives here: what a sweep searches, asks, is told and remembers."""
