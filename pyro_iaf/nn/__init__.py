"""The masked network, and the univariate maps that its outputs parametrise."""
