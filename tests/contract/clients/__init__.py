"""Programs of other clients against a running service; ``make test-clients`` runs them."""
