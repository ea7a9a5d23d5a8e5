"""MLflow: a copy of the run's folder that is allowed to be late."""
