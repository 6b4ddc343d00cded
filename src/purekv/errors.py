"""The one exception that purekv raises for a request it cannot serve."""


class PureKVError(ValueError):
    """A request that cannot be served; the message is one line and names the fix."""
