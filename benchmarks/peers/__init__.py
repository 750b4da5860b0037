"""Other ways to make embedding tables smaller, for comparisons on the same data, model and budget of tuning."""
