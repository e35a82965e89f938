"""One module a backend; see :mod:`sparse_ops.backend` for the contract."""
