"""Token methods (tokens leave while the model runs) and structure methods (parts leave for good)."""
