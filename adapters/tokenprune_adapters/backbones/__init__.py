"""Backbone families, one package each."""
