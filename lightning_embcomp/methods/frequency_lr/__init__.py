"""FA-SGD and CF-SGD: learning rates that fall with the frequency of a row."""
