"""What to expect of a deployment before it runs: this loop and the published methods in simulated time."""
