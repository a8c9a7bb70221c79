"""Tile sizes of the products: tables that were tuned for a GPU, and a rule for the rest."""
