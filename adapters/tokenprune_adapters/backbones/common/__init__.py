"""What every family builds on: bases of backbones and factories, option parsers, fields of `config.json`."""
