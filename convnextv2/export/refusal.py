"""Why a network is not exported."""


class ExportError(ValueError):
    """The network cannot be written in this format, or what was written computes something else."""
