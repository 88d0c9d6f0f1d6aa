"""The tokens of a query, which of them stay, and how many: plain data and pure tensor functions."""
