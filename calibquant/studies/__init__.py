"""What runs many pipelines."""
