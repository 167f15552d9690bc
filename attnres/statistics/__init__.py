"""From tables to verdicts, without a model."""
