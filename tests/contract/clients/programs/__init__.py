"""One program for each client, run in an environment with that client's package."""
