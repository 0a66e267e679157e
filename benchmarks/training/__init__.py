"""Training and scoring of the bundled models."""
