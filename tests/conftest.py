import adapters  # noqa: F401
