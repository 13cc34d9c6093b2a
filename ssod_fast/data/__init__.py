"""Readers, splits, views and loaders."""
