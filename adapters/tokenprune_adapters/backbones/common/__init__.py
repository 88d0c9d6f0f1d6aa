"""Shared by all families: the bases of backbones and factories, option parsers, fields of `config.json`."""
