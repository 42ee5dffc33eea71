"""The side-by-side benchmark: this service, the same engine without HTTP, and its peers."""
