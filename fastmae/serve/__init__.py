"""The service: what a model answers, uploads, the HTTP interface, and Ray Serve, each in a file."""
