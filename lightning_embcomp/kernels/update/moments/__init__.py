"""Updates of rows by optimizers with two moments, and with stochastic rounding."""
