"""The Flask side: routes, protocols, pages."""
