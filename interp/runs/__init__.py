"""Runs: a folder, a plan and typed stages; killed at any moment, the same call continues where it stopped."""
