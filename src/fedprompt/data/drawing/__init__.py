"""Drawn images: shapes, glyphs, patterns, and how they are put together. May import `core`."""
