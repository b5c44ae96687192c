"""Talking to a steered model: one engine, a terminal and a page."""
