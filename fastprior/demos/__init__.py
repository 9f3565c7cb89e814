"""Data whose answers are known, and the quickstart."""
