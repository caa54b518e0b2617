"""Write a step's newest tokens into the dense window."""
