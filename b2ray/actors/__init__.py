"""The Ray actors: thin shells around the policy, the rewards and the update."""
