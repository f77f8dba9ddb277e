"""The ops: ``reference`` writes the paper's equations down, ``fallback`` runs them on torch's own kernels."""
