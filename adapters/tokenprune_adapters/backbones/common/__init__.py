"""Shared by all families: bases of backbones and factories, options, fields of `config.json`, LIBERO's actions."""
