"""Publishes (placeholder during bootstrap)."""
