"""Payment rules: from contribution scores to integer micro-credits."""
