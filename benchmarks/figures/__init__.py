"""The documentation's plots of real runs."""
