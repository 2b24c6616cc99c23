"""Rows: their order, where they are, and streams of them."""
