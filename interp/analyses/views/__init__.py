"""Views of attention as data."""
