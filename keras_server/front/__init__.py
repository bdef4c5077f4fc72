"""The HTTP side: sockets, requests and answers; knows nothing of models."""
