"""Finding, loading and computing models; knows nothing of HTTP."""
