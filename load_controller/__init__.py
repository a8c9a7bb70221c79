"""The load controller: counts in; directory, placement and biases out."""
