"""The algorithm on the fleet: workers, policy versions, and one stage from prompts to an update."""
