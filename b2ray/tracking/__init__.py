"""The run's folder, its metrics, MLflow, and what the user sees while the run goes on."""
