"""Compression methods, one folder each: card, settings, maths, state, callback."""
