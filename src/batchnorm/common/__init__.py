"""Helpers for every room: files that appear whole, errors in one line, users' names, cores."""
