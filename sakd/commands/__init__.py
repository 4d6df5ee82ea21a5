"""Commands of `sakd`, a file for each group of them."""
