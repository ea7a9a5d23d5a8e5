"""The run's folder, its figures, MLflow, and what a person sees while it goes on."""
