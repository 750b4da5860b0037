"""What the documentation is made from at build time: files of the repository, results, help texts, messages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the repository."""
