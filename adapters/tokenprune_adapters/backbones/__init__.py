"""Backbone families, one module each."""
