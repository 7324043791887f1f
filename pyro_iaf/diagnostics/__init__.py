"""Judge a fit, refine it, hand it on."""
