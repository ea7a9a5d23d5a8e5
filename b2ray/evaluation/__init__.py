"""Scores on fixed seeds, comparisons of two policies, and how sure they are."""
