"""Interventions on heads and what they change."""
