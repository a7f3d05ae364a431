"""Tests of ``checkpoints``."""
